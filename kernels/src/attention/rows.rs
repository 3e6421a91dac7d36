//! Attention of few query rows: keys and values are read once for all of them, in blocks that the threads share.
//!
//! First the scores of every block, then, when the highest score of each row is known, weights and values of every
//! block; the sums of the blocks are added last. So weights are rounded as if there were no blocks.

use std::ops::Range;

use super::element::{Array, Element};
use super::parts::{LINE, Parts, cut};
use super::softmax::{softcap, weight};
use super::visible::{HIDDEN, LOWEST};
use super::{Call, Sizes};
use crate::pool::worth;
use crate::scratch::Scratch;
use crate::simd::{Simd, prefetch};

/// Keys of a block are a multiple of this, so that each begins at a cache line of its scores.
const BLOCK_UNIT: usize = 16;
/// Keys of a block, all heads of a slot together, of which a chunk of work should have at least so many, or it costs
/// more to hand over than to compute.
const BLOCK_LEAST: usize = 64;
/// And no more than so many, so that no thread waits long for another.
const BLOCK_MOST: usize = 512;
/// Terms of one accumulator; sums of these are added up.
const TERMS: usize = 128;
/// Elements from which the blocks' sums are worth sharing among threads.
const MERGE_SHARED: usize = worth(1 << 15);
/// Bytes that are asked for ahead of those that are read: what a core reads while a line comes from memory.
const AHEAD: usize = 4096;
/// Keys whose products are summed together.
const KEYS: usize = 4;
/// Vectors of a value that are summed together.
const VECTORS: usize = 4;

/// Of so many rows those that are multiplied at once: [`KEYS`] or [`VECTORS`] sums for each, and what they need.
#[inline(always)]
fn at_once<S: Simd>(rows: usize) -> usize {
    match (S::REGISTERS, rows) {
        (32.., _) => rows.min(4),
        // Rather 2 and 2 than 3 and 1.
        (_, 4) => 2,
        _ => rows.min(3),
    }
}

/// The parts of the call's scratch. Rows are those of one head of keys, row = s·R + r.
#[derive(Clone, Copy)]
struct Plan {
    /// S·R.
    rows: usize,
    /// K up to whole cache lines.
    stride: usize,
    /// Keys of a block.
    block: usize,
    /// Blocks of the slot that has most.
    blocks: usize,
}

impl Plan {
    /// Where the scores of a row begin: (B, G, rows, blocks · block).
    fn scores(&self, head: usize, row: usize, block: usize) -> usize {
        ((head * self.rows + row) * self.blocks + block) * self.block
    }

    /// Where a block's numbers for each row are: (B, G, blocks, rows).
    fn row(&self, head: usize, block: usize) -> usize {
        (head * self.blocks + block) * self.rows
    }
}

/// One chunk of work: a block of the keys of a head of a slot.
#[derive(Clone)]
struct Block {
    slot: usize,
    /// b·G + g.
    head: usize,
    /// Its number.
    index: usize,
    keys: Range<usize>,
}

