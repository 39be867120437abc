//! The walk and the names, over what was read of real processes: `tests/golden/python/stack.VERSION`,
//! which the test `python::a_stack_is_what_python_says` on the running kernel writes when told to.

use hashbrown::HashMap;
use podflame_wire::python::{self, MAX_PYTHON_FRAMES, MAX_STATES, Process, PythonEnd, Walk};
use proptest::prelude::*;
use zerocopy::FromBytes as _;

use super::{Code, NoCode, code::Memory, version::*};

/// What was read of a process, by address.
#[derive(Clone, Default)]
struct Image(HashMap<u64, Vec<u8>>);

impl Memory for Image {
    fn read(&self, address: u64, into: &mut [u8]) -> bool {
        let bytes = self.0.get(&address).and_then(|bytes| bytes.get(..into.len()));
        bytes.inspect(|bytes| into.copy_from_slice(bytes)).is_some()
    }
}

impl python::Memory for Image {
    fn read<const N: usize>(&self, into: &mut [u64; N], bytes: u32, address: u64) -> bool {
        let mut copy = vec![0; bytes as usize];
        if !Memory::read(self, address, &mut copy) {
            return false;
        }
        for (word, bytes) in into.iter_mut().zip(copy.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        true
    }
}

/// A recorded case.
struct Case {
    version: Version,
    image: Image,
    process: Process,
    thread: u64,
    code_type: u64,
    words: Vec<u64>,
    frames: Vec<String>,
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap()
}

fn bytes(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| hex(&text[2 * i..2 * i + 2]) as u8).collect()
}

fn case(version: Version) -> Case {
    let name = format!("../tests/golden/python/stack.3.{}", version.minor);
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    let text = std::fs::read_to_string(path).unwrap();
    let mut case = Case {
        version,
        image: Image::default(),
        process: Process { start_ns: 0, exec_id: 0, pad: 0, runtime: 0, layout: version.layout },
        thread: 0,
        code_type: 0,
        words: Vec::new(),
        frames: Vec::new(),
    };
    for line in text.lines() {
        match line.split_once(' ').unwrap() {
            ("thread", thread) => case.thread = hex(thread),
            ("code", address) => case.code_type = hex(address),
            ("process", words) => case.process = Process::read_from_bytes(&bytes(words)).unwrap(),
            ("word", words) => case.words.extend(words.split(' ').map(hex)),
            ("frame", frame) => case.frames.push(frame.to_owned()),
            (address, words) => drop(case.image.0.insert(hex(address), bytes(words))),
        }
    }
    case
}

impl Case {
    fn walk(&self, hint: u64, most: usize) -> (Vec<u64>, PythonEnd, u64) {
        let mut walk = Walk::new();
        walk.begin(&self.process, self.thread);
        let mut words = [0; 256];
        let (count, end) = walk.run(
            |walk| walk.find(&self.image, hint),
            |walk| walk.step(&self.image),
            &mut words,
            0,
            most,
        );
        (words[..2 * usize::from(count)].to_vec(), end, walk.found())
    }

    fn code(&self, address: u64) -> Result<Code, NoCode> {
        Code::read(&self.image, address, &self.version, self.code_type)
    }
}

#[test]
fn stacks_are_those_that_python_said() {
    for version in VERSIONS {
        let case = case(version);
        let (words, end, found) = case.walk(0, MAX_PYTHON_FRAMES);
        assert_eq!((&words, end), (&case.words, PythonEnd::Complete), "3.{}", version.minor);
        let frames: Vec<String> = words
            .as_chunks::<2>()
            .0
            .iter()
            .filter(|[address, _]| *address != 0)
            .map(|[address, place]| (case.code(*address).unwrap(), *place as u32))
            .filter(|(code, _)| !code.hidden)
            .map(|(code, place)| format!("{} {} {}", code.name, code.file, code.line(place)))
            .collect();
        assert_eq!(frames, case.frames, "3.{}", version.minor);
        // Found again where it was, and looked for where it is not.
        assert_eq!(case.walk(found, MAX_PYTHON_FRAMES), (words.clone(), end, found));
        assert_eq!(case.walk(0x1000, MAX_PYTHON_FRAMES), (words, end, found));
    }
}

