//! ELF files of known content, and the real machine: this process, its library, its children.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{FileExt, MetadataExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use proptest::prelude::*;

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/symbols/testdata").join(name)
}

/// Finds one offset in a file: its functions, or the reason.
fn find(path: &Path, offset: u64, limits: &Limits) -> Result<Vec<Frame>, Unknown> {
    let (mut files, mut stats) = (Files::default(), Stats::default());
    let (file, metadata) = sys::open(path).unwrap();
    let key = FileKey::new((0, 0), &metadata);
    files.insert(key, Arc::new(file), &metadata, limits, &mut stats)?;
    let root = || File::open("/").ok();
    files.find(&key, path.to_str().unwrap(), offset, root, limits, &mut stats)
}

fn check(path: &Path, offset: u64, expected: Result<&[(&str, &str, u32)], Unknown>) {
    let found = find(path, offset, &Limits::default());
    let found = found.map(|f| f.into_iter().map(|f| (f.name, f.file, f.line)).collect::<Vec<_>>());
    let owned = |f: &(&str, &str, u32)| (f.0.to_owned(), f.1.to_owned(), f.2);
    let expected = expected.map(|e| e.iter().map(owned).collect());
    assert_eq!(found, expected, "{} at {offset:x}", path.display());
}

const INLINED: &[(&str, &str, u32)] = &[
    ("innermost", "/src/inline.c", 10),
    ("middle", "/src/inline.c", 14),
    ("outer", "/src/inline.c", 18),
];

#[test]
fn dwarf_names_inlined_functions() {
    for file in ["inline.elf", "zlib.elf", "zstd.elf", "stripped.elf"] {
        check(&fixture(file), 0x163, Ok(INLINED));
        check(&fixture(file), 0x169, Ok(&[("outer", "/src/inline.c", 19)]));
    }
}

#[test]
fn the_symbol_table_answers_without_dwarf() {
    let file = fixture("inline.elf");
    check(&file, 0x151, Ok(&[("assembly", "", 0)]));
    let limits = Limits { dwarf_bytes_per_file: 100, ..Limits::default() };
    let found = find(&file, 0x163, &limits).unwrap();
    assert_eq!(found, [Frame { name: "outer".into(), ..Frame::default() }]);
    // Between functions, in no segment, and behind the file.
    check(&file, 0x17a, Err(Unknown::NoSymbol));
    check(&file, 0x400, Err(Unknown::NoSymbol));
    check(&file, u64::MAX, Err(Unknown::NoSymbol));
}

#[test]
fn debug_files_are_found_by_link_and_checksum() {
    let open = |name: &str| {
        let (file, metadata) = sys::open(&fixture(name)).unwrap();
        elf::Elf::open(Arc::new(file), &metadata).unwrap()
    };
    let (mut stripped, debug) = (open("stripped.elf"), open("inline.debug"));
    assert_eq!(stripped.build_id, debug.build_id);
    assert_eq!(stripped.build_id.len(), 40);
    // Without build IDs, only the checksum vouches.
    stripped.build_id.clear();
    let sections = stripped.sections().unwrap();
    let root = File::open("/").unwrap();
    let find = |path: &Path| {
        debug::find(&stripped, &sections, path.to_str().unwrap(), Some(&root)).is_some()
    };
    assert!(find(&fixture("stripped.elf")));
    let dir = tempfile::tempdir().unwrap();
    let mut other = fs::read(fixture("inline.debug")).unwrap();
    *other.last_mut().unwrap() ^= 1;
    fs::write(dir.path().join("inline.debug"), &other).unwrap();
    assert!(!find(&dir.path().join("stripped.elf")));
}

#[test]
fn files_that_are_no_programs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    for (bytes, expected) in [
        (&b""[..], Unknown::NotElf),
        (b"#!/bin/sh\n", Unknown::NotElf),
        (b"\x7fELF", Unknown::NotElf),
        (b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0", Unknown::NoSymbol),
    ] {
        fs::write(&path, bytes).unwrap();
        check(&path, 0, Err(expected));
    }
    assert!(sys::open(Path::new("/dev/zero")).is_err());
    assert!(sys::open(dir.path()).is_err());
}

