//! Functions of the running kernel, its modules and BPF programs, from `/proc/kallsyms`.
//!
//! Not for inlined functions and lines of the kernel: its debug information is rarely on the node
//! and larger than everything else together.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Unknown, maps::hex, names};

/// Where the kernel lists its symbols (`kernel/kallsyms.c`).
const KALLSYMS: &str = "/proc/kallsyms";
/// Most bytes that are read of it: five times what a large kernel has.
const BYTES: u64 = 64 << 20;
/// Shortest time between two readings, and the share of the time they may take: 1 in 1,000. One
/// takes some 50 ms.
const AGAIN: Duration = Duration::from_secs(10);
const COST: u32 = 1000;
/// Most bytes that a function of a module or a BPF program reaches: what lies farther behind a
/// symbol belongs to something that was loaded since.
const LOADED_FUNCTION: u64 = 256 << 10;
/// The symbols that end the kernel's code; nothing is between them and the next one.
const ENDS: [&[u8]; 2] = [b"_etext", b"_einittext"];

/// A function of the kernel, and the module it is in.
pub(super) type Function<'a> = (&'a [u8], &'a Arc<str>);

/// The kernel's functions by address.
#[derive(Default)]
pub(super) struct Kernel {
    table: Table,
    /// When it may be read again.
    due: Option<Instant>,
}

#[derive(Default)]
struct Table {
    entries: Vec<Entry>,
    names: Vec<u8>,
    /// Module 0 is the kernel itself.
    modules: Vec<Arc<str>>,
    restricted: bool,
}

#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    /// Where its name, which ends with a NUL, is in [`Table::names`].
    name: u32,
    module: u16,
}

impl Kernel {
    /// The function at an address.
    pub(super) fn find(&mut self, address: u64) -> Result<Function<'_>, Unknown> {
        let start = Instant::now();
        if self.table.find(address).is_err() && self.due.is_none_or(|due| start >= due) {
            self.due = Some(start + AGAIN);
            let file = File::open(KALLSYMS).map_err(|_| Unknown::Unreadable)?;
            self.table = Table::read(BufReader::new(file.take(BYTES)));
            self.due = Some(start + AGAIN.max(start.elapsed() * COST));
        }
        self.table.find(address)
    }

    /// Bytes of memory it takes.
    pub(super) fn bytes(&self) -> usize {
        self.table.entries.capacity() * size_of::<Entry>() + self.table.names.capacity()
    }
}

