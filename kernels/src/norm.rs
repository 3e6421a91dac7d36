//! Root mean square normalisation (Zhang and Sennrich 2019, eq. 4).

use crate::attention::{Element, Parts};
use crate::pool::worth;
use crate::simd::Simd;
use crate::{Isa, Pool, Values};

/// Elements of a chunk of rows: fewer are not worth another thread.
const CHUNK: usize = worth(1 << 13);
/// Vectors that are summed side by side.
const SIDE: usize = 4;
/// Terms of one accumulator; sums of these are added up.
const TERMS: usize = 128;

/// (offset + w) · x / sqrt(mean(x²) + ε) of each row: `x` and `out` (rows, M), `weight` (M).
///
/// # Panics
/// If `x` and `out` are not the same whole number of rows, or the machine has not got `isa`.
pub fn rms_norm(isa: Isa, pool: &dyn Pool, x: &[f32], weight: Values, eps: f32, offset: f32, out: &mut [f32]) {
    match weight {
        Values::F32(weight) => rows(isa, pool, x, weight, eps, offset, out),
        Values::Bf16(weight) => rows(isa, pool, x, weight, eps, offset, out),
        Values::F16(weight) => rows(isa, pool, x, weight, eps, offset, out),
    }
}

fn rows<E: Element>(isa: Isa, pool: &dyn Pool, x: &[f32], weight: &[E], eps: f32, offset: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(
        x.len() == out.len() && x.len().is_multiple_of(width),
        "rms_norm: x and out must be rows of {width} elements as the weight, found {} and {}",
        x.len(),
        out.len()
    );
    if x.is_empty() {
        return;
    }
    let (count, each) = (x.len() / width, CHUNK.div_ceil(width));
    let out = Parts::new(out);
    let chunk = |chunk: usize| {
        let range = chunk * each..count.min((chunk + 1) * each);
        // SAFETY: every chunk has its own rows.
        let out = unsafe { out.part(range.start * width, range.len() * width) };
        let x = &x[range.start * width..range.end * width];
        dispatch_floats!(isa, |simd| {
            for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                row(simd, x, weight, eps, offset, out);
            }
        });
    };
    match count.div_ceil(each) {
        1 => chunk(0),
        chunks => pool.share(chunks, &chunk),
    }
}

#[inline(always)]
fn row<S: Simd, E: Element>(simd: S, x: &[f32], weight: &[E], eps: f32, offset: f32, out: &mut [f32]) {
    let mut sum = 0.0;
    for part in x.chunks(TERMS * SIDE * S::LANES) {
        let mut acc = [simd.zero(); SIDE];
        let mut blocks = part.chunks_exact(SIDE * S::LANES);
        for block in &mut blocks {
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = simd.load(&block[i * S::LANES..]);
                *acc = simd.fma(x, x, *acc);
            }
        }
        for (x, acc) in blocks.remainder().chunks(S::LANES).zip(&mut acc) {
            let x = simd.load_part(x);
            *acc = simd.fma(x, x, *acc);
        }
        sum += simd.reduce_add(simd.add(simd.add(acc[0], acc[1]), simd.add(acc[2], acc[3])));
    }
    let factor = simd.splat(1.0 / (sum / x.len() as f32 + eps).sqrt());
    let offset = simd.splat(offset);
    let whole = x.len() / S::LANES * S::LANES;
    let mut at = 0;
    while at < whole {
        // SAFETY: x is as long as the weight, which so has LANES elements from here on.
        let weight = simd.add(offset, unsafe { E::read(simd, weight[at..].as_ptr()) });
        simd.store(&mut out[at..], simd.mul(simd.mul(simd.load(&x[at..]), factor), weight));
        at += S::LANES;
    }
    if at < x.len() {
        // SAFETY: the weight has as many elements left as x.
        let weight = simd.add(offset, unsafe { E::read_part(simd, weight[at..].as_ptr(), x.len() - at) });
        simd.store_part(&mut out[at..], simd.mul(simd.mul(simd.load_part(&x[at..]), factor), weight));
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;
    use crate::{Serial, Threads};

    /// Rows are below the first, the others are widths.
    const ROWS: usize = if cfg!(miri) { 5 } else { 40 };
    const MIDDLE: usize = if cfg!(miri) { 70 } else { 576 };
    const WIDE: usize = if cfg!(miri) { 130 } else { 9000 };

    proptest! {
        #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 256 }, failure_persistence: None, ..Default::default() })]

        #[test]
        fn as_in_f64(rows in 1..ROWS, width in prop_oneof![1usize..70, Just(MIDDLE), Just(WIDE)], offset in 0u8..2, seed in any::<u32>()) {
            let number = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed) >> 8) as f32 / 8_388_608.0 - 1.0;
            let x: Vec<f32> = (0..rows * width).map(|i| number(i) * 3.0).collect();
            let weight: Vec<f32> = (0..width).map(|i| bf16::from_f32(number(i + 1_000_000) / 4.0).to_f32()).collect();
            let bf16s: Vec<bf16> = weight.iter().map(|&w| bf16::from_f32(w)).collect();
            let f16s: Vec<f16> = weight.iter().map(|&w| f16::from_f32(w)).collect();
            let halves: Vec<f32> = f16s.iter().map(|w| w.to_f32()).collect();
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                for (given, weight) in [(Values::F32(&weight), &weight), (Values::Bf16(&bf16s), &weight), (Values::F16(&f16s), &halves)] {
                    for pool in [&Serial as &dyn Pool, &Threads(2)] {
                        let mut out = vec![f32::NAN; x.len()];
                        rms_norm(isa, pool, &x, given, 1e-5, f32::from(offset), &mut out);
                        for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                            let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
                            let factor = 1.0 / (squares / width as f64 + 1e-5).sqrt();
                            for ((&x, &w), &out) in x.iter().zip(weight).zip(out) {
                                let expected = f64::from(x) * factor * (f64::from(offset) + f64::from(w));
                                let error = (f64::from(out) - expected).abs();
                                prop_assert!(error <= 1e-6 * expected.abs() + 1e-9, "{isa:?}: {out}, not {expected}");
                            }
                        }
                    }
                }
            }
        }
    }
}
