//! Every kernel against the definition in f64, on every instruction set of the machine.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::packed::{Bits, Format, Scales, pack_codes, pack_scales};
use crate::{Serial, Threads};

/// How a test's weight is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Store {
    F32(Order),
    Bf16(Order),
    F16(Order),
    Packed { format: Format, wide: bool },
}

fn stores() -> Vec<Store> {
    let mut all = Vec::new();
    for order in [Order::Kn, Order::Nk] {
        all.extend([Store::F32(order), Store::Bf16(order), Store::F16(order)]);
    }
    for bits in [Bits::Eight, Bits::Four] {
        for group in [16, 32] {
            for mins in [false, true] {
                all.extend([false, true].map(|wide| Store::Packed { format: Format { bits, group, mins }, wide }));
            }
        }
    }
    all
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

/// Random numbers (xorshift, Marsaglia 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In −1…1.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }
}

/// A weight and what it means.
struct Owned {
    store: Store,
    k: usize,
    n: usize,
    f32s: Vec<f32>,
    bf16s: Vec<bf16>,
    f16s: Vec<f16>,
    q: Vec<u8>,
    scales: (Vec<f16>, Vec<f32>),
    mins: (Vec<f16>, Vec<f32>),
    /// (N, K) codes, and (N, K/g) scales and minima.
    codes: Vec<i8>,
    groups: [Vec<f64>; 2],
}

impl Owned {
    fn new(store: Store, k: usize, n: usize, random: &mut Random) -> Owned {
        let mut owned = Owned {
            store,
            k,
            n,
            f32s: random.floats(k * n),
            bf16s: Vec::new(),
            f16s: Vec::new(),
            q: Vec::new(),
            scales: Default::default(),
            mins: Default::default(),
            codes: Vec::new(),
            groups: Default::default(),
        };
        owned.bf16s = owned.f32s.iter().map(|&w| bf16::from_f32(w)).collect();
        owned.f16s = owned.f32s.iter().map(|&w| f16::from_f32(w)).collect();
        if let Store::Packed { format, wide } = store {
            let (low, high) = format.codes();
            let span = (i32::from(high) - i32::from(low) + 1) as u64;
            owned.codes = (0..k * n).map(|_| ((random.next() % span) as i32 + i32::from(low)) as i8).collect();
            owned.q = vec![0; format.q_shape(k, n).iter().product()];
            pack_codes(format, k, n, &owned.codes, &mut owned.q);
            let mut floats = || {
                let values = random.floats(n * k.div_ceil(format.group));
                let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                let mut packed = vec![f16::NAN; format.scales_shape(k, n).iter().product()];
                let mut packed_wide = vec![f32::NAN; packed.len()];
                pack_scales(format, k, n, &halves, &mut packed);
                pack_scales(format, k, n, &values, &mut packed_wide);
                let exact = values.iter().zip(halves).map(|(&v, h)| f64::from(if wide { v } else { h.to_f32() }));
                (exact.collect(), (packed, packed_wide))
            };
            (owned.groups[0], owned.scales) = floats();
            (owned.groups[1], owned.mins) = floats();
        }
        owned
    }

    fn linear(&self) -> Linear<'_> {
        let weight = match self.store {
            Store::F32(order) => Weight::Rows { values: Values::F32(&self.f32s), order },
            Store::Bf16(order) => Weight::Rows { values: Values::Bf16(&self.bf16s), order },
            Store::F16(order) => Weight::Rows { values: Values::F16(&self.f16s), order },
            Store::Packed { format: Format { bits, group, mins }, wide } => {
                let scales = |halves, floats| if wide { Scales::F32(floats) } else { Scales::F16(halves) };
                Weight::Packed(Packed {
                    bits,
                    group,
                    q: &self.q,
                    scales: scales(&self.scales.0, &self.scales.1),
                    mins: mins.then(|| scales(&self.mins.0, &self.mins.1)),
                })
            }
        };
        Linear { weight, k: self.k, n: self.n }
    }

    /// The value of a float weight.
    fn value(&self, k: usize, n: usize) -> f64 {
        self.parts(k, n).iter().sum()
    }

    /// What its value is the sum of, and multiplied by itself.
    fn parts(&self, k: usize, n: usize) -> [f64; 2] {
        let at = |order| if order == Order::Kn { k * self.n + n } else { n * self.k + k };
        match self.store {
            Store::F32(order) => [self.f32s[at(order)].into(), 0.0],
            Store::Bf16(order) => [self.bf16s[at(order)].into(), 0.0],
            Store::F16(order) => [self.f16s[at(order)].into(), 0.0],
            Store::Packed { format, .. } => {
                let group = n * self.k.div_ceil(format.group) + k / format.group;
                let min = if format.mins { self.groups[1][group] } else { 0.0 };
                [self.groups[0][group] * f64::from(self.codes[n * self.k + k]), min]
            }
        }
    }

    /// x (rows, K) · the weight by definition, and the sum of the absolute values of what is added.
    fn product(&self, x: &[f32], rows: usize) -> Vec<(f64, f64)> {
        let mut out = Vec::new();
        for x in (0..rows).map(|r| &x[r * self.k..(r + 1) * self.k]) {
            let x: Vec<f64> = match self.store {
                Store::F32(_) => x.iter().map(|&x| x.into()).collect(),
                Store::Bf16(_) => x.iter().map(|&x| bf16::from_f32(x).into()).collect(),
                Store::F16(_) => x.iter().map(|&x| f16::from_f32(x).into()).collect(),
                Store::Packed { format, .. } => x.chunks(format.group).flat_map(quantised).collect(),
            };
            for n in 0..self.n {
                let terms = x.iter().enumerate().flat_map(|(k, x)| self.parts(k, n).map(|w| x * w));
                out.push(terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs())));
            }
        }
        out
    }
}

