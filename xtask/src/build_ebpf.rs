//! Building the BPF object, and telling whether the committed one is of today's sources.
//!
//! The object is committed so that a plain `cargo build` of the agent needs neither LLVM nor
//! unstable features. Its digest file, in the format of sha256sum, names the sources and tools that
//! gave it. The bytes do not depend on where the workspace, the toolchain or the registry lie.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::{
    setup::{self, BPF_LINKER, LLVM},
    shell::{cargo, output, progress, root, run, target},
};

const OBJECT: &str = "agent-ebpf/podflame.bpf.o";
const DIGEST: &str = "agent-ebpf/podflame.bpf.sha256";
const REMEDY: &str = "run `cargo xtask build-ebpf` and commit agent-ebpf/podflame.bpf.*";

/// Flags that do not depend on the machine. BTF is made of the debug information. Typed access to
/// the registers in `pt_regs` needs the architecture; the only one built for so far is x86-64.
const RUSTFLAGS: [&str; 4] = [
    "--cfg=bpf_target_arch=\"x86_64\"",
    "--check-cfg=cfg(bpf_target_arch, values(any()))",
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
];

/// Builds the object and puts it, with its digest, into the source tree.
///
/// # Errors
/// When a tool cannot be installed, or the build fails.
pub(crate) fn build_and_commit() -> Result<()> {
    let object = build()?;
    let digest = format!(
        "{}  {}\n# sources {}\n# tools {}\n",
        hex(&Sha256::digest(&object)),
        file_name(OBJECT),
        sources(root())?,
        tools()?
    );
    // The object first: an interruption leaves a stale digest, which `check` reports.
    write_atomically(&root().join(OBJECT), &object)?;
    write_atomically(&root().join(DIGEST), digest.as_bytes())?;
    progress(format!("{OBJECT}: {} bytes", object.len()));
    Ok(())
}

/// Fails when the committed object is not the one its digest file names, or when the sources have
/// changed since. Builds nothing.
///
/// # Errors
/// When the object is stale or missing, with the remedy.
pub(crate) fn check(root: &Path) -> Result<()> {
    let committed = Committed::read(root)?;
    let object = fs::read(root.join(OBJECT)).with_context(|| format!("{OBJECT}: {REMEDY}"))?;
    if hex(&Sha256::digest(&object)) != committed.object {
        bail!("{OBJECT}: not the object that {DIGEST} names: {REMEDY}");
    }
    if sources(root)? != committed.sources {
        bail!("{OBJECT}: older than its sources: {REMEDY}");
    }
    Ok(())
}

/// Builds the object from source and fails when the committed one has other bytes.
///
/// Where the compiler is another than the one that built the committed object, equal bytes cannot
/// be expected; then it only says so.
///
/// # Errors
/// When the build fails, or the bytes differ though the tools are the same.
pub(crate) fn verify_from_source() -> Result<()> {
    check(root())?;
    let fresh = build()?;
    let committed = Committed::read(root())?;
    if hex(&Sha256::digest(&fresh)) == committed.object {
        progress(format!("{OBJECT}: a build from source gives the same bytes"));
        return Ok(());
    }
    let tools = tools()?;
    if tools != committed.tools {
        progress(format!(
            "{OBJECT}: built by {}, here is {tools}: bytes not compared",
            committed.tools
        ));
        return Ok(());
    }
    bail!("{OBJECT}: a build from source by {tools} gives other bytes: {REMEDY}");
}

/// What the digest file says.
struct Committed {
    object: String,
    sources: String,
    tools: String,
}

impl Committed {
    fn read(root: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(root.join(DIGEST)).with_context(|| format!("{DIGEST}: {REMEDY}"))?;
        let after = |prefix: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(prefix))
                .map(str::to_owned)
                .with_context(|| format!("{DIGEST}: no line `{prefix}…`: {REMEDY}"))
        };
        let object = text.split_whitespace().next().unwrap_or_default().to_owned();
        Ok(Self { object, sources: after("# sources ")?, tools: after("# tools ")? })
    }
}

/// Lints the BPF programs, which a `cargo clippy` of the workspace does not see.
///
/// # Errors
/// When there are findings.
pub(crate) fn clippy() -> Result<()> {
    let (mut clippy, _) = cargo_for_bpf("clippy")?;
    run(clippy.args(["--", "--deny", "warnings"])).context("lint the BPF programs")
}

/// Builds the object and returns its bytes: with BTF, without DWARF, without a path of this machine.
fn build() -> Result<Vec<u8>> {
    let (mut cargo, prefixes) = cargo_for_bpf("build")?;
    progress("building the BPF programs");
    run(&mut cargo).context("build the BPF programs")?;

    let linked = target_dir().join("bpfel-unknown-none/bpf/podflame-ebpf");
    let stripped = target_dir().join("podflame.bpf.o");
    // Strips DWARF and keeps .BTF and .BTF.ext.
    run(Command::new(Path::new(LLVM).join("bin/llvm-strip"))
        .arg("-g")
        .arg(&linked)
        .arg("-o")
        .arg(&stripped))?;
    let object = read(&stripped)?;
    for prefix in &prefixes {
        let needle = prefix.as_os_str().as_encoded_bytes();
        if object.windows(needle.len()).any(|bytes| bytes == needle) {
            bail!("{}: holds the machine's path {}", stripped.display(), prefix.display());
        }
    }
    Ok(object)
}

