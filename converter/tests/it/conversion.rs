//! Pins element types, progress, cancelling, and that nothing half-written is ever left under a final name.

use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use converter::{Checkpoint, ConvertOptions, DType, Error, ModelConfig};
use half::bf16;
use serde_json::{Value, json};

use crate::support::{Model, convert, encode, export, names, read_tensors};

fn to(dtype: DType) -> ConvertOptions {
    ConvertOptions { dtype: Some(dtype.into()), ..Default::default() }
}

#[test]
fn another_element_type_is_rounded_once_and_written_into_the_configuration() {
    let model = Model::small();
    let root = model.folder();
    convert(&root, "model", "per-head", &to(DType::BF16)).expect("valid");
    export(&root, "per-head", "back", &Default::default()).expect("valid");
    for (name, (_, _, bytes)) in read_tensors(&root.path().join("back")) {
        let original = model.tensors[&name].2.as_chunks().0.iter();
        let expected: Vec<u8> = original.flat_map(|&b| bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes()).collect();
        assert!(bytes == expected, "{name}");
    }
    let config: Value =
        serde_json::from_slice(&fs::read(root.path().join("back/config.json")).expect("there")).expect("JSON");
    let mut expected = model.config.clone();
    expected["torch_dtype"] = json!("bfloat16");
    assert_eq!(config, expected, "only the type has changed, in the spelling of the source");
}

#[test]
fn a_configuration_without_type_gets_both_spellings() {
    let mut model = Model::tied();
    model.config.as_object_mut().expect("an object").remove("torch_dtype");
    let root = model.folder();
    convert(&root, "model", "per-head", &to(DType::F64)).expect("valid");
    let path = root.path().join("per-head/config.json");
    let config = ModelConfig::from_json(&fs::read_to_string(&path).expect("there"), &path).expect("valid");
    assert_eq!((&config.raw["dtype"], &config.raw["torch_dtype"]), (&json!("float64"), &json!("float64")));
}

#[test]
fn a_value_that_does_not_fit_is_an_error_and_leaves_nothing() {
    let mut model = Model::tied();
    model.tensors.get_mut("model.norm.weight").expect("there").2[8..12].copy_from_slice(&encode(-7e4, DType::F32));
    let root = model.folder();
    let error = convert(&root, "model", "per-head", &to(DType::F16)).expect_err("too large").to_string();
    assert!(
        error.ends_with("parameter model.norm.weight: the value -70000 is too large for float16; choose bf16 or f32"),
        "{error}"
    );
    assert_eq!(names(root.path()), ["model"]);
    convert(&root, "model", "per-head", &to(DType::BF16)).expect("bfloat16 has the range of float32");
}

#[test]
fn progress_ends_with_everything() {
    let root = Model::small().folder();
    let calls = Mutex::new(Vec::new());
    let progress = |done: u64, total: u64| calls.lock().expect("no panic").push((done, total));
    let (from, to) = (root.path().join("model"), root.path().join("per-head"));
    let report =
        converter::convert(&from, &to, &Default::default(), &progress, &AtomicBool::new(false)).expect("valid");
    let calls = calls.into_inner().expect("no panic");
    assert_eq!(calls.first(), Some(&(0, report.bytes)));
    assert_eq!(calls.iter().max(), Some(&(report.bytes, report.bytes)));
    assert_eq!(report.bytes, Model::small().tensors.values().map(|t| t.2.len() as u64).sum::<u64>());
}

#[test]
fn cancelling_leaves_nothing() {
    let root = Model::small().folder();
    let (from, to) = (root.path().join("model"), root.path().join("per-head"));
    let cancel = AtomicBool::new(false);
    let progress = |done: u64, total: u64| {
        if done > total / 2 {
            cancel.store(true, Ordering::Relaxed);
        }
    };
    let result = converter::convert(&from, &to, &Default::default(), &progress, &cancel);
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    assert_eq!(names(root.path()), ["model"]);

    let checkpoint = Checkpoint::open(&from).expect("valid");
    assert!(matches!(checkpoint.read_all(None, 0, &|_, _| {}, &cancel), Err(Error::Cancelled)));
}

#[test]
fn a_destination_with_something_in_it_is_left_alone() {
    let root = Model::small().folder();
    fs::create_dir(root.path().join("taken")).expect("new");
    fs::write(root.path().join("taken/mine"), "x").expect("writable");
    let error = convert(&root, "model", "taken", &Default::default()).expect_err("not empty").to_string();
    assert!(error.contains("exists and is not empty; remove it or choose another destination"), "{error}");
    assert_eq!(names(&root.path().join("taken")), ["mine"]);
    let error = convert(&root, "model", "model", &Default::default()).expect_err("the source").to_string();
    assert!(error.contains("is the source or holds it"), "{error}");
    assert_eq!(names(root.path()), ["model", "taken"]);
}

#[test]
fn converting_twice_writes_the_same_bytes() {
    let root = Model::small().folder();
    for (name, threads) in [("a", 1), ("b", 4)] {
        convert(&root, "model", name, &ConvertOptions { threads, ..Default::default() }).expect("valid");
    }
    let read = |name: &str| fs::read(root.path().join(name).join("params.safetensors")).expect("there");
    assert!(read("a") == read("b"));
    convert(&root, "a", "c", &Default::default()).expect("from per-head to per-head");
    assert!(read("a") == read("c"));
}
