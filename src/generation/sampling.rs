//! Sampling as a part of the graph: penalties, temperature, top-k, top-p, min-p, typical-p, and the draw itself.
//!
//! Nothing is sorted: the cut of top-k, top-p and typical-p is found by bisection over the bits of what orders the ids,
//! which is exact, costs 32 reductions over V, and stays a reduction when the vocabulary is sharded. Values that tie with the cut stay
//! in, as they do in `transformers`' top-k.

use xla::DType;
use xla::graph::{Algorithm, ArgAttrs, Graph, Kernel, Tensor};

use super::options::Settings;

/// What a sampler needs from the graph, fixed when a program is compiled; the numbers themselves are arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct SamplerSpec {
    /// Draw at random; otherwise the largest logit wins (the lowest id among equals).
    pub random: bool,
    /// Keep locally typical ids only.
    pub typical: bool,
    /// Repetition, presence and frequency penalties.
    pub penalties: bool,
    /// A bias (V) is added to the logits.
    pub bias: bool,
    /// How many of the most likely ids come back with their log-probabilities, beside that of the id drawn.
    pub log_probabilities: Option<usize>,
}

/// The sampler's arguments. Optional ones are declared where the spec asks for them.
#[derive(Clone, Debug)]
pub struct SamplerArgs {
    /// One row of [`Settings`] per slot, (B, [`Settings::LEN`]) f32.
    pub settings: Option<Tensor>,
    /// Random seeds (B), u64.
    pub seed: Option<Tensor>,
    /// How often each id stands in the prompt, (B, V) i32.
    pub prompt_counts: Option<Tensor>,
    /// How often each id was generated, (B, V) i32; donated.
    pub output_counts: Option<Tensor>,
    /// Added to the logits before anything else, (B, V) f32.
    pub bias: Option<Tensor>,
    /// Whether some slot keeps typical ids only; it is no argument.
    pub typical: bool,
}

impl SamplerArgs {
    /// Declares the arguments that `spec` needs, in the order of the fields.
    pub fn declare(g: &Graph, spec: SamplerSpec, batch: usize, vocab: usize) -> SamplerArgs {
        let arg = |wanted: bool, name: &str, dtype, shape: &[usize]| wanted.then(|| g.arg(name, dtype, shape));
        let of_vocab = |wanted: bool, name: &str, dtype| {
            let attrs = ArgAttrs { sharding: Some(&["batch", "vocab"]) };
            wanted.then(|| g.arg_with(name, dtype, &[batch, vocab], attrs))
        };
        SamplerArgs {
            settings: arg(spec.random || spec.penalties, "sampler/settings", DType::F32, &[batch, Settings::LEN]),
            seed: arg(spec.random, "sampler/seed", DType::U64, &[batch]),
            prompt_counts: of_vocab(spec.penalties, "sampler/prompt_counts", DType::I32),
            output_counts: of_vocab(spec.penalties, "sampler/output_counts", DType::I32),
            bias: of_vocab(spec.bias, "sampler/bias", DType::F32),
            typical: spec.typical,
        }
    }

    fn setting(&self, i: usize) -> Option<Tensor> {
        self.settings.as_ref().map(|s| s.narrow(1, i, 1))
    }
}

/// Draws one id per slot from logits (B, V): (B) i32. `position` (B) i32 is the place of the id in its sequence: with
/// the slot's seed it makes the random number, so that a text does not depend on batch or chunking.
#[track_caller]
pub fn sample(logits: &Tensor, position: &Tensor, args: &SamplerArgs) -> Tensor {
    let mut logits = logits.clone();
    if let Some(bias) = &args.bias {
        logits = logits + bias;
    }
    if let (Some(prompt), Some(output)) = (&args.prompt_counts, &args.output_counts) {
        logits = penalise(&logits, prompt, output, args);
    }
    match &args.seed {
        Some(seed) => draw(&logits, seed, position, args).named("token"),
        None => argmax(&logits).named("token"),
    }
}

