//! Attention of many query rows: blocks of queries times blocks of keys, in f32.
//!
//! A tile is some queries with all heads that share a head of keys. Its queries lie transposed, so that a vector is one
//! element of many rows, and so do its scores: (keys, rows). Then neither product needs keys or values turned, and the
//! softmax has no sums across lanes. The scores of a tile are held whole as long as they fit into a processor's own
//! cache, so that weights are rounded against the highest of all; past that they are a running softmax (Milakov and
//! Gimelshein 2018).

use std::ops::Range;

use super::element::{Array, Element, widen};
use super::parts::{LINE, Parts, cut};
use super::softmax::{softcap, weight};
use super::visible::LOWEST;
use super::{Call, Sizes};
use crate::pool::worth;
use crate::scratch::Scratch;
use crate::simd::Simd;

/// Rows of a tile: as many as the accumulators of the widest vectors hold at a time.
pub const ROWS: usize = 48;
/// And at least so many where there are few tiles for the threads.
const FEWEST_ROWS: usize = 16;
/// Tiles for each thread: the last to finish must not be long alone.
const TILES: usize = 4;
/// Keys that are multiplied at a time: they, the queries and the scores fit into the first cache.
pub const PART: usize = 64;
/// Scores that a tile holds.
const SCORES: usize = worth(ROWS << 13);
/// Vectors of rows whose products with keys are summed together.
const VECTORS: usize = 3;
/// Outputs that are summed together.
const SUMMED: usize = 6;
/// Terms of one accumulator; sums of these are added up.
const TERMS: usize = 128;

/// One tile.
pub struct Tile {
    pub slot: usize,
    pub group: usize,
    pub queries: Range<usize>,
    /// Queries times heads.
    pub rows: usize,
    /// The same up to whole cache lines.
    pub columns: usize,
    /// K up to whole cache lines.
    pub stride: usize,
}

/// What a tile computes with.
struct Work<'a> {
    /// Queries, (K, columns).
    q: &'a mut [f32],
    /// Where the rows stand, from the first query on.
    offsets: &'a mut [f32],
    /// (keys, columns).
    scores: &'a mut [f32],
    /// The highest score of each row.
    highest: &'a mut [f32],
    /// The same before the keys that are held now, then the factor between the two.
    before: &'a mut [f32],
    /// The sum of its weights.
    totals: &'a mut [f32],
    /// weights·values, (rows, stride).
    sums: &'a mut [f32],
    /// Keys or values of one part, (keys, stride).
    wide: &'a mut [f32],
}

pub fn attend<E: Element>(call: &Call, k: Array<'_, E>, v: Array<'_, E>, out: &mut [f32]) {
    let Sizes { batch, queries, groups, heads, width, .. } = call.sizes;
    let tiles = |each: usize| batch * groups * queries.div_ceil(each);
    let mut each = (ROWS / heads).clamp(1, queries);
    while each > 1 && tiles(each) < TILES * call.pool.threads() && each.div_ceil(2) * heads >= FEWEST_ROWS {
        each = each.div_ceil(2);
    }
    let out = Parts::new(out);
    call.pool.share(tiles(each), &|chunk| {
        // A head's tiles follow each other, for they read the same keys and values; the last queries see most of them
        // and come first.
        let count = queries.div_ceil(each);
        let (head, tile) = (chunk / count, count - 1 - chunk % count);
        let tile = Tile::new(&call.sizes, head, tile * each..((tile + 1) * each).min(queries));
        let Tile { rows, columns, stride, .. } = tile;
        let held = (SCORES / columns).max(PART) / PART * PART;
        let keys = call.visible.range(tile.slot, call.visible.of(tile.slot, tile.queries.clone()));
        let lengths = [
            width * columns,
            columns,
            keys.len().min(held) * columns,
            columns,
            columns,
            columns,
            rows * stride,
            PART * stride,
        ];
        let len = lengths.iter().map(|len| len.next_multiple_of(LINE)).sum();
        let mut scratch = Scratch::new(len);
        let mut rest = &mut scratch[..];
        let [q, offsets, scores, highest, before, totals, sums, wide] = lengths.map(|len| cut(&mut rest, len));
        let mut work = Work { q, offsets, scores, highest, before, totals, sums, wide };
        // SAFETY: no tile runs twice, and no two tiles have a row of the output in common.
        dispatch_floats!(call.isa, |simd| unsafe { tile.attend(simd, call, k, v, keys, held, &mut work, &out) });
    });
}

