//! Pins what bad input gets: one clear error and the exit code of the contract, or the sensible behaviour; no panic,
//! and nothing under a final name.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use npyz::WriterBuilder;
use serde_json::{Value, json};

use crate::support::{Folder, Tiny, byte_id, finish, golden, run, signal, wait_for, xllama};

/// Every command that opens a checkpoint refuses this one in the same words; a conversion leaves nothing behind.
#[track_caller]
fn refused(folder: &Folder, model: &str, parts: &[&str]) {
    run(["inspect", "--model", model]).fails(1, parts);
    let before = folder.names();
    run(["convert-params", model, &folder.arg("out")]).fails(1, parts);
    assert_eq!(folder.names(), before, "a conversion that failed left something behind");
}

/// A safetensors file of this header and this much data.
fn safetensors(header: &[u8], data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, &vec![0; data]].concat()
}

#[test]
fn damaged_safetensors_files() {
    let tiny = Tiny::constant(&[0.0; 5]);
    let folder = tiny.folder();
    let file = folder.path("model/model.safetensors");
    let whole = tiny.safetensors();
    let header_end = 8 + u64::from_le_bytes(whole[..8].try_into().expect("8 bytes")) as usize;
    let two = |second: &str| {
        let a = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
        safetensors(format!(r#"{{{a},"b":{second}}}"#).as_bytes(), 16)
    };
    for (name, bytes, part) in [
        ("no bytes", vec![], "not a safetensors file"),
        ("a piece of the length", whole[..5].to_vec(), "not a safetensors file: 5 bytes"),
        ("cut in the header", whole[..header_end - 3].to_vec(), "truncated"),
        ("cut in the data", whole[..whole.len() - 1].to_vec(), "truncated"),
        ("bytes after the end", [&whole[..], b"x"].concat(), "the tensors end at byte"),
        ("a header of 2^64 - 1 bytes", [&[0xff; 8], &whole[8..]].concat(), "18446744073709551615 bytes, more than"),
        ("a header of 100 MB and 1", [&100_000_001u64.to_le_bytes(), &whole[8..]].concat(), "100000001 bytes"),
        ("a header that is not UTF-8", safetensors(b"{\"a\xff\":1}", 0), "not UTF-8 at byte 3"),
        ("a header that is not JSON", safetensors(b"{\"a\":", 0), "the header is not valid"),
        ("a header that is no object", safetensors(b"[1]", 0), "the header is not valid"),
        ("overlapping tensors", two(r#"{"dtype":"F32","shape":[3],"data_offsets":[4,16]}"#), "tensor b at bytes 4 to 16 overlaps"),
        ("a hole", two(r#"{"dtype":"F32","shape":[1],"data_offsets":[12,16]}"#), "leaves a hole"),
        ("offsets backwards", two(r#"{"dtype":"F32","shape":[2],"data_offsets":[16,8]}"#), "does not fill bytes 16 to 8"),
        ("past the end", two(r#"{"dtype":"F32","shape":[4],"data_offsets":[8,24]}"#), "truncated"),
        (
            "a shape that overflows",
            two(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[8,16]}"#),
            "does not fill bytes 8 to 16",
        ),
        ("an unknown type", two(r#"{"dtype":"F33","shape":[2],"data_offsets":[8,16]}"#), "the header is not valid"),
        (
            "a tensor twice",
            safetensors(br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
            "described twice",
        ),
    ] {
        println!("{name}");
        fs::write(&file, bytes).expect("writable");
        refused(&folder, &folder.model(), &["model.safetensors: ", part]);
    }
    run(["generate", "x", "--model", &folder.model()]).fails(1, &["model.safetensors: "]);
}

#[test]
fn gguf_files_with_absurd_counts() {
    let folder = Folder::new();
    let file = |tensors: u64, pairs: u64, rest: &[u8]| {
        [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &pairs.to_le_bytes(), rest].concat()
    };
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let array = |len: u64| {
        [string("k"), 9u32.to_le_bytes().to_vec(), 4u32.to_le_bytes().to_vec(), len.to_le_bytes().to_vec()].concat()
    };
    for (name, bytes, part) in [
        ("only the magic number", b"GGUF".to_vec(), "ends at byte 4"),
        ("2^64 - 1 tensors", file(u64::MAX, 0, &[]), "the number of tensors is 18446744073709551615"),
        ("2^60 pairs", file(0, 1 << 60, &[]), "the number of metadata pairs is 1152921504606846976"),
        (
            "a name of 2^63 bytes",
            file(0, 1, &[&(1u64 << 63).to_le_bytes()[..], &[0; 8]].concat()),
            "9223372036854775808",
        ),
        ("an array of 2^62 elements", file(0, 1, &array(1 << 62)), "the length of metadata `k` is 4611686018427387904"),
        ("nothing in it", file(0, 0, &[]), "general.architecture"),
        ("version 9", [b"GGUF", &9u32.to_le_bytes()[..], &[0; 16]].concat(), "GGUF version 9"),
    ] {
        println!("{name}");
        fs::write(folder.path("x.gguf"), bytes).expect("writable");
        refused(&folder, &folder.arg("x.gguf"), &["x.gguf", part]);
    }
    fs::write(folder.path("x.gguf"), "hello").expect("writable");
    refused(&folder, &folder.arg("x.gguf"), &["or a GGUF file"]);
}

#[test]
fn tensors_that_do_not_belong_to_the_configuration() {
    let q = "model.layers.0.self_attn.q_proj.weight";
    let change = |change: &dyn Fn(&mut Tiny), part: &str| {
        let mut tiny = Tiny::constant(&[0.0; 5]);
        change(&mut tiny);
        let folder = tiny.folder();
        refused(&folder, &folder.model(), &[part]);
    };
    change(&|t| drop(t.tensors.remove(q)), "1 parameter missing: model.layers.0.self_attn.q_proj.weight [24, 8]");
    change(
        &|t| drop(t.tensors.insert("model.layers.0.self_attn.q_norm.weight".into(), (vec![6], vec![1.0; 6]))),
        "1 tensor that this model does not use: model.layers.0.self_attn.q_norm.weight [6]",
    );
    change(
        &|t| t.tensors.get_mut(q).expect("there").0 = vec![8, 24],
        "expected shape [24, 8] from config.json (4 heads × 6, hidden 8), found [8, 24]",
    );
    change(&|t| t.config["num_key_value_heads"] = json!(4), "k_proj.weight: expected shape [24, 8]");
}

#[test]
fn configurations_that_are_not_supported() {
    let folder = Folder::new();
    for (key, value, parts) in [
        ("model_type", json!("gpt2"), ["model_type", "gpt2"]),
        ("model_type", Value::Null, ["model_type", "llama"]),
        ("hidden_act", json!("swoosh"), ["hidden_act", "swoosh"]),
        ("rope_scaling", json!({"rope_type": "spiral", "factor": 2.0}), ["rope_type", "spiral"]),
        ("rope_scaling", json!({"type": "longrope", "factor": 2.0}), ["rope_scaling", "longrope"]),
        ("rope_parameters", json!({"rope_type": "yarn", "factor": -2.0, "rope_theta": 1e4}), ["factor", "-2"]),
        ("num_attention_heads", json!(3), ["num_attention_heads", "3"]),
        ("num_hidden_layers", json!(1u64 << 60), ["num_hidden_layers", "1152921504606846976"]),
        ("head_dim", json!(0), ["head_dim", "0"]),
        ("head_dim", json!(5), ["head_dim", "5"]),
        ("vocab_size", json!(-1), ["vocab_size", "-1"]),
        ("rms_norm_eps", json!("small"), ["rms_norm_eps", "small"]),
        ("rope_theta", json!(0.0), ["rope_theta", "0"]),
        ("logit_softcap_that_nobody_knows", json!(30.0), ["logit_softcap_that_nobody_knows", "30"]),
        ("quantization_config", json!({"quant_method": "fp8"}), ["quantization_config", "fp8"]),
    ] {
        println!("{key} {value}");
        let _ = fs::remove_dir_all(folder.path("model"));
        Tiny::constant(&[0.0; 5]).with(key, value).write(&folder.path("model"));
        refused(&folder, &folder.model(), &parts);
    }
}

#[test]
fn token_ids_out_of_range() {
    let model = golden("gqa2"); // 211 ids
    let folder = Folder::new();
    let out = folder.arg("x.npz");
    let range = "the vocabulary has 211 ids, 0 to 210";
    let logits = |input: &[&str], code: i32, parts: &[&str]| {
        run([&["logits", "--model", &model, "--out", &out], input].concat()).fails(code, parts);
        assert!(!folder.path("x.npz").exists());
    };
    logits(&["--tokens", "1,211"], 1, &["token id 211", "--tokens", range]);
    logits(&["--tokens", "1,-1,2"], 1, &["token id -1", range]);
    logits(&["--tokens", "-7"], 1, &["token id -7", range]);
    logits(&["--tokens", "99999999999"], 1, &["token id 99999999999", range]);
    logits(&["--tokens", "1,x"], 2, &["x"]);
    logits(&["--tokens", ""], 2, &["--tokens"]);
    logits(&[], 2, &["required"]);

    let npy = folder.arg("t.npy");
    let write = |shape: &[u64], ids: &[i32]| {
        let file = fs::File::create(&npy).expect("writable");
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(file).begin_nd().expect("NumPy");
        writer.extend(ids.iter().copied()).expect("writable");
        writer.finish().expect("writable");
    };
    write(&[2], &[1, 5000]);
    logits(&["--tokens-file", &npy], 1, &["token id 5000", "t.npy", range]);
    write(&[1, 2], &[1, 2]);
    logits(&["--tokens-file", &npy], 1, &["t.npy", "expected one dimension, found shape [1, 2]"]);
    write(&[0], &[]);
    logits(&["--tokens-file", &npy], 1, &["empty"]);
    fs::write(&npy, "hello").expect("writable");
    logits(&["--tokens-file", &npy], 1, &["t.npy: not a NumPy file"]);
    let floats = fs::File::create(&npy).expect("writable");
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&[1]).writer(floats).begin_nd().expect("NumPy");
    writer.extend([1.5f32]).expect("writable");
    writer.finish().expect("writable");
    logits(&["--tokens-file", &npy], 1, &["t.npy: expected 32- or 64-bit integers, found '<f4'"]);
    logits(&["--tokens-file", &folder.arg("none.npy")], 1, &["none.npy"]);

    // A tokenizer that knows more ids than the model has.
    let small = Folder::new();
    Tiny { tokenizer: Some("byte_tokens"), ..Tiny::constant(&[0.0; 50]) }.write(&small.path("model"));
    run(["generate", "hello", "--model", &small.model()]).fails(1, &["token id", "the vocabulary has 50 ids, 0 to 49"]);
    run(["generate", "x", "--model", &small.model(), "--logit-bias", "50=1"]).fails(1, &["token id 50 in logit-bias"]);
}

#[test]
fn prompts_longer_than_the_context() {
    let folder = Tiny::random().with("max_position_embeddings", json!(24)).folder();
    let model = folder.model();
    let generate = |args: &[&str]| run([&["generate", "--json", "--model", &model], args].concat());
    let long = "abcdefghijklmnopqrstuvwxyz 0123456789";
    generate(&[long])
        .fails(1, &["the prompt of ", "24 is the limit (max_position_embeddings of the model)", "shorten"]);
    generate(&["abcdefgh", "--max-seq", "4"]).fails(1, &["4 is the limit (--max-seq)"]);
    generate(&["a", "--max-seq", "25"]).fails(2, &["--max-seq must be between 1 and 24", "found 25"]);
    generate(&["a", "--max-seq", "0"]).fails(2, &["--max-seq must be between 1 and 24"]);
    let tokens = vec!["5"; 25].join(",");
    run(["logits", "--model", &model, "--tokens", &tokens, "--out", &folder.arg("x.npz")])
        .fails(1, &["the prompt of 25 tokens", "24 is the limit"]);
    run(["bench", "--model", &model, "--prompt-tokens", "20", "--gen-tokens", "5"]).fails(1, &["24 is the limit"]);
    run(["bench", "--model", &model, "--save", "dots"]).fails(2, &["--save", "--train"]);
    run(["bench", "--model", &model, "--microbatches", "2"]).fails(2, &["--microbatches", "--train"]);
    let compile = ["compile", "--model", &model, "--target", "cpu", "--lora-rank", "2"];
    run(compile).fails(2, &["--lora-rank", "--program train"]);

    // A prompt that just fits still gets the one token that needs no further position; a shorter one fills the context.
    let done = generate(&["ab", "--max-tokens", "1000000", "--logit-bias", "2=-inf"]).json();
    let (prompt, tokens) =
        (done["prompt_tokens"].as_u64().expect("a count"), done["tokens"].as_array().expect("ids").len());
    assert_eq!((prompt + tokens as u64, done["finish_reason"].as_str()), (25, Some("length")), "{done}");
    let most = usize::MAX.to_string();
    assert_eq!(generate(&["ab", "--max-tokens", &most, "--logit-bias", "2=-inf"]).json()["tokens"], done["tokens"]);
}

#[test]
fn nothing_to_generate_and_nothing_to_begin_with() {
    let folder = Tiny::says("once, Mr", 2).folder();
    let model = folder.model();
    let none = run(["generate", "x", "--max-tokens", "0", "--json", "--model", &model]).json();
    assert_eq!(
        (none["text"].as_str(), &none["tokens"], none["finish_reason"].as_str()),
        (Some(""), &json!([]), Some("length"))
    );
    assert_eq!(none["prompt_tokens"], 2); // <s>, x

    // An empty prompt is the first token alone.
    for args in [&["generate", ""][..], &["generate"], &["generate", "-"]] {
        let empty = run([args, &["--json", "--model", &model]].concat()).json();
        assert_eq!((empty["prompt_tokens"].as_u64(), empty["text"].as_str()), (Some(1), Some("once, Mr")), "{empty}");
    }

    // Without a first token there is nothing to begin with.
    let folder = Folder::new();
    Tiny::random().with("bos_token_id", Value::Null).write(&folder.path("model"));
    let text = fs::read_to_string(folder.path("model/tokenizer.json")).expect("there");
    let mut tokenizer: Value = serde_json::from_str(&text).expect("JSON");
    tokenizer["post_processor"] = Value::Null;
    fs::write(folder.path("model/tokenizer.json"), tokenizer.to_string()).expect("writable");
    run(["generate", "", "--model", &folder.model()]).fails(1, &["the prompt has no tokens", "give a prompt"]);

    // A model without a tokenizer cannot read a prompt at all.
    run(["generate", "x", "--model", &golden("gqa2")]).fails(1, &["tokenizer.json"]);
}

#[test]
fn sampling_parameters_that_are_no_numbers() {
    let folder = Tiny::random().folder();
    for (option, values) in [
        ("--temperature", &["nan", "-1", "inf", "-inf", "warm", ""][..]),
        ("--top-p", &["nan", "0", "-0.5", "1.5", "inf"]),
        ("--min-p", &["nan", "-0.1", "1.1"]),
        ("--top-k", &["-1", "nan", "1.5"]),
        ("--repetition-penalty", &["nan", "0", "-1", "inf"]),
        ("--presence-penalty", &["nan", "inf"]),
        ("--frequency-penalty", &["nan", "-inf"]),
        ("--logit-bias", &["5", "x=1", "5=nan", "5=inf", "-1=2"]),
        ("--seed", &["-1", "x"]),
        ("--max-tokens", &["-1", "many"]),
    ] {
        for value in values {
            let argument = format!("{option}={value}");
            println!("{argument}");
            let generate = run(["generate", "x", "--model", &folder.model(), &argument]);
            generate.fails(2, &[option.trim_start_matches('-')]);
        }
    }
    // Chat checks the same before it loads anything.
    run(["chat", "--model", "none", "--temperature", "nan"]).fails(2, &["temperature"]);
}

#[test]
fn plugins_that_are_no_plugins() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let text = folder.arg("plugin.so");
    fs::write(&text, "not a plugin").expect("writable");
    let maps = fs::read_to_string("/proc/self/maps").expect("Linux");
    let library =
        maps.split_whitespace().find(|w| w.contains("/libc.so") || w.contains("/libc-")).expect("libc").to_string();
    for (device, parts) in [
        (text.as_str(), &["plugin.so"][..]),
        ("/nowhere/plugin.so", &["/nowhere/plugin.so"]),
        (&library, &[&library, "GetPjrtApi"]),
        (&model, &["model"]),
        ("quantum", &["quantum", "neither cpu, cuda nor tpu"]),
        ("", &["device"]),
    ] {
        println!("{device}");
        run(["generate", "x", "--model", &model, "--device", device]).fails(1, parts);
        run(["devices", "--device", device, "--json"]).fails(1, parts);
    }
    let same = finish(xllama().env("XLLAMA_DEVICE", &text).args(["devices"]));
    same.fails(1, &["plugin.so"]);
}

/// Greedy text of the model with a cache of its own, and what was said about it.
fn with_cache(cache: &Path, model: &str) -> (Value, String) {
    let run = finish(xllama().env("XLLAMA_CACHE", cache).args([
        "generate",
        "abc",
        "--max-tokens",
        "5",
        "--json",
        "--model",
        model,
    ]));
    (run.json()["tokens"].clone(), run.stderr)
}

#[test]
fn a_damaged_cache_entry_is_compiled_again() {
    let folder = Tiny::random().folder();
    let cache = folder.path("cache");
    let (tokens, said) = with_cache(&cache, &folder.model());
    assert!(!said.contains("not used"), "{said}");
    let entries: Vec<PathBuf> =
        fs::read_dir(cache.join("executables")).expect("a folder").map(|e| e.expect("an entry").path()).collect();
    assert!(entries.len() >= 2, "{entries:?}");
    let other = fs::read(&entries[0]).expect("readable");

    type Damage<'a> = &'a dyn Fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 5] = [
        ("a bit flipped", &|bytes| *bytes.last_mut().expect("bytes") ^= 1),
        ("cut", &|bytes| bytes.truncate(bytes.len() / 2)),
        ("emptied", &|bytes| bytes.clear()),
        ("something else", &|bytes| *bytes = b"hello".to_vec()),
        ("well-formed, but no executable", &|bytes| {
            use sha2::Digest;
            let content = b"\0\0\0\0no executable";
            bytes.truncate(16);
            bytes.extend(sha2::Sha256::digest(content));
            bytes.extend(content);
        }),
    ];
    for (name, damage) in damages {
        println!("{name}");
        for entry in &entries {
            let mut bytes = fs::read(entry).expect("readable");
            damage(&mut bytes);
            fs::write(entry, bytes).expect("writable");
        }
        let (again, said) = with_cache(&cache, &folder.model());
        assert_eq!(again, tokens);
        assert!(said.contains("is not used") && said.contains("compiling again"), "{said}");
        let (healed, said) = with_cache(&cache, &folder.model());
        assert_eq!(healed, tokens);
        assert!(!said.contains("not used"), "{said}");
    }
    assert_eq!(fs::read(&entries[0]).expect("readable").len(), other.len());
    assert!(fs::read_dir(cache.join("executables")).expect("a folder").count() == entries.len(), "leftovers");

    // A folder where an entry should be cannot be replaced: a warning, and the right text.
    fs::remove_file(&entries[0]).expect("there");
    fs::create_dir_all(entries[0].join("x")).expect("new");
    let (blocked, said) = with_cache(&cache, &folder.model());
    assert_eq!(blocked, tokens);
    assert!(said.contains("not cached"), "{said}");
}

#[test]
fn a_cache_that_cannot_be_written() {
    let folder = Tiny::random().folder();
    let file = folder.path("file");
    fs::write(&file, "").expect("writable");
    let (tokens, _) = with_cache(&folder.path("cache"), &folder.model());
    let (same, said) = with_cache(&file.join("x"), &folder.model());
    assert_eq!(same, tokens);
    assert!(said.contains("WARN") && said.contains("not cached in"), "{said}");

    // Where something has to be fetched into it, that is the error.
    for args in [&["generate", "x", "--model", &folder.model(), "--device", "cpu"][..], &["plugin", "install", "cpu"]] {
        finish(xllama().env("XLLAMA_CACHE", file.join("x")).args(args)).fails(1, &["file/x"]);
    }
    finish(xllama().env("XLLAMA_CACHE", file.join("x")).args(["inspect"])).fails(1, &["file/x"]);
}

/// The program in a shell that ends every file after `blocks` of 512 or 1024 bytes, as a full disk does.
fn on_a_full_disk(blocks: usize, args: &[&str]) -> Command {
    let program = xllama();
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\""), "sh"])
        .arg(program.get_program())
        .args(args);
    command.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command
}

#[test]
fn a_full_disk() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let (tokens, _) = with_cache(&folder.path("cache"), &model);
    let mut generate = on_a_full_disk(2, &["generate", "abc", "--max-tokens", "5", "--json", "--model", &model]);
    let run = finish(generate.env("XLLAMA_CACHE", folder.path("full")));
    assert_eq!(run.json()["tokens"], tokens);
    assert!(run.stderr.contains("not cached in"), "{}", run.stderr);
    assert_eq!(fs::read_dir(folder.path("full/executables")).expect("a folder").count(), 0, "a partial entry");

    let before = folder.names();
    for command in ["convert-params", "export-hf"] {
        finish(&mut on_a_full_disk(8, &[command, &model, &folder.arg("out")])).fails(1, &["writing", "File too large"]);
        assert_eq!(folder.names(), before);
    }
    let logits = ["logits", "--model", &model, "--tokens", "1,2,3", "--out", &folder.arg("x.npz")];
    finish(on_a_full_disk(2, &logits).env("XLLAMA_CACHE", folder.path("cache"))).fails(1, &["x.npz"]);
    assert_eq!(folder.names(), before);
}

#[test]
fn destinations_and_models_that_cannot_be_used() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    run(["convert-params", &model, &model]).fails(1, &["is the source or holds it"]);
    fs::create_dir_all(folder.path("full/x")).expect("new");
    run(["convert-params", &model, &folder.arg("full")]).fails(1, &["exists and is not empty; remove it"]);
    run(["export-hf", &model, &folder.arg("model/config.json")]).fails(1, &["not a folder"]);
    run(["logits", "--model", &model, "--tokens", "1", "--out", &folder.arg("none/x.npz")]).fails(1, &["none"]);
    for name in ["nothing-like-this", "org/nothing-like-this", "/nowhere"] {
        run(["inspect", "--model", name]).fails(1, &[name, "no such file or folder"]);
    }
    run(["inspect", "--model", ""]).fails(1, &["model"]);
    assert_eq!(folder.names(), ["full", "model"]);
}

/// A checkpoint that takes a while to convert: 1.6 GB, all of it holes.
fn big(folder: &Folder) -> String {
    let config = json!({
        "model_type": "llama", "vocab_size": 1024, "hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 16, "intermediate_size": 5461, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "hidden_act": "silu", "rope_theta": 10000.0, "torch_dtype": "float32",
    });
    let cfg = converter::ModelConfig::from_value(&config, Path::new("config.json")).expect("valid");
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for tensor in converter::Llama::declare(&cfg).hf_tensors() {
        let begin = end;
        end += 4 * tensor.shape.iter().product::<usize>();
        header.insert(tensor.name, json!({ "dtype": "F32", "shape": tensor.shape, "data_offsets": [begin, end] }));
    }
    let start = safetensors(Value::Object(header).to_string().as_bytes(), 0);
    fs::create_dir(folder.path("big")).expect("new");
    fs::write(folder.path("big/config.json"), config.to_string()).expect("writable");
    fs::write(folder.path("big/model.safetensors"), &start).expect("writable");
    let file = fs::OpenOptions::new().write(true).open(folder.path("big/model.safetensors")).expect("there");
    file.set_len((start.len() + end) as u64).expect("a sparse file");
    folder.arg("big")
}

#[test]
fn conversions_that_are_ended_leave_nothing_under_the_final_name() {
    let folder = Tiny::random().folder();
    let source = big(&folder);
    let partial = || folder.names().into_iter().find(|n| n.starts_with("out.partial-"));
    let begin = || {
        let mut command = xllama();
        command.args(["convert-params", &source, &folder.arg("out"), "--dtype", "bf16"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        wait_for("the conversion has begun", || {
            partial().is_some_and(|n| folder.path(&n).join("params.safetensors").exists())
        });
        child
    };

    for name in ["INT", "TERM"] {
        let child = begin();
        signal(&child, name);
        let output = child.wait_with_output().expect("it ends");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().filter(|l| l.starts_with("error:")).count(), 1, "{stderr}");
        assert_eq!(folder.names(), ["big", "model"], "after SIG{name}: {stderr}");
    }

    let child = begin();
    signal(&child, "KILL");
    assert_eq!(child.wait_with_output().expect("it ends").status.code(), None);
    assert!(partial().is_some() && !folder.path("out").exists(), "{:?}", folder.names());
    // The next conversion to the same place succeeds and takes the leftovers away.
    run(["convert-params", &folder.model(), &folder.arg("out")]).ok();
    assert_eq!(folder.names(), ["big", "model", "out"]);
    run(["inspect", "--model", &folder.arg("out")]).ok();
}

#[test]
fn ctrl_c_ends_a_text() {
    // An endless text with line ends, so that it comes through the pipe at once.
    let folder = Tiny::says("abc\n", byte_id(b'a')).with("max_position_embeddings", json!(1 << 20)).folder();
    let model = folder.model();
    let mut command = xllama();
    command.args(["generate", "--max-tokens", "100000", "--model", &model]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert_eq!(lines.next().expect("a line").expect("text"), "abc");
    signal(&child, "INT");
    assert!(lines.all(|l| l.is_ok_and(|l| "abc".starts_with(&l))), "whole lines and the beginning of one");
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(1));
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error:")).collect();
    assert_eq!(errors, ["error: interrupted"], "{stderr}");
}

#[test]
fn a_closed_pipe_is_no_panic() {
    let folder = Tiny::says("abc\n", byte_id(b'a')).folder();
    let program = xllama();
    let line = format!(
        "{} generate --max-tokens 3000 --model {} | head -n 1",
        program.get_program().display(),
        folder.model()
    );
    let mut shell = Command::new("sh");
    shell.args(["-c", &line]);
    shell.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let run = finish(&mut shell);
    assert_eq!(run.ok(), "abc\n");
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
}

/// The options of several processes are checked before anything is loaded.
#[test]
fn several_processes_must_agree_with_themselves_and_the_plugin() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let generate = |more: &[&str]| run(["generate", "", "--model", &model].iter().chain(more));
    generate(&["--process-index", "2", "--process-count", "2"]).fails(2, &["2"]);
    generate(&["--process-index", "0", "--process-count", "2"]).fails(2, &["one process"]);
}
