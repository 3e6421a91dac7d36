//! Pins the bound on memory: three times the largest tensor and 200 MB, for a model that is larger than that. Alone in
//! its process, since it reads the process' peak.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use converter::{ConvertOptions, DType, Llama, ModelConfig};
use serde_json::{Map, json};

/// A model of zeros; its files have holes where the system allows, so that it costs little to make.
fn write_model(folder: &Path) -> (u64, u64) {
    let config = json!({
        "model_type": "llama", "vocab_size": 5000, "hidden_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 5632, "dtype": "float32",
    });
    fs::create_dir_all(folder).expect("new");
    fs::write(folder.join("config.json"), config.to_string()).expect("writable");
    let config = ModelConfig::from_value(&config, folder).expect("valid");
    let (mut header, mut end, mut largest) = (Map::new(), 0, 0);
    for tensor in Llama::declare(&config).hf_tensors() {
        let bytes = (tensor.shape.iter().product::<usize>() * DType::F32.size()) as u64;
        let entry = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [end, end + bytes]});
        header.insert(tensor.name, entry);
        (end, largest) = (end + bytes, largest.max(bytes));
    }
    let header = json!(header).to_string();
    let mut file = File::create(folder.join("model.safetensors")).expect("new");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("writable");
    file.write_all(header.as_bytes()).expect("writable");
    file.set_len(8 + header.len() as u64 + end).expect("a file with a hole");
    (end, largest)
}

/// The process' peak resident memory in bytes.
fn peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[test]
fn memory_is_bounded_by_the_largest_tensor() {
    let Some(before) = peak() else { return }; // not on Linux
    let root = tempfile::tempdir().expect("a temporary folder");
    let (model, per_head) = (root.path().join("model"), root.path().join("per-head"));
    let (total, largest) = write_model(&model);
    let limit = before + 3 * largest + (200 << 20);
    assert!(total > limit && 16 * largest > limit, "all of the model, or a tensor per thread, would be over the bound");
    let options = ConvertOptions { threads: 16, ..Default::default() };
    converter::convert(&model, &per_head, &options, &|_, _| {}, &AtomicBool::new(false)).expect("valid");
    let peak = peak().expect("as before");
    assert!(peak <= limit, "peak {peak} bytes, limit {limit}");
}
