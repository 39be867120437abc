//! The files of this machine: what gimli's own search finds, the tables must say.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{FileExt, MetadataExt as _},
};

use gimli::{
    BaseAddresses, EhFrame, EhFrameHdr, EndianSlice, Error, LittleEndian, UnwindContext,
    UnwindSection,
};

use super::*;
use crate::unwinder::TABLE_BYTES;

/// Rows of one file at which the two are compared.
const ROWS: usize = 400;
/// Bytes of a file from which on a debug build takes seconds for it.
const LARGE: u64 = if cfg!(debug_assertions) { 4 << 20 } else { u64::MAX };

/// The regular files below some directories.
fn files(dirs: &[&str]) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut dirs: Vec<PathBuf> = dirs.iter().map(PathBuf::from).collect();
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => dirs.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files
}

/// The files that this process runs.
fn mapped() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let paths = maps.lines().filter(|line| line.contains(" r-xp "));
    let mut paths: Vec<_> = paths.filter_map(|line| Some(line[line.find('/')?..].into())).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
}

/// Compares a table with what gimli finds by `.eh_frame_hdr`, which the linker has sorted; how many
/// addresses were compared. Files without that are left out.
fn compare(path: &Path) -> usize {
    let mut rules = Rules::default();
    let Ok(table) = of_file(path, &mut rules) else { return 0 };
    check(&table, &rules, &Limits::default());
    let file = File::open(path).unwrap();
    let elf = Elf::open(Arc::new(file.try_clone().unwrap()), &file.metadata().unwrap()).unwrap();
    let machine = Machine::of(&elf).unwrap();
    let sections = elf.sections().unwrap();
    let section = |name: &str| {
        let section = sections.iter().find(|s| s.name == name)?;
        Some((section.address, elf.contents(section, 1 << 30).ok()?))
    };
    let (Some(frame), Some(header)) = (section(".eh_frame"), section(".eh_frame_hdr")) else {
        return 0;
    };
    let bases = BaseAddresses::default().set_eh_frame(frame.0).set_eh_frame_hdr(header.0);
    let mut eh_frame = EhFrame::new(&frame.1, LittleEndian);
    eh_frame.set_address_size(8);
    let header = EhFrameHdr::from(EndianSlice::new(&header.1, LittleEndian));
    let header = header.parse(&bases, 8).unwrap();
    let Some(search) = header.table() else { return 0 };

    let mut context = UnwindContext::new();
    let mut compared = 0;
    let mut one = |address: u64| {
        let found = search.fde_for_address(&eh_frame, &bases, address, EhFrame::cie_from_offset);
        let expected = match found {
            Ok(fde) => {
                let row = fde.unwind_info_for_address(&eh_frame, &bases, &mut context, address);
                row.ok()
                    .and_then(|row| machine.rule(row, &fde, &eh_frame))
                    .map_or_else(|| "unsupported".into(), |rule| text(&rule))
            }
            Err(Error::NoUnwindInfoForAddress) => "none".into(),
            Err(error) => panic!("{}: {address:x}: {error}", path.display()),
        };
        let said = text(rules.get(table.rule(address)).unwrap());
        assert_eq!(said, expected, "{}: {address:x}", path.display());
        compared += 1;
    };
    let step = usize::try_from(table.rows).unwrap() / ROWS + 1;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for (address, _) in table.segments.iter().flat_map(Segment::rows).step_by(step) {
        for address in [address, address + 1, address.saturating_sub(1)] {
            one(address);
        }
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let load = table.loads[(random >> 60) as usize % table.loads.len()];
        one(load.address + (random >> 8) % load.size);
    }
    compared
}

