//! int8 activations · packed weights: lanes are outputs, so a group is dotted in integers without a sum across lanes,
//! then scaled.

use std::ops::Range;

use half::f16;

use super::TERMS;
use super::input::{Codes, group_rows};
use crate::packed::{BLOCK, Bits, Packed, Scales};
use crate::simd::{Simd, prefetch};

/// Bytes of codes that are fetched ahead.
const AHEAD: usize = 4096;

/// Columns `columns` (from the start of a block) of rows `rows` of x · w into `out`, rows of `stride`, the first row
/// and column at its start.
///
/// # Safety
/// `w` must be [`Packed::check`]ed for `k` terms, `x` be of as many, `columns` be within w, `rows` start where a
/// group of rows of x does, and `out` be valid for writes.
pub(super) unsafe fn columns<S: Simd>(
    simd: S,
    x: &Codes,
    rows: Range<usize>,
    k: usize,
    w: &Packed,
    columns: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: what the caller vouches for, handed on; the group is 16 or 32 in a checked weight.
    unsafe {
        match (w.bits, w.group) {
            (Bits::Eight, 32) => blocks::<S, 8, false>(simd, x, rows, k, w, columns, out, stride),
            (Bits::Eight, _) => blocks::<S, 4, false>(simd, x, rows, k, w, columns, out, stride),
            (Bits::Four, 32) => blocks::<S, 8, true>(simd, x, rows, k, w, columns, out, stride),
            (Bits::Four, _) => blocks::<S, 4, true>(simd, x, rows, k, w, columns, out, stride),
        }
    }
}

/// [`columns`] for groups of 4·J terms, of 4 bits if `FOUR`.
///
/// # Safety
/// As [`columns`].
unsafe fn blocks<S: Simd, const J: usize, const FOUR: bool>(
    simd: S,
    x: &Codes,
    rows: Range<usize>,
    k: usize,
    w: &Packed,
    columns: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    let groups = k.div_ceil(4 * J);
    let mut c = columns.start;
    while c < columns.end {
        // Two vectors of outputs: of two blocks, or both halves of one.
        let pair = (S::LANES < BLOCK || S::REGISTERS == 32 && J == 8) && columns.end - c > S::LANES;
        let strips = [c, if pair { c + S::LANES } else { c }].map(|c| Strip::new(w, groups, c));
        let mut row = rows.start;
        while row < rows.end {
            // SAFETY: `row` starts a group of rows, as x was divided by `group_rows` too; the strips have a vector of
            // outputs from c on, since the arrays are padded to whole blocks; `to` is within what the caller vouches for,
            // and its width keeps the tile from writing past the last column.
            unsafe {
                let x_rows = x.rows(row, groups, 4 * J);
                let to = Target {
                    at: out.add((row - rows.start) * stride + c - columns.start),
                    stride,
                    width: columns.end - c,
                    fetch: row == rows.start && c.is_multiple_of(BLOCK),
                };
                let [first, second] = &strips;
                let some = group_rows::<S>(x.all, rows.end - row, 4 * J);
                if J == 8 && S::REGISTERS == 32 && S::LANES == BLOCK && some == 6 && pair {
                    tile::<S, J, FOUR, 6, 2>(simd, x_rows, [first, second], groups, to);
                } else if S::LANES < BLOCK && some == 1 && pair {
                    tile::<S, J, FOUR, 1, 2>(simd, x_rows, [first, second], groups, to);
                } else if S::WIDE && !FOUR && some == 4 && pair {
                    tile::<S, J, FOUR, 4, 2>(simd, x_rows, [first, second], groups, to);
                } else {
                    for (strip, to) in [(first, to), (second, to.next::<S>())].into_iter().take(1 + usize::from(pair)) {
                        if J == 8 && S::REGISTERS == 32 && some == 8 {
                            tile::<S, J, FOUR, 8, 1>(simd, x_rows, [strip], groups, to);
                        } else if J == 8 && S::REGISTERS == 32 && S::LANES == BLOCK && some == 6 {
                            tile::<S, J, FOUR, 6, 1>(simd, x_rows, [strip], groups, to);
                        } else if some == 4 {
                            tile::<S, J, FOUR, 4, 1>(simd, x_rows, [strip], groups, to);
                        } else {
                            tile::<S, J, FOUR, 1, 1>(simd, x_rows, [strip], groups, to);
                        }
                    }
                }
                row += some;
            }
        }
        c += if pair { 2 * S::LANES } else { S::LANES };
    }
}

/// Where results of some rows go.
#[derive(Clone, Copy)]
struct Target {
    at: *mut f32,
    stride: usize,
    /// Columns from `at` on that there are.
    width: usize,
    /// Whether the weight is read for the first time.
    fetch: bool,
}

impl Target {
    /// The next vector of columns, whose codes are fetched with the first ones' where they lie in one block.
    fn next<S: Simd>(self) -> Target {
        let (at, width) = (self.at.wrapping_add(S::LANES), self.width.saturating_sub(S::LANES));
        Target { at, width, fetch: self.fetch && S::LANES == BLOCK, ..self }
    }
}

/// A vector of outputs of a packed weight.
struct Strip {
    q: *const u8,
    scales: Floats,
    mins: Option<Floats>,
}

#[derive(Clone, Copy)]
enum Floats {
    F16(*const f16),
    F32(*const f32),
}