impl Tile {
    /// Some queries of the slot and group that are number `head` of all.
    pub fn new(sizes: &Sizes, head: usize, queries: Range<usize>) -> Tile {
        let rows = queries.len() * sizes.heads;
        let (columns, stride) = (rows.next_multiple_of(LINE), sizes.width.next_multiple_of(LINE));
        Tile { slot: head / sizes.groups, group: head % sizes.groups, queries, rows, columns, stride }
    }

    /// # Safety
    /// Nobody else may hold the output of the tile's rows.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn attend<S: Simd, E: Element>(
        &self,
        simd: S,
        call: &Call,
        k: Array<'_, E>,
        v: Array<'_, E>,
        keys: Range<usize>,
        held: usize,
        work: &mut Work<'_>,
        out: &Parts<f32>,
    ) {
        self.turn::<S, E>(simd, call, call.q, work.q);
        self.offsets(call, work.offsets);
        work.highest.fill(LOWEST);
        work.totals.fill(0.0);
        work.sums.fill(0.0);
        for start in keys.clone().step_by(held) {
            let range = start..keys.end.min(start + held);
            let parts = || range.clone().step_by(PART).map(|at| at..range.end.min(at + PART));
            let first = start == keys.start;
            work.before.copy_from_slice(work.highest);
            for part in parts() {
                let scores = &mut work.scores[(part.start - start) * self.columns..][..part.len() * self.columns];
                let at = self.first(call, part.start);
                let data = &k.data[at * call.sizes.width..][..part.len() * call.sizes.width];
                let (data, stride) = match E::as_f32(data) {
                    Some(data) => (data, call.sizes.width),
                    None => {
                        widen(simd, data, call.sizes.width, work.wide, self.stride);
                        (&*work.wide, self.stride)
                    }
                };
                self.multiply_keys(simd, work.q, data, stride, part.len(), call.sizes.width, scores);
                let scales = k.scales.map(|scales| &scales[at..at + part.len()]);
                self.finish_scores(simd, call, part, scales, work.offsets, scores, work.highest);
            }
            if !first {
                self.shrink(simd, work);
            }
            for part in parts() {
                let scores = &mut work.scores[(part.start - start) * self.columns..];
                let at = self.first(call, part.start);
                let data = &v.data[at * call.sizes.width..][..part.len() * call.sizes.width];
                let scales = v.scales.map(|scales| &scales[at..at + part.len()]);
                self.weigh::<S, E>(simd, part.len(), scales, scores, work.highest, work.totals);
                let whole = call.sizes.width.is_multiple_of(S::LANES);
                let (data, stride) = match E::as_f32(data) {
                    Some(data) if whole => (data, call.sizes.width),
                    _ => {
                        widen(simd, data, call.sizes.width, work.wide, self.stride);
                        (&*work.wide, self.stride)
                    }
                };
                let weights = &scores[..part.len() * self.columns];
                let terms = Terms { weights, steps: [1, self.columns], rows: data, stride, count: part.len() };
                terms.add(simd, self.rows, call.sizes.width, work.sums, self.stride);
            }
        }
        let width = call.sizes.width;
        for (row, sums) in work.sums.chunks_exact(self.stride).enumerate().take(self.rows) {
            let total = work.totals[row];
            let factor = if total == 0.0 { 0.0 } else { 1.0 / total };
            // SAFETY: the tile's own rows.
            let out = unsafe { out.part(self.row(&call.sizes, row), width) };
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * factor);
        }
    }

    /// Where a row of the tile begins in (B, S, G, R, K).
    pub fn row(&self, sizes: &Sizes, row: usize) -> usize {
        let Sizes { queries, groups, heads, width, .. } = *sizes;
        let (s, r) = (self.queries.start + row / heads, row % heads);
        (((self.slot * queries + s) * groups + self.group) * heads + r) * width
    }

    /// Where a key of the tile's head is in (B, G, T).
    pub fn first(&self, call: &Call, key: usize) -> usize {
        (self.slot * call.sizes.groups + self.group) * call.sizes.keys + key
    }

    /// Where the rows stand, from the first query on. Columns behind the last row repeat it.
    pub fn offsets(&self, call: &Call, to: &mut [f32]) {
        let positions = call.visible.of(self.slot, self.queries.clone());
        for (column, to) in to.iter_mut().enumerate() {
            let s = column.min(self.rows - 1) / call.sizes.heads;
            *to = (i64::from(positions[s]) - i64::from(positions[0])) as f32;
        }
    }

    /// The tile's rows of `from` (B, S, G, R, K), rounded and transposed to (K, columns). Columns behind the last row repeat it.
    #[inline(always)]
    pub fn turn<S: Simd, E: Element>(&self, simd: S, call: &Call, from: &[f32], to: &mut [f32]) {
        for column in 0..self.columns {
            let at = self.row(&call.sizes, column.min(self.rows - 1));
            let mut lanes = [0.0; LINE];
            for (i, from) in from[at..at + call.sizes.width].chunks(S::LANES).enumerate() {
                simd.store(&mut lanes, E::round(simd, simd.load_part(from)));
                for (j, &x) in lanes[..from.len()].iter().enumerate() {
                    to[(i * S::LANES + j) * self.columns + column] = x;
                }
            }
        }
    }

    /// Scores (keys, columns) of `count` keys, `stride` elements apart.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub fn multiply_keys<S: Simd>(
        &self,
        simd: S,
        q: &[f32],
        keys: &[f32],
        stride: usize,
        count: usize,
        width: usize,
        scores: &mut [f32],
    ) {
        assert!(q.len() >= width * self.columns && keys.len() >= (count - 1) * stride + width);
        let mut column = 0;
        while column < self.columns {
            let vectors = ((self.columns - column) / S::LANES).min(VECTORS);
            let args = (&q[column..], keys, stride, count, width, &mut scores[column..], self.columns);
            match (S::REGISTERS >= 32, vectors) {
                (true, 1) => key_products::<S, 1, 8>(simd, args),
                (true, 2) => key_products::<S, 2, 8>(simd, args),
                (true, _) => key_products::<S, 3, 8>(simd, args),
                (false, 1) => key_products::<S, 1, 4>(simd, args),
                (false, 2) => key_products::<S, 2, 4>(simd, args),
                (false, _) => key_products::<S, 3, 4>(simd, args),
            }
            column += vectors * S::LANES;
        }
    }

    /// Scales, softcap and mask, and the highest score of each row so far.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    pub fn finish_scores<S: Simd>(
        &self,
        simd: S,
        call: &Call,
        keys: Range<usize>,
        scales: Option<&[f32]>,
        offsets: &[f32],
        scores: &mut [f32],
        highest: &mut [f32],
    ) {
        let positions = call.visible.of(self.slot, self.queries.clone());
        let masked = !call.visible.all(self.slot, positions, keys.clone());
        let mut key_offsets = [0.0; PART];
        if masked {
            call.visible.key_offsets(self.slot, keys, positions[0], &mut key_offsets);
        }
        let as_they_are = scales.is_none() && call.softcap.is_none() && !masked;
        for column in (0..self.columns).step_by(S::LANES) {
            let mut most = simd.load(&highest[column..]);
            let offset = simd.load(&offsets[column..]);
            for (t, scores) in scores.chunks_exact_mut(self.columns).enumerate() {
                let scores = &mut scores[column..];
                let mut x = simd.load(scores);
                if !as_they_are {
                    if let Some(scales) = scales {
                        x = simd.mul(x, simd.splat(scales[t]));
                    }
                    if let Some(cap) = call.softcap {
                        x = softcap(simd, x, cap);
                    }
                    if masked {
                        x = simd.add(x, call.visible.penalty(simd, offset, simd.splat(key_offsets[t])));
                    }
                    simd.store(scores, x);
                }
                most = simd.max(x, most);
            }
            simd.store(&mut highest[column..], most);
        }
    }

    /// What is summed up so far, against the highest scores as they are now.
    #[inline(always)]
    fn shrink<S: Simd>(&self, simd: S, work: &mut Work<'_>) {
        for column in (0..self.columns).step_by(S::LANES) {
            let lower = simd.sub(simd.load(&work.before[column..]), simd.load(&work.highest[column..]));
            let factor = weight(simd, lower);
            simd.store(&mut work.before[column..], factor);
            let totals = &mut work.totals[column..];
            simd.store(totals, simd.mul(simd.load(totals), factor));
        }
        for (sums, factor) in work.sums.chunks_exact_mut(self.stride).zip(&*work.before) {
            sums.iter_mut().for_each(|sum| *sum *= *factor);
        }
    }

    /// Weights in the place of the scores of `count` keys, and their sums added to `totals`.
    #[inline(always)]
    fn weigh<S: Simd, E: Element>(
        &self,
        simd: S,
        count: usize,
        scales: Option<&[f32]>,
        scores: &mut [f32],
        highest: &[f32],
        totals: &mut [f32],
    ) {
        for column in (0..self.columns).step_by(S::LANES) {
            let most = simd.load(&highest[column..]);
            let mut sum = simd.zero();
            for (t, scores) in scores.chunks_exact_mut(self.columns).enumerate().take(count) {
                let scores = &mut scores[column..];
                let mut x = weight(simd, simd.sub(simd.load(scores), most));
                sum = simd.add(sum, x);
                if let Some(scales) = scales {
                    x = simd.mul(x, simd.splat(scales[t]));
                }
                simd.store(scores, E::round(simd, x));
            }
            let total = &mut totals[column..];
            simd.store(total, simd.add(simd.load(total), sum));
        }
    }
}

