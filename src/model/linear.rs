//! A projection: weights in their own dtype, accumulation and result in f32.

use xla::DType;
use xla::graph::{Platform, Tensor, einsum_as};

use super::rows::{TPU_ROWS, pad};

/// `einsum(equation, x, weight) + bias`. `x` (B, S, …) is cast to the weight's dtype for the product, the product is
/// accumulated and returned in f32, and the bias (the equation's trailing output axes) is added there. The contracted
/// axes are the last of `x` and the first of `weight`, in the same order.
#[track_caller]
pub fn linear(equation: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let x = x.cast(weight.dtype());
    let x = if equation.starts_with("BSM") { all_rows(&x) } else { x };
    let y = match parts(equation, x.dim(0) * x.dim(1), weight) {
        1 => in_rows(&x, |x| einsum_as(equation, x, weight, DType::F32)),
        n => in_parts(equation, &x, weight, n),
    };
    match bias {
        Some(bias) => &y + bias.cast(DType::F32).broadcast_to(y.shape()),
        None => y,
    }
}

/// Rows of the residual stream (B, S, M) for a product: all of those that `model` devices share.
#[track_caller]
pub(super) fn all_rows(x: &Tensor) -> Tensor {
    let g = x.graph();
    match g.mesh_axes("tokens") == g.mesh_axes("sequence") {
        true => x.clone(),
        false => x.shard(["batch", "sequence", "hidden"]),
    }
}

/// `product` of `x` (B, S, …), by row. On a TPU rows of zeros are put behind where a device has few.
#[track_caller]
pub(super) fn in_rows(x: &Tensor, product: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
    let g = x.graph();
    let devices = |logical: &str| g.mesh_axes(logical).iter().map(|axis| g.devices_along(axis)).product::<usize>();
    let (s, slots) = (x.dim(1), x.dim(0) / devices("batch"));
    let rows = TPU_ROWS.div_ceil(slots) * devices("sequence");
    if g.platform() != Platform::Tpu || s >= rows {
        return product(x);
    }
    product(&pad(x, 1, rows, 0.0)).narrow(1, 0, s)
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
    let g = weight.graph();
    if weight.dtype() != DType::F32 || g.platform() != Platform::Cpu {
        return 1;
    }
    // With many rows the parts are written and read again: too dear where the result is wider than what is summed.
    if rows > 1 && outputs > terms {
        return 1;
    }
    // No part of a split axis lies on two devices.
    let devices = g.devices_along("model");
    let devices = if first.is_multiple_of(devices) { devices } else { 1 };
    let divides = |n: &usize| first.is_multiple_of(*n) && n.is_multiple_of(devices) && terms / n <= TERMS;
    (1..=first).find(divides).unwrap_or(first)
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
