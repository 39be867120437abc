//! Which cgroups the kernel side keeps: those of chosen pods, or at and below a chosen path, and
//! never those of pods that opted out.
//!
//! The kernel gives a new cgroup the verdict of the one that it is in ([`crate::kernel`]), so that a
//! pod's containers are filtered from their first instruction on once the pod's own cgroup is; that
//! is made some time before anything runs in it. What came before, and what the kernel could not
//! tell, is found by walking. The path of a new cgroup is read as soon as the kernel tells of it,
//! so that its last events have a name when it is gone.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::{HashMap, HashSet};

use crate::{
    attribute::{
        cgroups::{self, Cgroups},
        path,
    },
    event::CgroupId,
    kernel::{Filter, MAX_CGROUPS, Verdict, Verdicts, ring::Change},
    pods::{Latest, Pods},
};

/// How long a removed cgroup keeps its verdict: two windows. A socket can outlive its cgroup.
const REMEMBER: Duration = Duration::from_secs(20);

/// How often the tree is walked where the kernel tells of changes: only for those it had no room
/// to tell of. A walk reads about one directory per 20 µs.
const WALK_INTERVAL: Duration = Duration::from_secs(30);

/// The same where the kernel tells nothing.
const BLIND_WALK_INTERVAL: Duration = Duration::from_millis(500);

/// How long after the kernel told of a new cgroup its directory is waited for. It is made by the
/// same system call.
const YOUNG: Duration = Duration::from_millis(500);

/// New cgroups waited for at most; others are found by walking.
const MAX_YOUNG: usize = 1024;

/// Cgroups known at most; those beyond are not followed.
const MAX_KNOWN: usize = 65_536;

/// What to keep.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// This cgroup and those below it.
    pub path: Option<PathBuf>,
    /// Only the pods that [`crate::pods::Pod::selected`] marks.
    pub selected_pods: bool,
    /// Of those, only containers of these names; all if empty.
    pub containers: Vec<String>,
    /// Only this thread group.
    pub pid: Option<u32>,
    /// No pod that is not known to take part, and not only none that is known not to.
    pub strict: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Follower {
    choice: Choice,
    latest: Option<Latest>,
    pods: Arc<Pods>,
    cgroups: Cgroups,
    /// The cgroups of pods, containers and what they made below.
    known: HashMap<CgroupId, Known>,
    /// Those that pods are made in, if [`Choice::strict`].
    above: HashSet<CgroupId>,
    /// Those at and below [`Choice::path`].
    chosen: Vec<CgroupId>,
    walked: Option<Instant>,
    /// Those that are being made, since when.
    young: Vec<(CgroupId, Instant)>,
    /// The kernel told of a change.
    told: bool,
    last: Verdicts,
}

/// What came of following.
#[derive(Debug, Default)]
pub struct Followed {
    /// Cgroups that were made, with their paths below the mount: they may be gone when their first
    /// events are looked at.
    pub made: Vec<(CgroupId, Arc<str>)>,
    /// The verdicts, if they changed.
    pub verdicts: Option<Verdicts>,
}

/// A cgroup in a pod.
#[derive(Debug)]
struct Known {
    uid: Box<str>,
    container: Box<str>,
    removed: Option<Instant>,
}

impl Follower {
    /// Walks the tree.
    ///
    /// # Errors
    /// When there is no cgroup at the chosen path.
    pub fn new(choice: Choice, latest: Option<Latest>) -> Result<Self, cgroups::Error> {
        let mut new = Self {
            choice,
            latest,
            pods: Arc::default(),
            cgroups: Cgroups::new(),
            known: HashMap::new(),
            above: HashSet::new(),
            chosen: Vec::new(),
            walked: None,
            young: Vec::new(),
            told: false,
            last: Verdicts::new(),
        };
        if let Some(path) = &new.choice.path {
            cgroups::descendants(path, MAX_CGROUPS)?;
        }
        new.follow(&[]);
        Ok(new)
    }

    /// The filter to start with.
    #[must_use]
    pub fn filter(&self) -> Filter {
        Filter {
            only_kept: self.choice.path.is_some() || self.choice.selected_pods,
            except: self.latest.is_some(),
            verdicts: self.last.clone(),
            pid: self.choice.pid,
        }
    }

