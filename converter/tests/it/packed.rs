//! Pins packed parameters: what is packed and how near it stays, that they are read like all others, and what is refused.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use converter::{ArrayBytes, Checkpoint, ConvertOptions, DType, Extension, Packing, Param, Precision};
use half::f16;
use kernels::packed::{Packed, Scales};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Model, Tensor, convert, encode, export, names, read_tensors};

fn to(precision: Precision) -> ConvertOptions {
    ConvertOptions { dtype: Some(precision), ..Default::default() }
}

/// Experts with one for all tokens, and a gate for it.
fn experts() -> Model {
    let mut config = Model::small().config;
    let keys = config.as_object_mut().expect("an object");
    ["architectures", "attention_bias", "mlp_bias"].iter().for_each(|key| drop(keys.remove(*key)));
    let changes = json!({"model_type": "qwen2_moe", "num_experts": 5, "num_experts_per_tok": 2,
                         "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8});
    keys.extend(changes.as_object().expect("an object").clone());
    Model::random(config, DType::F32)
}

/// Query, key and value rows in one tensor.
fn fused() -> Model {
    let mut config = Model::tied().config;
    config["model_type"] = json!("phi3");
    config["pad_token_id"] = json!(0);
    config.as_object_mut().expect("an object").remove("architectures");
    Model::random(config, DType::BF16)
}

fn open(root: &TempDir, name: &str) -> Checkpoint {
    Checkpoint::open(&root.path().join(name)).expect("valid")
}

fn floats((dtype, _, bytes): &Tensor) -> Vec<f32> {
    match dtype {
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
    }
}

/// The values (E, N, K) of a parameter whose scales are in half precision, from the bytes of its arrays.
fn unpack(param: &Param, packing: Packing, q: &[u8], scales: &[u8]) -> Vec<f32> {
    let of = param.contraction().expect("a matrix");
    let scales: Vec<f16> = scales.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect();
    let experts = of.experts.unwrap_or(1);
    let mut values = vec![f32::NAN; experts * of.n * of.k];
    for (e, values) in values.chunks_exact_mut(of.n * of.k).enumerate() {
        let part = |len: usize| e * len / experts..(e + 1) * len / experts;
        let (q, scales) = (&q[part(q.len())], Scales::F16(&scales[part(scales.len())]));
        let format = packing.format;
        Packed { bits: format.bits, group: format.group, q, scales, mins: None }.unpack(of.k, of.n, values);
    }
    values
}

#[test]
fn matrices_are_packed_and_stay_near() {
    for model in [Model::small(), Model::tied(), experts(), fused()] {
        let root = model.folder();
        for (precision, packing) in [(Precision::Int8, Packing::INT8), (Precision::Int4, Packing::INT4)] {
            let name = packing.name();
            convert(&root, "model", name, &to(precision)).expect("valid");
            let wide = format!("{name}-back");
            export(&root, name, &wide, &to(Precision::Float(DType::F32))).expect("valid");
            let (stored, back) = (read_tensors(&root.path().join(name)), read_tensors(&root.path().join(wide)));
            let checkpoint = open(&root, name);
            for param in checkpoint.params().iter() {
                let values: Vec<f32> = param
                    .pieces
                    .iter()
                    .flat_map(|piece| {
                        let rows = piece.first_row * piece.columns()..(piece.first_row + piece.rows) * piece.columns();
                        assert_eq!(back[&piece.name].0, Dtype::F32);
                        floats(&back[&piece.name])[rows].to_vec()
                    })
                    .collect();
                let original: Vec<f32> = param
                    .pieces
                    .iter()
                    .flat_map(|piece| {
                        let rows = piece.first_row * piece.columns()..(piece.first_row + piece.rows) * piece.columns();
                        floats(&model.tensors[&piece.name])[rows].to_vec()
                    })
                    .collect();
                if param.contraction().is_none() {
                    assert_eq!(param.packing, None, "{}", param.name);
                    assert_eq!(values, original, "{}", param.name);
                    continue;
                }
                // The embedding and the head keep 8 bits.
                let packing = if param.axes.contains('V') { Packing::INT8 } else { packing };
                assert_eq!(param.packing, Some(packing), "{}", param.name);
                let bytes = |part: &str| &stored[&format!("{}.{part}", param.name)].2[..];
                assert_eq!(values, unpack(param, packing, bytes("q"), bytes("scales")), "{}", param.name);
                assert_eq!(param.stored_bytes(), (bytes("q").len() + bytes("scales").len()) as u64);
                let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
                let error = squares(&mut values.iter().zip(&original).map(|(x, y)| x - y));
                let relative = (error / squares(&mut original.iter().copied())).sqrt();
                // of uniform weights: a step of 1/127 or 1/8 of the largest, over √12
                let bound = if packing == Packing::INT8 { 0.0045 } else { 0.075 };
                assert!(relative < bound && relative > bound / 4.0, "{} {name}: {relative}", param.name);
            }
        }
    }
}

#[test]
fn arrays_are_used_in_place_or_made() {
    let root = Model::small().folder();
    convert(&root, "model", "int4", &to(Precision::Int4)).expect("valid");
    let (packed, source) = (open(&root, "int4"), open(&root, "model"));
    let bytes = |array: &ArrayBytes| match array {
        ArrayBytes::Memory(bytes) => bytes.as_ref().to_vec(),
        ArrayBytes::File(place) => {
            assert_eq!(place.range.start % 64, 0);
            let mut bytes = vec![0; (place.range.end - place.range.start) as usize];
            place.file.read_exact_at(&mut bytes, place.range.start).expect("readable");
            bytes
        }
    };
    let stored = read_tensors(&root.path().join("int4"));
    let mut in_place = 0;
    for (here, there) in packed.params().iter().into_iter().zip(source.params().iter()) {
        assert!(here.packing.is_none() || packed.place(here).expect("valid").is_none());
        let Some(packing) = here.packing else { continue };
        let (found, made) =
            (packed.packed(here, packing).expect("valid"), source.packed(there, packing).expect("valid"));
        in_place += usize::from(matches!(found.q, ArrayBytes::File(_)));
        for arrays in [&found, &made] {
            assert!(arrays.packing == packing && arrays.mins.is_none());
            assert!(bytes(&arrays.q) == stored[&format!("{}.q", here.name)].2, "{}", here.name);
            assert!(bytes(&arrays.scales) == stored[&format!("{}.scales", here.name)].2, "{}", here.name);
        }
    }
    assert!(in_place > 10, "{in_place}");

    let error = |param: &Param, packing| source.packed(param, packing).expect_err("must be refused").to_string();
    let (norm, embedding) = (&source.params().final_norm, &source.params().embedding);
    assert!(
        error(norm, Packing::INT8)
            .ends_with("parameter final_norm: is not contracted in a product, so it cannot be packed")
    );
    let mut minima = Packing::INT4;
    minima.format.mins = true;
    assert!(
        error(embedding, minima)
            .contains("cannot be rounded to int4, groups of 32, F16 scales and minima: only without")
    );
}

#[test]
fn the_same_bytes_come_out_however_it_is_converted() {
    let root = experts().folder();
    convert(&root, "model", "per-head", &Default::default()).expect("valid");
    let options = |threads| ConvertOptions { threads, ..to(Precision::Int4) };
    convert(&root, "model", "a", &options(1)).expect("valid");
    convert(&root, "per-head", "b", &options(4)).expect("from the other layout");
    convert(&root, "a", "c", &Default::default()).expect("as it is");
    convert(&root, "a", "d", &options(3)).expect("what is packed in this way stays");
    let read = |name: &str| fs::read(root.path().join(name).join("params.safetensors")).expect("there");
    for name in ["b", "c", "d"] {
        assert!(read("a") == read(name), "{name}");
    }
    let several = ConvertOptions { shard_size: Some(3000), ..Default::default() };
    convert(&root, "a", "files", &several).expect("valid");
    assert!(names(&root.path().join("files")).len() > 4);
    assert_eq!(read_tensors(&root.path().join("files")), read_tensors(&root.path().join("a")));
    export(&root, "a", "one", &Default::default()).expect("valid");
    export(&root, "files", "other", &Default::default()).expect("valid");
    assert_eq!(read_tensors(&root.path().join("one")), read_tensors(&root.path().join("other")));
}

#[test]
fn floats_again_are_of_the_type_of_the_configuration() {
    let root = Model::random(Model::tied().config, DType::F32).folder();
    let path = root.path().join("model/config.json");
    let config = |dtype: Value| {
        let mut config = Model::tied().config;
        config["torch_dtype"] = dtype;
        fs::write(&path, config.to_string()).expect("writable");
    };
    config(json!("bfloat16"));
    convert(&root, "model", "int8", &to(Precision::Int8)).expect("valid");
    let checkpoint = open(&root, "int8");
    assert_eq!((checkpoint.params().embedding.dtype, checkpoint.params().final_norm.dtype), (DType::BF16, DType::F32));
    export(&root, "int8", "back", &Default::default()).expect("valid");
    assert!(read_tensors(&root.path().join("back")).values().all(|(dtype, ..)| *dtype == Dtype::BF16));

    config(Value::Null);
    convert(&root, "model", "untold", &to(Precision::Int8)).expect("valid");
    assert_eq!(open(&root, "untold").params().embedding.dtype, DType::F32);
    let error = export(&root, "model", "x", &to(Precision::Int4)).expect_err("no floats").to_string();
    assert!(error.contains("a Hugging Face folder has float parameters; choose f32, bf16 or f16"), "{error}");
    assert!(!root.path().join("x").exists());
}

#[test]
fn a_vocabulary_that_grows_is_one_of_floats() {
    let root = Model::small().folder();
    convert(&root, "model", "int8", &to(Precision::Int8)).expect("valid");
    let extension = Extension { vocab_size: Some(40), ..Default::default() };
    let larger = ConvertOptions { extension: extension.clone(), ..Default::default() };
    convert(&root, "int8", "larger", &larger).expect("valid");
    let (before, after) = (open(&root, "int8"), open(&root, "larger"));
    let embedding = after.read(&after.params().embedding, DType::F32).expect("valid").to_f32();
    let old = before.read(&before.params().embedding, DType::F32).expect("valid").to_f32();
    assert_eq!(embedding.shape(), [40, 20]);
    assert!(embedding.iter().zip(&old).all(|(x, y)| x == y));
    let packings = [&after.params().embedding, &after.params().layers[0].attention.q_proj].map(|param| param.packing);
    assert_eq!(packings, [None, Some(Packing::INT8)]);
    let packed = ConvertOptions { dtype: Some(Precision::Int8), ..larger };
    convert(&root, "int8", "packed", &packed).expect("valid");
    assert_eq!(open(&root, "packed").params().embedding.packing, Some(Packing::INT8));
}

#[test]
fn weights_without_a_scale_are_refused() {
    for (value, told) in [(f32::NAN, "NaN"), (1e9, "1000000000")] {
        let mut model = Model::tied();
        let name = "model.layers.1.mlp.up_proj.weight";
        model.tensors.get_mut(name).expect("there").2[40..44].copy_from_slice(&encode(value, DType::F32));
        let root = model.folder();
        let error = convert(&root, "model", "int8", &to(Precision::Int8)).expect_err("no scale").to_string();
        let expected =
            format!("parameter layers.1.mlp.up_proj: the value {told} cannot be rounded to int8; choose bf16 or f32");
        assert!(error.ends_with(&expected), "{error}");
        assert_eq!(names(root.path()), ["model"]);
    }
}

/// Changes the tensors and the metadata of a file.
type Change<'a> = &'a dyn Fn(&mut BTreeMap<String, Tensor>, &mut HashMap<String, String>);

/// Writes the parameters of a folder again, with changes.
fn rewrite(folder: &Path, change: Change<'_>) {
    let path = folder.join("params.safetensors");
    let bytes = fs::read(&path).expect("there");
    let (_, header) = SafeTensors::read_metadata(&bytes).expect("valid");
    let mut metadata = header.metadata().clone().expect("there");
    let mut tensors = read_tensors(folder);
    change(&mut tensors, &mut metadata);
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).expect("consistent"))
    });
    fs::write(path, safetensors::serialize(views, Some(metadata)).expect("valid")).expect("writable");
}

