//! The k best of a row, the same ones as PyTorch's where scores are equal.
//!
//! `torch.topk` on a CPU keeps what libstdc++'s selection leaves in front: `std::partial_sort` where 64·k ≤ E, else
//! `std::nth_element`, both with "greater" for an order. Neither prefers a position, so among equal scores the choice
//! follows from the algorithm's every move. Here those moves are made in all rows at once, one move of each row per
//! turn of a loop, on ids (N, E) that begin as 0 … E − 1; and only when some row needs them. A turn is a few small
//! kernels, which keeps what every layer adds to the compilation small.

use xla::DType::I32;
use xla::graph::{Platform, Tensor};

/// The ids (N, k), i32, of the k largest scores of each row of (N, E), 1 ≤ k ≤ E: from the largest down, but where
/// the k-th is equal to the next in the order in which PyTorch's selection leaves them. On a TPU the first of equal scores is
/// taken: a loop in every layer would keep the weights of the next from being fetched beside it.
#[track_caller]
pub(in crate::model) fn top_k(scores: &Tensor, k: usize) -> Tensor {
    if k >= scores.dim(1) || scores.graph().platform() == Platform::Tpu {
        return scores.largest(k).1;
    }
    // For the few that a token takes, that is half the work of XLA:CPU's sort of the row.
    let (values, ids) = scores.largest(k + 1);
    let tied = values.narrow(1, k - 1, 1).eq(&values.narrow(1, k, 1));
    let ids = ids.narrow(1, 0, k);
    let chosen = scores.graph().cond(
        &tied.any(&[0, 1]),
        &[scores, &tied, &ids],
        |v| vec![v[1].broadcast_to(v[2].shape()).select(&selected(&v[0], &v[1], k), &v[2])],
        |v| vec![v[2].clone()],
    );
    chosen.into_iter().next().unwrap_or(ids)
}

/// The ids (N, k) that the selection leaves in the first k places of the rows that are `tied` (N, 1).
fn selected(scores: &Tensor, tied: &Tensor, k: usize) -> Tensor {
    let (rows, n) = (scores.dim(0), scores.dim(1));
    let g = scores.graph();
    let ids = g.iota(I32, &[rows, n], 1);
    let end = tied.cast(I32) * n as i64;
    let ids = match k * 64 <= n {
        true => heap_select(scores, &ids, &g.full(0, I32, &[rows, 1]), k, &end),
        false => nth_element(scores, &ids, k - 1, &end),
    };
    ids.narrow(1, 0, k)
}

/// Loop variables of the rows, each (N, 1), as one tensor, so that a turn renews them in one kernel.
fn pack(variables: &[&Tensor]) -> Tensor {
    variables[0].graph().concatenate(variables, 1)
}

/// The columns of [`pack`].
fn unpack<const R: usize>(packed: &Tensor) -> [Tensor; R] {
    std::array::from_fn(|i| packed.narrow(1, i, 1))
}

/// `ids` with each value (N, 1) at its place (N, 1); a place of −1 is none.
fn set<const W: usize>(ids: &Tensor, writes: [(&Tensor, &Tensor); W]) -> Tensor {
    let place = ids.graph().iota(I32, ids.shape(), 1);
    writes.into_iter().fold(ids.clone(), |ids, (at, value)| {
        place.eq(&at.broadcast_to(ids.shape())).select(&value.broadcast_to(ids.shape()), &ids)
    })
}

/// The first `end` (N, 1) ids of each row partitioned around medians of three until three or fewer are left around
/// place `nth`, which are sorted by insertion. A row that takes more than 2·⌊log₂ E⌋ partitions is finished with a heap.
fn nth_element(scores: &Tensor, ids: &Tensor, nth: usize, end: &Tensor) -> Tensor {
    let (g, n) = (scores.graph(), scores.dim(1));
    let limit = 2 * n.ilog2() as usize;
    let none = g.full(0, I32, end.shape());
    // The range; two places that come closer, the first of them 0 before a partition; partitions; steps of the insertion.
    let state = pack(&[&none, end, &none, &none, &none, &none]);
    let done = g.while_loop(
        &[&state, ids, scores],
        |v| {
            let [first, last, i, _, partitions, steps] = unpack(&v[0]);
            let wide = (last - first).gt(3);
            let narrows = i.gt(0) | partitions.lt(limit as i64);
            ((&wide & narrows) | (!wide & steps.lt(3))).any(&[0, 1])
        },
        |v| {
            let [first, last, i, j, partitions, steps] = unpack(&v[0]);
            let (ids, scores) = (&v[1], &v[2]);
            let wide = (&last - &first).gt(3);
            let starts = &wide & i.eq(0) & partitions.lt(limit as i64);
            let inserts = !&wide;
            // Where this turn looks: the second, middle and last element; or the two places; or two neighbours.
            let second = &first + 1;
            let neighbour = &first + steps.eq(1).cast(I32);
            let x = starts.select(&second, &inserts.select(&neighbour, &i));
            let middle = &first + (&last - &first) / 2;
            let y = starts.select(&middle, &inserts.select(&(&neighbour + 1), &j));
            let z = &last - 1;
            let found = ids.take_along(&pack(&[&first, &x, &y, &z]), 1);
            let [front_id, x_id, y_id, z_id] = unpack(&found);
            let [pivot, a, b, c] = unpack(&scores.take_along(&found, 1));

            // The median of the three goes to the front.
            let (ab, ac, bc) = (a.gt(&b), a.gt(&c), b.gt(&c));
            let pick = |a: &Tensor, b: &Tensor, c: &Tensor| {
                ab.select(&bc.select(b, &ac.select(c, a)), &ac.select(a, &bc.select(c, b)))
            };
            let (median, median_id) = (pick(&x, &y, &z), pick(&x_id, &y_id, &z_id));

            // Each place moves on until it stands on an element of the other side; then the two are exchanged.
            let scans = &wide & i.gt(0);
            let (left, right) = (!a.gt(&pivot), !pivot.gt(&b));
            let both = &scans & &left & &right;
            let (swaps, meets) = (&both & i.lt(&j), &both & i.ge(&j));

            let exchanges = swaps | (&inserts & y.lt(&last) & b.gt(&a));
            let from = starts.select(&first, &exchanges.select(&x, -1));
            let to = starts.select(&median, &exchanges.select(&y, -1));
            let to_id = starts.select(&front_id, &x_id);
            let from_id = starts.select(&median_id, &y_id);
            let ids = set(ids, [(&from, &from_id), (&to, &to_id)]);

            let keeps_right = i.le(nth as i64);
            let next_first = (&meets & &keeps_right).select(&i, &first);
            let next_last = (&meets & !keeps_right).select(&i, &last);
            let step = |stops: Tensor| (&scans & (!stops | &both)).cast(I32);
            let next_i = starts.select(&second, &meets.select(0, &(&i + step(left))));
            let next_j = starts.select(&z, &(&j - step(right)));
            let state = [
                &next_first,
                &next_last,
                &next_i,
                &next_j,
                &(partitions + starts.cast(I32)),
                &(steps + inserts.cast(I32)),
            ];
            vec![pack(&state), ids, scores.clone()]
        },
    );
    let [state, ids, _] = &done[..] else { return ids.clone() };
    // Each partition takes one element or more from the range.
    if n <= limit + 3 {
        return ids.clone();
    }
    let [first, last] = unpack(state);
    let wide = (&last - &first).gt(3);
    heap_select(scores, ids, &first, nth + 1, &wide.select(&last, &first))
}

