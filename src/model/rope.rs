//! Rotary position embedding (Su et al. 2021), in the half-split form of Hugging Face checkpoints.

use xla::DType;
use xla::graph::Tensor;

use crate::config::ModelConfig;

/// cos and sin of the angle of every position, (B, S, K/2) each, f32: computed once, used by all layers.
#[derive(Clone, Debug)]
pub struct Rope {
    /// cos(position · inverse frequency).
    pub cos: Tensor,
    /// sin(position · inverse frequency).
    pub sin: Tensor,
}

/// The angles of `positions` (B, S), i32.
#[track_caller]
pub fn rope(positions: &Tensor, cfg: &ModelConfig) -> Rope {
    let (b, s, half) = (positions.dim(0), positions.dim(1), cfg.head_dim / 2);
    let inv_freq: Vec<f32> = cfg.rope.inv_freq(cfg.head_dim).iter().map(|&f| f as f32).collect();
    let inv_freq = positions.graph().constant(&inv_freq, &[half]);
    let angle = positions.cast(DType::F32).broadcast(&[b, s, half], &[0, 1]) * inv_freq.broadcast(&[b, s, half], &[2]);
    Rope { cos: angle.cos().named("rope_cos"), sin: angle.sin().named("rope_sin") }
}

impl Rope {
    /// Rotates (x₁, x₂), the halves of the last axis: (x₁·cos − x₂·sin, x₂·cos + x₁·sin). `x`: (B, S, H or G, K), f32.
    #[track_caller]
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        let half = x.dim(-1) / 2;
        let (x1, x2) = (x.narrow(-1, 0, half), x.narrow(-1, half, half));
        let cos = self.cos.broadcast(x1.shape(), &[0, 1, 3]);
        let sin = self.sin.broadcast(x1.shape(), &[0, 1, 3]);
        x.graph().concatenate(&[&(&x1 * &cos - &x2 * &sin), &(&x2 * &cos + &x1 * &sin)], -1)
    }
}
