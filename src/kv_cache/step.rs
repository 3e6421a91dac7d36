//! One step of a layer's cache in the graph: the new keys and values written, and what attention reads.

use xla::DType;
use xla::graph::Tensor;

use super::{LayerCache, Layout, Pages, SLACK, position_axis};

/// Where the S new tokens of each slot stand, the same for all layers.
#[derive(Clone, Debug)]
pub struct Place {
    /// Position of each new token, (B, S) i32.
    pub positions: Tensor,
    /// Position of each slot's first new token, (B) i32.
    pub first: Tensor,
    /// How many of the S tokens count, (B) i32; all of them if `None`.
    pub valid: Option<Tensor>,
    /// The pages of each slot, (B, N) i32, where the cache is paged.
    pub table: Option<Tensor>,
    /// How many positions are read where all are kept: at least the last new position, plus one. If it is S, every slot
    /// begins at position 0: there is no other way for S tokens to end there.
    pub read_len: usize,
}

/// Keys and values that queries may look at.
#[derive(Clone, Debug)]
pub struct Past {
    /// (B, G, T, K).
    pub k: Tensor,
    /// (B, G, T, K).
    pub v: Tensor,
    /// What elements of k and v are multiplied with, (B, G, T, 1) f32, where they are int8.
    pub scales: Option<[Tensor; 2]>,
    /// Where each key stands, (B, T) i32; below 0 for places that were never written.
    pub positions: Tensor,
    /// What is known about that beforehand.
    pub order: Order,
}

/// How keys stand to the S queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Key t stands at position t.
    Absolute,
    /// The same, and query s at position s.
    Prefix,
    /// The last positions before the queries, then the queries' own, one after another; a query sees W of them.
    Trailing {
        /// W.
        window: usize,
        /// How many stand before the queries.
        before: usize,
    },
    /// The last positions in any order, of which a query sees W.
    Windowed {
        /// W.
        window: usize,
    },
}

impl Order {
    /// W, where a query sees only so many positions.
    pub fn window(self) -> Option<usize> {
        match self {
            Order::Absolute | Order::Prefix => None,
            Order::Trailing { window, .. } | Order::Windowed { window } => Some(window),
        }
    }
}

impl Past {
    /// All positions of arrays of keys and values of slots, position t at t, without scales.
    #[track_caller]
    pub fn of_slots(arrays: [Tensor; 2]) -> Past {
        let g = arrays[0].graph();
        let axis = position_axis(g.platform());
        let positions = g.iota(DType::I32, &[arrays[0].dim(0), arrays[0].dim(axis)], 1);
        let [k, v] = arrays.map(|array| heads_first(&array, axis));
        Past { k, v, scales: None, positions, order: Order::Absolute }
    }
}

