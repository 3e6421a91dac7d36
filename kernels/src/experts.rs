//! Mixtures of experts: each row goes through a few of many feed-forwards.

use crate::scratch::{Scratch, counts};
use crate::{Activation, Isa, Linear, Pool, gated, linear};

/// The weights of all experts: of each field those of expert 0, 1, … lie one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct Experts<'a> {
    /// M terms into F outputs.
    pub gate: &'a Linear<'a>,
    /// As `gate`.
    pub up: &'a Linear<'a>,
    /// F terms into M outputs.
    pub down: &'a Linear<'a>,
    /// E.
    pub count: usize,
}

/// `out` = Σ over a row's experts of share · down(act(gate(x)) ⊙ up(x)): `x` and `out` (rows, M), `ids` and `shares` (rows, k). An id that
/// is none of the experts gives nothing. The rows of an expert go through it together; a row's sum is in the order of its ids, so that
/// it does not depend on other rows.
///
/// # Panics
/// If a slice has not the length that `rows` and the weights ask for, or the machine not `isa`.
// As those of products.
#[allow(clippy::too_many_arguments)]
pub fn experts(
    isa: Isa,
    pool: &dyn Pool,
    x: &[f32],
    rows: usize,
    all: &Experts<'_>,
    activation: Activation,
    ids: &[i32],
    shares: &[f32],
    out: &mut [f32],
) {
    let (m, f) = (all.gate.k, all.gate.n);
    assert!(all.down.k == f && all.down.n == m, "down of {f} × {m} required, found {} × {}", all.down.k, all.down.n);
    assert!(counts(x.len(), &[rows, m]) && out.len() == x.len(), "x and out of {rows} rows × {m} required");
    let some = ids.len();
    assert!(shares.len() == some, "as many shares as ids required, found {} and {some}", shares.len());
    assert!(some.is_multiple_of(rows), "as many ids for each of {rows} rows required, found {some}");
    if x.is_empty() {
        return;
    }
    let k = some / rows;

    // Pairs of a row and an expert, sorted by expert.
    let expert = |pair: usize| usize::try_from(ids[pair]).ok().filter(|&e| e < all.count);
    let mut pairs: Vec<(usize, usize)> = (0..ids.len()).filter_map(|pair| Some((expert(pair)?, pair))).collect();
    pairs.sort_unstable();

    let (mut of_pairs, most) = (Scratch::<f32>::new(ids.len() * m), rows.min(pairs.len()));
    let (mut own, mut h) = (Scratch::<f32>::new(most * m), Scratch::<f32>::new(most * f));
    let mut y = Scratch::<f32>::new(most * m);
    for chosen in pairs.chunk_by(|a, b| a.0 == b.0) {
        // A row may name an expert twice.
        for chosen in chosen.chunks(most) {
            let (e, n) = (chosen[0].0, chosen.len());
            for (own, (_, pair)) in own.chunks_mut(m).zip(chosen) {
                own.copy_from_slice(&x[pair / k * m..][..m]);
            }
            let [gate, up, down] = [all.gate, all.up, all.down].map(|weight| weight.part(e, all.count));
            gated(isa, pool, &own[..n * m], n, &gate, &up, activation, &mut h[..n * f]);
            linear(isa, pool, &h[..n * f], n, &[down], None, &mut [&mut y[..n * m]]);
            for (y, (_, pair)) in y.chunks(m).zip(chosen) {
                of_pairs[pair * m..][..m].copy_from_slice(y);
            }
        }
    }
    for (row, out) in out.chunks_mut(m).enumerate() {
        out.fill(0.0);
        for pair in (row * k..(row + 1) * k).filter(|&pair| expert(pair).is_some()) {
            let y = &of_pairs[pair * m..][..m];
            out.iter_mut().zip(y).for_each(|(out, y)| *out += shares[pair] * y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Order, Serial, Values, Weight};

    #[test]
    fn a_row_is_the_sum_of_its_experts() {
        let (m, f, count) = (3, 5, 2);
        let values = |n: usize, salt: usize| (0..n).map(|i| ((i * 7 + salt) % 11) as f32 - 5.0).collect::<Vec<_>>();
        let [gate, up, down] = [1, 2, 3].map(|salt| values(count * m * f, salt));
        let weight =
            |values, k, n| Linear { weight: Weight::Rows { values: Values::F32(values), order: Order::Kn }, k, n };
        let (gates, ups, downs) = (weight(&gate, m, f), weight(&up, m, f), weight(&down, f, m));
        let all = Experts { gate: &gates, up: &ups, down: &downs, count };
        let x = values(4 * m, 4);
        // None, one, the same twice, and others first.
        let (ids, shares) = ([2, -1, 0, 9, 1, 1, 1, 0], [1.0, 1.0, 0.5, 1.0, 0.25, 2.0, 3.0, 0.5]);
        let mut out = vec![f32::NAN; 4 * m];
        experts(Isa::detected(), &Serial, &x, 4, &all, Activation::Relu, &ids, &shares, &mut out);
        let product = |x: &[f32], w: &[f32], n: usize| -> Vec<f32> {
            (0..n).map(|j| x.iter().enumerate().map(|(i, x)| x * w[i * n + j]).sum()).collect()
        };
        for row in 0..4 {
            let mut expected = vec![0.0; m];
            for pair in 2 * row..2 * row + 2 {
                let Some(e) = usize::try_from(ids[pair]).ok().filter(|&e| e < count) else { continue };
                let (x, at) = (&x[row * m..][..m], e * m * f..(e + 1) * m * f);
                let (g, u) = (product(x, &gate[at.clone()], f), product(x, &up[at.clone()], f));
                let h: Vec<f32> = g.iter().zip(u).map(|(g, u)| g.max(0.0) * u).collect();
                let y = product(&h, &down[at], m);
                expected.iter_mut().zip(y).for_each(|(sum, y)| *sum += shares[pair] * y);
            }
            assert_eq!(out[row * m..][..m], expected, "row {row}");
        }
    }
}
