//! Float element types of parameters, and conversion between them.

use std::fmt;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The element type of a stored parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE half precision.
    F16,
    /// The upper half of a float32.
    BF16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
}

impl DType {
    /// Every type, in declaration order.
    pub const ALL: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F16 | DType::BF16 => 2,
            DType::F32 => 4,
            DType::F64 => 8,
        }
    }

    /// The name that safetensors files use (`F32`).
    pub fn name(self) -> &'static str {
        match self {
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::F32 => "F32",
            DType::F64 => "F64",
        }
    }

    /// The name that transformers' `config.json` uses (`float32`).
    pub fn torch_name(self) -> &'static str {
        match self {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::F32 => "float32",
            DType::F64 => "float64",
        }
    }

    /// Reads `f32`, `F32`, `float32` or `torch.float32` (and so on); `None` for anything else.
    pub fn parse(name: &str) -> Option<DType> {
        let name = name.strip_prefix("torch.").unwrap_or(name).to_ascii_lowercase();
        match name.as_str() {
            "half" => Some(DType::F16),
            "float" => Some(DType::F32),
            "double" => Some(DType::F64),
            _ => DType::ALL.into_iter().find(|d| name == d.torch_name() || name == d.name().to_ascii_lowercase()),
        }
    }
}

impl From<DType> for safetensors::Dtype {
    fn from(dtype: DType) -> safetensors::Dtype {
        match dtype {
            DType::F16 => safetensors::Dtype::F16,
            DType::BF16 => safetensors::Dtype::BF16,
            DType::F32 => safetensors::Dtype::F32,
            DType::F64 => safetensors::Dtype::F64,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Elements that are converted at a time, on the stack.
const BLOCK: usize = 1024;

/// A finite value that the narrower type cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Overflow {
    /// The value of greatest magnitude among those that do not fit.
    pub(crate) value: f64,
}

/// Converts little-endian elements from one type to another, rounding to nearest even. Infinities and NaNs stay what
/// they are. `src` and `dst` hold the same number of elements.
pub(crate) fn cast(src: &[u8], from: DType, dst: &mut [u8], to: DType) -> Result<(), Overflow> {
    if from == to {
        dst.copy_from_slice(src);
        return Ok(());
    }
    let mut floats = [0.0f32; BLOCK];
    for (src, dst) in src.chunks(BLOCK * from.size()).zip(dst.chunks_mut(BLOCK * to.size())) {
        let floats = &mut floats[..src.len() / from.size()];
        if from == DType::F64 {
            narrow_double(src.as_chunks().0, floats, dst, to)?;
        } else {
            widen(src, from, floats);
            narrow(floats, dst, to)?;
        }
    }
    Ok(())
}

/// Exact float32 values of elements of another type than float64.
fn widen(src: &[u8], from: DType, floats: &mut [f32]) {
    match from {
        DType::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            let halves = &mut halves[..floats.len()];
            halves.iter_mut().zip(src.as_chunks().0).for_each(|(h, &bytes)| *h = f16::from_le_bytes(bytes));
            halves.convert_to_f32_slice(floats);
        }
        DType::BF16 => {
            floats.iter_mut().zip(src.as_chunks().0).for_each(|(x, &bytes)| *x = bf16::from_le_bytes(bytes).to_f32())
        }
        _ => floats.iter_mut().zip(src.as_chunks().0).for_each(|(x, &bytes)| *x = f32::from_le_bytes(bytes)),
    }
}

/// Rounds float32 values to elements of `to`.
pub(crate) fn narrow(floats: &[f32], dst: &mut [u8], to: DType) -> Result<(), Overflow> {
    for (floats, dst) in floats.chunks(BLOCK).zip(dst.chunks_mut(BLOCK * to.size())) {
        match to {
            DType::F16 => {
                let mut halves = [f16::ZERO; BLOCK];
                let halves = &mut halves[..floats.len()];
                halves.convert_from_f32_slice(floats);
                dst.as_chunks_mut().0.iter_mut().zip(&*halves).for_each(|(bytes, h)| *bytes = h.to_le_bytes());
                check(floats, halves, |h| h.is_infinite())?;
            }
            DType::BF16 => {
                let mut halves = [bf16::ZERO; BLOCK];
                let halves = &mut halves[..floats.len()];
                halves.convert_from_f32_slice(floats);
                dst.as_chunks_mut().0.iter_mut().zip(&*halves).for_each(|(bytes, h)| *bytes = h.to_le_bytes());
                check(floats, halves, |h| h.is_infinite())?;
            }
            DType::F32 => dst.as_chunks_mut().0.iter_mut().zip(floats).for_each(|(bytes, x)| *bytes = x.to_le_bytes()),
            DType::F64 => {
                dst.as_chunks_mut().0.iter_mut().zip(floats).for_each(|(bytes, &x)| *bytes = f64::from(x).to_le_bytes())
            }
        }
    }
    Ok(())
}

/// Fails if a finite value became infinite.
fn check<T: Copy>(floats: &[f32], narrowed: &[T], infinite: impl Fn(T) -> bool) -> Result<(), Overflow> {
    let too_large = floats.iter().zip(narrowed).filter(|&(x, &n)| infinite(n) && x.is_finite());
    match too_large.map(|(&x, _)| f64::from(x)).max_by(|a, b| a.abs().total_cmp(&b.abs())) {
        Some(value) => Err(Overflow { value }),
        None => Ok(()),
    }
}

/// [`cast`] from float64, rounding once. `floats` is room for as many values.
fn narrow_double(src: &[[u8; 8]], floats: &mut [f32], dst: &mut [u8], to: DType) -> Result<(), Overflow> {
    let doubles = || src.iter().map(|&bytes| f64::from_le_bytes(bytes));
    let round = if to == DType::F32 { |x| x as f32 } else { round_to_odd };
    floats.iter_mut().zip(doubles()).for_each(|(float, x)| *float = round(x));
    let fits = narrow(floats, dst, to).is_ok()
        && floats.iter().zip(doubles()).all(|(f, x)| !f.is_infinite() || x.is_infinite());
    if fits {
        return Ok(());
    }
    let largest = doubles().filter(|x| x.is_finite()).max_by(|a, b| a.abs().total_cmp(&b.abs()));
    Err(Overflow { value: largest.unwrap_or(f64::INFINITY) })
}

/// The float32 next to `x` towards zero, its last bit set if anything was cut off. Rounding that to a narrower type is
/// the same as rounding `x` (S. Boldo and G. Melquiond, "When double rounding is odd", 2005).
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || x.is_nan() {
        return nearest;
    }
    let towards_zero = nearest.to_bits() - u32::from(f64::from(nearest).abs() > x.abs());
    f32::from_bits(towards_zero | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn cast_vec(src: &[u8], from: DType, to: DType) -> Result<Vec<u8>, Overflow> {
        let mut dst = vec![0; src.len() / from.size() * to.size()];
        cast(src, from, &mut dst, to).map(|()| dst)
    }

    #[test]
    fn names() {
        for d in DType::ALL {
            for name in [d.name(), d.torch_name(), &d.name().to_lowercase(), &format!("torch.{}", d.torch_name())] {
                assert_eq!(DType::parse(name), Some(d));
            }
        }
        assert_eq!(DType::parse("int8"), None);
    }

    #[test]
    fn rounds_to_nearest_even() {
        // between 1 and 1 + 2^-7 (bf16), a tie goes to the even mantissa; one bit above it goes up
        let src = f32s(&[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.0 / 256.0 + 1.0 / 65536.0, -0.0]);
        let expected = [1.0, 1.0 + 4.0 / 256.0, 1.0 + 2.0 / 256.0, -0.0].map(bf16::from_f32);
        let bytes: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(cast_vec(&src, DType::F32, DType::BF16), Ok(bytes));
    }

    #[test]
    fn double_rounds_once() {
        // above the tie between two bfloat16 by less than float32 can see: through float32 it would go down
        let x = 1.0 + 1.0 / 256.0 + 2f64.powi(-40);
        for (x, expected) in [(x, 1.0 + 1.0 / 128.0), (-x, -1.0 - 1.0 / 128.0), (2.0 - x, 1.0 - 1.0 / 256.0)] {
            let expected = bf16::from_f32(expected).to_le_bytes().to_vec();
            assert_eq!(cast_vec(&x.to_le_bytes(), DType::F64, DType::BF16), Ok(expected), "{x}");
        }
        assert_eq!(cast_vec(&x.to_le_bytes(), DType::F64, DType::F32), Ok(f32s(&[x as f32])));
    }

    #[test]
    fn widening_and_back_is_the_identity() {
        for narrow in [DType::F16, DType::BF16] {
            let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            for wide in [DType::F32, DType::F64] {
                let there = cast_vec(&all, narrow, wide).expect("wider");
                let back = cast_vec(&there, wide, narrow).expect("it came from there");
                for (a, b) in all.as_chunks().0.iter().zip(back.as_chunks().0) {
                    let nan = match narrow {
                        DType::F16 => f16::from_le_bytes(*a).is_nan() && f16::from_le_bytes(*b).is_nan(),
                        _ => bf16::from_le_bytes(*a).is_nan() && bf16::from_le_bytes(*b).is_nan(),
                    };
                    assert!(nan || a == b, "{narrow} {a:?} {b:?}");
                }
            }
        }
    }

    #[test]
    fn a_finite_value_never_becomes_infinite() {
        let src = f32s(&[1.0, 70000.0, -80000.0, f32::INFINITY, f32::NAN]);
        assert_eq!(cast_vec(&src, DType::F32, DType::F16), Err(Overflow { value: -80000.0 }));
        assert_eq!(cast_vec(&f32s(&[f32::MAX]), DType::F32, DType::BF16), Err(Overflow { value: f32::MAX.into() }));
        assert_eq!(cast_vec(&1e300f64.to_le_bytes(), DType::F64, DType::F32), Err(Overflow { value: 1e300 }));
        cast_vec(&f32s(&[65504.0, f32::INFINITY, f32::NAN]), DType::F32, DType::F16).expect("all fit");
    }
}
