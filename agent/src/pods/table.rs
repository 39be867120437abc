//! The table of pods: bounded, with the dead remembered for a while.
//!
//! Single owner; readers get an [`index`](Table::index) of shared entries.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::{HashMap, hash_map::Entry as Slot};

use super::{Container, Pod};

/// Pods kept. A node has some hundred at most; each takes about 1 KiB.
pub(super) const MAX_PODS: usize = 16_384;

/// Containers kept of a pod, those that ended included: the ones told last.
const MAX_CONTAINERS: usize = 64;

/// How long a pod that is gone is remembered: two windows, so that its last events, which may be
/// in a flush still, find its name.
pub(super) const REMEMBER: Duration = Duration::from_secs(20);

/// Pods by the UID in the paths of their cgroups.
pub(super) type ByUid = HashMap<Box<str>, Arc<Pod>>;

/// Pods by their addresses.
pub(super) type ByIp = HashMap<IpAddr, Arc<Pod>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Table {
    pods: HashMap<Box<str>, Entry>,
    /// Counts the lists.
    list: u64,
    refused: u64,
}

#[derive(Debug)]
struct Entry {
    pod: Arc<Pod>,
    /// The list or change that told of it last.
    list: u64,
    gone: Option<Instant>,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.pods.len()
    }

    /// Pods left out because the table was full.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// A whole list begins.
    pub(super) fn begin_list(&mut self) {
        self.list += 1;
    }

    /// The list is complete: what it did not tell of is gone. Whether there is any.
    pub(super) fn end_list(&mut self, now: Instant) -> bool {
        let mut any = false;
        for entry in self.pods.values_mut().filter(|entry| entry.list < self.list) {
            any |= entry.gone.is_none();
            entry.gone.get_or_insert(now);
        }
        any
    }

    /// A pod is there, or changed. Returns whether that says anything new.
    pub(super) fn apply(&mut self, mut pod: Pod, now: Instant) -> bool {
        if self.pods.len() >= MAX_PODS && !self.pods.contains_key(&pod.uid) {
            self.make_room(now);
        }
        let full = self.pods.len() >= MAX_PODS;
        let list = self.list;
        match self.pods.entry(pod.uid.clone()) {
            Slot::Occupied(mut known) => {
                let known = known.get_mut();
                keep_containers(&mut pod, &known.pod.containers);
                let changed = *known.pod != pod || known.gone.is_some();
                if changed {
                    known.pod = Arc::new(pod);
                }
                (known.list, known.gone) = (list, None);
                changed
            }
            Slot::Vacant(_) if full => {
                self.refused += 1;
                false
            }
            Slot::Vacant(slot) => {
                slot.insert(Entry { pod: Arc::new(pod), list, gone: None });
                true
            }
        }
    }

    /// A pod is gone.
    pub(super) fn delete(&mut self, uid: &str, now: Instant) -> bool {
        let Some(entry) = self.pods.get_mut(uid) else { return false };
        entry.gone.get_or_insert(now);
        true
    }

    /// Forgets those that are gone for long. Whether there were any.
    pub(super) fn prune(&mut self, now: Instant) -> bool {
        let before = self.pods.len();
        self.pods.retain(|_, entry| {
            entry.gone.is_none_or(|gone| now.saturating_duration_since(gone) < REMEMBER)
        });
        self.pods.len() < before
    }

    /// Forgets the dead before their time, all at once so that it costs little.
    fn make_room(&mut self, now: Instant) {
        if !self.prune(now) {
            self.pods.retain(|_, entry| entry.gone.is_none());
        }
    }

    /// What readers look up: pods by UID, and those that live by address.
    pub(super) fn index(&self) -> (ByUid, ByIp) {
        let by_uid = self.pods.iter().map(|(uid, e)| (uid.clone(), Arc::clone(&e.pod))).collect();
        let mut by_ip = ByIp::new();
        for entry in self.pods.values().filter(|entry| entry.gone.is_none()) {
            for ip in &entry.pod.ips {
                match by_ip.entry(*ip) {
                    Slot::Vacant(slot) => {
                        slot.insert(Arc::clone(&entry.pod));
                    }
                    // Two that live claim it: it names neither.
                    Slot::Occupied(slot) => {
                        slot.remove();
                    }
                }
            }
        }
        (by_uid, by_ip)
    }
}

