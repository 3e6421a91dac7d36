//! Products against f64, on every instruction set of the machine.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::Threads;

/// Numbers in −1…1, as stored, and what they mean.
enum Store {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Store {
    fn new(kind: usize, len: usize, by: usize) -> Store {
        let numbers = (0..len).map(|i| ((i + 1) * by % 1999) as f32 / 1000.0 - 0.9995);
        match kind {
            0 => Store::F32(numbers.collect()),
            1 => Store::Bf16(numbers.map(bf16::from_f32).collect()),
            _ => Store::F16(numbers.map(f16::from_f32).collect()),
        }
    }

    fn values(&self) -> Values<'_> {
        match self {
            Store::F32(x) => Values::F32(x),
            Store::Bf16(x) => Values::Bf16(x),
            Store::F16(x) => Values::F16(x),
        }
    }

    fn at(&self, i: usize) -> f64 {
        match self {
            Store::F32(x) => x[i].into(),
            Store::Bf16(x) => x[i].into(),
            Store::F16(x) => x[i].into(),
        }
    }
}

const ORDERS: [Together; 2] = [Together::Terms, Together::Lines];

/// Products of these sizes and elements, with terms or lines together.
fn check(sizes: Sizes, kinds: [usize; 2], orders: [Together; 2], threads: usize) {
    let Sizes { batch, m, k, n } = sizes;
    let (a, b) = (Store::new(kinds[0], batch * m * k, 7), Store::new(kinds[1], batch * k * n, 13));
    let at = |together, batch: usize, lines: usize, line: usize, term: usize| {
        batch * lines * k + if together == Together::Terms { line * k + term } else { term * lines + line }
    };
    let mut wanted = Vec::new();
    for i in 0..batch * m * n {
        let (z, r, c) = (i / (m * n), i / n % m, i % n);
        let products = (0..k).map(|t| a.at(at(orders[0], z, m, r, t)) * b.at(at(orders[1], z, n, c, t)));
        wanted.push(products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs())));
    }
    let left = Operand { values: a.values(), together: orders[0] };
    let right = Operand { values: b.values(), together: orders[1] };
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        let run = |threads| {
            let mut out = vec![f32::NAN; batch * m * n];
            matmul(isa, &Threads(threads), sizes, left, right, &mut out);
            out
        };
        let out = run(threads);
        for (i, (&found, &(wanted, size))) in out.iter().zip(&wanted).enumerate() {
            let off = (f64::from(found) - wanted).abs();
            assert!(off <= 3e-6 * size, "{isa:?} {sizes:?} {kinds:?} {orders:?}, element {i}: {found}, not {wanted}");
        }
        assert_eq!(out, run(1), "{isa:?} {sizes:?}: the same from one thread required");
    }
}

/// Several blocks of rows, of columns and of terms; several tasks; tiles at the edges.
#[test]
fn large_products() {
    let sizes = match cfg!(miri) {
        true => vec![[1, 7, 145, 17]],
        false => vec![[1, 1031, 20, 33], [1, 20, 20, 1100], [1, 13, 1300, 19], [2, 200, 300, 270], [40, 9, 8, 11]],
    };
    for [batch, m, k, n] in sizes {
        for left in ORDERS {
            for right in ORDERS {
                check(Sizes { batch, m, k, n }, [0, 0], [left, right], 2);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 60 }, ..ProptestConfig::default() })]
    #[test]
    fn any_sizes(
        sizes in (0usize..3, 0usize..30, 0usize..200, 0usize..80),
        kinds in [0usize..3, 0usize..3],
        orders in [0usize..2, 0usize..2],
        threads in 1usize..4,
    ) {
        let (batch, m, k, n) = sizes;
        let k = if cfg!(miri) { k / 10 } else { k };
        check(Sizes { batch, m, k, n }, kinds, orders.map(|i| ORDERS[i]), threads);
    }
}

#[test]
#[should_panic(expected = "left of [1, 2, 3] elements required, found 5")]
fn other_lengths_are_refused() {
    let operand = |values| Operand { values: Values::F32(values), together: Together::Terms };
    let sizes = Sizes { batch: 1, m: 2, k: 3, n: 4 };
    matmul(Isa::Portable, &Serial, sizes, operand(&[1.0; 5]), operand(&[1.0; 12]), &mut [0.0; 8]);
}