/// A group of activations as int8 says them.
fn quantised(x: &[f32]) -> Vec<f64> {
    let scale = x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
    let code = |x: &f32| if scale < f32::MIN_POSITIVE { 0.0 } else { (x / scale).round_ties_even() };
    x.iter().map(|x| f64::from(code(x)) * f64::from(scale)).collect()
}

fn require_close(found: &[f32], expected: &[(f64, f64)], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (&y, &(expected, size))) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(y) - expected).abs();
        assert!(error <= 2e-6 * size + 1e-37, "{what}: {expected} required at {i}, found {y}");
    }
}

fn check_linear(store: Store, rows: usize, k: usize, n: usize, seed: u64) {
    let mut random = Random(seed * 2 + 1);
    let weights = [Owned::new(store, k, n, &mut random), Owned::new(store, k, n / 2 + 1, &mut random)];
    let x = random.floats(rows * k);
    let add = random.floats(rows * n);
    let expected = weights.each_ref().map(|w| w.product(&x, rows));
    let added: Vec<_> = expected[0].iter().zip(&add).map(|(&(y, s), &a)| (y + f64::from(a), s + 1.0)).collect();
    for isa in isas() {
        let what = format!("{isa:?} {store:?} {rows} rows {k} × {n}");
        let mut out = [vec![f32::NAN; rows * n], vec![f32::NAN; rows * (n / 2 + 1)]];
        let run = |pool: &dyn Pool, out: &mut [Vec<f32>; 2]| {
            let [a, b] = out;
            linear(isa, pool, &x, rows, &weights.each_ref().map(Owned::linear), None, &mut [a, b]);
        };
        run(&Serial, &mut out);
        for (out, expected) in out.iter().zip(&expected) {
            require_close(out, expected, &what);
        }
        let mut again = out.clone().map(|out| vec![f32::NAN; out.len()]);
        run(&Threads(3), &mut again);
        assert!(out == again, "{what}: the same required from three threads");

        linear(isa, &Serial, &x, rows, &[weights[0].linear()], Some(&add), &mut [&mut out[0]]);
        require_close(&out[0], &added, &format!("{what} with add"));
    }
}

#[test]
fn products_are_what_they_are_by_definition() {
    for store in stores() {
        let shapes = [
            (1, 1, 1),
            (2, 33, 17),
            (5, 3, 2),
            (17, 5, 3),
            (1, 70, 100),
            (7, 40, 33),
            (16, 96, 65),
            (17, 64, 70),
            (40, 150, 130),
        ];
        for &(rows, k, n) in &shapes[..if cfg!(miri) { 4 } else { shapes.len() }] {
            check_linear(store, rows, k, n, (rows * k + n) as u64);
        }
    }
}

