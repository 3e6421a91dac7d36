//! Sums, extremes and other folds over axes.

use super::constant::{Scalar, integer_range, splat_text};
use super::select::{Direction, compare_type};
use super::shape::wide_sum;
use super::unary::Class;
use super::{Op, OpInfo, op_info, pair};
use crate::DType;
use crate::graph::aval::{Aval, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// The operation that folds two elements into one. The order of folding is not given, so floats are summed to within
/// rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Fold {
    Sum,
    Product,
    Max,
    Min,
    And,
    Or,
}

impl Fold {
    /// The StableHLO op that folds.
    pub(crate) fn spelling(self) -> &'static str {
        match self {
            Fold::Sum => "stablehlo.add",
            Fold::Product => "stablehlo.multiply",
            Fold::Max => "stablehlo.maximum",
            Fold::Min => "stablehlo.minimum",
            Fold::And => "stablehlo.and",
            Fold::Or => "stablehlo.or",
        }
    }

    /// The element types that can be folded.
    pub(crate) fn class(self) -> Class {
        match self {
            Fold::And | Fold::Or => Class::Bits,
            _ => Class::Numeric,
        }
    }

    /// The number that changes nothing: what a fold of no elements gives.
    pub(crate) fn identity(self, dtype: DType) -> Scalar {
        let lowest = match dtype {
            DType::F8E4M3FN => Scalar::Float(-448.0),
            dtype if dtype.is_float() => Scalar::Float(f64::NEG_INFINITY),
            dtype => Scalar::Int(integer_range(dtype).0),
        };
        let highest = match dtype {
            DType::F8E4M3FN => Scalar::Float(448.0),
            dtype if dtype.is_float() => Scalar::Float(f64::INFINITY),
            dtype => Scalar::Int(integer_range(dtype).1),
        };
        match self {
            Fold::Sum => Scalar::Int(0),
            Fold::Product => Scalar::Int(1),
            Fold::Max => lowest,
            Fold::Min => highest,
            Fold::And | Fold::Or if dtype == DType::Pred => Scalar::Bool(self == Fold::And),
            Fold::And if dtype.is_signed() => Scalar::Int(-1),
            Fold::And => highest,
            Fold::Or => Scalar::Int(0),
        }
    }
}

/// The shape without these axes. Errors: an axis that there is not, or one given twice.
fn without(x: &Aval, axes: &[usize]) -> Result<Vec<usize>, String> {
    for (i, axis) in axes.iter().enumerate() {
        if *axis >= x.rank() || axes[..i].contains(axis) {
            return Err(format!("axes {axes:?} must be different axes of {x}"));
        }
    }
    Ok((0..x.rank()).filter(|axis| !axes.contains(axis)).map(|axis| x.shape[axis]).collect())
}

/// The elements along some axes folded into one, beginning with the second operand (a scalar). The axes are dropped.
#[derive(Clone, Debug)]
pub struct Reduce {
    /// What folds two elements.
    pub fold: Fold,
    /// The axes that are folded.
    pub axes: Vec<usize>,
}

op_info!(Reduce, 2, "reduce", "elements along axes folded into one");

