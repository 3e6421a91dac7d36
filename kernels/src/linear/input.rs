//! Rows of x as a weight is multiplied with them: f32, rounded to the weight's type, or int8 codes.

use half::{bf16, f16};

use super::codes::Rows;
use super::{FEW, Linear, Values, Weight};
use crate::packed::Bits;
use crate::pool::worth;
use crate::scratch::{Scratch, Shared};
use crate::simd::Simd;
use crate::{Isa, Pool};

/// Elements of x below which another thread is not worth its start.
const ALONE: usize = worth(1 << 15);

/// A row block that is prepared at a time: a multiple of every group of rows.
pub(super) const BLOCK_ROWS: usize = 24;

/// What rows are made into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    F32,
    Bf16,
    F16,
    /// int8, for codes of so many bits that are stored with `bias` added.
    Codes {
        bits: Bits,
        group: usize,
        bias: i32,
    },
}

impl Kind {
    pub(super) fn of(weight: &Linear) -> Kind {
        match &weight.weight {
            Weight::Rows { values: Values::F32(_), .. } => Kind::F32,
            Weight::Rows { values: Values::Bf16(_), .. } => Kind::Bf16,
            Weight::Rows { values: Values::F16(_), .. } => Kind::F16,
            Weight::Packed(packed) => {
                Kind::Codes { bits: packed.bits, group: packed.group, bias: packed.format().bias() }
            }
        }
    }
}

/// Rows as a weight is multiplied with them.
pub(super) enum Input<'a> {
    /// As they were given.
    Given(&'a [f32]),
    /// Rounded.
    Rounded(Scratch<f32>),
    Codes(Codes),
}

