//! One new token of each slot over a cache that does not fit into the fast memory of a TPU, some slots at a time.
//!
//! libtpu copies pieces of an argument ahead, but not of the result of a scatter, so attention reads the cache as it was before the
//! step, and the new keys and values beside it; they are written afterwards, in place. Decode of an 8B model on eight v6e, 64 slots of
//! 8192: from 14.1 to 9.1 million cycles, where its memory alone takes 11.3.

use xla::graph::{Platform, Tensor};

use super::pieces::{WHOLE, piece};
use super::scores::Queries;
use crate::kv_cache::{LayerCache, Layout, Past, Place};

/// How many slots at a time, for `tokens` new ones of each; `None` where the cache is taken whole.
pub(super) fn slots(cache: &LayerCache<Tensor>, tokens: usize, place: &Place, layout: Layout) -> Option<usize> {
    let [array, _] = cache.arrays.as_slice() else { return None };
    if array.graph().platform() != Platform::Tpu || tokens > 1 || layout != Layout::Static {
        return None;
    }
    let [b, t] = [0, 1].map(|axis| array.dim(axis));
    let all = array.shape().iter().product::<usize>() * array.dtype().size() / t * place.read_len;
    let slots = WHOLE / (all / b);
    (all > WHOLE && slots > 0).then_some(slots)
}

/// [`Queries::attend`] over a cache without the token that `own`, its key and value (B, 1, G, K), are of; and the cache as it may be
/// written to afterwards.
#[track_caller]
pub(super) fn by_slots(
    queries: &Queries<'_>,
    [k, v]: [&Tensor; 2],
    cache: &LayerCache<Tensor>,
    read_len: usize,
    slots: usize,
) -> (Tensor, LayerCache<Tensor>) {
    let g = queries.q.graph();
    let b = queries.q.dim(0);
    let before = queries.positions - 1i64;
    let mut last: Option<Tensor> = None;
    let attend = |start: usize| {
        let n = slots.min(b - start);
        let [q, k, v, before] = [&queries.q, k, v, &before].map(|x| x.narrow(0, start, n));
        let mut copied = |array: &Tensor| {
            let piece = piece(array, last.as_ref(), |array| array.narrow(0, start, n).narrow(1, 0, read_len));
            last = Some(piece.clone());
            piece
        };
        let past = Past::of_slots([copied(&cache.arrays[0]), copied(&cache.arrays[1])]);
        Queries { q, positions: &before, ..queries.clone() }.attend_beside(&past, [&k, &v])
    };
    let outputs: Vec<Tensor> = (0..b).step_by(slots).map(attend).collect();
    let out = g.concatenate(&outputs.iter().collect::<Vec<_>>(), 0);
    // The cache is written in place only if nothing reads what was there any more.
    let mut arrays = g.optimization_barrier(&[&cache.arrays[0], &cache.arrays[1], &out]);
    (arrays.remove(2), LayerCache { arrays })
}
