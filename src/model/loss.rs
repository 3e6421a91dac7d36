//! The loss of a language model: cross-entropy over blocks of the vocabulary, and what is added to it.

use xla::DType::{F32, I32};
use xla::graph::{Save, Tensor, einsum_as};

use super::router_loss::{load_balancing_loss, router_z_loss};
use crate::config::ModelConfig;
use crate::params::{Llama, Weight};

/// The target of a position that does not count.
pub const IGNORED: i32 = -100;

/// Columns of the vocabulary that are computed at a time.
const BLOCK: usize = 8192;

/// What the loss is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossOptions {
    /// ε: the target has 1 − ε of the probability that is asked for, and ε is spread over the vocabulary (Szegedy et al. 2016,
    /// section 7).
    pub label_smoothing: f64,
    /// Weight of (log Σ e^logit)², which keeps logits from growing (Chowdhery et al. 2022, PaLM, section 5).
    pub z_loss: f64,
    /// Weight of the mixtures' [`load_balancing_loss`].
    pub load_balancing: f64,
    /// Weight of the mixtures' [`router_z_loss`].
    pub router_z_loss: f64,
}

/// What a loss is computed for.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// The next token of each position, (B, S) i32; a negative one does not count.
    pub ids: &'a Tensor,
    /// 1 where there is a token and 0 where there is padding, (B, S): which tokens the routers' losses are of; all if `None`.
    pub tokens: Option<&'a Tensor>,
}

/// The loss and its parts, f32 scalars.
#[derive(Clone, Debug)]
pub struct Loss {
    /// What is differentiated: the mean cross-entropy with all that is added to it.
    pub total: Tensor,
    /// The mean of −log p(target) over the positions that count, without smoothing.
    pub cross_entropy: Tensor,
    /// Number of positions that count.
    pub count: Tensor,
}

impl Loss {
    /// The loss of normalised hidden states (B, S, M) under the model's head. The logits (B·S, V) are never there as a whole: blocks
    /// of the vocabulary are computed one after another with a running maximum and sum (Milakov and Gimelshein 2018), and once more
    /// for the gradient. Of no positions at all the loss is 0.
    #[track_caller]
    pub fn new(
        p: &Llama<Weight>,
        hidden: &Tensor,
        router_logits: &[Tensor],
        targets: Targets<'_>,
        options: &LossOptions,
        cfg: &ModelConfig,
    ) -> Loss {
        let g = hidden.graph();
        let rows = hidden.dim(0) * hidden.dim(1);
        let ids = targets.ids.reshape(&[rows]);
        let counts = ids.ge(0i64).cast(F32);
        let count = counts.sum(&[0]);
        let sums = vocabulary(p, &hidden.reshape(&[rows, hidden.dim(2)]), &ids, cfg);
        let log_sum = &sums.highest + sums.total.log();
        let own = &log_sum - &sums.target;
        let mut each = own.clone();
        if options.label_smoothing != 0.0 {
            let spread = &log_sum - sums.all / cfg.vocab_size as f64;
            each = each * (1.0 - options.label_smoothing) + spread * options.label_smoothing;
        }
        if options.z_loss != 0.0 {
            each = each + log_sum.square() * options.z_loss;
        }
        let mean = |x: &Tensor| (x * &counts).sum(&[0]) / count.maximum(1.0);
        let mut total = mean(&each);
        if let (Some(moe), false) = (&cfg.moe, router_logits.is_empty()) {
            let flat: Vec<Tensor> = router_logits.iter().map(|x| x.reshape(&[1, rows, x.dim(2)])).collect();
            let logits = g.concatenate(&flat.iter().collect::<Vec<_>>(), 0);
            if options.load_balancing != 0.0 {
                total = total + load_balancing_loss(&logits, moe.top_k, targets.tokens) * options.load_balancing;
            }
            if options.router_z_loss != 0.0 {
                total = total + router_z_loss(&logits, targets.tokens) * options.router_z_loss;
            }
        }
        Loss { total, cross_entropy: mean(&own), count }
    }
}

