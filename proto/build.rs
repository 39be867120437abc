//! Generates the Rust types of `podflame.v1`, with neither protoc nor a network.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 4] = [
    "podflame/v1/account.proto",
    "podflame/v1/incident.proto",
    "podflame/v1/profile.proto",
    "podflame/v1/profiler.proto",
];

const RUNTIME: &str = "cri/runtime.proto";

fn main() -> Result<(), Box<dyn Error>> {
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    for file in FILES {
        println!("cargo::rerun-if-changed={file}");
    }

    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".podflame.v1.GetFlameGraphResponse.data")
        .compile_fds(compiler.file_descriptor_set())?;

    // What the container runtime serves; no part of the API, nor of its reflection.
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).open_files([RUNTIME])?;
    println!("cargo::rerun-if-changed={RUNTIME}");
    tonic_prost_build::configure()
        .build_transport(false)
        .build_server(false)
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
