//! A reader of the running kernel's type information (BTF), for two questions: at which byte is
//! this field, and is there such a tracepoint.
//!
//! Not for relocating programs: their loads are at offsets that come from here (see
//! `podflame_wire::field`). The format is `Documentation/bpf/btf.rst` of the kernel.

use std::{collections::HashSet, fs, io, path::Path};

/// Where the kernel shows its own type information.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Deepest nesting of anonymous members, and longest chain of modifiers, that is followed.
const MAX_DEPTH: usize = 32;

/// Why the type information cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The file cannot be read.
    #[error("read {VMLINUX}: {0} (needs a kernel built with CONFIG_DEBUG_INFO_BTF, 5.15 or later)")]
    Read(#[from] io::Error),
    /// The bytes do not follow the format.
    #[error("{VMLINUX}: not valid BTF at byte {0}")]
    Invalid(usize),
}

/// The kernel's types.
#[derive(Debug)]
pub struct Btf {
    data: Vec<u8>,
    /// Start of each type in `data`, by ID; ID 0 is `void` and has none.
    types: Vec<u32>,
    strings: usize,
}

/// The kinds that matter here (`include/uapi/linux/btf.h`).
mod kind {
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

impl Btf {
    /// The running kernel's types.
    ///
    /// # Errors
    ///
    /// If the kernel has none, or shows them in a form that is not understood.
    pub fn from_sys() -> Result<Self, BtfError> {
        Self::parse(fs::read(Path::new(VMLINUX))?)
    }

    /// Types in the raw format.
    ///
    /// # Errors
    ///
    /// If the bytes do not follow the format.
    pub fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let word = |at: usize| word(&data, at).ok_or(BtfError::Invalid(at));
        if word(0)? & 0xffff != 0xeb9f {
            return Err(BtfError::Invalid(0));
        }
        let header = word(4)? as usize;
        let mut at = header.saturating_add(word(8)? as usize);
        let end = at.saturating_add(word(12)? as usize);
        let strings = header.saturating_add(word(16)? as usize);
        if end > data.len() || strings > data.len() {
            return Err(BtfError::Invalid(8));
        }
        let mut types = vec![0];
        while at < end {
            let info = word(at + 4)?;
            let members = (info & 0xffff) as usize;
            let extra = match (info >> 24) & 0x1f {
                1 | 14 | 17 => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * members,
                kind::ENUM | kind::FUNC_PROTO => 8 * members,
                0 | 20.. => return Err(BtfError::Invalid(at)),
                _ => 0,
            };
            types.push(u32::try_from(at).map_err(|_| BtfError::Invalid(at))?);
            at += 12 + extra;
        }
        Ok(Self { data, types, strings })
    }

    /// Byte offset of a field: `path` is dotted, and goes through anonymous members by itself.
    /// `None` if there is no such struct or field, or if it does not start at a byte.
    #[must_use]
    pub fn field_offset(&self, name: &str, path: &str) -> Option<u32> {
        let mut id = (1..self.types.len() as u32).find(|id| {
            matches!(self.kind(*id), Some(kind::STRUCT)) && self.name(*id) == Some(name.as_bytes())
        })?;
        let mut bits = 0_u32;
        for part in path.split('.') {
            let (offset, inner) = self.member(self.skip_modifiers(id)?, part.as_bytes(), 0)?;
            bits = bits.checked_add(offset)?;
            id = inner;
        }
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Names of the tracepoints that BTF programs can attach to.
    #[must_use]
    pub fn tracepoints(&self) -> HashSet<String> {
        (1..self.types.len() as u32)
            .filter(|id| self.kind(*id) == Some(kind::TYPEDEF))
            .filter_map(|id| self.name(id)?.strip_prefix(b"btf_trace_"))
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect()
    }

    /// Offset in bits and type of a member, anonymous members searched too.
    fn member(&self, id: u32, wanted: &[u8], depth: usize) -> Option<(u32, u32)> {
        if depth > MAX_DEPTH || !matches!(self.kind(id)?, kind::STRUCT | kind::UNION) {
            return None;
        }
        let start = *self.types.get(id as usize)? as usize;
        let info = word(&self.data, start + 4)?;
        let is_bitfield_encoding = info >> 31 == 1;
        for index in 0..(info & 0xffff) as usize {
            let at = start + 12 + 12 * index;
            let name = self.string(word(&self.data, at)?)?;
            let inner = word(&self.data, at + 4)?;
            let mut offset = word(&self.data, at + 8)?;
            if is_bitfield_encoding {
                offset &= 0x00ff_ffff;
            }
            if name == wanted {
                return Some((offset, inner));
            }
            if name.is_empty()
                && let Some((below, found)) =
                    self.member(self.skip_modifiers(inner)?, wanted, depth + 1)
            {
                return Some((offset.checked_add(below)?, found));
            }
        }
        None
    }

    fn skip_modifiers(&self, mut id: u32) -> Option<u32> {
        for _ in 0..MAX_DEPTH {
            match self.kind(id)? {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = word(&self.data, *self.types.get(id as usize)? as usize + 8)?;
                }
                _ => return Some(id),
            }
        }
        None
    }

