//! Values that are part of the program.

use std::fmt;
use std::rc::Rc;

use half::{bf16, f16};

use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::{Aval, join};
use crate::graph::emit::Cx;
use crate::graph::graph::Graph;
use crate::graph::tensor::Tensor;

/// Arrays up to this many elements are written out; larger ones become a hexadecimal blob.
const WRITTEN_OUT: usize = 64;

/// A number that is given an element type later.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Scalar {
    Float(f64),
    Int(i128),
    Bool(bool),
}

impl From<f64> for Scalar {
    fn from(value: f64) -> Self {
        Scalar::Float(value)
    }
}

impl From<i64> for Scalar {
    fn from(value: i64) -> Self {
        Scalar::Int(value.into())
    }
}

impl From<bool> for Scalar {
    fn from(value: bool) -> Self {
        Scalar::Bool(value)
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scalar::Float(value) => write!(f, "{value:?}"),
            Scalar::Int(value) => write!(f, "{value}"),
            Scalar::Bool(value) => write!(f, "{value}"),
        }
    }
}

impl Scalar {
    /// Checks that the number fits the element type, and gives it in the type's own kind.
    fn fit(self, dtype: DType) -> Result<Scalar, String> {
        let wrong = |why: &str| Err(format!("{self} as {dtype}: {why}"));
        if dtype == DType::Pred {
            return if let Scalar::Bool(_) = self { Ok(self) } else { wrong("a pred is true or false") };
        }
        let int = match self {
            Scalar::Bool(_) => return wrong("true and false are of type pred"),
            Scalar::Float(value) if dtype.is_float() => return Ok(Scalar::Float(value)),
            Scalar::Int(value) if dtype.is_float() => return Ok(Scalar::Float(value as f64)),
            Scalar::Float(value) if value.fract() != 0.0 || value.abs() >= 2f64.powi(63) => {
                return wrong("not a whole number of that type");
            }
            Scalar::Float(value) => value as i128,
            Scalar::Int(value) => value,
        };
        let (low, high) = integer_range(dtype);
        if (low..=high).contains(&int) {
            Ok(Scalar::Int(int))
        } else {
            wrong(&format!("the type holds {low} to {high}"))
        }
    }
}

