//! Products with weights: x (rows, K) · W (K, N), in f32.
//!
//! x is first brought to what the weight is multiplied in: rounded to bf16 or f16 where the weight is stored so, and
//! quantised to int8 for packed weights (`input`). Sums are in f32 and of parts of at most `TERMS` terms each: a
//! running sum
//! over n terms loses about √n roundings, sums of parts fewer (Higham 1993), so one row and many agree closely.
//!
//! | weight | few rows | many rows |
//! |---|---|---|
//! | (K, N) floats | `stream`: whole rows of the weight, as memory is read fastest | `panel` |
//! | (N, K) floats | `dots`: an output's terms lie together | `panel` |
//! | packed | `codes` | `codes` |

// Kernels take sizes and strides beside their slices.
#![allow(clippy::too_many_arguments)]

mod codes;
mod dots;
mod element;
mod finish;
mod input;
mod panel;
mod run;
mod stream;
mod take_rows;
#[cfg(test)]
mod tests;

use half::{bf16, f16};

use crate::packed::Packed;
use crate::scratch::counts;
use crate::{Activation, Isa, Pool};
pub(crate) use element::{Element, elements};
pub use take_rows::take_rows;

/// Terms that one f32 accumulator may see.
pub(crate) const TERMS: usize = 144;

/// Rows up to which a product is bound by reading the weight.
const FEW: usize = 16;

/// Weights as stored.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

impl Values<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::Bf16(values) => values.len(),
            Values::F16(values) => values.len(),
        }
    }
}

impl<'a> Values<'a> {
    /// Those from `i / count` of them on, as many.
    pub(crate) fn part(self, i: usize, count: usize) -> Values<'a> {
        match self {
            Values::F32(values) => Values::F32(crate::packed::part(values, i, count)),
            Values::Bf16(values) => Values::Bf16(crate::packed::part(values, i, count)),
            Values::F16(values) => Values::F16(crate::packed::part(values, i, count)),
        }
    }
}

/// Which axis of a float weight lies together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// (K, N), row-major: the outputs of a term.
    Kn,
    /// (N, K), row-major: the terms of an output.
    Nk,
}

/// The elements of a weight.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub enum Weight<'a> {
    Rows { values: Values<'a>, order: Order },
    Packed(Packed<'a>),
}

/// A weight that contracts `k` terms into `n` outputs.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Linear<'a> {
    pub weight: Weight<'a>,
    pub k: usize,
    pub n: usize,
}

impl Linear<'_> {
    /// Number `i` of `count` weights of this shape, whose arrays lie one behind the other in this one's.
    ///
    /// # Panics
    /// If there is no such one.
    pub fn part(&self, i: usize, count: usize) -> Self {
        assert!(i < count, "one of {count} weights required, found number {i}");
        let weight = match self.weight {
            Weight::Rows { values, order } => Weight::Rows { values: values.part(i, count), order },
            Weight::Packed(packed) => Weight::Packed(packed.part(i, count)),
        };
        Linear { weight, ..*self }
    }

    fn check(&self) {
        match &self.weight {
            Weight::Rows { values, .. } => assert!(
                counts(values.len(), &[self.k, self.n]),
                "weight of {} × {} elements required, found {}",
                self.k,
                self.n,
                values.len()
            ),
            Weight::Packed(packed) => packed.check(self.k, self.n),
        }
    }
}

/// A product, or two of one shape, and what becomes of it.
struct Job<'a> {
    weights: &'a [Linear<'a>],
    /// act(first) ⊙ second, for two weights.
    activation: Activation,
    /// (rows, n), added to the product of one weight.
    add: Option<&'a [f32]>,
    /// (rows, n).
    out: crate::scratch::Shared<f32>,
}

impl Job<'_> {
    fn n(&self) -> usize {
        self.weights[0].n
    }
}

/// `out[i] = x · weights[i]`, + `add` where given: `x` (rows, K), `out[i]` and `add` (rows, nᵢ).
///
/// # Panics
/// If a slice has not the length that `rows` and the weights ask for, a packed weight its shapes, or the machine not
/// `isa`; if `add` is given with several weights.
pub fn linear(
    isa: Isa,
    pool: &dyn Pool,
    x: &[f32],
    rows: usize,
    weights: &[Linear],
    add: Option<&[f32]>,
    out: &mut [&mut [f32]],
) {
    assert!(weights.len() == out.len(), "{} outputs required, found {}", weights.len(), out.len());
    assert!(add.is_none() || weights.len() == 1, "add with one weight required, found {} weights", weights.len());
    let jobs: Vec<Job> = weights
        .iter()
        .zip(out)
        .map(|(weight, out)| {
            check(x, rows, weight, out, "out");
            if let Some(add) = add {
                check(x, rows, weight, add, "add");
            }
            let out = crate::scratch::Shared::new(out);
            Job { weights: std::slice::from_ref(weight), activation: Activation::Relu, add, out }
        })
        .collect();
    run::run(isa, pool, x, rows, &jobs);
}

/// `out = act(x · gate) ⊙ (x · up)`: `x` (rows, K), `out` (rows, n).
///
/// # Panics
/// If a slice has not the length that `rows` and the weights ask for, a packed weight its shapes, or the machine not
/// `isa`; if the weights differ in shape.
pub fn gated(
    isa: Isa,
    pool: &dyn Pool,
    x: &[f32],
    rows: usize,
    gate: &Linear,
    up: &Linear,
    activation: Activation,
    out: &mut [f32],
) {
    check(x, rows, gate, out, "out");
    check(x, rows, up, out, "out");
    assert!(gate.n == up.n, "gate and up of one shape required, found {} and {} outputs", gate.n, up.n);
    let out = crate::scratch::Shared::new(out);
    run::run(isa, pool, x, rows, &[Job { weights: &[*gate, *up], activation, add: None, out }]);
}

fn check(x: &[f32], rows: usize, weight: &Linear, out: &[f32], name: &str) {
    let (k, n) = (weight.k, weight.n);
    weight.check();
    assert!(counts(x.len(), &[rows, k]), "x of {rows} rows × {k} required, found {} elements", x.len());
    assert!(counts(out.len(), &[rows, n]), "{name} of {rows} rows × {n} required, found {} elements", out.len());
}
