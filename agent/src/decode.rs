//! Bytes of one record → [`Event`]. Pure; the bytes may be anything.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use podflame_wire::{
    Cause, FaultRecord, Header, Probe, RetransmitRecord, SampleRecord, StackEnd, python::PythonEnd,
};
use zerocopy::FromBytes;

use crate::event::{
    CgroupId, Comm, Detail, Event, Frames, KTime, ProcessKey, Retransmit, Stack, Task,
};

/// `AF_INET` of `include/linux/socket.h`.
const AF_INET: u16 = 2;
/// `AF_INET6` of the same.
const AF_INET6: u16 = 10;

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There are fewer bytes than the record's fixed part has.
    #[error("{0} bytes are too short for a record")]
    Short(usize),
    /// The record states another length than it has, or more frames than fit.
    #[error("the record's length of {0} bytes does not agree with its {1} frames")]
    Length(u32, usize),
    /// No probe has this number.
    #[error("no record is of kind {0}")]
    Kind(u8),
    /// A field holds a number that is not in its range.
    #[error("{0} is out of range: {1}")]
    Range(&'static str, u64),
}

/// Decodes one record.
///
/// # Errors
///
/// If the bytes do not follow `podflame_wire`.
pub fn decode(bytes: &[u8]) -> Result<Event<'_>, DecodeError> {
    let (header, _) = view::<Header>(bytes)?;
    let probe = Probe::from_number(header.kind).ok_or(DecodeError::Kind(header.kind))?;
    let (detail, frames) = match probe {
        Probe::OnCpu => (Detail::OnCpu, view::<SampleRecord>(bytes)?.1),
        Probe::MinorFault | Probe::MajorFault => {
            let (record, frames) = view::<FaultRecord>(bytes)?;
            (Detail::Fault { address: record.address }, frames)
        }
        Probe::Retransmit | Probe::SynAck => {
            let (record, frames) = view::<RetransmitRecord>(bytes)?;
            (Detail::Retransmit(retransmit(&record)?), frames)
        }
        Probe::Sender => return Err(DecodeError::Kind(header.kind)),
    };
    let shape = header.stack;
    let native = usize::from(shape.kernel_frames) + usize::from(shape.user_frames);
    let expected = 8 * (native + 2 * usize::from(shape.python_frames));
    if frames.len() != expected || header.len as usize != bytes.len() {
        return Err(DecodeError::Length(header.len, expected / 8));
    }
    let end = StackEnd::from_number(shape.user_end)
        .ok_or(DecodeError::Range("the stack's end", shape.user_end.into()))?;
    let python_end = PythonEnd::from_number(shape.python_end)
        .ok_or(DecodeError::Range("the Python stack's end", shape.python_end.into()))?;
    Ok(Event {
        probe,
        time: KTime(header.time_ns),
        cpu: header.cpu,
        cgroup: CgroupId(header.cgroup_id),
        weight: header.weight,
        task: Task {
            process: ProcessKey {
                pid: header.task.pid,
                start_ns: header.task.start_ns,
                exec_id: header.task.exec_id,
            },
            tid: header.task.tid,
            comm: Comm(header.task.comm),
        },
        stack: Stack {
            frames: Frames(frames),
            kernel_frames: shape.kernel_frames,
            end,
            python_frames: shape.python_frames,
            python_end,
        },
        detail,
    })
}

/// Copies the fixed part, so that the bytes need no alignment; returns what is behind it.
fn view<T: FromBytes>(bytes: &[u8]) -> Result<(T, &[u8]), DecodeError> {
    T::read_from_prefix(bytes).map_err(|_| DecodeError::Short(bytes.len()))
}

