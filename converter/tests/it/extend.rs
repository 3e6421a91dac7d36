//! Pins what a larger vocabulary and a longer context change, bit for bit, and that nothing else changes. What new tokens
//! and rows must be was computed by `scripts/make_extension_vectors.py` with PyTorch and transformers.

use std::fs;
use std::path::{Path, PathBuf};

use converter::config::RopeExtension;
use converter::{AddedTokens, Checkpoint, ConvertOptions, DType, Extension, ModelConfig};
use half::bf16;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokenizers::Tokenizer;

use crate::support::{Model, Tensor, convert, export, names, read_tensors};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn byte_level() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/chat/tokenizers/byte_level.json")
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("there")).expect("JSON")
}

fn with(extension: Extension) -> ConvertOptions {
    ConvertOptions { extension, ..Default::default() }
}

fn to_size(size: usize) -> ConvertOptions {
    with(Extension { vocab_size: Some(size), ..Default::default() })
}

fn tokens(text: &str) -> Option<AddedTokens> {
    Some(AddedTokens::parse(text, Path::new("tokens.txt")).expect("tokens"))
}

fn adding(text: &str) -> ConvertOptions {
    with(Extension { tokens: tokens(text), ..Default::default() })
}

fn scaled(rope: &str) -> ConvertOptions {
    let rope: RopeExtension = rope.parse().expect("a scaling");
    with(Extension { rope: Some(rope), ..Default::default() })
}

/// `rows`, with `count` times `mean` behind them.
fn grown(rows: &Tensor, mean: &[u8], count: usize) -> Tensor {
    (rows.0, vec![rows.1[0] + count, rows.1[1]], [rows.2.as_slice(), &mean.repeat(count)].concat())
}

/// The mean of the rows of a float32 tensor.
fn means(rows: &Tensor) -> Vec<f64> {
    let values: Vec<f64> = rows.2.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect();
    let column = |c: usize| values[c..].iter().step_by(rows.1[1]).sum::<f64>() / rows.1[0] as f64;
    (0..rows.1[1]).map(column).collect()
}

fn mean_f32(rows: &Tensor) -> Vec<u8> {
    means(rows).into_iter().flat_map(|x| (x as f32).to_le_bytes()).collect()
}

#[test]
fn new_rows_are_the_mean_that_pytorch_computes() {
    let bytes = fs::read(data("extension.safetensors")).expect("there");
    let vectors = SafeTensors::deserialize(&bytes).expect("a valid file");
    for dtype in DType::ALL {
        let vector = |what: &str| vectors.tensor(&format!("{}.{what}", dtype.torch_name())).expect("there");
        let rows = vector("rows");
        let rows: Tensor = (rows.dtype(), rows.shape().to_vec(), rows.data().to_vec());
        let mut model = Model::random(Model::small().config, dtype);
        model.tensors.insert(EMBEDDING.into(), rows.clone());
        model.tensors.insert(HEAD.into(), rows.clone());
        let root = model.folder();
        let mut expected = model.tensors;
        for name in [EMBEDDING, HEAD] {
            expected.insert(name.into(), grown(&rows, vector("mean").data(), 7));
        }

        // in one step, before the layout changes, and after: a head that is transposed on disk has ids as columns
        export(&root, "model", "direct", &to_size(40)).expect("valid");
        convert(&root, "model", "extended", &to_size(40)).expect("valid");
        export(&root, "extended", "first", &Default::default()).expect("valid");
        convert(&root, "model", "per-head", &Default::default()).expect("valid");
        export(&root, "per-head", "then", &to_size(40)).expect("valid");
        convert(&root, "per-head", "again", &to_size(40)).expect("valid");
        for name in ["direct", "first", "then"] {
            assert!(read_tensors(&root.path().join(name)) == expected, "{dtype} {name}");
        }
        assert!(read_tensors(&root.path().join("again")) == read_tensors(&root.path().join("extended")), "{dtype}");
    }
}

