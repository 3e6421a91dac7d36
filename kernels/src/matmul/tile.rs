//! A register tile: some rows · some vectors of columns.

use crate::simd::Simd;

/// Rows of a tile.
pub(super) const ROWS: usize = 6;

/// Vectors of a row of a tile: three quarters of the registers are accumulators.
const fn vectors<S: Simd>() -> usize {
    if S::REGISTERS >= 32 { 4 } else { 2 }
}

/// Columns of a tile.
pub(super) const fn columns<S: Simd>() -> usize {
    vectors::<S>() * S::LANES
}

/// Where a tile's sums go.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// The first row and column.
    pub(super) out: *mut f32,
    /// Elements from row to row.
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Whether to add to what is there.
    pub(super) add: bool,
}

/// left, ([`ROWS`], terms) if `ROWWISE`, else (terms, [`ROWS`]), · right (terms, [`columns`]): the rows and columns that have a place.
///
/// # Safety
/// `place` must be valid for reads and writes of its rows and columns.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, const ROWWISE: bool>(simd: S, left: &[f32], right: &[f32], place: Place) {
    match vectors::<S>() {
        // SAFETY: as the caller vouches.
        4 => unsafe { sums::<S, ROWWISE, 4>(simd, left, right, place) },
        // SAFETY: as above.
        _ => unsafe { sums::<S, ROWWISE, 2>(simd, left, right, place) },
    }
}

/// # Safety
/// As [`tile`].
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn sums<S: Simd, const ROWWISE: bool, const V: usize>(simd: S, left: &[f32], right: &[f32], place: Place) {
    let Place { out, stride, rows, columns, add } = place;
    let terms = left.len() / ROWS;
    assert!(right.len() >= terms * V * S::LANES);
    for r in 0..rows {
        crate::simd::prefetch(out.wrapping_add(r * stride).cast());
    }
    let mut acc = [[simd.zero(); V]; ROWS];
    // SAFETY: i is below the terms, of which left has ROWS elements each and right V vectors; of out no more than the caller
    // vouches for.
    unsafe {
        for i in 0..terms {
            let mut w = [simd.zero(); V];
            for v in 0..V {
                w[v] = simd.read(right.as_ptr().add((i * V + v) * S::LANES));
            }
            for r in 0..ROWS {
                let at = if ROWWISE { r * terms + i } else { i * ROWS + r };
                let x = simd.splat(*left.as_ptr().add(at));
                for v in 0..V {
                    acc[r][v] = simd.fma(x, w[v], acc[r][v]);
                }
            }
        }
        // By index: iterators over the arrays would put them on the stack.
        let whole = columns == V * S::LANES;
        for r in 0..ROWS {
            if r >= rows {
                break;
            }
            for v in 0..V {
                let to = out.wrapping_add(r * stride + v * S::LANES);
                if whole {
                    let before = if add { simd.read(to) } else { simd.zero() };
                    simd.write(to, simd.add(before, acc[r][v]));
                } else {
                    let left = columns.saturating_sub(v * S::LANES).min(S::LANES);
                    let before = if add { simd.read_part(to, left) } else { simd.zero() };
                    simd.write_part(to, left, simd.add(before, acc[r][v]));
                }
            }
        }
    }
}
