//! The training step as one program: over meshes, in microbatches, in other types, with adapters.

use std::collections::BTreeMap;
use std::path::Path;

use converter::{Checkpoint, Packing};
use serde::Deserialize;
use xla::DType::{self, BF16, F32};
use xla::graph::Save;
use xllama::config::LoraConfig;
use xllama::model::LossOptions;
use xllama::precision::{Integers, Precision};
use xllama::runtime::{GradientSpec, LoadOptions, Metrics, TrainSpec, Trainer, decays, device};
use xllama::sharding::MeshShape;
use xllama::training::{Decay, Optimizer, Schedule, Sgd};

use crate::support::{golden, plugin};
use crate::training::{Case, Sketch, as_checkpoint, lora_config, lora_values, vectors};

/// One step of gradient descent that goes so far that parameters are their gradients, but for the sign and this factor.
const FAR: f64 = 1e6;

/// A batch of four texts for a golden: the two of the vectors, and these turned around.
fn batch(case: &Case) -> (Vec<i32>, Vec<i32>) {
    let twice = |rows: &[Vec<i32>]| rows.iter().chain(rows.iter().rev()).flatten().copied().collect();
    (twice(&case.tokens), twice(&case.targets))
}

/// What PyTorch's AdamW made of models in twenty steps.
#[derive(Deserialize)]
struct Runs {
    optimizer: Optimizer,
    schedule: Schedule,
    clip: f64,
    cases: BTreeMap<String, PyTorch>,
}

#[derive(Deserialize)]
struct PyTorch {
    losses: Vec<f64>,
    cross_entropies: Vec<f64>,
    norms: Vec<f64>,
    rates: Vec<f64>,
    parameters: BTreeMap<String, Moved>,
}

/// A parameter after the last step, and how far it came.
#[derive(Deserialize)]
struct Moved {
    #[serde(flatten)]
    last: Sketch,
    moved: f64,
}

/// The batch of a step as scripts/make_training_vectors.py has it: each row turned by three tokens for each step.
fn turned(case: &Case, by: usize) -> (Vec<i32>, Vec<i32>) {
    let rows: Vec<Vec<i32>> = case.tokens.iter().map(|row| [&row[by..], &row[..by]].concat()).collect();
    let target = |row: &[i32], i: usize| if i % 5 == 2 { -100 } else { *row.get(i + 1).unwrap_or(&-100) };
    let targets = rows.iter().flat_map(|row| (0..row.len()).map(|i| target(row, i)));
    (rows.concat(), targets.collect())
}

#[test]
fn twenty_steps_of_a_model_are_pytorchs() {
    let text = include_str!("../data/training/steps.json");
    let runs: Runs = serde_json::from_str(text).expect("as the script writes it");
    let cases = vectors().cases;
    assert!(runs.cases.len() >= 9, "{}", runs.cases.len());
    for (what, wanted) in &runs.cases {
        let (name, variant) = what.split_once('+').unwrap_or((what, ""));
        let case = &cases[name];
        let microbatches = if variant == "accumulate" { 2 } else { 1 };
        let spec = TrainSpec {
            gradient: GradientSpec {
                batch: case.tokens.len(),
                tokens: case.tokens[0].len(),
                loss: case.loss_options(),
                save: Save::Dots,
            },
            microbatches,
            optimizer: runs.optimizer,
            schedule: runs.schedule,
            max_norm: runs.clip,
            decay: decays,
        };
        let lora = (variant == "lora").then(lora_config);
        let mut trainer = trainer(name, floats(F32, ""), (lora, 0), spec);
        if variant == "lora" {
            let first = lora_values(&trainer.model().params);
            trainer.set_trained(|param| first[&param.name].clone()).expect("as many values");
        }
        for step in 0..wanted.losses.len() {
            let parts: Vec<_> = (0..microbatches).map(|m| turned(case, 3 * step + m)).collect();
            let tokens: Vec<i32> = parts.iter().flat_map(|(tokens, _)| tokens.clone()).collect();
            let targets: Vec<i32> = parts.iter().flat_map(|(_, targets)| targets.clone()).collect();
            let found = trainer.step(&tokens, &targets).expect("a step");
            let rows = [
                ("loss", found.loss, wanted.losses[step], 1e-5),
                ("cross-entropy", found.cross_entropy, wanted.cross_entropies[step], 1e-5),
                ("norm", found.norm, wanted.norms[step], 1e-4),
                ("rate", found.rate, wanted.rates[step], 1e-6),
            ];
            for (value, found, wanted, relative) in rows {
                let off = (f64::from(found) - wanted).abs();
                assert!(off <= relative * wanted.abs(), "{what}, step {step}: {value} is {found}, wanted {wanted}");
            }
        }
        let now = values(&trainer).into_iter().map(|(name, (_, values))| (name, values)).collect();
        let found = as_checkpoint(&trainer.model().params, &now);
        assert!(found.keys().eq(wanted.parameters.keys()), "{what}: {:?}", found.keys());
        for (tensor, wanted) in &wanted.parameters {
            let off = wanted.last.distance(&found[tensor]) / wanted.moved;
            assert!(off <= 1e-4, "{what}: {tensor} is {off:.1e} of its way off");
        }
    }
}