impl<'a> Input<'a> {
    pub(super) fn new(isa: Isa, pool: &dyn Pool, kind: Kind, x: &'a [f32], rows: usize, k: usize) -> Input<'a> {
        // With a few rows, all in this thread.
        let block = if x.len() < ALONE { rows.next_multiple_of(BLOCK_ROWS) } else { BLOCK_ROWS };
        let blocks = |f: &(dyn Fn(std::ops::Range<usize>) + Sync)| match block >= rows {
            true => f(0..rows),
            false => pool.share(rows.div_ceil(block), &|i| f(i * block..rows.min((i + 1) * block))),
        };
        match kind {
            Kind::F32 => Input::Given(x),
            Kind::Bf16 | Kind::F16 => {
                let mut rounded = Scratch::<f32>::new(x.len());
                let to = Shared::new(&mut rounded);
                blocks(&|rows| {
                    let x = &x[rows.start * k..rows.end * k];
                    // SAFETY: `rounded` has rows · k elements, and no other block has these rows.
                    let to = unsafe { std::slice::from_raw_parts_mut(to.get().add(rows.start * k), x.len()) };
                    dispatch!(isa, |_simd| round(kind, x, to));
                });
                Input::Rounded(rounded)
            }
            Kind::Codes { bits, group, bias } => {
                let groups = k.div_ceil(group);
                let wide = dispatch!(isa, |simd| wide(simd, bits));
                let bytes = if wide { 2 } else { 1 };
                let mut codes = Codes {
                    q: Scratch::new(rows * groups * group * bytes),
                    bytes,
                    start: Scratch::new(rows * groups),
                    scale: Scratch::new(rows * groups),
                    sum: Scratch::new(rows * groups),
                    all: rows,
                };
                let to = (
                    Shared::new(&mut codes.q),
                    Shared::new(&mut codes.start),
                    Shared::new(&mut codes.scale),
                    Shared::new(&mut codes.sum),
                );
                blocks(&|block| {
                    dispatch!(isa, |simd| {
                        let mut row = block.start;
                        while row < block.end {
                            let some = group_rows_of(simd, rows, block.end - row, group);
                            let at = row * groups;
                            // SAFETY: codes have rows · groups · group elements and the others rows · groups, of which this
                            // is what starts at `row`; no other block has these rows.
                            unsafe {
                                let to = (
                                    to.0.get().add(at * group * bytes),
                                    to.1.get().add(at),
                                    to.2.get().add(at),
                                    to.3.get().add(at),
                                );
                                match group {
                                    32 => quantise::<_, 32>(
                                        simd,
                                        &x[row * k..(row + some) * k],
                                        k,
                                        some,
                                        (bias, wide),
                                        to,
                                    ),
                                    _ => quantise::<_, 16>(
                                        simd,
                                        &x[row * k..(row + some) * k],
                                        k,
                                        some,
                                        (bias, wide),
                                        to,
                                    ),
                                }
                            }
                            row += some;
                        }
                    });
                });
                Input::Codes(codes)
            }
        }
    }

    /// The rows as floats, (rows, K).
    ///
    /// # Panics
    /// If they are codes.
    pub(super) fn floats(&self) -> &[f32] {
        match self {
            Input::Given(x) => x,
            Input::Rounded(x) => x,
            Input::Codes(_) => unreachable!("codes are made for packed weights alone"),
        }
    }

    /// # Panics
    /// If they are floats.
    pub(super) fn codes(&self) -> &Codes {
        match self {
            Input::Codes(codes) => codes,
            _ => unreachable!("floats are made for float weights alone"),
        }
    }
}

#[inline(always)]
fn round(kind: Kind, x: &[f32], to: &mut [f32]) {
    match kind {
        Kind::Bf16 => to.iter_mut().zip(x).for_each(|(to, &x)| *to = bf16::from_f32(x).to_f32()),
        _ => to.iter_mut().zip(x).for_each(|(to, &x)| *to = f16::from_f32(x).to_f32()),
    }
}

/// Rows as codes: value = scale · code, by groups of terms. Rows lie in groups as [`group_rows`] divides them; see
/// [`Rows`].
pub(super) struct Codes {
    q: Scratch<i8>,
    /// Bytes of a code: two where they are [`wide`].
    bytes: usize,
    start: Scratch<i32>,
    scale: Scratch<f32>,
    sum: Scratch<f32>,
    /// How many rows there are.
    pub(super) all: usize,
}

impl Codes {
    /// The group of rows that starts at `row`.
    #[inline(always)]
    pub(super) fn rows(&self, row: usize, groups: usize, group: usize) -> Rows {
        let at = row * groups;
        Rows {
            q: self.q[at * group * self.bytes..].as_ptr(),
            start: self.start[at..].as_ptr(),
            scale: self.scale[at..].as_ptr(),
            sum: self.sum[at..].as_ptr(),
        }
    }
}

/// How many of the `left` rows of a block are multiplied at a time, of `all` rows and with groups of `group` terms:
/// as many as
/// have their sums in registers. Blocks of a multiple of [`BLOCK_ROWS`] rows are divided alike wherever they end.
pub(super) fn group_rows<S: Simd>(all: usize, left: usize, group: usize) -> usize {
    let most = match (group, S::REGISTERS) {
        (32, 32) if all <= FEW => 8,
        (32, 32) if S::LANES == 16 => 6,
        (32, 32) => 8,
        _ => 4,
    };
    if left >= most { most } else { [4, 1].into_iter().find(|&rows| rows <= left).unwrap_or(1) }
}

/// Whether codes of x are 16 bits each, for a weight of so many bits.
pub(super) fn wide<S: Simd>(_: S, bits: Bits) -> bool {
    S::WIDE && bits == Bits::Eight
}

fn group_rows_of<S: Simd>(_: S, all: usize, left: usize, group: usize) -> usize {
    group_rows::<S>(all, left, group)
}

/// `rows` rows of x in groups of G: scale = max |x| / 127, code = x / scale rounded to nearest, halves to even. A
/// group whose scale
/// would not be a normal number is 0, whether the thread flushes such numbers or not; NaN and infinities stay in the
/// scale.
///
/// # Safety
/// The four pointers of `to` must be valid for writes of codes (K/G, G/4, rows, 4), of 16 bits each if `wide`, and of (K/G, rows)
/// for the others.
#[inline(always)]
unsafe fn quantise<S: Simd, const G: usize>(
    simd: S,
    x: &[f32],
    k: usize,
    rows: usize,
    (bias, wide): (i32, bool),
    to: (*mut i8, *mut i32, *mut f32, *mut f32),
) {
    for r in 0..rows {
        for (g, x) in x[r * k..(r + 1) * k].chunks(G).enumerate() {
            let values = <[f32; G]>::try_from(x).unwrap_or_else(|_| {
                let mut values = [0.0; G];
                values[..x.len()].copy_from_slice(x);
                values
            });
            // As integers, absolute values are in order, and NaN is above all.
            let largest = values.iter().fold(0, |m, x| m.max(x.to_bits() & 0x7fff_ffff));
            let scale = f32::from_bits(largest) / 127.0;
            let scale = if scale < f32::MIN_POSITIVE { 0.0 } else { scale };
            let divisor = simd.splat(if scale == 0.0 { f32::INFINITY } else { scale });
            // Adding 1.5 · 2²³ rounds to an integer, which stands in the lowest bits.
            let magic = simd.splat(12_582_912.0);
            let mut rounded = [0.0; G];
            let mut sum = simd.zero();
            for (x, rounded) in values.chunks_exact(S::LANES).zip(rounded.chunks_exact_mut(S::LANES)) {
                let y = simd.add(simd.div(simd.load(x), divisor), magic);
                sum = simd.add(sum, simd.sub(y, magic));
                simd.store(rounded, y);
            }
            let sum = simd.reduce_add(sum);
            // SAFETY: g is below K/G, j below G/4 and r below `rows`, for which the caller vouches.
            unsafe {
                for j in 0..G / 4 {
                    let at = (g * G / 4 + j) * rows + r;
                    let code = |i: usize| rounded[j * 4 + i].to_bits();
                    if wide {
                        let word = |i: usize| u64::from(code(i) as u16);
                        let words = word(0) | word(2) << 16 | word(1) << 32 | word(3) << 48;
                        to.0.cast::<u64>().add(at).write_unaligned(words.to_le());
                    } else {
                        let byte = |i: usize| u32::from(code(i) as u8);
                        let bytes = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
                        to.0.cast::<u32>().add(at).write_unaligned(bytes.to_le());
                    }
                }
                *to.1.add(g * rows + r) = -bias * sum as i32;
                *to.2.add(g * rows + r) = scale;
                *to.3.add(g * rows + r) = scale * sum;
            }
        }
    }
}