impl Op for Reduce {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (x, start) = (inputs[0], inputs[1]);
        self.fold.class().check(x)?;
        if start.rank() != 0 || start.dtype != x.dtype {
            return Err(format!("the fold of {x} begins with a {}[], found {start}", x.dtype));
        }
        Ok(vec![Aval::new(x.dtype, &without(x, &self.axes)?)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let (x, start) = (cx.operand(0), cx.operand(1));
        let (fold, axes) = (self.fold.spelling(), list(&self.axes));
        format!("stablehlo.reduce({x} init: {start}) applies {fold} across dimensions = {axes} : {}", cx.signature())
    }

    /// A sum gives each element the cotangent; an extreme divides it among the elements that are equal to it, as PyTorch's
    /// `amax` does; a product gives the product of the others.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let shape = cx.input_aval(0).shape;
        let kept: Vec<usize> = (0..shape.len()).filter(|axis| !self.axes.contains(axis)).collect();
        let spread = |x: &Tensor| x.broadcast(&shape, &kept);
        let axes: Vec<isize> = self.axes.iter().map(|&axis| axis as isize).collect();
        if cx.wants(1) && self.fold != Fold::Sum {
            return Err("only a sum has a derivative in what it begins with".to_string());
        }
        let ct = cx.ct();
        let whole: Vec<isize> = (0..ct.rank() as isize).collect();
        cx.each(|cx, i| match (i, self.fold) {
            (0, Fold::Sum) => spread(&ct),
            (0, Fold::Max | Fold::Min) => {
                let extreme = cx.input(0).eq(&spread(&cx.output(0))).cast(ct.dtype());
                let each = &ct / wide_sum(&extreme, &axes);
                spread(&each) * extreme
            }
            (0, _) => spread(&ct) * product_of_others(&cx.input(0), &self.axes),
            _ => wide_sum(&ct, &whole),
        })
    }
}

/// For each element the product of the others along these axes; zeros among them do not hurt. It takes the square of their
/// number of elements.
fn product_of_others(x: &Tensor, axes: &[usize]) -> Tensor {
    let kept: Vec<usize> = (0..x.rank()).filter(|axis| !axes.contains(axis)).collect();
    let order = [&kept[..], axes].concat();
    let ordered = x.transpose(&order);
    let outer: Vec<usize> = kept.iter().map(|&axis| x.shape()[axis]).collect();
    let n: usize = axes.iter().map(|&axis| x.shape()[axis]).product();
    let square = [&outer[..], &[n, n]].concat();
    let rank = square.len();
    let rows = ordered.reshape(&[&outer[..], &[n]].concat());
    let dims: Vec<usize> = (0..rank - 2).chain([rank - 1]).collect();
    let (i, j) = (x.graph.iota(DType::I32, &square, rank - 2), x.graph.iota(DType::I32, &square, rank - 1));
    let rows = rows.broadcast(&square, &dims);
    let others = i.eq(&j).select(&rows.splat(1.0.into()), &rows).product(&[-1]);
    let mut inverse = vec![0; order.len()];
    order.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
    others.reshape(ordered.shape()).transpose(&inverse)
}

/// The largest or smallest element along an axis, and its position (i32). Of equal elements the first counts, and a
/// NaN counts as the extreme.
#[derive(Clone, Debug)]
pub struct ArgReduce {
    /// [`Direction::Gt`] for the largest, [`Direction::Lt`] for the smallest.
    pub direction: Direction,
    /// The axis that is searched and dropped.
    pub axis: usize,
}

op_info!(ArgReduce, 1, "arg_reduce", "largest or smallest element along an axis and its position");

