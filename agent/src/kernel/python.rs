//! Which processes run Python, as the programs are told. Not for finding that out.

use aya::maps::{HashMap, Map, MapData};
use podflame_wire::{
    map,
    python::{PROCESS_WORDS, Process},
};
use zerocopy::transmute;

use super::{KernelError, wrong_map};

/// Tells the programs which processes run Python.
pub struct PythonMap(HashMap<MapData, u32, [u64; PROCESS_WORDS]>);

impl PythonMap {
    pub(super) fn new(map: Map) -> Result<Self, KernelError> {
        HashMap::try_from(map).map(Self).map_err(|e| wrong_map(map::PYTHON, &e))
    }

    /// What a process runs from now on: this, or no Python.
    ///
    /// # Errors
    ///
    /// If the kernel refuses it.
    pub fn set(&mut self, pid: u32, process: Option<&Process>) -> Result<(), KernelError> {
        match process {
            Some(process) => {
                let words: [u64; PROCESS_WORDS] = transmute!(*process);
                self.0.insert(pid, words, 0).map_err(|e| wrong_map(map::PYTHON, &e))
            }
            None => {
                // Nearly always it is not there.
                let _ = self.0.remove(&pid);
                Ok(())
            }
        }
    }
}
