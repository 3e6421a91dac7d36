//! Exponentials of scores, and the softcap.

use crate::simd::Simd;

/// eˣ for x ≤ 0 to 2 ulp: 0 below −87.3, NaN for NaN. Half the instructions of [`Simd::exp`].
#[inline(always)]
pub fn weight<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let lower = simd.splat(-87.336_55);
    let clamped = simd.max(lower, x);
    // x = n·ln 2 + r with |r| ≤ ln 2 / 2; ln 2 in two parts, the first with few bits so that n·part is exact.
    let n = simd.round(simd.mul(clamped, simd.splat(std::f32::consts::LOG2_E)));
    let r = simd.fma(n, simd.splat(-0.693_359_4), clamped);
    let r = simd.fma(n, simd.splat(2.121_944_4e-4), r);
    // eʳ by its Taylor polynomial of degree 7: the next term is below 2⁻²⁷ of the sum.
    let mut p = simd.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = simd.fma(p, r, simd.splat(c));
    }
    simd.zero_below(x, lower, simd.mul(p, simd.exp2i(n)))
}

/// cap · tanh(x / cap).
#[inline(always)]
pub fn softcap<S: Simd>(simd: S, x: S::F32, cap: f32) -> S::F32 {
    simd.mul(tanh(simd, simd.div(x, simd.splat(cap))), simd.splat(cap))
}

/// Where tanh changes from one form to the other.
const SMALL: f32 = 0.625;

/// tanh x to 4 ulp.
#[inline(always)]
fn tanh<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let one = simd.splat(1.0);
    let magnitude = simd.max(x, simd.sub(simd.zero(), x));
    // x + x³·P(x²) near 0, where the other form would cancel: P interpolates at the Chebyshev points, to 2e-8.
    let u = simd.mul(x, x);
    let mut p = simd.splat(-0.006_096_714);
    for c in [0.020_997_18, -0.053_850_908, 0.133_327_7, -0.333_333_28] {
        p = simd.fma(p, u, simd.splat(c));
    }
    let near = simd.fma(simd.mul(x, u), p, x);
    // 1 − 2 / (e²ˣ + 1).
    let e = simd.exp(simd.add(x, x));
    let far = simd.sub(one, simd.div(simd.splat(2.0), simd.add(e, one)));
    let limit = simd.splat(SMALL);
    let near = simd.zero_below(limit, magnitude, near);
    let far = simd.zero_below(magnitude, simd.splat(SMALL.next_up()), far);
    simd.add(near, far)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    #[test]
    fn near_the_functions_of_f64() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let check = |x: f32| {
                let [mut exp, mut capped] = [[0.0], [0.0]];
                dispatch_floats!(isa, |simd| {
                    simd.store_part(&mut exp, weight(simd, simd.splat(-x.abs())));
                    simd.store_part(&mut capped, softcap(simd, simd.splat(x), 3.0));
                });
                let expected = (-f64::from(x.abs())).exp();
                if x.abs() < 87.3 {
                    assert!((f64::from(exp[0]) / expected - 1.0).abs() < 2.5e-7, "exp {isa:?} {x}: {exp:?}");
                } else if x.abs() > 87.4 {
                    assert_eq!(exp[0], 0.0, "exp {isa:?} {x}");
                }
                let expected = (f64::from(x) / 3.0).tanh() * 3.0;
                let error = (f64::from(capped[0]) - expected).abs();
                assert!(error <= 4e-7 * expected.abs(), "softcap {isa:?} {x}: {capped:?}, not {expected}");
            };
            let step = if cfg!(miri) { 397 } else { 1 };
            (-4000..4000).step_by(step).for_each(|i| check(i as f32 * 0.0253));
            [1.875, -1.875, 1.875f32.next_up(), 1e-8, 3e38, -3e38].into_iter().for_each(check);
        }
    }

    #[test]
    fn what_is_no_number_stays_so() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let mut out = [0.0; 2];
            let (exp, capped) = out.split_at_mut(1);
            dispatch_floats!(isa, |simd| {
                simd.store_part(exp, weight(simd, simd.splat(f32::NAN)));
                simd.store_part(capped, softcap(simd, simd.splat(f32::NAN), 3.0));
            });
            assert!(out[0].is_nan() && out[1].is_nan(), "{isa:?}: {out:?}");
        }
    }
}