pub fn attend<E: Element>(call: &Call, k: Array<'_, E>, v: Array<'_, E>, out: &mut [f32]) {
    let Sizes { batch, queries, groups, heads, width, keys: _ } = call.sizes;
    let rows = queries * heads;
    let range = |slot: usize| call.visible.range(slot, call.visible.of(slot, 0..queries));
    let (longest, all) = (0..batch).map(|slot| range(slot).len()).fold((0, 0), |(most, all), n| (most.max(n), all + n));
    let share = (all * groups).div_ceil(4 * call.pool.threads()).clamp(BLOCK_LEAST, BLOCK_MOST);
    let block = if call.pool.threads() == 1 { BLOCK_MOST } else { share }.next_multiple_of(BLOCK_UNIT);
    let blocks = longest.div_ceil(block).max(1);
    let plan = Plan { rows, stride: width.next_multiple_of(LINE), block, blocks };

    let heads_all = batch * groups;
    let lengths = [
        heads_all * rows * plan.stride,
        heads_all * rows * blocks * block,
        heads_all * blocks * rows,
        heads_all * blocks * rows,
        heads_all * blocks * rows * plan.stride,
    ];
    let len = lengths.iter().map(|len| len.next_multiple_of(LINE)).sum();
    let mut scratch = Scratch::new(len);
    let mut rest = &mut scratch[..];
    let [q, scores, highest, totals, sums] = lengths.map(|len| cut(&mut rest, len));
    dispatch_floats!(call.isa, |simd| gather::<_, E>(simd, call, &plan, q));
    let q = &*q;
    let [scores, highest, totals, sums, out] = [scores, highest, totals, sums, out].map(Parts::new);
    let at = |chunk: usize| {
        let (head, index) = (chunk / blocks, chunk % blocks);
        let seen = range(head / groups);
        let start = (seen.start + index * block).min(seen.end);
        Block { slot: head / groups, head, index, keys: start..(start + block).min(seen.end) }
    };
    let score = |chunk: usize| {
        let at = at(chunk);
        // SAFETY: no chunk runs twice, so that nobody else holds this block's scores and highest scores.
        dispatch_floats!(call.isa, |simd| unsafe { block_scores(simd, call, &plan, &at, q, k, &scores, &highest) });
    };
    let sum = |chunk: usize| {
        let at = at(chunk);
        // SAFETY: no chunk runs twice, so that nobody else holds this block's weights, totals and sums; the highest scores
        // that are read, of all blocks of the head, are written.
        dispatch_floats!(call.isa, |simd| unsafe {
            block_sums(simd, call, &plan, &at, v, &scores, &highest, &totals, &sums)
        });
    };
    // SAFETY: no head is merged twice, so that nobody else holds its rows of the output; all sums are written.
    let merge = |head: usize| unsafe { merge(call, &plan, head, &totals, &sums, &out) };

    let chunks = heads_all * blocks;
    if chunks == 1 || all * groups <= BLOCK_LEAST {
        (0..chunks).for_each(score);
        (0..chunks).for_each(sum);
    } else if blocks == 1 {
        call.pool.share(chunks, &|chunk| {
            score(chunk);
            sum(chunk);
        });
    } else {
        call.pool.share(chunks, &score);
        call.pool.share(chunks, &sum);
    }
    if chunks * rows * width >= MERGE_SHARED {
        call.pool.share(heads_all, &merge);
    } else {
        (0..heads_all).for_each(merge);
    }
}

/// The queries rounded, (B, G, rows, stride), with zeros behind the K elements of each.
#[inline(always)]
fn gather<S: Simd, E: Element>(simd: S, call: &Call, plan: &Plan, to: &mut [f32]) {
    let Sizes { queries, groups, heads, width, .. } = call.sizes;
    for (i, to) in to.chunks_exact_mut(plan.stride).enumerate() {
        let (head, row) = (i / plan.rows, i % plan.rows);
        let Some(slot) = (head / groups < call.sizes.batch).then_some(head / groups) else { break };
        let (s, r) = (row / heads, row % heads);
        let from = (((slot * queries + s) * groups + head % groups) * heads + r) * width;
        let mut lanes = to.chunks_exact_mut(S::LANES);
        for from in call.q[from..from + width].chunks(S::LANES) {
            let to = lanes.next().expect("a row has room for all elements of a query");
            simd.store(to, E::round(simd, simd.load_part(from)));
        }
        lanes.for_each(|to| simd.store(to, simd.zero()));
    }
}

