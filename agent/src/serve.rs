//! Serves what the agent has to programs, over gRPC.

pub mod hub;
