//! Any bytes as the weights of a model, in Hugging Face's form and per head: refused with an error, or every parameter can
//! be read, and packed.
//!
//! The first eight bytes are set to the length that makes the rest up to the first line end the header, so that the
//! fuzzer need not guess a number; without a line end the bytes are taken as they are.
#![no_main]

use std::fs;
use std::sync::OnceLock;

use converter::{Checkpoint, DType, Packing};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

/// One layer of the smallest sizes.
const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 2, "hidden_size": 2, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "intermediate_size": 1,
    "max_position_embeddings": 8, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": true,
    "bos_token_id": 1, "eos_token_id": 1, "rope_theta": 10000.0}"#;

fuzz_target!(|data: &[u8]| {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let root = FOLDER.get_or_init(|| {
        let root = tempfile::tempdir().expect("a temporary folder");
        for form in ["model", "params"] {
            fs::create_dir(root.path().join(form)).expect("new");
            fs::write(root.path().join(form).join("config.json"), CONFIG).expect("writable");
        }
        root
    });
    let bytes = match data.iter().position(|b| *b == b'\n') {
        Some(end) => [&(end as u64).to_le_bytes()[..], &data[..end], &data[end + 1..]].concat(),
        None => data.to_vec(),
    };
    for form in ["model", "params"] {
        let folder = root.path().join(form);
        fs::write(folder.join(format!("{form}.safetensors")), &bytes).expect("writable");
        let Ok(checkpoint) = Checkpoint::open(&folder) else { continue };
        for param in checkpoint.params().iter() {
            checkpoint.read(param, DType::F32).map(drop).unwrap_or_default();
            checkpoint.packed(param, param.packing.unwrap_or(Packing::INT4)).map(drop).unwrap_or_default();
        }
    }
});
