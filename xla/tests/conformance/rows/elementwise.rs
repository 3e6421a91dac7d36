//! Elementwise ops.

use half::{bf16, f16};
use ndarray::{ArrayD, Zip, array};
use xla::DType;
use xla::graph::Tensor;

use super::{FLOATS, Row, ramp};
use crate::case::Case;

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

/// A function of one float, in every float type, on numbers from `low` to `high`.
fn unary(c: &mut Case, low: f64, high: f64, op: fn(&Tensor) -> Tensor, reference: fn(f64) -> f64) {
    for dtype in FLOATS {
        let (x, values) = c.arg_as(&ramp(low, high, &[3, 7]), dtype);
        c.near(&op(&x), &values.mapv(reference));
    }
}

/// A function of two floats, in every float type.
fn binary(c: &mut Case, (low, high): (f64, f64), op: fn(&Tensor, &Tensor) -> Tensor, reference: fn(f64, f64) -> f64) {
    for dtype in FLOATS {
        let (x, left) = c.arg_as(&ramp(low, high, &[3, 7]), dtype);
        let (y, right) = c.arg_as(&ramp(high, 0.3, &[3, 7]), dtype);
        let wanted: ArrayD<f64> = Zip::from(&left).and(&right).map_collect(|&a, &b| reference(a, b));
        c.near(&op(&x, &y), &wanted);
    }
}

/// A function of two truth values.
fn logic(c: &mut Case, op: fn(&Tensor, &Tensor) -> Tensor, wanted: [bool; 4]) {
    let (x, y) = (c.arg(&array![false, false, true, true]), c.arg(&array![false, true, false, true]));
    c.is(&op(&x, &y), &array![wanted[0], wanted[1], wanted[2], wanted[3]]);
}

/// On numbers that no rounding touches; written in f32 and run also in bf16 and f16.
fn exact(c: &mut Case, x: [f32; 7], op: fn(&Tensor) -> Tensor, wanted: [f32; 7]) {
    let (x, wanted) = (ndarray::arr1(&x), ndarray::arr1(&wanted));
    let y = c.arg(&x);
    c.is(&op(&y), &wanted);
    let y = c.arg(&x.mapv(bf16::from_f32));
    c.is(&op(&y), &wanted.mapv(bf16::from_f32));
    let y = c.arg(&x.mapv(f16::from_f32));
    c.is(&op(&y), &wanted.mapv(f16::from_f32));
}

