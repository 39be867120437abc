//! Stacks of CPython: where the interpreter keeps what it runs, and the walk along it.
//!
//! A thread's state is found in the list of its interpreter by the thread's ID, which is what
//! `pthread_self` returns: on x86-64 the base of the FS segment (glibc's `THREAD_SELF`, musl's
//! `__pthread_self`). From there the frames are a linked list. All offsets come from the agent, which
//! knows them by the interpreter's version ([`Layout`]).
//!
//! Not for names: a frame here is the address of its code object and a place in its instructions. The
//! walk is generic over how memory is read, so that the same code runs in BPF and in tests.

#[cfg(feature = "user")]
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::walk::{get, set};

/// Most frames of a Python stack, those that only mark where native code began counted too. As
/// [`MAX_FRAMES`](crate::MAX_FRAMES): a native stack is cut at the same depth.
pub const MAX_PYTHON_FRAMES: usize = 127;

/// Most frames of a Python stack that is kept with a socket: each costs 16 bytes a socket.
pub const MAX_SENDER_PYTHON_FRAMES: usize = 64;

/// Most thread states and interpreters that are looked through for a thread's own: each costs a read
/// of some 80 ns, but only until the thread is remembered.
pub const MAX_STATES: usize = 128;

/// Words of the copy of a part of a thread state or a frame: a power of two.
const WORDS: usize = 32;

/// Most bytes that [`Layout::thread_bytes`] and [`Layout::frame_bytes`] can ask for.
pub const MAX_BYTES: u16 = (WORDS * 8 - 8) as u16;

/// [`Layout::current`] where a thread state holds the frame itself.
pub const DIRECT: u16 = u16::MAX;

/// The bit of a frame's second word that says that the next outer frame, if there is one, is of
/// another call of the interpreter's loop.
pub const ENTRY: u64 = 1 << 32;

/// The bits of a frame's second word that are the place in the code. As a signed number it is negative
/// while the frame has not begun.
pub const PLACE: u64 = 0xffff_ffff;

numbered! {
    /// Why a Python stack ended where it did.
    PythonEnd: u8 {
        /// The process is not known to run a Python that can be walked.
        None = 0, "none";
        /// The outermost frame was reached.
        Complete = 1, "complete";
        /// As many frames as fit were taken and there were more.
        Truncated = 2, "truncated";
        /// The memory that the next frame is in could not be read.
        Unreadable = 3, "unreadable";
        /// The thread runs no Python code, or too many threads are listed before it.
        NoThread = 4, "no_thread";
    }
}

record! {
    /// Byte offsets of an interpreter's structs. All are multiples of 8 but `frame_owner`.
    pub struct Layout {
        /// `_PyRuntimeState.interpreters.head`.
        pub interpreters: u16,
        /// `PyInterpreterState.next`.
        pub interpreter_next: u16,
        /// `PyInterpreterState.threads.head`.
        pub interpreter_threads: u16,
        /// Bytes of a thread state up to the last field that is named here.
        pub thread_bytes: u16,
        /// `PyThreadState.next`.
        pub thread_next: u16,
        /// `PyThreadState.thread_id`.
        pub thread_id: u16,
        /// `PyThreadState.frame`, `.cframe` or `.current_frame`.
        pub thread_frame: u16,
        /// `_PyCFrame.current_frame`, or [`DIRECT`].
        pub current: u16,
        /// Bytes of a frame up to the last field that is named here.
        pub frame_bytes: u16,
        /// The next outer frame.
        pub frame_previous: u16,
        /// The code object.
        pub frame_code: u16,
        /// The instruction: its number (`f_lasti`), or its address.
        pub frame_place: u16,
        /// The byte that says whether a frame is the outermost of a call of the interpreter's loop.
        pub frame_owner: u16,
        /// What of that byte counts.
        pub owner_mask: u16,
        /// What it is in an outermost frame.
        pub owner_entry: u16,
        /// 1: an outermost frame only marks that it is, and runs no code of the program.
        pub shims: u16,
        /// 1: the instruction is an address.
        pub relative: u16,
        /// `PyCodeObject.co_code_adaptive`: where the instructions begin that an address is of.
        pub code_start: u16,
        /// Zero.
        pub pad: [u16; 2],
    }
}

record! {
    /// A process that runs Python; the value of [`map::PYTHON`](crate::map::PYTHON).
    pub struct Process {
        /// Start of the process, as in [`Task::start_ns`](crate::Task::start_ns).
        pub start_ns: u64,
        /// How many programs it and its ancestors have executed, as in
        /// [`Task::exec_id`](crate::Task::exec_id).
        pub exec_id: u32,
        /// Zero.
        pub pad: u32,
        /// Address of `_PyRuntime`.
        pub runtime: u64,
        /// The offsets of its version.
        pub layout: Layout,
    }
}

