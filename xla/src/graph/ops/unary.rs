//! Elementwise ops of one operand.

use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// The element types that an elementwise op takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Floats and integers.
    Numeric,
    /// Floats.
    Float,
    /// Floats and signed integers.
    Signed,
    /// Integers.
    Integer,
    /// Integers and `pred`.
    Bits,
    /// Everything.
    Any,
}

impl Class {
    /// Whether the type belongs to the class; the error says what would.
    pub(crate) fn check(self, aval: &Aval) -> Result<(), String> {
        let dtype = aval.dtype;
        let (holds, wanted) = match self {
            Class::Numeric => (dtype != DType::Pred, "a float or integer tensor"),
            Class::Float => (dtype.is_float(), "a float tensor"),
            Class::Signed => (dtype.is_float() || dtype.is_signed(), "a float or signed integer tensor"),
            Class::Integer => (dtype.is_integer(), "an integer tensor"),
            Class::Bits => (!dtype.is_float(), "an integer or pred tensor"),
            Class::Any => (true, "any tensor"),
        };
        if holds { Ok(()) } else { Err(format!("needs {wanted}, found {aval}: cast it first")) }
    }
}

/// Declares ops of one operand: docstring, type, method, class, name (as StableHLO spells it), summary, and the cotangent of
/// the operand (`c` is a [`Vjp`]) or why it is zero.
macro_rules! unary {
    ($(
        #[$doc:meta] $op:ident . $method:ident ($class:ident) $name:literal $summary:literal
        $(zero $why:literal)? $(=> |$c:ident| $rule:expr)?;
    )*) => {
        $(
            #[$doc]
            #[derive(Clone, Debug)]
            pub struct $op;

            op_info!($op, 1, $name, $summary $(, Zero $why)?);

            impl Op for $op {
                fn info(&self) -> &'static OpInfo {
                    &Self::INFO
                }

                fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
                    Class::$class.check(inputs[0])?;
                    Ok(vec![inputs[0].clone()])
                }

                fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
                    format!("stablehlo.{} {} : {}", $name, cx.operand(0), cx.output_type(0))
                }

                $(
                    fn vjp(&self, $c: &mut Vjp<'_, '_>) -> Cotangents {
                        Ok(vec![Some($rule)])
                    }
                )?
            }

            impl Tensor {
                #[$doc]
                #[track_caller]
                pub fn $method(&self) -> Tensor {
                    self.graph.apply1($op, &[self])
                }
            }
        )*
    };
}

unary! {
    /// |x|.
    Abs.abs(Signed) "abs" "absolute value" => |c| c.ct() * c.input(0).sign();
    /// The real cube root, of negative numbers too.
    Cbrt.cbrt(Float) "cbrt" "cube root" => |c| c.ct() / (c.output(0).square() * 3.0);
    /// The smallest whole number that is not below x.
    Ceil.ceil(Float) "ceil" "round towards plus infinity" zero "a step function";
    /// The number of zero bits above the highest one.
    Clz.clz(Integer) "count_leading_zeros" "leading zero bits" zero "of integers";
    /// cos x, x in radians.
    Cos.cos(Float) "cosine" "cosine of radians" => |c| -(c.ct() * c.input(0).sin());
    /// eˣ.
    Exp.exp(Float) "exponential" "e to the power of x" => |c| c.ct() * c.output(0);
    /// eˣ − 1, accurate near 0.
    Expm1.expm1(Float) "exponential_minus_one" "e to the power of x, minus 1" => |c| c.ct() * (c.output(0) + 1.0);
    /// The largest whole number that is not above x.
    Floor.floor(Float) "floor" "round towards minus infinity" zero "a step function";
    /// ln x.
    Log.log(Float) "log" "natural logarithm" => |c| c.ct() / c.input(0);
    /// ln(1 + x), accurate near 0.
    Log1p.log1p(Float) "log_plus_one" "natural logarithm of 1 + x" => |c| c.ct() / (c.input(0) + 1.0);
    /// 1 / (1 + e^(−x)).
    Logistic.logistic(Float) "logistic" "the sigmoid function" => |c| c.ct() * (c.output(0) * (1.0 - c.output(0)));
    /// −x. Integers wrap.
    Neg.neg(Numeric) "negate" "minus x" => |c| -c.ct();
    /// Every bit flipped; for `pred` the logical not.
    Not.not(Bits) "not" "bits flipped" zero "of bits";
    /// The number of one bits.
    Popcnt.popcnt(Integer) "popcnt" "one bits" zero "of integers";
    /// The nearest whole number, ties to even.
    Round.round(Float) "round_nearest_even" "nearest whole number, ties to even" zero "a step function";
    /// The nearest whole number, ties away from zero.
    RoundAfz.round_afz(Float) "round_nearest_afz" "nearest whole number, ties away from zero" zero "a step function";
    /// 1 / √x.
    Rsqrt.rsqrt(Float) "rsqrt" "reciprocal square root" => |c| c.ct() * (c.output(0) / c.input(0) * -0.5);
    /// −1, 0 or 1 as x is below, at or above zero; NaN stays NaN.
    Sign.sign(Signed) "sign" "sign of x" zero "a step function";
    /// sin x, x in radians.
    Sin.sin(Float) "sine" "sine of radians" => |c| c.ct() * c.input(0).cos();
    /// √x.
    Sqrt.sqrt(Float) "sqrt" "square root" => |c| c.ct() * 0.5 / c.output(0);
    /// tan x, x in radians.
    Tan.tan(Float) "tan" "tangent of radians" => |c| c.ct() * (c.output(0).square() + 1.0);
    /// tanh x.
    Tanh.tanh(Float) "tanh" "hyperbolic tangent" => |c| c.ct() * (1.0 - c.output(0).square());
}

