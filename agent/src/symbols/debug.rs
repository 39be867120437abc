//! Where the debug information of a stripped file is: by build ID, or by `.gnu_debuglink` (GDB
//! manual, "Debugging Information in Separate Files"). First in the root of the process, then in
//! the host's.

use std::{ffi::OsStr, fs::File, os::unix::ffi::OsStrExt, path::Path, sync::Arc};

use super::{
    elf::{Elf, Fields, Section},
    sys,
};

/// Where distributions put debug files.
const DEBUG: &str = "/usr/lib/debug";
/// Largest file whose checksum is taken when no build ID vouches for it: about 0.1 s of work.
const CHECKSUM: u64 = 256 << 20;

/// Finds the debug file of `elf`, which the process sees at `path`.
pub(super) fn find(
    elf: &Elf,
    sections: &[Section],
    path: &str,
    root: Option<&File>,
) -> Option<Elf> {
    let host = sys::handle(Path::new("/proc/1/root")).ok();
    let link = debug_link(elf, sections);
    [root, host.as_ref()].into_iter().flatten().find_map(|root| {
        by_build_id(elf, root).or_else(|| by_link(elf, path, link.as_ref()?, root))
    })
}

fn open(path: &[u8], root: &File) -> Option<Elf> {
    let (file, metadata) = sys::open_at(root, OsStr::from_bytes(path), sys::IN_ROOT).ok()?;
    Elf::open(Arc::new(file), &metadata).ok()
}

fn by_build_id(elf: &Elf, root: &File) -> Option<Elf> {
    let (first, rest) = elf.build_id.split_at_checked(2)?;
    let path = format!("{DEBUG}/.build-id/{first}/{rest}.debug");
    open(path.as_bytes(), root).filter(|found| found.build_id == elf.build_id)
}

fn by_link(elf: &Elf, path: &str, (name, checksum): &(Vec<u8>, u32), root: &File) -> Option<Elf> {
    let (folder, _) = path.rsplit_once('/')?;
    let folders = [folder.to_owned(), format!("{folder}/.debug"), format!("{DEBUG}{folder}")];
    folders.iter().find_map(|folder| {
        let path = [folder.as_bytes(), b"/", name].concat();
        open(&path, root).filter(|found| {
            let vouched = !elf.build_id.is_empty() && found.build_id == elf.build_id;
            vouched || crc(found) == Some(*checksum)
        })
    })
}

/// Name and CRC-32 of the debug file; the checksum is behind the name, aligned to 4 bytes.
fn debug_link(elf: &Elf, sections: &[Section]) -> Option<(Vec<u8>, u32)> {
    let section = sections.iter().find(|s| s.name == ".gnu_debuglink")?;
    let contents = elf.contents(section, 4096).ok()?;
    let len = contents.iter().position(|b| *b == 0).filter(|len| *len > 0)?;
    let name = contents.get(..len).filter(|name| !name.contains(&b'/'))?;
    let checksum = contents.get((len + 1).next_multiple_of(4)..).filter(|rest| rest.len() >= 4)?;
    Some((name.to_vec(), Fields(checksum).u32(0)))
}

fn crc(elf: &Elf) -> Option<u32> {
    if elf.len() > CHECKSUM {
        return None;
    }
    let mut crc = flate2::Crc::new();
    let mut buffer = vec![0; 256 << 10];
    let mut offset = 0;
    while offset < elf.len() {
        let read = elf.read_some(offset, &mut buffer);
        crc.update(buffer.get(..read).filter(|b| !b.is_empty())?);
        offset += read as u64;
    }
    Some(crc.sum())
}
