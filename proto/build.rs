//! Compiles `schema/*.proto` with protox (no protoc needed) into Rust types and keeps the
//! descriptors, with which the messages can be treated by description.
use std::{env, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["task", "mem", "files", "sockets", "inventory", "stream", "common"]
        .map(|f| format!("schema/{f}.proto"));
    println!("cargo::rerun-if-changed=schema");
    let set = protox::compile(&files, ["schema"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), prost_build_bytes(&set))?;
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    config.type_attribute(".", "#[allow(missing_docs)]");
    config.compile_fds(set)?;
    Ok(())
}

fn prost_build_bytes(set: &impl prost::Message) -> Vec<u8> {
    set.encode_to_vec()
}