#[test]
fn long_sums_and_wide_weights_are_cut() {
    let packed = |bits| Store::Packed { format: Format { bits, group: 32, mins: true }, wide: false };
    let all = [
        (Store::F32(Order::Kn), 1, 700, 2200),
        (Store::Bf16(Order::Kn), 9, 700, 600),
        (Store::F32(Order::Nk), 3, 2400, 9),
        (Store::F32(Order::Kn), 130, 300, 70),
        (Store::F16(Order::Nk), 18, 300, 70),
        (packed(Bits::Eight), 1, 4700, 20),
        (packed(Bits::Four), 130, 64, 70),
    ];
    // Of these too, several threads have a part each.
    let small =
        [(Store::Bf16(Order::Kn), 9, 17, 70), (Store::F32(Order::Nk), 17, 150, 2), (packed(Bits::Four), 17, 3, 65)];
    for &(store, rows, k, n) in if cfg!(miri) { &small[..] } else { &all[..] } {
        check_linear(store, rows, k, n, 7);
    }
}

#[test]
fn nothing_contracted_is_zero_and_no_outputs_are_none() {
    for store in stores().into_iter().step_by(if cfg!(miri) { 5 } else { 1 }) {
        for rows in [1, 20] {
            check_linear(store, rows, 0, 5, 3);
            check_linear(store, rows, 5, 0, 3);
        }
    }
}

/// Shapes are below these.
const ROWS: usize = if cfg!(miri) { 20 } else { 40 };
const K: usize = if cfg!(miri) { 40 } else { 200 };
const N: usize = if cfg!(miri) { 20 } else { 150 };

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 150 }, failure_persistence: None, ..Default::default() })]
    #[test]
    fn any_shape(store in 0..stores().len(), rows in 1..ROWS, k in 1..K, n in 1..N, seed in 1u64..1000) {
        check_linear(stores()[store], rows, k, n, seed);
    }
}

#[test]
fn a_gate_goes_through_its_activation() {
    let erf = |x: f64| {
        // Its Taylor series, whose terms cancel too much where erf is ±1 anyway.
        if x.abs() > 4.5 {
            return x.signum();
        }
        let mut term = x;
        (0..80).fold(0.0, |sum, n| {
            let y = sum + term / f64::from(2 * n + 1);
            term *= -x * x / f64::from(n + 1);
            y
        }) * 2.0
            / std::f64::consts::PI.sqrt()
    };
    let act = |activation, x: f64| match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x / 2.0 * (1.0 + erf(x / 2f64.sqrt())),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            x / 2.0 * (1.0 + u.tanh())
        }
        Activation::Relu => x.max(0.0),
    };
    let packed = Store::Packed { format: Format { bits: Bits::Eight, group: 32, mins: false }, wide: false };
    let kn = Store::Bf16(Order::Kn);
    for (gate, up, rows) in
        [(kn, kn, 3), (kn, kn, 19), (packed, packed, 1), (packed, kn, 5), (Store::F32(Order::Nk), packed, 30)]
    {
        let mut random = Random(5);
        let (k, n) = if cfg!(miri) { (3, 2) } else { (50, 37) };
        let (gate, up) = (Owned::new(gate, k, n, &mut random), Owned::new(up, k, n, &mut random));
        let x = random.floats(rows * k);
        let expected = (gate.product(&x, rows), up.product(&x, rows));
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
            for isa in isas() {
                let mut out = vec![f32::NAN; rows * n];
                gated(isa, &Serial, &x, rows, &gate.linear(), &up.linear(), activation, &mut out);
                let all = expected.0.iter().zip(&expected.1);
                // Errors of either factor, times the other.
                let all: Vec<_> = all
                    .map(|(g, u)| (act(activation, g.0) * u.0, (g.1 + 1.0) * (u.0.abs() + 1.0) + g.0.abs() * u.1))
                    .collect();
                require_close(&out, &all, &format!("{isa:?} {activation:?} {rows} rows"));
            }
        }
    }
}

#[test]
fn rows_are_taken_as_they_are() {
    for store in stores() {
        let kn = matches!(store, Store::F32(Order::Kn) | Store::Bf16(Order::Kn) | Store::F16(Order::Kn));
        if kn {
            continue;
        }
        let terms = if cfg!(miri) { 18 } else { 45 };
        let table = Owned::new(store, terms, 19, &mut Random(11));
        let mut out = vec![f32::NAN; 4 * terms];
        take_rows(&table.linear(), &[18, 0, -3, 400], &mut out);
        for (row, id) in [18, 0, 0, 18].into_iter().enumerate() {
            for k in 0..terms {
                let (found, expected) = (f64::from(out[row * terms + k]), table.value(k, id));
                assert!(
                    (found - expected).abs() <= 2e-7 * (expected.abs() + 1.0),
                    "{store:?} {id}: {expected} {found}"
                );
            }
        }
    }
}