impl LayerCache<Tensor> {
    /// Writes new keys and values (B, S, G, K) and returns what attention reads, with the updated cache.
    ///
    /// In static layout a single slot's window must lie inside the cache; with several slots a window that does not is
    /// dropped whole (StableHLO scatter), which is what a slot that has nothing to write relies on. A ring and pages take
    /// only the tokens that count. Without a cache the step's tokens stand at positions 0 to S − 1.
    #[track_caller]
    pub fn step(&self, k: &Tensor, v: &Tensor, place: &Place, layout: Layout) -> (Past, LayerCache<Tensor>) {
        let dtype = match layout {
            Layout::Own { dtype, .. } => dtype,
            _ => self.arrays[0].dtype(),
        };
        let new = match dtype {
            DType::I8 => {
                let ([k, k_scale], [v, v_scale]) = (quantize(k), quantize(v));
                vec![k, v, k_scale, v_scale]
            }
            _ => vec![k.cast(dtype), v.cast(dtype)],
        };
        let (b, s) = (k.dim(0), k.dim(1));
        let g = k.graph();
        let axis = position_axis(g.platform());
        let zip = || self.arrays.iter().zip(&new);
        let from_the_first = || {
            let order = if place.read_len == s { Order::Prefix } else { Order::Absolute };
            (g.iota(DType::I32, &[b, place.read_len], 1), order)
        };
        let (arrays, read, positions, order): (_, Vec<Tensor>, _, _) = match layout {
            Layout::Static => {
                let arrays = barrier(zip().map(|(array, new)| write_at(array, new, &place.first)));
                let read =
                    arrays.iter().map(|array| heads_first(&array.narrow(axis, 0, place.read_len), axis)).collect();
                let (positions, order) = from_the_first();
                (arrays, read, positions, order)
            }
            Layout::Own { window, .. } => {
                let read = new.iter().map(|new| new.transpose(&[0, 2, 1, 3])).collect();
                let order = window.map_or(Order::Prefix, |window| Order::Trailing { window, before: 0 });
                (Vec::new(), read, place.positions.clone(), order)
            }
            Layout::Paged(pages) => {
                let table = place.table.as_ref().expect("a paged cache comes with a table");
                let rows = page_rows(place, table, pages);
                let arrays = barrier(zip().map(|(array, new)| write_pages(array, new, &rows)));
                let read = arrays.iter().map(|array| read_pages(array, table, place.read_len)).collect();
                let (positions, order) = from_the_first();
                (arrays, read, positions, order)
            }
            Layout::Ring { window } if s == 1 => {
                let ring = window + SLACK;
                let slot = &place.first % ring as i64;
                let arrays = barrier(zip().map(|(array, new)| write_at(array, new, &slot)));
                let read = arrays.iter().map(|array| heads_first(array, axis)).collect();
                (arrays, read, held(&place.first, ring), Order::Windowed { window })
            }
            Layout::Ring { window } => {
                // The old positions in order, then the new ones: first − ring … first + S − 1.
                let ring = window + SLACK;
                let iota = |len: usize| g.iota(DType::I32, &[b, len], 1);
                let first = |len: usize| place.first.broadcast(&[b, len], &[0]);
                let oldest_first = (first(ring) + iota(ring)) % ring as i64;
                let joined = |(array, new): (&Tensor, &Tensor)| {
                    g.concatenate(&[&take_positions(array, &oldest_first), &as_kept(new)], axis)
                };
                let all: Vec<Tensor> = zip().map(joined).collect();
                let last = match &place.valid {
                    Some(valid) => &place.first + valid - 1i64,
                    None => &place.first + (s as i64 - 1),
                };
                // Where in `all` the positions stand that the ring holds afterwards.
                let kept = held(&last, ring) - first(ring) + ring as i64;
                let arrays = all.iter().map(|all| take_positions(all, &kept)).collect();
                let read = all.iter().map(|all| heads_first(all, axis)).collect();
                let len = ring + s;
                (arrays, read, first(len) + iota(len) - ring as i64, Order::Trailing { window, before: ring })
            }
        };
        let mut read = read.into_iter();
        let mut next = || read.next().expect("as many as there are arrays");
        let (k, v) = (next(), next());
        let scales = (dtype == DType::I8).then(|| [next(), next()]);
        (Past { k, v, scales, positions, order }, LayerCache { arrays })
    }
}

/// An array whose positions are axis 1 or 2 as (B, G, T, X).
#[track_caller]
fn heads_first(array: &Tensor, axis: isize) -> Tensor {
    if axis == 1 { array.transpose(&[0, 2, 1, 3]) } else { array.clone() }
}

/// New values (B, S, G, X) in the order of the arrays.
#[track_caller]
fn as_kept(new: &Tensor) -> Tensor {
    if position_axis(new.graph().platform()) == 1 { new.clone() } else { new.transpose(&[0, 2, 1, 3]) }
}

/// Without it XLA:CPU fuses the write into its readers, once each, and copies the cache for every one.
#[track_caller]
fn barrier(arrays: impl Iterator<Item = Tensor>) -> Vec<Tensor> {
    let arrays: Vec<Tensor> = arrays.collect();
    arrays[0].graph().optimization_barrier(&arrays.iter().collect::<Vec<_>>())
}

/// x ≈ q · scale with q in −127 … 127 and a scale for each position and head: (B, S, G, K) f32 → int8, and (B, S, G, 1) f32.
#[track_caller]
fn quantize(x: &Tensor) -> [Tensor; 2] {
    let x = x.cast(DType::F32);
    let scale = x.abs().max_keep(&[-1]) / 127.0;
    let divisor = scale.gt(0.0).select(&scale, 1.0).broadcast_to(x.shape());
    [(x / divisor).round().clamp(-127.0, 127.0).cast(DType::I8), scale]
}

