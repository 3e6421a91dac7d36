//! Ops that make arrays or move their elements.

use half::{bf16, f16};
use ndarray::{Axis, arr0, array, concatenate, s};
use xla::DType;

use super::{Row, counted};

pub(super) const ROWS: &[Row] = &[
    ("constant", |c| {
        let g = c.g.clone();
        let values = array![[1.5f32, -0.0, f32::NAN], [f32::INFINITY, 1e-30, f32::MAX]];
        let flat: Vec<f32> = values.iter().copied().collect();
        c.is(&g.constant(&flat, &[2, 3]), &values);
        let x = g.constant(&[0.1f64, f64::MIN_POSITIVE, f64::NEG_INFINITY], &[3]);
        c.is(&x, &array![0.1f64, f64::MIN_POSITIVE, f64::NEG_INFINITY]);
        c.is(&g.constant(&[bf16::MAX, bf16::from_f32(-0.1)], &[2]), &array![bf16::MAX, bf16::from_f32(-0.1)]);
        c.is(&g.constant(&[f16::MAX, f16::EPSILON], &[2]), &array![f16::MAX, f16::EPSILON]);
        c.is(&g.constant(&[i64::MIN, i64::MAX], &[2]), &array![i64::MIN, i64::MAX]);
        c.is(&g.constant(&[u64::MAX], &[1]), &array![u64::MAX]);
        c.is(&g.constant(&[true, false], &[2]), &array![true, false]);
        c.is(&g.constant::<f32>(&[], &[0, 3]), &counted(&[0, 3]));
        c.is(&g.scalar(f64::NEG_INFINITY, DType::F32), &arr0(f32::NEG_INFINITY));
        c.is(&g.scalar(f64::NAN, DType::BF16), &arr0(bf16::NAN));
        c.is(&g.full(-3, DType::I8, &[2]), &array![-3i8, -3]);
        let x = g.constant_bytes(&[7, 0xf8, 0xff], DType::I4, &[3]);
        c.is(&x.cast(DType::I32), &array![7i32, -8, -1]);
        c.is_bytes(&g.constant_bytes(&[0x38, 0xc0], DType::F8E4M3FN, &[2]), &[0x38, 0xc0]);
        // Large ones are written as a blob, in each size of element.
        let many = counted(&[5, 33]);
        let flat: Vec<f32> = many.iter().copied().collect();
        c.is(&g.constant(&flat, &[5, 33]), &many);
        let flat: Vec<i8> = (0..101).collect();
        c.is(&g.constant(&flat, &[101]), &ndarray::arr1(&flat));
        let flat: Vec<u64> = (0..67).map(|i| i << 40).collect();
        c.is(&g.constant(&flat, &[67]), &ndarray::arr1(&flat));
        let flat: Vec<bool> = (0..77).map(|i| i % 3 == 0).collect();
        c.is(&g.constant(&flat, &[77]), &ndarray::arr1(&flat));
    }),
    ("iota", |c| {
        let g = c.g.clone();
        c.is(&g.iota(DType::I32, &[2, 3], 0), &array![[0i32, 0, 0], [1, 1, 1]]);
        c.is(&g.iota(DType::F32, &[2, 3], 1), &array![[0f32, 1.0, 2.0], [0.0, 1.0, 2.0]]);
        c.is(&g.iota(DType::U8, &[3], 0), &array![0u8, 1, 2]);
        c.is(&g.iota(DType::BF16, &[3], 0), &array![0f32, 1.0, 2.0].mapv(bf16::from_f32));
    }),
    ("broadcast_in_dim", |c| {
        let x = c.arg(&array![1f32, 2.0, 3.0]);
        c.is(&x.broadcast(&[3, 2], &[0]), &array![[1f32, 1.0], [2.0, 2.0], [3.0, 3.0]]);
        c.is(&x.broadcast_to(&[2, 3]), &array![[1f32, 2.0, 3.0], [1.0, 2.0, 3.0]]);
        let x = c.arg(&array![[1i64], [2]]);
        c.is(&x.broadcast_to(&[2, 3]), &array![[1i64, 1, 1], [2, 2, 2]]);
        let x = c.arg(&arr0(true));
        c.is(&x.broadcast_to(&[3]), &array![true, true, true]);
    }),
    ("reshape", |c| {
        let x = counted(&[3, 4, 5]);
        let y = c.arg(&x);
        c.is(&y.reshape(&[5, 12]), &x.clone().into_shape_with_order((5, 12)).unwrap());
        c.is(&y.expand_dims(-1), &x.insert_axis(Axis(3)));
        let x = c.arg(&array![[7u8]]);
        c.is(&x.reshape(&[]), &arr0(7u8));
    }),
    ("transpose", |c| {
        let x = counted(&[3, 5, 2, 7]);
        let y = c.arg(&x);
        c.is(&y.transpose(&[2, 0, 3, 1]), &x.permuted_axes(vec![2, 0, 3, 1]));
    }),
    ("reverse", |c| {
        let x = counted(&[3, 5]);
        let y = c.arg(&x);
        c.is(&y.reverse(&[-1]), &x.slice(s![.., ..;-1]).to_owned());
        c.is(&y.reverse(&[0, 1]), &x.slice(s![..;-1, ..;-1]).to_owned());
    }),
    ("slice", |c| {
        let x = counted(&[7, 11]);
        let y = c.arg(&x);
        c.is(&y.slice(&[1, 2], &[6, 11], &[2, 4]), &x.slice(s![1..6;2, 2..11;4]).to_owned());
        c.is(&y.narrow(-1, 3, 5), &x.slice(s![.., 3..8]).to_owned());
        c.is(&y.narrow(0, 3, 0), &counted(&[0, 11]));
    }),
    ("pad", |c| {
        let x = c.arg(&array![[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        let wanted =
            array![[9f32, 9.0, 9.0, 9.0, 9.0, 9.0], [2.0, 9.0, 3.0, 9.0, 9.0, 9.0], [5.0, 9.0, 6.0, 9.0, 9.0, 9.0]];
        c.is(&x.pad(9.0, &[1, -2], &[0, 3], &[0, 1]), &wanted);
        let (x, value) = (c.arg(&array![1i32, 2]), c.arg(&arr0(-1i32)));
        c.is(&x.pad(&value, &[0], &[1], &[2]), &array![1i32, -1, -1, 2, -1]);
    }),
    ("concatenate", |c| {
        let (x, y, z) = (counted(&[2, 3]), counted(&[2, 1]), counted(&[2, 4]));
        let (a, b, d) = (c.arg(&x), c.arg(&y), c.arg(&z));
        let joined = c.g.concatenate(&[&a, &b, &d], -1);
        c.is(&joined, &concatenate(Axis(1), &[x.view(), y.view(), z.view()]).unwrap());
        let same = c.g.concatenate(&[&a, &a], 0);
        c.is(&same, &concatenate(Axis(0), &[x.view(), x.view()]).unwrap());
    }),
];
