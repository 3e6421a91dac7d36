//! One step of a cache: new keys and values rotated and written where they stand, then attention over all of them.

use half::{bf16, f16};

use super::element::Element;
use super::parts::Parts;
use super::{Attend, Kv, Sizes, attend};
use crate::pool::worth;
use crate::rope::{Angles, rotate};
use crate::scratch::{Scratch, counts};
use crate::simd::Simd;
use crate::{Isa, Pool};

/// Elements of a chunk of work: fewer are not worth another thread.
const CHUNK: usize = worth(1 << 13);

/// Keys or values of a cache, (B, G, T, K), to write.
#[derive(Debug)]
pub enum KvMut<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Brain floating point.
    Bf16(&'a mut [bf16]),
    /// Half precision.
    F16(&'a mut [f16]),
    /// q · scale.
    I8 {
        /// −127 … 127.
        q: &'a mut [i8],
        /// (B, G, T, 1).
        scales: &'a mut [f32],
    },
}

impl KvMut<'_> {
    /// The same to read.
    pub fn view(&self) -> Kv<'_> {
        match self {
            KvMut::F32(x) => Kv::F32(x),
            KvMut::Bf16(x) => Kv::Bf16(x),
            KvMut::F16(x) => Kv::F16(x),
            KvMut::I8 { q, scales } => Kv::I8 { q, scales },
        }
    }
}

/// Where new tokens go.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Position of each slot's first new token, (B).
    pub first: &'a [i32],
    /// How many of a slot's new tokens are written, (B); all if `None`.
    pub valid: Option<&'a [i32]>,
    /// Whether position p is kept at p modulo T; else it is kept at p, and not at all from T on.
    pub ring: bool,
}

impl Place<'_> {
    /// How many of S new tokens of a slot count.
    fn count(&self, slot: usize, queries: usize) -> usize {
        self.valid.map_or(queries, |valid| usize::try_from(valid[slot]).map_or(0, |valid| valid.min(queries)))
    }

    /// Where new token s of a slot is kept among T positions, if it is.
    fn at(&self, slot: usize, s: usize, count: usize, keys: usize) -> Option<usize> {
        let position = usize::try_from(i64::from(self.first[slot]) + s as i64).ok()?;
        match self.ring {
            // Of two tokens with one place the later one stays.
            true => (s < count && s + keys >= count).then(|| position % keys),
            false => (s < count && position < keys).then_some(position),
        }
    }
}

/// The positions (B, T) that rings of T hold when `last` (B) is the last position written: at place t the largest one
/// up to it that is t modulo T. Below 0 where nothing was written yet.
pub fn held(last: impl ExactSizeIterator<Item = i32>, keys: usize, out: &mut [i32]) {
    let all = [last.len(), keys];
    assert!(counts(out.len(), &all), "held: {all:?} positions (B, T) required, found {}", out.len());
    for (last, out) in last.zip(out.chunks_exact_mut(keys.max(1))) {
        let newest = i64::from(last).rem_euclid(keys as i64) as usize;
        for (t, out) in out.iter_mut().enumerate() {
            let age = if t <= newest { newest - t } else { newest + keys - t };
            *out = last.saturating_sub(age as i32);
        }
    }
}

/// Writes keys or values `new` (B, S, G, K) of the step's tokens into their places; int8 with a scale for each position
/// and head. Negative positions are not written.
///
/// # Panics
/// If a slice has not the length that `sizes` asks for, or the machine has not got `isa`.
pub fn store(isa: Isa, pool: &dyn Pool, new: &[f32], place: &Place, sizes: Sizes, cache: &mut KvMut) {
    let Sizes { batch, queries, groups, width, .. } = sizes;
    let found = new.len();
    let all = [batch, queries, groups, width];
    assert!(counts(found, &all), "store: {all:?} (B, S, G, K) new elements required, found {found}");
    assert_eq!(place.first.len(), batch, "store: a first position for each of {batch} slots required");
    assert!(place.valid.is_none_or(|valid| valid.len() == batch), "store: counts for each of {batch} slots required");
    cache.view().check("store", "the cache", &sizes);
    match cache {
        KvMut::F32(x) => store_as(isa, pool, new, place, sizes, x, &mut []),
        KvMut::Bf16(x) => store_as(isa, pool, new, place, sizes, x, &mut []),
        KvMut::F16(x) => store_as(isa, pool, new, place, sizes, x, &mut []),
        KvMut::I8 { q, scales } => store_as(isa, pool, new, place, sizes, q, scales),
    }
}