#[test]
fn tables_agree_with_another_search() {
    let mut paths = mapped();
    assert!(paths.iter().any(|path| path.ends_with(std::env::current_exe().unwrap())));
    let mut others = files(&["/usr/bin"]);
    others.sort_unstable();
    // A spread of them, the interpreters, and the library of C++.
    let spread = others.len() / 40 + 1;
    let named = |path: &&PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("python3") || name == "node" || name == "perl"
    };
    paths.extend(others.iter().filter(named).cloned());
    paths.extend(others.iter().step_by(spread).cloned());
    let libraries = files(&["/usr/lib/x86_64-linux-gnu", "/usr/lib64"]);
    paths.extend(libraries.into_iter().filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        ["libstdc++.so", "libcrypto.so", "libgcc_s.so"].iter().any(|lib| name.starts_with(lib))
    }));
    let mine = std::env::current_exe().unwrap();
    let size = |path: &Path| path.metadata().map_or(0, |m| m.len());
    paths.retain(|path| size(path) < LARGE || *path == mine);
    let compared: usize = paths.iter().map(|path| compare(path)).sum();
    println!("{compared} addresses in {} files", paths.len());
    assert!(compared > 4 * ROWS);
}

/// The vDSO has no file: its bytes are put into one in memory.
#[test]
fn the_vdso_has_a_table() {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
    let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
    let hex = |digits| u64::from_str_radix(digits, 16).unwrap();
    let mut bytes = vec![0; usize::try_from(hex(end) - hex(start)).unwrap()];
    File::open("/proc/self/mem").unwrap().read_exact_at(&mut bytes, hex(start)).unwrap();
    let mut rules = Rules::default();
    let table = of_bytes(&bytes, &mut rules, &Limits::default()).unwrap();
    assert!(table.rows > 10 && table.segments.len() == 1);
    assert_eq!((table.stats.malformed, table.stats.unsupported), (0, 0));
}

/// Processor time of this thread in milliseconds, which other processes do not change.
fn processor_ms() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes to the struct alone, which outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

/// Prints what the largest binaries of this machine cost, and holds them to 12 bytes a row. With Chromium
/// and clang (`apt-get install chromium clang-19`):
///
/// ```sh
/// cargo test --release -p podflame --lib the_largest_files -- --nocapture
/// ```
#[test]
fn the_largest_files() {
    let metadata = |path: &PathBuf| path.metadata().ok();
    let size = |path: &PathBuf| metadata(path).map_or(0, |m| m.len());
    let mut paths = files(&["/usr/bin", "/usr/sbin", "/usr/lib", "/usr/local"]);
    // What is debugged with is not run.
    paths.retain(|path| size(path) < LARGE && !path.starts_with("/usr/lib/debug"));
    paths.sort_by_cached_key(|path| std::cmp::Reverse(size(path)));
    // This program is there on every machine.
    paths.insert(0, std::env::current_exe().unwrap());

    println!("{:34} {:>7} {:>9} {:>6} {:>6} {:>5}", "file", "MiB", "rows", "B/row", "ms", "slow");
    let mut rules = Rules::default();
    let (mut seen, mut shown, mut bytes, mut rows) = (BTreeSet::new(), 0, 0, 0);
    for path in &paths {
        let Some(known) = metadata(path) else { continue };
        if !seen.insert((known.dev(), known.ino())) {
            continue;
        }
        let begin = processor_ms();
        let (mut last, mut slowest) = (begin, 0.0_f64);
        let mut pause = || {
            let now = processor_ms();
            slowest = slowest.max(now - last);
            last = now;
        };
        let Ok(file) = File::open(path) else { continue };
        let built = build(&Arc::new(file), &mut rules, &Limits::default(), &mut pause);
        let ms = processor_ms() - begin;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mib = known.len() as f64 / f64::from(1 << 20);
        match built {
            Ok(table) => {
                let per_row = table.bytes as f64 / table.rows as f64;
                println!(
                    "{name:34} {mib:>7.1} {:>9} {per_row:>6.2} {ms:>6.1} {slowest:>5.1}",
                    table.rows
                );
                assert!(table.rows < 10_000 || per_row <= 12.0);
                (bytes, rows) = (bytes + table.bytes, rows + table.rows);
            }
            // What a limit keeps from having a table counts.
            Err(reason @ (NoTable::TooLarge | NoTable::Malformed)) => {
                println!("{name:34} {mib:>7.1} {}", reason.name());
            }
            Err(_) => continue,
        }
        shown += 1;
        if shown == 21 {
            break;
        }
    }
    let mib = bytes as f64 / f64::from(1 << 20);
    println!("{mib:.1} MiB for {rows} rows of {shown} files, and {} rules", rules.count());
    assert!(bytes <= TABLE_BYTES, "{bytes} bytes");
}
