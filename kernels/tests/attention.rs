//! Attention against a plain f64 reference: random sizes, every type of cache, every instruction set of this machine.

use half::{bf16, f16};
use kernels::attention::{Attend, Gradients, Kv, Sizes, attend, attend_gradient};
use kernels::{Isa, Serial, Threads};
use proptest::prelude::*;

/// The type of a cache.
#[derive(Clone, Copy, Debug)]
enum Type {
    F32,
    Bf16,
    F16,
    I8,
}

/// A cache array (B, G, T, K), owned.
enum Array {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    I8(Vec<i8>, Vec<f32>),
}

impl Array {
    fn view(&self) -> Kv<'_> {
        match self {
            Array::F32(x) => Kv::F32(x),
            Array::Bf16(x) => Kv::Bf16(x),
            Array::F16(x) => Kv::F16(x),
            Array::I8(q, scales) => Kv::I8 { q, scales },
        }
    }

    fn get(&self, i: usize, width: usize) -> f64 {
        match self {
            Array::F32(x) => x[i].into(),
            Array::Bf16(x) => x[i].into(),
            Array::F16(x) => x[i].into(),
            Array::I8(q, scales) => f64::from(q[i]) * f64::from(scales[i / width]),
        }
    }

    /// From values in f32; rows that are NaN stay so, as scales where there are any.
    fn new(kind: Type, x: &[f32], width: usize) -> Array {
        match kind {
            Type::F32 => Array::F32(x.to_vec()),
            Type::Bf16 => Array::Bf16(x.iter().map(|&x| bf16::from_f32(x)).collect()),
            Type::F16 => Array::F16(x.iter().map(|&x| f16::from_f32(x)).collect()),
            Type::I8 => {
                let scales: Vec<f32> = x
                    .chunks(width)
                    .map(|row| {
                        if row[0].is_nan() {
                            f32::NAN
                        } else {
                            row.iter().fold(0.0, |m: f32, x| m.max(x.abs())) / 127.0
                        }
                    })
                    .collect();
                let q = x.iter().enumerate().map(|(i, x)| (x / scales[i / width]).round() as i8).collect();
                Array::I8(q, scales)
            }
        }
    }
}

/// Rounded as the cache's type is.
fn rounded(kind: Type, x: f64) -> f64 {
    match kind {
        Type::F32 | Type::I8 => x,
        Type::Bf16 => bf16::from_f32(x as f32).into(),
        Type::F16 => f16::from_f32(x as f32).into(),
    }
}

/// A sequence of numbers that depends on its seed alone.
struct Random(u64);

impl Random {
    /// Uniform in −1 … 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn below(&mut self, n: usize) -> usize {
        ((f64::from(self.next()) + 1.0) / 2.0 * n as f64) as usize % n
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    sizes: Sizes,
    kind: Type,
    window: Option<usize>,
    softcap: Option<f32>,
    ring: bool,
    seed: u64,
}

/// The inputs of a case.
struct Inputs {
    q: Vec<f32>,
    k: Array,
    v: Array,
    positions: Vec<i32>,
    key_positions: Option<Vec<i32>>,
}

impl Case {
    /// Every slot's queries stand one after another, somewhere in its T positions; in a ring, T positions of a longer
    /// text are held. What no query may see is NaN where nothing may be read, and 1,000 where it may be.
    fn inputs(&self) -> Inputs {
        let Sizes { batch, queries, groups, heads, width, keys } = self.sizes;
        let mut random = Random(self.seed);
        let q = (0..batch * queries * groups * heads * width).map(|_| random.next() * 2.0).collect();
        let mut k: Vec<f32> = (0..batch * groups * keys * width).map(|_| random.next()).collect();
        let mut v: Vec<f32> = (0..batch * groups * keys * width).map(|_| random.next()).collect();
        let mut positions = Vec::new();
        let mut held = Vec::new();
        for slot in 0..batch {
            let first = if self.ring { random.below(3 * keys) } else { random.below(keys.saturating_sub(queries) + 1) };
            positions.extend((first..first + queries).map(|position| position as i32));
            let last = first + queries - 1;
            for t in 0..keys {
                // the largest position up to the last one that is t modulo T
                let at = last as i64 - (last as i64 - t as i64).rem_euclid(keys as i64);
                held.push(at as i32);
                let unseen = if self.ring { at < 0 } else { t > last };
                let value = if self.ring { 1000.0 } else { f32::NAN };
                for g in 0..groups {
                    let row = ((slot * groups + g) * keys + t) * width;
                    if unseen {
                        k[row..row + width].fill(value);
                        v[row..row + width].fill(value);
                    }
                }
            }
        }
        let key_positions = self.ring.then_some(held);
        Inputs { q, k: Array::new(self.kind, &k, width), v: Array::new(self.kind, &v, width), positions, key_positions }
    }