fn spec(case: &Case, microbatches: usize) -> TrainSpec {
    let loss = LossOptions { z_loss: 1e-3, ..LossOptions::default() };
    TrainSpec {
        gradient: GradientSpec { batch: 4 / microbatches, tokens: case.tokens[0].len(), loss, save: Save::Dots },
        microbatches,
        optimizer: Optimizer::Sgd(Sgd::default()),
        schedule: Schedule { peak: FAR, warmup: 0, decay: Decay::Constant },
        max_norm: f64::INFINITY,
        decay: decays,
    }
}

/// Adapters of every projection.
fn lora(dropout: f64) -> LoraConfig {
    LoraConfig { dropout, ..lora_config() }
}

fn trainer(name: &str, options: LoadOptions, adapters: (Option<LoraConfig>, u64), spec: TrainSpec) -> Trainer {
    let checkpoint = Checkpoint::open(Path::new(&golden(name))).expect("a checkpoint");
    load(&checkpoint, options, adapters, spec).unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn load(
    checkpoint: &Checkpoint,
    options: LoadOptions,
    adapters: (Option<LoraConfig>, u64),
    spec: TrainSpec,
) -> Result<Trainer, xllama::Error> {
    let (plugin, client) = device::open(plugin(), options.mesh.devices()).expect("the plugin opens");
    Trainer::load(&plugin, client, checkpoint, options, adapters, spec, &|_, _| ())
}

fn floats(dtype: DType, mesh: &str) -> LoadOptions {
    let mesh = if mesh.is_empty() { MeshShape::default() } else { mesh.parse().expect("a mesh") };
    LoadOptions { mesh, ..LoadOptions::new(dtype, None) }
}

/// Every parameter's values by name, with the shape.
fn values(trainer: &Trainer) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let all = trainer.trained();
    all.iter().map(|(p, x)| (p.name.clone(), (p.shape.clone(), x.to_vec().expect("f32")))).collect()
}

/// Shape and gradient of each parameter by name.
type Gradients = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