/// Repetition (Keskar et al. 2019, as in `transformers`: prompt and output) divides positive and multiplies negative
/// logits; presence and frequency (of generated ids) are subtracted.
#[track_caller]
fn penalise(logits: &Tensor, prompt: &Tensor, output: &Tensor, args: &SamplerArgs) -> Tensor {
    let row = |i| args.setting(i).expect("settings come with penalties").broadcast_to(logits.shape());
    let counts = output.cast(DType::F32);
    let generated = counts.gt(0.0);
    let seen = &generated | prompt.gt(0i64);
    let repetition = row(Settings::REPETITION);
    let repeated = logits.lt(0.0).select(&(logits * &repetition), &(logits / &repetition));
    let logits = seen.select(&repeated, logits);
    logits - counts * row(Settings::FREQUENCY) - generated.cast(DType::F32) * row(Settings::PRESENCE)
}

/// Temperature, filters (top-k, then top-p of what is left, then min-p, then typical-p of what is left: the order of
/// `transformers`), and a draw by inverting the cumulative distribution.
#[track_caller]
fn draw(logits: &Tensor, seed: &Tensor, position: &Tensor, args: &SamplerArgs) -> Tensor {
    let row = |i| args.setting(i).expect("settings come with a seed");
    let g = logits.graph();
    let shape = logits.shape().to_vec();
    let keys = ordered_bits(logits);
    // The difference comes first: where it is 0, `prob` is exactly 1, however the compiler rounds the division.
    let below_best = logits - logits.max_keep(&[1]).broadcast_to(&shape);
    let prob = (below_best / row(Settings::TEMPERATURE).broadcast_to(&shape)).exp();

    let kept = at_least(&keys, &cut(&keys, &g.full(1.0, DType::F32, &shape), &row(Settings::TOP_K)));
    let prob = kept.select(&prob, 0.0);
    let target = prob.sum_keep(&[1]) * row(Settings::TOP_P);
    let kept = at_least(&keys, &cut(&keys, &prob, &target));
    // The largest value of `prob` is 1, so min-p compares directly.
    let mut kept = &kept & prob.ge(&row(Settings::MIN_P).broadcast_to(&shape));
    let mut prob = kept.select(&prob, 0.0);
    if args.typical {
        kept = kept & typical(&prob, &row(Settings::TYPICAL_P));
        prob = kept.select(&prob, 0.0);
    }

    let (cumulative, total) = cumulative(&prob);
    let target = (total * uniform(seed, position)).broadcast_to(&shape);
    // The first id whose cumulative mass passes the target, of those kept: sums in another order may pass it earlier.
    let passed = &kept & cumulative.gt(&target);
    argmax(&(kept.cast(DType::F32) + passed.cast(DType::F32)))
}

/// (B, V) as (B, P, V/P), where P devices share the vocabulary: what is done along the last axis stays on a device.
#[track_caller]
fn by_device(x: &Tensor) -> Tensor {
    let (b, v, p) = (x.dim(0), x.dim(1), x.graph().devices_along("model"));
    x.reshape(&[b, p, v / p]).shard(["batch", "vocab", ""])
}

/// The kernel of `argmax`: (B, V) f32 → (B) i32.
pub const ARGMAX: &str = "xllama.argmax";

/// The id of the largest value of each row, the lowest among equals: (B, V) → (B) i32. Devices exchange their best only.
#[track_caller]
fn argmax(x: &Tensor) -> Tensor {
    match by_device(x) {
        parts if parts.dim(1) == 1 => {
            let best = x.graph().kernel(Kernel::new(ARGMAX), &[x], |args| vec![args[0].argmax(1)]);
            best[0].clone()
        }
        _ => best_of_devices(x),
    }
}

