//! Comparison and choice.

use super::binary::same;
use super::unary::Class;
use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::{Operand, Tensor};

/// The relation that a [`Compare`] tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Direction {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

impl Direction {
    pub(crate) fn spelling(self) -> &'static str {
        match self {
            Direction::Eq => "EQ",
            Direction::Ne => "NE",
            Direction::Lt => "LT",
            Direction::Le => "LE",
            Direction::Gt => "GT",
            Direction::Ge => "GE",
        }
    }
}

/// Elementwise comparison. NaN is unequal to everything, itself included.
#[derive(Clone, Debug)]
pub struct Compare {
    /// The relation.
    pub direction: Direction,
}

op_info!(Compare, 2, "compare", "elementwise comparison", Zero "the result is a pred");

/// The comparison type of StableHLO for an element type.
pub(crate) fn compare_type(dtype: DType) -> &'static str {
    match dtype {
        dtype if dtype.is_float() => "FLOAT",
        dtype if dtype.is_signed() => "SIGNED",
        _ => "UNSIGNED",
    }
}

impl Op for Compare {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        same(inputs[0], inputs[1])?;
        Ok(vec![Aval::new(DType::Pred, &inputs[0].shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let kind = compare_type(cx.input(0).dtype);
        format!("stablehlo.compare {}, {}, {kind} : {}", self.direction.spelling(), cx.operands(), cx.signature())
    }
}

macro_rules! comparison {
    ($($(#[$doc:meta])* $method:ident $direction:ident;)*) => {
        impl Tensor {
            $(
                $(#[$doc])*
                #[track_caller]
                pub fn $method<'a>(&self, right: impl Into<Operand<'a>>) -> Tensor {
                    let right = self.operand(right);
                    self.graph.apply1(Compare { direction: Direction::$direction }, &[self, &right])
                }
            )*
        }
    };
}

comparison! {
    /// Whether the elements are equal.
    eq Eq;
    /// Whether the elements are not equal.
    ne Ne;
    /// Whether each element is below the other's.
    lt Lt;
    /// Whether each element is at most the other's.
    le Le;
    /// Whether each element is above the other's.
    gt Gt;
    /// Whether each element is at least the other's.
    ge Ge;
}

/// Each element of the second operand where the first is true, of the third where it is not.
#[derive(Clone, Debug)]
pub struct Select;

op_info!(Select, 3, "select", "elementwise choice between two tensors");

impl Op for Select {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (which, yes, no) = (inputs[0], inputs[1], inputs[2]);
        same(yes, no)?;
        if which.dtype != DType::Pred || which.shape != yes.shape {
            let wanted = Aval::new(DType::Pred, &yes.shape);
            return Err(format!("the condition must be {wanted} as the choices are {yes}, found {which}"));
        }
        Ok(vec![yes.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.select {} : {}, {}", cx.operands(), cx.input(0).mlir(), cx.output_type(0))
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (which, ct) = (cx.input(0), cx.ct());
        let zero = ct.splat(0.0.into());
        cx.each(|_, i| if i == 1 { which.select(&ct, &zero) } else { which.select(&zero, &ct) })
    }
}

/// Each element moved into an interval.
#[derive(Clone, Debug)]
pub struct Clamp;

op_info!(Clamp, 3, "clamp", "elements moved into an interval");

impl Op for Clamp {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (low, x, high) = (inputs[0], inputs[1], inputs[2]);
        same(x, low)?;
        same(x, high)?;
        Class::Numeric.check(x)?;
        Ok(vec![x.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.clamp {} : {}", cx.operands(), cx.output_type(0))
    }

    /// The operand that the result is has the cotangent; x on a bound has it.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (low, x, high, ct) = (cx.input(0), cx.input(1), cx.input(2), cx.ct());
        let zero = ct.splat(0.0.into());
        let inside = x.ge(&low) & x.le(&high);
        cx.each(|_, i| match i {
            0 => (x.lt(&low) & low.le(&high)).select(&ct, &zero),
            1 => inside.select(&ct, &zero),
            _ => (x.gt(&high) | high.lt(&low)).select(&ct, &zero),
        })
    }
}

impl Tensor {
    /// `yes` where this (a `pred`) is true, `no` elsewhere. A number takes the type and shape of the other choice; at
    /// least one choice must be a tensor.
    #[track_caller]
    pub fn select<'a, 'b>(&self, yes: impl Into<Operand<'a>>, no: impl Into<Operand<'b>>) -> Tensor {
        let (yes, no) = match (yes.into(), no.into()) {
            (Operand::Tensor(yes), no) => (yes.clone(), yes.operand(no)),
            (yes, Operand::Tensor(no)) => (no.operand(yes), no.clone()),
            (Operand::Number(_), Operand::Number(_)) => {
                let message =
                    "select: both choices are numbers, so the element type is unknown: make one a tensor with `full`";
                self.graph.fail(std::panic::Location::caller(), message.into());
                return self.clone();
            }
        };
        self.graph.apply1(Select, &[self, &yes, &no])
    }

    /// min(max(x, low), high).
    #[track_caller]
    pub fn clamp<'a, 'b>(&self, low: impl Into<Operand<'a>>, high: impl Into<Operand<'b>>) -> Tensor {
        let (low, high) = (self.operand(low), self.operand(high));
        self.graph.apply1(Clamp, &[&low, self, &high])
    }
}

#[cfg(test)]
mod tests {
    use crate::DType::{F32, I32, Pred, U32};
    use crate::graph::testing::{error, last_line};

    #[test]
    fn text() {
        let compare = |dtype| last_line(|g| vec![g.arg("x", dtype, &[2]).le(&g.arg("y", dtype, &[2]))]);
        let tail = |kind, t| format!("%compare = stablehlo.compare LE, %x, %y, {kind} : ({t}, {t}) -> tensor<2xi1>");
        assert_eq!(compare(F32), tail("FLOAT", "tensor<2xf32>"));
        assert_eq!(compare(I32), tail("SIGNED", "tensor<2xi32>"));
        assert_eq!(compare(U32), tail("UNSIGNED", "tensor<2xui32>"));
        assert_eq!(compare(Pred), tail("UNSIGNED", "tensor<2xi1>"));
        assert_eq!(
            last_line(|g| vec![g.arg("p", Pred, &[2]).select(&g.arg("x", F32, &[2]), 0.0)]),
            "%select = stablehlo.select %p, %x, %constant : tensor<2xi1>, tensor<2xf32>"
        );
        assert_eq!(
            last_line(|g| vec![g.arg("x", F32, &[2]).clamp(-1.0, 1)]),
            "%clamp = stablehlo.clamp %constant, %x, %constant_1 : tensor<2xf32>"
        );
    }

    #[test]
    fn errors() {
        assert_eq!(
            error(|g| vec![g.arg("p", Pred, &[3]).select(&g.arg("x", F32, &[2]), 0.0)]),
            "select: the condition must be i1[2] as the choices are f32[2], found i1[3]"
        );
        assert!(error(|g| vec![g.arg("p", Pred, &[3]).select(1.0, 0.0)]).contains("both choices are numbers"));
        assert!(error(|g| vec![g.arg("x", F32, &[3]).lt(&g.arg("y", F32, &[2]))]).starts_with("compare: the operands"));
        assert!(error(|g| vec![g.arg("x", F32, &[3]).clamp(&g.arg("y", F32, &[]), 1.0)]).starts_with("clamp: "));
    }
}
