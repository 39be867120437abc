//! The one owner of what is served: the store, the dictionary and the clients.
//!
//! A batch goes to every client that has room for it. A client that has none loses that batch and
//! nothing else: what it lost is in its next batch, with the dictionary entries it missed. Per client
//! and signal, `aggregated = delivered + lost + queued` at any time (E4).
//!
//! Not for protobuf: clients get [`Delivery`]s, and encode them at their own pace.

use std::{collections::VecDeque, sync::Arc};

use tokio::sync::{mpsc, oneshot};

use crate::{
    account::{Account, AgentDrop, kernel_drops},
    event::{KTime, Probe},
    profile::{Additions, Batch, Dictionary, Occurrence, Profile, Sample, Signal, What},
    select::{Selection, Selector},
    store::{Query, SIGNALS, Size, Store, Usages, signal_of},
};

/// Most streams served at once. Each may hold [`QUEUE_BATCHES`] batches.
pub const MAX_CLIENTS: usize = 64;

/// Most batches waiting for one client. At one flush a second, a client may stall that many seconds
/// before it loses data. Clients share the batches, so that many slow ones cost little more than one.
pub const QUEUE_BATCHES: usize = 16;

/// Most bytes of batches waiting for one client, but for a single larger batch.
pub const QUEUE_BYTES: usize = 8 << 20;

/// What a client streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Samples.
    Profiles,
    /// Occurrences.
    Events,
}

/// Where an event was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In the kernel.
    Kernel,
    /// In the agent.
    Agent,
    /// In the queue of the client.
    Client,
}

/// Events lost since the last delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Where.
    pub stage: Stage,
    /// Whose, unless a client lost them.
    pub probe: Option<Probe>,
    /// Of what signal, where it is one.
    pub signal: Option<Signal>,
    /// Why.
    pub reason: &'static str,
    /// How many.
    pub events: u64,
}

/// A client's counts of one signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Events that the client selects.
    pub aggregated: u64,
    /// Events that its stream took.
    pub delivered: u64,
    /// Events that it was too slow for.
    pub lost: u64,
}

impl Count {
    /// Events waiting for it.
    #[must_use]
    pub fn queued(self) -> u64 {
        self.aggregated - self.delivered - self.lost
    }
}

/// One batch for one client.
#[derive(Debug)]
pub struct Delivery {
    /// Entries of the batch's generation that the client does not have yet. They start at the first
    /// entry when the generation is new to the client.
    pub additions: Vec<Arc<Additions>>,
    /// The batch.
    pub batch: Arc<Batch>,
    /// What the client selects of it.
    selection: Selection,
    /// What was lost since the last delivery.
    pub losses: Vec<Loss>,
    /// Whole batches lost since the last delivery.
    pub batches_lost: u64,
}

impl Delivery {
    /// The samples selected.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.batch.samples.iter().filter(|s| self.selection.takes(s.signal, s.workload, s.pid))
    }

    /// The occurrences selected.
    pub fn occurrences(&self) -> impl Iterator<Item = &Occurrence> {
        let takes = |o: &&Occurrence| self.selection.takes(occurrence_signal(o), o.workload, o.pid);
        self.batch.occurrences.iter().filter(takes)
    }

    /// The events selected, by `Signal as usize`.
    fn count(&self, kind: Kind) -> [u64; SIGNALS] {
        let mut events = [0; SIGNALS];
        match kind {
            Kind::Profiles => self.samples().for_each(|s| events[s.signal as usize] += s.count),
            Kind::Events => {
                self.occurrences().for_each(|o| events[occurrence_signal(o) as usize] += 1);
            }
        }
        events
    }
}

/// What an occurrence is an event of.
fn occurrence_signal(occurrence: &Occurrence) -> Signal {
    match occurrence.what {
        What::Retransmit { .. } => Signal::Retransmit,
        What::MajorFault { .. } => Signal::PageFault,
    }
}

/// The end of a stream: its final counts, which hold once its queue is read to the end.
#[derive(Clone, Debug)]
pub struct End {
    /// By `Signal as usize`.
    pub counts: [Count; SIGNALS],
    /// The account as of the last batch.
    pub account: Account,
}

/// A client's side of its stream.
#[derive(Debug)]
pub struct Subscription {
    /// The batches. Dropping it ends the subscription.
    pub deliveries: mpsc::Receiver<Delivery>,
    /// How it ended; there once `deliveries` has ended.
    pub end: oneshot::Receiver<End>,
}

/// There are [`MAX_CLIENTS`] streams already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the agent serves {MAX_CLIENTS} streams already: end one, then try again")]
pub struct TooMany;

/// What the hub is asked, each with where the answer goes.
#[derive(Debug)]
pub enum Command {
    /// Start a stream.
    Subscribe(Kind, Arc<Selector>, oneshot::Sender<Result<Subscription, TooMany>>),
    /// Merge what is remembered.
    Profile(Box<Query>, oneshot::Sender<Option<Profile>>),
    /// List what each workload used.
    Usages(Box<Selector>, oneshot::Sender<Usages>),
    /// Tell the hub's state.
    State(oneshot::Sender<State>),
}

