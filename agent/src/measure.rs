//! What is measured without a stack: an amount of one cgroup on one slot of 100 ms.
//!
//! Not for names: whoever reads a map of the kernel or a file of a cgroup makes [`Measured`], the
//! resolver gives it the workload's and the subject's name, and the correlator gets an
//! [`crate::correlate::Observation`].

use std::net::SocketAddr;

use crate::{
    correlate::{Metric, Slot, Value},
    event::CgroupId,
};

/// One number about one slot.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The slot, or the last one if there are several.
    pub slot: Slot,
    /// How many slots it is about, at least 1.
    pub slots: u16,
    /// The cgroup that it is charged to; `None` for the node.
    pub cgroup: Option<CgroupId>,
    /// What is measured.
    pub metric: Metric,
    /// What it is about.
    pub about: About,
    /// How much.
    pub value: Value,
}

/// What a number is about, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum About {
    /// The cgroup as a whole.
    All,
    /// A local port.
    Port(u16),
    /// The other end of connections.
    Peer(SocketAddr),
    /// A file, as `stat` tells it: the encoded device and the inode number.
    File {
        /// The device (`st_dev`).
        device: u64,
        /// The inode number.
        inode: u64,
    },
}