    fn kind(&self, id: u32) -> Option<u32> {
        if id == 0 {
            return None;
        }
        let start = *self.types.get(id as usize)? as usize;
        Some((word(&self.data, start + 4)? >> 24) & 0x1f)
    }

    fn name(&self, id: u32) -> Option<&[u8]> {
        let start = *self.types.get(id as usize)? as usize;
        self.string(word(&self.data, start)?)
    }

    fn string(&self, offset: u32) -> Option<&[u8]> {
        let tail = self.data.get(self.strings.checked_add(offset as usize)?..)?;
        Some(&tail[..tail.iter().position(|b| *b == 0)?])
    }
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// `struct outer { int a; union { struct { char c; int:3; int d:5; }; long e; }; }` by hand.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0c\0d\0e\0btf_trace_x\0";
        let at = |name: &str| {
            let all = String::from_utf8_lossy(strings);
            all.find(&format!("\0{name}\0")).map_or(0, |p| p as u32 + 1)
        };
        let mut types: Vec<u32> = Vec::new();
        let info = |kind: u32, flag: u32, members: u32| (flag << 31) | (kind << 24) | members;
        types.extend([at("int"), info(1, 0, 0), 4, 32]); // 1
        types.extend([0, info(kind::STRUCT, 1, 3), 8]); // 2
        types.extend([at("c"), 1, 0, 0, 1, 32 | (3 << 24), at("d"), 1, 40 | (5 << 24)]);
        types.extend([0, info(kind::UNION, 0, 2), 8, 0, 2, 0, at("e"), 1, 0]); // 3
        types.extend([0, info(kind::CONST, 0, 0), 3]); // 4
        types.extend([at("outer"), info(kind::STRUCT, 0, 2), 16, at("a"), 1, 0, 0, 4, 64]); // 5
        types.extend([at("btf_trace_x"), info(kind::TYPEDEF, 0, 0), 1]); // 6
        let bytes = types.len() as u32 * 4;
        let header = [0x0001_eb9f, 24, 0, bytes, bytes, strings.len() as u32];
        let mut all: Vec<u8> = header.iter().chain(&types).flat_map(|w| w.to_ne_bytes()).collect();
        all.extend_from_slice(strings);
        all
    }

    #[test]
    fn fields_are_found_through_anonymous_members_and_modifiers() {
        let btf = Btf::parse(sample()).unwrap();
        assert_eq!(btf.field_offset("outer", "a"), Some(0));
        assert_eq!(btf.field_offset("outer", "c"), Some(8));
        assert_eq!(btf.field_offset("outer", "d"), Some(13));
        assert_eq!(btf.field_offset("outer", "e"), Some(8));
        assert_eq!(btf.field_offset("outer", "nothing"), None);
        assert_eq!(btf.field_offset("nothing", "a"), None);
        assert_eq!(btf.tracepoints(), HashSet::from(["x".to_owned()]));
    }

    #[test]
    fn damaged_bytes_are_refused_or_give_nothing() {
        let good = sample();
        for cut in 0..good.len() {
            if let Ok(btf) = Btf::parse(good[..cut].to_vec()) {
                assert!(btf.field_offset("outer", "e").is_none_or(|offset| offset == 8));
            }
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] = 0xff;
            if let Ok(btf) = Btf::parse(bad) {
                let found = (btf.field_offset("outer", "d"), btf.tracepoints());
                assert!(found.1.len() <= 1, "{at}: {found:?}");
            }
        }
    }

    #[test]
    fn the_running_kernel_has_the_fields_every_probe_needs() {
        let btf = Btf::from_sys().unwrap();
        // The one that kernels before 6.17 lack.
        let every = podflame_wire::field::ALL.iter().filter(|field| field.0 != "RETRANSMIT_ERR");
        for (global, name, path) in every {
            assert!(btf.field_offset(name, path).is_some(), "{global}: {name}.{path}");
        }
        assert!(btf.tracepoints().contains("tcp_retransmit_skb"));
    }
}
