//! A mixture of experts in place of the feed-forward (Shazeer et al. 2017; Jiang et al. 2024, "Mixtral of Experts";
//! groups and correction bias: DeepSeek-V3, section 2.1.2).
//!
//! Letters beside the usual: N = B·S tokens, E experts, P = N·k pairs of a token and an expert it takes, C rows in a block.

mod top_k;

use xla::DType::{F32, I32};
use xla::graph::{Attr, Fold, Kernel, Platform, Tensor, einsum_as};

use super::linear::{linear, parts_of, weights_of, with_weights};
use super::mlp::{activation, mlp};
use super::pieces;
use super::rows::{TPU_ROWS, pad};
use crate::config::{Activation, ExpertGroups, ModelConfig, MoeConfig, Router};
use crate::params::{Moe, Weight};

pub(super) use top_k::top_k;

/// The kernel of the experts: x (N, M) f32, the weights of gate, up (E, M, F) and down (E, F, M), ids (N, k) i32 and shares (N, k) f32; (N, M)
/// f32, Σ over a row's experts of share · down(act(gate(x)) · up(x)). The attributes are E as `experts`, F as `width`, and those of
/// [`GATED`](super::GATED).
pub const EXPERTS: &str = "xllama.experts";

/// Σ over a token's k experts of weight · expert(x), and what the shared expert gives. `x`: (B, S, M) → (B, S, M), f32. Every
/// token gets all of its experts; the work grows with k, not with E. Also given back are the router's logits (B, S, E), the tap
/// `router_logits`.
#[track_caller]
pub fn moe(p: &Moe<Weight>, x: &Tensor, cfg: &ModelConfig) -> (Tensor, Tensor) {
    let moe = cfg.moe.as_ref().expect("a configuration with experts says how they are chosen");
    // Where the scores are sigmoids, transformers multiplies in f32 whatever the type of the weights.
    let router = match moe.router {
        Router::Softmax => p.router.clone(),
        Router::Sigmoid => Weight::Float(p.router.float().cast(F32)),
    };
    let logits = linear("BSM,ME->BSE", x, &router, None).named("router_logits");
    let y = routed(p, x, &logits, cfg.hidden_act, moe);
    let Some(shared) = &p.shared else { return (y, logits) };
    let mut common = mlp(shared, x, cfg);
    if let Some(gate) = &p.shared_gate {
        common = common * linear("BSM,M->BS", x, gate, None).sigmoid().expand_dims(2).broadcast_to(x.shape());
    }
    (y + common, logits)
}