#[test]
fn wrong_arrays_and_metadata_are_named() {
    const UP: &str = "layers.1.mlp.up_proj";
    let refused = |change: Change<'_>| {
        let root = Model::tied().folder();
        convert(&root, "model", "int4", &to(Precision::Int4)).expect("valid");
        let folder = root.path().join("int4");
        rewrite(&folder, change);
        Checkpoint::open(&folder).map(drop).expect_err("must be refused").to_string()
    };
    let packed = |metadata: &mut HashMap<String, String>, change: &dyn Fn(&mut Value)| {
        let text = metadata.get_mut("packed").expect("there");
        let mut json = serde_json::from_str(text).expect("JSON");
        change(&mut json);
        *text = json.to_string();
    };
    let missing = refused(&|tensors, _| drop(tensors.remove(&format!("{UP}.scales"))));
    let why = "since layers.1.mlp.up_proj is packed (int4, groups of 32, F16 scales; 28 outputs of 20 terms)";
    let expected = format!("parameter {UP}.scales: missing; expected (F16, [2, 1, 16]) {why}");
    assert!(missing.ends_with(&expected), "{missing}");
    let shape = refused(&|tensors, _| tensors.get_mut(&format!("{UP}.q")).expect("there").1 = vec![1, 2, 256]);
    let expected = format!("parameter {UP}.q: expected (U8, [2, 1, 256]) {why}, found (U8, [1, 2, 256])");
    assert!(shape.ends_with(&expected), "{shape}");
    let dtype = refused(&|tensors, _| tensors.get_mut(&format!("{UP}.scales")).expect("there").0 = Dtype::BF16);
    assert!(dtype.ends_with("found (BF16, [2, 1, 16])"), "{dtype}");
    for (change, expected) in [
        (
            &(|json: &mut Value| json[UP]["bits"] = json!(3)) as &dyn Fn(&mut Value),
            "params.safetensors: packed in the metadata: layers.1.mlp.up_proj: bits: expected 8 or 4, found 3",
        ),
        (&|json| json[UP]["group"] = json!(16), "parameter layers.1.mlp.up_proj.q: expected (U8, [2, 2, 128])"),
        (&|json| json[UP]["mins"] = json!(true), "parameter layers.1.mlp.up_proj.mins: missing"),
        (&|json| json["final_norm"] = json[UP].clone(), "final_norm is not a matrix of this model that can be packed"),
        (&|json| json["ghost"] = json[UP].clone(), "ghost is not a matrix of this model that can be packed"),
        (&|json| *json = json!([1]), "expected a JSON object, found \"[1]\""),
        (
            &|json| drop(json.as_object_mut().expect("an object").remove(UP)),
            "1 parameter missing: layers.1.mlp.up_proj",
        ),
    ] {
        let found = refused(&|_, metadata| packed(metadata, change));
        assert!(found.contains(expected), "{found}");
    }
}

#[test]
fn a_packed_file_that_is_cut_is_refused() {
    let root = Model::tied().folder();
    convert(&root, "model", "int8", &to(Precision::Int8)).expect("valid");
    let checkpoint = open(&root, "int8");
    let path = root.path().join("int8/params.safetensors");
    let bytes = fs::read(&path).expect("there");
    fs::write(&path, &bytes[..bytes.len() - 1]).expect("writable");
    let error = Checkpoint::open(&root.path().join("int8")).expect_err("cut").to_string();
    assert!(error.contains("truncated"), "{error}");
    fs::OpenOptions::new().write(true).open(&path).expect("there").set_len(100).expect("cut");
    let embedding = &checkpoint.params().embedding;
    checkpoint.read(embedding, DType::F32).expect_err("the data is gone");
    let error = checkpoint.packed(embedding, Packing::INT8).expect_err("the data is gone").to_string();
    assert!(error.contains("has become shorter since it was opened"), "{error}");
}
