//! What is known of an address.

use std::sync::Arc;

/// What an address stands for: one function, or the reason why none is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// The function, demangled. For an unknown one the module in brackets, or the reason.
    pub name: Arc<str>,
    /// Its source file, empty if unknown.
    pub file: Arc<str>,
    /// Line in that file, 0 if unknown.
    pub line: u32,
    /// The compiler put this function into the next one.
    pub inlined: bool,
    /// What the code is part of.
    pub module: Arc<Module>,
    /// Offset in the module's file; the address itself for the kernel, and where there is no file.
    pub offset: u64,
    /// Why the function is unknown.
    pub unknown: Option<Unknown>,
}

/// A file, or another thing with a name, that code or data was mapped from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Module {
    /// Its path as the process sees it, or a name in brackets as in `/proc/PID/maps`; `[kernel]`
    /// and `[MODULE]` for the kernel and its modules; empty if unknown.
    pub path: Arc<str>,
    /// Its GNU build ID in hexadecimal, empty if it has none or is not code.
    pub build_id: Arc<str>,
}

/// What is mapped at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The file or the region; its path is `[unknown: REASON]` if that is not known.
    pub mapping: Arc<Module>,
    /// Offset in the file, or in the region if there is no file.
    pub offset: u64,
}

/// Declares the reasons with their names.
macro_rules! reasons {
    ($($(#[$meta:meta])* $variant:ident = $text:literal;)*) => {
        /// Why an address has no function.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Unknown { $($(#[$meta])* $variant,)* }

        impl Unknown {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The reason in a word or two.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

reasons! {
    /// The process was gone before it was seen.
    NoProcess = "process gone";
    /// Nothing is mapped there.
    Unmapped = "unmapped";
    /// No symbol covers it: the file is stripped, or the code was made at run time.
    NoSymbol = "no symbol";
    /// What is mapped is not an ELF file.
    NotElf = "not ELF";
    /// The ELF file contradicts itself.
    Malformed = "malformed";
    /// It is beyond a limit.
    TooLarge = "too large";
    /// The file could not be opened or read.
    Unreadable = "unreadable";
    /// The file has been changed since it was mapped.
    Changed = "file changed";
    /// The file was closed to stay within the limits, and the process is gone.
    Evicted = "evicted";
    /// The kernel hides its addresses (`kernel.kptr_restrict`; `CAP_SYSLOG` shows them).
    Restricted = "restricted";
}
