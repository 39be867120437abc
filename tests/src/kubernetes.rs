//! A real Kubernetes node, by `tests/kubernetes/node.sh`.

use std::{
    env, fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Names the directory or archive of the programs of Kubernetes.
const PROGRAMS: &str = "PODFLAME_TEST_KUBERNETES";

/// A cluster of one node. Dropping it stops it and removes what it made.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
}

impl Node {
    /// The node's name in its cluster.
    pub const NAME: &str = "node1";

    /// Why there can be none on this machine.
    #[must_use]
    pub fn missing() -> Option<&'static str> {
        match env::var_os(PROGRAMS).map(PathBuf::from) {
            Some(programs) if programs.exists() => None,
            _ => Some(
                "needs the programs of Kubernetes: name their directory or archive in PODFLAME_TEST_KUBERNETES",
            ),
        }
    }

    /// Starts it, which takes some 20 s.
    ///
    /// # Errors
    /// When a part does not come up.
    pub fn start() -> Result<Self> {
        let dir = env::temp_dir().join(format!("podflame-node-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let node = Self { dir };
        node.script("up", None)?;
        Ok(node)
    }

    fn script(&self, verb: &str, name: Option<&str>) -> Result<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes/node.sh");
        let status = Command::new(script)
            .arg(verb)
            .arg(&self.dir)
            .args(name)
            .stdin(Stdio::null())
            .status()
            .context("run node.sh")?;
        ensure!(status.success(), "node.sh {verb}: {status}");
        Ok(())
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
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    /// Credentials that allow nothing.
    #[must_use]
    pub fn powerless(&self) -> PathBuf {
        self.dir.join("kubeconfig-no")
    }

    /// The container runtime's socket.
    #[must_use]
    pub fn cri_socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// Where kubelet finds static pods.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.dir.join("manifests")
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
        if let Err(error) = self.script("down", None) {
            eprintln!("left behind: {error:#}");
        }
        drop(fs::remove_dir_all(&self.dir));
    }
}