/// The scores of a block, hidden ones and those up to a whole cache line as [`HIDDEN`], and the highest of each row.
///
/// # Safety
/// Nobody else may hold the block's scores and highest scores.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn block_scores<S: Simd, E: Element>(
    simd: S,
    call: &Call,
    plan: &Plan,
    at: &Block,
    q: &[f32],
    k: Array<'_, E>,
    scores: &Parts<f32>,
    highest: &Parts<f32>,
) {
    let (count, width, t) = (at.keys.len(), call.sizes.width, call.sizes.keys);
    let first = at.head * t + at.keys.start;
    let keys = &k.data[first * width..][..count * width];
    let q = &q[at.head * plan.rows * plan.stride..][..plan.rows * plan.stride];
    let mut row = 0;
    while row < plan.rows {
        let left = at_once::<S>(plan.rows - row);
        let q = &q[row * plan.stride..];
        let mut to: [&mut [f32]; 4] = Default::default();
        for (r, to) in to.iter_mut().enumerate().take(left) {
            // SAFETY: a block's own scores.
            *to = unsafe { scores.part(plan.scores(at.head, row + r, at.index), plan.block) };
        }
        match (left, to) {
            (1, [a, ..]) => products::<S, E, 1>(simd, q, plan.stride, keys, width, [a]),
            (2, [a, b, ..]) => products::<S, E, 2>(simd, q, plan.stride, keys, width, [a, b]),
            (3, [a, b, c, _]) => products::<S, E, 3>(simd, q, plan.stride, keys, width, [a, b, c]),
            (_, to) => products::<S, E, 4>(simd, q, plan.stride, keys, width, to),
        }
        row += left;
    }

    let (queries, heads) = (call.sizes.queries, call.sizes.heads);
    let positions = call.visible.of(at.slot, 0..queries);
    let scales = k.scales.map(|scales| &scales[first..first + count]);
    let masked = !call.visible.all(at.slot, positions, at.keys.clone());
    let mut offsets = [0.0; BLOCK_MOST];
    if masked {
        call.visible.key_offsets(at.slot, at.keys.clone(), positions[0], &mut offsets[..count]);
    }
    // SAFETY: a block's own highest scores.
    let highest = unsafe { highest.part(plan.row(at.head, at.index), plan.rows) };
    for (row, highest) in highest.iter_mut().enumerate() {
        // SAFETY: a block's own scores, held by nobody any more.
        let scores = unsafe { scores.part(plan.scores(at.head, row, at.index), plan.block) };
        scores[count..count.next_multiple_of(BLOCK_UNIT)].fill(HIDDEN);
        let offset = (i64::from(positions[row / heads]) - i64::from(positions[0])) as f32;
        let mut most = simd.splat(LOWEST);
        for i in (0..count).step_by(S::LANES) {
            let mut x = simd.load(&scores[i..]);
            let n = (count - i).min(S::LANES);
            if let Some(scales) = scales {
                x = simd.mul(x, simd.load_part(&scales[i..i + n]));
            }
            if let Some(cap) = call.softcap {
                x = softcap(simd, x, cap);
            }
            if masked {
                let key = simd.load(&offsets[i..]);
                x = simd.add(x, call.visible.penalty(simd, simd.splat(offset), key));
            }
            match n == S::LANES {
                true => simd.store(&mut scores[i..], x),
                false => {
                    simd.store_part(&mut scores[i..i + n], x);
                    x = simd.load(&scores[i..]);
                }
            }
            most = simd.max(x, most);
        }
        *highest = simd.reduce_max(most);
    }
}

/// q·k of `ROWS` rows, each `stride` after the other, with every key (n, width) to `to`, of which up to three elements
/// more are written.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn products<S: Simd, E: Element, const ROWS: usize>(
    simd: S,
    q: &[f32],
    stride: usize,
    keys: &[E],
    width: usize,
    mut to: [&mut [f32]; ROWS],
) {
    assert!(q.len() >= (ROWS - 1) * stride + width.next_multiple_of(S::LANES));
    let count = keys.len() / width;
    let mut t = 0;
    while t < count {
        // Behind the last key it is multiplied again.
        let mut from = [keys.as_ptr(); KEYS];
        for (i, from) in from.iter_mut().enumerate() {
            *from = keys[(t + i).min(count - 1) * width..].as_ptr();
        }
        let mut sums = [[simd.zero(); KEYS]; ROWS];
        let mut d = 0;
        // SAFETY: the rows of q are `stride` apart, with whole vectors, as asserted above; each of these keys has LANES elements
        // from d on, or as many as are left.
        unsafe {
            while d + S::LANES <= width {
                sums = add_products::<S, E, ROWS, false>(simd, sums, q.as_ptr().add(d), stride, from, d, width);
                d += S::LANES;
            }
            if d < width {
                sums = add_products::<S, E, ROWS, true>(simd, sums, q.as_ptr().add(d), stride, from, d, width);
            }
        }
        for (to, sums) in to.iter_mut().zip(sums) {
            to[t..t + KEYS].copy_from_slice(&simd.reduce_add4(sums));
        }
        t += KEYS;
    }
}