    /// The keys that the query of a slot at this position sees.
    fn seen(&self, inputs: &Inputs, slot: usize, position: i64) -> Vec<usize> {
        let keys = self.sizes.keys;
        let key = |t: usize| inputs.key_positions.as_ref().map_or(t as i64, |held| i64::from(held[slot * keys + t]));
        let near = |key: i64| self.window.is_none_or(|window| key > position - window as i64);
        (0..keys).filter(|&t| (0..=position).contains(&key(t)) && near(key(t))).collect()
    }

    /// The gradients of q, k and v in f64 for a cotangent, and how far f32 may be from them.
    fn gradients(&self, inputs: &Inputs, cotangent: &[f32]) -> [Vec<(f64, f64)>; 3] {
        let Sizes { batch, queries, groups, heads, width, keys } = self.sizes;
        let mut found = [cotangent.len(), batch * groups * keys * width, batch * groups * keys * width]
            .map(|n| vec![(0.0, 0.0); n]);
        for (row, ct) in cotangent.chunks(width).enumerate() {
            let (g, token) = (row / heads % groups, row / heads / groups);
            let (b, position) = (token / queries, i64::from(inputs.positions[token]));
            let q: Vec<f64> = inputs.q[row * width..][..width].iter().map(|&q| rounded(self.kind, q.into())).collect();
            let ct: Vec<f64> = ct.iter().map(|&ct| ct.into()).collect();
            let seen = self.seen(inputs, b, position);
            let at = |t: usize| ((b * groups + g) * keys + t) * width;
            let dot = |x: &[f64], of: &Array, t: usize| -> f64 {
                x.iter().enumerate().map(|(i, x)| x * of.get(at(t) + i, width)).sum()
            };
            let size = |x: &[f64], of: &Array, t: usize| -> f64 {
                x.iter().enumerate().map(|(i, x)| (x * of.get(at(t) + i, width)).abs()).sum()
            };
            let cap = self.softcap.map(f64::from);
            let scores: Vec<f64> = seen.iter().map(|&t| dot(&q, &inputs.k, t)).collect();
            let capped = |score: f64| cap.map_or(score, |cap| (score / cap).tanh() * cap);
            let highest = scores.iter().map(|&score| capped(score)).fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|&score| (capped(score) - highest).exp()).collect();
            let total: f64 = weights.iter().sum();
            let slopes: Vec<f64> = seen.iter().map(|&t| dot(&ct, &inputs.v, t)).collect();
            let sizes: Vec<f64> = seen.iter().map(|&t| size(&ct, &inputs.v, t)).collect();
            let mean = |x: &[f64]| weights.iter().zip(x).map(|(w, x)| w / total * x).sum::<f64>();
            let (delta, most) = (mean(&slopes), mean(&sizes));
            let error = seen.iter().map(|&t| 1e-5 + 1e-6 * size(&q, &inputs.k, t)).fold(0.0, f64::max);
            for (i, &t) in seen.iter().enumerate() {
                let p = weights[i] / total;
                let bend = cap.map_or(1.0, |cap| 1.0 - (scores[i] / cap).tanh().powi(2));
                let (slope, slack) = (p * (slopes[i] - delta) * bend, error * p * (sizes[i] + most));
                for d in 0..width {
                    let mut add = |which: usize, at: usize, value: f64, slack: f64| {
                        let (sum, tolerance): &mut (f64, f64) = &mut found[which][at];
                        *sum += value;
                        *tolerance += slack;
                    };
                    let k = inputs.k.get(at(t) + d, width);
                    add(0, row * width + d, slope * k, slack * k.abs());
                    add(1, at(t) + d, slope * q[d], slack * q[d].abs());
                    add(2, at(t) + d, p * ct[d], error * p * ct[d].abs());
                }
            }
        }
        found
    }

    fn check_gradients(&self) -> Result<(), TestCaseError> {
        let inputs = self.inputs();
        let mut random = Random(self.seed ^ 1);
        let cotangent: Vec<f32> = inputs.q.iter().map(|_| random.next()).collect();
        let expected = self.gradients(&inputs, &cotangent);
        let q: Vec<f32> = inputs.q.iter().map(|&q| rounded(self.kind, q.into()) as f32).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for pool in [&Serial as &dyn kernels::Pool, &Threads(2), &Threads(7)] {
                let [mut dq, mut dk, mut dv] = expected.each_ref().map(|x| vec![f32::NAN; x.len()]);
                let mut gradients = Gradients { q: &mut dq, k: &mut dk, v: &mut dv };
                attend_gradient(isa, pool, &self.problem(&inputs, &q), &cotangent, &mut gradients);
                for (name, found, expected) in
                    [("q", dq, &expected[0]), ("k", dk, &expected[1]), ("v", dv, &expected[2])]
                {
                    for (i, (&found, &(expected, tolerance))) in found.iter().zip(expected).enumerate() {
                        let error = (f64::from(found) - expected).abs();
                        prop_assert!(
                            error <= tolerance + 1e-6,
                            "{isa:?} {self:?} gradient of {name}, element {i}: {found}, not {expected} ± {tolerance}"
                        );
                    }
                }
            }
        }
        Ok(())
    }

    fn problem<'a>(&self, inputs: &'a Inputs, q: &'a [f32]) -> Attend<'a> {
        Attend {
            q,
            k: inputs.k.view(),
            v: inputs.v.view(),
            positions: &inputs.positions,
            key_positions: inputs.key_positions.as_deref(),
            window: self.window,
            softcap: self.softcap,
            sizes: self.sizes,
        }
    }

    /// The output in f64, and how far f32 may be from it: rounding of sums, and for each weight that lies so close to
    /// the middle of two values of the cache's type that f32 may round it to the other.
    fn reference(&self, inputs: &Inputs) -> Vec<(f64, f64)> {
        let Sizes { batch, queries, groups, heads, width, keys } = self.sizes;
        let mut out = Vec::new();
        for (b, s, g, r) in (0..batch).flat_map(|b| {
            (0..queries).flat_map(move |s| (0..groups).flat_map(move |g| (0..heads).map(move |r| (b, s, g, r))))
        }) {
            let position = i64::from(inputs.positions[b * queries + s]);
            let row = |t: usize| ((b * groups + g) * keys + t) * width;
            let at = (((b * queries + s) * groups + g) * heads + r) * width;
            let q: Vec<f64> = inputs.q[at..at + width].iter().map(|&q| rounded(self.kind, q.into())).collect();
            let seen = self.seen(inputs, b, position);
            let q = &q;
            let products = |t: usize| q.iter().enumerate().map(move |(i, q)| q * inputs.k.get(row(t) + i, width));
            let scores: Vec<f64> = seen
                .iter()
                .map(|&t| {
                    let score: f64 = products(t).sum();
                    self.softcap.map_or(score, |cap| (score / f64::from(cap)).tanh() * f64::from(cap))
                })
                .collect();
            // The relative error of a weight: of its score and of the exponential.
            let error = |t: usize| 1e-6 + 2e-7 * products(t).map(f64::abs).sum::<f64>();
            let most = seen.iter().map(|&t| error(t)).fold(0.0, f64::max);
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for i in 0..width {
                let (mut sum, mut tolerance) = (0.0, 0.0);
                for (&t, &weight) in seen.iter().zip(&weights) {
                    let v = inputs.v.get(row(t) + i, width);
                    sum += rounded(self.kind, weight) * v;
                    let [low, high] =
                        [1.0 - 2.0 * most, 1.0 + 2.0 * most].map(|near| rounded(self.kind, weight * near));
                    tolerance += (high - low + 2.0 * most * weight) * v.abs();
                }
                out.push(if seen.is_empty() { (0.0, 0.0) } else { (sum / total, tolerance / total + 1e-7) });
            }
        }
        out
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let inputs = self.inputs();
        let expected = self.reference(&inputs);
        let threads = Threads(2);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for pool in [&Serial as &dyn kernels::Pool, &threads] {
                let mut out = vec![f32::NAN; expected.len()];
                attend(isa, pool, &self.problem(&inputs, &inputs.q), &mut out);
                for (i, (&out, &(expected, tolerance))) in out.iter().zip(&expected).enumerate() {
                    let error = (f64::from(out) - expected).abs();
                    prop_assert!(
                        error <= tolerance,
                        "{isa:?} {self:?} element {i}: {out}, not {expected} ± {tolerance}"
                    );
                }
            }
        }
        Ok(())
    }
}

