//! Installing what a chore lacks: each step is skipped when its result is there.
//!
//! Debian packages go into the system, since that is where they belong; everything else goes under
//! `target/`, so that the versions pinned here never replace the user's own.

use std::{fs, path::PathBuf, process::Command, sync::Once};

use anyhow::{Context as _, Result, bail};

use crate::shell::{cargo, output, path_with, progress, root, run, target, which};

/// The linker of the BPF object. Another version may give other bytes.
pub(crate) const BPF_LINKER: &str = "0.13.0";

/// Checks licences, sources and duplicates of dependencies.
const CARGO_DENY: &str = "0.20.2";

/// Debian's LLVM of the version that rustc 1.95 is built with.
pub(crate) const LLVM: &str = "/usr/lib/llvm-22";

/// Installs Debian packages unless each path in `proofs` exists or is a program on `PATH`.
///
/// # Errors
/// When apt-get fails, or is needed and neither root nor sudo is at hand.
pub(crate) fn apt(packages: &[&str], proofs: &[&str]) -> Result<()> {
    static UPDATE: Once = Once::new();
    let there = |proof: &&str| match proof.contains('/') {
        true => PathBuf::from(proof).exists(),
        false => which(proof).is_some(),
    };
    if proofs.iter().all(there) {
        return Ok(());
    }
    let wanted = packages.join(" ");
    if which("apt-get").is_none() {
        bail!("missing {proofs:?}: install what Debian calls {wanted} with your package manager");
    }
    let mut updated = Ok(());
    UPDATE.call_once(|| {
        progress("apt-get update");
        updated = run(as_root("apt-get").args(["-qq", "update"]));
    });
    updated?;
    progress(format!("apt-get install {wanted}"));
    run(as_root("apt-get")
        .args(["install", "-qq", "--yes", "--no-install-recommends"])
        .args(packages))
    .with_context(|| format!("install as root: apt-get install {wanted}"))
}

/// A command run by root: directly, or by sudo where this user is not root.
fn as_root(program: &str) -> Command {
    if is_root() {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    } else {
        let mut command = Command::new("sudo");
        command.args(["env", "DEBIAN_FRONTEND=noninteractive", program]);
        command
    }
}

/// Adds components such as `rust-src` to the toolchain in use.
///
/// # Errors
/// When rustup fails, or is missing while a component is.
pub(crate) fn rustup_component(name: &str, proof: &str) -> Result<()> {
    let sysroot = PathBuf::from(output(Command::new("rustc").args(["--print", "sysroot"]))?);
    if sysroot.join(proof).exists() {
        return Ok(());
    }
    progress(format!("rustup component add {name}"));
    run(Command::new("rustup").args(["component", "add", name])).with_context(|| {
        format!("the Rust toolchain in {} lacks {name}: install it with rustup", sysroot.display())
    })
}

/// The `PATH` that holds the pinned bpf-linker, which is built first if need be (about a minute).
///
/// # Errors
/// When LLVM or bpf-linker cannot be installed.
pub(crate) fn bpf_linker() -> Result<std::ffi::OsString> {
    apt(
        &["llvm-22-dev", "libpolly-22-dev"],
        &[&format!("{LLVM}/bin/llvm-strip"), &format!("{LLVM}/lib/libPolly.a")],
    )?;
    let version = format!("bpf-linker {BPF_LINKER}");
    let tools = target().join("tools");
    let path = path_with(&tools.join("bin"))?;
    let found = Command::new("bpf-linker").arg("--version").env("PATH", &path).output();
    if found.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).trim() == version) {
        return Ok(path);
    }
    progress(format!("cargo install {version} (about a minute)"));
    run(cargo()
        .args(["install", "--quiet", "--locked", "bpf-linker", "--version", BPF_LINKER, "--force"])
        .args(["--no-default-features", "--features", "llvm-22", "--root"])
        .arg(&tools)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("PATH", path_with(&PathBuf::from(LLVM).join("bin"))?)
        .env("LLVM_SYS_221_PREFIX", LLVM))?;
    Ok(path)
}

/// Installs cargo-deny unless there is one (several minutes).
///
/// # Errors
/// When it cannot be built.
pub(crate) fn cargo_deny() -> Result<std::ffi::OsString> {
    let tools = target().join("tools");
    let path = path_with(&tools.join("bin"))?;
    let found = Command::new("cargo-deny").arg("--version").env("PATH", &path).output();
    if found.is_ok_and(|out| out.status.success()) {
        return Ok(path);
    }
    progress(format!("cargo install cargo-deny {CARGO_DENY} (several minutes)"));
    run(cargo()
        .args(["install", "--quiet", "--locked", "cargo-deny", "--version", CARGO_DENY])
        .args(["--no-default-features", "--root"])
        .arg(&tools))?;
    Ok(path)
}

/// The directory of the Python, buf and Go of `tests/requirements.txt`, installed if need be.
///
/// # Errors
/// When the virtual environment cannot be made or filled.
pub(crate) fn python_tools() -> Result<PathBuf> {
    let wanted = root().join("tests/requirements.txt");
    let venv = target().join("venv");
    let bin = venv.join("bin");
    // A copy of the list is left once all of it is installed.
    let stamp = venv.join("requirements.txt");
    let list = fs::read(&wanted).with_context(|| format!("read {}", wanted.display()))?;
    if fs::read(&stamp).is_ok_and(|installed| installed == list) {
        return Ok(bin);
    }
    let has_venv = Command::new("python3").args(["-c", "import ensurepip"]).output();
    if !has_venv.is_ok_and(|out| out.status.success()) {
        // Debian keeps the module apart from Python; nothing on disk has a fixed name to look for.
        apt(&["python3", "python3-venv"], &["/nonexistent"])?;
    }
    progress("installing Python, buf and Go for the tests into target/venv");
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
    run(Command::new(bin.join("python"))
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"])
        .arg(&wanted))?;
    fs::copy(&wanted, &stamp).with_context(|| format!("write {}", stamp.display()))?;
    Ok(bin)
}

/// Installs what a Kubernetes node needs beside Kubernetes, for `tests/kubernetes/node.sh`.
///
/// # Errors
/// When apt-get fails.
pub(crate) fn kubernetes_node() -> Result<()> {
    let packages = [
        "conntrack",
        "containerd",
        "containernetworking-plugins",
        "curl",
        "etcd-server",
        "gcc",
        "libc6-dev",
        "openssl",
        "procps",
        "runc",
        "xz-utils",
    ];
    let proofs = [
        "conntrack",
        "containerd",
        "/usr/lib/cni/ptp",
        "curl",
        "etcd",
        "gcc",
        "openssl",
        "runc",
        "xz",
    ];
    apt(&packages, &proofs)?;
    apt(&["kubernetes-client"], &["kubectl"])
}

/// Whether this user is root.
pub(crate) fn is_root() -> bool {
    output(Command::new("id").arg("-u")).is_ok_and(|uid| uid == "0")
}
