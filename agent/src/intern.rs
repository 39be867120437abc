//! The writing end of the dictionary: gives each distinct string, function, frame, stack and
//! workload its ID, and hands out what is new since the last batch.
//!
//! Bounded by generations: when the tables have grown too large they start afresh, and earlier IDs
//! are void. Nothing is lost by that; what is still in use is sent again.

use std::{hash::Hash, net::SocketAddr, sync::Arc};

use hashbrown::HashMap;

use crate::{
    profile::{
        Additions, Frame, FrameId, Function, FunctionId, Mapping, MappingId, StackId, StringId,
        Workload, WorkloadId,
    },
    redact::Redactor,
};

/// Estimated bytes of one generation, the readers' replica not counted. A million distinct stacks of
/// 15 frames fit; more often than every few minutes on the busiest node it should not turn over,
/// because every client is then sent all names again.
pub const MAX_BYTES: usize = 48 << 20;

/// What a workload is taken to cost: its names are about so long, twice.
const WORKLOAD_BYTES: usize = 1024;

type Table<K> = HashMap<K, u32, foldhash::fast::RandomState>;

/// The tables of one generation.
#[derive(Debug)]
pub struct Interner {
    generation: u64,
    bytes: usize,
    strings: Table<Arc<str>>,
    mappings: Table<Mapping>,
    functions: Table<Function>,
    frames: Table<Frame>,
    stacks: Table<Arc<[FrameId]>>,
    workloads: Table<Arc<Workload>>,
    /// The same by the address of the shared copy, which the table above keeps: most events come
    /// with that one, and its texts need not be compared.
    by_address: Table<usize>,
    /// What was handed out for each workload, by its ID.
    named: Vec<Arc<Workload>>,
    new: Additions,
    redactor: Arc<Redactor>,
}

impl Default for Interner {
    fn default() -> Self {
        let mut interner = Self {
            generation: 1,
            bytes: 0,
            strings: Table::default(),
            mappings: Table::default(),
            functions: Table::default(),
            frames: Table::default(),
            stacks: Table::default(),
            workloads: Table::default(),
            by_address: Table::default(),
            named: Vec::new(),
            new: Additions::default(),
            redactor: Arc::default(),
        };
        interner.string("");
        interner
    }
}

impl Interner {
    /// Takes out of every text what those rules say.
    #[must_use]
    pub fn with_redactor(self, redactor: Redactor) -> Self {
        Self { redactor: Arc::new(redactor), ..self }
    }

    /// An address as it may be told.
    #[must_use]
    pub fn address(&self, address: SocketAddr) -> SocketAddr {
        self.redactor.address(address)
    }

    /// The generation that IDs belong to now.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Starts a new generation if this one has grown too large. Returns whether it did: all IDs
    /// given before are then void. Only between batches.
    pub fn turn_over(&mut self) -> bool {
        if self.bytes <= MAX_BYTES {
            return false;
        }
        let redactor = Arc::clone(&self.redactor);
        *self = Self { generation: self.generation + 1, redactor, ..Self::default() };
        true
    }

    /// What is new since the last call.
    pub fn take_new(&mut self) -> Additions {
        std::mem::take(&mut self.new)
    }

    /// The ID of a string.
    pub fn string(&mut self, text: &str) -> StringId {
        if let Some(id) = self.strings.get(text) {
            return StringId(*id);
        }
        // Known here by itself, and to others without what must not leave the node.
        let out: Arc<str> = self.redactor.text(text).into();
        let text = if *out == *text { Arc::clone(&out) } else { text.into() };
        self.bytes += 64 + text.len();
        let id = self.strings.len() as u32;
        self.strings.insert(text, id);
        self.new.strings.push(out);
        StringId(id)
    }

    /// The ID of a mapping.
    pub fn mapping(&mut self, mapping: Mapping) -> MappingId {
        MappingId(entry(&mut self.mappings, &mut self.new.mappings, &mut self.bytes, mapping))
    }

    /// The ID of a function.
    pub fn function(&mut self, function: Function) -> FunctionId {
        FunctionId(entry(&mut self.functions, &mut self.new.functions, &mut self.bytes, function))
    }

    /// The ID of a frame.
    pub fn frame(&mut self, frame: Frame) -> FrameId {
        FrameId(entry(&mut self.frames, &mut self.new.frames, &mut self.bytes, frame))
    }