#[test]
fn a_file_that_is_truncated_while_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("program");
    fs::copy(fixture("inline.elf"), &path).unwrap();
    let (file, metadata) = sys::open(&path).unwrap();
    let (limits, mut stats, mut files) = (Limits::default(), Stats::default(), Files::default());
    let key = FileKey::new((0, 0), &metadata);
    let elf = elf::Elf::open(Arc::new(file.try_clone().unwrap()), &metadata).unwrap();
    let sections = elf.sections().unwrap();
    files.insert(key, Arc::new(file), &metadata, &limits, &mut stats).unwrap();

    File::options().write(true).open(&path).unwrap().set_len(0x300).unwrap();
    let found = files.find(&key, "", 0x163, || None, &limits, &mut stats);
    assert_eq!(found, Err(Unknown::Changed));
    assert_eq!(table::Table::read(&elf, &sections, 1 << 20).err(), Some(Unknown::Unreadable));
    let dwarf = dwarf::Dwarf::load(&elf, &sections, 1 << 20);
    assert_eq!(dwarf.err(), Some(Unknown::Unreadable));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the bytes are, there is an answer.
    #[test]
    fn any_elf(
        changes in prop::collection::vec((0_usize..3000, any::<u8>()), 0..12),
        compressed in any::<bool>(),
        len in 0_usize..4000,
        garbage in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let name = if compressed { "zlib.elf" } else { "inline.elf" };
        let mut bytes = fs::read(fixture(name)).unwrap();
        for (at, value) in changes {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(len.max(1000));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for bytes in [bytes, [&b"\x7fELF\x02\x01\x01\0"[..], &garbage].concat()] {
            file.as_file_mut().set_len(0).unwrap();
            file.as_file_mut().write_all_at(&bytes, 0).unwrap();
            for offset in [0x151, 0x163, 0x185] {
                if let Ok(frames) = find(file.path(), offset, &Limits::default()) {
                    prop_assert!(!frames.is_empty());
                }
            }
        }
    }
}

/// DWARF whose functions nest without end must not overflow the stack.
#[test]
fn endless_nesting_is_refused() {
    let mut bytes = fs::read(fixture("inline.elf")).unwrap();
    let (file, metadata) = sys::open(&fixture("inline.elf")).unwrap();
    let sections = elf::Elf::open(Arc::new(file), &metadata).unwrap().sections().unwrap();
    // One unit with one function that covers all code, and then bytes that each open another
    // inlined function within the last one.
    let mut unit = vec![5, 0, 1, 8, 0, 0, 0, 0, 1];
    let range = [0x400150_u64.to_le_bytes(), 0x40018c_u64.to_le_bytes()].concat();
    unit.extend(&range);
    unit.push(2);
    unit.extend(&range);
    unit.resize(1 << 20, 3);
    let info = [&u32::try_from(unit.len()).unwrap().to_le_bytes()[..], &unit].concat();
    let abbreviations = [
        1, 0x11, 1, 0x11, 1, 0x12, 1, 0, 0, 2, 0x2e, 1, 0x11, 1, 0x12, 1, 0, 0, 3, 0x1d, 1, 0, 0, 0,
    ];
    for (name, contents) in [(".debug_info", &info[..]), (".debug_abbrev", &abbreviations)] {
        let index = sections.iter().position(|s| s.name == name).unwrap();
        let header = 0x770 + 64 * index;
        let at = bytes.len() as u64;
        bytes[header + 24..header + 32].copy_from_slice(&at.to_le_bytes());
        bytes[header + 32..header + 40].copy_from_slice(&(contents.len() as u64).to_le_bytes());
        bytes.extend_from_slice(contents);
    }
    // No address index, so that the unit's own range counts.
    let index = sections.iter().position(|s| s.name == ".debug_aranges").unwrap();
    bytes[0x770 + 64 * index + 32..][..8].fill(0);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&bytes).unwrap();

    let (file, metadata) = sys::open(file.path()).unwrap();
    let elf = elf::Elf::open(Arc::new(file), &metadata).unwrap();
    let mut dwarf = dwarf::Dwarf::load(&elf, &elf.sections().unwrap(), 64 << 20).unwrap();
    assert_eq!(dwarf.frames(0x400163), Err(Unknown::TooLarge));
}

fn own() -> ProcessKey {
    ProcessKey { pid: std::process::id(), ..ProcessKey::default() }
}

/// Start of a process in nanoseconds of the boot clock, as far as `stat` tells.
fn started(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let ticks =
        stat.rsplit(')').next().unwrap().split(' ').nth(20).unwrap().parse::<u64>().unwrap();
    ticks * 1_000_000_000 / sys::ticks_per_second()
}

