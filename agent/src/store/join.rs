//! Puts samples of several dictionaries into one.

use std::sync::Arc;

use hashbrown::HashMap;

use crate::{
    intern::Interner,
    profile::{
        Dictionary, Frame, FrameId, Function, Mapping, MappingId, Sample, StackId, StringId,
        WorkloadId,
    },
};

/// A dictionary that grows by what is looked up in others.
#[derive(Default)]
pub(super) struct Joined(Interner);

/// The IDs of one source that were looked up already.
#[derive(Default)]
pub(super) struct Known {
    strings: HashMap<StringId, StringId>,
    frames: HashMap<FrameId, FrameId>,
    stacks: HashMap<StackId, StackId>,
    workloads: HashMap<WorkloadId, WorkloadId>,
}

impl Joined {
    /// The dictionary.
    pub(super) fn finish(mut self) -> Dictionary {
        Dictionary { generation: self.0.generation(), all: self.0.take_new() }
    }

    /// A sample of the dictionary `from`, with the IDs it has here. An ID that `from` does not have
    /// stands for an empty entry.
    pub(super) fn sample(&mut self, from: &Dictionary, known: &mut Known, s: &Sample) -> Sample {
        Sample {
            workload: self.workload(from, known, s.workload),
            comm: self.string(from, known, s.comm),
            stack: self.stack(from, known, s.stack),
            ..*s
        }
    }

    fn string(&mut self, from: &Dictionary, known: &mut Known, id: StringId) -> StringId {
        *known.strings.entry(id).or_insert_with(|| self.0.string(from.string(id)))
    }

    fn mapping(&mut self, from: &Dictionary, known: &mut Known, id: MappingId) -> MappingId {
        let (path, build_id) = from
            .all
            .mappings
            .get(id.0 as usize)
            .map_or_else(Default::default, |m| (m.path, m.build_id));
        let mapping = Mapping {
            path: self.string(from, known, path),
            build_id: self.string(from, known, build_id),
        };
        self.0.mapping(mapping)
    }

    fn frame(&mut self, from: &Dictionary, known: &mut Known, id: FrameId) -> Option<FrameId> {
        if let Some(known) = known.frames.get(&id) {
            return Some(*known);
        }
        let (frame, function) = from.frame(id)?;
        let function = Function {
            name: self.string(from, known, function.name),
            file: self.string(from, known, function.file),
            mapping: self.mapping(from, known, function.mapping),
        };
        let new = Frame { function: self.0.function(function), ..frame.clone() };
        let new = self.0.frame(new);
        known.frames.insert(id, new);
        Some(new)
    }

    fn stack(&mut self, from: &Dictionary, known: &mut Known, id: StackId) -> StackId {
        if let Some(known) = known.stacks.get(&id) {
            return *known;
        }
        let frames: Vec<FrameId> =
            from.stack(id).iter().filter_map(|f| self.frame(from, known, *f)).collect();
        let new = self.0.stack(&frames);
        known.stacks.insert(id, new);
        new
    }

    fn workload(&mut self, from: &Dictionary, known: &mut Known, id: WorkloadId) -> WorkloadId {
        let workload = || from.workload(id).map_or_else(Arc::default, Arc::clone);
        *known.workloads.entry(id).or_insert_with(|| self.0.workload(workload()))
    }
}