pub(super) const ROWS: &[Row] = &[
    ("stop_gradient", |c| {
        let x = c.arg(&array![1f32, -2.0]);
        c.is(&x.stop_gradient(), &array![1f32, -2.0]);
        c.is(&(x.stop_gradient().abs() + &x), &array![2f32, 0.0]);
    }),
    ("abs", |c| {
        unary(c, -3.0, 4.0, Tensor::abs, f64::abs);
        exact(c, [-0.0, -INF, NAN, -1.5, 0.0, 2.0, INF], Tensor::abs, [0.0, INF, NAN, 1.5, 0.0, 2.0, INF]);
        let x = c.arg(&array![-5i32, 0, 7, i32::MIN]);
        c.is(&x.abs(), &array![5i32, 0, 7, i32::MIN]);
    }),
    ("cbrt", |c| unary(c, -30.0, 30.0, Tensor::cbrt, f64::cbrt)),
    ("ceil", |c| {
        exact(c, [-1.5, -0.5, 0.5, 2.0, 2.25, -INF, NAN], Tensor::ceil, [-1.0, -0.0, 1.0, 2.0, 3.0, -INF, NAN]);
    }),
    ("count_leading_zeros", |c| {
        let x = c.arg(&array![0u32, 1, 0x8000_0000, 255]);
        c.is(&x.clz(), &array![32u32, 31, 0, 24]);
        let x = c.arg(&array![0i8, 1, -1, 64]);
        c.is(&x.clz(), &array![8i8, 7, 0, 1]);
        let x = c.arg(&array![1u64, 1 << 40]);
        c.is(&x.clz(), &array![63u64, 23]);
    }),
    ("cosine", |c| unary(c, -7.0, 7.0, Tensor::cos, f64::cos)),
    ("erf", |c| {
        // Abramowitz and Stegun, table 7.1, with more digits.
        let x = array![-2.0, -1.0, -0.5, 0.0, 0.25, 1.5, 3.0];
        let wanted = array![
            -0.995_322_265_018_952_7,
            -0.842_700_792_949_714_9,
            -0.520_499_877_813_046_5,
            0.0,
            0.276_326_390_168_236_93,
            0.966_105_146_475_310_8,
            0.999_977_909_503_001_4
        ];
        for dtype in FLOATS {
            let x = c.arg_as(&x, dtype).0;
            c.near(&x.erf(), &wanted);
        }
        // gelu(x) = x Φ(x) is made of it.
        let x = c.arg(&array![-1f32, 0.0, 2.0]);
        c.near_within(&x.gelu(), &array![-0.158_655_253_931_457_05, 0.0, 1.954_499_736_103_642], 2e-6);
    }),
    ("exponential", |c| {
        unary(c, -4.0, 4.0, Tensor::exp, f64::exp);
        exact(c, [-INF, INF, NAN, 0.0, -0.0, -INF, INF], Tensor::exp, [0.0, INF, NAN, 1.0, 1.0, 0.0, INF]);
    }),
    ("exponential_minus_one", |c| {
        unary(c, -2.0, 2.0, Tensor::expm1, f64::exp_m1);
        let x = c.arg(&array![1e-5f32, -1e-5]);
        c.near(&x.expm1(), &array![1.000_005_000_016_666_7e-5, -9.999_950_000_166_667e-6]);
    }),
    ("floor", |c| {
        exact(c, [-1.5, -0.5, 0.5, 2.0, 2.75, -INF, NAN], Tensor::floor, [-2.0, -1.0, 0.0, 2.0, 2.0, -INF, NAN]);
    }),
    ("is_finite", |c| {
        let x = c.arg(&array![1f32, INF, -INF, NAN, f32::MAX]);
        c.is(&x.is_finite(), &array![true, false, false, false, true]);
        let x = c.arg(&array![bf16::MAX, bf16::INFINITY, bf16::NAN]);
        c.is(&x.is_finite(), &array![true, false, false]);
    }),
    ("log", |c| {
        unary(c, 0.01, 40.0, Tensor::log, f64::ln);
        exact(c, [0.0, -0.0, -1.0, 1.0, INF, NAN, -INF], Tensor::log, [-INF, -INF, NAN, 0.0, INF, NAN, NAN]);
    }),
    ("log_plus_one", |c| {
        unary(c, -0.9, 9.0, Tensor::log1p, f64::ln_1p);
        let x = c.arg(&array![1e-5f32, -1e-5]);
        c.near(&x.log1p(), &array![9.999_950_000_333_332e-6, -1.000_005_000_033_333_5e-5]);
    }),
    ("logistic", |c| {
        unary(c, -6.0, 6.0, Tensor::logistic, |x| 1.0 / (1.0 + (-x).exp()));
        unary(c, -6.0, 6.0, Tensor::silu, |x| x / (1.0 + (-x).exp()));
    }),
    ("negate", |c| {
        unary(c, -3.0, 4.0, |x| -x, |x| -x);
        let x = c.arg(&array![3i16, -4, i16::MIN]);
        c.is(&-x, &array![-3i16, 4, i16::MIN]);
        let x = c.arg(&array![1u8, 0]);
        c.is(&-x, &array![255u8, 0]);
    }),
    ("not", |c| {
        let x = c.arg(&array![0i32, -1, 5]);
        c.is(&!x, &array![-1i32, 0, -6]);
        let x = c.arg(&array![0u8, 0xf0]);
        c.is(&!x, &array![255u8, 0x0f]);
        let x = c.arg(&array![true, false, true]);
        c.is(&!x, &array![false, true, false]);
    }),
    ("popcnt", |c| {
        let x = c.arg(&array![0u16, 1, 0xffff, 0x1234]);
        c.is(&x.popcnt(), &array![0u16, 1, 16, 5]);
        let x = c.arg(&array![-1i64, 7]);
        c.is(&x.popcnt(), &array![64i64, 3]);
    }),
    ("round_nearest_even", |c| {
        exact(c, [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.75], Tensor::round, [-2.0, -2.0, -0.0, 0.0, 2.0, 2.0, 3.0]);
    }),
    ("round_nearest_afz", |c| {
        let wanted = [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 3.0];
        exact(c, [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.75], Tensor::round_afz, wanted);
    }),
    ("rsqrt", |c| unary(c, 0.05, 30.0, Tensor::rsqrt, |x| 1.0 / x.sqrt())),
    ("sign", |c| {
        exact(c, [-2.0, -0.0, 0.0, 3.0, NAN, INF, -INF], Tensor::sign, [-1.0, -0.0, 0.0, 1.0, NAN, 1.0, -1.0]);
        let x = c.arg(&array![-7i32, 0, 9]);
        c.is(&x.sign(), &array![-1i32, 0, 1]);
    }),
    ("sine", |c| unary(c, -7.0, 7.0, Tensor::sin, f64::sin)),
    ("sqrt", |c| {
        unary(c, 0.0, 30.0, Tensor::sqrt, f64::sqrt);
        exact(c, [0.0, 1.0, 4.0, 2.25, INF, NAN, -1.0], Tensor::sqrt, [0.0, 1.0, 2.0, 1.5, INF, NAN, NAN]);
    }),
    ("tan", |c| unary(c, -1.4, 1.4, Tensor::tan, f64::tan)),
    ("tanh", |c| {
        unary(c, -5.0, 5.0, Tensor::tanh, f64::tanh);
        let x = c.arg(&array![-1f32, 0.0, 2.0]);
        // x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))
        c.near_within(&x.gelu_tanh(), &array![-0.158_808_009_391_72, 0.0, 1.954_597_694_087_77], 2e-6);
    }),
    ("add", |c| {
        binary(c, (-3.0, 3.0), |x, y| x + y, |x, y| x + y);
        let (x, y) = (c.arg(&array![i32::MAX, -7, 3]), c.arg(&array![1i32, 2, 4]));
        c.is(&(x + y), &array![i32::MIN, -5, 7]);
        let (x, y) = (c.arg(&array![200u8, 1]), c.arg(&array![100u8, 2]));
        c.is(&(x + y), &array![44u8, 3]);
        let x = c.arg(&array![1u64 << 63, u64::MAX]);
        c.is(&(&x + &x), &array![0u64, u64::MAX - 1]);
        // Four bits: one value per byte on the host.
        let (x, y) = (c.arg_bytes(&[7, 0xf8, 3], DType::I4, &[3]), c.arg_bytes(&[1, 0, 2], DType::I4, &[3]));
        c.is(&(&x + &y).cast(DType::I32), &array![-8i32, -8, 5]);
        let x = c.arg_bytes(&[15, 1, 9], DType::U4, &[3]);
        c.is(&(&x + 1).cast(DType::I32), &array![0i32, 2, 10]);
    }),
    ("and", |c| {
        logic(c, |x, y| x & y, [false, false, false, true]);
        let (x, y) = (c.arg(&array![0b1100u8, 0xff]), c.arg(&array![0b1010u8, 0x81]));
        c.is(&(x & y), &array![0b1000u8, 0x81]);
    }),
    ("atan2", |c| {
        binary(c, (-3.0, 3.0), |x, y| x.atan2(y), f64::atan2);
        let (x, y) = (c.arg(&array![0.0f32, 1.0, -1.0]), c.arg(&array![-1f32, 0.0, -1.0]));
        c.near(&x.atan2(&y), &array![std::f64::consts::PI, std::f64::consts::FRAC_PI_2, -2.356_194_490_192_345]);
    }),
    ("divide", |c| {
        binary(c, (-3.0, 3.0), |x, y| x / y, |x, y| x / y);
        let (x, y) = (c.arg(&array![7i32, -7, 7, -7]), c.arg(&array![2i32, 2, -2, -2]));
        c.is(&(x / y), &array![3i32, -3, -3, 3]);
        let x = c.arg(&array![u32::MAX, 9]);
        c.is(&(&x / 2), &array![u32::MAX / 2, 4]);
        let (x, y) = (c.arg(&array![1f32, -1.0, 0.0]), c.arg(&array![0f32, 0.0, 0.0]));
        c.is(&(x / y), &array![INF, -INF, NAN]);
    }),
    ("maximum", |c| {
        binary(c, (-3.0, 3.0), |x, y| x.maximum(y), f64::max);
        let (x, y) = (c.arg(&array![1f32, NAN, NAN, -INF]), c.arg(&array![NAN, 1f32, NAN, 3.0]));
        c.is(&x.maximum(&y), &array![NAN, NAN, NAN, 3.0]);
        let x = c.arg(&array![200u8, 3]);
        c.is(&x.maximum(100), &array![200u8, 100]);
        logic(c, |x, y| x.maximum(y), [false, true, true, true]);
    }),
    ("minimum", |c| {
        binary(c, (-3.0, 3.0), |x, y| x.minimum(y), f64::min);
        let (x, y) = (c.arg(&array![1f32, NAN, NAN, -INF]), c.arg(&array![NAN, 1f32, NAN, 3.0]));
        c.is(&x.minimum(&y), &array![NAN, NAN, NAN, -INF]);
        let x = c.arg(&array![-100i8, 3]);
        c.is(&x.minimum(-3), &array![-100i8, -3]);
        logic(c, |x, y| x.minimum(y), [false, false, false, true]);
    }),
    ("multiply", |c| {
        binary(c, (-3.0, 3.0), |x, y| x * y, |x, y| x * y);
        let (x, y) = (c.arg(&array![i64::MAX, -3]), c.arg(&array![2i64, 5]));
        c.is(&(x * y), &array![-2i64, -15]);
        let x = c.arg(&array![-100i8, 11]);
        c.is(&(&x * 3), &array![-44i8, 33]);
    }),
    ("or", |c| {
        logic(c, |x, y| x | y, [false, true, true, true]);
        let (x, y) = (c.arg(&array![0b1100i32, -8]), c.arg(&array![0b1010i32, 3]));
        c.is(&(x | y), &array![0b1110i32, -5]);
    }),
    ("power", |c| {
        for dtype in FLOATS {
            let (x, left) = c.arg_as(&ramp(0.5, 3.0, &[3, 7]), dtype);
            let (y, right) = c.arg_as(&ramp(-2.0, 2.0, &[3, 7]), dtype);
            let wanted: ArrayD<f64> = Zip::from(&left).and(&right).map_collect(|&a, &b| a.powf(b));
            c.near(&x.pow(&y), &wanted);
        }
        let (x, y) = (c.arg(&array![0f32, -2.0, -8.0, 5.0]), c.arg(&array![0f32, 3.0, 0.5, 0.0]));
        c.is(&x.pow(&y), &array![1f32, -8.0, NAN, 1.0]);
        let (x, y) = (c.arg(&array![2i32, -3, 7]), c.arg(&array![10i32, 3, 0]));
        c.is(&x.pow(&y), &array![1024i32, -27, 1]);
    }),
    ("remainder", |c| {
        binary(c, (-3.0, 3.0), |x, y| x % y, |x, y| x % y);
        let (x, y) = (c.arg(&array![7i32, -7, 7, -7]), c.arg(&array![3i32, 3, -3, -3]));
        c.is(&(x % y), &array![1i32, -1, 1, -1]);
        let x = c.arg(&array![5.5f32, -5.5]);
        c.is(&(x % 2.0), &array![1.5f32, -1.5]);
    }),
    ("shift_left", |c| {
        let (x, y) = (c.arg(&array![1u32, 3, 1, 1]), c.arg(&array![4u32, 31, 32, 100]));
        c.is(&x.shift_left(&y), &array![16u32, 0x8000_0000, 0, 0]);
    }),
    ("shift_right_arithmetic", |c| {
        let (x, y) = (c.arg(&array![-16i32, 16, -1, -9]), c.arg(&array![2i32, 2, 31, 40]));
        c.is(&x.shift_right_arithmetic(&y), &array![-4i32, 4, -1, -1]);
    }),
    ("shift_right_logical", |c| {
        let (x, y) = (c.arg(&array![-16i32, 16, -1, -9]), c.arg(&array![2i32, 2, 31, 40]));
        c.is(&x.shift_right_logical(&y), &array![0x3fff_fffci32, 4, 1, 0]);
        let x = c.arg(&array![0xf0u8, 1]);
        c.is(&x.shift_right_logical(4), &array![15u8, 0]);
    }),
    ("subtract", |c| {
        binary(c, (-3.0, 3.0), |x, y| x - y, |x, y| x - y);
        let (x, y) = (c.arg(&array![0u16, 9]), c.arg(&array![1u16, 4]));
        c.is(&(x - y), &array![65535u16, 5]);
        let x = c.arg(&array![1f32, 2.0]);
        c.is(&(1.0 - x), &array![0f32, -1.0]);
    }),
    ("xor", |c| {
        logic(c, |x, y| x ^ y, [false, true, true, false]);
        let (x, y) = (c.arg(&array![0b1100u64, u64::MAX]), c.arg(&array![0b1010u64, 1]));
        c.is(&(x ^ y), &array![0b0110u64, u64::MAX - 1]);
    }),
    ("compare", |c| {
        let (x, y) = (c.arg(&array![1f32, 2.0, NAN, -0.0]), c.arg(&array![2f32, 2.0, NAN, 0.0]));
        c.is(&x.eq(&y), &array![false, true, false, true]);
        c.is(&x.ne(&y), &array![true, false, true, false]);
        c.is(&x.lt(&y), &array![true, false, false, false]);
        c.is(&x.le(&y), &array![true, true, false, true]);
        c.is(&x.gt(&y), &array![false, false, false, false]);
        c.is(&x.ge(&y), &array![false, true, false, true]);
        let x = c.arg(&array![-1i8, 1]);
        c.is(&x.lt(0), &array![true, false]);
        let x = c.arg(&array![0xffu8, 1]);
        c.is(&x.lt(2), &array![false, true]);
        let (x, y) = (c.arg(&array![false, true]), c.arg(&array![true, true]));
        c.is(&x.lt(&y), &array![true, false]);
    }),
    ("select", |c| {
        let p = c.arg(&array![true, false, true]);
        let (x, y) = (c.arg(&array![1f32, 2.0, 3.0]), c.arg(&array![-1f32, -2.0, -3.0]));
        c.is(&p.select(&x, &y), &array![1f32, -2.0, 3.0]);
        c.is(&p.select(&x, f64::NEG_INFINITY), &array![1f32, -INF, 3.0]);
        let x = c.arg(&array![7i64, 8, 9]);
        c.is(&p.select(&x, 0), &array![7i64, 0, 9]);
    }),
    ("clamp", |c| {
        let x = c.arg(&array![-5f32, 0.5, 5.0, NAN]);
        c.is(&x.clamp(-1.0, 1.0), &array![-1f32, 0.5, 1.0, NAN]);
        let x = c.arg(&array![-5i32, 3, 50]);
        c.is(&x.clamp(0, 10), &array![0i32, 3, 10]);
    }),
    ("convert", |c| {
        let x = c.arg(&array![1.0f32, 1.003_906_3, -2.75, 65504.0, INF]);
        c.is(&x.cast(DType::BF16), &array![1.0f32, 1.003_906_3, -2.75, 65504.0, INF].mapv(bf16::from_f32));
        c.is(&x.cast(DType::F16), &array![1.0f32, 1.003_906_3, -2.75, 65504.0, INF].mapv(f16::from_f32));
        c.is(&x.cast(DType::F64), &array![1.0f64, f64::from(1.003_906_3f32), -2.75, 65504.0, f64::INFINITY]);
        let x = c.arg(&array![-2.75f32, 2.75, 0.0, -0.5]);
        c.is(&x.cast(DType::I32), &array![-2i32, 2, 0, 0]);
        c.is(&x.cast(DType::Pred), &array![true, true, false, true]);
        let x = c.arg(&array![300i32, -1]);
        c.is(&x.cast(DType::U8), &array![44u8, 255]);
        c.is(&x.cast(DType::I64), &array![300i64, -1]);
        let x = c.arg(&array![true, false]);
        c.is(&x.cast(DType::F32), &array![1f32, 0.0]);
        let x = c.arg(&array![u64::MAX, 1]);
        c.is(&x.cast(DType::F64), &array![18446744073709551616f64, 1.0]);
        // f8E4M3FN: 1 = 0x38, 448 = 0x7e the largest; f8E5M2: 1 = 0x3c. Ties go to even.
        let x = c.arg(&array![1f32, -2.0, 0.0625, 448.0, 1.0625]);
        c.is_bytes(&x.cast(DType::F8E4M3FN), &[0x38, 0xc0, 0x18, 0x7e, 0x38]);
        c.is_bytes(&x.cast(DType::F8E5M2), &[0x3c, 0xc0, 0x2c, 0x5f, 0x3c]);
        let x = c.arg_bytes(&[0x38, 0xc0, 0x18, 0x7e, 0x7f], DType::F8E4M3FN, &[5]);
        c.is(&x.cast(DType::F32), &array![1f32, -2.0, 0.0625, 448.0, NAN]);
        let x = c.arg_bytes(&[0x3c, 0xc0, 0x7c, 0xfc, 0x7e], DType::F8E5M2, &[5]);
        c.is(&x.cast(DType::BF16), &array![1f32, -2.0, INF, -INF, NAN].mapv(bf16::from_f32));
        let x = c.arg_bytes(&[7, 0xf8, 0xff], DType::I4, &[3]);
        c.is(&x.cast(DType::F32), &array![7f32, -8.0, -1.0]);
        let x = c.arg_bytes(&[7, 8, 15], DType::U4, &[3]);
        c.is(&x.cast(DType::I8), &array![7i8, 8, 15]);
        let x = c.arg(&array![-8i32, 7, -1]);
        c.is(&x.cast(DType::I4).cast(DType::I32), &array![-8i32, 7, -1]);
    }),
    ("bitcast_convert", |c| {
        let x = c.arg(&array![1f32, -0.0, NAN]);
        c.is(&x.bitcast(DType::U32), &array![0x3f80_0000u32, 0x8000_0000, NAN.to_bits()]);
        // To a narrower type an axis is added, the lowest bits first; to a wider one it is folded.
        c.is(&x.bitcast(DType::U16), &array![[0u16, 0x3f80], [0, 0x8000], [0, 0x7fc0]]);
        let x = c.arg(&array![[1u8, 2, 3, 4], [0xff, 0, 0, 0x80]]);
        c.is(&x.bitcast(DType::I32), &array![0x0403_0201i32, -2147483393]);
        let x = c.arg(&array![0x21u8, 0xf8]);
        c.is(&x.bitcast(DType::U4).cast(DType::U8), &array![[1u8, 2], [8, 15]]);
    }),
    ("reduce_precision", |c| {
        let x = c.arg(&array![1.0f32, 1.003_906_3, 1.9, -3.3]);
        c.is(&x.reduce_precision(8, 7), &array![1.0f32, 1.003_906_3, 1.9, -3.3].mapv(|x| bf16::from_f32(x).to_f32()));
        c.is(&x.reduce_precision(5, 10), &array![1.0f32, 1.003_906_3, 1.9, -3.3].mapv(|x| f16::from_f32(x).to_f32()));
    }),
];