/// Metrics of the first step, and the gradients that it took.
fn first_step(trainer: &mut Trainer, case: &Case) -> (Metrics, Gradients) {
    let before = values(trainer);
    let (tokens, targets) = batch(case);
    let metrics = trainer.step(&tokens, &targets).expect("a step");
    let after = values(trainer);
    let gradient = |(name, (shape, before)): (String, (Vec<usize>, Vec<f32>))| {
        let moved = before.iter().zip(&after[&name].1).map(|(a, b)| (f64::from(*a) - f64::from(*b)) / FAR);
        (name, (shape, moved.collect()))
    };
    (metrics, before.into_iter().map(gradient).collect())
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Each gradient is that of one device, wherever a mesh has copies of a head or a longer vocabulary.
#[track_caller]
fn same(what: &str, found: &(Metrics, Gradients), wanted: &(Metrics, Gradients), relative: f64) {
    let near = |a: f32, b: f32| f64::from((a - b).abs()) <= relative * f64::from(b.abs());
    let (a, b) = (&found.0, &wanted.0);
    assert!(near(a.loss, b.loss) && near(a.norm, b.norm) && a.count == b.count, "{what}: {a:?}, wanted {b:?}");
    assert!(found.1.keys().eq(wanted.1.keys()), "{what}: other parameters");
    let whole = norm(&wanted.1.values().flat_map(|(_, x)| x).copied().collect::<Vec<_>>());
    for (name, (shape, wanted)) in &wanted.1 {
        let (found_shape, found) = &found.1[name];
        let size = norm(wanted).max(1e-3 * whole);
        let mut wrong = 0.0;
        let axis = (0..shape.len()).find(|&axis| shape[axis] != found_shape[axis]).unwrap_or(0);
        let inner: usize = shape[axis + 1..].iter().product();
        let times = if found_shape[axis] % shape[axis] == 0 { found_shape[axis] / shape[axis] } else { 1 };
        for (i, x) in found.iter().enumerate() {
            let (outer, at, rest) = (i / inner / found_shape[axis], i / inner % found_shape[axis], i % inner);
            let at = at / times;
            let y = if at < shape[axis] { wanted[(outer * shape[axis] + at) * inner + rest] } else { 0.0 };
            wrong += (x - y) * (x - y);
        }
        let off = (wrong / times as f64).sqrt() / size;
        assert!(off <= relative, "{what}: {name} is {off:.1e} off");
    }
}

#[test]
fn every_mesh_has_the_gradients_of_one_device() {
    let cases = vectors().cases;
    let rows: [(&str, &[&str]); 4] = [
        ("gqa3-linear-tied", &["data=2", "fsdp=2", "model=2", "data=2,fsdp=2"]),
        ("qwen3", &["fsdp=4", "model=2", "data=2,model=2", "fsdp=2,model=4"]),
        ("gqa4-llama3-bias", &["model=4", "sequence=2"]),
        ("mixtral-8x2-window", &["expert=4", "data=2,model=2", "fsdp=2,expert=2"]),
    ];
    for (name, meshes) in rows {
        let case = &cases[name];
        let wanted = first_step(&mut trainer(name, floats(F32, ""), (None, 0), spec(case, 1)), case);
        for mesh in meshes {
            let mut on_mesh = trainer(name, floats(F32, mesh), (None, 0), spec(case, 1));
            same(&format!("{name} on {mesh}"), &first_step(&mut on_mesh, case), &wanted, 2e-5);
        }
    }
}

#[test]
fn microbatches_are_one_batch() {
    let cases = vectors().cases;
    for (name, mesh) in [("gqa2", ""), ("qwen3", "fsdp=2,model=2")] {
        let case = &cases[name];
        let wanted = first_step(&mut trainer(name, floats(F32, ""), (None, 0), spec(case, 1)), case);
        let mut parts = trainer(name, floats(F32, mesh), (None, 0), spec(case, 2));
        same(&format!("{name} in two on {mesh:?}"), &first_step(&mut parts, case), &wanted, 2e-5);
    }
}

#[test]
fn masters_stay_f32_where_products_are_bf16() {
    let case = &vectors().cases["gqa2"];
    let (exact, wanted) = first_step(&mut trainer("gqa2", floats(F32, ""), (None, 0), spec(case, 1)), case);
    let (found, gradients) = first_step(&mut trainer("gqa2", floats(BF16, ""), (None, 0), spec(case, 1)), case);
    assert!((found.loss - exact.loss).abs() < 0.01 * exact.loss && found.loss != exact.loss, "{found:?}, {exact:?}");
    for (name, (_, wanted)) in &wanted {
        let found = &gradients[name].1;
        let off: Vec<f64> = found.iter().zip(wanted).map(|(a, b)| a - b).collect();
        assert!(norm(&off) < 0.05 * norm(wanted), "{name}: {:.1e}", norm(&off) / norm(wanted));
    }
    // A step that bf16 could not hold.
    let mut small = spec(case, 1);
    small.schedule.peak = 1e-6;
    let mut trainer = trainer("gqa2", floats(BF16, ""), (None, 0), small);
    let before = values(&trainer);
    let (tokens, targets) = batch(case);
    trainer.step(&tokens, &targets).expect("a step");
    let after = values(&trainer);
    let moved = |name: &str| before[name].1.iter().zip(&after[name].1).filter(|(a, b)| a != b).count();
    let all = before["layers.0.mlp.up_proj"].1.len();
    assert!(moved("layers.0.mlp.up_proj") > all / 2, "{} of {all}", moved("layers.0.mlp.up_proj"));
}

/// b as a matrix that changes something.
fn with_b(trainer: &mut Trainer) {
    let now = values(trainer);
    let b = |i: usize| ((i * 37 + 11) % 101) as f32 / 1010.0 - 0.05;
    let of = |name: &str| -> Vec<f32> {
        let (_, values) = &now[name];
        if name.ends_with(".b") { (0..values.len()).map(b).collect() } else { values.clone() }
    };
    trainer.set_trained(|param| of(&param.name)).expect("as many values");
}

#[test]
fn adapters_begin_with_nothing_and_train_alone() {
    let case = &vectors().cases["qwen2-moe"];
    let full = first_step(&mut trainer("qwen2-moe", floats(F32, ""), (None, 0), spec(case, 1)), case);
    let mut own = trainer("qwen2-moe", floats(F32, ""), (Some(lora(0.0)), 7), spec(case, 1));
    let (metrics, gradients) = first_step(&mut own, case);
    assert!((metrics.loss - full.0.loss).abs() < 1e-6 * full.0.loss, "{metrics:?}");
    assert!(gradients.keys().all(|name| name.contains("_lora.")), "{:?}", gradients.keys());
    let layers = own.model().cfg.n_layers;
    assert_eq!(gradients.len(), 2 * 7 * layers, "attention and the shared expert");
    // Nothing flows to a before b is something.
    assert!(gradients.iter().all(|(name, (_, x))| (norm(x) == 0.0) == name.ends_with(".a")));
}

#[test]
fn adapters_on_a_mesh_and_beside_integers() {
    let cases = vectors().cases;
    for (name, mesh) in [("gqa4-llama3-bias", "model=4"), ("qwen3", "fsdp=2,model=2")] {
        let case = &cases[name];
        let run = |mesh: &str| {
            let mut trainer = trainer(name, floats(F32, mesh), (Some(lora(0.0)), 7), spec(case, 1));
            if mesh.is_empty() || !name.starts_with("gqa4") {
                with_b(&mut trainer);
            }
            first_step(&mut trainer, case)
        };
        if name.starts_with("gqa4") {
            // Copies of heads have more numbers: what b begins with is the same.
            let one = trainer(name, floats(F32, ""), (Some(lora(0.0)), 7), spec(case, 1));
            let wanted = first_step(&mut { one }, case);
            same(&format!("{name} on {mesh}"), &run(mesh), &wanted, 2e-5);
        } else {
            same(&format!("{name} on {mesh}"), &run(mesh), &run(""), 2e-5);
        }
    }
    // Integers that stay integers give the gradients of the floats that they stand for.
    let case = &cases["qwen3"];
    let folder = tempfile::tempdir().expect("a folder");
    let dst = folder.path().join("int8");
    let options = converter::ConvertOptions { dtype: Some(converter::Precision::Int8), ..Default::default() };
    converter::convert(Path::new(&golden("qwen3")), &dst, &options, &|_, _| (), &false.into()).expect("converted");
    let checkpoint = Checkpoint::open(&dst).expect("a checkpoint");
    let run = |integers: Integers| {
        let options = LoadOptions { precision: Precision { dtype: F32, integers }, ..LoadOptions::new(F32, None) };
        let mut trainer = load(&checkpoint, options, (Some(lora(0.0)), 7), spec(case, 1)).expect("it loads");
        with_b(&mut trainer);
        first_step(&mut trainer, case)
    };
    same("int8", &run(Integers::AsStored), &run(Integers::No), 2e-5);
    let exact = trainer("qwen3", floats(F32, ""), (Some(lora(0.0)), 7), spec(case, 1));
    assert_ne!(run(Integers::AsStored).0.loss, first_step(&mut { exact }, case).0.loss);
}

#[test]
fn dropout_is_the_seeds_and_has_its_own_gradient() {
    let case = &vectors().cases["gqa2"];
    let (tokens, targets) = batch(case);
    // A step that moves nothing, from b moved by `along` in a direction.
    let losses = |dropout: f64, seed: u64, along: f64| -> [f32; 2] {
        let mut still = spec(case, 1);
        still.schedule.peak = 0.0;
        let mut trainer = trainer("gqa2", floats(F32, ""), (Some(lora(dropout)), seed), still);
        with_b(&mut trainer);
        let now = values(&trainer);
        let moved = |name: &str| {
            let direction = |i: usize| along * ((i * 13 + 5) % 7) as f64 / 7.0;
            now[name].1.iter().enumerate().map(|(i, x)| (f64::from(*x) + direction(i)) as f32).collect()
        };
        trainer.set_trained(|param| moved(&param.name)).expect("as many values");
        [(); 2].map(|()| trainer.step(&tokens, &targets).expect("a step").loss)
    };
    let [first, second] = losses(0.5, 3, 0.0);
    let [none, again] = losses(0.0, 3, 0.0);
    assert_eq!(none, again);
    assert!(first != none && first != second, "another mask at every step: {first}, {second}, without {none}");
    assert_eq!(losses(0.5, 3, 0.0), [first, second]);
    assert_ne!(losses(0.5, 4, 0.0)[0], first);

    let mut moving = trainer("gqa2", floats(F32, ""), (Some(lora(0.5)), 3), spec(case, 1));
    with_b(&mut moving);
    let (_, gradients) = first_step(&mut moving, case);
    let slope: f64 = gradients
        .values()
        .map(|(_, x)| x.iter().enumerate().map(|(i, x)| x * ((i * 13 + 5) % 7) as f64 / 7.0).sum::<f64>())
        .sum();
    let step = 1e-2;
    let [up, down] = [step, -step].map(|along| f64::from(losses(0.5, 3, along)[0]));
    let wanted = (up - down) / (2.0 * step);
    assert!((slope - wanted).abs() < 0.02 * wanted.abs(), "{slope}, by differences {wanted}");
}

#[test]
fn what_was_trained_is_a_checkpoint() {
    // On this mesh heads have copies and the vocabulary of 223 is padded.
    let name = "gqa4-llama3-bias";
    let case = &vectors().cases[name];
    let checkpoint = Checkpoint::open(Path::new(&golden(name))).expect("a checkpoint");
    let folder = tempfile::tempdir().expect("a folder");
    let save = |mesh: &str| {
        let mut slow = spec(case, 1);
        slow.schedule.peak = 0.5;
        let mut trainer = load(&checkpoint, floats(F32, mesh), (None, 0), slow).expect("it loads");
        let (tokens, targets) = batch(case);
        trainer.step(&tokens, &targets).expect("a step");
        let dst = folder.path().join(if mesh.is_empty() { "one" } else { "four" });
        trainer.save(&checkpoint, &dst).expect("saved");
        // A folder that is there is left as it is.
        assert!(trainer.save(&checkpoint, &dst).is_err());
        Checkpoint::open(&dst).expect("a checkpoint")
    };
    let read = |checkpoint: &Checkpoint, param| -> Vec<f32> {
        let array = checkpoint.read(param, converter::DType::F32).expect("a parameter");
        array.to_f32().into_iter().collect()
    };
    let (one, four) = (save(""), save("model=4"));
    for (i, param) in one.params().iter().into_iter().enumerate() {
        let (found, wanted) = (read(&four, four.params().iter()[i]), read(&one, param));
        let before = read(&checkpoint, checkpoint.params().iter()[i]);
        let far = |a: &[f32], b: &[f32]| norm(&a.iter().zip(b).map(|(a, b)| f64::from(a - b)).collect::<Vec<_>>());
        let way = far(&wanted, &before);
        assert!(way > 0.0 && far(&found, &wanted) < 1e-4 * way, "{}: {}", param.name, far(&found, &wanted) / way);
    }
    let adapters = trainer(name, floats(F32, ""), (Some(lora(0.0)), 7), spec(case, 1));
    let refused = adapters.save(&checkpoint, &folder.path().join("lora")).expect_err("no checkpoint").to_string();
    assert!(refused.contains("adapters alone are no checkpoint"), "{refused}");
}

#[test]
fn what_cannot_be_trained_is_named() {
    let case = &vectors().cases["gqa2"];
    let checkpoint = Checkpoint::open(Path::new(&golden("gqa2"))).expect("a checkpoint");
    let message = |options: LoadOptions, adapters: Option<LoraConfig>| {
        load(&checkpoint, options, (adapters, 0), spec(case, 1)).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let int8 = Precision { dtype: F32, integers: Integers::All(Packing::INT8) };
    let packed = message(LoadOptions { precision: int8, ..LoadOptions::new(F32, None) }, None);
    assert!(packed.contains("integers, which cannot be trained; train adapters beside it"), "{packed}");
    let wrong = |lora| message(floats(F32, ""), Some(lora));
    assert!(wrong(LoraConfig { rank: 0, ..lora(0.0) }).ends_with("rank must be at least 1, found 0"));
    assert!(wrong(LoraConfig { dropout: 1.0, ..lora(0.0) }).ends_with("at least 0 and below 1, found 1"));
    assert!(wrong(LoraConfig { alpha: f64::NAN, ..lora(0.0) }).ends_with("alpha must be finite, found NaN"));
    assert!(wrong(LoraConfig { projections: vec![], ..lora(0.0) }).contains("at least one of q_proj, k_proj"));
    let mut trainer = load(&checkpoint, floats(F32, ""), (None, 0), spec(case, 1)).expect("it loads");
    let few = trainer.step(&[1], &[2]).expect_err("too few").to_string();
    assert!(few.contains("found 1 and 1"), "{few}");
}