fn store_as<E: Element>(
    isa: Isa,
    pool: &dyn Pool,
    new: &[f32],
    place: &Place,
    sizes: Sizes,
    cache: &mut [E],
    scales: &mut [f32],
) {
    let Sizes { batch, queries, groups, width, keys, .. } = sizes;
    if new.is_empty() || cache.is_empty() {
        return;
    }
    let has_scales = !scales.is_empty();
    let (cache, scales) = (Parts::new(cache), Parts::new(scales));
    let each = CHUNK.div_ceil(groups * width);
    let tokens = |chunk: usize| {
        for token in chunk * each..(batch * queries).min((chunk + 1) * each) {
            let (slot, s) = (token / queries, token % queries);
            let Some(t) = place.at(slot, s, place.count(slot, queries), keys) else { continue };
            for g in 0..groups {
                let row = (slot * groups + g) * keys + t;
                let new = &new[(token * groups + g) * width..][..width];
                // SAFETY: no token runs twice, and no two have one place: of a slot's positions they are neighbours, in
                // a ring at most T of them.
                let (to, scale) = unsafe {
                    (
                        cache.part(row * width, width),
                        scales.part(if has_scales { row } else { 0 }, usize::from(has_scales)),
                    )
                };
                dispatch_floats!(isa, |simd| E::store(simd, new, to, scale));
            }
        }
    };
    match (batch * queries).div_ceil(each) {
        1 => tokens(0),
        chunks => pool.share(chunks, &tokens),
    }
}

/// x ≈ q · scale with q in −127 … 127, the scale the largest magnitude by 127.
#[inline(always)]
pub fn quantize<S: Simd>(simd: S, x: &[f32], q: &mut [i8], scale: &mut f32) {
    let mut most = simd.zero();
    for x in x.chunks(S::LANES) {
        let x = simd.load_part(x);
        most = simd.max(simd.max(x, simd.sub(simd.zero(), x)), most);
    }
    *scale = simd.reduce_max(most) / 127.0;
    let divisor = simd.splat(if *scale > 0.0 { *scale } else { 1.0 });
    let (low, high) = (simd.splat(-127.0), simd.splat(127.0));
    let mut lanes = [0.0; 16];
    for (x, q) in x.chunks(S::LANES).zip(q.chunks_mut(S::LANES)) {
        let whole = simd.round(simd.div(simd.load_part(x), divisor));
        simd.store(&mut lanes, simd.min(high, simd.max(low, whole)));
        q.iter_mut().zip(lanes).for_each(|(q, x)| *q = x as i8);
    }
}

/// The arguments of [`step`].
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Queries, (B, S, G, R, K), neither rotated nor scaled.
    pub q: &'a [f32],
    /// New keys, (B, S, G, K), not rotated.
    pub k: &'a [f32],
    /// New values, (B, S, G, K).
    pub v: &'a [f32],
    /// The angles of the new tokens; `None` where positions do not rotate.
    pub angles: Option<Angles<'a>>,
    /// What queries are multiplied with.
    pub scale: f32,
    /// Where the new tokens stand, (B, S).
    pub positions: &'a [i32],
    /// Where they go.
    pub place: Place<'a>,
    /// How many of the last positions a query sees, its own included; all if `None`.
    pub window: Option<usize>,
    /// c, where scores become c·tanh(scores / c).
    pub softcap: Option<f32>,
    /// The lengths of all axes.
    pub sizes: Sizes,
}

/// Rotation of queries and keys, the keys and values into the cache, and attention over it into `out` (B, S, G, R, K).
///
/// In a ring the new tokens are written before the first of them looks back: its T must be at least the window and S −
/// 1 more.
///
/// # Panics
/// As [`rotate`], [`store`] and [`attend`] do.
pub fn step(isa: Isa, pool: &dyn Pool, step: &Step, k: &mut KvMut, v: &mut KvMut, out: &mut [f32]) {
    let Step { angles, positions, place, window, softcap, sizes, .. } = *step;
    let Sizes { batch, queries, groups, heads, width, keys } = sizes;
    let [mut q, mut new] = [step.q.len(), step.k.len()].map(Scratch::new);
    rotate(isa, pool, step.q, angles, [groups * heads, width], step.scale, &mut q);
    let rotated = match angles {
        Some(_) => {
            rotate(isa, pool, step.k, angles, [groups, width], 1.0, &mut new);
            &*new
        }
        None => step.k,
    };
    store(isa, pool, rotated, &place, sizes, k);
    store(isa, pool, step.v, &place, sizes, v);
    let mut all = Scratch::new(if place.ring { batch * keys } else { 0 });
    if place.ring {
        let last = |slot: usize| place.first[slot].saturating_add(place.count(slot, queries) as i32 - 1);
        held((0..batch).map(last), keys, &mut all);
    }
    let key_positions = place.ring.then_some(&*all);
    let problem = Attend { q: &q, k: k.view(), v: v.view(), positions, key_positions, window, softcap, sizes };
    attend(isa, pool, &problem, out);
}