    /// The ID of a stack, innermost frame first.
    pub fn stack(&mut self, frames: &[FrameId]) -> StackId {
        if let Some(id) = self.stacks.get(frames) {
            return StackId(*id);
        }
        let frames: Arc<[FrameId]> = frames.into();
        self.bytes += 64 + size_of_val(&*frames);
        StackId(add(&mut self.stacks, &mut self.new.stacks, frames))
    }

    /// The ID of a workload.
    pub fn workload(&mut self, workload: Arc<Workload>) -> WorkloadId {
        self.workload_named(workload, Arc::clone)
    }

    /// The ID of a workload that is handed out under another name. The workload itself decides
    /// which it is, so that its name can change.
    pub fn workload_named(
        &mut self,
        workload: Arc<Workload>,
        name: impl FnOnce(&Arc<Workload>) -> Arc<Workload>,
    ) -> WorkloadId {
        if let Some(id) = self.by_address.get(&Arc::as_ptr(&workload).addr()) {
            return WorkloadId(*id);
        }
        if let Some(id) = self.workloads.get(&workload) {
            return WorkloadId(*id);
        }
        self.bytes += WORKLOAD_BYTES;
        let named = name(&workload);
        self.new.workloads.push(self.redactor.workload(&named));
        self.named.push(named);
        let id = self.workloads.len() as u32;
        self.by_address.insert(Arc::as_ptr(&workload).addr(), id);
        self.workloads.insert(workload, id);
        WorkloadId(id)
    }

    /// Hands out the names that changed since each workload was handed out.
    pub fn rename(&mut self, mut name: impl FnMut(&Arc<Workload>) -> Arc<Workload>) {
        for (workload, id) in &self.workloads {
            let Some(before) = self.named.get_mut(*id as usize) else { continue };
            let named = name(workload);
            if !Arc::ptr_eq(&named, before) && named != *before {
                *before = Arc::clone(&named);
                // What is told again and again ends the generation too.
                self.bytes += WORKLOAD_BYTES;
                self.new.renamed.push((WorkloadId(*id), self.redactor.workload(&named)));
            }
        }
    }
}

/// The ID of an entry of a fixed size.
fn entry<K: Hash + Eq + Clone>(
    table: &mut Table<K>,
    new: &mut Vec<K>,
    bytes: &mut usize,
    key: K,
) -> u32 {
    if let Some(id) = table.get(&key) {
        return *id;
    }
    *bytes += 2 * (size_of::<K>() + 8);
    add(table, new, key)
}

/// Gives the next ID. It cannot overflow: a generation's bytes are bounded far below.
fn add<K: Hash + Eq + Clone>(table: &mut Table<K>, new: &mut Vec<K>, key: K) -> u32 {
    let id = table.len() as u32;
    table.insert(key.clone(), id);
    new.push(key);
    id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Dictionary;

    #[test]
    fn ids_are_dense_and_a_replica_agrees() {
        let mut interner = Interner::default();
        let mut replica = Dictionary::default();
        let a = interner.string("a");
        let b = interner.string("b");
        assert_eq!((a, interner.string("a"), b), (StringId(1), StringId(1), StringId(2)));
        let stack = interner.stack(&[FrameId(7), FrameId(8)]);
        replica.apply(interner.generation(), &interner.take_new());
        let c = interner.string("c");
        replica.apply(interner.generation(), &interner.take_new());
        assert_eq!((replica.string(a), replica.string(b), replica.string(c)), ("a", "b", "c"));
        assert_eq!(replica.string(StringId(0)), "");
        assert_eq!(replica.stack(stack), [FrameId(7), FrameId(8)]);
    }

    #[test]
    fn a_generation_that_is_too_large_turns_over_and_replicas_follow() {
        let mut interner = Interner::default();
        let mut replica = Dictionary::default();
        let long = "x".repeat(1 << 20);
        let mut n = 0;
        while !interner.turn_over() {
            n += 1;
            interner.string(&format!("{n}{long}"));
            replica.apply(interner.generation(), &interner.take_new());
        }
        assert!(n <= MAX_BYTES / long.len() + 1);
        let again = interner.string("again");
        replica.apply(interner.generation(), &interner.take_new());
        assert_eq!(again, StringId(1));
        assert_eq!(replica.string(again), "again");
        assert_eq!(replica.all.strings.len(), 2);
    }
}
