//! Low-rank adapters beside projections (Hu et al. 2021).

use xla::DType;
use xla::graph::Tensor;

use super::linear::linear;
use crate::config::ModelConfig;
use crate::params::{Lora, Weight};

/// The adapter of a projection with its numbers.
#[derive(Clone, Copy)]
pub(super) struct Adapter<'a> {
    leaves: &'a Lora<Weight>,
    /// What a·b is multiplied with.
    scale: f64,
    /// The part of its input that is dropped in training.
    dropout: f64,
}

/// The adapter of a projection, if it has one.
pub(super) fn adapter<'a>(leaves: &'a Option<Lora<Weight>>, cfg: &ModelConfig) -> Option<Adapter<'a>> {
    let (leaves, lora) = (leaves.as_ref()?, cfg.lora.as_ref()?);
    Some(Adapter { leaves, scale: lora.scale(), dropout: lora.dropout })
}

impl Adapter<'_> {
    /// What the projection `einsum(equation, x, W)` gets beside it: scale · (drop(x)·a)·b, f32.
    #[track_caller]
    pub(super) fn delta(&self, equation: &str, x: &Tensor) -> Tensor {
        let Lora { a, b, dropout } = self.leaves;
        // "BSHK,HKM->BSM" becomes "BSHK,HKJ->BSJ" and "BSJ,JM->BSM".
        let (operands, y) = equation.split_once("->").expect("an equation has an arrow");
        let (left, _) = operands.split_once(',').expect("of two operands");
        let x = match dropout {
            Some(state) if self.dropout > 0.0 => dropped(x, &state.float(), self.dropout),
            _ => x.clone(),
        };
        let low = linear(&format!("{left},{}J->BSJ", &left[2..]), &x, a, None);
        linear(&format!("BSJ,J{}->{y}", &y[2..]), &low, b, None) * self.scale
    }
}

/// x with each element 0 with probability `rate`, else divided by 1 − `rate` (Srivastava et al. 2014, section 10, inverted).
#[track_caller]
fn dropped(x: &Tensor, state: &Tensor, rate: f64) -> Tensor {
    let (_, uniform) = state.rng_uniform(x.shape());
    let zero = x.graph().full(0.0, x.dtype(), x.shape());
    uniform.cast(DType::F32).ge(rate).select(&(x / (1.0 - rate)), &zero)
}
