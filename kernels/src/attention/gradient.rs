//! The derivative of attention, which never holds the scores (Dao et al. 2022, algorithm 4): with P the softmax of the scores, dO the
//! cotangent of P·V and dP = dO·Vᵀ,
//!
//! dV = Pᵀ·dO, dS = P ∘ (dP − rowsum(P ∘ dP)), dQ = dS·K, dK = dSᵀ·Q.
//!
//! Tiles as those of the forward pass: a first look at all keys finds the highest score of each row, the sum of its weights and
//! rowsum(P ∘ dP), a second one the products, part by part. The row sum is that of the very dP it is subtracted from, and not
//! rowsum(dO ∘ O), its other form: where one key has nearly all the weight, the difference is little beside either.

use std::ops::Range;

use super::element::{Element, widen};
use super::parts::{LINE, Parts, cut};
use super::softmax::weight;
use super::tiles::{PART, ROWS, Terms, Tile};
use super::visible::LOWEST;
use super::{Attend, Call, Kv, Sizes};
use crate::scratch::{Scratch, counts};
use crate::simd::Simd;
use crate::{Isa, Pool};

/// Parts of a head's queries for each thread where there are fewer heads than threads.
const PARTS: usize = 2;

/// The cotangents of the arguments of [`attend`](super::attend), f32.
#[derive(Debug)]
pub struct Gradients<'a> {
    /// Of q, (B, S, G, R, K).
    pub q: &'a mut [f32],
    /// Of k, (B, G, T, K).
    pub k: &'a mut [f32],
    /// Of v, (B, G, T, K).
    pub v: &'a mut [f32],
}

/// What q, k and v of [`attend`](super::attend) change of a function, given what its result changes of it, `cotangent`
/// (B, S, G, R, K). Roundings to the type of the cache count as if there were none.
///
/// # Panics
/// As [`attend`](super::attend), and where the cache is int8, whose values do not change by little.
pub fn attend_gradient(isa: Isa, pool: &dyn Pool, problem: &Attend, cotangent: &[f32], gradients: &mut Gradients) {
    let call = Call::new(isa, pool, problem, "attend_gradient");
    let Sizes { batch, queries, groups, heads, width, keys } = problem.sizes;
    let (rows, of_keys) = ([batch, queries, groups, heads, width], [batch, groups, keys, width]);
    let lengths: [(&str, usize, &[usize]); 4] = [
        ("the cotangent", cotangent.len(), &rows),
        ("the gradient of q", gradients.q.len(), &rows),
        ("the gradient of k", gradients.k.len(), &of_keys),
        ("the gradient of v", gradients.v.len(), &of_keys),
    ];
    for (name, found, expected) in lengths {
        assert!(counts(found, expected), "attend_gradient: {name} must be {expected:?} elements, found {found}");
    }
    match (problem.k, problem.v) {
        (Kv::F32(k), Kv::F32(v)) => Rows(cotangent).run(&call, k, v, gradients),
        (Kv::Bf16(k), Kv::Bf16(v)) => Rows(cotangent).run(&call, k, v, gradients),
        (Kv::F16(k), Kv::F16(v)) => Rows(cotangent).run(&call, k, v, gradients),
        (k, v) => panic!("attend_gradient: k and v must be of one float type, found {} and {}", k.name(), v.name()),
    }
}

/// The cotangents of the rows of queries.
#[derive(Clone, Copy)]
struct Rows<'a>(&'a [f32]);