#[test]
fn a_row_that_is_not_a_number_stays_so_and_the_others_do_not_become_so() {
    for store in stores().into_iter().step_by(if cfg!(miri) { 5 } else { 1 }) {
        let (k, n) = if cfg!(miri) { (5, 2) } else { (64, 33) };
        let weight = Owned::new(store, k, n, &mut Random(9));
        for (rows, bad) in [(1, f32::NAN), (5, f32::NAN), (20, f32::NAN), (20, f32::INFINITY)] {
            let mut x = Random(4).floats(rows * k);
            x[k / 2] = bad;
            for isa in isas() {
                let mut out = vec![0.0; rows * n];
                linear(isa, &Serial, &x, rows, &[weight.linear()], None, &mut [&mut out]);
                let (first, others) = out.split_at(n);
                assert!(first.iter().all(|y| !y.is_finite()), "{isa:?} {store:?} {rows} rows: {first:?}");
                assert!(others.iter().all(|y| y.is_finite()), "{isa:?} {store:?} {rows} rows");
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no float flags")]
fn numbers_below_the_normal_ones_are_the_same_however_the_thread_treats_them() {
    let packed = |bits| Store::Packed { format: Format { bits, group: 32, mins: false }, wide: false };
    for store in [packed(Bits::Eight), packed(Bits::Four), Store::F16(Order::Kn), Store::F16(Order::Nk)] {
        let mut weight = Owned::new(store, 64, 40, &mut Random(6));
        // f16 below 2⁻¹⁴ has no normal form, as f32 it has.
        weight.scales.0.iter_mut().for_each(|s| *s = f16::from_bits(s.to_bits() & 0x83ff));
        weight.f16s.iter_mut().for_each(|w| *w = f16::from_bits(w.to_bits() & 0x83ff));
        for size in [1.0, 1e-36, 1e-40] {
            let x: Vec<f32> = Random(8).floats(3 * 64).iter().map(|x| x * size).collect();
            for isa in isas() {
                let product = || {
                    let mut out = vec![f32::NAN; 3 * 40];
                    linear(isa, &Serial, &x, 3, &[weight.linear()], None, &mut [&mut out]);
                    out
                };
                let (plain, flushed) = (product(), with_flush(product));
                // What is not a normal number in the end may be 0.
                let same = |(a, b): (&f32, &f32)| a == b || a.abs() < 1e-37 && b.abs() < 1e-37;
                assert!(plain.iter().zip(&flushed).all(same), "{isa:?} {store:?} {size}");
            }
        }
    }
}

/// `f` with FTZ and DAZ set where the machine has such flags.
fn with_flush<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        let (mut before, mut flags) = (0u32, 0u32);
        // SAFETY: sets the thread's float flags, which are set back below.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut before);
            flags |= before | 0x8040;
            std::arch::asm!("ldmxcsr [{}]", in(reg) &flags);
        }
        let y = f();
        // SAFETY: as before.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &before) };
        y
    }
    #[cfg(not(target_arch = "x86_64"))]
    f()
}

#[test]
#[should_panic(expected = "codes [2, 2, 512] required, found 3 elements")]
fn a_packed_weight_of_another_shape_is_refused() {
    let scales = [0.0; 64];
    let packed = Packed { bits: Bits::Eight, group: 32, q: &[0; 3], scales: Scales::F32(&scales), mins: None };
    let weight = Linear { weight: Weight::Packed(packed), k: 64, n: 32 };
    linear(Isa::Portable, &Serial, &[0.0; 64], 1, &[weight], None, &mut [&mut [0.0; 32]]);
}

/// In a product that wraps these would be the lengths of what is given.
#[test]
#[should_panic(expected = "rows × 2 required, found 0 elements")]
fn lengths_that_no_usize_counts_are_refused() {
    let weight = Linear { weight: Weight::Rows { values: Values::F32(&[0.0; 4]), order: Order::Kn }, k: 2, n: 2 };
    linear(Isa::Portable, &Serial, &[], 1 << (usize::BITS - 1), &[weight], None, &mut [&mut []]);
}

#[test]
fn tasks_apart_are_all_tasks() {
    for threads in 1..9 {
        for all in 0..70 {
            let mut tasks: Vec<usize> = (0..all).map(|turn| super::run::apart(turn, all, threads)).collect();
            // The turns of one thread are neighbours.
            let neighbours = tasks.windows(threads + 1).all(|some| some[threads] == some[0] + 1);
            assert!(neighbours, "{all} tasks of {threads} threads: {tasks:?}");
            tasks.sort_unstable();
            assert!(tasks.iter().copied().eq(0..all), "{all} tasks of {threads} threads");
        }
    }
}
