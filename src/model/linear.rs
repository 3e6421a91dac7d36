//! A projection: weights in their own dtype, accumulation and result in f32.

use xla::DType;
use xla::graph::{Attr, Graph, Kernel, MATMUL, Platform, Tensor, einsum_as};

use super::lora::Adapter;
use super::pieces;
use super::rows::{TPU_ROWS, pad};
use crate::params::{Packed, Weight};

/// The kernel of products: x (rows, K) f32 and weights; as many results (rows, N) f32. The attribute `transposed` says that float
/// weights are (N, K); `groups` and `mins` say how weights are packed (`with_weights`).
pub const LINEAR: &str = "xllama.linear";

/// A projection as [`linears`] takes it: equation, x, weight, bias, adapter.
pub(super) type Projection<'a> = (&'a str, &'a Tensor, &'a Weight, Option<&'a Weight>, Option<Adapter<'a>>);

/// `einsum(equation, x, weight) + bias`. `x` (B, S, …) is cast to the weight's dtype for the product, the product is
/// accumulated and returned in f32, and the bias (the equation's trailing output axes) is added there. The contracted
/// axes are the last of `x` and the first of `weight`, in the same order.
#[track_caller]
pub fn linear(equation: &str, x: &Tensor, weight: &Weight, bias: Option<&Weight>) -> Tensor {
    let [y] = linears([(equation, x, weight, bias, None)]);
    y
}

/// Several projections of the same `x`: one call where there is a kernel.
#[track_caller]
pub(super) fn linears<const N: usize>(projections: [Projection<'_>; N]) -> [Tensor; N] {
    let (_, x, ..) = projections[0];
    let with_kernel = projections.iter().all(|(_, x, weight, ..)| takes_kernel(x, weight));
    let products = match with_kernel {
        true => {
            by_kernel(x, &projections.map(|(equation, _, weight, ..)| (contracted(equation, weight), weight)), false)
        }
        false => projections.map(|(equation, x, weight, ..)| projected(equation, x, weight)).to_vec(),
    };
    let mut products = products.into_iter();
    projections.map(|(equation, x, _, bias, adapter)| {
        let y = products.next().expect("a product for each projection");
        let y = match adapter {
            Some(adapter) => y + adapter.delta(equation, x),
            None => y,
        };
        match bias {
            Some(bias) => &y + bias.float().cast(DType::F32).broadcast_to(y.shape()),
            None => y,
        }
    })
}

/// Rows up to which a kernel multiplies f32 faster than XLA.
const KERNEL_ROWS: usize = 16;

/// Whether a product of `x` (B, S, …) with `weight` goes to a kernel, or to its definition where there is none.
pub(super) fn takes_kernel(x: &Tensor, weight: &Weight) -> bool {
    let few = x.dim(0) * x.dim(1) <= KERNEL_ROWS;
    weight.packed().is_some() || (x.graph().has_kernel(LINEAR) && (few || weight.dtype() != DType::F32))
}

/// x (B, S, …) times weights of which so many first axes are contracted; of transposed weights so many are outputs.
#[track_caller]
pub(super) fn by_kernel(x: &Tensor, weights: &[(usize, &Weight)], transposed: bool) -> Vec<Tensor> {
    let (b, s) = (x.dim(0), x.dim(1));
    let rows = x.cast(DType::F32).reshape(&[b * s, x.shape()[2..].iter().product()]);
    let matrices: Vec<Weight> = weights.iter().map(|(first, weight)| matrix(weight, *first)).collect();
    let (kernel, inputs) = with_weights(Kernel::new(LINEAR), &rows, &matrices);
    let kernel = kernel.attr("transposed", Attr::Bool(transposed));
    let products = x.graph().kernel(kernel, &inputs, |args| {
        let (x, weights) = weights_of(args, &matrices);
        weights.iter().map(|weight| matrix_product(x, weight, transposed)).collect()
    });
    let shaped = |(y, (first, weight)): (Tensor, &(usize, &Weight))| {
        let (first, last) = weight.shape().split_at(*first);
        y.reshape(&[&[b, s][..], if transposed { first } else { last }].concat())
    };
    products.into_iter().zip(weights).map(shaped).collect()
}

/// A weight with its axes flattened to two, the first so many to one.
#[track_caller]
pub(super) fn matrix(weight: &Weight, first: usize) -> Weight {
    match weight {
        Weight::Float(tensor) => {
            let (first, last) = tensor.shape().split_at(first);
            Weight::Float(tensor.reshape(&[first.iter().product(), last.iter().product()]))
        }
        packed => packed.clone(),
    }
}

/// The operands of a kernel over x and weights, and what it must know of their form: of each weight the terms of a group,
/// 0 for floats, and whether groups have minima.
pub(super) fn with_weights<'a>(kernel: Kernel, x: &'a Tensor, weights: &'a [Weight]) -> (Kernel, Vec<&'a Tensor>) {
    let form = |f: fn(&Packed) -> i64| weights.iter().map(|w| w.packed().map_or(0, f)).collect();
    let kernel = kernel
        .attr("groups", Attr::I64s(form(|packed| packed.format.group as i64)))
        .attr("mins", Attr::I64s(form(|packed| i64::from(packed.format.mins))));
    (kernel, std::iter::once(x).chain(weights.iter().flat_map(Weight::tensors)).collect())
}

