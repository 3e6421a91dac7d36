//! Any shapes and numbers for the kernels, in buffers that are just as long as they must be: no panic, and what comes
//! out is near the definition in f64 on every instruction set of the machine. With numbers that are infinite or none,
//! only that nothing panics.
#![no_main]

use half::{bf16, f16};
use kernels::attention::{Attend, Gradients, Kv, KvMut, Place, Sizes, Step, attend, attend_gradient, step};
use kernels::experts::{Experts, experts};
use kernels::matmul::{Operand, Together, matmul};
use kernels::packed::{Bits, Format, Packed, Scales, pack_codes, pack_scales};
use kernels::rope::{Angles, rotate};
use kernels::{Activation, Isa, Linear, Order, Pool, Serial, Threads, Values, Weight};
use kernels::{argmax, gate_gradient, gated, linear, rms_norm, take_rows};
use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if data.is_empty() {
        return;
    }
    let mut input = Input { choices: Unstructured::new(data), bytes: data, at: 0, wild: false };
    // Bytes that are too few for a call are none.
    let _ = call(&mut input);
});

fn call(input: &mut Input) -> Result<()> {
    input.wild = input.choices.ratio(1, 8)?;
    match input.choices.int_in_range(0..=10)? {
        0..=2 => linears(input),
        3 => gates(input),
        4 => mixtures(input),
        5 => attention(input),
        6 => steps(input),
        7 => rows_alone(input),
        8 => slopes(input),
        9 => matrices(input),
        _ => tokens(input),
    }
}

/// What the bytes say: choices one by one, numbers from all of them over and over.
struct Input<'a> {
    choices: Unstructured<'a>,
    bytes: &'a [u8],
    at: usize,
    /// Whether numbers may be infinite, none, or as small and large as they go.
    wild: bool,
}

impl Input<'_> {
    /// A length up to `most`: often one where a vector, a group or a block ends.
    fn length(&mut self, most: usize) -> Result<usize> {
        const ENDS: [usize; 14] = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65];
        Ok(match self.yes()? {
            true => (*self.choices.choose(&ENDS)?).min(most),
            false => self.choices.int_in_range(0..=most)?,
        })
    }

    fn yes(&mut self) -> Result<bool> {
        self.choices.arbitrary()
    }

    fn isa(&mut self) -> Result<Isa> {
        let available: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.available()).collect();
        self.choices.choose(&available).copied()
    }

    fn threads(&mut self) -> Result<Threads> {
        Ok(Threads(self.choices.int_in_range(1..=4)?))
    }

    /// In −4 … 4, or wild.
    fn number(&mut self) -> f32 {
        let byte = self.bytes[self.at % self.bytes.len()];
        let mixed = (u64::from(byte) << 32 | self.at as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.at += 1;
        const WILD: [f32; 8] =
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-40, -0.0];
        match self.wild && byte.is_multiple_of(13) {
            true => WILD[mixed as usize >> 7 & 7],
            false => ((mixed >> 40) as f32 / (1 << 23) as f32 - 1.0) * f32::from(byte % 3 + 1) * 4.0 / 3.0,
        }
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }

    /// An integer from `low` to `high`.
    fn integer(&mut self, low: i32, high: i32) -> i32 {
        let byte = self.bytes[self.at % self.bytes.len()];
        let mixed = (u32::from(byte) ^ self.at as u32).wrapping_mul(0x9e37_79b9) >> 8;
        self.at += 1;
        low + (mixed % (high - low + 1) as u32) as i32
    }

    fn close(&self, what: &str, found: &[f32], expected: &[(f64, f64)]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (&found, &(expected, tolerance))) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs();
            assert!(self.wild || error <= tolerance, "{what}: {expected} ± {tolerance} required at {i}, found {found}");
        }
    }
}

/// The same bits, or both no number.
fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

/// Numbers of one of the types that weights and caches have.
enum Floats {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Floats {
    fn new(input: &mut Input, count: usize) -> Result<Floats> {
        let values = input.numbers(count);
        Ok(match input.choices.int_in_range(0..=2)? {
            0 => Floats::F32(values),
            1 => Floats::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            _ => Floats::F16(values.into_iter().map(f16::from_f32).collect()),
        })
    }

    fn get(&self, i: usize) -> f64 {
        match self {
            Floats::F32(values) => values[i].into(),
            Floats::Bf16(values) => values[i].into(),
            Floats::F16(values) => values[i].into(),
        }
    }

    /// x as it is multiplied with these.
    fn round(&self, x: f32) -> f64 {
        match self {
            Floats::F32(_) => x.into(),
            Floats::Bf16(_) => bf16::from_f32(x).into(),
            Floats::F16(_) => f16::from_f32(x).into(),
        }
    }