impl Op for ArgReduce {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let x = inputs[0];
        Class::Numeric.check(x)?;
        let shape = without(x, &[self.axis])?;
        if x.shape[self.axis] == 0 {
            return Err(format!("axis {} of {x} has no elements to choose from", self.axis));
        }
        Ok(vec![Aval::new(x.dtype, &shape), Aval::new(DType::I32, &shape)])
    }

    /// A fold of (value, position) pairs. The left pair stays where its value wins, or where neither wins and its
    /// position is the lower one, so the result does not depend on the order of folding.
    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let x = cx.input(0).clone();
        let numbers = Aval::new(DType::I32, &x.shape).mlir();
        let (value, position) = (format!("tensor<{}>", x.dtype), "tensor<i32>");
        let fold = if self.direction == Direction::Gt { Fold::Max } else { Fold::Min };
        let start = splat_text(fold.identity(x.dtype), x.dtype);
        let [positions, first, zero] = ["positions", "init", "zero"].map(|name| cx.fresh(name));
        cx.before(&format!("{positions} = stablehlo.iota dim = {} : {numbers}", self.axis));
        cx.before(&format!("{first} = stablehlo.constant dense<{start}> : {value}"));
        cx.before(&format!("{zero} = stablehlo.constant dense<0> : {position}"));

        let [a, i, b, j] = ["a", "i", "b", "j"].map(|name| cx.fresh(name));
        let mut lines = vec![format!("^bb0({a}: {value}, {i}: {position}, {b}: {value}, {j}: {position}):")];
        let mut line = |name: &str, op: String| {
            let name = cx.fresh(name);
            lines.push(format!("  {name} = stablehlo.{op}"));
            name
        };
        let kind = compare_type(x.dtype);
        let compare = |direction: Direction, x: &str, y: &str| {
            format!("compare {}, {x}, {y}, {kind} : ({value}, {value}) -> tensor<i1>", direction.spelling())
        };
        let mut wins = line("wins", compare(self.direction, &a, &b));
        let mut equal = line("equal", compare(Direction::Eq, &a, &b));
        if x.dtype.is_float() {
            // NaN wins against numbers and equals NaN.
            let left_nan = line("left_nan", compare(Direction::Ne, &a, &a));
            let right_nan = line("right_nan", compare(Direction::Ne, &b, &b));
            let right_number = line("right_number", format!("not {right_nan} : tensor<i1>"));
            let only_left = line("only_left_nan", format!("and {left_nan}, {right_number} : tensor<i1>"));
            let both = line("both_nan", format!("and {left_nan}, {right_nan} : tensor<i1>"));
            wins = line("wins", format!("or {wins}, {only_left} : tensor<i1>"));
            equal = line("equal", format!("or {equal}, {both} : tensor<i1>"));
        }
        let lower = line("lower", format!("compare LT, {i}, {j}, SIGNED : ({position}, {position}) -> tensor<i1>"));
        let tie = line("tie", format!("and {equal}, {lower} : tensor<i1>"));
        let left = line("left", format!("or {wins}, {tie} : tensor<i1>"));
        let best = line("value", format!("select {left}, {a}, {b} : tensor<i1>, {value}"));
        let at = line("position", format!("select {left}, {i}, {j} : tensor<i1>, {position}"));
        lines.push(format!("  stablehlo.return {best}, {at} : {value}, {position}"));

        let pad = cx.pad();
        let region: String = lines.iter().map(|line| format!("{pad}{line}\n")).collect();
        let types = format!("({}, {numbers}, {value}, {position})", x.mlir());
        let operands = format!("{}, {positions}, {first}, {zero}", cx.operand(0));
        format!(
            "\"stablehlo.reduce\"({operands}) <{{dimensions = array<i64: {}>}}> ({{\n{region}{pad}}}) : {types} -> {}",
            self.axis,
            cx.result_types()
        )
    }

    fn result_count(&self, _inputs: usize) -> usize {
        2
    }

    /// The cotangent of the extreme, at its position.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (shape, ct, at) = (cx.input_aval(0).shape, cx.ct(), cx.output(1));
        let kept: Vec<usize> = (0..shape.len()).filter(|&axis| axis != self.axis).collect();
        let here = ct.graph.iota(DType::I32, &shape, self.axis).eq(&at.broadcast(&shape, &kept));
        let ct = ct.broadcast(&shape, &kept);
        Ok(vec![Some(here.select(&ct, &ct.splat(0.0.into())))])
    }
}

impl Tensor {
    /// The elements along these axes folded into one; the axes are dropped. Negative axes count from the end.
    #[track_caller]
    pub fn reduce(&self, fold: Fold, axes: &[isize]) -> Tensor {
        let Some(axes) = self.axes("reduce", axes) else { return self.clone() };
        let start = self.graph.scalar(fold.identity(self.dtype()), self.dtype());
        self.graph.apply1(Reduce { fold, axes }, &[self, &start])
    }

