//! Deliveries as messages of a bounded size, made as the connection takes them.

use std::{sync::Arc, vec};

use podflame_proto::v1;

use super::{
    from_frame_kind, from_workload, to_accounts, to_address, to_cause, to_delivery, to_frame_kind,
    to_loss, to_signal, to_stack_end, to_time, to_workload,
};
use crate::{
    clock::Clock,
    profile::{
        Additions, Frame, FrameId, FrameKind, Function, FunctionId, Mapping, MappingId, Occurrence,
        Sample, Signal, StringId, What, WorkloadId,
    },
    serve::{
        Config,
        hub::{Delivery, End, Loss},
    },
};

/// A message of dictionary entries is sent once it has about so many bytes, well below the 4 MiB
/// that gRPC clients accept by default.
const DICTIONARY_BYTES: usize = 1 << 20;

/// Most samples in a message. Each has at most 60 bytes.
const SAMPLES: usize = 16_384;

/// Most events in a message. Each has at most 250 bytes.
const EVENTS: usize = 4096;

/// A message of one kind of stream.
pub trait Message: Sized + Send + 'static {
    /// The first one.
    fn header(header: v1::StreamHeader) -> Self;
    /// Entries of the dictionary.
    fn dictionary(dictionary: v1::Dictionary) -> Self;
    /// What a client selects of one batch, in one or more messages.
    fn batch(clock: Clock, delivery: &Delivery) -> vec::IntoIter<Self>;
    /// The last one.
    fn end(end: v1::StreamEnd) -> Self;
}

impl Message for v1::StreamProfilesResponse {
    fn header(header: v1::StreamHeader) -> Self {
        Self { message: Some(v1::stream_profiles_response::Message::Header(header)) }
    }

    fn dictionary(dictionary: v1::Dictionary) -> Self {
        Self { message: Some(v1::stream_profiles_response::Message::Dictionary(dictionary)) }
    }

    fn batch(clock: Clock, delivery: &Delivery) -> vec::IntoIter<Self> {
        let samples: Vec<v1::Sample> = delivery.samples().map(to_sample).collect();
        let batch = &delivery.batch;
        let parts = split(samples, SAMPLES).into_iter().map(|part| v1::ProfileBatch {
            sequence: batch.sequence,
            generation: batch.generation,
            start_time: to_time(clock, batch.start),
            end_time: to_time(clock, batch.end),
            start_monotonic_ns: batch.start.0,
            end_monotonic_ns: batch.end.0,
            losses: part.first(&delivery.losses),
            batches_lost: if part.first { delivery.batches_lost } else { 0 },
            continues: part.continues,
            samples: part.items,
        });
        let messages: Vec<Self> = parts
            .map(|b| Self { message: Some(v1::stream_profiles_response::Message::Batch(b)) })
            .collect();
        messages.into_iter()
    }

    fn end(end: v1::StreamEnd) -> Self {
        Self { message: Some(v1::stream_profiles_response::Message::End(end)) }
    }
}

impl Message for v1::StreamEventsResponse {
    fn header(header: v1::StreamHeader) -> Self {
        Self { message: Some(v1::stream_events_response::Message::Header(header)) }
    }

    fn dictionary(dictionary: v1::Dictionary) -> Self {
        Self { message: Some(v1::stream_events_response::Message::Dictionary(dictionary)) }
    }

    fn batch(clock: Clock, delivery: &Delivery) -> vec::IntoIter<Self> {
        let events: Vec<v1::Event> = delivery.occurrences().map(|o| to_event(clock, o)).collect();
        let batch = &delivery.batch;
        let parts = split(events, EVENTS).into_iter().map(|part| v1::EventBatch {
            sequence: batch.sequence,
            generation: batch.generation,
            start_time: to_time(clock, batch.start),
            end_time: to_time(clock, batch.end),
            start_monotonic_ns: batch.start.0,
            end_monotonic_ns: batch.end.0,
            losses: part.first(&delivery.losses),
            batches_lost: if part.first { delivery.batches_lost } else { 0 },
            continues: part.continues,
            events: part.items,
        });
        let messages: Vec<Self> = parts
            .map(|b| Self { message: Some(v1::stream_events_response::Message::Batch(b)) })
            .collect();
        messages.into_iter()
    }