/// The state of the hub.
#[derive(Clone, Debug)]
pub struct State {
    /// Number of the last batch.
    pub sequence: u64,
    /// The account as of the last batch.
    pub account: Account,
    /// The current dictionary.
    pub dictionary: Arc<Dictionary>,
    /// The store.
    pub store: Size,
    /// The most memory it may take, in bytes.
    pub max_bytes: usize,
    /// The streams.
    pub clients: Vec<ClientState>,
}

/// The state of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientState {
    /// Its number.
    pub id: u64,
    /// What it streams.
    pub kind: Kind,
    /// When it began.
    pub started: KTime,
    /// The signals it selects, with their counts.
    pub counts: Vec<(Signal, Count)>,
    /// Batches waiting for it.
    pub batches_queued: usize,
    /// Batches it lost.
    pub batches_lost: u64,
}

/// A stream, as its owner sees it.
#[derive(Debug)]
struct Client {
    id: u64,
    kind: Kind,
    started: KTime,
    selection: Selection,
    deliveries: mpsc::Sender<Delivery>,
    end: oneshot::Sender<End>,
    /// How many entries of [`Hub::log`] it was sent.
    logged: usize,
    counts: [Count; SIGNALS],
    /// The size in bytes and the events of each batch that it had not taken when we last looked.
    queue: VecDeque<(usize, [u64; SIGNALS])>,
    /// The account as of its last delivery.
    told: Account,
    /// What it lost since its last delivery.
    untold: Untold,
    batches_lost: u64,
}

/// What a client lost since its last delivery.
#[derive(Clone, Copy, Debug, Default)]
struct Untold {
    events: [u64; SIGNALS],
    batches: u64,
    /// Occurrences that did not fit in a batch.
    occurrences: u64,
}

/// The hub.
#[derive(Debug)]
pub struct Hub {
    store: Store,
    max_bytes: usize,
    /// Every addition to the current generation. It is no larger than the dictionary, of which it
    /// shares the content, and a client starts anywhere in it.
    log: Vec<Arc<Additions>>,
    generation: u64,
    sequence: u64,
    account: Account,
    clients: Vec<Client>,
    next_client: u64,
}

/// An upper bound of the memory that a batch takes besides what it shares, in bytes.
fn size(batch: &Batch) -> usize {
    size_of::<Batch>() + size_of_val(&*batch.samples) + size_of_val(&*batch.occurrences)
}

impl Hub {
    /// A hub without clients, over a store of at most `max_bytes`.
    #[must_use]
    pub fn new(store: Store, max_bytes: usize) -> Self {
        Self {
            store,
            max_bytes,
            log: Vec::new(),
            generation: 0,
            sequence: 0,
            account: Account::default(),
            clients: Vec::new(),
            next_client: 1,
        }
    }

    /// Serves until the batches end, then ends every stream.
    pub async fn run(
        mut self,
        mut batches: mpsc::Receiver<Arc<Batch>>,
        mut commands: mpsc::Receiver<Command>,
    ) {
        loop {
            tokio::select! {
                batch = batches.recv() => match batch {
                    Some(batch) => self.apply(&batch),
                    None => break,
                },
                Some(command) = commands.recv() => self.answer(command),
            }
        }
        self.finish();
    }

    /// Remembers a batch and offers it to every client.
    pub fn apply(&mut self, batch: &Arc<Batch>) {
        self.store.apply(batch);
        if self.generation != batch.generation {
            self.generation = batch.generation;
            self.log.clear();
            for client in &mut self.clients {
                client.logged = 0;
                client.selection = Selection::new(Arc::clone(client.selection.selector()));
            }
        }
        if *batch.additions != Additions::default() {
            self.log.push(Arc::clone(&batch.additions));
        }
        self.sequence = batch.sequence;
        self.account = batch.account.clone();
        self.clients.retain_mut(|client| client.offer(batch, &self.log));
    }

    /// Answers a command. An asker that has gone is ignored.
    pub fn answer(&mut self, command: Command) {
        match command {
            Command::Subscribe(kind, selector, reply) => {
                let _ = reply.send(self.subscribe(kind, selector));
            }
            Command::Profile(query, reply) => {
                let _ = reply.send(self.store.profile(&query));
            }
            Command::Usages(selector, reply) => {
                let _ = reply.send(self.store.usages(&selector));
            }
            Command::State(reply) => {
                let _ = reply.send(self.state());
            }
        }
    }

    /// Starts a stream, which has everything from the next batch on.
    ///
    /// # Errors
    /// When there are too many.
    pub fn subscribe(
        &mut self,
        kind: Kind,
        selector: Arc<Selector>,
    ) -> Result<Subscription, TooMany> {
        self.clients.retain(|c| !c.deliveries.is_closed());
        if self.clients.len() >= MAX_CLIENTS {
            return Err(TooMany);
        }
        let (sender, deliveries) = mpsc::channel(QUEUE_BATCHES);
        let (end_sender, end) = oneshot::channel();
        let mut selection = Selection::new(selector);
        for additions in &self.log {
            selection.extend(&additions.workloads);
            selection.rename(&additions.renamed);
        }
        self.clients.push(Client {
            id: self.next_client,
            kind,
            started: crate::clock::monotonic(),
            selection,
            deliveries: sender,
            end: end_sender,
            logged: 0,
            counts: [Count::default(); SIGNALS],
            queue: VecDeque::new(),
            told: self.account.clone(),
            untold: Untold::default(),
            batches_lost: 0,
        });
        self.next_client += 1;
        Ok(Subscription { deliveries, end })
    }

