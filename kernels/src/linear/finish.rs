//! What becomes of products: sums of spans, what is added, a gate's activation.

use crate::Activation;
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
                            y = simd.mul(activation.of(simd, y), total(simd, up, r, c, lanes));
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
