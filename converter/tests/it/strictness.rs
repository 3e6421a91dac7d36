//! Pins that whatever is not exactly the configured model is one error that names what and where.

use std::fs;

use converter::{Checkpoint, Error};
use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use crate::support::{Model, convert, encode, write_tensors};

fn message(root: &TempDir) -> String {
    Checkpoint::open(&root.path().join("model")).expect_err("must be refused").to_string()
}

/// The message for a model with one thing changed.
fn refused(change: impl FnOnce(&mut Model)) -> String {
    let mut model = Model::small();
    change(&mut model);
    message(&model.folder())
}

const Q: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn shapes_are_explained() {
    let found = refused(|model| {
        let q = model.tensors.get_mut(Q).expect("there");
        (q.1, q.2) = (vec![40, 20], vec![0; 40 * 20 * 4]);
    });
    let expected = format!(
        "model.safetensors: parameter {Q}: expected shape [48, 20] from config.json (6 heads × 8, hidden 20), found [40, 20]"
    );
    assert!(found.ends_with(&expected), "{found}");
    assert!(
        refused(|model| model.config["vocab_size"] = json!(40)).contains("(vocabulary 40, hidden 20), found [33, 20]")
    );
}

#[test]
fn every_missing_and_every_extra_tensor_is_reported() {
    let found = refused(|model| {
        model.tensors.retain(|name, _| !name.starts_with("model.layers.1.mlp"));
        let norm = model.tensors["model.norm.weight"].clone();
        model.tensors.insert("model.layers.1.mlp.experts.0.w1".into(), norm);
    });
    assert!(found.contains("6 parameters missing: model.layers.1.mlp.gate_proj.weight [28, 20], "), "{found}");
    assert!(found.contains("… and 2 more"), "{found}");
    assert!(found.contains("1 tensor that this model does not use: model.layers.1.mlp.experts.0.w1 [20]."), "{found}");

    assert!(
        refused(|model| model.config["num_hidden_layers"] = json!(1))
            .contains("16 tensors that this model does not use")
    );
    assert!(
        refused(|model| model.config["attention_bias"] = json!(false))
            .contains("8 tensors that this model does not use")
    );
    assert!(
        refused(|model| drop(model.tensors.remove("lm_head.weight")))
            .contains("1 parameter missing: lm_head.weight [33, 20]")
    );
}

#[test]
fn types_that_are_not_float_are_named() {
    let found =
        refused(|model| *model.tensors.get_mut(Q).expect("there") = (Dtype::F8_E4M3, vec![48, 20], vec![0; 960]));
    assert!(found.contains("its type F8_E4M3 is not supported; supported: F16, BF16, F32, F64"), "{found}");
}

#[test]
fn a_stored_tied_head_must_be_the_embedding() {
    let embedding = "model.embed_tokens.weight";
    let mut model = Model::tied();
    model.tensors.insert("lm_head.weight".into(), model.tensors[embedding].clone());
    model.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F32, vec![4], vec![0; 16]));
    let root = model.folder();
    let notes = Checkpoint::open(&root.path().join("model")).expect("equal").notes().to_vec();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(notes[0].contains("rotary_emb.inv_freq") && notes[1].contains("lm_head.weight is not used"), "{notes:?}");
    assert_eq!(convert(&root, "model", "out", &Default::default()).expect("valid").notes, notes);

    model.tensors.get_mut("lm_head.weight").expect("there").2[7] ^= 1;
    assert!(message(&model.folder()).contains("set tie_word_embeddings to false"));
    model.tensors.insert("lm_head.weight".into(), (Dtype::F32, vec![20, 33], vec![0; 20 * 33 * 4]));
    assert!(message(&model.folder()).contains("it must have the embedding's shape [33, 20], found [20, 33]"));
}

#[test]
fn folders_that_are_something_else_say_what() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let model = root.path().join("model");
    assert!(message(&root).starts_with("opening "));
    fs::create_dir(&model).expect("new");
    assert!(message(&root).contains("expected model.safetensors"));
    fs::write(model.join("pytorch_model.bin"), "").expect("writable");
    assert!(message(&root).contains("save the model as safetensors first"));
    fs::write(model.join("adapter_config.json"), "").expect("writable");
    assert!(message(&root).contains("merge it into its base model first"));

    let root = Model::small().folder();
    let config = root.path().join("model/config.json");
    fs::write(&config, b"{\"model_type\": \"\xff\"}").expect("writable");
    assert!(message(&root).contains("config.json: not UTF-8"));
    fs::write(&config, "{").expect("writable");
    assert!(message(&root).contains("config.json: not valid JSON"));
    fs::remove_file(&config).expect("there");
    assert!(message(&root).contains("config.json"));
    for (name, content) in [("file", &b"hello"[..]), ("x.gguf", b"GG"), ("model.safetensors", b"")] {
        fs::write(root.path().join(name), content).expect("writable");
        let error = Checkpoint::open(&root.path().join(name)).expect_err("not a checkpoint").to_string();
        assert!(error.contains("or a GGUF file"), "{error}");
    }
    fs::write(root.path().join("y.gguf"), b"GGUF").expect("writable");
    Checkpoint::open(&root.path().join("y.gguf")).expect_err("nothing but a magic number");
}