/// Queries (K, columns); keys, their stride, count and K; scores (keys, columns); columns.
type KeyProducts<'a> = (&'a [f32], &'a [f32], usize, usize, usize, &'a mut [f32], usize);

/// Scores of `N` vectors of rows with all keys, `KEYS` at a time.
#[inline(always)]
fn key_products<S: Simd, const N: usize, const KEYS: usize>(
    simd: S,
    (q, keys, stride, count, width, scores, columns): KeyProducts<'_>,
) {
    assert!(q.len() >= (width - 1) * columns + N * S::LANES && keys.len() >= (count - 1) * stride + width);
    for t in (0..count).step_by(KEYS) {
        // Behind the last key it is multiplied again.
        let mut from = [keys.as_ptr(); KEYS];
        for (i, from) in from.iter_mut().enumerate() {
            *from = keys[(t + i).min(count - 1) * stride..].as_ptr();
        }
        for start in (0..width).step_by(TERMS) {
            let mut acc = [[simd.zero(); N]; KEYS];
            for d in start..width.min(start + TERMS) {
                let mut own = [simd.zero(); N];
                for (i, own) in own.iter_mut().enumerate() {
                    // SAFETY: (K, columns) elements are there, of which N vectors are left from here on; asserted
                    // above.
                    *own = unsafe { simd.read(q.as_ptr().add(d * columns + i * S::LANES)) };
                }
                for (acc, from) in acc.iter_mut().zip(from) {
                    // SAFETY: every key has K elements; asserted above.
                    let k = simd.splat(unsafe { *from.add(d) });
                    for (acc, q) in acc.iter_mut().zip(own) {
                        *acc = simd.fma(q, k, *acc);
                    }
                }
            }
            for (i, acc) in acc.into_iter().enumerate().take(count - t) {
                for (j, acc) in acc.into_iter().enumerate() {
                    let to = &mut scores[(t + i) * columns + j * S::LANES..];
                    simd.store(to, if start == 0 { acc } else { simd.add(simd.load(to), acc) });
                }
            }
        }
    }
}

