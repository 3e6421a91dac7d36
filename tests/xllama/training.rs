//! Gradients of whole models against PyTorch's autograd in float64: every parameter of every small golden, with and without values
//! computed once more.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use converter::layout::Layout;
use converter::{Checkpoint, Param};
use serde::Deserialize;
use xla::DType;
use xla::graph::{Platform, Save};
use xla::pjrt::Client;
use xllama::model::LossOptions;
use xllama::runtime::{Blueprint, GradientSpec, build_gradients, device};
use xllama::sharding::MeshShape;

use crate::support::{golden, plugin};

/// What PyTorch found.
#[derive(Deserialize)]
struct Vectors {
    cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    options: Options,
    tokens: Vec<Vec<i32>>,
    targets: Vec<Vec<i32>>,
    loss: f64,
    cross_entropy: f64,
    gradients: BTreeMap<String, Sketch>,
}

#[derive(Clone, Copy, Deserialize)]
struct Options {
    label_smoothing: f64,
    z_loss: f64,
    #[serde(default)]
    load_balancing: f64,
    #[serde(default)]
    router_z_loss: f64,
}

/// A tensor by its norm and its products with vectors of signs.
#[derive(Deserialize)]
struct Sketch {
    norm: f64,
    sketch: Vec<f64>,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../data/training.json")).expect("the vectors")
}

/// +1 and −1, as scripts/make_training_vectors.py has them.
fn signs(seed: u64) -> impl Iterator<Item = f64> {
    (1u64..).map(move |i| {
        let mut z = ((seed << 32).wrapping_add(i)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        if (z ^ (z >> 31)) >> 63 == 0 { 1.0 } else { -1.0 }
    })
}

/// A parameter's array as the pieces of a Hugging Face checkpoint.
fn pieces(param: &Param, values: &[f32]) -> Vec<Vec<f32>> {
    let each = values.chunks(values.len() / param.pieces.len());
    each.zip(&param.pieces)
        .map(|(values, piece)| match param.layout {
            Layout::Same => values.to_vec(),
            Layout::Transposed => {
                let (rows, columns) = (piece.rows, piece.columns());
                (0..rows * columns).map(|i| values[i % columns * rows + i / columns]).collect()
            }
        })
        .collect()
}

/// Loss, cross-entropy, and the gradients as tensors of the checkpoint.
fn gradients(
    client: &Client,
    checkpoint: &Checkpoint,
    case: &Case,
    save: Save,
) -> (f64, f64, BTreeMap<String, Vec<f32>>) {
    let Options { label_smoothing, z_loss, load_balancing, router_z_loss } = case.options;
    let loss = LossOptions { label_smoothing, z_loss, load_balancing, router_z_loss };
    let (batch, tokens) = (case.tokens.len(), case.tokens[0].len());
    let spec = GradientSpec { batch, tokens, loss, save };
    let (cfg, params) = (checkpoint.config(), checkpoint.params());
    let model = Blueprint::new(cfg, params, DType::F32, MeshShape::default(), Platform::Cpu).expect("a model");
    let module = build_gradients(&spec, &model).unwrap_or_else(|e| panic!("{e}"));
    let exe = client.compile(&module.stablehlo(), &model.compile_options()).expect("it compiles");
    let mut args = Vec::new();
    for param in params.iter() {
        let array = checkpoint.read(param, converter::DType::F32).expect("a parameter");
        let values: Vec<f32> = array.to_f32().into_iter().collect();
        args.push(client.upload_slice(&values, &param.shape, None).expect("uploaded"));
    }
    for ids in [&case.tokens, &case.targets] {
        args.push(client.upload_slice(&ids.concat(), &[batch, tokens], None).expect("uploaded"));
    }
    let results = exe.execute(&args.iter().collect::<Vec<_>>()).expect("it runs");
    let scalar = |i: usize| f64::from(results[i].to_vec::<f32>().expect("a scalar")[0]);
    let all: Vec<&Param> = params.iter();
    let parts: Vec<Vec<Vec<f32>>> =
        all.iter().zip(&results[3..]).map(|(param, x)| pieces(param, &x.to_vec().expect("a gradient"))).collect();
    let joined = params.hf_tensors().into_iter().map(|tensor| {
        let values = tensor.parts.iter().flat_map(|&(i, j)| parts[i][j].iter().copied()).collect();
        (tensor.name, values)
    });
    (scalar(0), scalar(1), joined.collect())
}

/// The norm of the difference as a part of PyTorch's, by its products with the vectors of signs. Where PyTorch's is nothing beside
/// the `whole` gradient (that of a key's bias without rotation is zero but for rounding), as a part of a thousandth of that.
fn distance(found: &[f32], wanted: &Sketch, whole: f64) -> f64 {
    let products = wanted.sketch.iter().enumerate().map(|(k, wanted)| {
        let product: f64 = found.iter().zip(signs(k as u64)).map(|(&x, sign)| f64::from(x) * sign).sum();
        (product - wanted).powi(2)
    });
    let squared = products.sum::<f64>() / wanted.sketch.len() as f64;
    let norm = found.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let size = if wanted.norm < 1e-9 * whole { 1e-3 * whole } else { wanted.norm };
    squared.sqrt().max((norm - wanted.norm).abs()) / size
}

/// How far the gradient of a parameter may be.
const RELATIVE: f64 = 2e-5;

#[test]
fn every_golden_has_pytorchs_gradients() {
    let client = device::open(plugin(), 1).expect("the plugin opens").1;
    let cases: Vec<(String, Case)> = vectors().cases.into_iter().collect();
    assert!(cases.len() >= 39, "{}", cases.len());
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((name, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let checkpoint = Checkpoint::open(Path::new(&golden(name))).expect("a checkpoint");
            for save in [Save::Everything, Save::Nothing] {
                let (loss, own, found) = gradients(&client, &checkpoint, case, save.clone());
                let mut wrong = Vec::new();
                for (what, found, wanted) in [("loss", loss, case.loss), ("cross-entropy", own, case.cross_entropy)] {
                    if (found - wanted).abs() > 2e-6 * wanted.abs() {
                        wrong.push(format!("{what} {found}, wanted {wanted}"));
                    }
                }
                let whole = case.gradients.values().map(|x| x.norm.powi(2)).sum::<f64>().sqrt();
                for (tensor, wanted) in &case.gradients {
                    match found.get(tensor) {
                        None => wrong.push(format!("{tensor} is missing")),
                        Some(found) => {
                            let off = distance(found, wanted, whole);
                            if off.is_nan() || off > RELATIVE {
                                wrong.push(format!("{tensor}: {off:.1e}"));
                            }
                        }
                    }
                }
                let unknown: Vec<_> = found.keys().filter(|name| !case.gradients.contains_key(*name)).collect();
                if !unknown.is_empty() {
                    wrong.push(format!("PyTorch has no {unknown:?}"));
                }
                if !wrong.is_empty() {
                    failures.lock().unwrap().push(format!("{name}, {save:?}: {}", wrong.join(", ")));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} fail:\n{}", failures.len(), failures.join("\n"));
}