    /// How far from each other two neighbours of this type are at most, for 1.
    fn step(&self) -> f64 {
        match self {
            Floats::F32(_) => 1e-6,
            Floats::Bf16(_) => 0.5f64.powi(7),
            Floats::F16(_) => 0.5f64.powi(10),
        }
    }

    fn values(&self) -> Values<'_> {
        match self {
            Floats::F32(values) => Values::F32(values),
            Floats::Bf16(values) => Values::Bf16(values),
            Floats::F16(values) => Values::F16(values),
        }
    }
}

/// One or several weights of one shape, one behind the other.
struct Weights {
    k: usize,
    n: usize,
    store: Store,
}

enum Store {
    Rows { floats: Floats, order: Order },
    Packed { format: Format, codes: Vec<i8>, q: Vec<u8>, scales: [Vec<f32>; 2], places: Places },
}

/// Scales and minima where a packed weight has them.
enum Places {
    F32([Vec<f32>; 2]),
    F16([Vec<f16>; 2]),
}

impl Weights {
    fn new(input: &mut Input, k: usize, n: usize, count: usize) -> Result<Weights> {
        if input.yes()? {
            let order = if input.yes()? { Order::Kn } else { Order::Nk };
            return Ok(Weights { k, n, store: Store::Rows { floats: Floats::new(input, count * k * n)?, order } });
        }
        let bits = if input.yes()? { Bits::Eight } else { Bits::Four };
        let group = if input.yes()? { 16 } else { 32 };
        let format = Format { bits, group, mins: input.yes()? };
        let (low, high) = format.codes();
        let codes: Vec<i8> = (0..count * k * n).map(|_| input.integer(i32::from(low), i32::from(high)) as i8).collect();
        let groups = n * k.div_ceil(group);
        let halves = input.yes()?;
        let scales = [(); 2].map(|()| {
            let exact = |x: f32| if halves { f16::from_f32(x).to_f32() } else { x };
            (0..count * groups).map(|_| exact(input.number() / 16.0)).collect::<Vec<f32>>()
        });
        let bytes: usize = format.q_shape(k, n).iter().product();
        let mut q = vec![0; count * bytes];
        let places: usize = format.scales_shape(k, n).iter().product();
        let placed = scales.each_ref().map(|scales| {
            let mut out = vec![f32::NAN; count * places];
            for i in 0..count {
                let to = &mut out[i * places..][..places];
                pack_scales(format, k, n, &scales[i * groups..][..groups], to);
            }
            out
        });
        for i in 0..count {
            pack_codes(format, k, n, &codes[i * k * n..][..k * n], &mut q[i * bytes..][..bytes]);
        }
        let places = match halves {
            true => Places::F16(placed.map(|scales| scales.into_iter().map(f16::from_f32).collect())),
            false => Places::F32(placed),
        };
        Ok(Weights { k, n, store: Store::Packed { format, codes, q, scales, places } })
    }

    fn linear(&self) -> Linear<'_> {
        let weight = match &self.store {
            Store::Rows { floats, order } => Weight::Rows { values: floats.values(), order: *order },
            Store::Packed { format, q, places, .. } => {
                let [scales, mins] = match places {
                    Places::F32(both) => both.each_ref().map(|values| Scales::F32(values)),
                    Places::F16(both) => both.each_ref().map(|values| Scales::F16(values)),
                };
                let mins = format.mins.then_some(mins);
                Weight::Packed(Packed { bits: format.bits, group: format.group, q, scales, mins })
            }
        };
        Linear { weight, k: self.k, n: self.n }
    }

    /// The value of weight `i` of those that lie one behind the other.
    fn value(&self, i: usize, k: usize, n: usize) -> f64 {
        self.parts(i, k, n).iter().sum()
    }

    /// What its value is the sum of, and multiplied by itself.
    fn parts(&self, i: usize, k: usize, n: usize) -> [f64; 2] {
        match &self.store {
            Store::Rows { floats, order: Order::Kn } => [floats.get((i * self.k + k) * self.n + n), 0.0],
            Store::Rows { floats, order: Order::Nk } => [floats.get((i * self.n + n) * self.k + k), 0.0],
            Store::Packed { format, codes, scales, .. } => {
                let output = i * self.n + n;
                let group = output * self.k.div_ceil(format.group) + k / format.group;
                let min = if format.mins { scales[1][group] } else { 0.0 };
                [f64::from(scales[0][group]) * f64::from(codes[output * self.k + k]), min.into()]
            }
        }
    }

    /// A row of x as it is multiplied with them.
    fn row(&self, x: &[f32]) -> Vec<f64> {
        match &self.store {
            Store::Rows { floats, .. } => x.iter().map(|&x| floats.round(x)).collect(),
            Store::Packed { format, .. } => x
                .chunks(format.group)
                .flat_map(|x| {
                    let scale = x.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
                    let code =
                        move |x: &f32| if scale < f32::MIN_POSITIVE { 0.0 } else { (x / scale).round_ties_even() };
                    x.iter().map(move |x| f64::from(code(x)) * f64::from(scale))
                })
                .collect(),
        }
    }

    /// A row · weight `i`, and the sum of the absolute values of what is added.
    fn product(&self, i: usize, x: &[f32]) -> Vec<(f64, f64)> {
        let x = self.row(x);
        let term = |n: usize| x.iter().enumerate().flat_map(move |(k, x)| self.parts(i, k, n).map(|w| x * w));
        (0..self.n).map(|n| term(n).fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))).collect()
    }

    /// How far the product of a row may be off where the row itself is only near to `x`: another rounding of each.
    fn loose(&self, i: usize, x: &[f32], n: usize) -> f64 {
        let most = x.iter().fold(0f64, |most, &x| most.max(f64::from(x).abs()));
        let all: f64 = (0..self.k).map(|k| self.value(i, k, n).abs()).sum();
        all * most
            * match &self.store {
                Store::Rows { floats, .. } => floats.step() + 1e-5,
                Store::Packed { .. } => 1.01 / 127.0,
            }
    }
}

