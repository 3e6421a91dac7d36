//! Few rows · a (K, N) float weight: the weight is read as it lies, some of its rows at a time.
//!
//! Columns alone, each with all its terms, would read pieces of rows that are far apart, which memory gives at half its
//! speed. So K is cut into spans, whose sums over whole rows (or wide pieces of them) are added at the end.

use std::ops::Range;

use super::TERMS;
use super::element::Element;
use crate::pool::worth;
use crate::simd::{Simd, prefetch};

/// Weight rows that are read side by side; the next ones are fetched meanwhile.
const SIDE_BY_SIDE: usize = 8;

/// How a weight is cut: the results depend on it, so it depends on the sizes alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Terms of a span.
    terms: usize,
    /// Columns of a piece.
    columns: usize,
    k: usize,
    n: usize,
}

impl Cut {
    /// For a weight of `k` terms and `n` outputs of `size` bytes each, and `rows` rows.
    pub(super) fn new(k: usize, n: usize, size: usize, rows: usize) -> Cut {
        // With several rows the sums of a piece stay in the nearest cache.
        let columns = (2048 / rows).max(256);
        let columns = n.div_ceil(n.div_ceil(columns).max(1)).next_multiple_of(64).max(64);
        let pieces = n.div_ceil(columns).max(1);
        // Spans of some 64 KB: enough of them for all threads, each worth its start.
        let most = 12.max(k / TERMS).div_ceil(if rows == 1 { 1 } else { pieces });
        let spans = (k * n * size / worth(64 << 10) / pieces).clamp(1, most);
        Cut { terms: k.div_ceil(spans).next_multiple_of(SIDE_BY_SIDE), columns, k, n }
    }

    pub(super) fn spans(&self) -> usize {
        self.k.div_ceil(self.terms.max(1))
    }

    /// Spans × pieces.
    pub(super) fn tasks(&self) -> usize {
        self.spans() * self.n.div_ceil(self.columns.max(1))
    }

    /// Elements of scratch that [`task`] needs beside its result.
    pub(super) fn scratch(&self, rows: usize) -> usize {
        rows * self.columns
    }
}

/// Task `task` of `cut`: the sums of one span for the columns of one piece, into `sums` (spans, rows, N).
///
/// # Safety
/// `x` must be valid for reads of (rows, K), `w` of (K, N), `sums` for writes of (spans, rows, N) where this task
/// writes, and `scratch` for [`Cut::scratch`] elements.
pub(super) unsafe fn task<S: Simd, T: Element>(
    simd: S,
    cut: &Cut,
    task: usize,
    x: *const f32,
    rows: usize,
    w: *const T,
    sums: *mut f32,
    scratch: *mut f32,
) {
    let (k, n) = (cut.k, cut.n);
    let (span, piece) = (task % cut.spans(), task / cut.spans());
    let terms = span * cut.terms..k.min((span + 1) * cut.terms);
    let columns = piece * cut.columns..n.min((piece + 1) * cut.columns);
    let width = columns.len();
    let mut at = terms.start;
    while at < terms.end {
        let part = at..terms.end.min(at + TERMS);
        for first in part.clone().step_by(SIDE_BY_SIDE) {
            let some = first..part.end.min(first + SIDE_BY_SIDE);
            let next = if some.end < k { SIDE_BY_SIDE * n } else { 0 };
            let mut row = 0;
            while row < rows {
                // SAFETY: row, terms and columns are below `rows`, k and n, for which the caller vouches; the scratch has
                // rows of `width`; no more rows are taken at once than are left.
                unsafe {
                    let sums = Sums {
                        from: if first == part.start { None } else { Some(scratch.add(row * width)) },
                        add: at > terms.start,
                        to: match some.end == part.end {
                            true => (sums.add((span * rows + row) * n + columns.start), n),
                            false => (scratch.add(row * width), width),
                        },
                        last: some.end == part.end,
                        width,
                    };
                    let x = x.add(row * k);
                    let w = w.add(columns.start);
                    let next = if row == 0 { next } else { 0 };
                    // As many sums as there are registers for.
                    row += match (S::REGISTERS, rows - row) {
                        (32.., 8..) => side_by_side::<S, T, 8, 2>(simd, x, k, w, n, some.clone(), sums, next),
                        (32.., 4..) => side_by_side::<S, T, 4, 4>(simd, x, k, w, n, some.clone(), sums, next),
                        (_, 4..) => side_by_side::<S, T, 4, 2>(simd, x, k, w, n, some.clone(), sums, next),
                        _ => side_by_side::<S, T, 1, 4>(simd, x, k, w, n, some.clone(), sums, next),
                    };
                }
            }
        }
        at = part.end;
    }
}

