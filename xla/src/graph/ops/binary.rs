//! Elementwise ops of two operands of one type and shape.

use super::unary::Class;
use super::{Op, OpInfo, op_info};
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
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

/// What an operand of a maximum or minimum has of its cotangent: all, nothing, or half where the two are equal, as PyTorch
/// divides it.
fn share(c: &mut Vjp<'_, '_>, of: usize) -> Tensor {
    let (chosen, result) = (c.input(of), c.output(0));
    let (here, there) = (chosen.eq(&result), c.input(1 - of).eq(&result));
    let half = (&here & &there).select(&chosen.splat(0.5.into()), &chosen.splat(1.0.into()));
    here.select(&half, &chosen.splat(0.0.into()))
}

/// xʸ ln x, and 0 where x is 0 and y is not negative.
fn power_slope(c: &mut Vjp<'_, '_>) -> Tensor {
    let (x, y, power) = (c.input(0), c.input(1), c.output(0));
    let flat = x.eq(0.0) & y.ge(0.0);
    flat.select(&x.splat(0.0.into()), &(power * x.log()))
}

/// x without its fraction.
fn toward_zero(x: &Tensor) -> Tensor {
    x.ge(0.0).select(&x.floor(), &x.ceil())
}

/// Declares ops of two operands: docstring, type, class, StableHLO spelling (which is also the name) and summary, the
/// method where the op has no operator, and the cotangents of the operands (`c` is a [`Vjp`]) or why they are zero.
macro_rules! binary {
    ($(
        #[$doc:meta] $op:ident $(. $method:ident)? ($class:ident) $spelling:literal $summary:literal
        $(zero $why:literal)? $(=> |$c:ident| $left:expr, $right:expr)?;
    )*) => {
        $(
            #[$doc]
            #[derive(Clone, Debug)]
            pub struct $op;

            op_info!($op, 2, $spelling, $summary $(, Zero $why)?);

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

                $(
                    fn vjp(&self, $c: &mut Vjp<'_, '_>) -> Cotangents {
                        let left = if $c.wants(0) { Some($left) } else { None };
                        let right = if $c.wants(1) { Some($right) } else { None };
                        Ok(vec![left, right])
                    }
                )?
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
    Add(Numeric) "add" "sum"
        => |c| c.ct(), c.ct();
    /// Bitwise and; for `pred` the logical and.
    And(Bits) "and" "bitwise and logical and" zero "of bits";
    /// The angle of the point (right, self), in radians.
    Atan2.atan2(Float) "atan2" "angle of a point"
        => |c|
            c.ct() * (c.input(1) / (c.input(0).square() + c.input(1).square())),
            -(c.ct() * (c.input(0) / (c.input(0).square() + c.input(1).square())));
    /// Quotient; of integers, rounded towards zero.
    Div(Numeric) "divide" "quotient"
        => |c| c.ct() / c.input(1), -(c.ct() * (c.output(0) / c.input(1)));
    /// The larger; NaN where either is. For `pred` the logical or.
    Maximum.maximum(Any) "maximum" "the larger"
        => |c| c.ct() * share(c, 0), c.ct() * share(c, 1);
    /// The smaller; NaN where either is. For `pred` the logical and.
    Minimum.minimum(Any) "minimum" "the smaller"
        => |c| c.ct() * share(c, 0), c.ct() * share(c, 1);
    /// Product. Integers wrap.
    Mul(Numeric) "multiply" "product"
        => |c| c.ct() * c.input(1), c.ct() * c.input(0);
    /// Bitwise or; for `pred` the logical or.
    Or(Bits) "or" "bitwise and logical or" zero "of bits";
    /// Power.
    Pow.pow(Numeric) "power" "power"
        => |c| c.ct() * (c.input(1) * c.input(0).pow(&(c.input(1) - 1.0))), c.ct() * power_slope(c);
    /// Remainder, with the sign of the left operand.
    Rem(Numeric) "remainder" "remainder of the quotient rounded towards zero"
        => |c| c.ct(), -(c.ct() * toward_zero(&(c.input(0) / c.input(1))));
    /// The bits moved up by `right` places; 0 where `right` is not below the number of bits.
    ShiftLeft.shift_left(Integer) "shift_left" "bits moved up" zero "of bits";
    /// The bits moved down by `right` places, the sign bit repeated.
    ShiftRightArithmetic.shift_right_arithmetic(Integer) "shift_right_arithmetic" "bits moved down, sign repeated" zero "of bits";
    /// The bits moved down by `right` places, zeros moved in.
    ShiftRightLogical.shift_right_logical(Integer) "shift_right_logical" "bits moved down, zeros moved in" zero "of bits";
    /// Difference. Integers wrap.
    Sub(Numeric) "subtract" "difference"
        => |c| c.ct(), -c.ct();
    /// Bitwise exclusive or; for `pred` the logical exclusive or.
    Xor(Bits) "xor" "bitwise and logical exclusive or" zero "of bits";
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