impl Strip {
    fn new(w: &Packed, groups: usize, column: usize) -> Strip {
        let (block, lane) = (column / BLOCK * groups, column % BLOCK);
        let floats = |values: Scales| match values {
            Scales::F16(values) => Floats::F16(values[block * BLOCK + lane..].as_ptr()),
            Scales::F32(values) => Floats::F32(values[block * BLOCK + lane..].as_ptr()),
        };
        // Without terms there is nothing to point at.
        if groups == 0 {
            return Strip { q: w.q.as_ptr(), scales: Floats::F32([].as_ptr()), mins: None };
        }
        let q = w.q[block * w.format().group_bytes() + lane * 4..].as_ptr();
        Strip { q, scales: floats(w.scales), mins: w.mins.map(floats) }
    }
}

impl Floats {
    /// # Safety
    /// The values must have a group `g`, and LANES elements of it from the pointer's lane on.
    #[inline(always)]
    unsafe fn read<S: Simd>(self, simd: S, g: usize) -> S::F32 {
        // SAFETY: groups are `BLOCK` values apart; the caller vouches for group `g`.
        unsafe {
            match self {
                Floats::F16(values) => simd.read_f16(values.add(g * BLOCK)),
                Floats::F32(values) => simd.read(values.add(g * BLOCK)),
            }
        }
    }
}

/// Codes of R rows of x: of each group, (J, R, 4) codes, and for each row −bias·Σcodes, the scale, and scale·Σcodes. Where
/// a weight's codes are widened, four codes are 16 bits each, in the order 0, 2, 1, 3.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) q: *const i8,
    pub(super) start: *const i32,
    pub(super) scale: *const f32,
    pub(super) sum: *const f32,
}

/// R rows × H vectors of outputs.
///
/// # Safety
/// `x` must be a group of R rows with `groups` groups, `w` have as many, `to` be valid for writes.
#[allow(clippy::needless_range_loop)]
unsafe fn tile<S: Simd, const J: usize, const FOUR: bool, const R: usize, const H: usize>(
    simd: S,
    x: Rows,
    w: [&Strip; H],
    groups: usize,
    to: Target,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let bytes = if FOUR { J * BLOCK * 2 } else { J * BLOCK * 4 };
            let low = simd.splat_i32(0x0f0f_0f0f);
            let wide = const { S::WIDE && !FOUR };
            let mut first = 0;
            // SAFETY: all groups that are read are below `groups`, of which x and w have as many, each with J words of R
            // rows in x and J (or J / 2) vectors in w; results are read and written within the width of `to` alone.
            unsafe {
                loop {
                    let end = groups.min(first + TERMS);
                    let mut acc = [[simd.zero(); H]; R];
                    for g in first..end {
                        if to.fetch {
                            for w in &w[..if S::LANES < BLOCK { 1 } else { H }] {
                                for line in 0..bytes / 64 {
                                    prefetch(w.q.wrapping_add(g * bytes + AHEAD + line * 64));
                                }
                            }
                        }
                        let start = |r: usize| simd.splat_i32(*x.start.add(g * R + r));
                        let mut dots = [[simd.dots::<FOUR>(simd.splat_i32(0)); H]; R];
                        for r in 0..R {
                            dots[r] = [simd.dots::<FOUR>(start(r)); H];
                        }
                        let xq = x.q.add(g * J * R * if wide { 8 } else { 4 }).cast::<i32>();
                        for j in 0..if FOUR { J / 2 } else { J } {
                            let mut codes = [simd.splat_i32(0); H];
                            for h in 0..H {
                                codes[h] = simd.read_i32(w[h].q.add(g * bytes + j * 64));
                            }
                            // The upper four bits are those of the terms behind the first half.
                            for half in 0..if FOUR || wide { 2 } else { 1 } {
                                for r in 0..R {
                                    let at = match FOUR {
                                        true => (j + half * J / 2) * R + r,
                                        false if wide => (j * R + r) * 2 + half,
                                        false => j * R + r,
                                    };
                                    let x = simd.splat_i32(xq.add(at).read_unaligned());
                                    for h in 0..H {
                                        let codes = match (FOUR, half) {
                                            (false, _) if wide => simd.widen(codes[h], half == 1),
                                            (false, _) => codes[h],
                                            (true, 0) => simd.and(codes[h], low),
                                            (true, _) => simd.and(simd.shift_right::<4>(codes[h]), low),
                                        };
                                        dots[r][h] = simd.dot::<FOUR>(dots[r][h], codes, x);
                                    }
                                }
                            }
                        }
                        let mut scales = [simd.zero(); H];
                        for h in 0..H {
                            scales[h] = w[h].scales.read(simd, g);
                        }
                        for r in 0..R {
                            let scale = simd.splat(*x.scale.add(g * R + r));
                            for h in 0..H {
                                let dots = simd.to_f32(simd.total::<FOUR>(dots[r][h], start(r)));
                                acc[r][h] = simd.fma(simd.mul(dots, scale), scales[h], acc[r][h]);
                            }
                        }
                        if w[0].mins.is_some() {
                            let mut mins = [simd.zero(); H];
                            for h in 0..H {
                                if let Some(values) = w[h].mins {
                                    mins[h] = values.read(simd, g);
                                }
                            }
                            for r in 0..R {
                                let sum = simd.splat(*x.sum.add(g * R + r));
                                for h in 0..H {
                                    acc[r][h] = simd.fma(sum, mins[h], acc[r][h]);
                                }
                            }
                        }
                    }
                    for r in 0..R {
                        for h in 0..H {
                            let at = to.at.wrapping_add(r * to.stride + h * S::LANES);
                            let lanes = to.width.saturating_sub(h * S::LANES).min(S::LANES);
                            let before = if first > 0 { simd.read_part(at, lanes) } else { simd.zero() };
                            simd.write_part(at, lanes, simd.add(before, acc[r][h]));
                        }
                    }
                    first = end;
                    if first >= groups {
                        return;
                    }
                }
            }
        },
    );
}