fn types() -> impl Strategy<Value = Type> {
    prop_oneof![Just(Type::F32), Just(Type::Bf16), Just(Type::F16), Just(Type::I8)]
}

fn cases(queries: impl Strategy<Value = usize>, most_keys: usize) -> impl Strategy<Value = Case> {
    let widths = prop_oneof![Just(64usize), Just(80), Just(128), 1usize..40, Just(33), Just(150)];
    let keys = prop_oneof![1usize..80, 1usize..most_keys];
    let sizes = (1usize..4, queries, 1usize..5, 1usize..9, widths, keys).prop_map(|sizes| match sizes {
        (batch, queries, groups, heads, width, keys) if cfg!(miri) => {
            (batch.min(2), queries.min(9), groups.min(2), heads.min(2), width % 10 + 1, keys % 24 + 1)
        }
        sizes => sizes,
    });
    let window = prop::option::of(prop_oneof![Just(1usize), 1usize..100, Just(1000)]);
    let softcap = prop::option::of(prop_oneof![Just(0.5f32), Just(30.0)]);
    (sizes, types(), window, softcap, any::<bool>(), any::<u64>()).prop_map(
        |((batch, queries, groups, heads, width, keys), kind, window, softcap, ring, seed)| {
            let keys = keys.max(queries);
            let sizes = Sizes { batch, queries, groups, heads, width, keys };
            Case { sizes, kind, window, softcap, ring, seed }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 64 }, failure_persistence: None, ..Default::default() })]

    #[test]
    fn one_query(case in cases(Just(1), 700)) {
        case.check()?;
    }

    #[test]
    fn a_few_queries(case in cases(2usize..9, 700)) {
        case.check()?;
    }

    #[test]
    fn many_queries(case in cases(9usize..71, 200)) {
        case.check()?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 48 }, failure_persistence: None, ..Default::default() })]

    #[test]
    fn gradients_of_few_and_many_queries(case in cases(prop_oneof![1usize..9, 9usize..71], 200)) {
        match case.kind {
            Type::I8 => Case { kind: Type::F32, ..case },
            _ => case,
        }.check_gradients()?;
    }
}

