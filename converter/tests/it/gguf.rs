//! Pins that a GGUF file is a checkpoint like any other: the same parameters, and quantized ones as they are stored, or in
//! bfloat16 where floats are wanted.

use std::fs;
use std::path::PathBuf;

use converter::gguf::GgufFile;
use converter::{Checkpoint, ConvertOptions, DType, Kind, ModelConfig};
use tempfile::TempDir;

use crate::support::{convert, encode, export, names, read_tensors, stored};

/// A folder with `model.gguf`: grouped heads, biases, head_dim 16 with hidden 32, eight kinds of tensors.
fn folder() -> TempDir {
    let root = tempfile::tempdir().expect("a temporary folder");
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny.gguf");
    fs::copy(fixture, root.path().join("model.gguf")).expect("there");
    root
}

/// What the exported folder must hold: the dequantized values, rounded to `dtype`.
fn assert_exported(root: &TempDir, name: &str, dtype: DType) {
    let file = GgufFile::open(&root.path().join("model.gguf")).expect("valid");
    let mut tensors = read_tensors(&root.path().join(name));
    for tensor in file.tensors() {
        let mut values = vec![0.0; tensor.shape().iter().product()];
        file.read_rows(tensor.hf_name(), 0..tensor.shape()[0], &mut values).expect("readable");
        let bytes: Vec<u8> = values.into_iter().flat_map(|x| encode(x, dtype)).collect();
        let found = tensors.remove(tensor.hf_name());
        assert!(found == Some((stored(dtype), tensor.shape().to_vec(), bytes)), "{}", tensor.hf_name());
    }
    assert!(tensors.is_empty(), "{:?}", tensors.keys());
    let path = root.path().join(name).join("config.json");
    let config = ModelConfig::from_json(&fs::read_to_string(&path).expect("there"), &path).expect("valid");
    assert_eq!(config.dtype, Some(dtype));
    assert!(config.raw.get("dtype").is_some() && config.raw.get("torch_dtype").is_some());
}

#[test]
fn through_per_head_form_and_directly_the_same_model_comes_out() {
    let root = folder();
    let checkpoint = Checkpoint::open(&root.path().join("model.gguf")).expect("valid");
    assert_eq!(checkpoint.kind(), Kind::Gguf);
    let file = GgufFile::open(&root.path().join("model.gguf")).expect("valid");
    for param in checkpoint.params().iter() {
        let kind = file.tensor(&param.pieces[0].name).expect("there").kind();
        assert_eq!(param.packing, kind.packing(), "{}", param.name);
        assert_eq!(param.dtype, DType::parse(kind.name()).unwrap_or(DType::BF16), "{}", param.name);
    }
    assert!(checkpoint.place(&checkpoint.params().embedding).expect("no error").is_none());
    assert!(checkpoint.side_file("tokenizer.json").expect("readable").is_some());

    convert(&root, "model.gguf", "per-head", &Default::default()).expect("valid");
    export(&root, "per-head", "through", &Default::default()).expect("valid");
    export(&root, "model.gguf", "direct", &Default::default()).expect("valid");
    let single = ConvertOptions { dtype: Some(DType::F32.into()), ..Default::default() };
    export(&root, "model.gguf", "single", &single).expect("valid");
    assert_exported(&root, "through", DType::BF16);
    assert_exported(&root, "direct", DType::BF16);
    assert_exported(&root, "single", DType::F32);
    let wide = ConvertOptions { dtype: Some(DType::F32.into()), ..Default::default() };
    export(&root, "per-head", "exact", &wide).expect("valid");
    assert_exported(&root, "exact", DType::F32);
    let files = names(&root.path().join("per-head"));
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "params.safetensors"] {
        assert!(files.contains(&name.to_string()), "{files:?}");
    }
}