    /// [`Tensor::reduce`] that keeps each folded axis with length 1.
    #[track_caller]
    pub fn reduce_keep(&self, fold: Fold, axes: &[isize]) -> Tensor {
        let mut shape = self.shape().to_vec();
        let Some(positions) = self.axes("reduce", axes) else { return self.clone() };
        positions.iter().for_each(|&axis| shape[axis] = 1);
        self.reduce(fold, axes).reshape(&shape)
    }

    /// The sum over these axes, which are dropped. It is kept in the element type: cast bf16 and f16 to f32 first.
    #[track_caller]
    pub fn sum(&self, axes: &[isize]) -> Tensor {
        self.reduce(Fold::Sum, axes)
    }

    /// The sum over these axes, which are kept with length 1.
    #[track_caller]
    pub fn sum_keep(&self, axes: &[isize]) -> Tensor {
        self.reduce_keep(Fold::Sum, axes)
    }

    /// The largest over these axes, which are dropped; NaN where there is one.
    #[track_caller]
    pub fn max(&self, axes: &[isize]) -> Tensor {
        self.reduce(Fold::Max, axes)
    }

    /// The largest over these axes, which are kept with length 1; NaN where there is one.
    #[track_caller]
    pub fn max_keep(&self, axes: &[isize]) -> Tensor {
        self.reduce_keep(Fold::Max, axes)
    }

    /// The smallest over these axes, which are dropped; NaN where there is one.
    #[track_caller]
    pub fn min(&self, axes: &[isize]) -> Tensor {
        self.reduce(Fold::Min, axes)
    }

    /// The product over these axes, which are dropped.
    #[track_caller]
    pub fn product(&self, axes: &[isize]) -> Tensor {
        self.reduce(Fold::Product, axes)
    }

    /// Whether all of a `pred` are true over these axes, which are dropped; bitwise and of integers.
    #[track_caller]
    pub fn all(&self, axes: &[isize]) -> Tensor {
        self.reduce(Fold::And, axes)
    }

    /// Whether any of a `pred` is true over these axes, which are dropped; bitwise or of integers.
    #[track_caller]
    pub fn any(&self, axes: &[isize]) -> Tensor {
        self.reduce(Fold::Or, axes)
    }

    /// The mean over these axes, which are dropped. Floats only.
    #[track_caller]
    pub fn mean(&self, axes: &[isize]) -> Tensor {
        let Some(count) = self.count(axes) else { return self.clone() };
        self.sum(axes) / count
    }

    /// The mean over these axes, which are kept with length 1. Floats only.
    #[track_caller]
    pub fn mean_keep(&self, axes: &[isize]) -> Tensor {
        let Some(count) = self.count(axes) else { return self.clone() };
        self.sum_keep(axes) / count
    }

    /// Number of elements over which a mean is taken.
    #[track_caller]
    fn count(&self, axes: &[isize]) -> Option<f64> {
        if let Err(message) = Class::Float.check(&self.aval) {
            self.graph.fail(std::panic::Location::caller(), format!("mean: {message}"));
            return None;
        }
        let axes = self.axes("mean", axes)?;
        Some(axes.iter().map(|&axis| self.shape()[axis]).product::<usize>() as f64)
    }

    /// e^x / Σ e^x along an axis, computed on x − max x. Floats only.
    #[track_caller]
    pub fn softmax(&self, axis: isize) -> Tensor {
        let peak = self.max_keep(&[axis]).stop_gradient().broadcast_to(self.shape());
        let exp = (self - peak).exp();
        let total = exp.sum_keep(&[axis]).broadcast_to(self.shape());
        exp / total
    }

    /// The position (i32) of the largest element along an axis, which is dropped. Of equal elements the first; a NaN
    /// counts as the largest.
    #[track_caller]
    pub fn argmax(&self, axis: isize) -> Tensor {
        self.arg_reduce("argmax", Direction::Gt, axis)
    }

