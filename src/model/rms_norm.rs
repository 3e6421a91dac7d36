//! Root mean square normalisation (Zhang and Sennrich 2019, eq. 4).

use xla::DType;
use xla::graph::Tensor;

use crate::config::ModelConfig;

/// y = (offset + w) · x / sqrt(mean(x²) + ε) over the last axis; the offset is 1 for Gemma, else 0. `x`: (…, M), `weight`:
/// (M); computed and returned in f32.
#[track_caller]
pub fn rms_norm(x: &Tensor, weight: &Tensor, cfg: &ModelConfig) -> Tensor {
    let x = x.cast(DType::F32);
    let scale = (x.square().mean_keep(&[-1]) + cfg.rms_norm_eps).rsqrt();
    let mut weight = weight.cast(DType::F32);
    if cfg.norm_offset != 0.0 {
        weight = weight + cfg.norm_offset;
    }
    &x * scale.broadcast_to(x.shape()) * weight.broadcast_to(x.shape())
}