/// That there is what was looked for; no [`PythonEnd`] has the number.
pub const FOUND: u64 = 0x100;

/// The words of a [`Process`], for those who copy it as such.
pub const PROCESS_WORDS: usize = size_of::<Process>() / 8;

/// How memory of the process is read.
pub trait Memory {
    /// Copies that many bytes from an address to the front of `into`. Whether all could be read.
    fn read<const N: usize>(&self, into: &mut [u64; N], bytes: u32, address: u64) -> bool;
}

/// A walk along the frames of a Python thread. In BPF it lives in a map, and each step reads its state
/// back from there, so that the verifier looks at each step once.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Walk {
    /// What is walked.
    process: Process,
    /// The thread's ID.
    thread: u64,
    /// The next interpreter.
    interpreter: u64,
    /// The next thread state; then the next frame.
    at: u64,
    /// The thread's state, once it is found.
    found: u64,
    /// The two words of the frame that [`Walk::step`] read.
    frame: [u64; 2],
    /// What was read last.
    words: [u64; WORDS],
}

impl Walk {
    /// A walk that is nowhere yet.
    #[must_use]
    pub fn new() -> Self {
        // SAFETY: all fields are numbers.
        unsafe { core::mem::zeroed() }
    }

    /// Begins with a process and one of its threads.
    #[inline(always)]
    pub fn begin(&mut self, process: &Process, thread: u64) {
        self.process = *process;
        set(&mut self.thread, thread);
        set(&mut self.found, 0);
    }

    /// Writes the thread's frames to `out` from `at` on, innermost first and two words each, at most
    /// `most`; returns how many there are, and why it ended. `N` is a power of two.
    ///
    /// `find` and `step` are [`Walk::find`] and [`Walk::step`]: a BPF program makes each a function of its
    /// own, which the verifier looks at once.
    #[inline(always)]
    pub fn run<const N: usize>(
        &mut self,
        find: impl Fn(&mut Self) -> u64,
        step: impl Fn(&mut Self) -> u64,
        out: &mut [u64; N],
        at: usize,
        most: usize,
    ) -> (u16, PythonEnd) {
        let reason = find(self);
        if reason != FOUND {
            return (0, PythonEnd::from_number(reason as u8).unwrap_or(PythonEnd::None));
        }
        let mut count = 0;
        let mut end = PythonEnd::Truncated;
        while count < most {
            let reason = step(self);
            if reason != FOUND {
                end = PythonEnd::from_number(reason as u8).unwrap_or(PythonEnd::None);
                break;
            }
            out[(at + 2 * count) & (N - 1)] = get(&self.frame[0]);
            out[(at + 2 * count + 1) & (N - 1)] = get(&self.frame[1]);
            count += 1;
        }
        if get(&self.at) == 0 {
            end = PythonEnd::Complete;
        }
        (count as u16, end)
    }

    /// Address of the thread's state, if it was found.
    #[inline(always)]
    pub fn found(&self) -> u64 {
        get(&self.found)
    }

    /// Finds the thread's state, which was at `hint` the last time if that is not 0, and goes to its
    /// innermost frame. Returns [`FOUND`], or the number of a [`PythonEnd`].
    #[inline(always)]
    pub fn find(&mut self, memory: &impl Memory, hint: u64) -> u64 {
        if (hint == 0 || !self.is_thread(memory, hint))
            && let Err(end) = self.find_thread(memory)
        {
            return end as u64;
        }
        let current = get(&self.process.layout.current);
        if current != DIRECT {
            let Some(frame) = self.word_at(memory, get(&self.at).wrapping_add(current as u64))
            else {
                return PythonEnd::Unreadable as u64;
            };
            set(&mut self.at, frame);
        }
        FOUND
    }

    /// Looks through the threads of all interpreters.
    #[inline(always)]
    fn find_thread(&mut self, memory: &impl Memory) -> Result<(), PythonEnd> {
        let runtime = get(&self.process.runtime);
        let at = runtime.wrapping_add(get(&self.process.layout.interpreters) as u64);
        let head = self.word_at(memory, at).ok_or(PythonEnd::Unreadable)?;
        set(&mut self.interpreter, head);
        set(&mut self.at, 0);
        let mut states = 0;
        while states < MAX_STATES {
            let state = get(&self.at);
            if state != 0 {
                if self.is_thread(memory, state) {
                    return Ok(());
                }
                let next = self.word(get(&self.process.layout.thread_next));
                set(&mut self.at, next);
            } else {
                self.next_interpreter(memory)?;
            }
            states += 1;
        }
        Err(PythonEnd::NoThread)
    }