    fn end(end: v1::StreamEnd) -> Self {
        Self { message: Some(v1::stream_events_response::Message::End(end)) }
    }
}

/// Some of the items of a batch.
struct Part<T> {
    items: Vec<T>,
    first: bool,
    continues: bool,
}

impl<T> Part<T> {
    /// What was lost, in the first part only.
    fn first(&self, losses: &[Loss]) -> Vec<v1::Loss> {
        if self.first { losses.iter().map(to_loss).collect() } else { Vec::new() }
    }
}

/// Parts of at most `most` items; one empty part if there is nothing.
fn split<T>(mut items: Vec<T>, most: usize) -> Vec<Part<T>> {
    let mut parts = Vec::new();
    loop {
        let rest = items.split_off(most.min(items.len()));
        let continues = !rest.is_empty();
        parts.push(Part { items, first: parts.is_empty(), continues });
        if !continues {
            return parts;
        }
        items = rest;
    }
}

/// The first message of a stream.
#[must_use]
pub fn header<M: Message>(config: &Config) -> M {
    M::header(v1::StreamHeader {
        agent_epoch: config.epoch,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        node: config.node.clone(),
    })
}

/// The last message of a stream.
#[must_use]
pub fn end<M: Message>(end: &End) -> M {
    M::end(v1::StreamEnd {
        reason: "shutdown".into(),
        deliveries: Signal::ALL
            .into_iter()
            .zip(end.counts)
            .map(|(s, c)| to_delivery(s, c))
            .collect(),
        probes: to_accounts(&end.account),
    })
}

/// The messages of one delivery: first what is new in the dictionary, then the batch.
pub fn messages<M: Message>(clock: Clock, delivery: &Delivery) -> impl Iterator<Item = M> + use<M> {
    let dictionary = Entries {
        generation: delivery.batch.generation,
        additions: delivery.additions.clone().into_iter(),
        now: Arc::default(),
        next: [0; 7],
    };
    dictionary.map(M::dictionary).chain(M::batch(clock, delivery))
}

/// Dictionary entries, as messages.
struct Entries {
    generation: u64,
    additions: vec::IntoIter<Arc<Additions>>,
    now: Arc<Additions>,
    /// The next entry of each table of `now`, in the order of the message's fields.
    next: [usize; 7],
}

impl Iterator for Entries {
    type Item = v1::Dictionary;

    fn next(&mut self) -> Option<v1::Dictionary> {
        let mut to = v1::Dictionary { generation: self.generation, ..v1::Dictionary::default() };
        let mut room = DICTIONARY_BYTES;
        loop {
            let from = Arc::clone(&self.now);
            let [strings, mappings, functions, frames, stacks, workloads, renamed] = &mut self.next;
            take(&from.strings, strings, &mut room, &mut to.strings, |s| (s.to_string(), s.len()));
            take(&from.mappings, mappings, &mut room, &mut to.mappings, to_mapping);
            take(&from.functions, functions, &mut room, &mut to.functions, to_function);
            take(&from.frames, frames, &mut room, &mut to.frames, to_frame);
            take(&from.stacks, stacks, &mut room, &mut to.stacks, |s| to_stack(s));
            take(&from.workloads, workloads, &mut room, &mut to.workloads, |w| {
                (to_workload(w), workload_bytes(w))
            });
            take(&from.renamed, renamed, &mut room, &mut to.workload_updates, |(id, w)| {
                let workload = Some(to_workload(w));
                (v1::WorkloadUpdate { workload_id: id.0, workload }, workload_bytes(w) + 8)
            });
            if room == 0 {
                return Some(to);
            }
            match self.additions.next() {
                Some(next) => (self.now, self.next) = (next, [0; 7]),
                None if room == DICTIONARY_BYTES => return None,
                None => return Some(to),
            }
        }
    }
}

