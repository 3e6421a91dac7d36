//! Pins that packed weights mean the same wherever they are multiplied: on meshes and in the forms of accelerators their codes lie with
//! the axes of the floats, and the logits are those of the floats that they stand for.

use std::path::Path;

use converter::Checkpoint;
use serde_json::{Value, json};
use xla::DType;
use xla::graph::Platform;
use xllama::precision::{Integers, Precision};
use xllama::runtime::{CacheOptions, Engine, LoadOptions, device};
use xllama::sharding::MeshShape;

use crate::support::{Folder, Tiny, logits, plugin, run};

/// A model whose matrices are packed as `dtype` says, in a folder of its own.
fn packed(changes: Value, dtype: &str) -> Folder {
    let folder = Tiny::random_of(changes).folder();
    run(["convert-params", &folder.model(), &folder.arg("packed"), "--dtype", dtype, "--json"]).json();
    folder
}

fn engine(folder: &Path, integers: Integers, mesh: &str, forms: Platform) -> Engine {
    let mesh: MeshShape = if mesh.is_empty() { Default::default() } else { mesh.parse().expect("a mesh") };
    let (plugin, client) = device::open(plugin(), mesh.devices()).expect("the plugin opens");
    let checkpoint = Checkpoint::open(folder).expect("a checkpoint");
    let precision = Precision { dtype: DType::F32, integers };
    let options = LoadOptions { precision, mesh, forms: Some(forms), ..LoadOptions::new(DType::F32, None) };
    let engine = Engine::load(plugin, client, &checkpoint, options, &|_, _| ()).expect("it loads");
    engine.with_cache(CacheOptions { dtype: Some(DType::F32), ..CacheOptions::default() })
}

/// Groups of 32 lie on one device along every axis of these meshes but `fsdp`, which gathers; 37 ids are padded, two key/value heads
/// stand on four devices.
fn dense() -> Value {
    json!({"vocab_size": 37, "hidden_size": 64, "head_dim": 32, "intermediate_size": 128, "num_hidden_layers": 2})
}

/// f32 sums in another order, in two layers of weights up to 1: 1e-5 was seen.
const EXACT: f32 = 5e-5;

fn experts() -> Value {
    json!({"vocab_size": 37, "hidden_size": 64, "head_dim": 32, "intermediate_size": 64, "model_type": "mixtral",
           "num_local_experts": 4, "num_experts_per_tok": 2, "architectures": ["MixtralForCausalLM"]})
}

#[test]
fn meshes_and_accelerators_multiply_with_codes() {
    let (cpu, tpu, gpu) = (Platform::Cpu, Platform::Tpu, Platform::Gpu);
    let cases = [
        (dense(), "int8", &[("", tpu), ("", gpu), ("model=2", cpu), ("model=4", cpu), ("data=2,model=2", tpu)][..]),
        (dense(), "int4", &[("", tpu), ("fsdp=4", cpu)]),
        (experts(), "int8", &[("", gpu), ("expert=2,model=2", cpu)]),
        (experts(), "int4", &[("", tpu)]),
    ];
    for (changes, dtype, places) in cases {
        let folder = packed(changes.clone(), dtype);
        let floats = engine(&folder.path("packed"), Integers::No, "", cpu);
        let wanted = logits(&floats);
        let largest = wanted.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
        for &(mesh, forms) in places {
            let codes = engine(&folder.path("packed"), Integers::AsStored, mesh, forms);
            let what = format!("{} {dtype} {mesh} {forms:?}", changes["model_type"]);
            let share = codes.weight_bytes() as f64 / floats.weight_bytes() as f64;
            // Of 4 bytes; with scales, more ids than there are, and on a TPU an embedding of floats.
            assert!(share < if dtype == "int8" { 0.5 } else { 0.35 }, "{what}: {share} of the floats' bytes");
            let found = logits(&codes);
            assert_eq!(found.len(), wanted.len(), "{what}");
            let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= EXACT * largest, "{what}: {worst} of {largest}");
        }
    }
}

#[test]
fn what_no_device_can_have_in_groups_is_widened() {
    // Heads of 16: a group of what comes out of attention would lie on two of them.
    let folder = packed(json!({"vocab_size": 37, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64}), "int8");
    let codes = engine(&folder.path("packed"), Integers::AsStored, "model=4", Platform::Cpu);
    let of = |name: &str| {
        let params = codes.model().params.iter();
        let param = params.into_iter().find(|param| param.name == name).expect("a parameter");
        param.packing.map(|packing| packing.name())
    };
    assert_eq!(
        ["attention.q_proj", "attention.out_proj", "mlp.gate_proj", "mlp.down_proj"]
            .map(|name| of(&format!("layers.0.{name}"))),
        [Some("int8"), None, Some("int8"), None]
    );
    let wanted = logits(&engine(&folder.path("packed"), Integers::No, "", Platform::Cpu));
    let largest = wanted.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let worst = logits(&codes).iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= EXACT * largest, "{worst} of {largest}");
}
