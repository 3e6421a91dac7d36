//! Pins that to per-head form and back changes no bit, and that what lies beside the weights travels along.

use std::fs;

use converter::{Checkpoint, ConvertOptions, DType, Kind};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::support::{Model, convert, encode, export, names, read_tensors, stored};

#[test]
fn every_float_type_returns_bit_for_bit() {
    for dtype in DType::ALL {
        let root = Model::random(Model::small().config, dtype).folder();
        let report = convert(&root, "model", "per-head", &Default::default()).expect("valid");
        assert_eq!(report.tensors, 35);
        export(&root, "per-head", "back", &Default::default()).expect("valid");
        assert!(read_tensors(&root.path().join("back")) == read_tensors(&root.path().join("model")), "{dtype}");
        assert_ne!(read_tensors(&root.path().join("per-head")), read_tensors(&root.path().join("model")));
    }
}

#[test]
fn every_bit_pattern_and_mixed_types_return() {
    let mut model = Model::small();
    let embedding = model.tensors.get_mut("model.embed_tokens.weight").expect("there");
    embedding.2.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 37 % 256) as u8);
    let norm = model.tensors.get_mut("model.norm.weight").expect("there");
    *norm = (stored(DType::F16), norm.1.clone(), (0..20).flat_map(|i| encode(i as f32, DType::F16)).collect());
    let root = model.folder();
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    export(&root, "per-head", "back", &Default::default()).expect("valid");
    assert!(read_tensors(&root.path().join("back")) == model.tensors);
    let back = Checkpoint::open(&root.path().join("per-head")).expect("valid");
    assert_eq!((back.kind(), back.params().final_norm.dtype), (Kind::PerHead, DType::F16));
}

#[test]
fn several_files_on_both_sides() {
    let model = Model::small();
    let root = model.folder();
    let options = ConvertOptions { shard_size: Some(6000), threads: 3, ..Default::default() };
    convert(&root, "model", "per-head", &options).expect("valid");
    assert!(names(&root.path().join("per-head")).contains(&"params.safetensors.index.json".to_string()));
    export(&root, "per-head", "back", &options).expect("valid");
    let back = names(&root.path().join("back"));
    assert!(back.contains(&"model-00001-of-00009.safetensors".to_string()), "{back:?}");
    assert!(read_tensors(&root.path().join("back")) == model.tensors);
    export(&root, "back", "one", &Default::default()).expect("several files are read");
    assert_eq!(names(&root.path().join("one")), ["config.json", "model.safetensors"]);
    assert!(read_tensors(&root.path().join("one")) == model.tensors);
}

#[test]
fn what_lies_beside_the_weights_travels() {
    let root = Model::tied().folder();
    let model = root.path().join("model");
    fs::create_dir(model.join("additional_chat_templates")).expect("new");
    let files = [
        ("tokenizer.json", "{}"),
        ("tokenizer.model", "\u{1}binary"),
        ("generation_config.json", "{\"eos_token_id\": [1, 2]}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools }}"),
        ("LICENSE", "terms"),
    ];
    for (name, content) in files {
        fs::write(model.join(name), content).expect("writable");
    }
    fs::write(model.join("training_args.bin"), "not part of the model").expect("writable");
    let spelled = format!("  {}\n\n", Model::tied().config);
    fs::write(model.join("config.json"), &spelled).expect("writable");
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    export(&root, "per-head", "back", &Default::default()).expect("valid");
    for folder in ["per-head", "back"] {
        let folder = root.path().join(folder);
        for (name, content) in files {
            assert_eq!(fs::read_to_string(folder.join(name)).expect(name), content);
        }
        assert!(!folder.join("training_args.bin").exists());
        assert_eq!(
            fs::read_to_string(folder.join("config.json")).expect("there"),
            spelled,
            "unchanged to the last space"
        );
        let checkpoint = Checkpoint::open(&folder).expect("valid");
        assert_eq!(checkpoint.side_file("LICENSE").expect("readable").as_deref(), Some(&b"terms"[..]));
        assert_eq!(checkpoint.side_file("merges.txt").expect("no error"), None);
        assert_eq!(checkpoint.side_files().expect("readable").len(), files.len());
    }
}

/// Any sizes, any grouping, with and without biases and a head.
fn config() -> impl Strategy<Value = Value> {
    let sizes = (1usize..70, 1usize..80, 1usize..4, 1usize..4, 1usize..5, 1usize..50, 0usize..3);
    (sizes, any::<[bool; 3]>()).prop_map(|((v, m, g, r, half, f, l), [tied, attention_bias, mlp_bias])| {
        json!({
            "model_type": "llama", "vocab_size": v, "hidden_size": m, "num_hidden_layers": l + 1,
            "num_attention_heads": g * r, "num_key_value_heads": g, "head_dim": 2 * half, "intermediate_size": f,
            "tie_word_embeddings": tied, "attention_bias": attention_bias, "mlp_bias": mlp_bias,
            "bos_token_id": null, "eos_token_id": null,
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_shape_returns(config in config(), dtype in prop::sample::select(DType::ALL.to_vec()), shard in 1u64..20_000) {
        let model = Model::random(config, dtype);
        let root = model.folder();
        let options = ConvertOptions { shard_size: Some(shard), threads: 2, ..Default::default() };
        convert(&root, "model", "per-head", &options).expect("valid");
        export(&root, "per-head", "back", &Default::default()).expect("valid");
        prop_assert!(read_tensors(&root.path().join("back")) == model.tensors);
    }
}
