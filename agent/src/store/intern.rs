//! Puts samples of several dictionaries into one.

use std::{hash::Hash, sync::Arc};

use hashbrown::HashMap;

use crate::profile::{
    Dictionary, Frame, FrameId, Function, FunctionId, Mapping, MappingId, Sample, StackId,
    StringId, Workload, WorkloadId,
};

/// A dictionary that grows by what is looked up in others.
#[derive(Default)]
pub(super) struct Interner {
    into: Dictionary,
    strings: HashMap<Arc<str>, u32>,
    mappings: HashMap<Mapping, u32>,
    functions: HashMap<Function, u32>,
    frames: HashMap<Frame, u32>,
    stacks: HashMap<Arc<[FrameId]>, u32>,
    workloads: HashMap<Arc<Workload>, u32>,
}

/// The IDs of one source that were looked up already.
#[derive(Default)]
pub(super) struct Known {
    strings: HashMap<StringId, StringId>,
    frames: HashMap<FrameId, FrameId>,
    stacks: HashMap<StackId, StackId>,
    workloads: HashMap<WorkloadId, WorkloadId>,
}

/// The index of a value, which is appended to the table if it is new.
fn intern<T: Clone + Eq + Hash>(ids: &mut HashMap<T, u32>, table: &mut Vec<T>, value: T) -> u32 {
    *ids.entry(value).or_insert_with_key(|value| {
        table.push(value.clone());
        // A table of more than u32::MAX entries would need terabytes.
        (table.len() - 1) as u32
    })
}

impl Interner {
    /// An empty one, but for the empty string.
    pub(super) fn new() -> Self {
        let mut new = Self::default();
        intern(&mut new.strings, &mut new.into.all.strings, Arc::from(""));
        new
    }

    /// The dictionary.
    pub(super) fn finish(self) -> Dictionary {
        self.into
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
        *known.strings.entry(id).or_insert_with(|| {
            let text = from.all.strings.get(id.0 as usize).cloned().unwrap_or_else(|| "".into());
            StringId(intern(&mut self.strings, &mut self.into.all.strings, text))
        })
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
        MappingId(intern(&mut self.mappings, &mut self.into.all.mappings, mapping))
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
        let function = intern(&mut self.functions, &mut self.into.all.functions, function);
        let frame = Frame { function: FunctionId(function), ..frame.clone() };
        let new = FrameId(intern(&mut self.frames, &mut self.into.all.frames, frame));
        known.frames.insert(id, new);
        Some(new)
    }

    fn stack(&mut self, from: &Dictionary, known: &mut Known, id: StackId) -> StackId {
        if let Some(known) = known.stacks.get(&id) {
            return *known;
        }
        let frames: Arc<[FrameId]> =
            from.stack(id).iter().filter_map(|f| self.frame(from, known, *f)).collect();
        let new = StackId(intern(&mut self.stacks, &mut self.into.all.stacks, frames));
        known.stacks.insert(id, new);
        new
    }

    fn workload(&mut self, from: &Dictionary, known: &mut Known, id: WorkloadId) -> WorkloadId {
        *known.workloads.entry(id).or_insert_with(|| {
            let workload = from.workload(id).cloned().unwrap_or_default();
            WorkloadId(intern(&mut self.workloads, &mut self.into.all.workloads, workload))
        })
    }
}