/// Σ over a token's experts of weight · expert(x): `x` (B, S, M) and `logits` (B, S, E) → (B, S, M).
///
/// Where experts are split over devices, tokens go to them: each device gets the tokens of all, gives what its own experts
/// add, and the sums go back to where the tokens came from.
fn routed(p: &Moe<Weight>, x: &Tensor, logits: &Tensor, act: Activation, moe: &MoeConfig) -> Tensor {
    const TOKENS: &[&str] = &["batch", "sequence", ""];
    let g = x.graph();
    let mut inputs: Vec<(&Tensor, &[&str])> = vec![(x, TOKENS), (logits, TOKENS)];
    let correction_bias = p.correction_bias.as_ref().map(Weight::float);
    inputs.extend(correction_bias.iter().map(|bias| (bias, &[""][..])));
    for (weight, axes) in [
        (&p.gate_proj, &["experts", "", "mlp"][..]),
        (&p.up_proj, &["experts", "", "mlp"]),
        (&p.down_proj, &["experts", "mlp", ""]),
    ] {
        inputs.extend(weight.tensors().into_iter().map(|tensor| (tensor, axes)));
    }
    let results = g.manual_computation(&inputs, &[TOKENS], |args| {
        let mut args = args.iter().cloned();
        let mut next = || args.next().expect("a body gets as many arguments as it was given");
        let (x, logits) = (next(), next());
        let correction_bias = correction_bias.as_ref().map(|_| next());
        let [gate, up, down] = [&p.gate_proj, &p.up_proj, &p.down_proj].map(|weight| weight.with(&mut next));
        let own = gate.tensors()[0].dim(0);
        let (n, m, all) = (x.dim(0) * x.dim(1), x.dim(2), moe.n_experts);
        let (ids, weights) = choose(&logits.reshape(&[n, all]), correction_bias.as_ref(), moe);
        let rows = x.reshape(&[n, m]);
        let experts = Experts { gate: &gate, up: &up, down: &down, act, count: own };

        let split = |logical: &str, axis: &str| g.piece_axes(logical).iter().any(|of| of == axis);
        let exchanged = split("batch", "expert");
        let gathered = |t: Tensor| if exchanged { t.all_gather(0, &["expert"]) } else { t };
        let (rows, ids, weights) = (gathered(rows), gathered(ids), gathered(weights));
        // The device's own experts are 0, 1, …; those of others have the number after the last.
        let (ids, weights) = match own == all {
            true => (ids, weights),
            false => {
                let own = own as i64;
                let first = g.coordinate("expert") * own;
                let id = &ids - first.broadcast(ids.shape(), &[]);
                let here = id.ge(0i64) & id.lt(own);
                (here.select(&id, own), here.select(&weights, 0.0))
            }
        };
        let mut y = experts.apply(&rows, &ids, &weights, all);
        if exchanged {
            y = y.reduce_scatter(Fold::Sum, 0, &["expert"]);
        }
        let mut partial = Vec::new();
        partial.extend((split("experts", "expert") && !exchanged).then_some("expert"));
        partial.extend(split("mlp", "model").then_some("model"));
        if !partial.is_empty() {
            y = y.all_reduce(Fold::Sum, &partial);
        }
        vec![y.reshape(x.shape())]
    });
    results.into_iter().next().unwrap_or_else(|| x.clone())
}

/// From logits (N, E) to the experts that each token takes and their weights: (N, k) i32, (N, k) f32.
fn choose(logits: &Tensor, correction_bias: Option<&Tensor>, moe: &MoeConfig) -> (Tensor, Tensor) {
    let scores = match moe.router {
        Router::Softmax => logits.softmax(-1),
        Router::Sigmoid => logits.sigmoid(),
    };
    let mut open = scores.clone();
    if let Some(bias) = correction_bias {
        open = open + bias.cast(F32).broadcast_to(scores.shape());
    }
    if let Some(groups) = &moe.groups {
        open = best_groups(&open, groups);
    }
    let ids = top_k(&open, moe.top_k);
    let mut weights = scores.take_along(&ids, 1);
    if moe.normalize {
        let mut sum = weights.sum_keep(&[1]);
        if moe.router == Router::Sigmoid {
            // All sigmoids may be 0; a softmax has a largest.
            sum = sum + 1e-20;
        }
        weights = &weights / sum.broadcast_to(weights.shape());
    }
    (ids, weights * moe.scale)
}

/// Scores (N, E) with −∞ for the experts outside of each token's best groups.
fn best_groups(scores: &Tensor, groups: &ExpertGroups) -> Tensor {
    let (n, g) = (scores.dim(0), scores.graph());
    let grouped = scores.reshape(&[n, groups.count, scores.dim(1) / groups.count]);
    let (best, _) = grouped.largest(2);
    let kept = top_k(&best.sum(&[2]), groups.kept);
    let shape = [n, groups.kept, groups.count];
    let open = kept.broadcast(&shape, &[0, 1]).eq(&g.iota(I32, &shape, 2)).any(&[1]);
    let closed = g.full(f64::NEG_INFINITY, F32, grouped.shape());
    open.broadcast(grouped.shape(), &[0, 1]).select(&grouped, &closed).reshape(scores.shape())
}

/// The experts of one device.
#[derive(Clone, Copy)]
struct Experts<'a> {
    /// (E, M, F).
    gate: &'a Weight,
    /// (E, M, F).
    up: &'a Weight,
    /// (E, F, M).
    down: &'a Weight,
    act: Activation,
    /// E.
    count: usize,
}

