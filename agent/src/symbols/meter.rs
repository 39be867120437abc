//! A DWARF reader whose work is metered.
//!
//! DWARF of a few megabytes can stand for any amount of work: a unit may refer to the tables of
//! another, so that a table is parsed once for each unit; one byte makes a row of the line table;
//! nested functions are parsed by recursion. The file may come from a hostile container. So every
//! byte that is read is charged to an allowance, and the depth of the stack is watched: when either
//! runs out, reads fail, and the parser gives up as it does at the end of a file.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use gimli::{Error, LittleEndian, ReaderOffsetId, Result};

/// Most bytes of stack below the point where the allowance was given. Threads have 2 MiB.
const STACK: usize = 512 << 10;

/// What may still be read.
#[derive(Debug, Default)]
pub(super) struct Meter {
    left: AtomicU64,
    spent: AtomicU64,
    stack: AtomicUsize,
}

impl Meter {
    /// Allows `bytes` to be read from now on, by callees of the caller.
    pub(super) fn allow(&self, bytes: u64) {
        self.left.store(bytes, Relaxed);
        self.stack.store(stack_pointer(), Relaxed);
    }

    /// Bytes read since the start.
    pub(super) fn spent(&self) -> u64 {
        self.spent.load(Relaxed)
    }

    /// Whether the allowance is used up.
    pub(super) fn exhausted(&self) -> bool {
        self.left.load(Relaxed) == 0
    }

    // One thread uses it, so that plain loads and stores are enough; they are atomic only because
    // the parser shares readers behind `Arc`.
    fn charge(&self, bytes: usize) -> Result<()> {
        let bytes = bytes as u64;
        let left = self.left.load(Relaxed);
        if left < bytes || self.stack.load(Relaxed).abs_diff(stack_pointer()) > STACK {
            self.left.store(0, Relaxed);
            return Err(Error::Io);
        }
        self.left.store(left - bytes, Relaxed);
        self.spent.store(self.spent.load(Relaxed) + bytes, Relaxed);
        Ok(())
    }
}

/// Somewhere in the frame of the caller.
fn stack_pointer() -> usize {
    let here = 0_u8;
    (&raw const here).addr()
}

/// Bytes of a section, and the meter they are charged to.
#[derive(Clone, Debug)]
pub(super) struct Metered {
    bytes: Arc<[u8]>,
    start: usize,
    end: usize,
    meter: Arc<Meter>,
}

impl Metered {
    /// All of a section.
    pub(super) fn new(bytes: Arc<[u8]>, meter: Arc<Meter>) -> Self {
        let end = bytes.len();
        Self { bytes, start: 0, end, meter }
    }

    fn slice(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    fn eof<T>(&self) -> Result<T> {
        Err(Error::UnexpectedEof(gimli::Reader::offset_id(self)))
    }
}

impl gimli::Reader for Metered {
    type Endian = LittleEndian;
    type Offset = usize;

    fn endian(&self) -> LittleEndian {
        LittleEndian
    }

    fn len(&self) -> usize {
        self.end.saturating_sub(self.start)
    }

    fn empty(&mut self) {
        self.end = self.start;
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len() {
            return self.eof();
        }
        self.end = self.start + len;
        Ok(())
    }

    fn offset_from(&self, base: &Self) -> usize {
        self.start.saturating_sub(base.start)
    }

    fn offset_id(&self) -> ReaderOffsetId {
        ReaderOffsetId((self.bytes.as_ptr().addr() + self.start) as u64)
    }

    fn lookup_offset_id(&self, id: ReaderOffsetId) -> Option<usize> {
        let offset = usize::try_from(id.0.checked_sub(self.offset_id().0)?).ok()?;
        (offset <= self.len()).then_some(offset)
    }

    fn find(&self, byte: u8) -> Result<usize> {
        let found = self.slice().iter().position(|b| *b == byte);
        self.meter.charge(found.unwrap_or(self.len()) / 4 + 1)?;
        found.map_or_else(|| self.eof(), Ok)
    }

    fn skip(&mut self, len: usize) -> Result<()> {
        self.meter.charge(1)?;
        if len > self.len() {
            return self.eof();
        }
        self.start += len;
        Ok(())
    }

    fn split(&mut self, len: usize) -> Result<Self> {
        self.meter.charge(1)?;
        if len > self.len() {
            return self.eof();
        }
        let mut split = self.clone();
        split.end = split.start + len;
        self.start += len;
        Ok(split)
    }

    fn to_slice(&self) -> Result<Cow<'_, [u8]>> {
        self.meter.charge(self.len())?;
        Ok(self.slice().into())
    }

    fn to_string(&self) -> Result<Cow<'_, str>> {
        self.meter.charge(self.len())?;
        str::from_utf8(self.slice()).map(Cow::from).map_err(|_| Error::BadUtf8)
    }

    fn to_string_lossy(&self) -> Result<Cow<'_, str>> {
        self.meter.charge(self.len())?;
        Ok(String::from_utf8_lossy(self.slice()))
    }

    fn read_slice(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.meter.charge(buffer.len() + 1)?;
        match self.slice().get(..buffer.len()) {
            Some(bytes) => buffer.copy_from_slice(bytes),
            None => return self.eof(),
        }
        self.start += buffer.len();
        Ok(())
    }
}