/// `sums` and a vector of each of `ROWS` rows of q, `stride` apart, times that of each key from element `d` on; of its lanes those
/// below `width` where `PART`. By itself, as to read a part is a call, which keeps no sum in a register.
///
/// # Safety
/// `q` must be valid for reads of whole vectors of the rows, each of `from` of the elements from `d` on.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn add_products<S: Simd, E: Element, const ROWS: usize, const PART: bool>(
    simd: S,
    mut sums: [[S::F32; KEYS]; ROWS],
    q: *const f32,
    stride: usize,
    from: [*const E; KEYS],
    d: usize,
    width: usize,
) -> [[S::F32; KEYS]; ROWS] {
    // SAFETY: as the caller vouches.
    unsafe {
        let mut rows = [simd.zero(); ROWS];
        for r in 0..ROWS {
            rows[r] = simd.read(q.add(r * stride));
        }
        // Key after key, so that one is in registers beside all sums.
        for i in 0..KEYS {
            let from = from[i].add(d);
            let k = if PART { E::read_part(simd, from, width - d) } else { E::read(simd, from) };
            prefetch(from.cast::<u8>().wrapping_add(AHEAD));
            for r in 0..ROWS {
                sums[r][i] = simd.fma(rows[r], k, sums[r][i]);
            }
        }
    }
    sums
}

/// The weights of a block, in the place of its scores, their sum for each row, and their product with the values.
///
/// # Safety
/// Nobody else may hold the block's scores, totals and sums, or write highest scores.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn block_sums<S: Simd, E: Element>(
    simd: S,
    call: &Call,
    plan: &Plan,
    at: &Block,
    v: Array<'_, E>,
    scores: &Parts<f32>,
    highest: &Parts<f32>,
    totals: &Parts<f32>,
    sums: &Parts<f32>,
) {
    let (count, width, t) = (at.keys.len(), call.sizes.width, call.sizes.keys);
    let first = at.head * t + at.keys.start;
    let values = &v.data[first * width..][..count * width];
    let scales = v.scales.map(|scales| &scales[first..first + count]);
    // SAFETY: a block's own parts; the highest scores are only read.
    let (totals, sums, highest) = unsafe {
        let (own, head) = (plan.row(at.head, at.index), plan.row(at.head, 0));
        let sums = sums.part(own * plan.stride, plan.rows * plan.stride);
        (totals.part(own, plan.rows), sums, highest.read(head, plan.blocks * plan.rows))
    };
    sums.fill(0.0);
    for (row, total) in totals.iter_mut().enumerate() {
        let most = highest[row..].iter().step_by(plan.rows).copied().fold(LOWEST, f32::max);
        let most = simd.splat(most);
        // SAFETY: a block's own scores.
        let scores = unsafe { scores.part(plan.scores(at.head, row, at.index), plan.block) };
        // A block is no more than `TERMS` vectors.
        let mut sum = simd.zero();
        for i in (0..count).step_by(S::LANES) {
            let mut x = weight(simd, simd.sub(simd.load(&scores[i..]), most));
            sum = simd.add(sum, x);
            if let Some(scales) = scales {
                x = simd.mul(x, simd.load_part(&scales[i..count.min(i + S::LANES)]));
            }
            simd.store(&mut scores[i..], E::round(simd, x));
        }
        *total = simd.reduce_add(sum);
    }
    for start in (0..count).step_by(TERMS) {
        let values = &values[start * width..count.min(start + TERMS) * width];
        let mut row = 0;
        while row < plan.rows {
            let left = at_once::<S>(plan.rows - row);
            let mut weights: [&[f32]; 4] = Default::default();
            for (r, weights) in weights.iter_mut().enumerate().take(left) {
                // SAFETY: a block's own scores, which are its weights now.
                *weights = unsafe { &scores.read(plan.scores(at.head, row + r, at.index), plan.block)[start..] };
            }
            let sums = &mut sums[row * plan.stride..];
            let mut d = 0;
            while d < width {
                let vectors = if width - d >= VECTORS * S::LANES { VECTORS } else { 1 };
                let args = (weights, values, width, d, &mut *sums, plan.stride);
                match (left, vectors) {
                    (1, 4) => add_values::<S, E, 1, 4>(simd, args),
                    (2, 4) => add_values::<S, E, 2, 4>(simd, args),
                    (3, 4) => add_values::<S, E, 3, 4>(simd, args),
                    (_, 4) => add_values::<S, E, 4, 4>(simd, args),
                    (1, _) => add_values::<S, E, 1, 1>(simd, args),
                    (2, _) => add_values::<S, E, 2, 1>(simd, args),
                    (3, _) => add_values::<S, E, 3, 1>(simd, args),
                    _ => add_values::<S, E, 4, 1>(simd, args),
                }
                d += vectors * S::LANES;
            }
            row += left;
        }
    }
}