/// The best of places `first` to `last` (N, 1) into those before `middle`, as a heap with the least of them at its root.
fn heap_select(scores: &Tensor, ids: &Tensor, first: &Tensor, middle: usize, last: &Tensor) -> Tensor {
    let g = scores.graph();
    let none = g.full(0, I32, first.shape());
    // Steps done; what is done next: 0 an element begins, 1 a hole sinks, 2 it rises; where the hole is and may rise to;
    // the element that is to fill it.
    let state = pack(&[&none, &none, &none, &none, &none, first, last]);
    let length = |first: &Tensor| -first + middle as i64;
    let goes_on = move |state: &Tensor| {
        let [step, phase, _, _, _, first, last] = unpack(state);
        let steps = length(&first) / 2 + &last - middle as i64;
        last.gt(&first) & (step.lt(&steps) | phase.gt(0))
    };
    let done = g.while_loop(
        &[&state, ids, scores],
        |v| goes_on(&v[0]).any(&[0, 1]),
        |v| {
            let [step, phase, hole, top, value, first, last] = unpack(&v[0]);
            let (ids, scores) = (&v[1], &v[2]);
            let on = goes_on(&v[0]);
            let (begins, sinks, rises) = (&on & phase.eq(0), &on & phase.eq(1), &on & phase.eq(2));
            let length = length(&first);
            // First the heap is made, from its last parent to the root; then each element after it may replace the root.
            let half = &length / 2;
            let making = step.lt(&half);
            let parent_to_make = &half - 1 - &step;
            let next = &step - &half + middle as i64;
            let (left, right, above) = (&hole * 2 + 1, &hole * 2 + 2, (&hole - 1) / 2);
            let x = begins.select(0, &sinks.select(&left, &above)) + &first;
            let y = begins.select(&making.select(&(&first + &parent_to_make), &next), &(&first + &right));
            let found = ids.take_along(&pack(&[&x, &y]), 1);
            let [x_id, y_id] = unpack(&found);
            let [a, b, filling] = unpack(&scores.take_along(&pack(&[&x_id, &y_id, &value]), 1));

            let enters = &begins & !&making & b.gt(&a);
            let starts = (&begins & &making) | &enters;
            let take_left = right.ge(&length) | b.gt(&a);
            let sinks_on = &sinks & left.lt(&length);
            let rises_on = &rises & hole.gt(&top) & a.gt(&filling);
            let fills = &rises & !&rises_on;

            let to_hole = &first + &hole;
            let at = enters.select(&next, &(&sinks_on | &rises).select(&to_hole, -1));
            let put = fills.select(&value, &(&sinks & !&take_left).select(&y_id, &x_id));
            let ids = set(ids, [(&at, &put)]);

            let next_top = starts.select(&making.select(&parent_to_make, 0), &top);
            let sunk = take_left.select(&left, &right);
            let moved = sinks_on.select(&sunk, &rises_on.select(&above, &hole));
            let next_hole = starts.select(&next_top, &moved);
            let settled = &sinks & !&sinks_on;
            let next_phase = starts.select(1, &settled.select(2, &fills.select(0, &phase)));
            let state = [
                &(step + begins.cast(I32)),
                &next_phase,
                &next_hole,
                &next_top,
                &starts.select(&y_id, &value),
                &first,
                &last,
            ];
            vec![pack(&state), ids, scores.clone()]
        },
    );
    done.into_iter().nth(1).unwrap_or_else(|| ids.clone())
}