#[test]
fn a_mean_is_rounded_once() {
    let model = Model::small();
    let root = model.folder();
    let options = ConvertOptions { dtype: Some(DType::BF16.into()), ..to_size(34) };
    convert(&root, "model", "per-head", &options).expect("valid");
    export(&root, "per-head", "back", &Default::default()).expect("valid");
    let back = read_tensors(&root.path().join("back"));
    for name in [EMBEDDING, HEAD] {
        let expected: Vec<u8> =
            means(&model.tensors[name]).into_iter().flat_map(|x| bf16::from_f64(x).to_le_bytes()).collect();
        assert!(back[name].2[33 * 20 * 2..] == expected, "{name}");
    }
}

#[test]
fn only_the_vocabulary_changes_and_a_tied_head_stays_tied() {
    let model = Model::tied();
    let root = model.folder();
    let report = export(&root, "model", "out", &to_size(50)).expect("valid");
    assert_eq!((report.vocab_size, report.added_tokens), (50, 0));
    assert_eq!(report.notes, ["the vocabulary has 50 ids, 33 in the source; new rows are the mean of the source's"]);
    let mut expected = model.tensors.clone();
    let rows = &model.tensors[EMBEDDING];
    expected.insert(EMBEDDING.into(), grown(rows, &mean_f32(rows), 17));
    assert!(read_tensors(&root.path().join("out")) == expected);
    let mut config = model.config.clone();
    config["vocab_size"] = json!(50);
    assert_eq!(json_file(&root.path().join("out/config.json")), config);
    assert_eq!(names(&root.path().join("out")), ["config.json", "model.safetensors"]);
}

#[test]
fn the_size_that_it_has_changes_nothing() {
    let model = Model::small();
    let root = model.folder();
    let spelled = format!(" {}\n\n", model.config);
    fs::write(root.path().join("model/config.json"), &spelled).expect("writable");
    let report = export(&root, "model", "out", &to_size(33)).expect("valid");
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert_eq!(fs::read_to_string(root.path().join("out/config.json")).expect("there"), spelled);
    assert!(read_tensors(&root.path().join("out")) == model.tensors);
}

#[test]
fn an_extended_checkpoint_can_be_read_as_it_is() {
    let root = Model::small().folder();
    let extension = Extension { vocab_size: Some(40), ..Default::default() };
    convert(&root, "model", "written", &with(extension.clone())).expect("valid");
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    let written = Checkpoint::open(&root.path().join("written")).expect("valid");
    for source in ["model", "per-head"] {
        let checkpoint = Checkpoint::open(&root.path().join(source)).expect("valid");
        let checkpoint = checkpoint.extended(&extension).expect("larger");
        assert_eq!(checkpoint.config(), written.config());
        for (param, same) in checkpoint.params().iter().into_iter().zip(written.params().iter()) {
            assert_eq!(param, same);
            let [a, b] = [&checkpoint, &written].map(|c| c.read(param, DType::F32).expect("readable"));
            assert!(a.as_bytes() == b.as_bytes(), "{source} {}", param.name);
        }
        let embedding = &checkpoint.params().embedding;
        assert!(checkpoint.place(embedding).expect("no error").is_none(), "only a part of it is on disk");
    }
}

/// A model with as many ids as the tokenizer has, in a folder with these files.
fn with_tokenizer(vocab: usize, files: &[(&str, Vec<u8>)]) -> (Model, TempDir) {
    let mut config = Model::small().config;
    config["vocab_size"] = json!(vocab);
    let model = Model::random(config, DType::F32);
    let root = model.folder();
    for (name, content) in files {
        fs::write(root.path().join("model").join(name), content).expect("writable");
    }
    (model, root)
}

