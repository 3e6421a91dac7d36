//! Many rows · a float weight: panels of the weight, widened to f32 and packed so that a register tile reads them in
//! order.

use std::ops::Range;

use super::element::Element;
use super::{Order, TERMS};
use crate::simd::Simd;

/// Rows of a register tile.
pub(super) const ROWS: usize = 6;

/// Vectors of a panel: with [`ROWS`] rows, three quarters of the registers are accumulators.
pub(super) const fn vectors<S: Simd>() -> usize {
    if S::REGISTERS >= 32 { 4 } else { 2 }
}

/// Elements of scratch that [`columns`] needs.
pub(super) const SCRATCH: usize = TERMS * 64;

/// Columns `columns` of x (rows, K) · w (K, N), or (N, K), into `out`, rows of `stride`, the first column at its start.
///
/// # Safety
/// `x` must be valid for reads of (rows, K), `w` for K·N elements with `columns` below N, `out` for writes, and
/// `panel` for [`SCRATCH`] elements.
pub(super) unsafe fn columns<S: Simd, T: Element>(
    simd: S,
    x: *const f32,
    rows: usize,
    k: usize,
    w: *const T,
    n: usize,
    order: Order,
    columns: Range<usize>,
    out: *mut f32,
    stride: usize,
    panel: *mut f32,
) {
    let width = vectors::<S>() * S::LANES;
    let parts = k.div_ceil(TERMS).max(1);
    for c in columns.clone().step_by(width) {
        let some = c..columns.end.min(c + width);
        for part in 0..parts {
            let terms = part * k / parts..(part + 1) * k / parts;
            // SAFETY: columns and terms are within what the caller vouches for; a part has at most TERMS terms, of which
            // each is `width` elements of the panel, and width is at most 64.
            unsafe {
                match order {
                    Order::Kn => pack(simd, w, n, terms.clone(), some.clone(), panel),
                    Order::Nk => pack_transposed(simd, w, k, terms.clone(), some.clone(), panel),
                }
                let out = out.add(c - columns.start);
                if vectors::<S>() == 4 {
                    product::<S, 4>(simd, x, rows, k, terms, panel, out, stride, some.len(), part > 0);
                } else {
                    product::<S, 2>(simd, x, rows, k, terms, panel, out, stride, some.len(), part > 0);
                }
            }
        }
    }
}

/// Rows `terms` and columns `columns` of w (K, N) into `panel` (terms, width), zeros behind the last column.
///
/// # Safety
/// `w` must be valid for reads of these rows and columns, `panel` for writes of as many rows of `width`.
unsafe fn pack<S: Simd, T: Element>(
    simd: S,
    w: *const T,
    n: usize,
    terms: Range<usize>,
    columns: Range<usize>,
    panel: *mut f32,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let width = vectors::<S>() * S::LANES;
            for (i, term) in terms.enumerate() {
                for v in (0..width).step_by(S::LANES) {
                    let left = columns.len().saturating_sub(v);
                    // SAFETY: of columns only those that are left are read, none behind the end; row i of the panel has
                    // a vector from v on.
                    unsafe {
                        let from = w.wrapping_add(term * n + columns.start + v);
                        let values =
                            if left >= S::LANES { T::read(simd, from) } else { T::read_part(simd, from, left) };
                        simd.write(panel.add(i * width + v), values);
                    }
                }
            }
        },
    )
}

/// The same of w (N, K).
///
/// # Safety
/// As [`pack`].
unsafe fn pack_transposed<S: Simd, T: Element>(
    simd: S,
    w: *const T,
    k: usize,
    terms: Range<usize>,
    columns: Range<usize>,
    panel: *mut f32,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let width = vectors::<S>() * S::LANES;
            let mut lanes = [0.0; 16];
            for c in 0..width {
                for i in (0..terms.len()).step_by(S::LANES) {
                    let left = (terms.len() - i).min(S::LANES);
                    // SAFETY: of terms only those that are left are read, and none of columns behind the end; i + l is
                    // below the terms, c below the width.
                    unsafe {
                        let values = match c < columns.len() {
                            true => T::read_part(simd, w.add((columns.start + c) * k + terms.start + i), left),
                            false => simd.zero(),
                        };
                        simd.write(lanes.as_mut_ptr(), values);
                        for (l, &value) in lanes[..left].iter().enumerate() {
                            *panel.add((i + l) * width + c) = value;
                        }
                    }
                }
            }
        },
    )
}

/// x (rows, `terms` of K) · panel, into the first `width` columns of `out`; added to what is there if `add`.
///
/// # Safety
/// `x` and `out` must be valid for `rows` rows, `panel` for as many rows as there are terms.
unsafe fn product<S: Simd, const V: usize>(
    simd: S,
    x: *const f32,
    rows: usize,
    k: usize,
    terms: Range<usize>,
    panel: *const f32,
    out: *mut f32,
    stride: usize,
    width: usize,
    add: bool,
) {
    let mut row = 0;
    while row < rows {
        // SAFETY: `row` is below `rows`, and a tile has no more rows than are left.
        unsafe {
            let (x, out) = (x.add(row * k + terms.start), out.add(row * stride));
            row += match rows - row {
                ROWS.. => tile::<S, ROWS, V>(simd, x, k, terms.len(), panel, out, stride, width, add),
                3.. => tile::<S, 3, V>(simd, x, k, terms.len(), panel, out, stride, width, add),
                _ => tile::<S, 1, V>(simd, x, k, terms.len(), panel, out, stride, width, add),
            };
        }
    }
}

/// R rows × V vectors; returns R.
///
/// # Safety
/// As [`product`], with R rows.
#[allow(clippy::needless_range_loop)]
unsafe fn tile<S: Simd, const R: usize, const V: usize>(
    simd: S,
    x: *const f32,
    k: usize,
    terms: usize,
    panel: *const f32,
    out: *mut f32,
    stride: usize,
    width: usize,
    add: bool,
) -> usize {
    simd.vectorize(
        #[inline(always)]
        || {
            let mut acc = [[simd.zero(); V]; R];
            // SAFETY: r is below R, i below `terms` and v below the vectors of a row of the panel, for which the caller
            // vouches; of out no more than `width` columns are read and written.
            unsafe {
                for i in 0..terms {
                    let mut w = [simd.zero(); V];
                    for (v, w) in w.iter_mut().enumerate() {
                        *w = simd.read(panel.add((i * V + v) * S::LANES));
                    }
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let x = simd.splat(*x.add(r * k + i));
                        for (acc, &w) in acc.iter_mut().zip(&w) {
                            *acc = simd.fma(x, w, *acc);
                        }
                    }
                }
                // By index: iterators over the arrays would put them on the stack.
                for r in 0..R {
                    for v in 0..V {
                        let left = width.saturating_sub(v * S::LANES).min(S::LANES);
                        let to = out.wrapping_add(r * stride + v * S::LANES);
                        let before = if add { simd.read_part(to, left) } else { simd.zero() };
                        simd.write_part(to, left, simd.add(before, acc[r][v]));
                    }
                }
            }
            R
        },
    )
}