    /// The state now.
    pub fn state(&mut self) -> State {
        self.clients.retain(|c| !c.deliveries.is_closed());
        State {
            sequence: self.sequence,
            account: self.account.clone(),
            dictionary: Arc::clone(self.store.dictionary()),
            store: self.store.size(),
            max_bytes: self.max_bytes,
            clients: self.clients.iter_mut().map(Client::state).collect(),
        }
    }

    /// Ends every stream, with its final counts behind what still waits for it.
    pub fn finish(self) {
        for client in self.clients {
            let mut counts = client.counts;
            for count in &mut counts {
                count.delivered = count.aggregated - count.lost;
            }
            let _ = client.end.send(End { counts, account: self.account.clone() });
        }
    }
}

impl Client {
    /// Offers it a batch. False if it has gone.
    fn offer(&mut self, batch: &Arc<Batch>, log: &[Arc<Additions>]) -> bool {
        self.settle();
        self.selection.extend(&batch.additions.workloads);
        self.selection.rename(&batch.additions.renamed);
        let mut delivery = Delivery {
            additions: Vec::new(),
            batch: Arc::clone(batch),
            selection: self.selection.clone(),
            losses: Vec::new(),
            batches_lost: self.untold.batches,
        };
        let events = delivery.count(self.kind);
        for (count, events) in self.counts.iter_mut().zip(events) {
            count.aggregated += events;
        }
        if self.kind == Kind::Events {
            self.untold.occurrences += batch.occurrences_lost;
        }
        let size = size(batch);
        let queued: usize = self.queue.iter().map(|(size, _)| size).sum();
        let room = queued == 0 || queued + size <= QUEUE_BYTES;
        match self.deliveries.try_reserve() {
            Ok(place) if room => {
                delivery.additions = log.get(self.logged..).unwrap_or_default().to_vec();
                delivery.losses = losses(&self.told, &batch.account, &self.untold);
                place.send(delivery);
                self.queue.push_back((size, events));
                self.logged = log.len();
                self.told = batch.account.clone();
                self.untold = Untold::default();
                true
            }
            Err(mpsc::error::TrySendError::Closed(())) => false,
            Ok(_) | Err(mpsc::error::TrySendError::Full(())) => {
                for (i, events) in events.into_iter().enumerate() {
                    self.counts[i].lost += events;
                    self.untold.events[i] += events;
                }
                self.untold.batches += 1;
                self.batches_lost += 1;
                true
            }
        }
    }

    /// Counts what its stream took since we last looked.
    fn settle(&mut self) {
        let waiting = self.deliveries.max_capacity() - self.deliveries.capacity();
        let taken = self.queue.len().saturating_sub(waiting);
        for (_, events) in self.queue.drain(..taken) {
            for (count, events) in self.counts.iter_mut().zip(events) {
                count.delivered += events;
            }
        }
    }

    fn state(&mut self) -> ClientState {
        self.settle();
        let selector = self.selection.selector();
        ClientState {
            id: self.id,
            kind: self.kind,
            started: self.started,
            counts: Signal::ALL
                .into_iter()
                .zip(self.counts)
                .filter(|(signal, _)| selector.takes_signal(*signal))
                .collect(),
            batches_queued: self.queue.len(),
            batches_lost: self.batches_lost,
        }
    }
}

/// What was lost between two accounts, and by the client itself.
fn losses(before: &Account, now: &Account, untold: &Untold) -> Vec<Loss> {
    let mut all = Vec::new();
    let mut add = |stage, probe, signal, reason, events| {
        if events > 0 {
            all.push(Loss { stage, probe, signal, reason, events });
        }
    };
    for ((probe, now), before) in now.iter().zip(&before.probes) {
        let signal = signal_of(probe);
        for (i, reason) in kernel_drops().iter().enumerate() {
            let events = now.dropped_in_kernel[i].saturating_sub(before.dropped_in_kernel[i]);
            add(Stage::Kernel, Some(probe), signal, reason.name(), events);
        }
        for (i, reason) in AgentDrop::ALL.iter().enumerate() {
            let events = now.dropped_in_agent[i].saturating_sub(before.dropped_in_agent[i]);
            add(Stage::Agent, Some(probe), signal, reason.name(), events);
        }
    }
    add(Stage::Agent, None, None, "flush_full", untold.occurrences);
    for (signal, events) in Signal::ALL.into_iter().zip(untold.events) {
        add(Stage::Client, None, Some(signal), "slow_client", events);
    }
    all
}

#[cfg(test)]
mod tests;