#[test]
fn an_index_is_checked_against_its_files() {
    let model = Model::small();
    let (first, second): (Vec<_>, Vec<_>) =
        model.tensors.clone().into_iter().partition(|(name, _)| name.contains("layers.0"));
    let root = model.folder();
    let folder = root.path().join("model");
    fs::remove_file(folder.join("model.safetensors")).expect("there");
    write_tensors(&folder.join("a.safetensors"), &first.iter().cloned().collect());
    write_tensors(&folder.join("b.safetensors"), &second.iter().cloned().collect());
    let index = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut index = json!({"metadata": {"total_size": 1}, "weight_map": {}});
        first.iter().for_each(|(name, _)| index["weight_map"][name] = json!("a.safetensors"));
        second.iter().for_each(|(name, _)| index["weight_map"][name] = json!("b.safetensors"));
        change(&mut index);
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).expect("writable");
    };
    index(&|_| ());
    Checkpoint::open(&folder).expect("consistent");
    for (file, part) in [
        ("c.safetensors", "1 of 3 files that it names are missing, first c.safetensors"),
        ("../b.safetensors", "expected the name of a file in the same folder"),
        ("/etc/passwd", "expected the name of a file in the same folder"),
        (
            "b.safetensors",
            "says that model.layers.0.mlp.up_proj.weight is in b.safetensors, but it is in a.safetensors",
        ),
    ] {
        index(&|index| index["weight_map"]["model.layers.0.mlp.up_proj.weight"] = json!(file));
        assert!(message(&root).contains(part), "{}", message(&root));
    }
    index(&|index| index["weight_map"]["ghost"] = json!("a.safetensors"));
    assert!(message(&root).contains("says that ghost is in a.safetensors, but it is in none of the files"));
    index(&|index| index["weight_map"] = json!([1]));
    assert!(message(&root).contains("not a valid index"));
    index(&|_| ());
    write_tensors(&folder.join("b.safetensors"), &model.tensors);
    assert!(message(&root).contains("the tensor is in "), "{}", message(&root));
}

#[test]
fn a_per_head_folder_of_another_version_is_refused() {
    let root = Model::small().folder();
    convert(&root, "model", "new", &Default::default()).expect("valid");
    let path = root.path().join("new/params.safetensors");
    let bytes = fs::read(&path).expect("there");
    let text = b"\"version\":\"1\"";
    let place = bytes.windows(text.len()).position(|w| w == text).expect("in the header");
    let mut other = bytes.clone();
    other[place + text.len() - 2] = b'3';
    fs::write(&path, &other).expect("writable");
    let error = Checkpoint::open(&root.path().join("new")).expect_err("another version").to_string();
    assert!(error.contains("expected version \"1\" or \"2\"") && error.contains("convert the model again"), "{error}");
    fs::write(&path, &bytes[..bytes.len() - 1]).expect("writable");
    assert!(Checkpoint::open(&root.path().join("new")).expect_err("cut").to_string().contains("truncated"));
    fs::copy(root.path().join("model/model.safetensors"), &path).expect("writable");
    let error = Checkpoint::open(&root.path().join("new")).expect_err("no metadata").to_string();
    assert!(
        error.contains("expected format \"xllama-per-head\" in the metadata of a per-head file, found nothing"),
        "{error}"
    );
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let root = Model::small().folder();
    let folder = root.path().join("model");
    let checkpoint = Checkpoint::open(&folder).expect("valid");
    let file = fs::OpenOptions::new().write(true).open(folder.join("model.safetensors")).expect("there");
    file.set_len(100).expect("cut");
    let error = checkpoint.read_all(None, 2, &|_, _| {}, &Default::default()).expect_err("the data is gone");
    assert!(matches!(error, Error::Io { .. }), "{error}");

    let root = Model::small().folder();
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    let checkpoint = Checkpoint::open(&root.path().join("per-head")).expect("valid");
    let file = fs::OpenOptions::new().write(true).open(root.path().join("per-head/params.safetensors")).expect("there");
    file.set_len(10_000).expect("cut");
    let error =
        checkpoint.place(&checkpoint.params().layers[1].attention.q_proj).expect_err("the data is gone").to_string();
    assert!(error.contains("has become shorter since it was opened"), "{error}");
}

#[test]
fn values_keep_their_signs_and_specials() {
    let mut model = Model::tied();
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MIN_POSITIVE / 2.0];
    let norm: Vec<u8> = (0..20).flat_map(|i| encode(values[i % 5], converter::DType::F32)).collect();
    model.tensors.get_mut("model.norm.weight").expect("there").2 = norm;
    let root = model.folder();
    let checkpoint = Checkpoint::open(&root.path().join("model")).expect("valid");
    for dtype in converter::DType::ALL {
        let read = checkpoint.read(&checkpoint.params().final_norm, dtype).expect("specials are no overflow").to_f32();
        assert!(
            read[0].is_nan() && read[1] == f32::INFINITY && read[2] == f32::NEG_INFINITY && read[3].is_sign_negative()
        );
    }
}
