//! Dot products, written as einsum.

use std::collections::BTreeMap;

use half::bf16;
use ndarray::{ArrayD, IxDyn, array};
use xla::DType;
use xla::graph::{Precision, einsum, einsum_as, einsum1};

use super::{FLOATS, Row, ramp};
use crate::case::Case;

/// The sum over every letter that the result leaves out, one product at a time.
fn reference(spec: &str, x: &ArrayD<f64>, y: &ArrayD<f64>) -> ArrayD<f64> {
    let (inputs, output) = spec.split_once("->").unwrap();
    let (left, right) = inputs.split_once(',').unwrap();
    let lengths = [(left, x), (right, y)].map(|(letters, array)| letters.chars().zip(array.shape().iter().copied()));
    let lengths: BTreeMap<char, usize> = lengths.into_iter().flatten().collect();
    let letters: Vec<char> = lengths.keys().copied().collect();
    let shape: Vec<usize> = output.chars().map(|letter| lengths[&letter]).collect();
    let mut sums = ArrayD::zeros(IxDyn(&shape));
    for at in ndarray::indices(lengths.values().copied().collect::<Vec<_>>()) {
        let place = |names: &str| {
            let axis = |letter: char| at[letters.iter().position(|&other| other == letter).unwrap()];
            names.chars().map(axis).collect::<Vec<usize>>()
        };
        sums[&place(output)[..]] += x[&place(left)[..]] * y[&place(right)[..]];
    }
    sums
}

/// Numbers of both signs without a pattern in any axis.
fn mixed(shape: &[usize], step: f64) -> ArrayD<f64> {
    ramp(0.0, step * (shape.iter().product::<usize>() - 1) as f64, shape).mapv(f64::sin)
}

/// The einsum of operands of one type with a result of another.
fn product(c: &mut Case, spec: &str, shapes: [&[usize]; 2], from: DType, to: DType) {
    let (x, left) = c.arg_as(&mixed(shapes[0], 0.7), from);
    let (y, right) = c.arg_as(&mixed(shapes[1], 1.3), from);
    // The sums cancel: what the products add up to counts, not what is left.
    let tolerance = if to == DType::BF16 {
        0.02
    } else if to == DType::F16 {
        0.002
    } else {
        1e-5
    };
    let wanted = reference(spec, &left, &right);
    let scale = wanted.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
    let y = einsum_as(spec, &x, &y, to);
    // Shifted by the largest, so that the relative error is one of the largest.
    c.near_within(&(y.cast(DType::F32) + 2.0 * scale), &wanted.mapv(|v| v + 2.0 * scale), tolerance);
}

pub(super) const ROWS: &[Row] = &[
    ("dot_general", |c| {
        // The products of the model: projection, grouped attention, and back.
        for (from, to) in FLOATS.map(|dtype| (dtype, dtype)).into_iter().chain([(DType::BF16, DType::F32)]) {
            product(c, "BSM,MHK->BSHK", [&[2, 3, 11], &[11, 3, 5]], from, to);
            product(c, "BSGRK,BTGK->BGRST", [&[2, 3, 2, 3, 5], &[2, 7, 2, 5]], from, to);
            product(c, "BGRST,BTGK->BSGRK", [&[2, 2, 3, 3, 7], &[2, 7, 2, 5]], from, to);
            product(c, "BSHK,HKM->BSM", [&[2, 3, 3, 5], &[3, 5, 11]], from, to);
        }
    }),
    ("dot_general", |c| {
        product(c, "BM,MF->BF", [&[1, 17], &[17, 5]], DType::F32, DType::F32);
        product(c, "BM,FM->BF", [&[5, 17], &[13, 17]], DType::BF16, DType::F32);
        product(c, "MF,BM->BF", [&[17, 5], &[3, 17]], DType::F32, DType::F32);
        product(c, "A,B->BA", [&[3], &[5]], DType::F32, DType::F32);
        product(c, "A,A->", [&[9], &[9]], DType::F32, DType::F32);
        product(c, "AB,CD->AC", [&[3, 4], &[2, 5]], DType::F32, DType::F32);
        product(c, "ABC,ABC->CA", [&[3, 4, 2], &[3, 4, 2]], DType::F32, DType::F32);
        let (x, values) = c.arg_as(&mixed(&[3, 5, 2], 0.9), DType::F32);
        c.near_within(&einsum1("ABC->CA", &x), &values.sum_axis(ndarray::Axis(1)).reversed_axes(), 1e-4);
    }),
    ("dot_general", |c| {
        // Integers, and bf16 against a quantized right side.
        let (x, y) = (c.arg(&array![[100i8, -100, 3]]), c.arg(&array![[100i8], [-100], [7]]));
        c.is(&einsum_as("AB,BC->AC", &x, &y, DType::I32), &array![[20021i32]]);
        let x = c.arg(&array![[1i32, 2], [3, 4]]);
        c.is(&einsum("AB,BC->AC", &x, &x), &array![[7i32, 10], [15, 22]]);
        let x = c.arg(&array![[1f32, -2.0]].mapv(bf16::from_f32));
        let y = c.arg_bytes(&[7, 0xf8, 1, 2], DType::I4, &[2, 2]);
        c.is(&einsum_as("AB,BC->AC", &x, &y, DType::F32), &array![[5f32, -12.0]]);
        let x = c.arg_bytes(&[0x38, 0xc0], DType::F8E4M3FN, &[1, 2]);
        c.is(&einsum_as("AB,CB->AC", &x, &x, DType::F32), &array![[5f32]]);
        c.g.set_precision(Precision::Highest);
        let x = c.arg(&array![[1f32, 2.0], [3.0, 4.0]]);
        c.is(&einsum("AB,BC->AC", &x, &x), &array![[7f32, 10.0], [15.0, 22.0]]);
    }),
];