/// What a tile computes with.
struct Work<'a> {
    /// Queries and cotangents, (K, columns).
    turned: [&'a mut [f32]; 2],
    /// The same, (rows, stride).
    rows: [&'a mut [f32]; 2],
    offsets: &'a mut [f32],
    /// The highest score of each row, and what it was before a part.
    highest: &'a mut [f32],
    before: &'a mut [f32],
    /// The sums of the weights, then 1 / that.
    totals: &'a mut [f32],
    /// rowsum(P ∘ dP).
    deltas: &'a mut [f32],
    /// Scores of a part, then P, (keys, columns).
    weights: &'a mut [f32],
    /// dP of a part, then dS, (keys, columns).
    slopes: &'a mut [f32],
    /// dQ, (rows, stride).
    sums: &'a mut [f32],
    /// Keys or values of a part, (keys, stride).
    wide: &'a mut [f32],
}

impl Rows<'_> {
    fn run<E: Element>(self, call: &Call, k: &[E], v: &[E], gradients: &mut Gradients) {
        let Sizes { batch, queries, groups, heads, width, keys } = call.sizes;
        let all = batch * groups;
        if all * queries * heads * width == 0 {
            gradients.k.fill(0.0);
            gradients.v.fill(0.0);
            return;
        }
        let each = (ROWS / heads).clamp(1, queries);
        let tiles = queries.div_ceil(each);
        let threads = call.pool.threads();
        let parts = if all >= threads { 1 } else { (PARTS * threads).div_ceil(all).min(tiles) };
        let of_head = keys * width;
        let dq = Parts::new(&mut *gradients.q);
        let mut partial = Scratch::new(if parts == 1 { 0 } else { 2 * parts * all * of_head });
        let (dk, dv) = match parts {
            1 => (Parts::new(&mut *gradients.k), Parts::new(&mut *gradients.v)),
            _ => {
                let (dk, dv) = partial.split_at_mut(parts * all * of_head);
                (Parts::new(dk), Parts::new(dv))
            }
        };
        call.pool.share(parts * all, &|chunk| {
            let (head, part) = (chunk / parts, chunk % parts);
            // Every so-many-th tile: the last queries see most keys.
            let tiles = (part..tiles).step_by(parts).map(|tile| tile * each..((tile + 1) * each).min(queries));
            let whole = Tile::new(&call.sizes, head, 0..each);
            let Tile { rows, columns, stride, .. } = whole;
            let rows = rows * stride;
            let column = PART * columns;
            let lengths = [
                width * columns,
                width * columns,
                rows,
                rows,
                columns,
                columns,
                columns,
                columns,
                columns,
                column,
                column,
                rows,
                PART * stride,
                keys * stride,
                keys * stride,
            ];
            let mut scratch = Scratch::new(lengths.iter().map(|len| len.next_multiple_of(LINE)).sum());
            scratch.fill(0.0);
            let mut rest = &mut scratch[..];
            let [a, b, c, d, offsets, highest, before, totals, deltas, weights, slopes, sums, wide, own_k, own_v] =
                lengths.map(|len| cut(&mut rest, len));
            let (turned, rows) = ([a, b], [c, d]);
            let mut work = Work { turned, rows, offsets, highest, before, totals, deltas, weights, slopes, sums, wide };
            let mut add = [own_k, own_v];
            for queries in tiles {
                let tile = Tile::new(&call.sizes, head, queries);
                // SAFETY: no chunk runs twice, and no two tiles have a row in common.
                dispatch_floats!(call.isa, |simd| unsafe {
                    self.tile(simd, &tile, call, [k, v], &mut work, &mut add, &dq)
                });
            }
            for (to, own) in [dk, dv].into_iter().zip(add) {
                // SAFETY: each chunk has its own head of its own part.
                let to = unsafe { to.part((part * all + head) * of_head, of_head) };
                to.chunks_exact_mut(width)
                    .zip(own.chunks_exact(stride))
                    .for_each(|(to, own)| to.copy_from_slice(&own[..width]));
            }
        });
        if parts > 1 {
            let len = all * of_head;
            let (dk, dv) = partial.split_at(parts * len);
            for (to, from) in [(&mut *gradients.k, dk), (&mut *gradients.v, dv)] {
                let to = Parts::new(to);
                call.pool.share(all, &|head| {
                    // SAFETY: each chunk has a head of its own.
                    let to = unsafe { to.part(head * of_head, of_head) };
                    to.copy_from_slice(&from[head * of_head..][..of_head]);
                    for part in 1..parts {
                        let from = &from[part * len + head * of_head..][..of_head];
                        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
                    }
                });
            }
        }
    }

    /// Adds a tile to dK and dV of its head, (T, stride), and writes its rows of dQ.
    ///
    /// # Safety
    /// Nobody else may hold dQ of the tile's rows.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn tile<S: Simd, E: Element>(
        self,
        simd: S,
        tile: &Tile,
        call: &Call,
        [k, v]: [&[E]; 2],
        work: &mut Work<'_>,
        [dk, dv]: &mut [&mut [f32]; 2],
        dq: &Parts<f32>,
    ) {
        let (width, columns, stride) = (call.sizes.width, tile.columns, tile.stride);
        let queries = call.visible.of(tile.slot, tile.queries.clone());
        let keys = call.visible.range(tile.slot, queries);
        let parts = || keys.clone().step_by(PART).map(|at| at..keys.end.min(at + PART));
        let [turned_q, turned_ct] = &mut work.turned;
        tile.turn::<S, E>(simd, call, call.q, turned_q);
        tile.turn::<S, f32>(simd, call, self.0, turned_ct);
        tile.offsets(call, &mut work.offsets[..columns]);
        for row in 0..tile.rows {
            let (at, to) = (tile.row(&call.sizes, row), row * stride..(row + 1) * stride);
            let [q_rows, ct_rows] = &mut work.rows;
            widen(simd, &call.q[at..at + width], width, &mut q_rows[to.clone()], stride);
            widen(simd, &self.0[at..at + width], width, &mut ct_rows[to], stride);
        }

        work.highest[..columns].fill(LOWEST);
        work.totals[..columns].fill(0.0);
        work.deltas[..columns].fill(0.0);
        for part in parts() {
            work.before.copy_from_slice(work.highest);
            products(simd, tile, call, [k, v], part.clone(), work);
            for column in (0..columns).step_by(S::LANES) {
                let most = simd.load(&work.highest[column..]);
                let shrink = weight(simd, simd.sub(simd.load(&work.before[column..]), most));
                let mut total = simd.mul(simd.load(&work.totals[column..]), shrink);
                let mut delta = simd.mul(simd.load(&work.deltas[column..]), shrink);
                for at in (column..).step_by(columns).take(part.len()) {
                    let p = weight(simd, simd.sub(simd.load(&work.weights[at..]), most));
                    total = simd.add(total, p);
                    delta = simd.fma(p, simd.load(&work.slopes[at..]), delta);
                }
                simd.store(&mut work.totals[column..], total);
                simd.store(&mut work.deltas[column..], delta);
            }
        }
        for (total, delta) in work.totals.iter_mut().zip(&mut *work.deltas).take(columns) {
            *total = if *total == 0.0 { 0.0 } else { 1.0 / *total };
            *delta *= *total;
        }

        work.sums.fill(0.0);
        for part in parts() {
            products(simd, tile, call, [k, v], part.clone(), work);
            slopes(simd, call.softcap, part.len(), columns, work);
            let [q_rows, ct_rows] = &work.rows;
            let own = part.start * stride..part.end * stride;
            let of_rows = |weights, rows| Terms { weights, steps: [columns, 1], rows, stride, count: tile.rows };
            of_rows(&*work.weights, &**ct_rows).add(simd, part.len(), width, &mut dv[own.clone()], stride);
            of_rows(&*work.slopes, &**q_rows).add(simd, part.len(), width, &mut dk[own], stride);
            let (rows, from) = rows_of(simd, tile, call, k, part.clone(), true, work.wide);
            let of_keys = Terms { weights: work.slopes, steps: [1, columns], rows, stride: from, count: part.len() };
            of_keys.add(simd, tile.rows, width, work.sums, stride);
        }
        for (row, sums) in work.sums.chunks_exact(stride).enumerate().take(tile.rows) {
            // SAFETY: the tile's own rows.
            unsafe { dq.part(tile.row(&call.sizes, row), width) }.copy_from_slice(&sums[..width]);
        }
    }
}