/// Limits under which even a test binary's DWARF is read.
fn roomy() -> Limits {
    Limits { dwarf_bytes_per_file: 1 << 30, dwarf_bytes: 1 << 30, ..Limits::default() }
}

#[inline(always)]
fn here() -> u64 {
    let address: u64;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it only takes the address of the instruction.
    unsafe {
        std::arch::asm!("lea {}, [rip]", out(reg) address);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: it only takes the address of the instruction.
    unsafe {
        std::arch::asm!("adr {}, .", out(reg) address);
    }
    address
}

#[inline(never)]
fn not_inlined() -> u64 {
    here()
}

#[test]
fn own_functions() {
    let mut symbols = Symbols::new(roomy());
    let found = symbols.user(own(), not_inlined(), false);
    let names: Vec<_> = found.iter().map(|s| (&*s.name, s.inlined)).collect();
    assert_eq!(
        names.get(..2).unwrap(),
        [
            ("podflame::symbols::tests::here", true),
            ("podflame::symbols::tests::not_inlined", false)
        ]
    );
    assert!(found[0].file.ends_with("symbols/tests.rs") && found[0].line > 0);
    let executable = std::env::current_exe().unwrap();
    assert_eq!(&*found[0].module.path, executable.to_str().unwrap());
    assert_eq!(symbols.executable(own()).as_deref(), executable.to_str());
    assert!(found.iter().all(|s| s.unknown.is_none()));
    assert!(Arc::ptr_eq(&found, &symbols.user(own(), not_inlined(), false)));
}

#[test]
fn functions_of_the_library_and_the_vdso() {
    let mut symbols = Symbols::new(Limits::default());
    let malloc = libc::malloc as *const () as u64;
    let found = symbols.user(own(), malloc + 1, true);
    assert_eq!(&*found.last().unwrap().name, "malloc");
    assert!(found[0].module.path.contains("libc") && found[0].module.build_id.len() == 40);

    // SAFETY: the name is NUL-terminated.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    let maps = fs::read("/proc/self/maps").unwrap();
    let end = maps::parse(&maps).find(|l| l.start == vdso).unwrap().end;
    let named = (vdso..end).step_by(16).map(|a| symbols.user(own(), a, false));
    let named: Vec<_> = named.map(|s| s[0].name.to_string()).collect();
    assert!(named.iter().any(|n| n.contains("clock_gettime")), "{named:?}");
}

#[test]
fn regions() {
    let mut symbols = Symbols::new(Limits::default());
    let local = 0_u8;
    let code = symbols.region(own(), not_inlined());
    assert_eq!(&*code.mapping.path, std::env::current_exe().unwrap().to_str().unwrap());
    // Threads of the test have their stacks in anonymous memory.
    let stack = symbols.region(own(), (&raw const local).addr() as u64);
    assert!(stack.mapping.path.starts_with('['), "{stack:?}");
    assert_eq!(&*symbols.region(own(), 8).mapping.path, "[unknown: unmapped]");
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[1; 8192]).unwrap();
    let mut buffer = Vec::new();
    File::open("/proc/self/maps").unwrap().read_to_end(&mut buffer).unwrap();
    let heap = maps::parse(&buffer).find(|l| *l.name == *b"[heap]").unwrap();
    let found = symbols.region(own(), heap.start + 77);
    assert_eq!((&*found.mapping.path, found.offset), ("[heap]", 77));
}

#[test]
fn processes_that_are_not_the_one_meant() {
    let mut symbols = Symbols::new(Limits::default());
    let start = started(own().pid);
    let pid = own().pid;
    let mut reason = |pid, start_ns| {
        let found = symbols.user(ProcessKey { pid, start_ns, exec_id: 0 }, not_inlined(), false);
        found[0].unknown
    };
    let tick = 1_000_000_000 / sys::ticks_per_second();
    assert_eq!(reason(pid, start), None);
    assert_eq!(reason(pid, start + tick - 1), None);
    assert_eq!(reason(pid, start + 3 * tick), Some(Unknown::NoProcess));
    assert_eq!(reason(0, 0), Some(Unknown::NoProcess));
    assert_eq!(reason(u32::MAX, 0), Some(Unknown::NoProcess));
    // A kernel thread.
    assert_eq!(reason(2, 0), Some(Unknown::NoProcess));
    let gone = Unknown::ALL.iter().position(|u| *u == Unknown::NoProcess).unwrap();
    assert_eq!(symbols.stats().unknown[gone], 4);
}