/// Rows, terms and outputs, the product not too large to compute by definition.
fn shape(input: &mut Input) -> Result<[usize; 3]> {
    let rows = input.length(140)?;
    let k = input.length((300_000 / rows.max(1)).min(320))?;
    Ok([rows, k, input.length((300_000 / (rows * k).max(1)).min(700))?])
}

/// What products may be off.
fn near(products: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    products.into_iter().map(|(y, size)| (y, 4e-6 * size + 1e-30)).collect()
}

fn linears(input: &mut Input) -> Result<()> {
    let [rows, k, n] = shape(input)?;
    let (isa, threads, count) = (input.isa()?, input.threads()?, input.choices.int_in_range(0..=3)?);
    let mut weights = Vec::new();
    for i in 0..count {
        weights.push(Weights::new(input, k, n / (i + 1), 1)?);
    }
    let x = input.numbers(rows * k);
    let add = (count == 1 && input.yes()?).then(|| input.numbers(rows * n));
    let linears: Vec<Linear> = weights.iter().map(Weights::linear).collect();
    let run = |pool: &dyn Pool| {
        let mut out: Vec<Vec<f32>> = weights.iter().map(|weight| vec![f32::NAN; rows * weight.n]).collect();
        let mut to: Vec<&mut [f32]> = out.iter_mut().map(|out| &mut out[..]).collect();
        linear(isa, pool, &x, rows, &linears, add.as_deref(), &mut to);
        out
    };
    let (out, again) = (run(&Serial), run(&threads));
    for ((weight, out), again) in weights.iter().zip(&out).zip(&again) {
        assert!(same(out, again), "linear: the same required from {threads:?}");
        let all = (0..rows).flat_map(|r| weight.product(0, &x[r * k..][..k]));
        let all = all.enumerate().map(|(i, (y, size))| match &add {
            Some(add) => (y + f64::from(add[i]), size + f64::from(add[i]).abs()),
            None => (y, size),
        });
        input.close("linear", out, &near(all.collect()));
        if !matches!(weight.store, Store::Rows { order: Order::Kn, .. }) && weight.n > 0 {
            let ids: Vec<i32> = (0..rows).map(|_| input.integer(-3, n as i32 + 3)).collect();
            let mut taken = vec![f32::NAN; rows * k];
            take_rows(&weight.linear(), &ids, &mut taken);
            let id = |r: usize| (ids[r].max(0) as usize).min(weight.n - 1);
            let value = |i: usize| weight.value(0, i % k, id(i / k));
            let exact: Vec<_> = (0..rows * k).map(|i| (value(i), 1e-6 * (value(i).abs() + 40.0))).collect();
            input.close("take_rows", &taken, &exact);
        }
    }
    Ok(())
}

const ACTIVATIONS: [Activation; 4] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            x / 2.0 * (1.0 + u.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Gelu => {
            // Taylor's series of erf, whose terms cancel too much where erf is ±1 anyway.
            let z = x / 2f64.sqrt();
            let mut term = z;
            let series = (0..80).fold(0.0, |sum, n| {
                let y = sum + term / f64::from(2 * n + 1);
                term *= -z * z / f64::from(n + 1);
                y
            });
            let erf = if z.abs() > 4.5 { z.signum() } else { series * 2.0 / std::f64::consts::PI.sqrt() };
            x / 2.0 * (1.0 + erf)
        }
    }
}

