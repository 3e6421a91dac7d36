//! A projection: weights in their own dtype, accumulation and result in f32.

use xla::DType;
use xla::graph::{Tensor, einsum_as};

/// `einsum(equation, x, weight) + bias`. `x` (B, S, …) is cast to the weight's dtype for the product, the product is
/// accumulated and returned in f32, and the bias (the equation's trailing output axes) is added there. The contracted
/// axes are the last of `x` and the first of `weight`, in the same order.
#[track_caller]
pub fn linear(equation: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let x = x.cast(weight.dtype());
    let y = match parts(equation, x.dim(0) * x.dim(1), weight) {
        1 => einsum_as(equation, &x, weight, DType::F32),
        n => in_parts(equation, &x, weight, n),
    };
    match bias {
        Some(bias) => &y + bias.cast(DType::F32).broadcast_to(y.shape()),
        None => y,
    }
}

/// Contracted terms that one f32 accumulator may see.
const TERMS: usize = 144;

/// In how many parts to sum a product of `rows` rows with `weight`, whose axes from the first on are contracted: the first
/// axis is divided by it.
fn parts(equation: &str, rows: usize, weight: &Tensor) -> usize {
    let contracted = weight.rank() - (equation.len() - equation.rfind('>').map_or(0, |at| at + 3)).min(weight.rank());
    let (terms, outputs) = weight.shape().split_at(contracted);
    parts_of(weight, rows, weight.dim(0), terms.iter().product(), outputs.iter().product())
}

/// In how many parts, divisors of `first`, to sum f32 products of `terms` terms for `rows` rows of `outputs` elements. A
/// running sum over n terms loses about √n roundings, and that is what sets prefill and decode apart; sums of parts lose
/// fewer (Higham 1993), and one row even gets faster by them.
pub(super) fn parts_of(weight: &Tensor, rows: usize, first: usize, terms: usize, outputs: usize) -> usize {
    if weight.dtype() != DType::F32 || weight.graph().mesh().is_some() {
        return 1;
    }
    // With many rows the parts are written and read again: too dear where the result is wider than what is summed.
    if rows > 1 && outputs > terms {
        return 1;
    }
    (1..=first).find(|n| first.is_multiple_of(*n) && terms / n <= TERMS).unwrap_or(first)
}

/// The same product with the first contracted axis split in `n`, which become a batch axis Z and are summed at the end.
#[track_caller]
fn in_parts(equation: &str, x: &Tensor, weight: &Tensor, n: usize) -> Tensor {
    let split = |t: &Tensor, axis: usize| {
        let mut shape = t.shape().to_vec();
        shape.splice(axis..=axis, [n, shape[axis] / n]);
        t.reshape(&shape)
    };
    // "BSM,MF->BSF" becomes "BSZM,ZMF->ZBSF".
    let (left, rest) = equation.split_at(2);
    let equation = format!("{left}Z{rest}").replace(',', ",Z").replace("->", "->Z");
    einsum_as(&equation, &split(x, 2), &split(weight, 0), DType::F32).sum(&[0])
}
