//! Names of containers outside Kubernetes, from the files that Docker and Podman keep of them: no
//! daemon is asked, and none needs to run.
//!
//! Looked up by the container's ID, once for each; a container that is renamed later keeps its first
//! name here. Engines of other users (rootless) keep their files elsewhere: their containers go by
//! their IDs. In a pod the directories of the host are not to be seen, and nothing is found.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::lru::Lru;
use crate::profile::{Source, Workload, WorkloadKind};

/// Containers whose names are remembered, those without one included. Each costs about 300 bytes.
const CAPACITY: usize = 1024;

/// Bytes read of one file at most. Docker's has some KiB for each container, Podman's some 100 bytes
/// for each of all its containers.
const MAX_FILE: u64 = 4 << 20;

/// Longest name kept, in bytes.
const MAX_NAME: usize = 256;

/// Where Docker keeps a directory for each container (`data-root` of dockerd(8), by default).
const DOCKER: &str = "/var/lib/docker/containers";

/// Where Podman's root keeps its containers (containers-storage.conf(5), by default): a file in a
/// directory by the storage driver.
const PODMAN: &str = "/var/lib/containers/storage";

/// The storage drivers of containers-storage.conf(5).
const DRIVERS: [&str; 4] = ["overlay", "vfs", "btrfs", "zfs"];

/// A container's name and image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    engine: &'static str,
    name: String,
    image: String,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Engines {
    docker: PathBuf,
    podman: PathBuf,
    known: Lru<Box<str>, Option<Named>>,
}

impl Default for Engines {
    fn default() -> Self {
        Self::at(DOCKER, PODMAN)
    }
}

impl Engines {
    fn at(docker: impl Into<PathBuf>, podman: impl Into<PathBuf>) -> Self {
        Self { docker: docker.into(), podman: podman.into(), known: Lru::new(CAPACITY) }
    }

    /// A container's workload with its name, if one is known; any other as it is.
    pub(super) fn name(&mut self, workload: Workload) -> Workload {
        let id = workload.container_id.as_str();
        // An ID becomes part of a path.
        let plain = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if workload.kind != WorkloadKind::Container || !plain {
            return workload;
        }
        let named = match self.known.get(&Box::from(id)) {
            Some(known) => known.clone(),
            None => {
                let named = self.docker(id).or_else(|| self.podman(id));
                self.known.insert(id.into(), named.clone());
                named
            }
        };
        match named {
            None => workload,
            Some(Named { engine, name, image }) => Workload {
                name: format!("{engine}/{name}"),
                container: name,
                image,
                source: Source::Engine,
                ..workload
            },
        }
    }

    fn docker(&self, id: &str) -> Option<Named> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Container {
            name: String,
            #[serde(default)]
            config: Config,
        }
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "PascalCase", default)]
        struct Config {
            image: String,
        }
        let container: Container =
            serde_json::from_slice(&read(&self.docker.join(id).join("config.v2.json"))?).ok()?;
        named("docker", container.name.strip_prefix('/')?, &container.config.image)
    }

    fn podman(&self, id: &str) -> Option<Named> {
        #[derive(Deserialize)]
        struct Container {
            id: String,
            #[serde(default)]
            names: Vec<String>,
            /// JSON again.
            #[serde(default)]
            metadata: String,
        }
        #[derive(Default, Deserialize)]
        #[serde(rename_all = "kebab-case", default)]
        struct Metadata {
            image_name: String,
        }
        DRIVERS.iter().find_map(|driver| {
            let path = self.podman.join(format!("{driver}-containers/containers.json"));
            let all: Vec<Container> = serde_json::from_slice(&read(&path)?).ok()?;
            let container = all.into_iter().find(|container| container.id == id)?;
            let metadata: Metadata = serde_json::from_str(&container.metadata).unwrap_or_default();
            named("podman", container.names.first()?, &metadata.image_name)
        })
    }
}

fn named(engine: &'static str, name: &str, image: &str) -> Option<Named> {
    let cut = |text: &str| text[..text.floor_char_boundary(MAX_NAME)].to_owned();
    (!name.is_empty()).then(|| Named { engine, name: cut(name), image: cut(image) })
}

/// A file that is not longer than [`MAX_FILE`].
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path).ok()?.take(MAX_FILE + 1).read_to_end(&mut bytes).ok()?;
    (read as u64 <= MAX_FILE).then_some(bytes)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

    use std::fs;

    use super::*;

    fn id(digit: &str) -> String {
        digit.repeat(64)
    }

    fn container(id: &str) -> Workload {
        Workload {
            kind: WorkloadKind::Container,
            name: "container/x".into(),
            container_id: id.into(),
            source: Source::Cgroup,
            ..Workload::default()
        }
    }

    /// What both write, as far as it is of use, in their own words.
    fn engines(dir: &Path) -> Engines {
        let docker = dir.join("docker").join(id("a"));
        let podman = dir.join("podman/vfs-containers");
        fs::create_dir_all(&docker).unwrap();
        fs::create_dir_all(&podman).unwrap();
        fs::write(
            docker.join("config.v2.json"),
            r#"{"StreamConfig":{},"ID":"aa","Config":{"Hostname":"a","Image":"nginx:1.29"},"Name":"/web"}"#,
        )
        .unwrap();
        let metadata = r#"{\"image-name\":\"localhost/db:1\",\"image-id\":\"c5\",\"name\":\"db\"}"#;
        let other = id("c");
        let all = format!(
            r#"[{{"id":"{other}","names":["other"]}},{{"id":"{}","names":["db"],"image":"c5","metadata":"{metadata}"}}]"#,
            id("b")
        );
        fs::write(podman.join("containers.json"), all).unwrap();
        Engines::at(dir.join("docker"), dir.join("podman"))
    }

    #[test]
    fn containers_of_both_engines_have_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut engines = engines(dir.path());
        for (digit, name, image) in [
            ("a", "docker/web", "nginx:1.29"),
            ("b", "podman/db", "localhost/db:1"),
            ("c", "podman/other", ""),
            ("d", "container/x", ""),
        ] {
            let named = engines.name(container(&id(digit)));
            assert_eq!((&*named.name, &*named.image), (name, image));
        }
        // Known from then on.
        fs::remove_dir_all(dir.path().join("docker")).unwrap();
        assert_eq!(engines.name(container(&id("a"))).name, "docker/web");
    }

    #[test]
    fn what_is_no_container_or_no_id_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let mut engines = engines(dir.path());
        let pod = Workload { kind: WorkloadKind::Pod, ..container(&id("a")) };
        assert_eq!(engines.name(pod.clone()), pod);
        for id in ["", "../docker", "a/../b"] {
            assert_eq!(engines.name(container(id)), container(id));
        }
    }

    #[test]
    fn files_that_are_too_long_or_no_json_name_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut engines = engines(dir.path());
        let file = dir.path().join("docker").join(id("a")).join("config.v2.json");
        fs::write(&file, "{").unwrap();
        File::create(dir.path().join("podman/vfs-containers/containers.json"))
            .unwrap()
            .set_len(MAX_FILE + 1)
            .unwrap();
        for digit in ["a", "b"] {
            assert_eq!(engines.name(container(&id(digit))), container(&id(digit)));
        }
    }
}