/// The error function, 2/√π ∫₀ˣ e^(−t²) dt.
#[derive(Clone, Debug)]
pub struct Erf;

op_info!(Erf, 1, "erf", "error function");

impl Op for Erf {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        Class::Float.check(inputs[0])?;
        Ok(vec![inputs[0].clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let kind = cx.output_type(0);
        format!("chlo.erf {} : {kind} -> {kind}", cx.operand(0))
    }

    /// 2/√π e^(−x²).
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let slope = (-cx.input(0).square()).exp() * std::f64::consts::FRAC_2_SQRT_PI;
        Ok(vec![Some(cx.ct() * slope)])
    }
}

/// Whether each element is neither infinite nor NaN.
#[derive(Clone, Debug)]
pub struct IsFinite;

op_info!(IsFinite, 1, "is_finite", "whether x is neither infinite nor NaN", Zero "the result is a pred");

impl Op for IsFinite {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        Class::Float.check(inputs[0])?;
        Ok(vec![Aval::new(DType::Pred, &inputs[0].shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.is_finite {} : {}", cx.operand(0), cx.signature())
    }
}

impl Tensor {
    /// Whether each element is neither infinite nor NaN, as `pred`.
    #[track_caller]
    pub fn is_finite(&self) -> Tensor {
        self.graph.apply1(IsFinite, &[self])
    }

    /// The error function, 2/√π ∫₀ˣ e^(−t²) dt.
    #[track_caller]
    pub fn erf(&self) -> Tensor {
        self.graph.apply1(Erf, &[self])
    }

    /// 1 / (1 + e^(−x)); another name of [`Tensor::logistic`].
    #[track_caller]
    pub fn sigmoid(&self) -> Tensor {
        self.logistic()
    }

    /// x · sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118).
    #[track_caller]
    pub fn silu(&self) -> Tensor {
        self * self.logistic()
    }

    /// x · Φ(x) with the error function (Hendrycks and Gimpel 2016, arXiv:1606.08415).
    #[track_caller]
    pub fn gelu(&self) -> Tensor {
        let cdf = ((self * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
        self * cdf
    }

    /// The tanh approximation of [`Tensor::gelu`]: x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))).
    #[track_caller]
    pub fn gelu_tanh(&self) -> Tensor {
        let cubed = self * self * self;
        let inner = (self + cubed * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
        self * ((inner.tanh() + 1.0) * 0.5)
    }

    /// max(x, 0).
    #[track_caller]
    pub fn relu(&self) -> Tensor {
        self.maximum(0.0)
    }

    /// x².
    #[track_caller]
    pub fn square(&self) -> Tensor {
        self * self
    }
}

#[cfg(test)]
mod tests {
    use crate::DType::{BF16, F32, I8, I32, Pred, U8};
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn text() {
        assert_eq!(last_line(|g| vec![g.arg("x", F32, &[2]).tanh()]), "%tanh = stablehlo.tanh %x : tensor<2xf32>");
        assert_eq!(last_line(|g| vec![-g.arg("x", I8, &[])]), "%negate = stablehlo.negate %x : tensor<i8>");
        assert_eq!(
            last_line(|g| vec![g.arg("x", BF16, &[2]).erf()]),
            "%erf = chlo.erf %x : tensor<2xbf16> -> tensor<2xbf16>"
        );
        assert_eq!(
            last_line(|g| vec![g.arg("x", F32, &[2]).is_finite()]),
            "%is_finite = stablehlo.is_finite %x : (tensor<2xf32>) -> tensor<2xi1>"
        );
    }

    #[test]
    fn composites() {
        assert_eq!(
            lines(|g| vec![g.arg("x", F32, &[2]).silu()]),
            [
                "%logistic = stablehlo.logistic %x : tensor<2xf32>",
                "%multiply = stablehlo.multiply %x, %logistic : tensor<2xf32>"
            ]
        );
        assert!(lines(|g| vec![g.arg("x", F32, &[2]).gelu()]).iter().any(|line| line.contains("chlo.erf")));
        assert!(lines(|g| vec![g.arg("x", F32, &[2]).gelu_tanh()]).iter().any(|line| line.contains("stablehlo.tanh")));
        assert!(last_line(|g| vec![g.arg("x", F32, &[2]).relu()]).contains("stablehlo.maximum %x, %constant"));
    }

    #[test]
    fn errors() {
        assert_eq!(
            error(|g| vec![g.arg("x", I32, &[2]).exp()]),
            "exponential: needs a float tensor, found i32[2]: cast it first"
        );
        assert!(error(|g| vec![g.arg("x", U8, &[2]).abs()]).contains("a float or signed integer tensor"));
        assert!(error(|g| vec![!g.arg("x", F32, &[2])]).contains("an integer or pred tensor"));
        assert!(error(|g| vec![-g.arg("x", Pred, &[2])]).contains("a float or integer tensor"));
        assert!(error(|g| vec![g.arg("x", F32, &[2]).popcnt()]).contains("an integer tensor"));
    }
}