/// A `cat` that is known to run its `main`, with a copy of the C library from `dir`.
fn cat(dir: &Path) -> (Child, PathBuf) {
    let maps = fs::read("/proc/self/maps").unwrap();
    let libc = maps::parse(&maps).find(|l| l.name.ends_with(b"/libc.so.6")).unwrap();
    let copy = dir.join("libc.so.6");
    if !copy.exists() {
        fs::copy(str::from_utf8(&libc.name).unwrap(), &copy).unwrap();
    }
    let mut child = Command::new("cat")
        .env("LD_LIBRARY_PATH", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    (child, copy)
}

/// Where `malloc` is in a process, from where it is in this one.
fn malloc_in(pid: u32) -> u64 {
    let base = |pid| {
        let maps = fs::read(format!("/proc/{pid}/maps")).unwrap();
        let mut lines = maps::parse(&maps);
        lines.find(|l| l.executable && l.name.ends_with(b"/libc.so.6")).map(|l| l.start).unwrap()
    };
    libc::malloc as *const () as u64 - base(own().pid) + base(pid)
}

#[test]
fn a_process_that_is_gone_and_a_file_that_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, library) = cat(dir.path());
    let key = ProcessKey { pid: child.id(), start_ns: started(child.id()), exec_id: 0 };
    let malloc = malloc_in(child.id());
    fs::remove_file(&library).unwrap();
    let mut symbols = Symbols::new(Limits::default());
    symbols.sight(key);
    child.kill().unwrap();
    child.wait().unwrap();
    let found = symbols.user(key, malloc, false);
    assert_eq!(&*found.last().unwrap().name, "malloc");
    assert_eq!(&*found[0].module.path, library.to_str().unwrap());
    assert!(symbols.executable(key).unwrap().ends_with("/cat"));
    assert_eq!(symbols.user(key, 8, false)[0].unknown, Some(Unknown::Unmapped));

    // Had it not been seen in time, that would be the reason.
    let found = Symbols::new(Limits::default()).user(key, malloc, false);
    assert_eq!(found[0].unknown, Some(Unknown::NoProcess));
}

#[test]
fn what_was_read_of_a_process_outlives_it() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits::default();
    let mut sights = Sights::new(limits.clone());
    let (mut first, library) = cat(dir.path());
    let (mut second, _) = cat(dir.path());
    let mut symbols = Symbols::new(limits);
    let mut places = Vec::new();
    for child in [&first, &second] {
        let key = ProcessKey { pid: child.id(), start_ns: started(child.id()), exec_id: 0 };
        places.push((key, malloc_in(child.id()), sights.read(key).unwrap()));
        assert!(sights.read(key).is_none(), "read again at once");
    }
    // A file that both have mapped is open once.
    let open = |sighting: &Sighting| -> Vec<_> {
        let files = sighting.files.values().filter_map(|file| file.as_ref().ok());
        files.map(|(_, file)| Arc::as_ptr(file)).collect()
    };
    let (one, other) = (open(&places[0].2), open(&places[1].2));
    assert!(one.iter().any(|file| other.contains(file)));
    fs::remove_file(&library).unwrap();
    for child in [&mut first, &mut second] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    for (key, malloc, sighting) in places {
        symbols.accept(key, sighting);
        assert_eq!(&*symbols.user(key, malloc, false).last().unwrap().name, "malloc");
        assert!(symbols.executable(key).unwrap().ends_with("/cat"));
        assert!(sights.read(key).is_none(), "read after its end");
    }
}