    /// The position (i32) of the smallest element along an axis, which is dropped. Of equal elements the first; a NaN
    /// counts as the smallest.
    #[track_caller]
    pub fn argmin(&self, axis: isize) -> Tensor {
        self.arg_reduce("argmin", Direction::Lt, axis)
    }

    #[track_caller]
    fn arg_reduce(&self, name: &str, direction: Direction, axis: isize) -> Tensor {
        let Some(axis) = self.axis(name, axis) else { return self.clone() };
        pair(self.graph.apply(ArgReduce { direction, axis }, &[self]), self).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{F8E4M3FN, F32, I8, I32, Pred, U8, U64};
    use crate::graph::Graph;
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn text() {
        let x = |g: &Graph| g.arg("x", F32, &[2, 3]);
        assert_eq!(
            lines(|g| vec![x(g).sum(&[-1])]),
            [
                "%constant = stablehlo.constant dense<0.0> : tensor<f32>",
                "%reduce = stablehlo.reduce(%x init: %constant) applies stablehlo.add across dimensions = [1] : (tensor<2x3xf32>, tensor<f32>) -> tensor<2xf32>"
            ]
        );
        assert!(last_line(|g| vec![x(g).max_keep(&[1])]).ends_with("(tensor<2xf32>) -> tensor<2x1xf32>"));
        assert_eq!(
            lines(|g| vec![x(g).mean(&[0, 1])])[2..],
            [
                "%constant_1 = stablehlo.constant dense<6.0> : tensor<f32>",
                "%divide = stablehlo.divide %reduce, %constant_1 : tensor<f32>"
            ]
        );
        assert!(last_line(|g| vec![g.arg("p", Pred, &[2]).all(&[0])]).contains("applies stablehlo.and"));
    }

    #[test]
    fn identities() {
        assert_eq!(Fold::Max.identity(F32), Scalar::Float(f64::NEG_INFINITY));
        assert_eq!(Fold::Max.identity(F8E4M3FN), Scalar::Float(-448.0));
        assert_eq!(Fold::Max.identity(I8), Scalar::Int(-128));
        assert_eq!(Fold::Min.identity(U64), Scalar::Int(u64::MAX.into()));
        assert_eq!(Fold::And.identity(Pred), Scalar::Bool(true));
        assert_eq!(Fold::Or.identity(Pred), Scalar::Bool(false));
        assert_eq!(Fold::And.identity(I32), Scalar::Int(-1));
        assert_eq!(Fold::And.identity(U8), Scalar::Int(255));
    }

    #[test]
    fn positions() {
        let text = lines(|g| vec![g.arg("x", F32, &[2, 3]).argmax(-1)]);
        assert_eq!(text[0], "%positions = stablehlo.iota dim = 1 : tensor<2x3xi32>");
        assert!(text[3].starts_with("%arg_reduce, %arg_reduce_1 = \"stablehlo.reduce\"(%x, %positions, %init, %zero)"));
        assert!(text[5].starts_with("%wins = stablehlo.compare GT, %a, %b, FLOAT"), "{text:?}");
        assert!(lines(|g| vec![g.arg("x", F32, &[2, 3]).argmin(0)])[5].contains("compare LT"));
    }

    #[test]
    fn errors() {
        let x = |g: &Graph| g.arg("x", F32, &[2, 3]);
        assert_eq!(error(|g| vec![x(g).sum(&[2])]), "reduce: axis 2 of f32[2,3], which has rank 2");
        assert_eq!(error(|g| vec![x(g).sum(&[0, -2])]), "reduce: axis -2 is given twice in [0, -2]");
        assert!(error(|g| vec![x(g).all(&[0])]).contains("needs an integer or pred tensor"));
        assert!(error(|g| vec![g.arg("x", I32, &[2]).mean(&[0])]).contains("mean: needs a float tensor"));
        assert!(error(|g| vec![g.arg("x", F32, &[2, 0]).argmax(1)]).contains("has no elements to choose from"));
    }
}