/// Its own directory: other flags than the host's would rebuild everything at each switch.
fn target_dir() -> PathBuf {
    target().join("bpf")
}

/// A cargo command on the BPF programs, and the directories that must not show in what it builds.
fn cargo_for_bpf(command: &str) -> Result<(Command, Vec<PathBuf>)> {
    setup::rustup_component("rust-src", "lib/rustlib/src/rust/library/core/Cargo.toml")?;
    let path = setup::bpf_linker()?;
    // Where the sources of dependencies lie is known once they are there.
    run(cargo().args(["fetch", "--quiet", "--locked"]))?;
    let prefixes = machine_prefixes()?;
    let remap =
        prefixes.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display()));
    let flags: Vec<_> = RUSTFLAGS.into_iter().map(str::to_owned).chain(remap).collect();

    let mut cargo = cargo();
    cargo
        .args([command, "--quiet", "--locked", "--package", "podflame-ebpf"])
        .args(["--bin", "podflame-ebpf", "--no-default-features", "--features", "programs"])
        .args(["--profile", "bpf", "-Zbuild-std=core", "--target", "bpfel-unknown-none"])
        .arg("--target-dir")
        .arg(target_dir())
        .env("PATH", path)
        // build-std is unstable; the variable opens it on the stable compiler.
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok((cargo, prefixes.into_iter().map(|(from, _)| from).collect()))
}