/// Where running sums come from and go to.
#[derive(Clone, Copy)]
struct Sums {
    /// Rows of `width`; nothing: zeros.
    from: Option<*const f32>,
    /// Start and stride of rows.
    to: (*mut f32, usize),
    /// Whether `to` is the total, to which the part's sum is added if `add`.
    last: bool,
    add: bool,
    width: usize,
}

impl Sums {
    /// Those of row `r` on.
    ///
    /// # Safety
    /// There must be such a row.
    unsafe fn row(self, r: usize) -> Sums {
        // SAFETY: the caller vouches for the row.
        unsafe {
            let from = self.from.map(|from| from.add(r * self.width));
            Sums { from, to: (self.to.0.add(r * self.to.1), self.to.1), ..self }
        }
    }
}

/// R rows of x times the weight rows `terms`; returns R.
///
/// # Safety
/// As [`task`].
unsafe fn side_by_side<S: Simd, T: Element, const R: usize, const V: usize>(
    simd: S,
    x: *const f32,
    k: usize,
    w: *const T,
    n: usize,
    terms: Range<usize>,
    sums: Sums,
    next: usize,
) -> usize {
    simd.vectorize(
        #[inline(always)]
        || {
            let mut c = 0;
            // SAFETY: c + V·LANES is at most the piece's width, and where less is left, only lanes below the width are
            // touched; the caller vouches for R rows.
            unsafe {
                while c + V * S::LANES <= sums.width {
                    tile::<S, T, R, V, false>(simd, x, k, w, n, &terms, sums, next, c);
                    c += V * S::LANES;
                }
                while c < sums.width {
                    // Too few columns to be worth code for every number of rows.
                    for r in 0..R {
                        tile::<S, T, 1, 1, true>(simd, x.add(r * k), k, w, n, &terms, sums.row(r), next, c);
                    }
                    c += S::LANES;
                }
            }
        },
    );
    R
}

/// R rows × V vectors of columns from `c` on; of the only vector's lanes those within the width where `PART`.
///
/// # Safety
/// As [`task`].
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn tile<S: Simd, T: Element, const R: usize, const V: usize, const PART: bool>(
    simd: S,
    x: *const f32,
    k: usize,
    w: *const T,
    n: usize,
    terms: &Range<usize>,
    sums: Sums,
    next: usize,
    c: usize,
) {
    let lanes = (sums.width - c).min(S::LANES);
    let mut acc = [[simd.zero(); V]; R];
    // SAFETY: the caller vouches for the columns from c on in R rows of x, sums and scratch: V whole vectors, or
    // `lanes` of one where `PART`.
    unsafe {
        if let Some(from) = sums.from {
            for r in 0..R {
                for v in 0..V {
                    let from = from.add(r * sums.width + c + v * S::LANES);
                    acc[r][v] = if PART { simd.read_part(from, lanes) } else { simd.read(from) };
                }
            }
        }
        for k0 in terms.clone() {
            let w = w.add(k0 * n + c);
            if next > 0 {
                for line in 0..(V * S::LANES * size_of::<T>()).div_ceil(64) {
                    prefetch(w.wrapping_add(next).cast::<u8>().wrapping_add(line * 64));
                }
            }
            let mut values = [simd.zero(); V];
            for v in 0..V {
                let from = w.add(v * S::LANES);
                values[v] = if PART { T::read_part(simd, from, lanes) } else { T::read(simd, from) };
            }
            for r in 0..R {
                let x = simd.splat(*x.add(r * k + k0));
                for v in 0..V {
                    acc[r][v] = simd.fma(x, values[v], acc[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..V {
                let to = sums.to.0.add(r * sums.to.1 + c + v * S::LANES);
                let mut sum = acc[r][v];
                if sums.last && sums.add {
                    let before = if PART { simd.read_part(to, lanes) } else { simd.read(to) };
                    sum = simd.add(before, sum);
                }
                if PART {
                    simd.write_part(to, lanes, sum);
                } else {
                    simd.write(to, sum);
                }
            }
        }
    }
}