/// act(gate) · up of a row for weight `i`, and how far it may be off.
fn gate(gates: &Weights, ups: &Weights, activation: Activation, i: usize, x: &[f32]) -> Vec<(f64, f64)> {
    let both = gates.product(i, x).into_iter().zip(ups.product(i, x));
    both.map(|(g, u)| {
        let size = (g.1 + 1.0) * (u.0.abs() + 1.0) + g.0.abs() * u.1;
        (activate(activation, g.0) * u.0, 4e-6 * size)
    })
    .collect()
}

fn gates(input: &mut Input) -> Result<()> {
    let [rows, k, n] = shape(input)?;
    let (isa, threads) = (input.isa()?, input.threads()?);
    let activation = *input.choices.choose(&ACTIVATIONS)?;
    let (gates, ups) = (Weights::new(input, k, n, 1)?, Weights::new(input, k, n, 1)?);
    let x = input.numbers(rows * k);
    let run = |pool: &dyn Pool| {
        let mut out = vec![f32::NAN; rows * n];
        gated(isa, pool, &x, rows, &gates.linear(), &ups.linear(), activation, &mut out);
        out
    };
    let out = run(&Serial);
    assert!(same(&out, &run(&threads)), "gated: the same required from {threads:?}");
    let all: Vec<_> = (0..rows).flat_map(|r| gate(&gates, &ups, activation, 0, &x[r * k..][..k])).collect();
    input.close("gated", &out, &all);
    Ok(())
}

fn mixtures(input: &mut Input) -> Result<()> {
    let (rows, m, f) = (input.length(40)?, input.length(40)?, input.length(40)?);
    let (count, each) = (input.choices.int_in_range(0..=4)?, input.choices.int_in_range(0..=3)?);
    let (isa, threads) = (input.isa()?, input.threads()?);
    let activation = *input.choices.choose(&ACTIVATIONS)?;
    let gates = Weights::new(input, m, f, count)?;
    let ups = Weights::new(input, m, f, count)?;
    let downs = Weights::new(input, f, m, count)?;
    // So small that nothing in between is more than f16 holds.
    let x: Vec<f32> = input.numbers(rows * m).iter().map(|x| x / 64.0).collect();
    let ids: Vec<i32> = (0..rows * each).map(|_| input.integer(-1, count as i32)).collect();
    let shares = input.numbers(rows * each);
    let (gate_all, up_all, down_all) = (gates.linear(), ups.linear(), downs.linear());
    let all = Experts { gate: &gate_all, up: &up_all, down: &down_all, count };
    let run = |pool: &dyn Pool| {
        let mut out = vec![f32::NAN; rows * m];
        experts(isa, pool, &x, rows, &all, activation, &ids, &shares, &mut out);
        out
    };
    let out = run(&Serial);
    assert!(same(&out, &run(&threads)), "experts: the same required from {threads:?}");
    let mut expected = vec![(0.0, 1e-30); rows * m];
    for (pair, (&id, &share)) in ids.iter().zip(&shares).enumerate() {
        let Some(e) = usize::try_from(id).ok().filter(|&e| e < count) else { continue };
        let row = pair / each;
        let h = gate(&gates, &ups, activation, e, &x[row * m..][..m]);
        let off = h.iter().fold(0f64, |most, h| most.max(h.1));
        let h: Vec<f32> = h.into_iter().map(|(h, _)| h as f32).collect();
        for (n, (y, size)) in downs.product(e, &h).into_iter().enumerate() {
            let all: f64 = (0..f).map(|k| downs.value(e, k, n).abs()).sum();
            let (sum, tolerance) = &mut expected[row * m + n];
            *sum += f64::from(share) * y;
            *tolerance += f64::from(share).abs() * (1e-5 * size + downs.loose(e, &h, n) + 2.0 * off * all);
        }
    }
    input.close("experts", &out, &expected);
    Ok(())
}

/// Keys or values of a cache, (B, G, T, K).
enum Cache {
    Floats(Floats),
    I8(Vec<i8>, Vec<f32>),
}

impl Cache {
    /// Two of one type.
    fn both(input: &mut Input, sizes: Sizes) -> Result<[Cache; 2]> {
        let rows = sizes.batch * sizes.groups * sizes.keys;
        if input.choices.ratio(1, 4)? {
            return Ok([(); 2].map(|()| {
                let q = (0..rows * sizes.width).map(|_| input.integer(-128, 127) as i8).collect();
                Cache::I8(q, (0..rows).map(|_| input.number() / 64.0).collect())
            }));
        }
        let first = Floats::new(input, rows * sizes.width)?;
        let other = input.numbers(rows * sizes.width);
        let second = match first {
            Floats::F32(_) => Floats::F32(other),
            Floats::Bf16(_) => Floats::Bf16(other.into_iter().map(bf16::from_f32).collect()),
            Floats::F16(_) => Floats::F16(other.into_iter().map(f16::from_f32).collect()),
        };
        Ok([first, second].map(Cache::Floats))
    }