    /// Takes in what changed.
    pub fn follow(&mut self, changes: &[(CgroupId, Change)]) -> Followed {
        let now = Instant::now();
        self.told |= !changes.is_empty();
        for (id, change) in changes {
            match change {
                Change::Made => self.young.push((*id, now)),
                Change::Removed => {
                    self.young.retain(|(young, _)| young != id);
                    self.above.remove(id);
                    if let Some(known) = self.known.get_mut(id) {
                        known.removed.get_or_insert(now);
                    }
                }
            }
        }
        let made = self.made(now);
        let pause = if self.told { WALK_INTERVAL } else { BLIND_WALK_INTERVAL };
        if self.walked.is_none_or(|walked| now.duration_since(walked) >= pause) {
            self.walk(now);
            self.walked = Some(now);
        }
        self.known.retain(|_, known| {
            known.removed.is_none_or(|removed| now.duration_since(removed) < REMEMBER)
        });
        if let Some(latest) = &mut self.latest {
            self.pods = Arc::clone(&latest.borrow_and_update());
        }
        let verdicts = self.verdicts();
        if verdicts == self.last {
            return Followed { made, verdicts: None };
        }
        self.last.clone_from(&verdicts);
        Followed { made, verdicts: Some(verdicts) }
    }

    /// Whether to look again soon.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.young.is_empty()
    }

    /// Looks at the cgroups that are being made; those that are there now, with their paths.
    fn made(&mut self, now: Instant) -> Vec<(CgroupId, Arc<str>)> {
        let mut made = Vec::new();
        let mut young = std::mem::take(&mut self.young);
        young.retain(|(id, since)| {
            let path = self.learn(*id);
            let waits = path.is_none() && now.duration_since(*since) < YOUNG;
            made.extend(path.map(|path| (*id, path)));
            waits
        });
        young.truncate(MAX_YOUNG);
        self.young = young;
        made
    }

    /// Learns what a cgroup is; its path. `None` if it is not there yet, or not any more.
    fn learn(&mut self, id: CgroupId) -> Option<Arc<str>> {
        let path = self.cgroups.learn(id)?;
        if self.known.len() < MAX_KNOWN && !self.known.contains_key(&id) {
            let name = path::parse(&path);
            if let Some(uid) = name.pod_uid {
                let container = name.container_id.unwrap_or_default().into();
                self.known.insert(id, Known { uid: uid.into(), container, removed: None });
            } else if self.choice.strict && path::holds_pods(&path) {
                self.above.insert(id);
            }
        }
        // One below the chosen path has its verdict from the kernel; it is listed at the next walk.
        Some(path)
    }

    fn walk(&mut self, now: Instant) {
        if let Some(path) = &self.choice.path {
            // When the chosen one is gone, its last events may still come.
            if let Ok(chosen) = cgroups::descendants(path, MAX_CGROUPS) {
                self.chosen = chosen;
            }
        }
        if self.latest.is_none() {
            return;
        }
        let Some(mount) = self.cgroups.mount().map(|mount| mount.point.clone()) else { return };
        let all = match cgroups::descendants(&mount, MAX_KNOWN) {
            Ok(all) => all,
            Err(_) => return,
        };
        let there: HashSet<CgroupId> = all.iter().copied().collect();
        for (id, known) in &mut self.known {
            if !there.contains(id) {
                known.removed.get_or_insert(now);
            }
        }
        self.above.retain(|id| there.contains(id));
        for id in all {
            self.learn(id);
        }
    }

    fn verdicts(&self) -> Verdicts {
        let of = |known: &Known| {
            let pod = self.pods.by_uid(&known.uid);
            if pod.map_or(self.choice.strict, |pod| !self.pods.is_profiled(pod)) {
                return Some(Verdict::Except);
            }
            if !self.choice.selected_pods {
                // What it is in may be excepted. Below a chosen path, its own place there says it.
                let keep = self.choice.strict && self.choice.path.is_none();
                return keep.then_some(Verdict::Keep);
            }
            let pod = pod.filter(|pod| pod.selected)?;
            let names = &self.choice.containers;
            let container = || pod.container(&known.container);
            let fits = names.is_empty()
                || container().is_some_and(|c| names.iter().any(|name| **name == *c.name));
            fits.then_some(Verdict::Keep)
        };
        let mut all: HashMap<CgroupId, Verdict> =
            self.chosen.iter().map(|id| (*id, Verdict::Keep)).collect();
        all.extend(self.above.iter().map(|id| (*id, Verdict::Except)));
        all.extend(self.known.iter().filter_map(|(id, known)| Some((*id, of(known)?))));
        let mut all: Verdicts = all.into_iter().collect();
        // What is never to be stored comes first, if there is not room for all.
        all.sort_unstable_by_key(|(id, verdict)| (*verdict == Verdict::Keep, *id));
        all.truncate(MAX_CGROUPS);
        all
    }
}