#[test]
fn texts_get_the_ids_that_transformers_gives() {
    let vectors = json_file(&data("extension.json"));
    let list = vectors["tokens"].to_string();
    let settings = json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "legacy": false});
    let byte_level = [("tokenizer.json", fs::read(byte_level()).expect("there"))];
    let spm_bpe = [
        ("tokenizer.model", fs::read(data("spm_bpe.model")).expect("there")),
        ("tokenizer_config.json", settings.to_string().into_bytes()),
    ];
    for (name, size, files) in [("byte_level", 319, &byte_level[..]), ("spm_bpe", 400, &spm_bpe)] {
        let (model, root) = with_tokenizer(size, files);
        let report = convert(&root, "model", "out", &adding(&list)).expect("valid");
        assert_eq!((report.vocab_size, report.added_tokens), (size + 6, 6));
        let note = format!("the added tokens have the ids {size} to {}", size + 5);
        assert_eq!(report.notes.last(), Some(&note));
        let out = root.path().join("out");
        let tokenizer = Tokenizer::from_file(out.join("tokenizer.json")).expect("a tokenizer");
        for case in vectors["tokenizers"][name]["texts"].as_array().expect("a list") {
            let text = case[0].as_str().expect("a text");
            let ids: Vec<u32> = serde_json::from_value(case[1].clone()).expect("ids");
            assert_eq!(tokenizer.encode(text, true).expect("encodes").get_ids(), ids, "{name} {text:?}");
            assert_eq!(tokenizer.decode(&ids, true).expect("decodes"), case[2].as_str().expect("a text"), "{name}");
        }
        let rows = &model.tensors[EMBEDDING];
        export(&root, "out", "back", &Default::default()).expect("valid");
        assert!(read_tensors(&root.path().join("back"))[EMBEDDING] == grown(rows, &mean_f32(rows), 6), "{name}");
    }
}

#[test]
fn files_of_the_tokenizer_agree_and_keep_what_they_had() {
    let tokenizer = fs::read_to_string(byte_level()).expect("there");
    let config = "{\n  \"model_max_length\": 1000000000000000019884624838656,\n  \"added_tokens_decoder\": {\n    \
                  \"0\": {\"content\": \"<unk>\"}\n  },\n  \"bos_token\": \"<s>\"\n}\n";
    let files = [
        ("tokenizer.json", tokenizer.clone().into_bytes()),
        ("tokenizer_config.json", config.as_bytes().to_vec()),
        ("added_tokens.json", b"{}\n".to_vec()),
        ("vocab.json", b"{}".to_vec()),
    ];
    let (_, root) = with_tokenizer(319, &files);
    let list = "<a \"b\">\n{\"content\": \"<é>\", \"special\": true}\n";
    export(&root, "model", "out", &adding(list)).expect("valid");
    let read = |name: &str| fs::read_to_string(root.path().join("out").join(name)).expect("there");
    assert_eq!(
        read("tokenizer_config.json"),
        "{\n  \"model_max_length\": 1000000000000000019884624838656,\n  \"added_tokens_decoder\": {\n    \
         \"0\": {\"content\": \"<unk>\"},\n    \
         \"319\":{\"content\":\"<a \\\"b\\\">\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":false},\n    \
         \"320\":{\"content\":\"<é>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":true}\n  \
         },\n  \"bos_token\": \"<s>\"\n}\n"
    );
    assert_eq!(read("added_tokens.json"), "{\n    \"<a \\\"b\\\">\":319,\n    \"<é>\":320\n  }\n");
    assert_eq!(read("vocab.json"), "{}");
    let mut before: Value = serde_json::from_str(&tokenizer).expect("JSON");
    let added = before["added_tokens"].as_array_mut().expect("a list");
    for (id, content, special) in [(319, "<a \"b\">", false), (320, "<é>", true)] {
        added.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": special}));
    }
    assert_eq!(serde_json::from_str::<Value>(&read("tokenizer.json")).expect("JSON"), before);

    // and once more, onto what was written
    let report = export(&root, "out", "again", &adding("<c>")).expect("valid");
    assert_eq!(report.vocab_size, 322);
    let again = Tokenizer::from_file(root.path().join("again/tokenizer.json")).expect("a tokenizer");
    assert_eq!(again.token_to_id("<c>"), Some(321));
}

