//! Gradients of whole models against PyTorch's autograd in float64: every parameter, and every adapter beside one, of every small
//! golden, with and without values computed once more, and of real models.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use converter::layout::Layout;
use converter::{Checkpoint, Llama, Param};
use serde::Deserialize;
use xla::DType;
use xla::graph::{Platform, Save};
use xla::pjrt::Client;
use xla::wheel::FetchOptions;
use xllama::config::{LoraConfig, LoraProjection};
use xllama::model::LossOptions;
use xllama::models::resolve;
use xllama::runtime::{Blueprint, GradientSpec, build_gradients, device, register_kernels, trains};
use xllama::sharding::MeshShape;

use crate::support::{golden, plugin};

/// What PyTorch found.
#[derive(Deserialize)]
pub(crate) struct Vectors {
    pub(crate) cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
pub(crate) struct Case {
    options: Options,
    pub(crate) tokens: Vec<Vec<i32>>,
    pub(crate) targets: Vec<Vec<i32>>,
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
pub(crate) struct Sketch {
    pub(crate) norm: f64,
    sketch: Vec<f64>,
}

/// What PyTorch found of adapters, for the batches and options of [`Vectors`].
#[derive(Deserialize)]
struct LoraVectors {
    cases: BTreeMap<String, LoraCase>,
}

#[derive(Deserialize)]
struct LoraCase {
    loss: f64,
    cross_entropy: f64,
    gradients: BTreeMap<String, Sketch>,
}

pub(crate) fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../data/training.json")).expect("the vectors")
}

impl Case {
    pub(crate) fn loss_options(&self) -> LossOptions {
        let Options { label_smoothing, z_loss, load_balancing, router_z_loss } = self.options;
        LossOptions { label_smoothing, z_loss, load_balancing, router_z_loss }
    }
}

/// SplitMix64's numbers, as scripts/make_training_vectors.py has them.
fn numbers(seed: u64) -> impl Iterator<Item = u64> {
    (1u64..).map(move |i| {
        let mut z = ((seed << 32).wrapping_add(i)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// +1 and −1 by their top bits.
fn signs(seed: u64) -> impl Iterator<Item = f64> {
    numbers(seed).map(|z| if z >> 63 == 0 { 1.0 } else { -1.0 })
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

/// A tensor of a Hugging Face checkpoint as our array, the inverse of [`pieces`] for one piece.
fn array_of(param: &Param, values: &[f32]) -> Vec<f32> {
    match param.layout {
        Layout::Same => values.to_vec(),
        Layout::Transposed => {
            let (rows, columns) = (param.pieces[0].rows, param.pieces[0].columns());
            (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
        }
    }
}

/// The adapters of lora.json.
pub(crate) fn lora_config() -> LoraConfig {
    LoraConfig { rank: 4, alpha: 6.0, dropout: 0.0, projections: LoraProjection::ALL.to_vec() }
}

/// What each adapter begins with in PyTorch, by our name.
pub(crate) fn lora_values(params: &Llama<Param>) -> BTreeMap<String, Vec<f32>> {
    let mut adapters: Vec<&Param> = params.iter().into_iter().filter(|param| param.is_adapter()).collect();
    adapters.sort_by_key(|param| param.pieces[0].name.clone());
    let values = |(i, param): (usize, &Param)| {
        let uniform = numbers(1000 + i as u64).map(|z| (z >> 11) as f64 / (1u64 << 53) as f64);
        let values: Vec<f32> = uniform.take(param.elements()).map(|u| (0.1 * (2.0 * u - 1.0)) as f32).collect();
        (param.name.clone(), array_of(param, &values))
    };
    adapters.into_iter().enumerate().map(values).collect()
}

/// Parameters, which `values` gives, as tensors of the checkpoint.
pub(crate) fn as_checkpoint(params: &Llama<Param>, values: &BTreeMap<String, Vec<f32>>) -> BTreeMap<String, Vec<f32>> {
    let all = params.iter();
    let parts: Vec<Vec<Vec<f32>>> =
        all.iter().map(|param| values.get(&param.name).map_or_else(Vec::new, |x| pieces(param, x))).collect();
    let tensors = params.hf_tensors().into_iter().filter(|tensor| !parts[tensor.parts[0].0].is_empty());
    let joined = tensors.map(|tensor| {
        let values = tensor.parts.iter().flat_map(|&(i, j)| parts[i][j].iter().copied()).collect();
        (tensor.name, values)
    });
    joined.collect()
}

/// Loss, cross-entropy, and the gradients as tensors of the checkpoint: of the adapters, where there are any.
fn gradients(
    client: &Client,
    checkpoint: &Checkpoint,
    case: &Case,
    lora: Option<LoraConfig>,
    (save, kernels): (Save, &'static [&'static str]),
) -> (f64, f64, BTreeMap<String, Vec<f32>>) {
    let (batch, tokens) = (case.tokens.len(), case.tokens[0].len());
    let spec = GradientSpec { batch, tokens, loss: case.loss_options(), save };
    let mut cfg = checkpoint.config().clone();
    cfg.lora = lora;
    let params = checkpoint.params().clone().with_adapters(&cfg);
    let model = Blueprint::new(&cfg, &params, DType::F32, MeshShape::default(), Platform::Cpu).expect("a model");
    let model = model.with_kernels(kernels);
    let module = build_gradients(&spec, &model).unwrap_or_else(|e| panic!("{e}"));
    let exe = client.compile(&module.stablehlo(), &model.compile_options()).expect("it compiles");
    let adapters = lora_values(&params);
    let mut args = Vec::new();
    for param in params.iter() {
        let read =
            || checkpoint.read(param, converter::DType::F32).expect("a parameter").to_f32().into_iter().collect();
        let values: Vec<f32> = adapters.get(&param.name).cloned().unwrap_or_else(read);
        args.push(client.upload_slice(&values, &param.shape, None).expect("uploaded"));
    }
    for ids in [&case.tokens, &case.targets] {
        args.push(client.upload_slice(&ids.concat(), &[batch, tokens], None).expect("uploaded"));
    }
    let results = exe.execute(&args.iter().collect::<Vec<_>>()).expect("it runs");
    let scalar = |i: usize| f64::from(results[i].to_vec::<f32>().expect("a scalar")[0]);
    let trained = params.iter().into_iter().filter(|param| trains(param, &model));
    let found = trained.zip(&results[3..]).map(|(param, x)| (param.name.clone(), x.to_vec().expect("a gradient")));
    (scalar(0), scalar(1), as_checkpoint(&params, &found.collect()))
}

/// The norm of the difference as a part of PyTorch's, by its products with the vectors of signs. Where PyTorch's is nothing beside
/// the `whole` gradient (that of a key's bias without rotation is zero but for rounding), as a part of a thousandth of that.
fn distance(found: &[f32], wanted: &Sketch, whole: f64) -> f64 {
    let size = if wanted.norm < 1e-9 * whole { 1e-3 * whole } else { wanted.norm };
    wanted.distance(found) / size
}

impl Sketch {
    /// The norm of the difference.
    pub(crate) fn distance(&self, found: &[f32]) -> f64 {
        let products = self.sketch.iter().enumerate().map(|(k, wanted)| {
            let product: f64 = found.iter().zip(signs(k as u64)).map(|(&x, sign)| f64::from(x) * sign).sum();
            (product - wanted).powi(2)
        });
        let squared = products.sum::<f64>() / self.sketch.len() as f64;
        let norm = found.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        squared.sqrt().max((norm - self.norm).abs())
    }
}

/// How far the gradient of a parameter may be.
const RELATIVE: f64 = 2e-5;

/// The same of Gemma 3 270M, whose residual stream reaches 1e5: weights of two of its norms are at 2.0e-5 and 2.2e-5 with AVX2, the
/// other 234 tensors within 1.2e-5.
const RELATIVE_OF_GEMMA: f64 = 3e-5;

/// Each golden's losses and gradients, or those of its adapters, are PyTorch's, whatever is kept for the gradients and whether kernels
/// compute some of them.
fn compare(
    cases: BTreeMap<String, Case>,
    folder: impl Fn(&str) -> PathBuf + Sync,
    adapters: Option<&LoraVectors>,
    ways: &[(Save, bool)],
) {
    let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
    let kernels = register_kernels(&plugin);
    assert!(!kernels.is_empty());
    let cases: Vec<(String, Case)> = cases.into_iter().collect();
    let failures = Mutex::new(Vec::new());
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((name, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let checkpoint = Checkpoint::open(&folder(name)).expect("a checkpoint");
            let (losses, wanted) = match adapters.map(|lora| &lora.cases[name]) {
                Some(LoraCase { loss, cross_entropy, gradients }) => ([*loss, *cross_entropy], gradients),
                None => ([case.loss, case.cross_entropy], &case.gradients),
            };
            let relative = if name == "gemma3-270m" { RELATIVE_OF_GEMMA } else { RELATIVE };
            for (save, by_kernels) in ways {
                let lora = adapters.map(|_| lora_config());
                let way = (save.clone(), if *by_kernels { kernels } else { &[] });
                let (loss, own, found) = gradients(&client, &checkpoint, case, lora, way);
                let mut wrong = Vec::new();
                for (what, found, wanted) in [("loss", loss, losses[0]), ("cross-entropy", own, losses[1])] {
                    if (found - wanted).abs() > 2e-6 * wanted.abs() {
                        wrong.push(format!("{what} {found}, wanted {wanted}"));
                    }
                }
                let whole = wanted.values().map(|x| x.norm.powi(2)).sum::<f64>().sqrt();
                for (tensor, wanted) in wanted {
                    match found.get(tensor) {
                        None => wrong.push(format!("{tensor} is missing")),
                        Some(found) => {
                            let off = distance(found, wanted, whole);
                            if off.is_nan() || off > relative {
                                wrong.push(format!("{tensor}: {off:.1e}"));
                            }
                        }
                    }
                }
                let unknown: Vec<_> = found.keys().filter(|name| !wanted.contains_key(*name)).collect();
                if !unknown.is_empty() {
                    wrong.push(format!("PyTorch has no {unknown:?}"));
                }
                if !wrong.is_empty() {
                    failures
                        .lock()
                        .unwrap()
                        .push(format!("{name}, {save:?}, kernels {by_kernels}: {}", wrong.join(", ")));
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

#[test]
fn every_golden_has_pytorchs_gradients() {
    let cases = vectors().cases;
    assert!(cases.len() >= 39, "{}", cases.len());
    compare(cases, |name| golden(name).into(), None, &[(Save::Everything, true), (Save::Nothing, false)]);
}

/// Those of SmolLM2 and Gemma 3 270M, too, in as many positions as their goldens have.
#[test]
fn real_models_have_pytorchs_gradients() {
    let text = include_str!("../data/training/models.json");
    let Vectors { cases } = serde_json::from_str(text).expect("as the script writes it");
    assert_eq!(cases.keys().collect::<Vec<_>>(), ["gemma3-270m", "smollm2-135m"]);
    let folder = |name: &str| {
        let options = FetchOptions::default();
        resolve(name, &options, &AtomicBool::new(false), &|_| ()).expect("a packaged model")
    };
    compare(cases, folder, None, &[(Save::Dots, true)]);
}

#[test]
fn every_golden_has_pytorchs_gradients_of_adapters() {
    let text = include_str!("../data/training/lora.json");
    let adapters = serde_json::from_str(text).expect("as the script writes it");
    compare(vectors().cases, |name| golden(name).into(), Some(&adapters), &[(Save::Dots, true)]);
}
