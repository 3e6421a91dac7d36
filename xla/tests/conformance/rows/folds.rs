//! Folds, orders and random bits.

use half::bf16;
use ndarray::{Array1, Axis, arr0, array};
use xla::DType;
use xla::graph::{Algorithm, Fold};

use super::{FLOATS, Row, counted, ramp};

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

pub(super) const ROWS: &[Row] = &[
    ("reduce", |c| {
        for dtype in FLOATS {
            let (x, values) = c.arg_as(&ramp(0.25, 2.0, &[3, 5, 7]), dtype);
            let sum = values.sum_axis(Axis(2)).sum_axis(Axis(0));
            // bf16 may be summed in bf16.
            let tolerance = if dtype == DType::BF16 {
                0.05
            } else if dtype == DType::F16 {
                0.005
            } else {
                1e-6
            };
            c.near_within(&x.sum(&[0, -1]), &sum, tolerance);
            c.near_within(&x.mean(&[0, 2]), &(sum / 21.0), tolerance);
            c.near(&x.max_keep(&[1]), &values.map_axis(Axis(1), |v| v[4]).insert_axis(Axis(1)));
            c.near(&x.min(&[1]), &values.map_axis(Axis(1), |v| v[0]));
        }
        let x = c.arg(&array![[3i32, -4, 5], [7, 8, -9]]);
        c.is(&x.sum(&[0, 1]), &arr0(10i32));
        c.is(&x.product(&[1]), &array![-60i32, -504]);
        c.is(&x.max(&[0]), &array![7i32, 8, 5]);
        c.is(&x.min(&[1]), &array![-4i32, -9]);
        c.is(&x.any(&[1]), &array![-1i32, -1]);
        let x = c.arg(&array![[0xf0u8, 0x3c], [0xff, 0x81]]);
        c.is(&x.all(&[1]), &array![0x30u8, 0x81]);
        let p = c.arg(&array![[true, false], [true, true], [false, false]]);
        c.is(&p.all(&[1]), &array![false, true, false]);
        c.is(&p.any(&[1]), &array![true, true, false]);
        let x = c.arg(&array![[1f32, NAN, 3.0], [-INF, -INF, -INF]]);
        c.is(&x.max(&[1]), &array![NAN, -INF]);
        // Of nothing: what changes nothing.
        let x = c.arg(&counted(&[2, 0]));
        c.is(&x.sum(&[1]), &array![0f32, 0.0]);
        c.is(&x.max(&[1]), &array![-INF, -INF]);
        c.is(&x.product(&[1]), &array![1f32, 1.0]);
        let (x, values) = c.arg_as(&ramp(-3.0, 3.0, &[2, 5]), DType::F32);
        let exp = values.mapv(f64::exp);
        let total = exp.sum_axis(Axis(1)).insert_axis(Axis(1));
        c.near(&x.softmax(-1), &(&exp / &total));
    }),
    ("arg_reduce", |c| {
        let x = c.arg(&array![
            [1f32, 5.0, 5.0, 2.0],
            [NAN, 9.0, NAN, 1.0],
            [-INF, -INF, -INF, -INF],
            [0.0, -0.0, 0.0, -1.0]
        ]);
        c.is(&x.argmax(-1), &array![1i32, 0, 0, 0]);
        c.is(&x.argmin(-1), &array![0i32, 0, 0, 3]);
        c.is(&x.narrow(0, 0, 1).argmax(0), &array![0i32, 0, 0, 0]);
        // Ties far apart in a row long enough to be cut into pieces: the lowest wins.
        let mut row = Array1::<f32>::zeros(1031);
        row[[1030]] = 4.0;
        row[[517]] = 4.0;
        row[[3]] = -4.0;
        row[[900]] = -4.0;
        let x = c.arg(&row);
        c.is(&x.argmax(0), &arr0(517i32));
        c.is(&x.argmin(0), &arr0(3i32));
        let x = c.arg(&row.mapv(bf16::from_f32));
        c.is(&x.argmax(0), &arr0(517i32));
        let x = c.arg(&array![[i32::MIN, i32::MIN], [3, 7]]);
        c.is(&x.argmax(1), &array![0i32, 1]);
        let x = c.arg(&array![0u8, 255, 255]);
        c.is(&x.argmax(0), &arr0(1i32));
        c.is(&x.argmin(0), &arr0(0i32));
    }),
    ("reduce_window", |c| {
        let x = c.arg(&array![[1f32, 5.0, 2.0, 4.0, 3.0], [-1.0, -5.0, -2.0, -4.0, -3.0]]);
        let most = x.reduce_window(Fold::Max, &[1, 3], &[1, 2], &[(0, 0), (1, 1)]);
        c.is(&most, &array![[5f32, 5.0, 4.0], [-1.0, -2.0, -3.0]]);
        let sums = x.reduce_window(Fold::Sum, &[2, 2], &[1, 1], &[(0, 0), (0, 0)]);
        c.is(&sums, &array![[0f32, 0.0, 0.0, 0.0]]);
        let x = c.arg(&array![[1i32, 2, 3], [4, 5, 6]]);
        c.is(&x.cumsum(-1), &array![[1i32, 3, 6], [4, 9, 15]]);
        c.is(&x.cumsum(0), &array![[1i32, 2, 3], [5, 7, 9]]);
    }),
    ("reduce_window", |c| {
        // The running sum over a vocabulary, as top-p sampling needs it. Whole numbers: every order of adding is exact.
        let row: Array1<f32> = (0..49152u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 30) as f32).collect();
        let mut total = 0.0;
        let wanted = row.mapv(|v| {
            total += v;
            total
        });
        let x = c.arg(&row.insert_axis(Axis(0)));
        c.is(&x.cumsum(-1), &wanted.insert_axis(Axis(0)));
    }),
    ("sort", |c| {
        let x = c.arg(&array![3f32, NAN, -INF, 0.0, -0.0, INF, -2.0, 3.0]);
        c.is(&x.sort(0, false), &array![-INF, -2.0, -0.0, 0.0, 3.0, 3.0, INF, NAN]);
        // Descending, a NaN comes first; equal ones keep their order.
        let (sorted, positions) = x.argsort(0, true);
        c.is(&sorted, &array![NAN, INF, 3.0, 3.0, 0.0, -0.0, -2.0, -INF]);
        c.is(&positions, &array![1i32, 5, 0, 7, 3, 4, 6, 2]);
        let (keys, values) = (c.arg(&array![[2i32, 1, 2], [0, 5, -5]]), c.arg(&array![[1u8, 2, 3], [4, 5, 6]]));
        let both = keys.sort_with(&[&values], -1, false);
        c.is(&both[0], &array![[1i32, 2, 2], [-5, 0, 5]]);
        c.is(&both[1], &array![[2u8, 1, 3], [6, 4, 5]]);
        c.is(&keys.sort(0, true), &array![[2i32, 5, 2], [0, 1, -5]]);
        let x = c.arg(&array![2f32, -1.0, 0.5].mapv(bf16::from_f32));
        c.is(&x.sort(0, false), &array![-1f32, 0.5, 2.0].mapv(bf16::from_f32));
        let x = c.arg(&array![200u8, 3, 100]);
        c.is(&x.sort(0, false), &array![3u8, 100, 200]);
    }),
    ("top_k", |c| {
        let x = c.arg(&array![[1f32, 7.0, 3.0, 7.0, 7.0], [-INF, -INF, 0.0, -INF, -INF]]);
        let (values, positions) = x.top_k(3);
        c.is(&values, &array![[7f32, 7.0, 7.0], [0.0, -INF, -INF]]);
        c.is(&positions, &array![[1i32, 3, 4], [2, 0, 1]]);
        let x = c.arg(&array![3i32, 9, -1, 9]);
        let (values, positions) = x.top_k(4);
        c.is(&values, &array![9i32, 9, 3, -1]);
        c.is(&positions, &array![1i32, 3, 0, 2]);
        // Ties in a row as long as a vocabulary.
        let mut row = Array1::<f32>::zeros(49152);
        [40000, 17, 30001, 49151].into_iter().for_each(|i| row[[i]] = 2.5);
        let (values, positions) = c.arg(&row).top_k(5);
        c.is(&values, &array![2.5f32, 2.5, 2.5, 2.5, 0.0]);
        c.is(&positions, &array![17i32, 30001, 40000, 49151, 0]);
    }),
    ("rng_bit_generator", |c| {
        // The known answers of the generators for key 0 and counter 0 (Random123, kat_vectors: threefry2x32 with 20
        // rounds, philox4x32 with 10).
        let state = c.arg(&array![0u64, 0]);
        let (_, bits) = state.rng_bits(Algorithm::ThreeFry, DType::U32, &[2]);
        c.is(&bits, &array![0x6b20_0159u32, 0x99ba_4efe]);
        let (_, bits) = state.rng_bits(Algorithm::Philox, DType::U32, &[4]);
        c.is(&bits, &array![0x6627_e8d5u32, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    }),
];