/// Converts entries from the `next` one on until they filled the room. Each is charged the bytes the
/// conversion tells and a few for its frame.
fn take<T, U>(
    from: &[T],
    next: &mut usize,
    room: &mut usize,
    to: &mut Vec<U>,
    convert: impl Fn(&T) -> (U, usize),
) {
    while let (Some(entry), true) = (from.get(*next), *room > 0) {
        let (entry, bytes) = convert(entry);
        to.push(entry);
        *room = room.saturating_sub(bytes + 8);
        *next += 1;
    }
}

fn to_mapping(m: &Mapping) -> (v1::Mapping, usize) {
    (v1::Mapping { path_id: m.path.0, build_id_id: m.build_id.0 }, 12)
}

fn to_function(f: &Function) -> (v1::Function, usize) {
    (v1::Function { name_id: f.name.0, file_id: f.file.0, mapping_id: f.mapping.0 }, 18)
}

fn to_frame(f: &Frame) -> (v1::Frame, usize) {
    let frame = v1::Frame {
        function_id: f.function.0,
        line: f.line,
        file_offset: f.offset,
        kind: to_frame_kind(f.kind),
        inlined: f.inlined,
        by_frame_pointer: f.by_frame_pointer,
    };
    (frame, 27)
}

fn to_stack(frames: &[FrameId]) -> (v1::Stack, usize) {
    (v1::Stack { frame_ids: frames.iter().map(|f| f.0).collect() }, 5 * frames.len())
}

fn workload_bytes(w: &crate::profile::Workload) -> usize {
    // Each field and each label has a frame of a few bytes.
    w.text_bytes() + 8 * (20 + w.labels.len())
}

fn to_sample(s: &Sample) -> v1::Sample {
    v1::Sample {
        signal: to_signal(s.signal),
        workload_id: s.workload.0,
        pid: s.pid,
        comm_id: s.comm.0,
        stack_id: s.stack.0,
        count: s.count,
        weight: s.weight,
    }
}

fn to_event(clock: Clock, o: &Occurrence) -> v1::Event {
    let detail = match &o.what {
        What::Retransmit {
            local,
            remote,
            cause,
            state,
            srtt_us,
            cwnd,
            netns,
            segments,
            sender_age_ns,
        } => v1::event::Detail::Retransmit(v1::Retransmit {
            local: Some(to_address(local)),
            remote: Some(to_address(remote)),
            cause: to_cause(*cause),
            tcp_state: (*state).into(),
            srtt_us: *srtt_us,
            cwnd_segments: *cwnd,
            netns_inode: *netns,
            segments: *segments,
            sender_age_ns: *sender_age_ns,
        }),
        What::MajorFault { address, mapping, offset } => {
            v1::event::Detail::MajorFault(v1::MajorFault {
                address: *address,
                mapping_id: mapping.0,
                offset: *offset,
            })
        }
    };
    v1::Event {
        time: to_time(clock, o.time),
        monotonic_ns: o.time.0,
        workload_id: o.workload.0,
        pid: o.pid,
        tid: o.tid,
        comm_id: o.comm.0,
        stack_id: o.stack.0,
        stack_end: to_stack_end(o.stack_end),
        detail: Some(detail),
    }
}

