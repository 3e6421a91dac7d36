//! The feed-forward block: SwiGLU (Shazeer 2020) with the activation that the checkpoint names.

use xla::graph::{Attr, Kernel, Platform, Tensor};

use super::linear::{linears, matrix_product, takes_kernel, weights_of, with_weights};
use super::lora::adapter;
use crate::config::{Activation, ModelConfig};
use crate::params::{Mlp, Weight};

/// The kernel of act(x·gate) · (x·up): x (rows, M) f32, gate and up (M, F) → (rows, F) f32. The attribute `activation` is the name of
/// act; the others are those of [`LINEAR`](super::LINEAR).
pub const GATED: &str = "xllama.gated";

/// The kernel of act(gate) · up, two arrays of one shape in f32, for training; the attribute `activation` is the name of act.
pub const GATE: &str = "xllama.gate";

/// The kernel of its derivative: what [`GATE`] is given, and the cotangent of its result; those of gate and up.
pub const GATE_GRADIENT: &str = "xllama.gate_gradient";

/// down(act(gate(x)) · up(x)). `x`: (B, S, M) → (B, S, M) in f32.
#[track_caller]
pub fn mlp(p: &Mlp<Weight>, x: &Tensor, cfg: &ModelConfig) -> Tensor {
    let adapters = [adapter(&p.gate_lora, cfg), adapter(&p.up_lora, cfg)];
    let alone = adapters.iter().all(Option::is_none);
    let mut h = match (&p.gate_bias, &p.up_bias) {
        (None, None) if alone && takes_kernel(x, &p.gate_proj) && takes_kernel(x, &p.up_proj) => {
            gated(p, x, cfg.hidden_act)
        }
        biases => {
            let [gate, up] = linears([
                ("BSM,MF->BSF", x, &p.gate_proj, biases.0.as_ref(), adapters[0]),
                ("BSM,MF->BSF", x, &p.up_proj, biases.1.as_ref(), adapters[1]),
            ]);
            gate_of(&gate, &up, cfg.hidden_act)
        }
    };
    if h.graph().platform() == Platform::Tpu && matches!(p.down_proj, Weight::Float(_)) {
        // Else its compiler may make one program of up and down, which reads their weights more slowly than two.
        h = h.graph().optimization_barrier(&[&h.cast(p.down_proj.dtype())]).remove(0);
    }
    let [y] = linears([("BSF,FM->BSM", &h, &p.down_proj, p.down_bias.as_ref(), adapter(&p.down_lora, cfg))]);
    y
}

/// act(gate) · up, both (B, S, F) f32.
#[track_caller]
fn gate_of(gate: &Tensor, up: &Tensor, act: Activation) -> Tensor {
    let kernel = Kernel::new(GATE).attr("activation", Attr::Str(act.name().into())).gradient(GATE_GRADIENT);
    gate.graph().kernel(kernel, &[gate, up], |args| vec![activation(&args[0], act) * &args[1]]).remove(0)
}

/// act(x·gate) · (x·up) by a kernel: (B, S, M) → (B, S, F) f32.
#[track_caller]
fn gated(p: &Mlp<Weight>, x: &Tensor, act: Activation) -> Tensor {
    let [b, s, m] = [0, 1, 2].map(|axis| x.dim(axis));
    let x = x.reshape(&[b * s, m]);
    let weights = [p.gate_proj.clone(), p.up_proj.clone()];
    let (kernel, inputs) = with_weights(Kernel::new(GATED), &x, &weights);
    let kernel = kernel.attr("activation", Attr::Str(act.name().into()));
    let y = x.graph().kernel(kernel, &inputs, |args| {
        let (x, weights) = weights_of(args, &weights);
        let [gate, up] = [0, 1].map(|i| matrix_product(x, &weights[i], false));
        vec![activation(&gate, act) * up]
    });
    y[0].reshape(&[b, s, p.gate_proj.shape()[1]])
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