/// Rows up to which every expert is applied to every row: to sort and pick them costs more on an accelerator than products of
/// weights that are read in any case. A v6e multiplies 512 rows while it reads the weights.
fn dense_rows(platform: Platform) -> usize {
    match platform {
        Platform::Cpu => 0,
        Platform::Gpu => 256,
        Platform::Tpu => 512,
    }
}

impl Experts<'_> {
    /// Σ over a row's experts of weight · expert(x): `x` (N, M), `ids` and `weights` (N, k) → (N, M). An id that is none of
    /// these experts gives nothing. `all` is how many experts the ids were chosen from.
    fn apply(&self, x: &Tensor, ids: &Tensor, weights: &Tensor, all: usize) -> Tensor {
        if !x.graph().has_kernel(EXPERTS) {
            return self.in_graph(x, ids, weights, all);
        }
        let own = [self.gate, self.up, self.down].map(Weight::clone);
        let (kernel, mut inputs) = with_weights(Kernel::new(EXPERTS), x, &own);
        inputs.extend([ids, weights]);
        let kernel = kernel
            .attr("activation", Attr::Str(self.act.name().into()))
            .attr("experts", Attr::I64(self.count as i64))
            .attr("width", Attr::I64(self.gate.shape()[2] as i64));
        let y = x.graph().kernel(kernel, &inputs, |args| {
            let [args @ .., ids, weights] = args else { return args.to_vec() };
            let (x, own) = weights_of(args, &own);
            let [gate, up, down] = [0, 1, 2].map(|i: usize| &own[i]);
            vec![Experts { gate, up, down, ..*self }.in_graph(x, ids, weights, all)]
        });
        y.into_iter().next().unwrap_or_else(|| x.clone())
    }

    /// The same without a kernel.
    fn in_graph(&self, x: &Tensor, ids: &Tensor, weights: &Tensor, all: usize) -> Tensor {
        if x.dim(0) <= dense_rows(x.graph().platform()) {
            return self.dense(x, ids, weights);
        }
        let y = sorted(self, x, ids, all);
        let y = match self.count == all {
            true => y,
            false => ids.lt(self.count as i64).broadcast(y.shape(), &[0, 1]).select(&y, 0.0),
        };
        // Summed in the order of the choice: a token's result is the same in every batch.
        (&y * weights.expand_dims(2).broadcast_to(y.shape())).sum(&[1])
    }

    /// The same with every expert applied to every row.
    fn dense(&self, x: &Tensor, ids: &Tensor, weights: &Tensor) -> Tensor {
        let n = x.dim(0);
        if x.graph().platform() == Platform::Tpu && n < TPU_ROWS {
            let rows = |x: &Tensor, value| pad(x, 0, TPU_ROWS, value);
            let ids = rows(ids, self.count as f64);
            return self.dense(&rows(x, 0.0), &ids, &rows(weights, 0.0)).narrow(0, 0, n);
        }
        let all = [x.dim(0), ids.dim(1), self.count];
        let chosen = ids.broadcast(&all, &[0, 1]).eq(&x.graph().iota(I32, &all, 2));
        let share = chosen.select(&weights.broadcast(&all, &[0, 1]), 0.0).sum(&[1]);
        let [gate, up] =
            [self.gate, self.up].map(|w| pieces::product("NM,EMF->ENF", &x.cast(w.dtype()), w, x.dim(0), |_| 1));
        let h = activation(&gate, self.act) * up;
        let mut h = (&h * share.transpose(&[1, 0]).broadcast(h.shape(), &[0, 1])).cast(self.down.dtype());
        if h.graph().platform() == Platform::Tpu {
            // As in `mlp`.
            h = h.graph().optimization_barrier(&[&h]).remove(0);
        }
        pieces::product("ENF,EFM->NM", &h, self.down, x.dim(0), |_| 1)
    }
}

