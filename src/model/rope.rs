//! Rotary position embedding (Su et al. 2021), in the half-split form of Hugging Face checkpoints.
//!
//! Where the frequencies depend on the length of the text (dynamic NTK, longrope), they are those that transformers uses
//! for one prefill of the prompt, for all of its chunks. Decode keeps them past that length: the keys in the
//! cache were rotated with them, and only angles of the same frequencies differ by the distance of two positions.
//! transformers recomputes them at every length for dynamic NTK, and leaves the older keys as they are.

use xla::DType;
use xla::graph::{Graph, Platform, Tensor};

use crate::config::{self, ModelConfig};

/// cos and sin of the angle of every position, (B, S, D/2) each, f32, D the elements of a head that turn: computed once, used by
/// all layers. On a TPU (B, S, D): (cos, cos) and (−sin, sin).
#[derive(Clone, Debug)]
pub struct Rope {
    /// cos(position · inverse frequency).
    pub cos: Tensor,
    /// sin(position · inverse frequency).
    pub sin: Tensor,
}

/// The frequencies of each slot, (B, D/2) f32 for each of the model's embeddings: constants, or arguments of the graph
/// where they depend on the length of the text and that is not known.
#[track_caller]
pub fn frequencies(g: &Graph, batch: usize, length: Option<usize>, cfg: &ModelConfig) -> Vec<Tensor> {
    let one = |(i, rope): (usize, &config::Rope)| {
        let half = rope.dim / 2;
        match length {
            None if rope.depends_on_length() => g.arg(&format!("rope/{i}"), DType::F32, &[batch, half]),
            _ => g.constant(&rope.inv_freq(length.unwrap_or(0)), &[half]).broadcast(&[batch, half], &[1]),
        }
    };
    cfg.ropes.iter().enumerate().map(one).collect()
}

/// The angles of `positions` (B, S), i32, for each of the model's embeddings.
#[track_caller]
pub fn ropes(positions: &Tensor, frequencies: &[Tensor], cfg: &ModelConfig) -> Vec<Rope> {
    let one = |(i, (rope, frequency)): (usize, (&config::Rope, &Tensor))| {
        let shape = [positions.dim(0), positions.dim(1), rope.dim / 2];
        // A gradient of many layers is as exact as its angles: f32 loses 2⁻²⁴ of one, which is many turns.
        let exact = positions.graph().training() && positions.graph().platform() == Platform::Cpu;
        let dtype = if exact { DType::F64 } else { DType::F32 };
        let angle = positions.cast(dtype).broadcast(&shape, &[0, 1]) * frequency.cast(dtype).broadcast(&shape, &[0, 2]);
        let (mut cos, mut sin) = (angle.cos().cast(DType::F32), angle.sin().cast(DType::F32));
        if rope.attention_factor() != 1.0 {
            (cos, sin) = (cos * rope.attention_factor(), sin * rope.attention_factor());
        }
        let (cos, sin) = (cos.named(&format!("rope_cos.{i}")), sin.named(&format!("rope_sin.{i}")));
        let g = positions.graph();
        match g.platform() {
            Platform::Tpu => Rope { cos: g.concatenate(&[&cos, &cos], -1), sin: g.concatenate(&[&-&sin, &sin], -1) },
            // XLA:CPU would compute them in every layer and for every head once more.
            Platform::Cpu if g.training() => {
                let [cos, sin] = g.optimization_barrier(&[&cos, &sin]).try_into().expect("as many as it was given");
                Rope { cos, sin }
            }
            _ => Rope { cos, sin },
        }
    };
    cfg.ropes.iter().zip(frequencies).enumerate().map(one).collect()
}

impl Rope {
    /// Rotates (x₁, x₂), the halves of the first D elements of the last axis, and leaves the rest:
    /// (x₁·cos − x₂·sin, x₂·cos + x₁·sin, rest). `x`: (B, S, H or G, K), f32.
    #[track_caller]
    pub fn rotate(&self, x: &Tensor) -> Tensor {
        if x.graph().platform() == Platform::Tpu {
            return self.rotate_whole(x);
        }
        let half = self.cos.dim(-1);
        let (x1, x2) = (x.narrow(-1, 0, half), x.narrow(-1, half, half));
        let cos = self.cos.broadcast(x1.shape(), &[0, 1, 3]);
        let sin = self.sin.broadcast(x1.shape(), &[0, 1, 3]);
        let (y1, y2) = (&x1 * &cos - &x2 * &sin, &x2 * &cos + &x1 * &sin);
        match x.dim(-1) - 2 * half {
            0 => x.graph().concatenate(&[&y1, &y2], -1),
            rest => x.graph().concatenate(&[&y1, &y2, &x.narrow(-1, 2 * half, rest)], -1),
        }
    }

    /// The same as (x₁, x₂)·(cos, cos) + (x₂, x₁)·(−sin, sin), with (x₂, x₁) cut out of (x₁, x₂, x₁, x₂): that the TPU's compiler
    /// makes one program of for queries and keys together, where it takes two for the halves of each.
    #[track_caller]
    fn rotate_whole(&self, x: &Tensor) -> Tensor {
        let g = x.graph();
        let turning = self.cos.dim(-1);
        let turned = x.narrow(-1, 0, turning);
        let swapped = g.concatenate(&[&turned, &turned], -1).narrow(-1, turning / 2, turning);
        let [cos, sin] = [&self.cos, &self.sin].map(|angle| angle.broadcast(turned.shape(), &[0, 1, 3]));
        let y = turned * cos + swapped * sin;
        match x.dim(-1) - turning {
            0 => y,
            rest => g.concatenate(&[&y, &x.narrow(-1, turning, rest)], -1),
        }
    }
}