#[test]
fn everything_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut children: Vec<_> = (0..3).map(|_| cat(dir.path()).0).collect();
    let limits = Limits { files: 2, processes: 2, results: 8, table_bytes: 1, ..roomy() };
    let mut symbols = Symbols::new(limits);
    for child in &children {
        let key = ProcessKey { pid: child.id(), ..ProcessKey::default() };
        let malloc = malloc_in(child.id());
        for offset in 0..20 {
            let found = symbols.user(key, malloc + offset, false);
            assert!(!found.is_empty());
        }
    }
    let stats = symbols.stats();
    assert!(stats.descriptors <= 2 && stats.processes <= 2 && stats.results <= 8, "{stats:?}");
    assert!(stats.files_evicted > 0 && stats.processes_evicted == 1, "{stats:?}");
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn perf_maps() {
    // SAFETY: a new anonymous mapping, of which only the address is used.
    let page = unsafe {
        let (kind, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANON);
        libc::mmap(std::ptr::null_mut(), 4096, kind, flags, -1, 0)
    };
    let page = page.addr() as u64;
    let path = PathBuf::from(format!("/tmp/perf-{}.map", own().pid));
    let look = || {
        let found = Symbols::new(Limits::default()).user(own(), page + 0x18, false);
        (found[0].name.to_string(), found[0].unknown)
    };
    let nothing = ("[anon]".to_owned(), Some(Unknown::NoSymbol));
    let text = format!("{page:x} 10 first\n{:x} 10 second one\n{page:x} 8 cut", page + 0x10);

    assert_eq!(look(), nothing);
    let fifo = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the path is NUL-terminated.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    assert_eq!(look(), nothing);
    fs::remove_file(&path).unwrap();

    let mut elsewhere = tempfile::NamedTempFile::new().unwrap();
    elsewhere.write_all(text.as_bytes()).unwrap();
    symlink(elsewhere.path(), &path).unwrap();
    assert_eq!(look(), nothing);
    fs::remove_file(&path).unwrap();

    fs::write(&path, &text).unwrap();
    assert_eq!(look(), ("second one".to_owned(), None));

    // What is appended later is read on; what was cut off is read when it is complete.
    let dir = ProcDir::open(own()).unwrap();
    let (limits, mut stats) = (Limits::default(), Stats::default());
    let mut map = PerfMap::new(1);
    assert!(map.refresh(&dir, &limits, &mut stats));
    assert!(!map.refresh(&dir, &limits, &mut stats));
    assert_eq!((map.len(), map.find(page)), (2, Some(b"first".to_vec())));
    File::options().append(true).open(&path).unwrap().write_all(b" off\n").unwrap();
    assert!(map.refresh(&dir, &limits, &mut stats));
    assert_eq!((map.len(), map.find(page)), (3, Some(b"cut off".to_vec())));

    // Ten gigabytes without a line, and then more entries than are kept.
    File::options().write(true).open(&path).unwrap().set_len(10 << 30).unwrap();
    let limits = Limits { perf_map_bytes: 20 << 20, ..limits };
    while stats.perf_maps_cut == 0 {
        assert!(map.refresh(&dir, &limits, &mut stats));
    }
    assert!(!map.refresh(&dir, &limits, &mut stats));
    assert_eq!((map.len(), stats.perf_maps_cut), (3, 1));
    // Ten million lines, of two hundred thousand functions.
    let many: String = (0..200_000).map(|i| format!("{:x} 1 f{i}\n", page + i)).collect();
    let mut file = File::create(&path).unwrap();
    assert!(!map.refresh(&dir, &limits, &mut stats));
    assert_eq!(map.len(), 0);
    for _ in 0..50 {
        file.write_all(many.as_bytes()).unwrap();
    }
    let limits = Limits { perf_map_entries: 100, ..limits };
    assert!(map.refresh(&dir, &limits, &mut stats));
    assert!(!map.refresh(&dir, &limits, &mut stats));
    assert!((100..5000).contains(&map.len()), "{}", map.len());
    assert_eq!((map.find(page + 7), stats.perf_maps_cut), (Some(b"f7".to_vec()), 2));

    // A file of another user, who is not root, is not believed.
    assert_eq!(fs::metadata(&path).unwrap().uid(), 0);
    std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
    assert_eq!(look(), nothing);
    fs::remove_file(&path).unwrap();
}

#[test]
fn the_kernel() {
    let mut symbols = Symbols::new(Limits::default());
    let listing = fs::read_to_string("/proc/kallsyms").unwrap();
    let line = listing.lines().find(|l| l.ends_with(" T schedule")).unwrap();
    let address = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
    let found = symbols.kernel(address + 1, true);
    if address == 0 {
        assert_eq!(found[0].unknown, Some(Unknown::Restricted));
    } else {
        assert_eq!((&*found[0].name, &*found[0].module.path), ("schedule", "[kernel]"));
        assert!(Arc::ptr_eq(&found, &symbols.kernel(address + 1, true)));
    }
    assert!(symbols.kernel(8, false)[0].unknown.is_some());
}
