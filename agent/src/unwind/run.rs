//! Runs the entries of a section in the order of addresses, and writes their rows.
//!
//! An entry is a CIE, what several functions share, or an FDE, one function (DWARF 5, section 6.4.1).
//! FDEs are in no order, so that they are found first and run then. What running costs is bounded by
//! bytes: an instruction has at least one, and adds at most one row or copies the rules of one.
//!
//! Not for the bytes' origin, nor for the meaning of a row.

use gimli::{
    BaseAddresses, CommonInformationEntry, Error, FrameDescriptionEntry, UnwindContext,
    UnwindOffset, UnwindSection,
};
use hashbrown::HashMap;
use podflame_wire::unwind::NO_RULE;

use super::{
    FileTable, Limits, Load, NoTable, Rules, Stats, UNSUPPORTED, expression::Bytes, pages::Writer,
    translate::Machine,
};

/// Bytes of entries that are run between two pauses: half a millisecond or so, and some milliseconds
/// where a file was made to be slow.
const SLICE: u64 = 32 << 10;
/// What finding an entry costs in bytes of running one.
const FIND: u64 = 8;
/// Most bytes of a CIE, which is run again for each of its functions. Compilers write 20 to 30.
const CIE_BYTES: usize = 256;
/// Most bytes of an FDE. Hand-written code that changes the stack all the time has 4 KiB.
const FDE_BYTES: usize = 64 << 10;
/// CIEs that are kept parsed, of some 150 bytes. Linkers leave two or three, or one for each of the
/// files they were given, which lie one behind the other.
const CIES: usize = 64;

/// What may still be run, and when to pause.
pub(super) struct Effort<'a> {
    left: u64,
    slice: u64,
    pause: &'a mut dyn FnMut(),
}

impl<'a> Effort<'a> {
    pub(super) fn new(bytes: u64, pause: &'a mut dyn FnMut()) -> Self {
        Self { left: bytes, slice: SLICE, pause }
    }

    fn charge(&mut self, bytes: u64) -> Result<(), NoTable> {
        self.left = self.left.checked_sub(bytes).ok_or(NoTable::TooLarge)?;
        match self.slice.checked_sub(bytes) {
            Some(left) => self.slice = left,
            None => {
                self.slice = SLICE;
                (self.pause)();
            }
        }
        Ok(())
    }
}

/// A section to run, and what the result must keep to.
pub(super) struct Run<'r, 'e, 'a, S> {
    pub(super) section: &'r S,
    /// All of the section.
    pub(super) bytes: &'a [u8],
    pub(super) bases: &'r BaseAddresses,
    /// Whether entries may follow an empty one. The linker puts one at the end; but some leave the
    /// one that the compiler's own start files bring in the middle.
    pub(super) skip_zeros: bool,
    pub(super) machine: Machine,
    pub(super) rules: &'r mut Rules,
    pub(super) limits: &'r Limits,
    pub(super) effort: &'r mut Effort<'e>,
}

/// Where the FDE of a function is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    /// First address of the function.
    start: u64,
    /// Of the entry in the section.
    offset: u32,
}

type Cie<'a> = CommonInformationEntry<Bytes<'a>>;
type Cies<'a> = HashMap<usize, Cie<'a>, foldhash::fast::RandomState>;