/// The `tokenizers` library numbers tokens without gaps, so they come before rows that no token has.
#[test]
fn a_model_with_spare_rows_gives_them_to_new_tokens() {
    let (model, root) = with_tokenizer(325, &[("tokenizer.json", fs::read(byte_level()).expect("there"))]);
    let report = convert(&root, "model", "out", &adding("<a>\n<b>")).expect("valid");
    assert_eq!((report.vocab_size, report.added_tokens), (325, 2));
    export(&root, "out", "back", &Default::default()).expect("valid");
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    export(&root, "per-head", "then", &adding("<a>\n<b>")).expect("valid");
    let mut expected = model.tensors.clone();
    for name in [EMBEDDING, HEAD] {
        let rows = expected.get_mut(name).expect("there");
        let mean = mean_f32(rows);
        rows.2[319 * 80..321 * 80].copy_from_slice(&mean.repeat(2));
    }
    for name in ["back", "then"] {
        assert!(read_tensors(&root.path().join(name)) == expected, "{name}");
    }
    let config = |name: &str| fs::read(root.path().join(name).join("config.json")).expect("there");
    assert!(config("model") == config("out"));
    // seven need one row more
    let report = convert(&root, "model", "more", &adding("a1\na2\na3\na4\na5\na6\na7")).expect("valid");
    assert_eq!(report.vocab_size, 326);
}

#[test]
fn a_gguf_file_can_be_extended() {
    let root = tempfile::tempdir().expect("a temporary folder");
    fs::copy(data("tiny.gguf"), root.path().join("model.gguf")).expect("there");
    export(&root, "model.gguf", "plain", &ConvertOptions { dtype: Some(DType::F32.into()), ..Default::default() })
        .expect("valid");
    let plain = read_tensors(&root.path().join("plain"));
    let size = plain[EMBEDDING].1[0];
    let options = ConvertOptions { dtype: Some(DType::F32.into()), ..adding("<new>") };
    convert(&root, "model.gguf", "per-head", &options).expect("valid");
    export(&root, "per-head", "out", &Default::default()).expect("valid");
    let out = read_tensors(&root.path().join("out"));
    for (name, tensor) in &plain {
        let vocabulary = [EMBEDDING, HEAD].contains(&name.as_str());
        let expected = if vocabulary { grown(tensor, &mean_f32(tensor), 1) } else { tensor.clone() };
        assert!(out[name] == expected, "{name}");
    }
    let tokenizer = Tokenizer::from_file(root.path().join("out/tokenizer.json")).expect("a tokenizer");
    assert_eq!(tokenizer.token_to_id("<new>"), Some(size as u32));
    let config = json_file(&root.path().join("out/tokenizer_config.json"));
    assert_eq!(config["added_tokens_decoder"][size.to_string()]["content"], "<new>");
}

#[test]
fn a_longer_context_changes_the_configuration_only() {
    let model = Model::small();
    let root = model.folder();
    for rope in ["yarn:4", "linear:2", "dynamic:2.5", "ntk:4"] {
        convert(&root, "model", "per-head", &scaled(rope)).expect("valid");
        export(&root, "per-head", rope, &Default::default()).expect("valid");
        fs::remove_dir_all(root.path().join("per-head")).expect("there");
        assert!(read_tensors(&root.path().join(rope)) == model.tensors, "{rope}");
        let config = json_file(&root.path().join(rope).join("config.json"));
        let read = ModelConfig::from_value(&config, Path::new("config.json")).expect("valid");
        assert_ne!(read.ropes, ModelConfig::from_value(&model.config, Path::new("config.json")).expect("valid").ropes);
    }
    let config = json_file(&root.path().join("yarn:4/config.json"));
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    assert_eq!((&config["rope_scaling"], &config["max_position_embeddings"]), (&yarn, &json!(512)));
}