/// The arguments of a kernel's definition as x and weights.
pub(super) fn weights_of<'a>(args: &'a [Tensor], weights: &[Weight]) -> (&'a Tensor, Vec<Weight>) {
    let (x, args) = args.split_first().expect("x is the first argument");
    let mut args = args.iter().cloned();
    (x, weights.iter().map(|w| w.with(|| args.next().expect("as many as the weights have"))).collect())
}

/// x (rows, K) times a matrix (K, N), or (N, K) where it is transposed: (rows, N) f32.
#[track_caller]
pub(super) fn matrix_product(x: &Tensor, weight: &Weight, transposed: bool) -> Tensor {
    let equation = if transposed { "RK,NK->RN" } else { "RK,KN->RN" };
    match weight {
        Weight::Packed(packed) => packed.product(x),
        weight => einsum_as(equation, &x.cast(weight.dtype()), &weight.float(), DType::F32),
    }
}

/// `einsum(equation, x, weight)` in f32, with what is put around it where a platform or the precision of its sums asks for it.
#[track_caller]
fn projected(equation: &str, x: &Tensor, weight: &Weight) -> Tensor {
    if weight.packed().is_some() {
        return by_kernel(x, &[(contracted(equation, weight), weight)], false).remove(0);
    }
    let x = x.cast(weight.dtype());
    let x = if equation.starts_with("BSM") { all_rows(&x) } else { x };
    match parts(equation, &x, weight) {
        1 => in_rows(&x, |x| product(equation, x, weight)),
        n => in_parts(equation, &x, &weight.float(), n),
    }
}

/// How many of the weight's first axes are contracted.
fn contracted(equation: &str, weight: &Weight) -> usize {
    let rank = weight.shape().len();
    rank - (equation.len() - equation.rfind('>').map_or(0, |at| at + 3)).min(rank)
}

/// Devices that share a logical axis.
fn devices(g: &Graph, logical: &str) -> usize {
    g.mesh_axes(logical).iter().map(|axis| g.devices_along(axis)).product()
}

/// `einsum(equation, x, weight)` in f32 for `x` (B, S, …), as a TPU reads large weights best.
#[track_caller]
pub(super) fn product(equation: &str, x: &Tensor, weight: &Weight) -> Tensor {
    let g = x.graph();
    let devices = |logical: &str| devices(g, logical);
    let of_letter = |letter: char| match letter {
        'V' => devices("vocab"),
        'F' => devices("mlp"),
        'H' => devices("heads"),
        'G' => devices("kv_heads"),
        _ => 1,
    };
    pieces::product(equation, x, weight, x.dim(0) * x.dim(1) / devices("batch"), of_letter)
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
    let devices = |logical: &str| devices(g, logical);
    let (s, slots) = (x.dim(1), x.dim(0) / devices("batch"));
    let rows = TPU_ROWS.div_ceil(slots) * devices("sequence");
    if g.platform() != Platform::Tpu || s >= rows {
        return product(x);
    }
    product(&pad(x, 1, rows, 0.0)).narrow(1, 0, s)
}

/// Contracted terms that one f32 accumulator may see.
const TERMS: usize = 144;

/// Up to how many rows a step of training sums in parts, too, where no kernel does: deep models carry the rounding of a library's
/// running sums, which are as long as its blocks, to their gradients.
const TRAINED_ROWS: usize = 512;

/// In how many parts to sum a product of `x` (B, S, …) with `weight`, whose axes from the first on are contracted: the first
/// axis is divided by it.
fn parts(equation: &str, x: &Tensor, weight: &Weight) -> usize {
    let (terms, outputs) = weight.shape().split_at(contracted(equation, weight));
    let rows = x.dim(0) * x.dim(1);
    parts_of(x.graph(), weight.dtype(), rows, terms[0], terms.iter().product(), outputs.iter().product())
}

/// In how many parts, divisors of `first`, to sum products in `dtype` of `terms` terms for `rows` rows of `outputs` elements. A
/// running sum over n terms loses about √n roundings, and that is what sets prefill and decode apart; sums of parts lose
/// fewer (Higham 1993), and one row even gets faster by them.
pub(super) fn parts_of(g: &Graph, dtype: DType, rows: usize, first: usize, terms: usize, outputs: usize) -> usize {
    // A kernel of whole products sums in parts by itself.
    if g.has_kernel(MATMUL) {
        return 1;
    }
    // A step of training over many rows has nothing that it must agree with to the last digit, and parts would cost it time.
    if dtype != DType::F32 || g.platform() != Platform::Cpu || (g.training() && rows > TRAINED_ROWS) {
        return 1;
    }
    // With many rows the parts are written and read again: too dear where the result is wider than what is summed, unless a
    // step of training asks, whose rows are few here.
    if rows > 1 && outputs > terms && !g.training() {
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