/// Smallest and largest value of an integer type.
pub(crate) fn integer_range(dtype: DType) -> (i128, i128) {
    let bits = dtype.bits() as u32;
    if dtype.is_signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

/// The contents of a [`Constant`].
#[derive(Clone, Debug)]
pub enum Value {
    /// One number for every element.
    Splat(Scalar),
    /// Every element, row by row, in host form (little endian; 4-bit types and `pred` one byte each).
    Dense(Rc<[u8]>),
}

/// An array that is part of the program.
#[derive(Clone, Debug)]
pub struct Constant {
    /// Element type and shape.
    pub aval: Aval,
    /// The contents.
    pub value: Value,
}

op_info!(Constant, 0, "constant", "an array that is part of the program", Zero "it has no operands");

impl Constant {
    /// One number for every element.
    pub fn splat(value: Scalar, dtype: DType, shape: &[usize]) -> Constant {
        Constant { aval: Aval::new(dtype, shape), value: Value::Splat(value) }
    }
}

impl Op for Constant {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, _inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        match &self.value {
            Value::Splat(value) => {
                value.fit(self.aval.dtype)?;
            }
            Value::Dense(bytes) => {
                let wanted = self.aval.elements().saturating_mul(self.aval.dtype.size());
                if bytes.len() != wanted {
                    return Err(format!("{} takes {wanted} bytes, found {}", self.aval, bytes.len()));
                }
            }
        }
        Ok(vec![self.aval.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let dtype = self.aval.dtype;
        let body = match &self.value {
            Value::Splat(value) => splat_text(value.fit(dtype).unwrap_or(*value), dtype),
            Value::Dense(bytes) => dense_text(bytes, &self.aval),
        };
        format!("stablehlo.constant dense<{body}> : {}", cx.output_type(0))
    }
}

/// A number as a literal of its type.
pub(crate) fn splat_text(value: Scalar, dtype: DType) -> String {
    match value {
        Scalar::Float(value) => float_text(value, dtype),
        other => other.to_string(),
    }
}

/// A float that reads back as the same bits of its type: decimal where finite, bits otherwise.
fn float_text(value: f64, dtype: DType) -> String {
    if !value.is_finite() {
        return float_bits(value, dtype);
    }
    let short = match dtype {
        DType::F64 => format!("{value:?}"),
        _ => format!("{:?}", value as f32),
    };
    let same = short.parse::<f64>().is_ok_and(|read| read as f32 == value as f32);
    // MLIR wants a point before the exponent.
    let text = if same { short } else { format!("{value:?}") };
    match text.split_once('e') {
        Some((digits, exponent)) if !digits.contains('.') => format!("{digits}.0e{exponent}"),
        _ => text,
    }
}

/// Infinity or NaN as the bits of its type.
fn float_bits(value: f64, dtype: DType) -> String {
    match dtype {
        DType::F64 => format!("0x{:016X}", value.to_bits()),
        DType::F32 => format!("0x{:08X}", (value as f32).to_bits()),
        DType::BF16 => format!("0x{:04X}", bf16::from_f64(value).to_bits()),
        DType::F16 => format!("0x{:04X}", f16::from_f64(value).to_bits()),
        // Sign bit, then: E5M2 has infinities and NaN, E4M3FN only NaN.
        _ => {
            let sign = if value.is_sign_negative() { 0x80 } else { 0 };
            let bits = if dtype == DType::F8E5M2 && value.is_infinite() { 0x7C } else { 0x7F };
            format!("0x{:02X}", sign | bits)
        }
    }
}

/// The elements of a dense array: nested lists where it is small, a blob where it is large.
fn dense_text(bytes: &[u8], aval: &Aval) -> String {
    let written = matches!(aval.dtype, DType::Pred | DType::I4 | DType::U4)
        || (aval.elements() <= WRITTEN_OUT && !matches!(aval.dtype, DType::F8E4M3FN | DType::F8E5M2));
    if aval.elements() == 0 {
        return String::new();
    }
    if !written {
        let mut text = String::from("\"0x");
        for byte in bytes {
            text += &format!("{byte:02X}");
        }
        return text + "\"";
    }
    let elements: Vec<String> =
        bytes.chunks_exact(aval.dtype.size()).map(|bytes| element_text(bytes, aval.dtype)).collect();
    nested(&elements, &aval.shape)
}

/// `[[a, b], [c, d]]`.
fn nested(elements: &[String], shape: &[usize]) -> String {
    match shape {
        [] => join(elements, ", "),
        [_] => format!("[{}]", join(elements, ", ")),
        [n, rest @ ..] => {
            let rows: Vec<_> = elements.chunks(elements.len() / n).map(|row| nested(row, rest)).collect();
            format!("[{}]", join(&rows, ", "))
        }
    }
}

/// One element from its bytes.
fn element_text(bytes: &[u8], dtype: DType) -> String {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let bits = u64::from_le_bytes(wide);
    match dtype {
        DType::Pred => (bits != 0).to_string(),
        DType::F64 => float_text(f64::from_bits(bits), dtype),
        DType::F32 => float_text(f32::from_bits(bits as u32).into(), dtype),
        DType::BF16 => float_text(bf16::from_bits(bits as u16).into(), dtype),
        DType::F16 => float_text(f16::from_bits(bits as u16).into(), dtype),
        dtype if dtype.is_signed() => {
            let unused = 64 - 8 * bytes.len() as u32;
            ((bits << unused) as i64 >> unused).to_string()
        }
        _ => bits.to_string(),
    }
}

/// The position along one axis, as a value.
#[derive(Clone, Debug)]
pub struct Iota {
    /// Element type and shape.
    pub aval: Aval,
    /// The axis that is counted along.
    pub axis: usize,
}

op_info!(Iota, 0, "iota", "the position along one axis", Zero "it has no operands");

impl Op for Iota {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, _inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        if self.axis >= self.aval.rank() {
            return Err(format!("axis {} of {}, which has rank {}", self.axis, self.aval, self.aval.rank()));
        }
        super::unary::Class::Numeric.check(&self.aval)?;
        Ok(vec![self.aval.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.iota dim = {} : {}", self.axis, cx.output_type(0))
    }
}

/// A Rust type that is an element type of a graph.
pub trait Element: Copy {
    /// The element type.
    const DTYPE: DType;
    /// Appends the host form, little endian.
    fn write(self, bytes: &mut Vec<u8>);
}

macro_rules! element {
    ($($type:ty => $dtype:ident),*) => {
        $(
            impl Element for $type {
                const DTYPE: DType = DType::$dtype;
                fn write(self, bytes: &mut Vec<u8>) {
                    bytes.extend_from_slice(&self.to_le_bytes());
                }
            }
        )*
    };
}

element!(i8 => I8, i16 => I16, i32 => I32, i64 => I64, u8 => U8, u16 => U16, u32 => U32, u64 => U64);
element!(f16 => F16, bf16 => BF16, f32 => F32, f64 => F64);

impl Element for bool {
    const DTYPE: DType = DType::Pred;
    fn write(self, bytes: &mut Vec<u8>) {
        bytes.push(self.into());
    }
}

impl Graph {
    /// A scalar constant. Errors: a number that the element type does not hold.
    #[track_caller]
    pub fn scalar(&self, value: impl Into<Scalar>, dtype: DType) -> Tensor {
        self.full(value, dtype, &[])
    }

    /// A constant with one number for every element. Errors: a number that the element type does not hold.
    #[track_caller]
    pub fn full(&self, value: impl Into<Scalar>, dtype: DType, shape: &[usize]) -> Tensor {
        self.apply1(Constant::splat(value.into(), dtype, shape), &[])
    }

    /// A constant from its elements, row by row. Errors: a number of elements that is not the shape's.
    #[track_caller]
    pub fn constant<T: Element>(&self, values: &[T], shape: &[usize]) -> Tensor {
        let mut bytes = Vec::with_capacity(values.len() * T::DTYPE.size());
        values.iter().for_each(|value| value.write(&mut bytes));
        self.constant_bytes(&bytes, T::DTYPE, shape)
    }

    /// A constant from its bytes in host form, row by row (little endian; 4-bit types and `pred` one byte each).
    /// Errors: a number of bytes that is not that of the type and shape.
    #[track_caller]
    pub fn constant_bytes(&self, bytes: &[u8], dtype: DType, shape: &[usize]) -> Tensor {
        self.apply1(Constant { aval: Aval::new(dtype, shape), value: Value::Dense(bytes.into()) }, &[])
    }

    /// 0, 1, 2, … along `axis`, the same along every other axis.
    #[track_caller]
    pub fn iota(&self, dtype: DType, shape: &[usize], axis: usize) -> Tensor {
        self.apply1(Iota { aval: Aval::new(dtype, shape), axis }, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{BF16, F8E4M3FN, F8E5M2, F32, F64, I4, I8, I32, Pred, U8};
    use crate::graph::testing::{error, last_line};

    fn constant(build: impl FnOnce(&Graph) -> Tensor) -> String {
        last_line(|g| vec![build(g)]).replace("%constant = stablehlo.constant ", "")
    }

    #[test]
    fn splats() {
        assert_eq!(constant(|g| g.scalar(1, F32)), "dense<1.0> : tensor<f32>");
        assert_eq!(constant(|g| g.full(0.1, BF16, &[2])), "dense<0.1> : tensor<2xbf16>");
        assert_eq!(constant(|g| g.scalar(0.1, F64)), "dense<0.1> : tensor<f64>");
        assert_eq!(constant(|g| g.scalar(1e-30, F32)), "dense<1.0e-30> : tensor<f32>");
        assert_eq!(constant(|g| g.scalar(2.0, I8)), "dense<2> : tensor<i8>");
        assert_eq!(constant(|g| g.scalar(true, Pred)), "dense<true> : tensor<i1>");
        assert_eq!(constant(|g| g.scalar(f64::NEG_INFINITY, F32)), "dense<0xFF800000> : tensor<f32>");
        assert_eq!(constant(|g| g.scalar(f64::INFINITY, BF16)), "dense<0x7F80> : tensor<bf16>");
        assert_eq!(constant(|g| g.scalar(f64::NEG_INFINITY, F8E5M2)), "dense<0xFC> : tensor<f8E5M2>");
        assert_eq!(constant(|g| g.scalar(f64::NAN, F8E4M3FN)), "dense<0x7F> : tensor<f8E4M3FN>");
    }

    #[test]
    fn arrays() {
        assert_eq!(
            constant(|g| g.constant(&[1.5f32, f32::NAN, -0.0, 1e-45], &[2, 2])),
            "dense<[[1.5, 0x7FC00000], [-0.0, 1.0e-45]]> : tensor<2x2xf32>"
        );
        assert_eq!(constant(|g| g.constant(&[-1i8, 127], &[2])), "dense<[-1, 127]> : tensor<2xi8>");
        assert_eq!(constant(|g| g.constant(&[u64::MAX], &[1])), format!("dense<[{}]> : tensor<1xui64>", u64::MAX));
        assert_eq!(constant(|g| g.constant(&[true, false], &[2])), "dense<[true, false]> : tensor<2xi1>");
        assert_eq!(constant(|g| g.constant_bytes(&[0xFF, 7], I4, &[2])), "dense<[-1, 7]> : tensor<2xi4>");
        assert_eq!(constant(|g| g.constant(&[0f32; 0], &[0, 2])), "dense<> : tensor<0x2xf32>");
        let blob = constant(|g| g.constant(&[258u16; 65], &[65]));
        assert_eq!(blob, format!("dense<\"0x{}\"> : tensor<65xui16>", "0201".repeat(65)));
    }

    #[test]
    fn iota() {
        assert_eq!(last_line(|g| vec![g.iota(I32, &[2, 3], 1)]), "%iota = stablehlo.iota dim = 1 : tensor<2x3xi32>");
    }

    #[test]
    fn errors() {
        let scalar = |value: Scalar, dtype| error(|g| vec![g.scalar(value, dtype)]);
        assert_eq!(scalar(Scalar::Int(300), U8), "constant: 300 as ui8: the type holds 0 to 255");
        assert_eq!(scalar(Scalar::Int(-9), I4), "constant: -9 as i4: the type holds -8 to 7");
        assert_eq!(scalar(Scalar::Int(1), Pred), "constant: 1 as i1: a pred is true or false");
        assert_eq!(scalar(Scalar::Bool(true), F32), "constant: true as f32: true and false are of type pred");
        assert_eq!(scalar(Scalar::Float(f64::NAN), I32), "constant: NaN as i32: not a whole number of that type");
        assert_eq!(error(|g| vec![g.constant(&[1f32], &[2])]), "constant: f32[2] takes 8 bytes, found 4");
        assert_eq!(error(|g| vec![g.iota(I32, &[2], 1)]), "iota: axis 1 of i32[2], which has rank 1");
    }
}