#[test]
fn all_at_once() {
    let (_, root) = with_tokenizer(319, &[("tokenizer.json", fs::read(byte_level()).expect("there"))]);
    let extension =
        Extension { vocab_size: Some(384), tokens: tokens("<a>"), rope: Some("linear:2".parse().expect("a scaling")) };
    let report = export(&root, "model", "out", &with(extension)).expect("valid");
    assert_eq!((report.vocab_size, report.added_tokens), (384, 1));
    let checkpoint = Checkpoint::open(&root.path().join("out")).expect("valid");
    assert_eq!(checkpoint.config().max_position_embeddings, 256);
    assert_eq!((checkpoint.config().bos_token_id, &checkpoint.config().eos_token_ids[..]), (Some(1), &[2][..]));
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let byte_level = fs::read(byte_level()).expect("there");
    let (_, root) = with_tokenizer(319, &[("tokenizer.json", byte_level.clone())]);
    let path = |name: &str| root.path().join("model").join(name).display().to_string();
    let fails = |options: ConvertOptions| {
        let error = convert(&root, "model", "out", &options).expect_err("must be refused").to_string();
        assert_eq!(names(root.path()), ["model"]);
        error
    };
    let config = path("config.json");
    assert_eq!(
        fails(to_size(318)),
        format!(
            "{config}: vocab_size: cannot become 318: the model has 319 tokens, and none can be taken away; ask for at least 319"
        )
    );
    let few = Extension { vocab_size: Some(320), tokens: tokens("<a>\n<b>"), rope: None };
    assert_eq!(
        fails(with(few)),
        format!("{config}: vocab_size: cannot become 320: the added tokens need ids up to 320; ask for at least 321")
    );
    let huge = fails(to_size(1 << 40));
    assert!(huge.starts_with(&format!("{config}: vocab_size: ")), "{huge}");
    assert_eq!(fails(adding("<a>\n</s>")), "tokens.txt: line 2: the tokenizer has the token \"</s>\" already, as 2");
    assert_eq!(fails(adding("the")), "tokens.txt: line 1: the tokenizer has the token \"the\" already, as 306");

    let model = root.path().join("model");
    let write = |name: &str, text: &str| fs::write(model.join(name), text).expect("writable");
    let disagree = |name: &str| {
        format!(
            "{}: the id 319 is taken, but {} has 319 tokens, so that the next one gets the id 319; save the tokenizer with transformers, so that its files agree",
            path(name),
            path("tokenizer.json")
        )
    };
    write("added_tokens.json", "{\"<pad>\": 319}");
    assert_eq!(fails(adding("<a>")), disagree("added_tokens.json"));
    fs::remove_file(model.join("added_tokens.json")).expect("there");
    write("tokenizer_config.json", "{\"added_tokens_decoder\": {\"319\": {\"content\": \"<pad>\"}}}");
    assert_eq!(fails(adding("<a>")), disagree("tokenizer_config.json"));
    write("tokenizer_config.json", "[]");
    let error = fails(adding("<a>"));
    assert!(
        error.starts_with(&format!("{}: not what a tokenizer's file must be: ", path("tokenizer_config.json"))),
        "{error}"
    );
    fs::remove_file(model.join("tokenizer_config.json")).expect("there");

    write("tokenizer.json", "{\"added_tokens\": [], \"model\": {\"vocab\": {\"a\": 0, \"b\": 2}}}");
    let gap = format!("{}: the id 2 is taken, but {0} has 2 tokens", path("tokenizer.json"));
    assert!(fails(adding("<a>")).starts_with(&gap));
    for text in ["{}", "{\"added_tokens\": 3}", "{\"added_tokens\": [], \"model\": {\"vocab\": 3}}", "", "\u{0}"] {
        write("tokenizer.json", text);
        let error = fails(adding("<a>"));
        assert!(
            error.starts_with(&format!("{}: not what a tokenizer's file must be: ", path("tokenizer.json"))),
            "{error}"
        );
    }
    fs::write(model.join("tokenizer.json"), b"\xff").expect("writable");
    assert_eq!(fails(adding("<a>")), format!("{}: not UTF-8 text", path("tokenizer.json")));
    fs::remove_file(model.join("tokenizer.json")).expect("there");
    assert_eq!(
        fails(adding("<a>")),
        format!("{}: expected tokenizer.json or tokenizer.model, to add tokens to; found neither", model.display())
    );
}