/// The directories that paths in debug information begin with, and what they are replaced by.
///
/// rustc takes the last one that fits, so a home directory comes before what lies in it.
fn machine_prefixes() -> Result<Vec<(PathBuf, &'static str)>> {
    let sysroot = PathBuf::from(output(Command::new("rustc").args(["--print", "sysroot"]))?);
    let home = env::home_dir().filter(|home| home.parent().is_some());
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| home.as_ref().map(|home| home.join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let mut prefixes: Vec<_> = home.into_iter().map(|home| (home, "/home")).collect();
    prefixes.extend([(cargo_home.clone(), "/cargo"), (sysroot, "/rust")]);
    // One directory for each registry, and named after its host: a mirror must not show.
    let registries = fs::read_dir(cargo_home.join("registry/src")).into_iter().flatten();
    prefixes.extend(registries.flatten().map(|entry| (entry.path(), "/cargo")));
    prefixes.push((root().to_path_buf(), "/podflame"));
    Ok(prefixes)
}

/// Digest of everything in this repository that the object is made of.
fn sources(root: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    let mut add = |name: &str, content: &[u8]| {
        digest.update(format!("{name}\0{}\0", content.len()));
        digest.update(content);
    };
    let mut files = vec![PathBuf::from("agent-ebpf/Cargo.toml")];
    collect(root, Path::new("agent-ebpf/src"), &mut files)?;
    files.sort();
    for file in files {
        add(&file.to_string_lossy(), &read(&root.join(&file))?);
    }
    let manifest = read_text(&root.join("Cargo.toml"))?;
    for header in ["[profile.bpf]", "[profile.release]"] {
        add(header, toml_section(&manifest, header).as_bytes());
    }
    let lock = read_text(&root.join("Cargo.lock"))?;
    for package in locked_dependencies(&lock, "podflame-ebpf") {
        add("Cargo.lock", package.as_bytes());
    }
    add("tools", format!("bpf-linker {BPF_LINKER}, {LLVM}, {}", RUSTFLAGS.join(" ")).as_bytes());
    Ok(hex(&digest.finalize()))
}

/// All files under a directory, relative to the root.
fn collect(root: &Path, dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(root.join(dir)).with_context(|| format!("list {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = dir.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            collect(root, &path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

/// The lines of a TOML table, without comments and blank lines.
fn toml_section(text: &str, header: &str) -> String {
    text.lines()
        .skip_while(|line| *line != header)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect::<Vec<_>>()
        .join("\n")
}

/// `name version checksum` of every package that `start` depends on, directly or not, in order.
fn locked_dependencies(lock: &str, start: &str) -> BTreeSet<String> {
    let field = |block: &str, key: &str| {
        let prefix = format!("{key} = ");
        let value = block.lines().find_map(|line| line.strip_prefix(&prefix));
        value.unwrap_or_default().trim_matches('"').to_owned()
    };
    let blocks: Vec<_> = lock.split("[[package]]\n").skip(1).collect();
    let mut found = BTreeSet::new();
    let mut names = vec![start.to_owned()];
    while let Some(wanted) = names.pop() {
        // A dependency is `name`, or `name version` where the lock file holds several.
        let (name, version) = wanted.split_once(' ').unwrap_or((&wanted, ""));
        for block in blocks.iter().filter(|block| field(block, "name") == name) {
            let its = field(block, "version");
            let package = format!("{name} {its} {}", field(block, "checksum"));
            if (version.is_empty() || version == its) && found.insert(package) {
                let lines = block.lines().filter_map(|line| line.strip_prefix(" \""));
                names.extend(lines.map(|line| line.trim_end_matches("\",").to_owned()));
            }
        }
    }
    found
}

/// The tools whose version decides the bytes of the object.
fn tools() -> Result<String> {
    let rustc = output(Command::new("rustc").arg("--version"))?;
    let llvm = output(Command::new(Path::new(LLVM).join("bin/llvm-config")).arg("--version"))?;
    Ok(format!("{rustc}, bpf-linker {BPF_LINKER}, LLVM {llvm}"))
}

/// Replaces a file by a complete one, or leaves it as it is.
fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, content).with_context(|| format!("write {}", new.display()))?;
    fs::rename(&new, path).with_context(|| format!("replace {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    const LOCK: &str = r#"version = 4

[[package]]
name = "leaf"
version = "1.0.0"
checksum = "aa"

[[package]]
name = "leaf"
version = "2.0.0"
checksum = "bb"

[[package]]
name = "other"
version = "1.0.0"
checksum = "cc"

[[package]]
name = "podflame-ebpf"
version = "0.1.0"
dependencies = [
 "leaf 2.0.0",
]
"#;
    const MANIFEST: &str = r#"[workspace]

[profile.release]
debug = 1
# Why.

[profile.bpf]
inherits = "release"
opt-level = 3
"#;

    /// A repository with an object that is fresh.
    fn repository() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("agent-ebpf/src/deep")).unwrap();
        for (file, text) in [
            ("Cargo.toml", MANIFEST),
            ("Cargo.lock", LOCK),
            ("agent-ebpf/Cargo.toml", "[package]\n"),
            ("agent-ebpf/src/main.rs", "//! Programs.\n"),
            ("agent-ebpf/src/deep/er.rs", "//! Deeper.\n"),
            (OBJECT, "object"),
        ] {
            fs::write(root.join(file), text).unwrap();
        }
        let digest = hex(&Sha256::digest("object"));
        let sources = sources(root).unwrap();
        fs::write(root.join(DIGEST), format!("{digest}  o\n# sources {sources}\n# tools t\n"))
            .unwrap();
        dir
    }

    /// What `check` says after a file has changed.
    fn after(file: &str, from: &str, to: &str) -> Option<String> {
        let dir = repository();
        let path = dir.path().join(file);
        let old = fs::read_to_string(&path).unwrap();
        assert!(old.contains(from), "{file} does not hold {from:?}");
        fs::write(&path, old.replace(from, to)).unwrap();
        check(dir.path()).err().map(|error| format!("{error:#}"))
    }

    #[test]
    fn an_object_is_stale_once_anything_it_is_made_of_changes() {
        let stale = Some(format!("{OBJECT}: older than its sources: {REMEDY}"));
        assert_eq!(after("agent-ebpf/src/main.rs", "Programs", "Programs"), None);
        assert_eq!(after("agent-ebpf/src/main.rs", "Programs", "Program"), stale);
        assert_eq!(after("agent-ebpf/src/deep/er.rs", "Deeper", "deeper"), stale);
        assert_eq!(after("agent-ebpf/Cargo.toml", "package", "lib"), stale);
        assert_eq!(after("Cargo.toml", "opt-level = 3", "opt-level = 2"), stale);
        assert_eq!(after("Cargo.lock", "\"bb\"", "\"b2\""), stale);
        assert_eq!(after("Cargo.lock", "leaf 2.0.0", "leaf 1.0.0"), stale);
    }

    #[test]
    fn an_object_is_not_stale_for_what_it_is_not_made_of() {
        assert_eq!(after("Cargo.toml", "[workspace]\n", "[workspace]\nx = 1\n"), None);
        assert_eq!(after("Cargo.toml", "# Why.", "# Because."), None);
        assert_eq!(after("Cargo.lock", "\"cc\"", "\"c2\""), None);
        assert_eq!(after("Cargo.lock", "\"aa\"", "\"a2\""), None);
    }

    #[test]
    fn an_object_that_is_not_the_named_one_is_refused() {
        let refused = format!("{OBJECT}: not the object that {DIGEST} names: {REMEDY}");
        assert_eq!(after(OBJECT, "object", "objects"), Some(refused));
        let unnamed = format!("{DIGEST}: no line `# sources …`: {REMEDY}");
        assert_eq!(after(DIGEST, "# sources", "# source"), Some(unnamed));
    }
}
