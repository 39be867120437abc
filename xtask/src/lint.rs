//! The checks that run nothing of podflame: format, lints, conventions, dependencies, API, object.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{
    build_ebpf, setup,
    shell::{cargo, progress, root, run},
    tidy,
};

/// Runs every check, also after one failed.
///
/// # Errors
/// When a check failed; the message names each.
pub(crate) fn lint() -> Result<()> {
    type Check = fn() -> Result<()>;
    let checks: [(&str, Check); 6] = [
        ("format", format),
        ("conventions", tidy::tidy),
        ("clippy", clippy),
        ("dependencies", dependencies),
        ("gRPC API", api),
        ("BPF object", build_ebpf::verify_from_source),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        if let Err(error) = check() {
            eprintln!("error: {name}: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn format() -> Result<()> {
    setup::rustup_component("rustfmt", "bin/rustfmt")?;
    progress("cargo fmt --check");
    run(cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    setup::rustup_component("clippy", "bin/cargo-clippy")?;
    progress("cargo clippy");
    // All targets are those that a plain `cargo test` builds, and this test is not one of them.
    for targets in [&["--all-targets"][..], &["--test", "kernel"]] {
        run(cargo()
            .args(["clippy", "--quiet", "--locked", "--workspace"])
            .args(targets)
            .args(["--", "--deny", "warnings"]))?;
    }
    build_ebpf::clippy()
}

fn dependencies() -> Result<()> {
    let path = setup::cargo_deny()?;
    progress("cargo deny");
    run(cargo().env("PATH", path).args([
        "deny",
        "check",
        "--hide-inclusion-graph",
        "bans",
        "licenses",
        "sources",
    ]))
}

/// The API has buf's rules only once it has a configuration for buf.
fn api() -> Result<()> {
    if !root().join("proto/buf.yaml").exists() {
        return Ok(());
    }
    let tools = setup::python_tools()?;
    progress("buf lint");
    run(Command::new(tools.join("buf")).arg("lint").current_dir(root().join("proto")))
}
