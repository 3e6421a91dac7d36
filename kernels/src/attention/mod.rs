//! Attention over a cache: softmax(q·kᵀ)·v with grouped heads (Ainslie et al. 2023), on two ways with the same result.
//!
//! Few query rows are limited by how fast keys and values come from memory: `rows` reads both once for all heads of a
//! group and splits the keys among the threads. Many are limited by arithmetic: `tiles` multiplies blocks of queries
//! and keys.

use half::{bf16, f16};

use crate::scratch::counts;
use crate::{Isa, Pool};

mod element;
mod gradient;
mod parts;
mod rows;
mod softmax;
mod step;
mod tiles;
mod visible;

pub use gradient::{Gradients, attend_gradient};
pub use step::{KvMut, Place, Step, held, step, store};

pub(crate) use element::Element;
pub(crate) use parts::Parts;

use element::Array;
use visible::Visible;

/// The lengths of attention's axes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Slots of the cache, B.
    pub batch: usize,
    /// Queries of each slot, S.
    pub queries: usize,
    /// Heads of keys and values, G.
    pub groups: usize,
    /// Heads of queries for each of them, R.
    pub heads: usize,
    /// Elements of a head, K.
    pub width: usize,
    /// Positions of the cache, T.
    pub keys: usize,
}

/// Keys or values of a cache, (B, G, T, K).
#[derive(Clone, Copy, Debug)]
pub enum Kv<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Brain floating point.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
    /// q · scale.
    I8 {
        /// −127 … 127.
        q: &'a [i8],
        /// (B, G, T, 1).
        scales: &'a [f32],
    },
}

/// The arguments of [`attend`].
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// Queries, (B, S, G, R, K), scaled; rounded to the type of the cache where that is bf16 or f16.
    pub q: &'a [f32],
    /// Keys.
    pub k: Kv<'a>,
    /// Values, of the same type.
    pub v: Kv<'a>,
    /// Where the queries stand, (B, S).
    pub positions: &'a [i32],
    /// Where the keys stand, (B, T), below 0 for places that were never written; key t at position t if `None`.
    pub key_positions: Option<&'a [i32]>,
    /// How many of the last positions a query sees, its own included; all if `None`.
    pub window: Option<usize>,
    /// c, where scores become c·tanh(scores / c).
    pub softcap: Option<f32>,
    /// The lengths of all axes.
    pub sizes: Sizes,
}

/// Rows of queries for one head of keys up to which they are limited by reading those.
const FEW_ROWS: usize = 8;

/// softmax(q·kᵀ)·v into `out` (B, S, G, R, K): query s of slot b sees the keys whose position is at least 0, at most
/// its own, and within its window; zeros where it sees none. Weights are rounded to the type of the cache before the
/// product with v, but not for their sum, which divides last.
///
/// Nothing is read past the last key that a query of the slot sees; what lies before it must be finite.
///
/// # Panics
/// If a slice has not the length that `sizes` asks for, k and v are of different types, or the machine has not got
/// `isa`.
pub fn attend(isa: Isa, pool: &dyn Pool, problem: &Attend, out: &mut [f32]) {
    let call = Call::new(isa, pool, problem, "attend");
    let Sizes { batch, queries, groups, heads, width, .. } = problem.sizes;
    let (all, found) = ([batch, queries, groups, heads, width], out.len());
    assert!(counts(found, &all), "attend: out must be {all:?} elements for {:?}, found {found}", problem.sizes);
    if out.is_empty() {
        return;
    }
    match (problem.k, problem.v) {
        (Kv::F32(k), Kv::F32(v)) => call.run(Array { data: k, scales: None }, Array { data: v, scales: None }, out),
        (Kv::Bf16(k), Kv::Bf16(v)) => call.run(Array { data: k, scales: None }, Array { data: v, scales: None }, out),
        (Kv::F16(k), Kv::F16(v)) => call.run(Array { data: k, scales: None }, Array { data: v, scales: None }, out),
        (Kv::I8 { q: k, scales: k_scales }, Kv::I8 { q: v, scales: v_scales }) => {
            let k = Array { data: k, scales: Some(k_scales) };
            call.run(k, Array { data: v, scales: Some(v_scales) }, out);
        }
        (k, v) => panic!("attend: k and v must be of one type, found {} and {}", k.name(), v.name()),
    }
}

impl Kv<'_> {
    fn name(&self) -> &'static str {
        match self {
            Kv::F32(_) => "f32",
            Kv::Bf16(_) => "bf16",
            Kv::F16(_) => "f16",
            Kv::I8 { .. } => "int8",
        }
    }

    fn check(&self, who: &str, name: &str, sizes: &Sizes) {
        let Sizes { batch, groups, keys, width, .. } = *sizes;
        let found = match self {
            Kv::F32(x) => x.len(),
            Kv::Bf16(x) => x.len(),
            Kv::F16(x) => x.len(),
            Kv::I8 { q, scales } => {
                let rows = [batch, groups, keys];
                let found = scales.len();
                assert!(counts(found, &rows), "{who}: scales of {name} must be {rows:?} elements, found {found}");
                q.len()
            }
        };
        let all = [batch, groups, keys, width];
        assert!(counts(found, &all), "{who}: {name} must be {all:?} elements (B, G, T, K), found {found}");
    }
}

/// One call of [`attend`], its arguments checked.
#[derive(Clone, Copy)]
struct Call<'a> {
    isa: Isa,
    pool: &'a dyn Pool,
    q: &'a [f32],
    visible: Visible<'a>,
    softcap: Option<f32>,
    sizes: Sizes,
}

impl<'a> Call<'a> {
    /// The call of `who`.
    ///
    /// # Panics
    /// If an argument has not the length that `sizes` asks for.
    fn new(isa: Isa, pool: &'a dyn Pool, problem: &Attend<'a>, who: &str) -> Call<'a> {
        let Attend { q, k, v, positions, key_positions, window, softcap, sizes } = *problem;
        let Sizes { batch, queries, groups, heads, width, keys } = sizes;
        let lengths: [(&str, usize, &[usize]); 3] = [
            ("q", q.len(), &[batch, queries, groups, heads, width]),
            ("positions", positions.len(), &[batch, queries]),
            ("key positions", key_positions.map_or(batch.saturating_mul(keys), <[i32]>::len), &[batch, keys]),
        ];
        for (name, found, expected) in lengths {
            assert!(
                counts(found, expected),
                "{who}: {name} must be {expected:?} elements for {sizes:?}, found {found}"
            );
        }
        k.check(who, "k", &sizes);
        v.check(who, "v", &sizes);
        let visible = Visible { positions, key_positions, window, queries, keys };
        Call { isa, pool, q, visible, softcap, sizes }
    }

    fn run<E: Element>(&self, k: Array<'_, E>, v: Array<'_, E>, out: &mut [f32]) {
        let Sizes { queries, heads, .. } = self.sizes;
        if queries == 1 || queries * heads <= FEW_ROWS {
            rows::attend(self, k, v, out);
        } else {
            tiles::attend(self, k, v, out);
        }
    }
}