/// A part of keys or values as f32, and how many elements apart they are; with `whole`, vectors of a row are read to their end.
#[inline(always)]
fn rows_of<'a, S: Simd, E: Element>(
    simd: S,
    tile: &Tile,
    call: &Call,
    all: &'a [E],
    part: Range<usize>,
    whole: bool,
    wide: &'a mut [f32],
) -> (&'a [f32], usize) {
    let width = call.sizes.width;
    let data = &all[tile.first(call, part.start) * width..][..part.len() * width];
    match E::as_f32(data) {
        Some(data) if !whole || width.is_multiple_of(S::LANES) => (data, width),
        _ => {
            widen(simd, data, width, wide, tile.stride);
            (wide, tile.stride)
        }
    }
}

/// The scores of a part in `weights`, as the mask leaves them, with the highest of each row so far, and dP in `slopes`.
#[inline(always)]
fn products<S: Simd, E: Element>(
    simd: S,
    tile: &Tile,
    call: &Call,
    [k, v]: [&[E]; 2],
    part: Range<usize>,
    work: &mut Work<'_>,
) {
    let (count, width) = (part.len(), call.sizes.width);
    let (keys, from) = rows_of(simd, tile, call, k, part.clone(), false, work.wide);
    let scores = &mut work.weights[..count * tile.columns];
    tile.multiply_keys(simd, work.turned[0], keys, from, count, width, scores);
    tile.finish_scores(simd, call, part.clone(), None, work.offsets, scores, &mut work.highest[..tile.columns]);
    let (values, from) = rows_of(simd, tile, call, v, part, false, work.wide);
    tile.multiply_keys(simd, work.turned[1], values, from, count, width, work.slopes);
}

/// P in the place of `count` keys' scores, and dS in that of dP.
#[inline(always)]
fn slopes<S: Simd>(simd: S, softcap: Option<f32>, count: usize, columns: usize, work: &mut Work<'_>) {
    for column in (0..columns).step_by(S::LANES) {
        let most = simd.load(&work.highest[column..]);
        let (inverse, delta) = (simd.load(&work.totals[column..]), simd.load(&work.deltas[column..]));
        for at in (column..).step_by(columns).take(count) {
            let (weights, slopes) = (&mut work.weights[at..], &mut work.slopes[at..]);
            let score = simd.load(weights);
            let p = simd.mul(weight(simd, simd.sub(score, most)), inverse);
            let mut slope = simd.mul(p, simd.sub(simd.load(slopes), delta));
            if let Some(cap) = softcap {
                // d(c·tanh(x / c)) = 1 − tanh²; hidden scores are far outside, and weigh nothing.
                let bent = simd.max(simd.splat(-1.0), simd.min(simd.splat(1.0), simd.div(score, simd.splat(cap))));
                slope = simd.mul(slope, simd.sub(simd.splat(1.0), simd.mul(bent, bent)));
            }
            simd.store(weights, p);
            simd.store(slopes, slope);
        }
    }
}