/// What is summed over the vocabulary, of each row, (N) f32.
struct Sums {
    /// The largest logit so far: a number to subtract, without a gradient.
    highest: Tensor,
    /// Σ e^(logit − highest).
    total: Tensor,
    /// The target's logit.
    target: Tensor,
    /// Σ logit.
    all: Tensor,
}

/// Runs over the vocabulary of the head in blocks: `hidden` (N, M), `ids` (N).
#[track_caller]
fn vocabulary(p: &Llama<Weight>, hidden: &Tensor, ids: &Tensor, cfg: &ModelConfig) -> Sums {
    let g = hidden.graph();
    let (head, tied) = (p.lm_head.as_ref().unwrap_or(&p.embedding), p.lm_head.is_none());
    let hidden = hidden.cast(head.dtype());
    let head = head.float();
    let axis = if tied { 0 } else { 1 };
    let vocab = head.dim(axis);
    // Each device that has a part of the vocabulary has a part of each block.
    let parts: usize = g.mesh_axes("vocab").iter().map(|mesh_axis| g.devices_along(mesh_axis)).product();
    let n = hidden.dim(0);
    let row = |value: f64| g.full(value, F32, &[n]);
    let mut sums = [row(f64::from(f32::MIN)), row(0.0), row(0.0), row(0.0)];
    let (own, step) = (vocab / parts, BLOCK.min(vocab / parts));
    let by_part = match tied {
        true => head.reshape(&[parts, own, head.dim(1)]),
        false => head.reshape(&[head.dim(0), parts, own]),
    };
    for start in (0..own).step_by(step) {
        let width = step.min(own - start);
        let block = match (tied, own == width) {
            (_, true) => by_part.clone(),
            (true, _) => by_part.narrow(1, start, width),
            (false, _) => by_part.narrow(2, start, width),
        };
        // The id of a column is that of its part, of the block, and its own.
        let first = g.scalar(start as i64, I32);
        let inputs = [&hidden, ids, &block, &first, &sums[0], &sums[1], &sums[2], &sums[3]];
        let next = g.checkpoint("vocabulary_block", Save::Nothing, &inputs, |args| {
            let [hidden, ids, block, first, highest, total, target, all] = args else { return args.to_vec() };
            let logits = match (parts, tied) {
                // A matrix is what XLA:CPU multiplies without turning it.
                (1, true) => einsum_as("NM,VM->NV", hidden, &block.reshape(&block.shape()[1..]), F32).expand_dims(1),
                (1, false) => {
                    let matrix = block.reshape(&[block.dim(0), block.dim(2)]);
                    einsum_as("NM,MV->NV", hidden, &matrix, F32).expand_dims(1)
                }
                (_, true) => einsum_as("NM,PVM->NPV", hidden, block, F32),
                (_, false) => einsum_as("NM,MPV->NPV", hidden, block, F32),
            };
            let logits = match cfg.logit_softcap {
                Some(cap) => (logits / cap).tanh() * cap,
                None => logits,
            };
            let shape = logits.shape().to_vec();
            let g = logits.graph();
            let column = g.iota(I32, &shape, 1) * own as i64 + g.iota(I32, &shape, 2) + first.broadcast(&shape, &[]);
            // A mesh may pad the vocabulary.
            let real = column.lt(cfg.vocab_size as i64);
            let shown = real.select(&logits, f64::from(f32::MIN));
            let now = highest.maximum(&shown.max(&[1, 2])).stop_gradient();
            let weights = (&shown - now.broadcast(&shape, &[0])).exp();
            let total = total * (highest - &now).exp() + weights.sum(&[1, 2]);
            let here = column.eq(&ids.broadcast(&shape, &[0]));
            let target = target + here.select(&logits, 0.0).sum(&[1, 2]);
            let all = all + real.select(&logits, 0.0).sum(&[1, 2]);
            vec![now, total, target, all]
        });
        sums = next.try_into().unwrap_or_else(|_| unreachable!("a block gives what it was given"));
    }
    let [highest, total, target, all] = sums;
    Sums { highest, total, target, all }
}
