//! A real Kubernetes node: one by `tests/kubernetes/node.sh`, or any that the environment names by
//! `PODFLAME_TEST_KUBECONFIG`, `PODFLAME_TEST_CRI_SOCKET`, `PODFLAME_TEST_NODE` and, for the image of
//! its pods, `PODFLAME_TEST_IMAGE`. Of a given one no part is stopped, and no static pod is made.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Names the directory or archive of the programs of Kubernetes.
const PROGRAMS: &str = "PODFLAME_TEST_KUBERNETES";

/// Names the credentials for a cluster that runs already.
const KUBECONFIG: &str = "PODFLAME_TEST_KUBECONFIG";

/// A cluster of one node. Dropping it stops it and removes what it made, unless it was given.
#[derive(Debug)]
pub struct Node {
    /// Where its state is; of one that was given there is none.
    dir: Option<PathBuf>,
    name: String,
    kubeconfig: PathBuf,
    cri_socket: PathBuf,
}

impl Node {
    /// Why there can be none on this machine.
    #[must_use]
    pub fn missing() -> Option<&'static str> {
        match env::var_os(PROGRAMS).map(PathBuf::from) {
            _ if Self::is_given() => None,
            Some(programs) if programs.exists() => None,
            _ => Some(
                "needs a cluster: name the directory or archive of the programs of Kubernetes in \
                 PODFLAME_TEST_KUBERNETES, or the credentials of a cluster in PODFLAME_TEST_KUBECONFIG",
            ),
        }
    }

    /// Whether it is not the tests' own, so that no part of it is stopped.
    #[must_use]
    pub fn is_given() -> bool {
        env::var_os(KUBECONFIG).is_some()
    }

    /// Starts it, which takes some 20 s, or takes the one that was given.
    ///
    /// # Errors
    /// When a part does not come up, or nothing says where one is.
    pub fn start() -> Result<Self> {
        if let Some(kubeconfig) = env::var_os(KUBECONFIG) {
            let cri_socket = env::var_os("PODFLAME_TEST_CRI_SOCKET")
                .context("PODFLAME_TEST_CRI_SOCKET: which socket of its runtime?")?;
            return Ok(Self {
                dir: None,
                name: env::var("PODFLAME_TEST_NODE").context("PODFLAME_TEST_NODE: which node?")?,
                kubeconfig: kubeconfig.into(),
                cri_socket: cri_socket.into(),
            });
        }
        let dir = env::temp_dir().join(format!("podflame-node-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let node = Self {
            name: "node1".to_owned(),
            kubeconfig: dir.join("kubeconfig"),
            cri_socket: dir.join("containerd.sock"),
            dir: Some(dir),
        };
        node.script("up", None)?;
        Ok(node)
    }

    fn dir(&self) -> Result<&Path> {
        self.dir.as_deref().context("a node that was given keeps its state to itself")
    }

    fn script(&self, verb: &str, name: Option<&str>) -> Result<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes/node.sh");
        let status = Command::new(script)
            .arg(verb)
            .arg(self.dir()?)
            .args(name)
            .stdin(Stdio::null())
            .status()
            .context("run node.sh")?;
        ensure!(status.success(), "node.sh {verb}: {status}");
        Ok(())
    }

    /// The node's name in its cluster.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Stops one part, such as `apiserver`.
    ///
    /// # Errors
    /// When the script fails.
    pub fn stop(&self, part: &str) -> Result<()> {
        self.script("stop", Some(part))
    }

    /// Starts a part that was stopped.
    ///
    /// # Errors
    /// When the script fails.
    pub fn restart(&self, part: &str) -> Result<()> {
        self.script("start", Some(part))
    }

    /// Credentials of an administrator.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Credentials that allow nothing.
    ///
    /// # Errors
    /// When the node was given.
    pub fn powerless(&self) -> Result<PathBuf> {
        Ok(self.dir()?.join("kubeconfig-no"))
    }

    /// The container runtime's socket.
    #[must_use]
    pub fn cri_socket(&self) -> &Path {
        &self.cri_socket
    }

    /// Where kubelet finds static pods.
    ///
    /// # Errors
    /// When the node was given.
    pub fn manifests(&self) -> Result<PathBuf> {
        Ok(self.dir()?.join("manifests"))
    }

    /// The image of the pods of the tests, in which programs of this machine run.
    #[must_use]
    pub fn image() -> String {
        env::var("PODFLAME_TEST_IMAGE").unwrap_or_else(|_| "localhost/pause:1".to_owned())
    }

    /// What `kubectl` answers.
    ///
    /// # Errors
    /// When it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "")
    }

    /// Makes objects of a cluster from their description.
    ///
    /// # Errors
    /// When the API server refuses them.
    pub fn apply(&self, objects: &str) -> Result<()> {
        self.kubectl_with(&["apply", "-f", "-"], objects).map(drop)
    }

    fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = Command::new("kubectl")
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start kubectl")?;
        let mut stdin = child.stdin.take().context("kubectl without standard input")?;
        stdin.write_all(input.as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let Some(dir) = &self.dir else { return };
        if let Err(error) = self.script("down", None) {
            eprintln!("left behind: {error:#}");
        }
        drop(fs::remove_dir_all(dir));
    }
}