/// [`argmax`] where devices share the vocabulary. They exchange pairs of value and id, as integers, in one collective.
#[track_caller]
fn best_of_devices(x: &Tensor) -> Tensor {
    let g = x.graph();
    let results = g.manual_computation(&[(x, &["batch", "vocab"])], &[&["batch"]], |args| {
        let x = &args[0];
        if g.piece_axes("vocab").is_empty() {
            return vec![x.argmax(1)];
        }
        let (b, own) = (x.dim(0), x.dim(1));
        let first = g.coordinate("model") * own as i64;
        let id = x.argmax(1) + first.broadcast(&[b], &[]);
        let pair = [x.max(&[1]).bitcast(DType::I32), id].map(|part| part.reshape(&[b, 1, 1]));
        let all = g.concatenate(&pair.each_ref(), 2).all_gather(1, &["model"]);
        let [value, id] = [0, 1].map(|part| all.narrow(2, part, 1).reshape(&[b, all.dim(1)]));
        let device = value.bitcast(DType::F32).argmax(1);
        let here = device.broadcast(id.shape(), &[0]).eq(&g.iota(DType::I32, id.shape(), 1));
        vec![here.select(&id, 0i64).sum(&[1])]
    });
    results.into_iter().next().unwrap_or_else(|| x.argmax(1))
}

/// Sums of the values up to each, (B, V), and of all, (B, 1). Devices exchange their totals only.
#[track_caller]
fn cumulative(x: &Tensor) -> (Tensor, Tensor) {
    let parts = by_device(x);
    let (p, own) = (parts.dim(1), parts.dim(2));
    let within = parts.cumsum(2);
    if p == 1 {
        let all = within.reshape(x.shape());
        let total = all.narrow(1, own - 1, 1);
        return (all, total);
    }
    let totals = within.narrow(2, own - 1, 1).reshape(&[x.dim(0), p]).shard(["batch", ""]);
    let through = totals.cumsum(1);
    let before = (&through - &totals).broadcast(parts.shape(), &[0, 1]);
    ((within + before).reshape(x.shape()).shard(["batch", "vocab"]), through.narrow(1, p - 1, 1))
}

/// The locally typical ids (Meister et al. 2023): those whose surprise −ln q is nearest to the entropy H of q, until their
/// mass reaches p, with all that tie with the last. `weights` (B, V) f32, q times any number; `p` (B, 1), 1 keeps
/// all → (B, V) bool.
#[track_caller]
pub fn typical(weights: &Tensor, p: &Tensor) -> Tensor {
    let shape = weights.shape();
    let total = weights.sum_keep(&[1]);
    let q = weights / total.broadcast_to(shape);
    let possible = q.gt(0.0);
    let surprise = possible.select(&-q.log(), 0.0);
    let entropy = (&q * &surprise).sum_keep(&[1]);
    // Distances are not negative, so their bits order as they do; the nearest has the largest key.
    let distance = (surprise - entropy.broadcast_to(shape)).abs();
    let keys = !possible.select(&distance, f64::INFINITY).bitcast(DType::U32);
    let kept = at_least(&keys, &cut(&keys, weights, &(total * p)));
    kept | p.ge(1.0).broadcast_to(shape)
}

/// One number in [0, 1) per slot, (B, 1) f32, from Threefry with key (seed, position): 23 bits, so that it times a
/// total stays below the total.
#[track_caller]
fn uniform(seed: &Tensor, position: &Tensor) -> Tensor {
    let g = seed.graph();
    let b = seed.dim(0);
    let state = g.concatenate(&[&seed.reshape(&[b, 1]), &position.cast(DType::U64).reshape(&[b, 1])], 1);
    let bits: Vec<Tensor> = (0..b)
        .map(|i| state.narrow(0, i, 1).reshape(&[2]).rng_bits(Algorithm::ThreeFry, DType::U32, &[1, 1]).1)
        .collect();
    let bits = g.concatenate(&bits.iter().collect::<Vec<_>>(), 0);
    bits.shift_right_logical(9i64).cast(DType::F32) * (1.0 / f64::from(1 << 23))
}

