//! Any bytes as the weights of a model: refused with an error, or every parameter can be read.
//!
//! The first eight bytes are set to the length that makes the rest up to the first line end the header, so that the
//! fuzzer need not guess a number; without a line end the bytes are taken as they are.
#![no_main]

use std::fs;
use std::sync::OnceLock;

use converter::{Checkpoint, DType};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// One layer of the smallest sizes.
const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 2, "hidden_size": 2, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 1,
    "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": true,
    "bos_token_id": 1, "eos_token_id": 1, "rope_theta": 10000.0}"#;

fuzz_target!(|data: &[u8]| {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("config.json"), CONFIG).expect("writable");
        folder
    });
    let bytes = match data.iter().position(|b| *b == b'\n') {
        Some(end) => [&(end as u64).to_le_bytes()[..], &data[..end], &data[end + 1..]].concat(),
        None => data.to_vec(),
    };
    fs::write(folder.path().join("model.safetensors"), bytes).expect("writable");
    let Ok(checkpoint) = Checkpoint::open(folder.path()) else { return };
    for param in checkpoint.params().iter() {
        checkpoint.read(param, DType::F32).map(drop).unwrap_or_default();
    }
});
