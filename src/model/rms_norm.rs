//! Root mean square normalisation (Zhang and Sennrich 2019, eq. 4).

use xla::DType;
use xla::graph::Tensor;

/// y = w · x / sqrt(mean(x²) + ε) over the last axis. `x`: (…, M), `weight`: (M); computed and returned in f32.
#[track_caller]
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let x = x.cast(DType::F32);
    let scale = (x.square().mean_keep(&[-1]) + eps).rsqrt();
    &x * scale.broadcast_to(x.shape()) * weight.cast(DType::F32).broadcast_to(x.shape())
}
