//! One step of training as one program: loss, gradients, and parameters moved by an optimizer in the memory that they have.

use xla::DType::{F32, I32, U64};
use xla::graph::{ArgAttrs, Graph, Module, Tensor};

use super::gradients::{GradientSpec, copies, gradients_of, loss_of, of_all_copies, trained};
use super::program::Blueprint;
use crate::Error;
use crate::params::{self, Param};
use crate::training::{AdamW, Decay, Optimizer, Schedule, clip_by_global_norm};

/// A step of training, by everything that shapes it.
#[derive(Clone, Debug)]
pub struct TrainSpec {
    /// A microbatch: its size, its loss, what is kept for its gradient.
    pub gradient: GradientSpec,
    /// Microbatches of a step (A), run one after another.
    pub microbatches: usize,
    /// What moves the parameters.
    pub optimizer: Optimizer,
    /// How far.
    pub schedule: Schedule,
    /// The largest norm of the whole gradient; `f64::INFINITY` leaves it as it is.
    pub max_norm: f64,
    /// Which weights decay; usually [`decays`].
    pub decay: fn(&Param) -> bool,
}

impl TrainSpec {
    /// What fine-tuning usually takes: AdamW with β₂ 0.95 and a constant rate of 1e-4, gradients clipped to norm 1.
    pub fn new(gradient: GradientSpec, microbatches: usize) -> TrainSpec {
        TrainSpec {
            gradient,
            microbatches,
            optimizer: Optimizer::AdamW(AdamW { beta2: 0.95, weight_decay: 0.1, ..AdamW::default() }),
            schedule: Schedule { peak: 1e-4, warmup: 0, decay: Decay::Constant },
            max_norm: 1.0,
            decay: decays,
        }
    }
}

/// Matrices decay, vectors (norms and biases) do not; nor does an expert's correction bias, which is a vector too.
pub fn decays(param: &Param) -> bool {
    param.pieces.first().is_some_and(|piece| piece.shape.len() > 1)
}

/// What a step tells beside the parameters: the names of its last results, f32 scalars.
pub(super) const METRICS: [&str; 5] = ["loss", "cross_entropy", "count", "norm", "rate"];

/// Arguments: parameters (in declaration order, those that are trained in f32, the others as the devices have them), the optimizer's
/// state (for each trained parameter, under its name and that of the array), `step` i32, the number of steps before, with dropout
/// `seed` (2) u64, then `tokens` and `targets` (A, B, S) i32. Results: what is trained, its state and `step`, each in the memory of the
/// argument of its name, then `loss`, which is differentiated, `cross_entropy`, `count`, the positions that count, `norm`, that
/// of the gradient before it is clipped, and `rate`, f32 scalars.
///
/// Each position of the step counts the same, in whichever microbatch it is. With bf16 or f16 the masters are cast for each
/// microbatch; gradients are summed in f32.
///
/// # Errors
/// Those of the graph; [`Error::Option`] for trained parameters that are packed, and for numbers of adapters outside their range.
pub fn build_train(spec: &TrainSpec, model: &Blueprint) -> Result<Module, Error> {
    if let Some(Err(what)) = model.cfg.lora.as_ref().map(|lora| lora.check()) {
        return Err(Error::Option { name: "lora".into(), what });
    }
    let GradientSpec { batch, tokens: length, .. } = spec.gradient;
    let g = spec.gradient.graph("train", model);
    let trained = trained(model)?;

    let mut arrays = Vec::new();
    for param in model.params.iter() {
        let master = trained.iter().any(|&(_, at)| at == arrays.len());
        for array in model.devices().arrays(param) {
            arrays.push(params::declare(&g, &array, if master { F32 } else { array.dtype }));
        }
    }
    let state: Vec<Vec<Tensor>> = trained.iter().map(|(param, _)| declare_state(&g, spec, param)).collect();
    let step = g.arg("step", I32, &[]);
    let drops = model.cfg.lora.as_ref().is_some_and(|lora| lora.dropout > 0.0);
    let seed = drops.then(|| g.arg("seed", U64, &[2]));
    let logical = ArgAttrs { sharding: Some(&["", "batch", "sequence"]) };
    let [tokens, targets] =
        ["tokens", "targets"].map(|name| g.arg_with(name, I32, &[spec.microbatches, batch, length], logical));

    let all = Batches { tokens: &tokens, targets: &targets, step: &step, seed: seed.as_ref() };
    let (loss, gradients) = all.gradients(&g, &arrays, &trained, spec, model);
    let (gradients, norm) = clip_by_global_norm(&gradients, spec.max_norm);
    let rate = spec.schedule.rate(&step);
    let mut new_state = Vec::new();
    for (((param, at), old), gradient) in trained.iter().zip(&state).zip(&gradients) {
        let (master, gradient) = (&arrays[*at], of_all_copies(gradient, param));
        let (new, states) = spec.optimizer.update(master, &gradient, old, &rate, &step, (spec.decay)(param));
        g.output_aliased(&param.name, &new, master);
        new_state.extend(states);
    }
    for (new, old) in new_state.iter().zip(state.iter().flatten()) {
        g.output_aliased(&old.name().unwrap_or_default(), new, old);
    }
    g.output_aliased("step", &(&step + 1), &step);
    let [loss, cross_entropy] = loss;
    for (name, value) in METRICS.into_iter().zip([loss, cross_entropy, all.count(), norm, rate]) {
        g.output(name, &value);
    }
    Ok(g.finish()?)
}