    fn view(&self) -> Kv<'_> {
        match self {
            Cache::Floats(Floats::F32(x)) => Kv::F32(x),
            Cache::Floats(Floats::Bf16(x)) => Kv::Bf16(x),
            Cache::Floats(Floats::F16(x)) => Kv::F16(x),
            Cache::I8(q, scales) => Kv::I8 { q, scales },
        }
    }

    fn view_mut(&mut self) -> KvMut<'_> {
        match self {
            Cache::Floats(Floats::F32(x)) => KvMut::F32(x),
            Cache::Floats(Floats::Bf16(x)) => KvMut::Bf16(x),
            Cache::Floats(Floats::F16(x)) => KvMut::F16(x),
            Cache::I8(q, scales) => KvMut::I8 { q, scales },
        }
    }

    fn get(&self, i: usize, width: usize) -> f64 {
        match self {
            Cache::Floats(floats) => floats.get(i),
            Cache::I8(q, scales) => f64::from(q[i]) * f64::from(scales[i / width]),
        }
    }

    fn round(&self, x: f32) -> f64 {
        match self {
            Cache::Floats(floats) => floats.round(x),
            Cache::I8(..) => x.into(),
        }
    }

    fn step(&self) -> f64 {
        match self {
            Cache::Floats(floats) => floats.step(),
            Cache::I8(..) => 1e-6,
        }
    }
}

