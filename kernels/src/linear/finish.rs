//! What becomes of products: sums of spans, what is added, a gate's activation.

use super::Activation;
use crate::simd::Simd;

/// A product of some rows and columns in parts that are to be added.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// The first row and column of the first span.
    pub(super) at: *const f32,
    pub(super) spans: usize,
    /// Elements from span to span.
    pub(super) span: usize,
    /// Elements from row to row.
    pub(super) stride: usize,
}

/// `rows` rows of `width` columns of `out`, rows of `stride` there and in `add`: the product, + add; or act(gate) ⊙ up.
///
/// # Safety
/// The products and `add` must be valid for reads of these rows and columns, and `out` for writes.
pub(super) unsafe fn finish<S: Simd>(
    simd: S,
    product: Product,
    up: Option<Product>,
    activation: Activation,
    add: Option<*const f32>,
    rows: usize,
    width: usize,
    out: *mut f32,
    stride: usize,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            for r in 0..rows {
                for c in (0..width).step_by(S::LANES) {
                    let lanes = (width - c).min(S::LANES);
                    // SAFETY: row and columns are below `rows` and `width`, for which the caller vouches; `lanes` ends at
                    // the width.
                    unsafe {
                        let mut y = total(simd, product, r, c, lanes);
                        if let Some(add) = add {
                            y = simd.add(y, simd.read_part(add.add(r * stride + c), lanes));
                        }
                        if let Some(up) = up {
                            y = simd.mul(activate(simd, activation, y), total(simd, up, r, c, lanes));
                        }
                        simd.write_part(out.add(r * stride + c), lanes, y);
                    }
                }
            }
        },
    )
}

/// The sum of the spans at row `r`, columns from `c` on.
///
/// # Safety
/// The product must be valid for reads of `lanes` columns from there on.
#[inline(always)]
unsafe fn total<S: Simd>(simd: S, product: Product, r: usize, c: usize, lanes: usize) -> S::F32 {
    let mut sum = simd.zero();
    for span in 0..product.spans {
        // SAFETY: the caller vouches for these columns of each span.
        sum = simd
            .add(sum, unsafe { simd.read_part(product.at.add(span * product.span + r * product.stride + c), lanes) });
    }
    sum
}

#[inline(always)]
fn activate<S: Simd>(simd: S, activation: Activation, x: S::F32) -> S::F32 {
    let one = simd.splat(1.0);
    // x / (1 + e⁻ᶻ).
    let sigmoid = |z| simd.div(x, simd.add(one, simd.exp(simd.sub(simd.zero(), z))));
    match activation {
        Activation::Relu => simd.max(simd.zero(), x),
        Activation::Silu => sigmoid(x),
        // (1 + tanh u) / 2 = 1 / (1 + e⁻²ᵘ).
        Activation::GeluTanh => {
            let cube = simd.mul(simd.mul(x, x), x);
            let u = simd.fma(simd.splat(0.044_715), cube, x);
            sigmoid(simd.mul(simd.splat(1.595_769), u))
        }
        // erfc z for z ≥ 0 to 1.5·10⁻⁷ (Abramowitz and Stegun 1964, 7.1.26); x/2 · erfc(−x/√2) = max(x, 0) − |x|/2 ·
        // erfc(|x|/√2).
        Activation::Gelu => {
            let size = simd.max(x, simd.sub(simd.zero(), x));
            let z = simd.mul(size, simd.splat(std::f32::consts::FRAC_1_SQRT_2));
            let t = simd.div(one, simd.fma(simd.splat(0.327_591_1), z, one));
            let mut p = simd.splat(1.061_405_4);
            for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
                p = simd.fma(p, t, simd.splat(c));
            }
            let erfc = simd.mul(simd.mul(p, t), simd.exp(simd.sub(simd.zero(), simd.mul(z, z))));
            let half = simd.mul(simd.mul(size, simd.splat(0.5)), erfc);
            simd.sub(simd.max(simd.zero(), x), half)
        }
    }
}