/// The entries of a message, for a client's replica of the dictionary.
#[must_use]
pub fn from_dictionary(d: v1::Dictionary) -> Additions {
    let frame = |f: v1::Frame| Frame {
        function: FunctionId(f.function_id),
        line: f.line,
        offset: f.file_offset,
        kind: from_frame_kind(f.kind).unwrap_or(FrameKind::Annotation),
        inlined: f.inlined,
        by_frame_pointer: f.by_frame_pointer,
    };
    let function = |f: v1::Function| Function {
        name: StringId(f.name_id),
        file: StringId(f.file_id),
        mapping: MappingId(f.mapping_id),
    };
    let mapping =
        |m: v1::Mapping| Mapping { path: StringId(m.path_id), build_id: StringId(m.build_id_id) };
    Additions {
        strings: d.strings.into_iter().map(Arc::from).collect(),
        mappings: d.mappings.into_iter().map(mapping).collect(),
        functions: d.functions.into_iter().map(function).collect(),
        frames: d.frames.into_iter().map(frame).collect(),
        stacks: d
            .stacks
            .into_iter()
            .map(|s| s.frame_ids.into_iter().map(FrameId).collect())
            .collect(),
        workloads: d.workloads.into_iter().map(|w| Arc::new(from_workload(w))).collect(),
        renamed: d
            .workload_updates
            .into_iter()
            .map(|u| {
                let workload = from_workload(u.workload.unwrap_or_default());
                (WorkloadId(u.workload_id), Arc::new(workload))
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::fixture::Source;

    fn entries(additions: Vec<Arc<Additions>>) -> Vec<v1::Dictionary> {
        let additions = additions.into_iter();
        Entries { generation: 1, additions, now: Arc::default(), next: [0; 7] }.collect()
    }

    #[test]
    fn entries_survive_in_order_and_messages_are_bounded() {
        let mut source = Source::new();
        let mut log = Vec::new();
        for i in 0..3000 {
            let long = "x".repeat(i % 3000);
            source.sample(Signal::Cpu, &format!("pod{i}"), &format!("{long}{i} main"), 1);
            log.push(Arc::clone(&source.flush(vec![], vec![]).additions));
        }
        let messages = entries(log.clone());
        let largest = messages.iter().map(v1::Dictionary::encoded_len).max();
        assert!(largest < Some(2 << 20), "{largest:?}");
        assert!(messages.len() < 10, "{}", messages.len());

        let (mut sent, mut got) = (Additions::default(), crate::profile::Dictionary::default());
        for additions in &log {
            sent.strings.extend_from_slice(&additions.strings);
            sent.stacks.extend_from_slice(&additions.stacks);
            sent.workloads.extend_from_slice(&additions.workloads);
            sent.frames.extend_from_slice(&additions.frames);
            sent.functions.extend_from_slice(&additions.functions);
            sent.mappings.extend_from_slice(&additions.mappings);
        }
        messages.into_iter().for_each(|m| got.apply(m.generation, &from_dictionary(m)));
        assert_eq!(got.all, sent);
    }

    #[test]
    fn nothing_new_is_no_message() {
        assert!(entries(vec![]).is_empty());
        assert!(entries(vec![Arc::default()]).is_empty());
    }

    #[test]
    fn a_large_batch_is_split() {
        let lens = |n, most| -> Vec<(usize, bool, bool)> {
            split(vec![0; n], most).iter().map(|p| (p.items.len(), p.first, p.continues)).collect()
        };
        assert_eq!(lens(0, 4), [(0, true, false)]);
        assert_eq!(lens(4, 4), [(4, true, false)]);
        assert_eq!(lens(9, 4), [(4, true, true), (4, false, true), (1, false, false)]);
    }

    #[test]
    fn the_largest_items_stay_below_the_bounds() {
        let sample = v1::Sample {
            signal: 3,
            workload_id: u32::MAX,
            pid: u32::MAX,
            comm_id: u32::MAX,
            stack_id: u32::MAX,
            count: u64::MAX,
            weight: u64::MAX,
        };
        assert!(sample.encoded_len() <= 60);
        let mut source = Source::new();
        let event = to_event(Clock::now(), &source.retransmit("cart", "send"));
        assert!(event.encoded_len() <= 250, "{}", event.encoded_len());
    }
}