/// The optimizer's arrays of a parameter, which lie on the mesh as it does.
fn declare_state(g: &Graph, spec: &TrainSpec, param: &Param) -> Vec<Tensor> {
    let arrays = spec.optimizer.state(&param.shape).into_iter();
    let sharding = Some(&param.logical[..]);
    let declare = |name: &str, dtype, shape: &[usize]| {
        g.arg_with(&format!("{}.{name}", param.name), dtype, shape, ArgAttrs { sharding })
    };
    arrays.map(|(name, aval)| declare(name, aval.dtype, &aval.shape)).collect()
}

/// The microbatches of a step, (A, B, S) i32 each.
struct Batches<'a> {
    tokens: &'a Tensor,
    targets: &'a Tensor,
    /// Number of steps before.
    step: &'a Tensor,
    /// Of what adapters drop.
    seed: Option<&'a Tensor>,
}

impl Batches<'_> {
    /// Positions that count, an f32 scalar.
    #[track_caller]
    fn count(&self) -> Tensor {
        self.targets.ge(0i64).cast(F32).sum(&[0, 1, 2])
    }

    /// Loss and cross-entropy, and the gradients, f32.
    #[track_caller]
    fn gradients(
        &self,
        g: &Graph,
        arrays: &[Tensor],
        trained: &[(&Param, usize)],
        spec: &TrainSpec,
        model: &Blueprint,
    ) -> ([Tensor; 2], Vec<Tensor>) {
        let microbatches = spec.microbatches;
        let total = self.count().maximum(1.0);
        // The key is another in each step, the counter begins elsewhere in each microbatch.
        let none = || g.scalar(0i64, U64);
        let dropout = self.seed.map(|seed| seed + pair(&(self.step.cast(U64) * g.constant(&[GOLDEN], &[])), &none()));
        // The loss of a microbatch, as its part of the whole.
        let one = |arrays: &[Tensor], number: &Tensor, total: &Tensor, dropout: Option<&Tensor>, ids: [Tensor; 2]| {
            let [tokens, targets] = ids;
            let dropout = dropout.map(|state| state + pair(&none(), &(number.cast(U64) * (1i64 << 34))));
            let loss = loss_of(g, arrays, &tokens, &targets, dropout.as_ref(), &spec.gradient, model);
            let part = loss.count / total;
            let sums = [&loss.total * &part, loss.cross_entropy * &part];
            let wanted: Vec<&Tensor> = trained.iter().map(|&(_, at)| &arrays[at]).collect();
            let gradients = gradients_of(g, &sums[0], &wanted, trained);
            (sums, gradients.into_iter().map(|gradient| gradient.cast(F32)).collect::<Vec<_>>())
        };
        if microbatches == 1 {
            let ids = [self.tokens, self.targets].map(|ids| ids.reshape(&ids.shape()[1..]));
            return one(arrays, &g.scalar(0i64, I32), &total, dropout.as_ref(), ids);
        }
        let mut whole: Vec<&Tensor> = arrays.iter().collect();
        whole.push(&total);
        whole.extend(&dropout);
        let zero = g.scalar(0.0, F32);
        let zeros: Vec<Tensor> = trained.iter().map(|(param, _)| zeros(g, param)).collect();
        let init: Vec<&Tensor> = [&zero, &zero].into_iter().chain(&zeros).collect();
        let numbers = g.iota(I32, &[microbatches], 0);
        let xs = [&numbers, self.tokens, self.targets];
        let (sums, _) = g.scan("microbatch", microbatches, &whole, &init, &xs, |whole, sums, xs| {
            let (arrays, rest) = whole.split_at(arrays.len());
            let [number, tokens, targets] = xs else { return (sums.to_vec(), Vec::new()) };
            let ids = [tokens, targets].map(|ids| ids.shard(["batch", "sequence"]));
            let (losses, gradients) = one(arrays, number, &rest[0], rest.get(1), ids);
            let parts = losses.iter().chain(&gradients);
            (sums.iter().zip(parts).map(|(sum, part)| sum + part).collect(), Vec::new())
        });
        let mut sums = sums.into_iter();
        let mut next = || sums.next().expect("as many as were carried");
        ([next(), next()], sums.collect())
    }
}

/// 2⁶⁴ divided by the golden ratio: its multiples are far apart.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Two scalars as one tensor.
#[track_caller]
fn pair(a: &Tensor, b: &Tensor) -> Tensor {
    a.graph().concatenate(&[&a.reshape(&[1]), &b.reshape(&[1])], 0)
}

/// A gradient of zeros, as [`gradients_of`] gives it.
#[track_caller]
fn zeros(g: &Graph, param: &Param) -> Tensor {
    match copies(param) {
        None => g.full(0.0, F32, &param.shape).shard(&param.logical),
        Some((axis, times)) => {
            let mut shape = param.shape.clone();
            shape[axis] /= times;
            g.full(0.0, F32, &shape)
        }
    }
}
