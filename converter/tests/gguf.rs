//! GGUF files: values against the `gguf` Python package, a whole model, configuration, tokenizers, and bad files.

#[path = "gguf/architectures.rs"]
mod architectures;
#[path = "gguf/builder.rs"]
mod builder;
#[path = "gguf/config.rs"]
mod config;
#[path = "gguf/hostile.rs"]
mod hostile;
#[path = "gguf/packed.rs"]
mod packed;
#[path = "gguf/tokenizer.rs"]
mod tokenizer;
#[path = "gguf/values.rs"]
mod values;

use std::path::PathBuf;

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}
