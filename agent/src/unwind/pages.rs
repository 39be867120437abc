//! Rows → pages, and the look-up in them.
//!
//! Not for where rows come from.

use podflame_wire::unwind::{NO_ROW, NO_RULE, PAGE_ROWS, Page, TABLE_PAGES};

use super::NoTable;

/// Bytes of addresses that one table can cover: [`NO_ROW`] is not a place.
const SPAN: u64 = NO_ROW as u64;

const EMPTY: Page = Page { start: [NO_ROW; PAGE_ROWS], rule: [NO_RULE; PAGE_ROWS] };

/// A table of the contract: a range of a file's addresses, and the pages of its rows. Large files
/// need several.
#[derive(Clone, Debug)]
pub struct Segment {
    /// First address; the starts of rows count from here.
    pub base: u64,
    /// First address behind it.
    pub end: u64,
    /// The index and then the pages of rows; or the only page of rows, without an index.
    pub pages: Vec<Page>,
}

impl Segment {
    /// The number of the rule at an address, by the search that the contract states: two binary
    /// searches, or one where there is no index.
    #[must_use]
    pub fn rule(&self, address: u64) -> u16 {
        if address < self.base || address >= self.end {
            return NO_RULE;
        }
        let Ok(start) = u32::try_from(address - self.base) else { return NO_RULE };
        let page = match self.pages.as_slice() {
            [only] => only,
            [index, pages @ ..] => {
                let Some(page) = last_row(index, start).and_then(|at| pages.get(at)) else {
                    return NO_RULE;
                };
                page
            }
            [] => return NO_RULE,
        };
        last_row(page, start).and_then(|at| page.rule.get(at)).copied().unwrap_or(NO_RULE)
    }

    /// Its rows: address and number of the rule.
    pub fn rows(&self) -> impl Iterator<Item = (u64, u16)> {
        let pages = self.pages.get(usize::from(self.pages.len() > 1)..).unwrap_or_default();
        let rows = pages.iter().flat_map(|page| page.start.iter().zip(&page.rule));
        rows.filter(|(start, _)| **start != NO_ROW)
            .map(|(start, rule)| (self.base + u64::from(*start), *rule))
    }
}

/// The last row of a page that does not begin behind `start`.
fn last_row(page: &Page, start: u32) -> Option<usize> {
    page.start.partition_point(|row| *row <= start).checked_sub(1)
}

/// Lays rows out in pages.
#[derive(Debug)]
pub(super) struct Writer {
    segments: Vec<Segment>,
    /// Whether the last segment still takes rows.
    open: bool,
    /// Rows in its last page.
    filled: usize,
    /// The rule of the last row, in a segment or not.
    rule: u16,
    /// A row that the next one may still replace, because it is at the same address.
    pending: (u64, u16),
    rows: u64,
    bytes: u64,
    most_bytes: u64,
}

impl Writer {
    /// Begins at an address without a rule. There may be `most_bytes` of pages.
    pub(super) fn new(start: u64, most_bytes: u64) -> Self {
        Self {
            segments: Vec::new(),
            open: false,
            filled: 0,
            rule: NO_RULE,
            pending: (start, NO_RULE),
            rows: 0,
            bytes: 0,
            most_bytes,
        }
    }

    /// From this address on, this rule holds. Addresses must not fall; of several rules for one
    /// address, the last one counts.
    pub(super) fn push(&mut self, address: u64, rule: u16) -> Result<(), NoTable> {
        let (pending, _) = self.pending;
        if address > pending {
            self.settle()?;
        }
        self.pending = (address.max(pending), rule);
        Ok(())
    }

    /// The segments, the rows, and the bytes of pages; `end` is where the code ends.
    pub(super) fn finish(mut self, end: u64) -> Result<(Vec<Segment>, u64, u64), NoTable> {
        if self.pending.0 < end {
            self.settle()?;
        }
        self.close(end);
        for segment in &mut self.segments {
            if segment.pages.len() == 2 {
                segment.pages.remove(0);
                self.bytes -= size_of::<Page>() as u64;
            }
            segment.pages.shrink_to_fit();
        }
        Ok((self.segments, self.rows, self.bytes))
    }

    /// Writes the pending row, unless it changes nothing.
    fn settle(&mut self) -> Result<(), NoTable> {
        let (address, rule) = self.pending;
        let first = self.segments.is_empty();
        if let Some(start) = self.place(address) {
            if rule != self.rule {
                self.rule = rule;
                self.put(start, rule)?;
            }
            return Ok(());
        }
        self.rule = rule;
        self.close(address);
        // What is in no segment has no rule, so that a row that says this is not worth a segment.
        if rule == NO_RULE && !first {
            return Ok(());
        }
        self.segments.push(Segment { base: address, end: address, pages: Vec::new() });
        self.open = true;
        // The index, which is taken away again if it turns out to be that of one page.
        self.page()?;
        self.page()?;
        self.put(0, rule)
    }

    /// Where a row at this address starts in the last segment, if that has room for it.
    fn place(&self, address: u64) -> Option<u32> {
        let segment = self.segments.last().filter(|_| self.open)?;
        let inside = address.checked_sub(segment.base).filter(|inside| *inside < SPAN)?;
        let full = segment.pages.len() == TABLE_PAGES && self.filled == PAGE_ROWS;
        if full { None } else { u32::try_from(inside).ok() }
    }

    fn put(&mut self, start: u32, rule: u16) -> Result<(), NoTable> {
        if self.filled == PAGE_ROWS {
            self.page()?;
        }
        let pages = self.segments.last_mut().map(|last| last.pages.as_mut_slice());
        let Some([index, pages @ ..]) = pages else { return Ok(()) };
        if self.filled == 0
            && let Some(first) = index.start.get_mut(pages.len().saturating_sub(1))
        {
            *first = start;
        }
        if let Some(page) = pages.last_mut()
            && let (Some(to), Some(holds)) =
                (page.start.get_mut(self.filled), page.rule.get_mut(self.filled))
        {
            (*to, *holds) = (start, rule);
            self.filled += 1;
            self.rows += 1;
        }
        Ok(())
    }

    /// Ends the last segment.
    fn close(&mut self, end: u64) {
        if let Some(last) = self.segments.last_mut().filter(|_| self.open) {
            last.end = end.min(last.base.saturating_add(SPAN));
            self.open = false;
        }
    }

    fn page(&mut self) -> Result<(), NoTable> {
        self.bytes += size_of::<Page>() as u64;
        if self.bytes > self.most_bytes {
            return Err(NoTable::TooLarge);
        }
        if let Some(last) = self.segments.last_mut() {
            last.pages.push(EMPTY);
        }
        self.filled = 0;
        Ok(())
    }
}