#[test]
fn a_walk_says_why_it_ended() {
    for version in VERSIONS {
        let mut case = case(version);
        let (words, end, _) = case.walk(0, 3);
        assert_eq!((words.len(), end), (6, PythonEnd::Truncated));
        // Without what it read last, it ends there.
        let (all, ..) = case.walk(0, MAX_PYTHON_FRAMES);
        let codes = |words: &[u64]| words.iter().step_by(2).copied().collect::<Vec<_>>();
        let step = usize::from(version.layout.frame_bytes);
        let frames: Vec<u64> =
            case.image.0.iter().filter(|(_, b)| b.len() == step).map(|(a, _)| *a).collect();
        let mut shorter = 0;
        for frame in frames {
            let bytes = case.image.0.remove(&frame).unwrap();
            let (words, end, _) = case.walk(0, MAX_PYTHON_FRAMES);
            if end == PythonEnd::Unreadable {
                shorter += 1;
                assert_eq!(codes(&words), codes(&all)[..words.len() / 2]);
            }
            case.image.0.insert(frame, bytes);
        }
        assert!(shorter >= all.len() / 2, "{shorter} frames of {}", all.len() / 2);
        case.thread += 1;
        assert_eq!(case.walk(0, MAX_PYTHON_FRAMES).1, PythonEnd::NoThread);
        case.process.runtime += 8;
        assert_eq!(case.walk(0, MAX_PYTHON_FRAMES).1, PythonEnd::Unreadable);
    }
}

/// Lists of threads and of frames that lead back to themselves.
#[test]
fn circles_end() {
    let version = version(11).unwrap();
    let mut case = case(version);
    let layout = &version.layout;
    let word = |at: u16, value: u64| (usize::from(at), value.to_le_bytes());
    let fill = |len: u16, words: &[(usize, [u8; 8])]| {
        let mut bytes = vec![0; len.into()];
        for (at, word) in words {
            bytes[*at..at + 8].copy_from_slice(word);
        }
        bytes
    };
    let image = &mut case.image.0;
    image.clear();
    let runtime = case.process.runtime;
    image.insert(runtime + u64::from(layout.interpreters), 0x10_0000_u64.to_le_bytes().to_vec());
    image.insert(
        0x10_0000 + u64::from(layout.interpreter_next),
        0x10_0000_u64.to_le_bytes().to_vec(),
    );
    image.insert(
        0x10_0000 + u64::from(layout.interpreter_threads),
        0x20_0000_u64.to_le_bytes().to_vec(),
    );
    let other = [word(layout.thread_next, 0x20_0000), word(layout.thread_id, 1)];
    image.insert(0x20_0000, fill(layout.thread_bytes, &other));
    assert_eq!(case.walk(0, MAX_PYTHON_FRAMES).1, PythonEnd::NoThread, "{MAX_STATES} steps");
    let own = [
        word(layout.thread_id, case.thread),
        word(layout.thread_frame, 0x30_0000 - u64::from(layout.current)),
    ];
    let image = &mut case.image.0;
    image.insert(0x20_0000, fill(layout.thread_bytes, &own));
    image.insert(0x30_0000, 0x40_0000_u64.to_le_bytes().to_vec());
    let frame = [word(layout.frame_previous, 0x40_0000)];
    image.insert(0x40_0000, fill(layout.frame_bytes, &frame));
    let (words, end, _) = case.walk(0, MAX_PYTHON_FRAMES);
    assert_eq!((words.len(), end), (2 * MAX_PYTHON_FRAMES, PythonEnd::Truncated));
}

#[test]
fn what_is_no_code_is_refused() {
    for version in VERSIONS {
        let mut case = case(version);
        let address = case.words.iter().step_by(2).copied().find(|code| *code != 0).unwrap();
        assert!(case.code(address).is_ok());
        assert_eq!(case.code(1), Err(NoCode::Gone));
        case.code_type += 8;
        assert_eq!(case.code(address), Err(NoCode::NotCode));
    }
}

proptest! {
    /// A process may write anything where it is read: nothing panics, and sizes are bounded.
    #[test]
    fn any_memory(minor in 8_u8..=13, changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
        let mut case = case(version(minor).unwrap());
        let mut places: Vec<u64> = case.image.0.keys().copied().collect();
        places.sort_unstable();
        for (place, at, value) in changes {
            let bytes = case.image.0.get_mut(place.get(&places)).unwrap();
            if !bytes.is_empty() {
                *at.get_mut(bytes) = value;
            }
        }
        let (words, ..) = case.walk(0, MAX_PYTHON_FRAMES);
        for [address, place] in words.as_chunks::<2>().0 {
            if let Ok(code) = case.code(*address) {
                let _ = code.line(*place as u32);
            }
        }
    }
}