/// Attention by definition, and how far it may be off.
#[allow(clippy::too_many_arguments)]
fn attention_of(
    q: &[f32],
    [k, v]: [&Cache; 2],
    positions: &[i32],
    key_positions: Option<&[i32]>,
    window: Option<usize>,
    softcap: Option<f32>,
    sizes: Sizes,
) -> Vec<(f64, f64)> {
    let Sizes { batch, queries, groups, heads, width, keys } = sizes;
    let mut out = Vec::new();
    for row in 0..batch * queries * groups * heads {
        let (g, s) = (row / heads % groups, row / heads / groups % queries);
        let slot = row / heads / groups / queries;
        let position = i64::from(positions[slot * queries + s]);
        let key = |t: usize| ((slot * groups + g) * keys + t) * width;
        let q: Vec<f64> = q[row * width..][..width].iter().map(|&q| k.round(q)).collect();
        let seen = |&t: &usize| {
            let at = key_positions.map_or(t as i64, |held| held[slot * keys + t].into());
            at >= 0 && at <= position && window.is_none_or(|window| ((position - at) as usize) < window)
        };
        let seen: Vec<usize> = (0..keys).filter(seen).collect();
        let mut off = 0f64;
        let mut scores = Vec::new();
        for &t in &seen {
            let terms = q.iter().enumerate().map(|(i, q)| q * k.get(key(t) + i, width));
            let (score, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
            off = off.max(4e-7 * size + 2e-6 + f64::from(softcap.unwrap_or(0.0)) * 1e-6);
            scores.push(softcap.map_or(score, |cap| (score / f64::from(cap)).tanh() * f64::from(cap)));
        }
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for i in 0..width {
            let all = seen.iter().zip(&weights).map(|(&t, weight)| (v.get(key(t) + i, width), weight));
            let (sum, size) = all.fold((0.0, 0.0), |(sum, size), (v, weight)| {
                // f16 below 2⁻¹⁴ has steps of 2⁻²⁴.
                (sum + weight * v, size + (weight * (2.0 * k.step() + 4.0 * off) + 1e-7) * v.abs())
            });
            out.push(if seen.is_empty() { (0.0, 0.0) } else { (sum / total, size / total + 1e-6) });
        }
    }
    out
}

fn sizes(input: &mut Input) -> Result<Sizes> {
    let [batch, groups] = [input.length(3)?, input.length(3)?];
    let most_heads = if input.choices.ratio(1, 8)? { 70 } else { 6 };
    let (queries, heads) = (input.length(24)?, input.length(most_heads)?);
    let width = input.length(70)?;
    let rows = batch * groups * queries * heads;
    let keys = input.length((400_000 / (rows * width).max(1)).min(600))?;
    Ok(Sizes { batch, queries, groups, heads, width, keys })
}

/// A window and a softcap.
fn options(input: &mut Input) -> Result<(Option<usize>, Option<f32>)> {
    let window = match input.yes()? {
        true => Some(if input.choices.ratio(1, 16)? { usize::MAX } else { input.length(80)? }),
        false => None,
    };
    let softcap = if input.yes()? { Some(*input.choices.choose(&[0.5, 30.0])?) } else { None };
    Ok((window, softcap))
}

fn attention(input: &mut Input) -> Result<()> {
    let sizes = sizes(input)?;
    let Sizes { batch, queries, groups, heads, width, keys } = sizes;
    let (isa, threads, serial) = (input.isa()?, input.threads()?, input.yes()?);
    let (window, softcap) = options(input)?;
    let [k, v] = Cache::both(input, sizes)?;
    let q = input.numbers(batch * queries * groups * heads * width);
    let most = keys as i32 + 3;
    let positions: Vec<i32> = match input.choices.ratio(1, 16)? {
        true => (0..batch * queries).map(|i| if i % 2 == 0 { i32::MAX } else { i32::MIN }).collect(),
        false => (0..batch * queries).map(|_| input.integer(-2, most)).collect(),
    };
    let key_positions: Option<Vec<i32>> =
        input.yes()?.then(|| (0..batch * keys).map(|_| input.integer(-3, most)).collect());
    let key_positions = key_positions.as_deref();
    let problem =
        Attend { q: &q, k: k.view(), v: v.view(), positions: &positions, key_positions, window, softcap, sizes };
    let mut out = vec![f32::NAN; q.len()];
    let pool = if serial { &Serial as &dyn Pool } else { &threads };
    attend(isa, pool, &problem, &mut out);
    let expected = attention_of(&q, [&k, &v], &positions, key_positions, window, softcap, sizes);
    input.close("attend", &out, &expected);
    if matches!(problem.k, Kv::I8 { .. }) {
        return Ok(());
    }
    let cotangent = input.numbers(q.len());
    let run = |pool: &dyn Pool| {
        let all = batch * groups * keys * width;
        let [mut dq, mut dk, mut dv] = [q.len(), all, all].map(|len| vec![f32::NAN; len]);
        let mut gradients = Gradients { q: &mut dq, k: &mut dk, v: &mut dv };
        attend_gradient(isa, pool, &problem, &cotangent, &mut gradients);
        [dq, dk, dv]
    };
    for (alone, shared) in run(&Serial).iter().zip(run(&threads)) {
        // The parts of a head's queries are added in another order.
        let size = alone.iter().fold(0.0, |most: f64, x| most.max(f64::from(*x).abs()));
        let all: Vec<_> = alone.iter().map(|&x| (f64::from(x), 1e-4 * size + 1e-30)).collect();
        input.close("attend_gradient", &shared, &all);
    }
    Ok(())
}

fn matrices(input: &mut Input) -> Result<()> {
    let [m, k, n] = shape(input)?;
    let batch = input.length(3)?;
    let (isa, threads) = (input.isa()?, input.threads()?);
    let sizes = kernels::matmul::Sizes { batch, m, k, n };
    let (left, right) = (Floats::new(input, batch * m * k)?, Floats::new(input, batch * k * n)?);
    let [terms_of_left, terms_of_right] = [input.yes()?, input.yes()?];
    fn operand(floats: &Floats, terms: bool) -> Operand<'_> {
        let together = if terms { Together::Terms } else { Together::Lines };
        Operand { values: floats.values(), together }
    }
    let run = |pool: &dyn Pool| {
        let mut out = vec![f32::NAN; batch * m * n];
        matmul(isa, pool, sizes, operand(&left, terms_of_left), operand(&right, terms_of_right), &mut out);
        out
    };
    let out = run(&Serial);
    assert!(same(&out, &run(&threads)), "matmul: the same required from {threads:?}");
    let expected = (0..batch * m * n).map(|at| {
        let (i, row, column) = (at / (m * n), at / n % m, at % n);
        (0..k).fold((0.0, 0.0), |(sum, size), term| {
            let x = left.get(i * m * k + if terms_of_left { row * k + term } else { term * m + row });
            let w = right.get(i * k * n + if terms_of_right { column * k + term } else { term * n + column });
            (sum + x * w, size + (x * w).abs())
        })
    });
    input.close("matmul", &out, &near(expected.collect()));
    Ok(())
}

