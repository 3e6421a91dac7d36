//! Root mean square normalisation (Zhang and Sennrich 2019, eq. 4).

use xla::DType;
use xla::graph::{Attr, Kernel, Platform, Tensor};

use crate::config::ModelConfig;

/// The kernel of [`rms_norm`]: x (rows, M) f32 and weight (M) of any float type → (rows, M) f32; the attributes `epsilon` and
/// `offset`.
pub const RMS_NORM: &str = "xllama.rms_norm";

/// y = (offset + w) · x / sqrt(mean(x²) + ε) over the last axis; the offset is 1 for Gemma, else 0. `x`: (…, M), `weight`:
/// (M); computed and returned in f32.
#[track_caller]
pub fn rms_norm(x: &Tensor, weight: &Tensor, cfg: &ModelConfig) -> Tensor {
    let x = x.cast(DType::F32);
    if !x.graph().has_kernel(RMS_NORM) {
        return scaled(&x, &factor(&x, cfg), weight, cfg);
    }
    let m = x.dim(-1);
    let rows = x.reshape(&[x.shape().iter().product::<usize>() / m, m]);
    let kernel = Kernel::new(RMS_NORM)
        .attr("epsilon", Attr::F32(cfg.rms_norm_eps as f32))
        .attr("offset", Attr::F32(cfg.norm_offset as f32));
    let y = x
        .graph()
        .kernel(kernel, &[&rows, weight], |args| vec![scaled(&args[0], &factor(&args[0], cfg), &args[1], cfg)]);
    y[0].reshape(x.shape())
}

/// [`rms_norm`] of `x` (B, S, M), f32, for three products: one reads the first, two the second. On a TPU a norm of a single token is
/// part of two products that read it, but for three it would be a program of its own, which costs as much as a product. So
/// there the first is computed from what looks like other rows.
#[track_caller]
pub fn rms_norm_twice(x: &Tensor, weight: &Tensor, cfg: &ModelConfig) -> [Tensor; 2] {
    if x.graph().platform() != Platform::Tpu || x.dim(1) != 1 {
        let y = rms_norm(x, weight, cfg);
        return [y.clone(), y];
    }
    let factor = factor(x, cfg);
    let normed = |x: &Tensor| scaled(x, &factor, weight, cfg);
    [normed(&x.graph().optimization_barrier(&[x]).remove(0)), normed(x)]
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
