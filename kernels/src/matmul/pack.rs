//! Panels: so many lines of an operand beside each other, term after term, zeros behind the last line.

use std::ops::Range;

use super::tile::{self, ROWS};
use crate::linear::Element;
use crate::simd::Simd;

/// Lines of a panel: rows of the left operand, columns of the right one.
pub(super) const fn width<S: Simd, const RIGHT: bool>() -> usize {
    if RIGHT { tile::columns::<S>() } else { ROWS }
}

/// Of values (K, L) the terms `terms` and the lines `lines`, to `to` (panels, terms, width).
#[inline(always)]
pub(super) fn lines<S: Simd, T: Element, const RIGHT: bool>(
    simd: S,
    values: &[T],
    all_lines: usize,
    terms: Range<usize>,
    lines: Range<usize>,
    to: &mut [f32],
) {
    let (width, panel) = (const { width::<S, RIGHT>() }, terms.len() * width::<S, RIGHT>());
    for (t, term) in terms.enumerate() {
        // The lines, and what of the row lies behind them.
        let row = &values[term * all_lines + lines.start..(term + 1) * all_lines];
        let whole = lines.len() / width;
        for p in 0..whole {
            let (from, to) = (&row[p * width..], &mut to[p * panel + t * width..]);
            for v in (0..width).step_by(S::LANES) {
                // What a vector writes too many, the next terms of this panel write over.
                let some = S::LANES.min(width - v);
                if some == S::LANES || (t * width + v + S::LANES <= panel && from.len() >= v + S::LANES) {
                    // SAFETY: so many elements are left in `from`.
                    let x = unsafe { T::read(simd, from[v..][..S::LANES].as_ptr()) };
                    simd.store(&mut to[v..], x);
                } else {
                    // SAFETY: as above.
                    let x = unsafe { T::read_part(simd, from[v..][..some].as_ptr(), some) };
                    simd.store_part(&mut to[v..][..some], x);
                }
            }
        }
        let left = lines.len() - whole * width;
        if left > 0 {
            let to = &mut to[whole * panel + t * width..][..width];
            for (to, &x) in to.iter_mut().zip(&row[whole * width..][..left]) {
                *to = x.into();
            }
            to[left..].fill(0.0);
        }
    }
}

/// The same of values (L, K), for the left operand to `to` (panels, width, terms).
#[inline(always)]
pub(super) fn rows<S: Simd, T: Element>(
    simd: S,
    values: &[T],
    k: usize,
    terms: Range<usize>,
    lines: Range<usize>,
    to: &mut [f32],
) {
    let mut to = to.chunks_exact_mut(terms.len());
    for (line, to) in lines.zip(&mut to) {
        let from = &values[line * k..][terms.clone()];
        for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
            // SAFETY: no more elements than the chunk has.
            let x = unsafe { T::read_part(simd, from.as_ptr(), from.len()) };
            simd.store_part(to, x);
        }
    }
    to.for_each(|behind| behind.fill(0.0));
}

/// The same of values (N, K) of the right operand, to `to` (panels, terms, width).
#[inline(always)]
pub(super) fn columns<S: Simd, T: Element>(
    simd: S,
    values: &[T],
    k: usize,
    terms: Range<usize>,
    lines: Range<usize>,
    to: &mut [f32],
) {
    let width = tile::columns::<S>();
    let mut lanes = [0.0; 16];
    for (p, to) in to.chunks_exact_mut(terms.len() * width).enumerate() {
        let lines = lines.start + p * width..lines.end.min(lines.start + (p + 1) * width);
        if lines.len() < width {
            to.fill(0.0);
        }
        for (l, line) in lines.enumerate() {
            let from = &values[line * k..][terms.clone()];
            for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES * width)) {
                // SAFETY: no more elements than the chunk has.
                let x = unsafe { T::read_part(simd, from.as_ptr(), from.len()) };
                simd.store(&mut lanes, x);
                for (i, &x) in lanes[..from.len()].iter().enumerate() {
                    to[i * width + l] = x;
                }
            }
        }
    }
}