/// The derivative of act(gate) · up beside quotients of differences.
fn slopes(input: &mut Input) -> Result<()> {
    let len = input.length(40_000)?;
    let (isa, threads) = (input.isa()?, input.threads()?);
    let activation = *input.choices.choose(&ACTIVATIONS)?;
    let [gates, ups, cotangent] = [(); 3].map(|()| input.numbers(len));
    let [mut of_gate, mut of_up] = [(); 2].map(|()| vec![f32::NAN; len]);
    gate_gradient(isa, &threads, activation, &gates, &ups, &cotangent, &mut of_gate, &mut of_up);
    let numbers = |i: usize| [gates[i], ups[i], cotangent[i]].map(f64::from);
    let by_gate = (0..len).map(|i| {
        let [x, up, ct] = numbers(i);
        let slope = (activate(activation, x + 1e-4) - activate(activation, x - 1e-4)) / 2e-4;
        // A quotient over the corner of a relu is anything between its slopes.
        let corner = if x.abs() <= 1e-4 { 1.0 } else { 0.0 };
        (ct * up * slope, (corner + 1e-5) * (ct * up).abs() * (1.0 + x.abs()) + 1e-30)
    });
    input.close("gate_gradient, of the gate", &of_gate, &by_gate.collect::<Vec<_>>());
    let by_up = (0..len).map(|i| {
        let [x, _, ct] = numbers(i);
        (ct * activate(activation, x), 4e-6 * ct.abs() * (1.0 + x.abs()) + 1e-30)
    });
    input.close("gate_gradient, of up", &of_up, &by_up.collect::<Vec<_>>());
    Ok(())
}

/// x of each head rotated by definition, and how far it may be off.
fn rotated(x: &[f32], angles: Option<Angles>, half: usize, [heads, width]: [usize; 2], scale: f32) -> Vec<(f64, f64)> {
    let value = |i: usize| {
        let (row, d) = (i / width, i % width);
        let get = |d: usize| f64::from(x[row * width + d]);
        let turned = match angles {
            Some(Angles { cos, sin }) if d < 2 * half => {
                let at = row / heads * half + d % half;
                let (cos, sin) = (f64::from(cos[at]), f64::from(sin[at]));
                if d < half { get(d) * cos - get(d + half) * sin } else { get(d) * cos + get(d - half) * sin }
            }
            _ => get(d),
        };
        (turned * f64::from(scale), 1e-5 * f64::from(scale).abs())
    };
    (0..x.len()).map(value).collect()
}

/// cos and sin of `count` positions, and elements of a half.
fn angles(input: &mut Input, count: usize, width: usize) -> Result<(Vec<f32>, Vec<f32>, usize)> {
    let half = input.length(width / 2)?;
    let mut numbers = || (0..count * half).map(|_| input.integer(-64, 64) as f32 / 64.0).collect();
    Ok((numbers(), numbers(), half))
}

fn steps(input: &mut Input) -> Result<()> {
    let sizes = sizes(input)?;
    let Sizes { batch, queries, groups, heads, width, keys } = sizes;
    let (isa, threads, serial) = (input.isa()?, input.threads()?, input.yes()?);
    let pool = if serial { &Serial as &dyn Pool } else { &threads };
    let (window, softcap) = options(input)?;
    let mut caches = Cache::both(input, sizes)?;
    let q = input.numbers(batch * queries * groups * heads * width);
    let new = [(); 2].map(|()| input.numbers(batch * queries * groups * width));
    let (cos, sin, half) = angles(input, batch * queries, width)?;
    let angles = input.yes()?.then_some(Angles { cos: &cos, sin: &sin });
    let scale = input.integer(1, 64) as f32 / 64.0;
    let most = 2 * keys as i32 + 3;
    let far = input.choices.ratio(1, 16)?;
    let first: Vec<i32> =
        (0..batch).map(|slot| if far { [i32::MAX, i32::MIN][slot % 2] } else { input.integer(-3, most) }).collect();
    let valid: Option<Vec<i32>> =
        input.yes()?.then(|| (0..batch).map(|_| input.integer(-1, queries as i32 + 1)).collect());
    let place = Place { first: &first, valid: valid.as_deref(), ring: input.yes()? };
    let positions: Vec<i32> =
        (0..batch * queries).map(|i| first[i / queries].saturating_add((i % queries) as i32)).collect();
    let all = batch * groups * keys * width;
    let before = caches.each_ref().map(|cache| (0..all).map(|i| cache.get(i, width)).collect::<Vec<f64>>());
    let mut out = vec![f32::NAN; q.len()];
    let [k, v] = &mut caches;
    let [key, value] = &new;
    let positions_of = &positions;
    let arguments =
        Step { q: &q, k: key, v: value, angles, scale, positions: positions_of, place, window, softcap, sizes };
    step(isa, pool, &arguments, &mut k.view_mut(), &mut v.view_mut(), &mut out);
    if input.wild {
        return Ok(());
    }

    // What the caches hold: the last token that went to a place, and all others as they were.
    let count = |slot: usize| valid.as_ref().map_or(queries, |valid| valid[slot].clamp(0, queries as i32) as usize);
    let turned = [rotated(key, angles, half, [groups, width], 1.0), rotated(value, None, 0, [groups, width], 1.0)];
    for ((cache, before), new) in caches.iter().zip(&before).zip(&turned) {
        for (i, &before) in before.iter().enumerate() {
            let (row, t) = (i / width, i / width % keys);
            let (slot, g) = (row / keys / groups, row / keys % groups);
            let s = (0..count(slot)).rfind(|&s| {
                let position = i64::from(first[slot]) + s as i64;
                let at = if place.ring { position.rem_euclid(keys as i64) } else { position };
                position >= 0 && at == t as i64
            });
            let found = cache.get(i, width);
            let Some(s) = s else {
                assert!(found == before, "store: {before} kept required at {i}, found {found}");
                continue;
            };
            let head = &new[((slot * queries + s) * groups + g) * width..][..width];
            let (expected, off) = head[i % width];
            let most = head.iter().fold(0f64, |most, x| most.max(x.0.abs()));
            let tolerance = off
                + match cache {
                    Cache::Floats(floats) => floats.step() * expected.abs(),
                    Cache::I8(..) => most / 127.0 * 0.51,
                };
            assert!((found - expected).abs() <= tolerance, "store: {expected} ± {tolerance} at {i}, found {found}");
        }
    }
    let held: Vec<i32> = (0..batch * keys)
        .map(|i| {
            let last = (i64::from(first[i / keys]) + count(i / keys) as i64 - 1).min(i32::MAX.into());
            (last - (last - (i % keys) as i64).rem_euclid(keys as i64)).max(-1) as i32
        })
        .collect();
    let q: Vec<f32> = rotated(&q, angles, half, [groups * heads, width], scale).iter().map(|q| q.0 as f32).collect();
    let [k, v] = &caches;
    let mut expected = attention_of(&q, [k, v], &positions, place.ring.then_some(&held), window, softcap, sizes);
    // Queries that are off a little give scores that are: as much as keys and values are large.
    let largest = |cache: &Cache| (0..all).fold(0f64, |most, i| most.max(cache.get(i, width).abs()));
    let off = (4.0 * k.step() + 2e-5) * largest(k) * width as f64 * largest(v) * 8.0;
    expected.iter_mut().filter(|expected| expected.1 > 0.0).for_each(|expected| expected.1 += off);
    input.close("step", &out, &expected);
    Ok(())
}

