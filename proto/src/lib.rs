//! The gRPC API of podflame, generated from `podflame/v1/*.proto`, where it is documented.
//!
//! Not for conversions to and from the agent's own types: those are in the agent, at its boundary.

pub use prost_types::{Duration, Timestamp};

/// Package `podflame.v1`.
#[expect(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    unused_qualifications,
    reason = "generated code has its own habits"
)]
pub mod v1 {
    tonic::include_proto!("podflame.v1");
}

/// Package `runtime.v1`: what podflame reads of the Kubernetes Container Runtime Interface.
#[expect(
    missing_docs,
    clippy::allow_attributes_without_reason,
    unused_qualifications,
    reason = "generated code has its own habits, and Kubernetes documents it"
)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// The encoded `FileDescriptorSet` of the API and what it imports, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