/// Writes (B, S, G, X) at positions `first` (B) of an array of slots.
#[track_caller]
fn write_at(array: &Tensor, new: &Tensor, first: &Tensor) -> Tensor {
    let g = array.graph();
    let axis = position_axis(g.platform());
    let (b, s) = (new.dim(0), new.dim(1));
    if b == 1 {
        let zero = g.scalar(0i64, DType::I32);
        let mut at = [&zero; 4];
        let first = first.reshape(&[]);
        at[axis as usize] = &first;
        array.dynamic_update_slice(&as_kept(new), &at)
    } else if axis == 2 {
        // A scatter has one window per row: each head of each slot is a row of its own.
        let [heads, t, x] = [1, 2, 3].map(|axis| array.dim(axis));
        let rows = first.broadcast(&[b, heads], &[0]).reshape(&[b * heads]);
        let new = as_kept(new).reshape(&[b * heads, s, x]);
        array.reshape(&[b * heads, t, x]).update_positions(&new, &rows).reshape(array.shape())
    } else if s == 1 {
        let slots = g.iota(DType::I32, &[b, 1], 0);
        let places = g.concatenate(&[&slots, &first.reshape(&[b, 1])], 1);
        array.scatter(&places, &new.reshape(&[b, new.dim(2), new.dim(3)]), None, true)
    } else {
        array.update_positions(new, first)
    }
}

/// The positions (B, W) that a ring of W holds when `last` (B) is the last position written: at place j the largest one up
/// to it that is j modulo W. Below 0 where nothing was written yet.
#[track_caller]
fn held(last: &Tensor, window: usize) -> Tensor {
    let shape = [last.dim(0), window];
    let place = last.graph().iota(DType::I32, &shape, 1);
    let last = last.broadcast(&shape, &[0]);
    // W is added so that the remainder is not negative.
    let back = (&last - place + window as i64) % window as i64;
    last - back
}

/// Positions `at` (B, N) of an array of slots.
#[track_caller]
fn take_positions(array: &Tensor, at: &Tensor) -> Tensor {
    let axis = position_axis(array.graph().platform());
    let mut shape = array.shape().to_vec();
    shape[axis as usize] = at.dim(1);
    match shape[0] {
        1 => array.take(&at.reshape(&[at.dim(1)]), axis),
        _ => array.take_along(&at.broadcast(&shape, &[0, axis as usize]), axis),
    }
}

/// The row of the pool, seen as (P·page, G, K), for each new token, (B, S, 1). Tokens that do not count, and positions
/// that have no page, get a row past the end, which a scatter leaves away.
#[track_caller]
fn page_rows(place: &Place, table: &Tensor, pages: Pages) -> Tensor {
    let positions = &place.positions;
    let (b, s, size) = (positions.dim(0), positions.dim(1), pages.size as i64);
    let page = positions / size;
    let row = table.take_along(&page, 1) * size + positions % size;
    let mut counts = page.lt(table.dim(1) as i64);
    if let Some(valid) = &place.valid {
        let s = positions.graph().iota(DType::I32, positions.shape(), 1);
        counts = counts & s.lt(&valid.broadcast(positions.shape(), &[0]));
    }
    counts.select(&row, (pages.count * pages.size) as i64).reshape(&[b, s, 1])
}

/// Writes (B, S, G, X) at `rows` (B, S, 1) of a pool (P, page, G, X).
#[track_caller]
fn write_pages(pool: &Tensor, new: &Tensor, rows: &Tensor) -> Tensor {
    let [p, size, g, x] = [0, 1, 2, 3].map(|axis| pool.dim(axis));
    pool.reshape(&[p * size, g, x]).scatter(rows, new, None, false).reshape(&[p, size, g, x])
}

/// The first `len` positions of each slot: (P, page, G, X) → (B, G, len, X).
#[track_caller]
fn read_pages(pool: &Tensor, table: &Tensor, len: usize) -> Tensor {
    let (b, size) = (table.dim(0), pool.dim(1));
    let [g, x] = [pool.dim(2), pool.dim(3)];
    let n = len.div_ceil(size);
    let pages = pool.take(&table.narrow(1, 0, n), 0);
    pages.reshape(&[b, n * size, g, x]).narrow(1, 0, len).transpose(&[0, 2, 1, 3])
}