    /// Goes to the first thread of the next interpreter.
    #[inline(always)]
    fn next_interpreter(&mut self, memory: &impl Memory) -> Result<(), PythonEnd> {
        let interpreter = get(&self.interpreter);
        if interpreter == 0 {
            return Err(PythonEnd::NoThread);
        }
        let threads =
            interpreter.wrapping_add(get(&self.process.layout.interpreter_threads) as u64);
        let next = interpreter.wrapping_add(get(&self.process.layout.interpreter_next) as u64);
        let first = self.word_at(memory, threads).ok_or(PythonEnd::Unreadable)?;
        set(&mut self.at, first);
        let next = self.word_at(memory, next).ok_or(PythonEnd::Unreadable)?;
        set(&mut self.interpreter, next);
        Ok(())
    }

    /// Reads a thread state. Whether it is the thread's, and the thread runs Python code: then goes to
    /// its innermost frame. A thread has a state in each interpreter that it has been in.
    #[inline(always)]
    fn is_thread(&mut self, memory: &impl Memory, state: u64) -> bool {
        let bytes = get(&self.process.layout.thread_bytes);
        if !self.read(memory, state, bytes) {
            // The list cannot be followed.
            set(&mut self.words[0], 0);
            let next = get(&self.process.layout.thread_next);
            set(&mut self.words[(next >> 3) as usize & (WORDS - 1)], 0);
            return false;
        }
        let frame = self.word(get(&self.process.layout.thread_frame));
        if self.word(get(&self.process.layout.thread_id)) != get(&self.thread) || frame == 0 {
            return false;
        }
        set(&mut self.found, state);
        set(&mut self.at, frame);
        true
    }

    /// Reads a frame, which `run` takes from here, and goes to the next outer one. Returns [`FOUND`], or
    /// the number of a [`PythonEnd`].
    #[inline(always)]
    pub fn step(&mut self, memory: &impl Memory) -> u64 {
        let frame = get(&self.at);
        if frame == 0 {
            return PythonEnd::Complete as u64;
        }
        let bytes = get(&self.process.layout.frame_bytes);
        if !self.read(memory, frame, bytes) {
            return PythonEnd::Unreadable as u64;
        }
        let previous = self.word(get(&self.process.layout.frame_previous));
        set(&mut self.at, previous);
        // Without a branch: the verifier would look at each frame once for each way through it.
        let at = get(&self.process.layout.frame_owner);
        let owner = self.word(at) >> ((at & 7) * 8) & get(&self.process.layout.owner_mask) as u64;
        let entry = zero(owner ^ get(&self.process.layout.owner_entry) as u64);
        let hidden = ones(entry & get(&self.process.layout.shims) as u64);
        let code = self.word(get(&self.process.layout.frame_code));
        let start = code.wrapping_add(get(&self.process.layout.code_start) as u64)
            & ones(get(&self.process.layout.relative) as u64);
        let place = self.word(get(&self.process.layout.frame_place)).wrapping_sub(start);
        set(&mut self.frame[0], code & !hidden);
        set(&mut self.frame[1], place & PLACE | entry << ENTRY.trailing_zeros());
        FOUND
    }

    /// Copies from an address to the words.
    #[inline(always)]
    fn read(&mut self, memory: &impl Memory, address: u64, bytes: u16) -> bool {
        // A mask, since a comparison would give the verifier two ways from here.
        memory.read(&mut self.words, bytes as u32 & (WORDS as u32 * 8 - 1), address)
    }

    /// One word of memory.
    #[inline(always)]
    fn word_at(&mut self, memory: &impl Memory, address: u64) -> Option<u64> {
        memory.read(&mut self.words, 8, address).then(|| get(&self.words[0]))
    }

    /// The word at an offset of what was read.
    #[inline(always)]
    fn word(&self, offset: u16) -> u64 {
        get(&self.words[(offset >> 3) as usize & (WORDS - 1)])
    }
}

impl Default for Walk {
    fn default() -> Self {
        Self::new()
    }
}

/// 1 for 0, and 0 for any other number up to 2^63.
#[inline(always)]
fn zero(number: u64) -> u64 {
    number.wrapping_sub(1) >> 63
}

/// All bits for 1, and none for 0.
#[inline(always)]
fn ones(bit: u64) -> u64 {
    0_u64.wrapping_sub(bit)
}

const _: () = {
    assert!(size_of::<Layout>() == 40);
    assert!(size_of::<Process>() == 64);
    assert!(WORDS.is_power_of_two());
};
