//! A projection: weights in their own dtype, accumulation and result in f32.

use xla::DType;
use xla::graph::{Tensor, einsum_as};

/// `einsum(equation, x, weight) + bias`. `x` is cast to the weight's dtype for the product, the product is
/// accumulated and returned in f32, and the bias (the equation's trailing output axes) is added there.
#[track_caller]
pub fn linear(equation: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let y = einsum_as(equation, &x.cast(weight.dtype()), weight, DType::F32);
    match bias {
        Some(bias) => &y + bias.cast(DType::F32).broadcast_to(y.shape()),
        None => y,
    }
}
