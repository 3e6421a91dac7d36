//! Root mean square normalisation (Zhang and Sennrich 2019, eq. 4).

use xla::DType;
use xla::graph::{Platform, Tensor};

use crate::config::ModelConfig;

/// y = (offset + w) · x / sqrt(mean(x²) + ε) over the last axis; the offset is 1 for Gemma, else 0. `x`: (…, M), `weight`:
/// (M); computed and returned in f32.
#[track_caller]
pub fn rms_norm(x: &Tensor, weight: &Tensor, cfg: &ModelConfig) -> Tensor {
    let x = x.cast(DType::F32);
    scaled(&x, &factor(&x, cfg), weight, cfg)
}

/// [`rms_norm`] of `x` (B, S, M), f32, for three products: one reads the first, two the second. On a TPU a norm of a single token is
/// part of two products that read it, but for three it would be a program of its own, which costs as much as a product. So
/// there the first is computed from what looks like other rows.
#[track_caller]
pub fn rms_norm_twice(x: &Tensor, weight: &Tensor, cfg: &ModelConfig) -> [Tensor; 2] {
    let factor = factor(x, cfg);
    let normed = |x: &Tensor| scaled(x, &factor, weight, cfg);
    match (x.graph().platform(), x.dim(1)) {
        (Platform::Tpu, 1) => [normed(&x.graph().optimization_barrier(&[x]).remove(0)), normed(x)],
        _ => {
            let y = normed(x);
            [y.clone(), y]
        }
    }
}

/// 1 / sqrt(mean(x²) + ε): (…, M) → (…, 1).
#[track_caller]
fn factor(x: &Tensor, cfg: &ModelConfig) -> Tensor {
    (x.square().mean_keep(&[-1]) + cfg.rms_norm_eps).rsqrt()
}

/// x · factor · (offset + w).
#[track_caller]
fn scaled(x: &Tensor, factor: &Tensor, weight: &Tensor, cfg: &ModelConfig) -> Tensor {
    let mut weight = weight.cast(DType::F32);
    if cfg.norm_offset != 0.0 {
        weight = weight + cfg.norm_offset;
    }
    x * factor.broadcast_to(x.shape()) * weight.broadcast_to(x.shape())
}