impl Table {
    /// Reads lines of address, type, name and module; only code is kept.
    fn read(mut lines: impl BufRead) -> Self {
        let mut table = Self { modules: vec!["[kernel]".into()], ..Self::default() };
        let mut line = Vec::new();
        while lines.by_ref().take(4096).read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            table.add(&line);
            line.clear();
        }
        // Stable: of several names for an address the kernel's own choice, the first one, is kept.
        table.entries.sort_by_key(|e| e.address);
        table.entries.dedup_by_key(|e| e.address);
        table.entries.shrink_to_fit();
        table.names.shrink_to_fit();
        table
    }

    fn add(&mut self, line: &[u8]) -> Option<()> {
        let mut words = line.split(u8::is_ascii_whitespace).filter(|w| !w.is_empty());
        let address = hex(words.next()?)?;
        let (kind, name, module) = (words.next()?, words.next()?, words.next());
        if !matches!(kind, b"t" | b"T" | b"w" | b"W") || [&b"_text"[..], b"_stext"].contains(&name)
        {
            return None;
        }
        if address == 0 {
            // What `kptr_restrict` leaves of an address.
            self.restricted = true;
            return None;
        }
        let module = match module {
            Some(module) => self.module(&String::from_utf8_lossy(module))?,
            None => 0,
        };
        let entry = Entry { address, name: u32::try_from(self.names.len()).ok()?, module };
        self.names.extend_from_slice(name);
        self.names.push(0);
        self.entries.push(entry);
        Some(())
    }

    /// The index of a module; modules come in runs, so that the search is short.
    fn module(&mut self, name: &str) -> Option<u16> {
        let index = self.modules.iter().rposition(|m| **m == *name).unwrap_or_else(|| {
            self.modules.push(name.into());
            self.modules.len() - 1
        });
        u16::try_from(index).ok()
    }

    fn find(&self, address: u64) -> Result<Function<'_>, Unknown> {
        if self.entries.is_empty() && self.restricted {
            return Err(Unknown::Restricted);
        }
        let after = self.entries.partition_point(|e| e.address <= address);
        let before = self.entries.get(..after).ok_or(Unknown::NoSymbol)?;
        let entry = before.last().ok_or(Unknown::Unmapped)?;
        let module = self.modules.get(usize::from(entry.module)).ok_or(Unknown::NoSymbol)?;
        let name = self.names.get(entry.name as usize..).unwrap_or_default();
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        let beyond = entry.module != 0 && address - entry.address >= LOADED_FUNCTION;
        if beyond || ENDS.contains(&name) {
            return Err(Unknown::NoSymbol);
        }
        Ok((name.get(..names::RAW_NAME).unwrap_or(name), module))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    const LISTING: &str = "\
ffffffff81000000 T _stext
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81000100 t helper
ffffffff81000100 t alias
ffffffff81000180 D some_data
ffffffff81000200 W weak_one
ffffffff81000300 T _etext
ffffffffc0000000 t nft_do_chain\t[nf_tables]
ffffffffc0200000 t bpf_prog_6deef7357e7b4530_sd_fw_egress\t[bpf]
garbage
zz T no_address
";

    fn check(listing: &str, address: u64, expected: Result<(&str, &str), Unknown>) {
        let table = Table::read(listing.as_bytes());
        let found = table.find(address).map(|(n, m)| (str::from_utf8(n).unwrap(), &**m));
        assert_eq!(found, expected, "{address:x}");
    }

    #[test]
    fn functions_are_found() {
        check(LISTING, 0xffff_ffff_8100_0000, Ok(("startup_64", "[kernel]")));
        check(LISTING, 0xffff_ffff_8100_01ff, Ok(("helper", "[kernel]")));
        check(LISTING, 0xffff_ffff_8100_0200, Ok(("weak_one", "[kernel]")));
        check(LISTING, 0xffff_ffff_c000_0010, Ok(("nft_do_chain", "[nf_tables]")));
        let program = "bpf_prog_6deef7357e7b4530_sd_fw_egress";
        check(LISTING, 0xffff_ffff_c020_0001, Ok((program, "[bpf]")));
    }

    #[test]
    fn gaps_are_unknown() {
        check(LISTING, 0xffff_ffff_8100_0400, Err(Unknown::NoSymbol));
        check(LISTING, 0xffff_ffff_c010_0000, Err(Unknown::NoSymbol));
        check(LISTING, 0xffff_ffff_8000_0000, Err(Unknown::Unmapped));
        check("", 1, Err(Unknown::Unmapped));
        check("0000000000000000 T schedule\n", 0xffff_ffff_8100_0000, Err(Unknown::Restricted));
    }

    #[test]
    fn the_running_kernel() {
        let listing = std::fs::read_to_string(KALLSYMS).unwrap();
        let line = listing.lines().find(|l| l.ends_with(" T schedule")).unwrap();
        let address = u64::from_str_radix(&line[..16], 16).unwrap();
        let mut kernel = Kernel::default();
        let found = kernel.find(address + 1).map(|(n, m)| (n.to_vec(), m.to_string()));
        let expected = match address {
            0 => Err(Unknown::Restricted),
            _ => Ok((b"schedule".to_vec(), "[kernel]".into())),
        };
        assert_eq!(found, expected);
        assert!(kernel.bytes() < 16 << 20);
    }
}
