//! Rows of zeros behind those that count.

use xla::graph::Tensor;

/// Rows below which a TPU multiplies with its vector units, about ten times slower than with its matrix unit.
pub(super) const TPU_ROWS: usize = 8;

/// `x` with `value` behind, so that axis `axis` has length `len`.
#[track_caller]
pub(super) fn pad(x: &Tensor, axis: usize, len: usize, value: f64) -> Tensor {
    if x.dim(axis as isize) == len {
        return x.clone();
    }
    let mut high = vec![0; x.rank()];
    high[axis] = (len - x.dim(axis as isize)) as i64;
    match x.dtype().is_float() {
        true => x.pad(value, &vec![0; x.rank()], &high, &vec![0; x.rank()]),
        false => x.pad(value as i64, &vec![0; x.rank()], &high, &vec![0; x.rank()]),
    }
}