/// Keeps the containers that the pod had before, as far as there is room: their last events may
/// come after what made them is told of no more.
fn keep_containers(pod: &mut Pod, before: &[Container]) {
    let gone: Vec<Container> =
        before.iter().filter(|old| pod.container(&old.id).is_none()).cloned().collect();
    if gone.is_empty() && pod.containers.len() <= MAX_CONTAINERS {
        return;
    }
    let mut all = std::mem::take(&mut pod.containers).into_vec();
    all.extend(gone);
    all.truncate(MAX_CONTAINERS);
    pod.containers = all.into();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, name: &str, container: &str, ip: &str) -> Pod {
        Pod {
            uid: uid.into(),
            name: name.into(),
            ips: ip.parse().into_iter().collect(),
            containers: Box::new([Container { id: container.into(), ..Container::default() }]),
            ..Pod::default()
        }
    }

    #[test]
    fn the_dead_are_remembered_for_a_while() {
        let (mut table, now) = (Table::default(), Instant::now());
        assert!(table.apply(pod("u1", "a", "c1", "10.0.0.1"), now));
        assert!(!table.apply(pod("u1", "a", "c1", "10.0.0.1"), now), "nothing new");
        assert!(table.delete("u1", now));
        let (by_uid, by_ip) = table.index();
        assert_eq!((by_uid.len(), by_ip.len()), (1, 0), "its address may be another's now");
        assert!(!table.prune(now + REMEMBER / 2));
        assert!(table.prune(now + REMEMBER));
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_list_tells_what_is_gone_and_a_change_during_it_stays() {
        let (mut table, now) = (Table::default(), Instant::now());
        table.apply(pod("u1", "a", "c1", ""), now);
        table.apply(pod("u2", "b", "c2", ""), now);
        table.begin_list();
        table.apply(pod("u2", "b", "c2", ""), now);
        table.end_list(now);
        assert!(table.prune(now + REMEMBER));
        let (by_uid, _) = table.index();
        assert!(by_uid.contains_key("u2") && by_uid.len() == 1);
    }

    #[test]
    fn containers_that_ended_stay_with_their_pod_within_bounds() {
        let (mut table, now) = (Table::default(), Instant::now());
        for n in 0..2 * MAX_CONTAINERS {
            table.apply(pod("u", "a", &format!("c{n}"), ""), now);
        }
        let (by_uid, _) = table.index();
        let containers = &by_uid["u"].containers;
        assert_eq!(containers.len(), MAX_CONTAINERS);
        assert_eq!(&*containers[0].id, format!("c{}", 2 * MAX_CONTAINERS - 1));
    }

    #[test]
    fn an_address_that_two_pods_claim_names_neither() {
        let (mut table, now) = (Table::default(), Instant::now());
        table.apply(pod("u1", "a", "c1", "10.0.0.1"), now);
        table.apply(pod("u2", "b", "c2", "10.0.0.1"), now);
        assert!(table.index().1.is_empty());
    }

    #[test]
    fn a_full_table_forgets_the_dead_first_and_then_refuses() {
        let (mut table, now) = (Table::default(), Instant::now());
        for n in 0..MAX_PODS {
            table.apply(pod(&format!("u{n}"), "a", "c", ""), now);
        }
        assert!(!table.apply(pod("more", "a", "c", ""), now));
        assert_eq!((table.len(), table.refused()), (MAX_PODS, 1));
        table.delete("u0", now);
        assert!(table.apply(pod("more", "a", "c", ""), now));
        assert_eq!((table.len(), table.refused()), (MAX_PODS, 1));
    }
}
