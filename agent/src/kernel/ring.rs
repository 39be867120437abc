//! The ring buffer's reading end.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use aya::maps::{MapData, RingBuf};
use podflame_wire::CgroupChange;
use tokio::io::{Interest, unix::AsyncFd};
use zerocopy::FromBytes as _;

use crate::event::CgroupId;

/// The records that wait in the kernel.
pub struct Ring(AsyncFd<RingBuf<MapData>>);

impl Ring {
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        Ok(Self(watch(ring)?))
    }

    /// Waits until the kernel wakes the agent: a new process, or the ring is filling. Records can
    /// be there without it, so poll as well.
    ///
    /// # Errors
    ///
    /// If the descriptor cannot be waited for.
    pub async fn woken(&mut self) -> io::Result<()> {
        let mut guard = self.0.readable_mut().await?;
        guard.clear_ready();
        Ok(())
    }

    /// Hands each waiting record to `take`, at most `most`; returns how many there were.
    pub fn drain(&mut self, most: usize, mut take: impl FnMut(&[u8])) -> usize {
        let ring = self.0.get_mut();
        for count in 0..most {
            match ring.next() {
                Some(record) => take(&record),
                None => return count,
            }
        }
        most
    }
}

/// A change in the tree of cgroups, as its record says; `None` for bytes that are no such record.
#[must_use]
pub fn cgroup_change(record: &[u8]) -> Option<(CgroupId, Change)> {
    let change = CgroupChange::read_from_bytes(record).ok()?;
    Some((CgroupId(change.id), if change.gone == 0 { Change::Made } else { Change::Removed }))
}

/// What happened to a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is new.
    Made,
    /// It is about to be gone.
    Removed,
}

/// Waits for a descriptor of aya's to become readable.
pub(super) fn watch<T: AsFd + AsRawFd>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: aya's types own one descriptor, keep it open as long as they live, and always return
    // that one.
    unsafe { AsyncFd::register_with_interest(inner, Interest::READABLE) }.map_err(Into::into)
}
