//! Writes `descriptors.bin`: the descriptor set of the `envoy-types` package without comments and
//! unknown options, so that canonical JSON needs 0.5 MB instead of 3.3 MB.
//!
//! Usage: `cargo run -p envoy-api --example strip_descriptors -- TYPES_BIN descriptors.bin`, where
//! TYPES_BIN is `src/generated/types.bin` of the package at the pinned version.

use envoy_types::pb::google::protobuf::FileDescriptorSet;
use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, input, output] = args.as_slice() else {
        return Err("usage: strip_descriptors TYPES_BIN OUTPUT".into());
    };
    let mut set = FileDescriptorSet::decode(std::fs::read(input)?.as_slice())?;
    for file in &mut set.file {
        file.source_code_info = None;
    }
    std::fs::write(output, set.encode_to_vec())?;
    Ok(())
}
