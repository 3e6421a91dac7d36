//! Products with weights that do not fit into the fast memory of a TPU beside others, in pieces that do.
//!
//! libtpu copies what a product reads into fast memory (VMEM) while earlier products run, if it fits. A product with a larger weight
//! reads it from memory itself, at 70 to 86 % of the bandwidth by libtpu's estimate. Pieces are copied ahead as whole weights are, so
//! that a step waits for nothing but the memory. Decode of an 8B model on one v6e, one slot of 2048: from 17.7 to 8.2 million cycles,
//! where its memory alone takes 17.4; the output head after a prefill on eight: from 166 to 45 thousand. Attention does the same with
//! a large cache (`cache_pieces`).

use xla::DType;
use xla::graph::{Platform, Tensor, einsum_as};

use crate::params::Weight;

/// Bytes of a weight on one device up to which libtpu copies it whole.
pub(super) const WHOLE: usize = 48 << 20;

/// Bytes of a piece of a larger one. Smaller ones are as fast, and cost more to compile.
pub(super) const PIECE: usize = 32 << 20;

/// Rows up to which pieces are taken. Any TPU multiplies 128 in less time than it takes to read the weight, but with many slots their
/// caches want the fast memory: 64 slots of 2048 on eight v6e took 4.9 million cycles with the head in pieces, 4.2 without.
const ROWS: usize = 32;

/// Lengths of pieces are multiples of this, the columns of a tile.
const TILE: usize = 128;

/// `einsum(equation, x, weight)` in f32, of `rows` rows; on a TPU in pieces along the weight's axis that is summed and longest, added
/// in f32, where the weight is large and the rows are few. `devices` says how many devices share the axis of a letter. (Pieces along
/// an axis of the result would need no additions, but some of their copies stay where they block.)
#[track_caller]
pub(super) fn product(
    equation: &str,
    x: &Tensor,
    weight: &Weight,
    rows: usize,
    devices: impl Fn(char) -> usize,
) -> Tensor {
    let weight = match weight {
        Weight::Float(weight) => weight,
        // To make floats of integers takes longer than to read them.
        Weight::Grouped(grouped) => {
            let letter = char::from(letters(equation)[1].as_bytes()[grouped.axis]);
            return grouped.product(equation, x, devices(letter) > 1);
        }
        other => &other.float(),
    };
    let whole = |x: &Tensor, weight: &Tensor| einsum_as(equation, x, weight, DType::F32);
    let Some((axis, length)) = cut(equation, weight, rows, devices) else { return whole(x, weight) };
    let letter = letters(equation)[1].as_bytes()[axis];
    let of_x = letters(equation)[0].bytes().position(|of| of == letter).unwrap_or(0);

    let mut before: Option<Tensor> = None;
    let mut total: Option<Tensor> = None;
    for start in (0..weight.dim(axis as isize)).step_by(length) {
        let n = length.min(weight.dim(axis as isize) - start);
        let piece = piece(weight, before.as_ref(), |weight| weight.narrow(axis as isize, start, n));
        let y = whole(&x.narrow(of_x as isize, start, n), &piece);
        total = Some(total.map_or(y.clone(), |total| total + &y));
        before = Some(piece);
    }
    total.unwrap_or_else(|| whole(x, weight))
}

/// What `cut` takes of `whole`, as a copy of its own: without the barriers libtpu makes the slice a part of the product, which then
/// reads memory again, or one program of all slices, which needs memory for all of them. `before`: the piece before.
#[track_caller]
pub(super) fn piece(whole: &Tensor, before: Option<&Tensor>, cut: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
    let g = whole.graph();
    let whole = match before {
        Some(before) => g.optimization_barrier(&[whole, before]).remove(0),
        None => whole.clone(),
    };
    g.optimization_barrier(&[&cut(&whole)]).remove(0)
}

/// The letters of both operands and of the result.
fn letters(equation: &str) -> [&str; 3] {
    let (operands, result) = equation.split_once("->").unwrap_or((equation, ""));
    let (left, right) = operands.split_once(',').unwrap_or((operands, ""));
    [left, right, result]
}

/// The axis of the weight along which it is cut, and how long a piece is; `None` where it stays whole.
fn cut(equation: &str, weight: &Tensor, rows: usize, devices: impl Fn(char) -> usize) -> Option<(usize, usize)> {
    let [_, right, result] = letters(equation);
    let shared: usize = right.chars().map(&devices).product();
    let bytes = weight.shape().iter().product::<usize>() * weight.dtype().size() / shared;
    if weight.graph().platform() != Platform::Tpu || rows > ROWS || bytes <= WHOLE {
        return None;
    }
    let summed = right.chars().enumerate().filter(|&(_, of)| !result.contains(of) && devices(of) == 1);
    let (axis, length) = summed.map(|(axis, _)| (axis, weight.shape()[axis])).max_by_key(|&(_, length)| length)?;
    let piece = PIECE / (bytes / length) / TILE * TILE;
    (piece > 0 && piece < length).then_some((axis, piece))
}