/// Rows that are summed with weights.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// A weight for each output and term.
    pub weights: &'a [f32],
    /// Weights from output to output, and from term to term.
    pub steps: [usize; 2],
    /// The terms, whole vectors of LANES.
    pub rows: &'a [f32],
    /// Elements from term to term.
    pub stride: usize,
    /// How many there are.
    pub count: usize,
}

impl Terms<'_> {
    /// Adds Σ weight · term to each of `outputs` rows of `width` elements of `sums`, `stride` elements apart.
    #[inline(always)]
    pub fn add<S: Simd>(self, simd: S, outputs: usize, width: usize, sums: &mut [f32], stride: usize) {
        let vectors = width.div_ceil(S::LANES);
        // The accumulators of a block: as even as can be, at most as many vectors as there are registers for.
        let blocks = vectors.div_ceil(if S::REGISTERS >= 32 { 4 } else { 2 });
        let mut at = 0;
        for block in 0..blocks {
            let n = (vectors - at).div_ceil(blocks - block);
            let d = at * S::LANES;
            let (terms, sums) = (Terms { rows: &self.rows[d..], ..self }, &mut sums[d..]);
            match n {
                1 => terms.add_block::<S, 1>(simd, outputs, sums, stride),
                2 => terms.add_block::<S, 2>(simd, outputs, sums, stride),
                3 => terms.add_block::<S, 3>(simd, outputs, sums, stride),
                _ => terms.add_block::<S, 4>(simd, outputs, sums, stride),
            }
            at += n;
        }
    }

    /// [`Terms::add`] of `N` vectors.
    #[inline(always)]
    fn add_block<S: Simd, const N: usize>(self, simd: S, outputs: usize, sums: &mut [f32], sums_stride: usize) {
        let Terms { weights, steps: [to_output, to_term], rows, stride, count } = self;
        let last = |n: usize, step: usize| (n - 1) * step;
        assert!(weights.len() > last(outputs, to_output) + last(count, to_term));
        assert!(rows.len() >= last(count, stride) + N * S::LANES);
        for first in (0..outputs).step_by(SUMMED) {
            // Behind the last output it is summed again.
            let mut from = [weights.as_ptr(); SUMMED];
            for (i, from) in from.iter_mut().enumerate() {
                *from = weights[(first + i).min(outputs - 1) * to_output..].as_ptr();
            }
            let mut acc = [[simd.zero(); N]; SUMMED];
            for t in 0..count {
                let mut own = [simd.zero(); N];
                for (i, own) in own.iter_mut().enumerate() {
                    // SAFETY: term t has N vectors from here on; asserted above.
                    *own = unsafe { simd.read(rows.as_ptr().add(t * stride + i * S::LANES)) };
                }
                for (acc, from) in acc.iter_mut().zip(from) {
                    // SAFETY: there is a weight for each output and term; asserted above.
                    let weight = simd.splat(unsafe { *from.add(t * to_term) });
                    for (acc, own) in acc.iter_mut().zip(own) {
                        *acc = simd.fma(weight, own, *acc);
                    }
                }
            }
            for (i, acc) in acc.into_iter().enumerate().take(outputs - first) {
                for (j, acc) in acc.into_iter().enumerate() {
                    let to = &mut sums[(first + i) * sums_stride + j * S::LANES..];
                    simd.store(to, simd.add(simd.load(to), acc));
                }
            }
        }
    }
}
