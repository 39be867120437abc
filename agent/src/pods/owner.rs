//! What a person deployed, from what a pod says of itself: no further permission, no look-up.
//!
//! A pod names the object that made it, which mostly was made by another: a Deployment makes a
//! ReplicaSet for each version of itself, and a CronJob a Job for each time.
//!
//! - The Deployment controller appends the hash that it also puts into the label
//!   `pod-template-hash` (`pkg/controller/deployment/sync.go`). Where name and label agree, the rest
//!   of the name is the Deployment's.
//! - The CronJob controller appends the scheduled time in minutes since 1970
//!   (`pkg/controller/cronjob/utils.go`; in seconds before Kubernetes 1.21). A person could name a
//!   Job so too: it is believed only where that time is shortly before the pod was made.

use crate::profile::Owner;

/// How long after its scheduled time a CronJob's pod is still taken for its: the controller starts
/// late ones (`startingDeadlineSeconds`), and Jobs make new pods for those that failed.
const MAX_LATE: i64 = 24 * 3600;

/// How much the clocks of controller and API server may differ, in seconds.
const MAX_SKEW: i64 = 120;

/// The outermost owner. `controller` is the pod's own owner, `template_hash` its label,
/// `created_unix` when it was made.
pub(super) fn outermost(
    controller: Owner,
    template_hash: Option<&str>,
    created_unix: Option<i64>,
) -> Owner {
    let of = |kind: &str, name: &str| Owner { kind: kind.to_owned(), name: name.to_owned() };
    match controller.kind.as_str() {
        "ReplicaSet" => {
            let deployment = template_hash
                .filter(|hash| !hash.is_empty())
                .and_then(|hash| controller.name.strip_suffix(hash)?.strip_suffix('-'))
                .filter(|name| !name.is_empty());
            deployment.map(|name| of("Deployment", name)).unwrap_or(controller)
        }
        "Job" => {
            let cron = controller.name.rsplit_once('-').filter(|(name, time)| {
                !name.is_empty() && created_unix.is_some_and(|created| is_schedule(time, created))
            });
            cron.map(|(name, _)| of("CronJob", name)).unwrap_or(controller)
        }
        _ => controller,
    }
}

/// Whether that is the time for which a pod of that age was scheduled.
fn is_schedule(digits: &str, created: i64) -> bool {
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return false;
    }
    let scheduled = match (digits.len(), digits.parse::<i64>()) {
        (8, Ok(minutes)) => minutes * 60,
        (10, Ok(seconds)) => seconds,
        _ => return false,
    };
    (scheduled - MAX_SKEW..=scheduled + MAX_LATE).contains(&created)
}

/// The owner of a static pod: the name in its file, to which kubelet appends the node's.
pub(super) fn of_static(pod: &str, node: &str) -> Owner {
    let name = pod.strip_suffix(node).and_then(|name| name.strip_suffix('-'));
    Owner { kind: "StaticPod".to_owned(), name: name.unwrap_or(pod).to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(owner: &str, hash: Option<&str>, created: Option<i64>, expected: &str) {
        let (kind, name) = owner.split_once('/').unwrap_or_default();
        let owner = Owner { kind: kind.to_owned(), name: name.to_owned() };
        let found = outermost(owner, hash, created);
        assert_eq!(format!("{}/{}", found.kind, found.name), expected);
    }

    #[test]
    fn a_replica_set_is_its_deployment_where_hash_and_name_agree() {
        check("ReplicaSet/web-7d4b9c6f5d", Some("7d4b9c6f5d"), None, "Deployment/web");
        check("ReplicaSet/a-b-7d4b9c6f5d", Some("7d4b9c6f5d"), None, "Deployment/a-b");
        // By hand, by another controller, or with a label that a person changed.
        for hash in [None, Some(""), Some("other"), Some("web-7d4b9c6f5d"), Some("6f5d")] {
            check("ReplicaSet/web-7d4b9c6f5d", hash, None, "ReplicaSet/web-7d4b9c6f5d");
        }
        check("ReplicaSet/-7d", Some("7d"), None, "ReplicaSet/-7d");
    }

    #[test]
    fn a_job_is_its_cron_job_where_its_name_is_the_time_it_was_made() {
        let minutes: i64 = 28_123_456;
        let at = |late| Some(minutes * 60 + late);
        check("Job/backup-28123456", None, at(3), "CronJob/backup");
        check("Job/my-backup-28123456", None, at(3600), "CronJob/my-backup");
        check("Job/backup-1687407360", None, at(0), "CronJob/backup");
        check("Job/backup-28123456", None, at(-3600), "Job/backup-28123456");
        check("Job/backup-28123456", None, at(10 * 24 * 3600), "Job/backup-28123456");
        check("Job/backup-28123456", None, None, "Job/backup-28123456");
        check("Job/backup-20240101", None, at(0), "Job/backup-20240101");
        for name in ["backup", "-28123456", "backup-", "backup-+8123456", "backup-2812345x"] {
            check(&format!("Job/{name}"), None, at(0), &format!("Job/{name}"));
        }
    }

    #[test]
    fn others_are_their_own() {
        for owner in ["DaemonSet/a", "StatefulSet/b", "Rollout/c-7d", "/"] {
            check(owner, Some("7d"), Some(0), owner);
        }
        assert_eq!(of_static("etcd-node-1", "node-1").name, "etcd");
        assert_eq!(of_static("etcd", "node-1").name, "etcd");
    }
}
