//! What the tests on the running kernel share: workloads and where they run, counts that are not
//! podflame's own to compare with, and waiting.
//!
//! Nothing here knows podflame itself. Everything made on the machine (processes, cgroups, network
//! namespaces) is removed when its guard is dropped, also when a test fails.

mod cgroup;
mod kubernetes;
pub mod load;
mod net;
mod perf;
mod perf_control;
mod perf_record;
mod wait;
mod workload;

pub use cgroup::Cgroup;
pub use kubernetes::Node;
pub use net::{Lossy, NetPair, Netns, left_behind, own_counter};
pub use perf::{PerfStat, perf_stat};
pub use perf_record::{PerfRecord, PerfSamples};
pub use wait::wait_for;
pub use workload::{Workload, podflame, tool, workload};