fn retransmit(record: &RetransmitRecord) -> Result<Retransmit, DecodeError> {
    let address = |bytes: [u8; 16]| -> Result<IpAddr, DecodeError> {
        match record.family {
            AF_INET => Ok(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()),
            // An IPv4 peer of a dual-stack socket is shown as what it is.
            AF_INET6 => Ok(Ipv6Addr::from(bytes).to_canonical()),
            other => Err(DecodeError::Range("the address family", other.into())),
        }
    };
    Ok(Retransmit {
        local: SocketAddr::new(address(record.local)?, record.local_port),
        remote: SocketAddr::new(address(record.remote)?, record.remote_port),
        cause: Cause::from_number(record.cause)
            .ok_or(DecodeError::Range("the cause", record.cause.into()))?,
        state: record.state,
        srtt_us: record.srtt_us,
        cwnd: record.cwnd,
        netns: record.netns,
        sender_age_ns: record.sender_age_ns,
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use podflame_wire::{StackShape, Task as WireTask};
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;

    fn header(probe: Probe, fixed: usize, kernel: u16, user: u16) -> Header {
        Header {
            kind: probe as u8,
            pad: 0,
            cpu: 3,
            len: (fixed + 8 * usize::from(kernel + user)) as u32,
            time_ns: 1_000,
            cgroup_id: 77,
            weight: 10_101_010,
            task: WireTask {
                pid: 5,
                tid: 6,
                start_ns: 9,
                exec_id: 2,
                pad: 0,
                comm: *b"worker\0\0\0\0\0\0\0\0\0\0",
            },
            stack: StackShape {
                kernel_frames: kernel,
                user_frames: user,
                user_end: StackEnd::Complete as u8,
                python_end: PythonEnd::None as u8,
                python_frames: 0,
            },
        }
    }

    fn sample(kernel: u16, user: u16) -> Vec<u8> {
        let fixed = size_of::<SampleRecord>();
        let record = SampleRecord { header: header(Probe::OnCpu, fixed, kernel, user) };
        let mut bytes = record.as_bytes().to_vec();
        for frame in 0..u64::from(kernel + user) {
            bytes.extend_from_slice(&(0x1000 + frame).to_ne_bytes());
        }
        bytes
    }

    fn syn(family: u16, remote: [u8; 16]) -> RetransmitRecord {
        RetransmitRecord {
            header: header(Probe::Retransmit, size_of::<RetransmitRecord>(), 0, 0),
            sender_age_ns: 4,
            local: [127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            remote,
            local_port: 40_000,
            remote_port: 80,
            family,
            state: 2,
            cause: Cause::Syn as u8,
            srtt_us: 100,
            cwnd: 10,
            netns: 4_026_531_840,
            segments: 2,
        }
    }

    #[test]
    fn a_sample_keeps_its_task_and_its_frames_in_order() {
        let bytes = sample(2, 3);
        let event = decode(&bytes).unwrap();
        assert_eq!(event.task.comm.to_text(), "worker");
        assert_eq!((event.task.process.pid, event.task.tid, event.cpu), (5, 6, 3));
        assert_eq!((event.cgroup, event.weight), (CgroupId(77), 10_101_010));
        assert_eq!(event.stack.kernel_frames, 2);
        let frames: Vec<u64> = event.stack.frames.iter().collect();
        assert_eq!(frames, [0x1000, 0x1001, 0x1002, 0x1003, 0x1004]);
    }

    #[test]
    fn addresses_are_shown_as_what_they_are() {
        let mut mapped = [0; 16];
        mapped[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 2]);
        let mut local6 = [0; 16];
        local6[15] = 1;
        for (family, remote, expected) in [
            (AF_INET, [10, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "10.0.0.2:80"),
            (AF_INET6, mapped, "10.0.0.2:80"),
            (AF_INET6, local6, "[::1]:80"),
        ] {
            let record = syn(family, remote);
            let event = decode(record.as_bytes()).unwrap();
            let Detail::Retransmit(detail) = event.detail else { unreachable!() };
            assert_eq!(detail.remote.to_string(), expected);
            assert_eq!(detail.cause, Cause::Syn);
        }
    }

    #[test]
    fn wrong_bytes_are_named() {
        let bytes = sample(1, 1);
        assert_eq!(decode(&[]), Err(DecodeError::Short(0)));
        assert_eq!(decode(&bytes[..bytes.len() - 8]), Err(DecodeError::Length(96, 2)));
        let mut kind = bytes.clone();
        kind[0] = 200;
        assert_eq!(decode(&kind), Err(DecodeError::Kind(200)));
        kind[0] = Probe::Sender as u8;
        assert_eq!(decode(&kind), Err(DecodeError::Kind(5)));
        let record = syn(1, [0; 16]);
        assert_eq!(decode(record.as_bytes()), Err(DecodeError::Range("the address family", 1)));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0_u8..7) {
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            if let Ok(event) = decode(&bytes) {
                prop_assert!(usize::from(event.stack.kernel_frames) <= event.stack.frames.iter().len());
            }
        }

        #[test]
        fn every_well_formed_sample_decodes(kernel in 0_u16..=127, user in 0_u16..=127) {
            let bytes = sample(kernel, user);
            let event = decode(&bytes).unwrap();
            prop_assert_eq!(event.stack.frames.iter().len(), usize::from(kernel + user));
        }
    }
}