impl<'a, S: UnwindSection<Bytes<'a>>> Run<'_, '_, 'a, S> {
    /// The table of the code in `loads`.
    pub(super) fn table(mut self, loads: Vec<Load>) -> Result<FileTable, NoTable> {
        let mut stats = Stats::default();
        let mut cies = Cies::default();
        let mut places = self.find(&loads, &mut cies, &mut stats)?;
        if places.is_empty() {
            return Err(if stats.malformed > 0 { NoTable::Malformed } else { NoTable::NoFrames });
        }
        places.sort_unstable();
        let all = places.len();
        // Of entries of one function the first counts, as for all who search from the start.
        places.dedup_by_key(|place| place.start);
        stats.idle += (all - places.len()) as u64;

        let start = loads.iter().map(|load| load.address).min().unwrap_or(0);
        let end = loads.iter().map(Load::end).max().unwrap_or(0);
        let mut writer = Writer::new(start, self.limits.table_bytes);
        let mut context = UnwindContext::new();
        for (index, place) in places.iter().enumerate() {
            let Ok(fde) = self.fde(place.offset as usize, &mut cies) else { continue };
            self.effort.charge((fde.entry_len() + fde.cie().entry_len()) as u64)?;
            let next = places.get(index + 1).map_or(u64::MAX, |next| next.start);
            let load = loads.iter().find(|load| load.holds(place.start));
            let end = fde.end_address().min(next).min(load.map_or(0, Load::end));
            self.rows(&fde, end, &mut context, &mut writer, &mut stats)?;
            stats.functions += 1;
            if end < next {
                writer.push(end, NO_RULE)?;
            }
        }
        let (segments, rows, bytes) = writer.finish(end)?;
        Ok(FileTable { segments, loads, rows, bytes, stats })
    }

    /// The functions that have code in `loads`, in the order of the section.
    fn find(
        &mut self,
        loads: &[Load],
        cies: &mut Cies<'a>,
        stats: &mut Stats,
    ) -> Result<Vec<Place>, NoTable> {
        let mut places = Vec::new();
        let mut offset = 0;
        while offset < self.bytes.len() {
            self.effort.charge(FIND)?;
            let Some((header, len)) = initial_length(self.bytes, offset) else {
                stats.malformed += 1;
                break;
            };
            let entry = offset;
            offset += header + len;
            if len == 0 {
                if self.skip_zeros {
                    continue;
                }
                break;
            }
            let fde = match self.fde(entry, cies) {
                Ok(fde) => fde,
                Err(Error::NotCiePointer(_)) => continue,
                Err(_) => {
                    stats.malformed += 1;
                    continue;
                }
            };
            let start = fde.initial_address();
            let code = start != 0 && loads.iter().any(|load| load.holds(start));
            if !code || fde.end_address() <= start {
                stats.idle += 1;
                continue;
            }
            if places.len() >= self.limits.functions {
                return Err(NoTable::TooLarge);
            }
            places.push(Place { start, offset: entry.try_into().map_err(|_| NoTable::TooLarge)? });
        }
        Ok(places)
    }

    fn fde(
        &self,
        offset: usize,
        cies: &mut Cies<'a>,
    ) -> gimli::Result<FrameDescriptionEntry<Bytes<'a>>> {
        let partial = self.section.partial_fde_from_offset(self.bases, offset.into())?;
        partial.parse(|section, bases, offset| {
            let key = UnwindOffset::into(offset);
            if let Some(known) = cies.get(&key) {
                return Ok(known.clone());
            }
            let cie = section.cie_from_offset(bases, offset)?;
            if cies.len() >= CIES {
                cies.clear();
            }
            cies.insert(key, cie.clone());
            Ok(cie)
        })
    }

    /// Writes the rows of a function up to `end`.
    fn rows(
        &mut self,
        fde: &FrameDescriptionEntry<Bytes<'a>>,
        end: u64,
        context: &mut UnwindContext<usize>,
        writer: &mut Writer,
        stats: &mut Stats,
    ) -> Result<(), NoTable> {
        let mut at = fde.initial_address();
        if fde.entry_len() > FDE_BYTES || fde.cie().entry_len() > CIE_BYTES {
            stats.too_long += 1;
            return writer.push(at, UNSUPPORTED);
        }
        let Ok(mut table) = fde.rows(self.section, self.bases, context) else {
            stats.malformed += 1;
            return writer.push(at, UNSUPPORTED);
        };
        while at < end {
            let row = match table.next_row() {
                Ok(Some(row)) => row,
                Ok(None) => break,
                Err(_) => {
                    stats.malformed += 1;
                    return writer.push(at, UNSUPPORTED);
                }
            };
            let rule = match self.machine.rule(row, fde, self.section) {
                Some(rule) => self.rules.number(rule).unwrap_or_else(|| {
                    stats.rules_full += 1;
                    UNSUPPORTED
                }),
                None => {
                    stats.unsupported += 1;
                    UNSUPPORTED
                }
            };
            writer.push(row.start_address(), rule)?;
            at = row.end_address();
        }
        Ok(())
    }
}

/// Bytes of an entry's length and the length that it states (DWARF 5, section 7.4); `None` if the
/// entry does not end within the section.
fn initial_length(bytes: &[u8], offset: usize) -> Option<(usize, usize)> {
    let rest = bytes.get(offset..)?;
    let (header, len) = match u32::from_le_bytes(*rest.first_chunk()?) {
        u32::MAX => (12, u64::from_le_bytes(*rest.get(4..)?.first_chunk()?)),
        0xffff_fff0.. => return None,
        len => (4, len.into()),
    };
    let len = usize::try_from(len).ok()?;
    (len <= rest.len().checked_sub(header)?).then_some((header, len))
}
