//! Changes of element type.

use super::unary::Class;
use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// Values converted to another element type, rounded to nearest even between floats.
#[derive(Clone, Debug)]
pub struct Convert {
    /// The new element type.
    pub dtype: DType,
}

op_info!(Convert, 1, "convert", "values in another element type");

impl Op for Convert {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        Ok(vec![Aval::new(self.dtype, &inputs[0].shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.convert {} : {}", cx.operands(), cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let dtype = cx.input_aval(0).dtype;
        Ok(vec![Some(cx.ct().cast(dtype))])
    }
}

/// The same bits read as another element type. To a narrower type a last axis is added, to a wider one the last axis
/// is folded into it.
#[derive(Clone, Debug)]
pub struct BitcastConvert {
    /// The new element type.
    pub dtype: DType,
}

op_info!(BitcastConvert, 1, "bitcast_convert", "the same bits as another element type", Zero "bits are not values");

impl Op for BitcastConvert {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let x = inputs[0];
        let (from, to) = (x.dtype.bits(), self.dtype.bits());
        let mut shape = x.shape.clone();
        if (from == 1) != (to == 1) {
            return Err(format!("pred has no bits to read as another type: {x} to {}; use cast", self.dtype));
        } else if from > to {
            shape.push(from / to);
        } else if from < to && shape.pop() != Some(to / from) {
            let ratio = to / from;
            return Err(format!("{x} to {} folds the last axis: it must have length {ratio}", self.dtype));
        }
        Ok(vec![Aval::new(self.dtype, &shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.bitcast_convert {} : {}", cx.operands(), cx.signature())
    }
}

/// Floats rounded to fewer bits, kept in their type.
#[derive(Clone, Debug)]
pub struct ReducePrecision {
    /// Bits of the exponent, at least 1.
    pub exponent_bits: u32,
    /// Bits of the mantissa, without the hidden one.
    pub mantissa_bits: u32,
}

op_info!(ReducePrecision, 1, "reduce_precision", "floats rounded to fewer bits");

impl Op for ReducePrecision {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        Class::Float.check(inputs[0])?;
        if self.exponent_bits == 0 {
            return Err("the exponent needs at least 1 bit, found 0".into());
        }
        Ok(vec![inputs[0].clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let format = format!("e{}m{}", self.exponent_bits, self.mantissa_bits);
        format!("stablehlo.reduce_precision {}, format = {format} : {}", cx.operands(), cx.output_type(0))
    }

    /// That of the number before it was rounded, as for [`Convert`].
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        Ok(vec![Some(cx.ct())])
    }
}

/// The operand, through which no gradient flows.
#[derive(Clone, Debug)]
pub struct StopGradient;

op_info!(StopGradient, 1, "stop_gradient", "a value that has no gradient", Zero "by its definition");

impl Op for StopGradient {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        Ok(vec![inputs[0].clone()])
    }

    fn stablehlo(&self, _cx: &mut Cx<'_, '_>) -> String {
        String::new()
    }

    fn passes(&self) -> Option<usize> {
        Some(0)
    }
}

impl Tensor {
    /// The values in another element type, rounded to nearest even between floats, towards zero from float to
    /// integer; `self` where it has that type already. To `pred` it asks whether a value is not zero.
    #[track_caller]
    pub fn cast(&self, dtype: DType) -> Tensor {
        if self.dtype() == dtype { self.clone() } else { self.graph.apply1(Convert { dtype }, &[self]) }
    }

    /// The same bits as another element type; see [`BitcastConvert`] for what the shape becomes.
    #[track_caller]
    pub fn bitcast(&self, dtype: DType) -> Tensor {
        self.graph.apply1(BitcastConvert { dtype }, &[self])
    }

    /// Rounds floats to this many bits of exponent and mantissa without changing the element type.
    #[track_caller]
    pub fn reduce_precision(&self, exponent_bits: u32, mantissa_bits: u32) -> Tensor {
        self.graph.apply1(ReducePrecision { exponent_bits, mantissa_bits }, &[self])
    }
}

#[cfg(test)]
mod tests {
    use crate::DType::{BF16, F16, F32, I4, Pred, U8, U32};
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn text() {
        assert_eq!(
            last_line(|g| vec![g.arg("x", F32, &[2]).cast(BF16)]),
            "%convert = stablehlo.convert %x : (tensor<2xf32>) -> tensor<2xbf16>"
        );
        assert!(lines(|g| vec![g.arg("x", F32, &[2]).cast(F32)]).is_empty());
        let bitcast = |from, shape: &[usize], to| last_line(|g| vec![g.arg("x", from, shape).bitcast(to)]);
        assert!(bitcast(F32, &[2], U32).ends_with("(tensor<2xf32>) -> tensor<2xui32>"));
        assert!(bitcast(F32, &[2], U8).ends_with("(tensor<2xf32>) -> tensor<2x4xui8>"));
        assert!(bitcast(U8, &[2, 8], I4).ends_with("(tensor<2x8xui8>) -> tensor<2x8x2xi4>"));
        assert!(bitcast(U8, &[2, 2], F16).ends_with("(tensor<2x2xui8>) -> tensor<2xf16>"));
        assert_eq!(
            last_line(|g| vec![g.arg("x", F32, &[2]).reduce_precision(5, 10)]),
            "%reduce_precision = stablehlo.reduce_precision %x, format = e5m10 : tensor<2xf32>"
        );
    }

    #[test]
    fn errors() {
        assert_eq!(
            error(|g| vec![g.arg("x", U8, &[2, 3]).bitcast(F32)]),
            "bitcast_convert: ui8[2,3] to f32 folds the last axis: it must have length 4"
        );
        assert!(error(|g| vec![g.arg("x", Pred, &[8]).bitcast(U8)]).contains("pred has no bits"));
        assert!(error(|g| vec![g.arg("x", F32, &[8]).reduce_precision(0, 3)]).contains("at least 1 bit"));
    }
}
