//! What a cgroup's path says: pod, container, systemd unit. Pure text, no I/O.
//!
//! Not for looking anything up: names of pods come from the API server, and paths from
//! [`super::cgroups`].
//!
//! The components of a path are read from the outside inwards, and the outermost pod wins: what a
//! container makes below its own cgroup, other pods' names included, cannot change whose it is.
//! Reading stops at a name that no runtime or init system makes (control characters, `..`, too
//! long), so nothing behind it is believed.
//!
//! The forms are those of
//! - kubelet (`pkg/kubelet/cm/cgroup_manager_linux.go`), cgroupfs driver:
//!   `/kubepods[/burstable|/besteffort]/pod<UID>`; systemd driver: `kubepods[-QOS]-pod<UID>.slice`
//!   with `_` for `-` in the UID. Both may be below a `cgroupRoot`, which the systemd driver puts in
//!   front of `kubepods`, as kind does with `kubelet-kubepods.slice`.
//! - runtimes below that, or anywhere: `<CID>`, `cri-containerd-<CID>.scope`, `crio-<CID>[.scope]`,
//!   `docker-<CID>.scope`, `libpod-<CID>[.scope]`, `nerdctl-<CID>.scope`, and
//!   `<slice>:<runtime>:<CID>` where runc was given a systemd path without its systemd driver.
//! - systemd (systemd.slice(5), systemd.scope(5), and user managers, user@.service(5)).

use std::borrow::Cow;

/// Longest name of one cgroup: `NAME_MAX` in `include/uapi/linux/limits.h`.
const MAX_NAME: usize = 255;

/// Length of a container ID: a SHA-256 in hexadecimal.
const CONTAINER_ID_LEN: usize = 64;

/// What runtimes put in front of a container's ID. Processes that only look after a container
/// (`crio-conmon-`, `libpod-conmon-`) are none of it.
const RUNTIME_PREFIXES: &[&str] =
    &["cri-containerd-", "crio-", "docker-", "libpod-payload-", "libpod-", "nerdctl-"];

/// What a path says. All text is part of the path, save that [`Self::pod_uid`] has `-` where a
/// systemd slice has `_`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupName<'a> {
    /// UID of the outermost pod: a UUID, or 32 hexadecimal digits for a static pod.
    pub pod_uid: Option<Cow<'a, str>>,
    /// The outermost container, below the pod if there is one: 64 hexadecimal digits.
    pub container_id: Option<&'a str>,
    /// The outermost service or scope, `None` in a pod. Of a user's manager the unit inside it.
    pub unit: Option<&'a str>,
    /// The manager (`user@UID.service`) that [`Self::unit`] belongs to; `None` for system units.
    pub user_manager: Option<&'a str>,
}

impl CgroupName<'_> {
    /// Whether the path says anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pod_uid.is_none() && self.container_id.is_none() && self.unit.is_none()
    }
}

/// Reads a path as it is below the mount of its hierarchy, or in a line of `/proc/PID/cgroup`
/// (where a cgroup namespace shows what is outside of it behind leading `..`, cgroup_namespaces(7)).
#[must_use]
pub fn parse(path: &str) -> CgroupName<'_> {
    let mut found = CgroupName::default();
    let mut above = Above::Other;
    let names = path.split('/').skip_while(|name| name.is_empty() || *name == "..");
    for name in names.take_while(|name| is_clean(name)) {
        // Anyone can make any name below their own manager: a pod in there is not believed.
        let pod = if found.user_manager.is_none() { pod_uid(name, above) } else { None };
        if pod.is_some() && found.pod_uid.is_none() {
            found = CgroupName { pod_uid: pod, ..CgroupName::default() };
        }
        if found.container_id.is_none() {
            found.container_id = container_id(name);
            if found.container_id.is_none() && found.pod_uid.is_none() {
                note_unit(&mut found, name);
            }
        }
        if found.pod_uid.is_some() && found.container_id.is_some() {
            break;
        }
        above = above.below(name);
    }
    found
}

/// Whether pods are made in a cgroup of that path: `kubepods`, or one of its classes of quality.
#[must_use]
pub fn holds_pods(path: &str) -> bool {
    let holds =
        |name: &str| is_kubepods(without_class(name.strip_suffix(".slice").unwrap_or(name)));
    parse(path).pod_uid.is_none() && path.split('/').any(holds)
}

/// Keeps the outermost unit, but goes one level into a user's manager.
fn note_unit<'a>(found: &mut CgroupName<'a>, name: &'a str) {
    if !name.ends_with(".service") && !name.ends_with(".scope") {
        return;
    }
    match (found.unit, found.user_manager) {
        (None, _) => {
            found.unit = Some(name);
            if name.starts_with("user@") {
                found.user_manager = Some(name);
            }
        }
        (Some(unit), Some(manager)) if unit == manager => found.unit = Some(name),
        _ => {}
    }
}

/// Where a name is, as far as the cgroupfs driver's form of a pod needs to know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Above {
    /// Right below `kubepods`.
    Kubepods,
    /// Right below a quality-of-service class of `kubepods`.
    Class,
    /// Elsewhere.
    Other,
}

impl Above {
    /// Where the names below `name` are.
    fn below(self, name: &str) -> Self {
        match name {
            "kubepods" => Self::Kubepods,
            "burstable" | "besteffort" if self == Self::Kubepods => Self::Class,
            _ => Self::Other,
        }
    }
}

/// Whether a runtime or an init system can have made that name.
fn is_clean(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.chars().any(char::is_control)
}

/// The UID in the name of a pod's cgroup.
fn pod_uid(name: &str, above: Above) -> Option<Cow<'_, str>> {
    if above != Above::Other {
        let uid = name.strip_prefix("pod")?;
        return is_uid(uid, b'-').then_some(Cow::Borrowed(uid));
    }
    // The runtime's part, where runc was given `<slice>:<runtime>:<CID>` and took it for a name.
    let slice = name.split_once(':').map_or(name, |(slice, _)| slice).strip_suffix(".slice")?;
    let (class, uid) = slice.rsplit_once("-pod")?;
    if !is_kubepods(without_class(class)) || !is_uid(uid, b'_') {
        return None;
    }
    Some(if uid.contains('_') { Cow::Owned(uid.replace('_', "-")) } else { Cow::Borrowed(uid) })
}

/// A name of the systemd driver without the class of quality at its end.
fn without_class(name: &str) -> &str {
    ["-burstable", "-besteffort"].iter().find_map(|c| name.strip_suffix(c)).unwrap_or(name)
}

/// Whether that is the root of all pods, with a `cgroupRoot` in front of it or not.
fn is_kubepods(name: &str) -> bool {
    name == "kubepods" || name.ends_with("-kubepods")
}

/// Whether that is a UUID with this separator, or the 32 digits of a static pod, in lower case.
fn is_uid(text: &str, separator: u8) -> bool {
    match text.len() {
        32 => text.bytes().all(is_hex),
        36 => text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == separator,
            _ => is_hex(byte),
        }),
        _ => false,
    }
}

/// The ID in the name of a container's cgroup.
fn container_id(name: &str) -> Option<&str> {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let id = match name.rsplit_once(':') {
        Some((_, id)) => id,
        None => RUNTIME_PREFIXES.iter().find_map(|p| name.strip_prefix(p)).unwrap_or(name),
    };
    (id.len() == CONTAINER_ID_LEN && id.bytes().all(is_hex)).then_some(id)
}

fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
#[path = "path_tests.rs"]
mod tests;