fn rows_alone(input: &mut Input) -> Result<()> {
    let (isa, threads) = (input.isa()?, input.threads()?);
    let (rows, width) = (input.length(70)?, input.length(400)?);
    let (x, weight) = (input.numbers(rows * width), Floats::new(input, width)?);
    let offset = f32::from(input.yes()?);
    let run = |pool: &dyn Pool| {
        let mut out = vec![f32::NAN; x.len()];
        rms_norm(isa, pool, &x, weight.values(), 1e-5, offset, &mut out);
        out
    };
    let out = run(&Serial);
    assert!(same(&out, &run(&threads)), "rms_norm: the same required from {threads:?}");
    let expected = x.chunks(width.max(1)).flat_map(|x| {
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
        let weight = &weight;
        x.iter().enumerate().map(move |(i, &x)| {
            let y = f64::from(x) / (mean + 1e-5).sqrt();
            (y * (f64::from(offset) + weight.get(i)), 2e-6 * y.abs() * (1.0 + weight.get(i).abs()) + 1e-9)
        })
    });
    input.close("rms_norm", &out, &expected.collect::<Vec<_>>());

    let (heads, width) = (input.length(8)?, input.length(70)?);
    let x = input.numbers(rows * heads * width);
    let (cos, sin, half) = angles(input, rows, width)?;
    let angles = input.yes()?.then_some(Angles { cos: &cos, sin: &sin });
    let run = |pool: &dyn Pool| {
        let mut out = vec![f32::NAN; x.len()];
        rotate(isa, pool, &x, angles, [heads, width], 0.3, &mut out);
        out
    };
    let out = run(&Serial);
    assert!(same(&out, &run(&threads)), "rotate: the same required from {threads:?}");
    input.close("rotate", &out, &rotated(&x, angles, half, [heads, width], 0.3));
    Ok(())
}

fn tokens(input: &mut Input) -> Result<()> {
    let (isa, threads) = (input.isa()?, input.threads()?);
    let (rows, width) = (input.choices.int_in_range(0..=4)?, input.choices.int_in_range(1..=20_000)?);
    // Few values, so that several are the largest.
    let x: Vec<f32> = input.numbers(rows * width).iter().map(|x| x.round()).collect();
    for pool in [&Serial as &dyn Pool, &threads] {
        let mut out = vec![-1; rows];
        argmax(isa, pool, &x, &mut out);
        for (row, (x, &found)) in x.chunks(width).zip(&out).enumerate() {
            let nan = x.iter().position(|x| x.is_nan());
            let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let expected = nan.or_else(|| x.iter().position(|&x| x == most));
            assert_eq!(Some(found as usize), expected, "argmax of row {row}");
        }
    }
    Ok(())
}