/// The bits of an f32 as a u32 that orders as the float does.
#[track_caller]
fn ordered_bits(x: &Tensor) -> Tensor {
    let bits = x.bitcast(DType::U32);
    let sign = x.graph().full(1i64 << 31, DType::U32, x.shape());
    bits.ge(&sign).select(&!&bits, &(&bits | &sign))
}

#[track_caller]
fn at_least(keys: &Tensor, cut: &Tensor) -> Tensor {
    keys.ge(&cut.broadcast_to(keys.shape()))
}

/// The largest key t with Σ weight[key ≥ t] ≥ target, built from the highest bit down; 0 where there is none.
/// `keys` (B, V) u32, `weights` (B, V) f32, `target` (B, 1) f32 → (B, 1) u32.
#[track_caller]
fn cut(keys: &Tensor, weights: &Tensor, target: &Tensor) -> Tensor {
    let g = keys.graph();
    let start = g.full(0i64, DType::U32, target.shape());
    let bit = g.scalar(1i64 << 31, DType::U32);
    let state = g.while_loop(
        &[&bit, &start, keys, weights, target],
        |s| s[0].ne(0i64),
        |s| {
            let [bit, cut, keys, weights, target] = s else { unreachable!("five values are carried") };
            let candidate = cut | bit.broadcast(cut.shape(), &[]);
            let mass = at_least(keys, &candidate).select(weights, 0.0).sum_keep(&[1]);
            let cut = mass.ge(target).select(&candidate, cut);
            vec![bit.shift_right_logical(1i64), cut, keys.clone(), weights.clone(), target.clone()]
        },
    );
    state[1].clone()
}

/// ln softmax over the last axis, (B, V) f32.
#[track_caller]
pub fn log_softmax(logits: &Tensor) -> Tensor {
    let shifted = logits - logits.max_keep(&[-1]).broadcast_to(logits.shape());
    let total = shifted.exp().sum_keep(&[-1]).log();
    &shifted - total.broadcast_to(logits.shape())
}

/// The `count` largest of each row of (B, V), falling, the lowest id first among equals: ids and values, (B, n) each. Where
/// devices share the vocabulary, each finds its own best, and the best of those are taken.
#[track_caller]
pub fn best(values: &Tensor, count: usize) -> (Tensor, Tensor) {
    let parts = by_device(values);
    let (b, p, own) = (parts.dim(0), parts.dim(1), parts.dim(2));
    if p == 1 || count == 0 {
        return largest(values, count);
    }
    let count_here = count.min(own);
    let axes: &[&str] = &["batch", "vocab", ""];
    let found = parts.graph().manual_computation(&[(&parts, axes)], &[axes, axes], |parts| {
        let (ids, values) = largest(&parts[0], count_here);
        vec![ids, values]
    });
    let [ids, values] = &found[..] else { return largest(values, count) };
    let ids = ids + values.graph().iota(DType::I32, ids.shape(), 1) * own as i64;
    let (ids, values) = (ids.reshape(&[b, p * count_here]), values.reshape(&[b, p * count_here]));
    let (ids, values) = (ids.shard(["batch", ""]), values.shard(["batch", ""]));
    let (at, values) = largest(&values, count);
    (ids.take_along(&at, 1), values)
}

/// The `count` largest along the last axis, falling, the first among equals: where they stand, and the values.
#[track_caller]
fn largest(values: &Tensor, count: usize) -> (Tensor, Tensor) {
    /// So many passes over V cost less than sorting it.
    const PASSES: usize = 32;
    let (values, ids) = match count {
        0 => {
            let mut shape = values.shape().to_vec();
            shape.splice(shape.len() - 1.., [0]);
            (values.graph().full(0.0, DType::F32, &shape), values.graph().full(0i64, DType::I32, &shape))
        }
        1..=PASSES => values.largest(count),
        _ => values.top_k(count),
    };
    (ids, values)
}
