//! CPython: which processes run it, what its code objects are called, and where its frames belong in
//! a native stack. The walk along the frames is in `podflame_wire::python`, and runs in the kernel.
//!
//! [`Reader`] belongs to the thread that reads processes while they live; what it has read goes to the
//! resolver, which keeps it in [`Codes`]. Whatever comes from a process is hostile: bounded, and refused
//! with a reason where it is not what it should be.
//!
//! Known are 3.8 to 3.13 in their release builds ([`version`]); any other version is refused.

pub mod code;
pub mod discover;
pub mod lines;
pub mod merge;
mod offsets;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests;
pub mod version;

use std::sync::Arc;

use hashbrown::HashMap;

use self::discover::Discovery;
pub use self::{
    code::{Code, NoCode},
    discover::Program,
};
use crate::{
    event::ProcessKey,
    symbols::{Sighting, memory},
};

/// Processes that are known to run Python; beyond it all are forgotten, until they are seen again. Each
/// costs some 200 bytes.
const PROGRAMS: usize = 4096;

/// Bytes of code objects that are kept; beyond it all are forgotten, and read again if they can. A large
/// program runs some 10,000 functions of 1 KiB or so.
const BYTES: usize = 32 << 20;

/// Code objects that were read, each with its address.
pub type Read = Vec<(u64, Result<Code, NoCode>)>;

type Programs = HashMap<ProcessKey, Arc<Program>, foldhash::fast::RandomState>;

/// Finds processes that run Python and reads their code objects, while they live.
#[derive(Debug, Default)]
pub struct Reader {
    discovery: Discovery,
    programs: Programs,
}

impl Reader {
    /// What a process runs, by what was just read of it.
    pub fn look(&mut self, process: ProcessKey, seen: &Sighting) -> Option<Arc<Program>> {
        let found = self.discovery.look(process, seen).map(Arc::new);
        match &found {
            Some(program) => {
                if self.programs.len() >= PROGRAMS {
                    self.programs.clear();
                }
                self.programs.insert(process, Arc::clone(program));
            }
            None => {
                self.programs.remove(&process);
            }
        }
        found
    }

    /// Reads code objects of a process.
    #[must_use]
    pub fn read(&self, process: ProcessKey, codes: &[u64]) -> Read {
        self.programs.get(&process).map_or_else(Vec::new, |program| read(process, program, codes))
    }
}

/// Reads code objects of a process.
fn read(process: ProcessKey, program: &Program, codes: &[u64]) -> Read {
    let memory = memory(process).map_err(|_| NoCode::Gone);
    let read = |address: &u64| match &memory {
        Ok(memory) => Code::read(memory, *address, &program.version, program.code_type),
        Err(reason) => Err(*reason),
    };
    codes.iter().map(|address| (*address, read(address))).collect()
}

/// What is known of processes that run Python, for the resolver.
#[derive(Debug, Default)]
pub struct Codes {
    programs: Programs,
    codes: HashMap<(ProcessKey, u64), Result<Arc<Code>, NoCode>, foldhash::fast::RandomState>,
    bytes: usize,
}

impl Codes {
    /// A process was read: takes over what it runs.
    pub fn sight(&mut self, process: ProcessKey, program: Option<Arc<Program>>) {
        if self.programs.len() >= PROGRAMS {
            self.programs.clear();
        }
        match program {
            Some(program) => drop(self.programs.insert(process, program)),
            None => drop(self.programs.remove(&process)),
        }
    }

    /// Takes over code objects that were read. Whether one is not what it was: its address has been used
    /// again.
    pub fn accept(&mut self, process: ProcessKey, read: Read) -> bool {
        let mut changed = false;
        for (address, code) in read {
            let known = self.codes.get(&(process, address));
            match (known, &code) {
                // What a process was once seen to run stays known when it is gone.
                (Some(Ok(_)), Err(NoCode::Gone)) => continue,
                (Some(Ok(known)), Ok(code)) if **known == *code => continue,
                (Some(known), _) => {
                    changed |= known.as_ref().err() != code.as_ref().err() || known.is_ok()
                }
                (None, _) => {}
            }
            // What it returns is what it was given.
            let _ = self.insert(process, address, code);
        }
        changed
    }

    /// What a process runs.
    #[must_use]
    pub fn program(&self, process: ProcessKey) -> Option<&Arc<Program>> {
        self.programs.get(&process)
    }

    /// The code object at an address of a process; reads it if that has not been done.
    ///
    /// # Errors
    ///
    /// If nothing is known of it.
    pub fn find(&mut self, process: ProcessKey, address: u64) -> Result<Arc<Code>, NoCode> {
        if let Some(known) = self.codes.get(&(process, address)) {
            return known.clone();
        }
        let program = self.programs.get(&process);
        let mut code = program.map_or_else(Vec::new, |program| read(process, program, &[address]));
        // Kept also if nothing is known, so that it is noticed when something is.
        let code = code.pop().map_or(Err(NoCode::Gone), |(_, code)| code);
        self.insert(process, address, code)
    }

    fn insert(
        &mut self,
        process: ProcessKey,
        address: u64,
        code: Result<Code, NoCode>,
    ) -> Result<Arc<Code>, NoCode> {
        self.bytes += code.as_ref().map_or(64, Code::bytes);
        if self.bytes > BYTES {
            self.codes.clear();
            self.bytes = code.as_ref().map_or(64, Code::bytes);
        }
        let code = code.map(Arc::new);
        self.codes.insert((process, address), code.clone());
        code
    }
}
