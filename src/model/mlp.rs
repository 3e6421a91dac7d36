//! The feed-forward block: SwiGLU (Shazeer 2020) with the activation that the checkpoint names.

use xla::graph::{Platform, Tensor};

use super::linear::linear;
use crate::config::{Activation, ModelConfig};
use crate::params::Mlp;

/// down(act(gate(x)) · up(x)). `x`: (B, S, M) → (B, S, M) in f32.
#[track_caller]
pub fn mlp(p: &Mlp<Tensor>, x: &Tensor, cfg: &ModelConfig) -> Tensor {
    let gate = linear("BSM,MF->BSF", x, &p.gate_proj, p.gate_bias.as_ref());
    let up = linear("BSM,MF->BSF", x, &p.up_proj, p.up_bias.as_ref());
    let mut h = activation(&gate, cfg.hidden_act) * up;
    if h.graph().platform() == Platform::Tpu {
        // Else its compiler may make one program of up and down, which reads their weights more slowly than two.
        h = h.graph().optimization_barrier(&[&h.cast(p.down_proj.dtype())]).remove(0);
    }
    linear("BSF,FM->BSM", &h, &p.down_proj, p.down_bias.as_ref())
}

#[track_caller]
pub(super) fn activation(x: &Tensor, act: Activation) -> Tensor {
    match act {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu(),
        Activation::GeluTanh => x.gelu_tanh(),
        Activation::Relu => x.relu(),
    }
}
