//! Few rows · an (N, K) float weight: dot products along the terms that lie together.

use std::ops::Range;

use super::TERMS;
use super::element::Element;
use crate::simd::{Simd, prefetch};

/// Outputs that are computed together, of one row and of several.
const OUTPUTS: usize = 8;
const OUTPUTS_OF_ROWS: usize = 4;

/// Bytes of the weight that are fetched ahead, at its end those of the next task.
const AHEAD: usize = 24 << 10;

/// Columns `columns` of x (rows, K) · w into `out`, rows of `stride`, the first column at its start.
///
/// # Safety
/// `x` must be valid for reads of (rows, K), `w` of (N, K) with `columns` below N, and `out` for writes.
pub(super) unsafe fn columns<S: Simd, T: Element>(
    simd: S,
    x: *const f32,
    rows: usize,
    k: usize,
    w: *const T,
    columns: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    let mut c = columns.start;
    let most = if rows == 1 { OUTPUTS } else { OUTPUTS_OF_ROWS };
    while c < columns.end {
        let outputs = (columns.end - c).min(most);
        let mut row = 0;
        while row < rows {
            // SAFETY: the row is below `rows` and the output below the columns' end, and a tile has no more rows and
            // outputs than are left.
            unsafe {
                let (x, w, out) = (x.add(row * k), w.add(c * k), out.add(row * stride + c - columns.start));
                let next = if row == 0 { AHEAD / size_of::<T>() } else { 0 };
                row += match (outputs, rows - row) {
                    (OUTPUTS, _) => tile::<S, T, 1, OUTPUTS>(simd, x, k, w, out, stride, next),
                    (OUTPUTS_OF_ROWS, 4..) => tile::<S, T, 4, OUTPUTS_OF_ROWS>(simd, x, k, w, out, stride, next),
                    (OUTPUTS_OF_ROWS, _) => tile::<S, T, 1, OUTPUTS_OF_ROWS>(simd, x, k, w, out, stride, next),
                    _ => {
                        for o in 0..outputs {
                            tile::<S, T, 1, 1>(simd, x, k, w.add(o * k), out.add(o), stride, next);
                        }
                        1
                    }
                };
            }
        }
        c += outputs;
    }
}

/// R rows × O outputs; returns R.
///
/// # Safety
/// As [`columns`].
unsafe fn tile<S: Simd, T: Element, const R: usize, const O: usize>(
    simd: S,
    x: *const f32,
    k: usize,
    w: *const T,
    out: *mut f32,
    stride: usize,
    next: usize,
) -> usize {
    simd.vectorize(
        #[inline(always)]
        || {
            let mut total = [[0.0; O]; R];
            for part in (0..k).step_by(TERMS * S::LANES) {
                let end = k.min(part + TERMS * S::LANES);
                let mut acc = [[simd.zero(); O]; R];
                let mut i = part;
                // SAFETY: terms below `end` of the rows and outputs that the caller vouches for.
                unsafe {
                    while i + S::LANES <= end {
                        let mut values = [simd.zero(); O];
                        for (o, value) in values.iter_mut().enumerate() {
                            let from = w.add(o * k + i);
                            if next > 0 {
                                prefetch(from.wrapping_add(next).cast());
                            }
                            *value = T::read(simd, from);
                        }
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = simd.read(x.add(r * k + i));
                            for (acc, &w) in acc.iter_mut().zip(&values) {
                                *acc = simd.fma(x, w, *acc);
                            }
                        }
                        i += S::LANES;
                    }
                    if i < end {
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = simd.read_part(x.add(r * k + i), end - i);
                            for (o, acc) in acc.iter_mut().enumerate() {
                                *acc = simd.fma(x, T::read_part(simd, w.add(o * k + i), end - i), *acc);
                            }
                        }
                    }
                }
                for (total, acc) in total.iter_mut().zip(acc) {
                    for (total, acc) in total.iter_mut().zip(acc) {
                        *total += simd.reduce_add(acc);
                    }
                }
            }
            for (r, total) in total.into_iter().enumerate() {
                for (o, total) in total.into_iter().enumerate() {
                    // SAFETY: the caller vouches for `out`.
                    unsafe { *out.add(r * stride + o) = total }
                }
            }
            R
        },
    )
}