/// What each token's experts give: `x` (N, M) and `ids` (N, k) → (N, k, M); anything where an id is none of these experts. `all`
/// is how many experts the ids were chosen from.
///
/// The pairs are sorted by expert and cut into blocks of C rows of one expert. A loop, as long as there are blocks, takes
/// an expert's weights and applies them to a block. XLA copies the weights that a loop picks, so where most experts have
/// rows the first block of each is done before, in one batched product that reads the weights where they lie; the loop
/// then has only what is left of experts with more than C rows.
///
/// At k = 2, M = 256, F = 512 in f32 on an AVX-512 core, 64 experts instead of 8 cost 1.2 times as much for one token
/// (0.45 ms), 2.0 times for 512 tokens (22 ms) and 1.4 times for 2048 (57 ms): what is more are the weights to read,
/// 100 MB against 13, and with them the products get only 16 rows each where the 8 get 128.
fn sorted(weights: &Experts<'_>, x: &Tensor, ids: &Tensor, all: usize) -> Tensor {
    let g = x.graph();
    let Experts { gate, up, down, act, count: experts } = *weights;
    let (n, k, m) = (x.dim(0), ids.dim(1), x.dim(1));
    let pairs = n * k;
    let (first, c) = blocks(n, k, all);

    // Sorted pairs: their expert, and their token with C more, so that a block at the end does not stick out.
    let (expert, order) = ids.reshape(&[pairs]).argsort(0, false);
    let token = g.concatenate(&[&(&order / k as i64), &g.full(0, I32, &[c])], 0);
    let ones = g.full(1, I32, &[pairs]);
    let counts = g.full(0, I32, &[experts]).scatter(&expert.expand_dims(1), &ones, Some(Fold::Sum), false);
    let starts = counts.cumsum(0) - &counts;

    // Blocks 0 … E·first − 1 are the first ones of each expert, the loop's blocks follow, by expert.
    let more = ((&counts + (c as i64 - 1)) / c as i64 - first as i64).maximum(0);
    let ends = more.cumsum(0);
    let before = &ends - &more;
    let rank = g.iota(I32, &[pairs], 0) - starts.take(&expert, 0);
    let number = &rank / c as i64;
    let looped = before.take(&expert, 0) + &number + (first * experts) as i64 - first as i64;
    let block = number.lt(first as i64).select(&expert, &looped);
    let row = block * c as i64 + rank % c as i64;

    // An expert without rows past its first C has no block in the loop; without a first block, it has at most one more
    // than it fills.
    let most = pairs / c + (1 - first) * experts.min(pairs);
    let mut blocks = Vec::new();
    if first == 1 {
        let at = starts.broadcast(&[experts, c], &[0]) + g.iota(I32, &[experts, c], 1);
        let y = feed_forward(&x.take(&token.take(&at, 0), 0), gate, up, down, act);
        blocks.push(y.reshape(&[experts * c, m]));
    }
    let joined = |rest: Tensor| g.concatenate(&blocks.iter().chain([&rest]).collect::<Vec<_>>(), 0);
    let y = if first == 1 && c >= n {
        // With C = N rows, no expert has more.
        joined(g.full(0.0, F32, &[most * c, m]))
    } else {
        let number = g.iota(I32, &[most], 0);
        let passed = ends.broadcast(&[most, experts], &[1]).le(&number.broadcast(&[most, experts], &[0]));
        let expert = passed.cast(I32).sum(&[1]);
        let at = starts.take(&expert, 0) + (&number - before.take(&expert, 0) + first as i64) * c as i64;
        let total = ends.narrow(0, experts - 1, 1).reshape(&[]);
        let mut read = vec![&expert, &at, &token, x];
        read.extend([gate, up, down].into_iter().flat_map(Weight::tensors));
        // One block, from its number and what is read.
        let one = |block: &Tensor, read: &[Tensor]| {
            let [expert, at, token, x, weights @ ..] = read else { return block.clone() };
            let zero = block.graph().scalar(0, I32);
            let this = |table: &Tensor| table.dynamic_slice(&[block], &[1]).reshape(&[]);
            let expert = this(expert);
            let mut weights = weights.iter().map(|all| {
                let mut start = vec![&zero; all.rank()];
                start[0] = &expert;
                all.dynamic_slice(&start, &[&[1], &all.shape()[1..]].concat())
            });
            let mut next = || weights.next().expect("a loop gets what it was given");
            let [gate, up, down] = [gate, up, down].map(|weight| weight.with(&mut next));
            let rows = x.take(&token.dynamic_slice(&[&this(at)], &[c]), 0).expand_dims(0);
            feed_forward(&rows, &gate, &up, &down, act).reshape(&[c, m])
        };
        if g.training() {
            // As long as there could be blocks, passing over those that there are not: what ends earlier has no derivative.
            let read: Vec<&Tensor> = std::iter::once(&total).chain(read).collect();
            let (_, rows) = g.scan("expert_blocks", most, &read, &[], &[&number], |read, _, number| {
                let inputs: Vec<&Tensor> = number.iter().chain(&read[1..]).collect();
                let none = |_: &[Tensor]| vec![g.full(0.0, F32, &[c, m])];
                (vec![], g.cond(&number[0].lt(&read[0]), &inputs, |v| vec![one(&v[0], &v[1..])], none))
            });
            joined(rows[0].reshape(&[most * c, m]))
        } else {
            let y = joined(g.full(0.0, F32, &[most * c, m]));
            let block = g.scalar(0, I32);
            let state: Vec<&Tensor> = [&block, &y, &total].into_iter().chain(read).collect();
            let done = g.while_loop(
                &state,
                |v| v[0].lt(&v[2]),
                |v| {
                    let zero = v[0].graph().scalar(0, I32);
                    let to = (&v[0] + (first * experts) as i64) * c as i64;
                    let rows = one(&v[0], &v[3..]);
                    let mut next = v.to_vec();
                    (next[0], next[1]) = (&v[0] + 1, v[1].dynamic_update_slice(&rows, &[&to, &zero]));
                    next
                },
            );
            done.into_iter().nth(1).unwrap_or(y)
        }
    };
    let (_, place) = order.argsort(0, false);
    y.take(&row.take(&place, 0), 0).reshape(&[n, k, m])
}

