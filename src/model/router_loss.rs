//! What training adds to the loss so that a mixture of experts uses all of its experts.

use xla::DType::{F32, I32};
use xla::graph::Tensor;

use super::moe::top_k;

/// E · Σₑ (times that a token chose expert e, per token) · (mean of its probability): the load balancing of the Switch
/// Transformer (Fedus et al. 2022, eq. 4–6) over all layers at once, as transformers' `load_balancing_loss_func`.
///
/// `logits` (L, N, E) are the routers' of L layers; `k` is how many experts a token takes, at most E; `mask`, of N elements,
/// is 1 where there is a token and 0 where there is padding. The result is an f32 scalar, k where all is even.
#[track_caller]
pub fn load_balancing_loss(logits: &Tensor, k: usize, mask: Option<&Tensor>) -> Tensor {
    let experts = logits.dim(2);
    let weights = token_weights(logits, mask);
    let rows = weights.dim(0);
    let probabilities = logits.cast(F32).reshape(&[rows, experts]).softmax(1);
    let chosen = top_k(&probabilities, k);
    let shape = [rows, k, experts];
    let of_expert = chosen.broadcast(&shape, &[0, 1]).eq(&logits.graph().iota(I32, &shape, 2)).cast(F32).sum(&[1]);
    let weighted = |x: &Tensor| (x * weights.broadcast(x.shape(), &[0])).sum(&[0]);
    let tokens = weights.sum(&[0]);
    let product = (weighted(&of_expert) * weighted(&probabilities)).sum(&[0]);
    product * experts as f64 / (&tokens * &tokens)
}

/// The mean over all tokens of all layers of (log Σₑ e^logit)²: it keeps the logits small (ST-MoE, Zoph et al. 2022,
/// eq. 5). Arguments and result as in [`load_balancing_loss`].
#[track_caller]
pub fn router_z_loss(logits: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let weights = token_weights(logits, mask);
    let logits = logits.cast(F32).reshape(&[weights.dim(0), logits.dim(2)]);
    let peak = logits.max_keep(&[1]).stop_gradient();
    let sum = (&logits - peak.broadcast_to(logits.shape())).exp().sum(&[1]);
    let log_sum = sum.log() + peak.reshape(weights.shape());
    (log_sum.square() * &weights).sum(&[0]) / weights.sum(&[0])
}

/// The weight of each row of (L, N, E) logits: the mask, once per layer, as f32 (L·N).
#[track_caller]
fn token_weights(logits: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let (layers, tokens) = (logits.dim(0), logits.dim(1));
    match mask {
        Some(mask) => mask.cast(F32).reshape(&[tokens]).broadcast(&[layers, tokens], &[1]).reshape(&[layers * tokens]),
        None => logits.graph().full(1.0, F32, &[layers * tokens]),
    }
}
