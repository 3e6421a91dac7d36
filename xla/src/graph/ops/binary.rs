//! Elementwise ops of two operands of one type and shape.

use super::unary::Class;
use super::{Op, OpInfo, op_info};
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::tensor::{Operand, Tensor};

/// The rule of elementwise operands: one type and one shape. The error says how to get there.
pub(crate) fn same(left: &Aval, right: &Aval) -> Result<(), String> {
    if left.dtype != right.dtype {
        return Err(format!(
            "the operands must have one element type: {left} on the left, {right} on the right; cast one"
        ));
    }
    if left.shape != right.shape {
        return Err(format!(
            "the operands must have one shape: {left} on the left, {right} on the right; broadcast one with broadcast_to"
        ));
    }
    Ok(())
}

/// Declares ops of two operands: docstring, type, class, StableHLO spelling (which is also the name) and summary, and
/// the method where the op has no operator.
macro_rules! binary {
    ($(#[$doc:meta] $op:ident $(. $method:ident)? ($class:ident) $spelling:literal $summary:literal;)*) => {
        $(
            #[$doc]
            #[derive(Clone, Debug)]
            pub struct $op;

            op_info!($op, 2, $spelling, $summary);

            impl Op for $op {
                fn info(&self) -> &'static OpInfo {
                    &Self::INFO
                }

                fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
                    same(inputs[0], inputs[1])?;
                    Class::$class.check(inputs[0])?;
                    Ok(vec![inputs[0].clone()])
                }

                fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
                    format!("stablehlo.{} {} : {}", $spelling, cx.operands(), cx.output_type(0))
                }
            }

            $(
                impl Tensor {
                    #[$doc]
                    #[track_caller]
                    pub fn $method<'a>(&self, right: impl Into<Operand<'a>>) -> Tensor {
                        let right = self.operand(right);
                        self.graph.apply1($op, &[self, &right])
                    }
                }
            )?
        )*
    };
}

binary! {
    /// Sum. Integers wrap.
    Add(Numeric) "add" "sum";
    /// Bitwise and; for `pred` the logical and.
    And(Bits) "and" "bitwise and logical and";
    /// The angle of the point (right, self), in radians.
    Atan2.atan2(Float) "atan2" "angle of a point";
    /// Quotient; of integers, rounded towards zero.
    Div(Numeric) "divide" "quotient";
    /// The larger; NaN where either is. For `pred` the logical or.
    Maximum.maximum(Any) "maximum" "the larger";
    /// The smaller; NaN where either is. For `pred` the logical and.
    Minimum.minimum(Any) "minimum" "the smaller";
    /// Product. Integers wrap.
    Mul(Numeric) "multiply" "product";
    /// Bitwise or; for `pred` the logical or.
    Or(Bits) "or" "bitwise and logical or";
    /// Power.
    Pow.pow(Numeric) "power" "power";
    /// Remainder, with the sign of the left operand.
    Rem(Numeric) "remainder" "remainder of the quotient rounded towards zero";
    /// The bits moved up by `right` places; 0 where `right` is not below the number of bits.
    ShiftLeft.shift_left(Integer) "shift_left" "bits moved up";
    /// The bits moved down by `right` places, the sign bit repeated.
    ShiftRightArithmetic.shift_right_arithmetic(Integer) "shift_right_arithmetic" "bits moved down, sign repeated";
    /// The bits moved down by `right` places, zeros moved in.
    ShiftRightLogical.shift_right_logical(Integer) "shift_right_logical" "bits moved down, zeros moved in";
    /// Difference. Integers wrap.
    Sub(Numeric) "subtract" "difference";
    /// Bitwise exclusive or; for `pred` the logical exclusive or.
    Xor(Bits) "xor" "bitwise and logical exclusive or";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::DType::{BF16, F32, I32, Pred};
    use crate::graph::Graph;
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn text() {
        let two = |g: &Graph| (g.arg("x", F32, &[2]), g.arg("y", F32, &[2]));
        for (line, build) in [
            ("add", (|x, y| x + y) as fn(&Tensor, &Tensor) -> Tensor),
            ("subtract", |x, y| x - y),
            ("multiply", |x, y| x * y),
            ("divide", |x, y| x / y),
            ("remainder", |x, y| x % y),
            ("power", |x, y| x.pow(y)),
            ("maximum", |x, y| x.maximum(y)),
            ("minimum", |x, y| x.minimum(y)),
            ("atan2", |x, y| x.atan2(y)),
        ] {
            let found = last_line(|g| {
                let (x, y) = two(g);
                vec![build(&x, &y)]
            });
            assert_eq!(found, format!("%{line} = stablehlo.{line} %x, %y : tensor<2xf32>"));
        }
    }

    #[test]
    fn numbers_beside_tensors() {
        assert_eq!(
            lines(|g| vec![1.0 - g.arg("x", BF16, &[2])]),
            [
                "%constant = stablehlo.constant dense<1.0> : tensor<2xbf16>",
                "%subtract = stablehlo.subtract %constant, %x : tensor<2xbf16>"
            ]
        );
        assert_eq!(
            last_line(|g| vec![&g.arg("x", I32, &[]) * 3]),
            "%multiply = stablehlo.multiply %x, %constant : tensor<i32>"
        );
    }

    #[test]
    fn errors() {
        let pair =
            |a: (DType, &[usize]), b: (DType, &[usize])| error(|g| vec![g.arg("x", a.0, a.1) + g.arg("y", b.0, b.1)]);
        assert_eq!(
            pair((F32, &[2, 3]), (F32, &[3])),
            "add: the operands must have one shape: f32[2,3] on the left, f32[3] on the right; broadcast one with broadcast_to"
        );
        assert_eq!(
            pair((F32, &[2]), (BF16, &[2])),
            "add: the operands must have one element type: f32[2] on the left, bf16[2] on the right; cast one"
        );
        assert!(pair((Pred, &[2]), (Pred, &[2])).contains("needs a float or integer tensor"));
        assert!(error(|g| vec![g.arg("x", F32, &[2]).shift_left(1)]).contains("needs an integer tensor"));
        assert_eq!(
            error(|g| vec![g.arg("x", I32, &[2]) * 0.5]),
            "constant: 0.5 as i32: not a whole number of that type"
        );
        assert_eq!(error(|g| vec![g.apply1(Add, &[&g.arg("x", F32, &[])])]), "add: needs at least 2 operands, found 1");
    }
}