/// Integers do not change by little.
#[test]
#[should_panic(expected = "one float type, found int8")]
fn codes_have_no_gradient() {
    let sizes = Sizes { batch: 1, queries: 1, groups: 1, heads: 1, width: 2, keys: 1 };
    let code = || Kv::I8 { q: &[1, 2], scales: &[1.0] };
    let (q, ct) = ([1.0; 2], [1.0; 2]);
    let (k, v) = (code(), code());
    let problem = Attend { q: &q, k, v, positions: &[0], key_positions: None, window: None, softcap: None, sizes };
    let [mut dq, mut dk, mut dv] = [[0.0; 2]; 3];
    let mut gradients = Gradients { q: &mut dq, k: &mut dk, v: &mut dv };
    attend_gradient(Isa::Portable, &Serial, &problem, &ct, &mut gradients);
}

/// More keys than the scores of a block are held for at a time.
#[test]
fn many_keys() {
    for kind in [Type::F32, Type::I8] {
        for queries in [1, if cfg!(miri) { 9 } else { 30 }] {
            let keys = if cfg!(miri) { 200 } else { 25_000 };
            let sizes = Sizes { batch: 1, queries, groups: 1, heads: 1, width: 8, keys };
            let case = Case { sizes, kind, window: None, softcap: None, ring: true, seed: 1 };
            case.check().unwrap();
        }
    }
}

/// In a product that wraps these would be the lengths of what is given.
#[test]
#[should_panic(expected = "q must be")]
fn lengths_that_no_usize_counts_are_refused() {
    let sizes = Sizes { batch: 1 << (usize::BITS - 1), queries: 2, groups: 1, heads: 1, width: 1, keys: 2 };
    let (k, v) = (Kv::F32(&[]), Kv::F32(&[]));
    let problem = Attend { q: &[], k, v, positions: &[], key_positions: None, window: None, softcap: None, sizes };
    attend(Isa::Portable, &Serial, &problem, &mut []);
}

/// A query that sees nothing has nothing to average.
#[test]
fn nothing_to_see() {
    let sizes = Sizes { batch: 1, queries: 1, groups: 1, heads: 2, width: 3, keys: 4 };
    let (q, k, v) = ([1.0; 6], [f32::NAN; 12], [f32::NAN; 12]);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let mut out = [1.0; 6];
        let problem = Attend {
            q: &q,
            k: Kv::F32(&k),
            v: Kv::F32(&v),
            positions: &[-1],
            key_positions: None,
            window: None,
            softcap: None,
            sizes,
        };
        attend(isa, &Serial, &problem, &mut out);
        assert_eq!(out, [0.0; 6]);
    }
}
