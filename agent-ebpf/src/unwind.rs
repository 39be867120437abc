//! Tables by which user stacks are unwound, as the agent writes them and the walk reads them.
//!
//! A *table* covers up to 4 GiB of an executable file's own addresses (those of its program headers).
//! Each *row* says from which address on which *rule* holds, up to the next row; equal rules of all
//! files are kept once. Rows lie in *pages* of 512, so that they are found with two binary searches of
//! nine steps: in page 0, the index, and then in the page that it names. A table of one page has no
//! index. A row costs 6 bytes.
//!
//! A process is a sorted list of *mappings*.

/// Rows in a page.
pub const PAGE_ROWS: usize = 512;

/// Most pages of a table, the index included.
pub const TABLE_PAGES: usize = 1 + PAGE_ROWS;

/// Most rules that differ, in all files together.
pub const MAX_RULES: usize = 16_384;

/// Most tables at a time.
pub const MAX_TABLES: usize = 4096;

/// Most mappings of a process. With more, its stacks are left by their frame pointers.
pub const MAX_PROCESS_MAPPINGS: usize = 8192;

/// Most mappings of all processes together. Each takes 32 bytes.
pub const MAX_MAPPINGS: usize = 65_536;

/// Most processes at a time whose stacks are walked by tables.
pub const MAX_PROCESSES: usize = 4096;

/// The rule of code for which the file says nothing: it is left by its frame pointer.
pub const NO_RULE: u16 = 0;

/// What fills a page up behind its last row.
pub const NO_ROW: u32 = u32::MAX;

/// A page of rows, by address. In an index, `start` is the first address of each page behind it, and
/// `rule` is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)
)]
#[repr(C)]
pub struct Page {
    /// Where the row begins: the file's address less the table's base.
    pub start: [u32; PAGE_ROWS],
    /// Index of its rule; [`NO_RULE`] where the file says nothing.
    pub rule: [u16; PAGE_ROWS],
}

numbered! {
    /// How the canonical frame address (CFA) is found: the stack pointer of the caller behind the
    /// call (DWARF 5, section 6.4).
    Cfa: u8 {
        /// Nothing is known; the rule of [`NO_RULE`].
        None = 0, "none";
        /// Stack pointer + `cfa_offset`.
        Sp = 1, "sp";
        /// Frame pointer + `cfa_offset`.
        Fp = 2, "fp";
        /// Register `cfa_register` + `cfa_offset`, known in the innermost frame only.
        Register = 3, "register";
        /// What lies at stack pointer + `cfa_offset`, + `cfa_add`.
        AtSp = 4, "at_sp";
        /// What lies at frame pointer + `cfa_offset`, + `cfa_add`.
        AtFp = 5, "at_fp";
        /// In a stub of the procedure linkage table of x86-64: stack pointer + 8, and 8 more from byte
        /// `cfa_offset` of its 16 on.
        Plt = 6, "plt";
        /// The frame of a signal handler's return: `cfa_offset`, `ra_offset` and `fp_offset` are where
        /// the interrupted stack pointer, instruction pointer and frame pointer lie, from the stack
        /// pointer on; and `cfa_add` the link register, if that is not 0.
        Signal = 7, "signal";
        /// The outermost frame: it has no return address.
        End = 8, "end";
        /// The file has a rule that this cannot say.
        Unsupported = 9, "unsupported";
    }
}

numbered! {
    /// Where a register of the caller is.
    Saved: u8 {
        /// Still in the register.
        Same = 0, "same";
        /// At CFA + offset.
        AtCfa = 1, "at_cfa";
        /// At frame pointer + offset.
        AtFp = 2, "at_fp";
        /// Lost.
        Undefined = 3, "undefined";
    }
}

/// How to get from a frame to its caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)
)]
#[repr(C)]
pub struct Rule {
    /// A [`Cfa`].
    pub cfa: u8,
    /// DWARF number of the register, for [`Cfa::Register`].
    pub cfa_register: u8,
    /// Where the return address is: a [`Saved`]. On x86-64 always [`Saved::AtCfa`].
    pub ra: u8,
    /// Where the caller's frame pointer is: a [`Saved`].
    pub fp: u8,
    /// By [`Cfa`].
    pub cfa_offset: i32,
    /// By [`Cfa`].
    pub cfa_add: i16,
    /// Offset of the return address.
    pub ra_offset: i16,
    /// Offset of the caller's frame pointer.
    pub fp_offset: i32,
}

numbered! {
    /// What a mapping of a process is.
    MappingKind: u32 {
        /// Nothing executable.
        Gap = 0, "gap";
        /// Code with a table.
        Table = 1, "table";
        /// Code without one, which is left by its frame pointer: made at run time, or of a file that
        /// has no table.
        NoTable = 2, "no_table";
        /// Code without one whose compiler keeps frame pointers, also from one stack to another, as Go's
        /// does: it is left by them, and what they lead to is its caller.
        FramePointers = 3, "frame_pointers";
    }
}

/// A range of a process's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)
)]
#[repr(C)]
pub struct Mapping {
    /// Where it begins.
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
    /// What the address less this is, is the address in the table.
    pub bias: u64,
    /// Slot of the table.
    pub table: u32,
    /// A [`MappingKind`]; and, from bit 8 on, how many pages the table has.
    pub kind: u32,
}

/// What is known of a process: where its mappings are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "user",
    derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)
)]
#[repr(C)]
pub struct Process {
    /// [`Task::start_ns`](crate::Task) of the process that is meant.
    pub start_ns: u64,
    /// [`Task::exec_id`](crate::Task) of the program that it ran when it was read.
    pub exec_id: u32,
    /// The first of its mappings, among those of all.
    pub first: u32,
    /// How many it has.
    pub mappings: u32,
    /// Number of this list of mappings. No two lists ever have the same, of whatever processes, and none
    /// has 0; what is known of a generation stays true.
    pub generation: u32,
}

const _: () = {
    assert!(size_of::<Page>() == 6 * PAGE_ROWS);
    assert!(size_of::<Rule>() == 16);
    assert!(size_of::<Mapping>() == 32);
    assert!(size_of::<Process>() == 24);
};