/// Weights of each row; values (n, width), its elements from `d` on; the sums that the products are added to, `stride`
/// apart.
type Products<'a, E> = ([&'a [f32]; 4], &'a [E], usize, usize, &'a mut [f32], usize);

/// weights·values of `VECTORS` vectors for `ROWS` rows; a single vector may reach past the last element.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn add_values<S: Simd, E: Element, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    (weights, values, width, d, sums, stride): Products<'_, E>,
) {
    let part = (width - d).min(VECTORS * S::LANES);
    let whole = part == VECTORS * S::LANES;
    let count = values.len() / width;
    assert!((whole || VECTORS == 1) && weights[..ROWS].iter().all(|weights| weights.len() >= count));
    let mut acc = [[simd.zero(); VECTORS]; ROWS];
    for t in 0..count {
        let mut factors = [simd.zero(); ROWS];
        for r in 0..ROWS {
            // SAFETY: every row has a weight for each value; asserted above.
            factors[r] = simd.splat(unsafe { *weights[r].get_unchecked(t) });
        }
        for i in 0..VECTORS {
            let from = values.as_ptr().wrapping_add(t * width + d + i * S::LANES);
            // SAFETY: value t has `part` elements from d on.
            let v = unsafe { if whole { E::read(simd, from) } else { E::read_part(simd, from, part) } };
            prefetch(from.cast::<u8>().wrapping_add(AHEAD));
            for r in 0..ROWS {
                acc[r][i] = simd.fma(factors[r], v, acc[r][i]);
            }
        }
    }
    for (row, acc) in acc.into_iter().enumerate() {
        for (i, acc) in acc.into_iter().enumerate() {
            let to = &mut sums[row * stride + d + i * S::LANES..];
            simd.store(to, simd.add(simd.load(to), acc));
        }
    }
}

/// The blocks' sums of a head, divided by their totals, into the output.
///
/// # Safety
/// Nobody else may hold the output of the head's rows, or write totals and sums of the head.
unsafe fn merge(call: &Call, plan: &Plan, head: usize, totals: &Parts<f32>, sums: &Parts<f32>, out: &Parts<f32>) {
    let Sizes { queries, groups, heads, width, .. } = call.sizes;
    let (slot, group) = (head / groups, head % groups);
    for row in 0..plan.rows {
        let (s, r) = (row / heads, row % heads);
        let to = (((slot * queries + s) * groups + group) * heads + r) * width;
        // SAFETY: the head's own rows.
        let out = unsafe { out.part(to, width) };
        out.fill(0.0);
        let mut all = 0.0;
        for block in 0..plan.blocks {
            let own = plan.row(head, block) + row;
            // SAFETY: nobody writes them any more.
            let (total, sum) = unsafe { (totals.read(own, 1)[0], sums.read(own * plan.stride, width)) };
            all += total;
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out += sum);
        }
        let factor = if all == 0.0 { 0.0 } else { 1.0 / all };
        out.iter_mut().for_each(|out| *out *= factor);
    }
}
