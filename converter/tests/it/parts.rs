//! Pins that a part of a parameter is that part of the whole, whatever the ranges and however the checkpoint lies on disk.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use converter::{Checkpoint, ConvertOptions, DType, Extension, FileBytes, HostArray, Param, Precision};
use ndarray::{ArrayD, IxDyn, Slice};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Model, convert, export};

/// A model that shares its sizes with [`Model::small`], with other keys.
fn like_small(changes: Value) -> Value {
    let mut config = Model::small().config;
    let keys = config.as_object_mut().expect("an object");
    for key in ["architectures", "attention_bias", "mlp_bias"] {
        keys.remove(key);
    }
    keys.extend(changes.as_object().expect("an object").clone());
    config
}

fn fused() -> Value {
    like_small(json!({"model_type": "phi3", "pad_token_id": 0}))
}

/// Experts, one that every token takes and a gate for it, a matrix of one row.
fn experts() -> Value {
    like_small(
        json!({"model_type": "qwen2_moe", "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                      "shared_expert_intermediate_size": 8}),
    )
}

/// Norms over all heads of queries and keys.
fn whole_norms() -> Value {
    like_small(json!({"model_type": "olmo2"}))
}

/// A folder with the model in Hugging Face's form and per head, each in one file (`model`, `per-head`) and in several
/// (`model-files`, `per-head-files`), and packed in several (`packed-files`).
fn folders(model: &Model) -> TempDir {
    let root = model.folder();
    let several = ConvertOptions { shard_size: Some(3000), ..Default::default() };
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    convert(&root, "model", "per-head-files", &several).expect("valid");
    export(&root, "model", "model-files", &several).expect("valid");
    let packed = ConvertOptions { dtype: Some(Precision::Int4), ..several };
    convert(&root, "model", "packed-files", &packed).expect("valid");
    root
}

const FOLDERS: [&str; 5] = ["model", "model-files", "per-head", "per-head-files", "packed-files"];

fn open(root: &TempDir, folder: &str) -> Checkpoint {
    Checkpoint::open(&root.path().join(folder)).expect("valid")
}

/// Of each axis all of it or any range of it, whose ends `choices` chooses.
fn ranges(shape: &[usize], choices: &[(bool, [Index; 2])]) -> Vec<Range<usize>> {
    let range = |(&size, (whole, ends)): (&usize, &(bool, [Index; 2]))| {
        let [a, b] = ends.map(|end| end.index(size + 1));
        if *whole { 0..size } else { a.min(b)..a.max(b) }
    };
    shape.iter().zip(choices).map(range).collect()
}

/// A part of an array, cut by ndarray.
fn cut(array: &HostArray, part: &[Range<usize>]) -> Vec<u8> {
    let size = array.dtype().size();
    let places = (0..array.as_bytes().len() / size).collect();
    let places = ArrayD::from_shape_vec(IxDyn(array.shape()), places).expect("as many as the shape has");
    let places = places.slice_each_axis(|axis| Slice::from(part[axis.axis.index()].clone()));
    places.iter().flat_map(|&place| &array.as_bytes()[place * size..][..size]).copied().collect()
}

fn bytes_of(place: &FileBytes) -> Vec<u8> {
    let mut bytes = vec![0; (place.range.end - place.range.start) as usize];
    place.file.read_exact_at(&mut bytes, place.range.start).expect("readable");
    bytes
}

/// What every part of every parameter must be.
fn assert_parts(checkpoint: &Checkpoint, dtype: DType, choices: &[(bool, [Index; 2])]) -> Result<(), TestCaseError> {
    for (i, param) in checkpoint.params().iter().into_iter().enumerate() {
        // another choice for each parameter
        let choices: Vec<_> = choices.iter().copied().cycle().skip(i).take(param.shape.len()).collect();
        let part = ranges(&param.shape, &choices);
        let about = format!("{} {part:?} of {:?} as {dtype}", param.name, param.shape);
        let found = checkpoint.read_part(param, dtype, &part).expect(&about);
        let sizes: Vec<usize> = part.iter().map(Range::len).collect();
        prop_assert_eq!((found.dtype(), found.shape()), (dtype, &sizes[..]), "{}", about);
        let whole = checkpoint.read(param, dtype).expect("readable");
        prop_assert!(found.as_bytes() == cut(&whole, &part), "{}", about);
        if let Some(place) = checkpoint.place_part(param, &part).expect(&about) {
            let own = checkpoint.read_part(param, param.dtype, &part).expect(&about);
            prop_assert_eq!(place.range.start % 64, 0);
            prop_assert!(bytes_of(&place) == own.as_bytes(), "{}", about);
        }
    }
    Ok(())
}

/// Choices for axes: a prime number of them, so that cycling gives each parameter others.
fn choices() -> impl Strategy<Value = [(bool, [Index; 2]); 7]> {
    any::<[(bool, [Index; 2]); 7]>()
}

fn any_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(DType::ALL.to_vec())
}

#[test]
fn any_part_is_that_part_of_the_whole() {
    let models = [
        Model::small(),
        Model::random(Model::tied().config, DType::BF16),
        Model::random(fused(), DType::F32),
        Model::random(experts(), DType::BF16),
        Model::random(whole_norms(), DType::F16),
    ];
    let roots = models.map(|model| folders(&model));
    let checkpoints: Vec<Checkpoint> = roots.iter().flat_map(|root| FOLDERS.map(|folder| open(root, folder))).collect();
    proptest!(ProptestConfig::with_cases(48), |(choices in choices(), dtype in any_dtype())| {
        for checkpoint in &checkpoints {
            assert_parts(checkpoint, dtype, &choices)?;
        }
    });
}

#[test]
fn any_part_of_a_gguf_file() {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiny.gguf");
    let checkpoint = Checkpoint::open(&fixture).expect("valid");
    proptest!(ProptestConfig::with_cases(32), |(choices in choices(), dtype in any_dtype())| {
        assert_parts(&checkpoint, dtype, &choices)?;
    });
}

#[test]
fn any_part_of_a_grown_vocabulary() {
    let root = folders(&Model::small());
    let extension = Extension { vocab_size: Some(50), ..Default::default() };
    let checkpoints = FOLDERS.map(|folder| open(&root, folder).extended(&extension).expect("larger"));
    proptest!(ProptestConfig::with_cases(32), |(choices in choices(), dtype in any_dtype())| {
        for checkpoint in &checkpoints {
            assert_parts(checkpoint, dtype, &choices)?;
        }
    });
}

/// More rows than are held at a time (1 MiB), in runs that begin and end inside of a tile.
#[test]
fn large_parts_are_put_together_from_many_reads() {
    let mut config = Model::tied().config;
    for (key, size) in [("vocab_size", 1000), ("hidden_size", 1200), ("intermediate_size", 1000)] {
        config[key] = json!(size);
    }
    config["num_hidden_layers"] = json!(1);
    let root = Model::random(config, DType::F32).folder();
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    for folder in ["model", "per-head"] {
        let checkpoint = open(&root, folder);
        for param in checkpoint.params().iter().into_iter().filter(|param| param.elements() > 1 << 20) {
            let whole = checkpoint.read(param, DType::F32).expect("readable");
            let [rows, columns] = param.shape[..] else { panic!("{} is a matrix", param.name) };
            for part in [[0..rows, 7..columns - 5], [9..rows - 1, 0..columns], [1..rows - 3, 500..columns]] {
                let found = checkpoint.read_part(param, DType::F32, &part).expect("readable");
                assert!(found.as_bytes() == cut(&whole, &part), "{folder} {} {part:?}", param.name);
            }
        }
    }
}

#[test]
fn a_part_in_one_piece_is_used_in_place() {
    let root = folders(&Model::small());
    let per_head = open(&root, "per-head");
    let layer = &per_head.params().layers[1];
    let start = |param: &Param, part: &[Range<usize>]| {
        let place = per_head.place_part(param, part).expect("whole");
        let whole = per_head.place(param).expect("whole").expect("aligned").range.start;
        place.map(|place| (place.range.start - whole, place.range.end - place.range.start))
    };
    // (M, H, K) is (20, 6, 8) of 4 bytes
    let q = &layer.attention.q_proj;
    assert_eq!(start(q, &[5..9, 0..6, 0..8]), Some((5 * 192, 4 * 192)));
    assert_eq!(start(q, &[3..4, 2..6, 0..8]), Some((3 * 192 + 2 * 32, 4 * 32)));
    assert_eq!(start(q, &[3..4, 2..3, 0..5]), Some((3 * 192 + 2 * 32, 5 * 4)));
    assert_eq!(start(q, &[3..4, 1..6, 0..8]), None, "32 is no multiple of 64");
    assert_eq!(start(q, &[3..5, 2..6, 0..8]), None, "in two places");
    assert_eq!(start(q, &[3..4, 2..4, 0..5]), None, "in two places");
    assert_eq!(start(q, &[3..3, 0..6, 0..8]), None, "empty");
    // (H, K, M) is (6, 8, 20)
    assert_eq!(start(&layer.attention.out_proj, &[2..4, 0..8, 0..20]), Some((2 * 640, 2 * 640)));

    let hugging_face = open(&root, "model");
    let q = &hugging_face.params().layers[1].attention.q_proj;
    assert!(hugging_face.place_part(q, &[5..9, 0..6, 0..8]).expect("no error").is_none(), "another layout");
}

#[test]
fn wrong_ranges_are_refused() {
    let root = folders(&Model::small());
    let checkpoint = open(&root, "model");
    let q = &checkpoint.params().layers[0].attention.q_proj;
    let reversed = Range { start: 5, end: 2 };
    for (part, message) in [
        (
            &[0..20, 4..8, 0..8][..],
            "parameter layers.0.attention.q_proj: axis H: expected a range within 0..6, found 4..8",
        ),
        (&[0..20, 0..6, reversed][..], "axis K: expected a range within 0..8, found 5..2"),
        (&[0..20, 0..48][..], "a part needs a range for each of its 3 axes (MHK), found 2"),
    ] {
        let read = checkpoint.read_part(q, DType::F32, part).expect_err(message).to_string();
        let place = checkpoint.place_part(q, part).expect_err(message).to_string();
        assert!(read.contains(message) && place == read, "{read}");
    }

    let other = Model::tied().folder();
    let other = open(&other, "model");
    let head = checkpoint.params().lm_head.as_ref().expect("not tied");
    let error = other.read_part(head, DType::F32, &[0..20, 3..5]).expect_err("it has none").to_string();
    assert!(error.contains("not a parameter of this checkpoint"), "{error}");
    let mut larger = checkpoint.params().embedding.clone();
    larger.shape[0] += 1;
    let error =
        open(&root, "per-head").place_part(&larger, &[33..34, 0..20]).expect_err("of another model").to_string();
    assert!(error.contains("not a parameter of this checkpoint"), "{error}");
}