/// Whether there is a first block of every expert (1 or 0), and how many rows a block has (C).
///
/// To copy an expert's weights and read them takes about three times as long as to read them, so a loop over the experts
/// in use is best below a third of them. Above, C is what an expert gets on average and two standard deviations of an
/// even choice more: with fewer rows more weights are copied, with more rows more of them are padding.
fn blocks(n: usize, k: usize, experts: usize) -> (usize, usize) {
    if 3 * n * k < experts {
        return (0, n.min(8));
    }
    let average = (n * k).div_ceil(experts);
    (1, (average + 2 * average.isqrt()).next_multiple_of(8).min(n))
}

/// down(act(gate(x)) · up(x)) of each expert on its own rows: (E, C, M) → (E, C, M), f32.
fn feed_forward(x: &Tensor, gate: &Weight, up: &Weight, down: &Weight, act: Activation) -> Tensor {
    let h = activation(&product(x, gate), act) * product(x, up);
    product(&h, down)
}

/// (E, C, A) × (E, A, D) → (E, C, D), in the type of the weights, accumulated in f32 in parts, as [`linear`] does.
fn product(x: &Tensor, weight: &Weight) -> Tensor {
    if let Weight::Packed(packed) = weight {
        let own = |e: usize| x.narrow(0, e, 1).reshape(&x.shape()[1..]);
        let all: Vec<Tensor> = (0..x.dim(0)).map(|e| packed.expert(e).product(&own(e)).expand_dims(0)).collect();
        return x.graph().concatenate(&all.iter().collect::<Vec<_>>(), 0);
    }
    let x = x.cast(weight.dtype());
    let weight = weight.float();
    let [e, a, d] = *weight.shape() else { return x };
    let c = x.dim(1);
    let parts = parts_of(x.graph(), weight.dtype(), c, a, a, d);
    let (x, weight) = (x.reshape(&[e, c, parts, a / parts]), weight.reshape(&[e, parts, a / parts, d]));
    match parts {
        1 => einsum_as("ECZA,EZAD->ECD", &x, &weight, F32),
        _ => einsum_as("ECZA,EZAD->EZCD", &x, &weight, F32).sum(&[1]),
    }
}
