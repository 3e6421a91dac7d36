//! The choice of a token from logits.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::simd::Simd;
use crate::{Isa, Pool};

/// Logits of a chunk of work.
const CHUNK: usize = 1 << 13;
/// Logits among which the first of the largest is looked for.
const BLOCK: usize = 512;

/// The index of each row's largest element, the first of several; NaN counts as the largest. `x`: (rows, V), `out`: (rows).
///
/// # Panics
/// If `x` is not as many rows as `out` of at least one element and at most 2³² − 1, or the machine has not got `isa`.
pub fn argmax(isa: Isa, pool: &dyn Pool, x: &[f32], out: &mut [i32]) {
    let width = x.len() / out.len().max(1);
    assert!(
        x.len() == width * out.len() && (out.is_empty() || (1..u32::MAX as usize).contains(&width)),
        "argmax: x must be {} rows of at least one element, found {} elements",
        out.len(),
        x.len()
    );
    let chunks = width.div_ceil(CHUNK);
    let best: Vec<AtomicU64> = out.iter().map(|_| AtomicU64::new(0)).collect();
    let chunk = |i: usize| {
        let (row, first) = (i / chunks, i % chunks * CHUNK);
        let part = &x[row * width..][first..width.min(first + CHUNK)];
        let (index, value) = dispatch_floats!(isa, |simd| largest(simd, part));
        best[row].fetch_max(key(value, (first + index) as u32), Ordering::Relaxed);
    };
    match chunks * out.len() {
        1 => chunk(0),
        chunks => pool.run(chunks, &chunk),
    }
    for (out, best) in out.iter_mut().zip(best) {
        *out = !(best.into_inner() as u32) as i32;
    }
}

/// A number that is the larger the larger the value is, and for equal values the smaller the index is; never 0.
fn key(value: f32, index: u32) -> u64 {
    // Zeros of both signs are equal.
    let bits = (value + 0.0).to_bits();
    let ordered = match value.is_nan() {
        true => u32::MAX,
        false if bits >> 31 == 0 => bits | 1 << 31,
        false => !bits,
    };
    u64::from(ordered) << 32 | u64::from(!index)
}

/// The first of the largest elements, or the first NaN.
#[inline(always)]
fn largest<S: Simd>(simd: S, x: &[f32]) -> (usize, f32) {
    let mut best = f32::NEG_INFINITY;
    let mut at = 0;
    // Zero, unless something is infinite or not a number.
    let mut zeros = simd.zero();
    for (i, block) in x.chunks(BLOCK).enumerate() {
        let lowest = simd.splat(f32::NEG_INFINITY);
        let mut most = [lowest; 4];
        let mut parts = block.chunks_exact(4 * S::LANES);
        for part in &mut parts {
            for (j, most) in most.iter_mut().enumerate() {
                let x = simd.load(&part[j * S::LANES..]);
                *most = simd.max(x, *most);
                zeros = simd.fma(x, simd.zero(), zeros);
            }
        }
        let here = simd.reduce_max(simd.max(simd.max(most[0], most[1]), simd.max(most[2], most[3])));
        // f32::max leaves out what is not a number.
        let rest = parts.remainder();
        let here = rest.iter().copied().fold(here, f32::max);
        zeros = simd.add(zeros, simd.splat(rest.iter().map(|x| x * 0.0).sum()));
        if here > best {
            (best, at) = (here, i);
        }
    }
    if simd.reduce_add(zeros) != 0.0
        && let Some(nan) = x.iter().position(|x| x.is_nan())
    {
        return (nan, f32::NAN);
    }
    let index = x[at * BLOCK..].iter().position(|&x| x == best).unwrap_or(0);
    (at * BLOCK + index, best)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Serial, Threads};

    fn plain(x: &[f32]) -> i32 {
        let best = x.iter().copied().reduce(|a, b| if b > a || b.is_nan() { b } else { a }).expect("not empty");
        let nan = x.iter().position(|x| x.is_nan());
        nan.unwrap_or_else(|| x.iter().position(|&x| x == best).expect("it is one of them")) as i32
    }

    fn check(x: &[f32], rows: usize) {
        let expected: Vec<i32> = x.chunks(x.len() / rows).map(plain).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for pool in [&Serial as &dyn Pool, &Threads(2)] {
                let mut out = vec![-1; rows];
                argmax(isa, pool, x, &mut out);
                assert_eq!(out, expected, "{isa:?}");
            }
        }
    }

    /// About a chunk of logits.
    const LONG: usize = if cfg!(miri) { 200 } else { 8_000 };

    proptest! {
        #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 256 }, failure_persistence: None, ..Default::default() })]

        #[test]
        fn the_first_of_the_largest(
            rows in 1usize..5,
            width in prop_oneof![1usize..100, LONG..5 * LONG / 2],
            values in prop::collection::vec(prop_oneof![
                -3i8..3,
                Just(i8::MIN),
                Just(i8::MAX),
            ], 4 * LONG),
        ) {
            let value = |&x: &i8| match x {
                i8::MIN => f32::NAN,
                i8::MAX => f32::NEG_INFINITY,
                0 if width % 2 == 0 => -0.0,
                x => f32::from(x) / 2.0,
            };
            let x: Vec<f32> = values.iter().cycle().take(rows * width).map(value).collect();
            check(&x, rows);
        }

        #[test]
        fn one_larger_than_the_rest(width in 1..8 * LONG, at in any::<prop::sample::Index>()) {
            let mut x = vec![-1.5; width];
            x[at.index(width)] = -1.25;
            check(&x, 1);
        }
    }

    #[test]
    fn not_a_number() {
        check(&[f32::NAN; 70], 2);
        check(&[f32::NAN, f32::NEG_INFINITY, f32::NEG_INFINITY], 1);
        check(&[0.0, -0.0, f32::NAN], 1);
        check(&[f32::NEG_INFINITY; 600], 1);
    }
}
