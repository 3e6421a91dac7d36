//! Order: sort and top-k.

use super::select::Direction;
use super::unary::Class;
use super::{Op, OpInfo, op_info, pair};
use crate::DType;
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// The operands put in the order of the first along an axis; the others go along. The order is stable, and total for
/// floats: −NaN, −∞, …, −0, 0, …, ∞, NaN.
#[derive(Clone, Debug)]
pub struct Sort {
    /// The axis along which is sorted.
    pub axis: usize,
    /// From the largest down.
    pub descending: bool,
}

op_info!(Sort, 1.., "sort", "operands in the order of the first along an axis");

impl Op for Sort {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let key = inputs[0];
        if self.axis >= key.rank() {
            return Err(format!("axis {} of {key}, which has rank {}", self.axis, key.rank()));
        }
        if let Some(other) = inputs.iter().find(|other| other.shape != key.shape) {
            return Err(format!("the operands must have one shape: {key} and {other}"));
        }
        Ok(inputs.iter().map(|&aval| aval.clone()).collect())
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let dtypes: Vec<DType> = (0..cx.operand_count()).map(|i| cx.input(i).dtype).collect();
        let mut args = Vec::new();
        let mut keys = Vec::new();
        for dtype in &dtypes {
            let (a, b) = (cx.fresh("a"), cx.fresh("b"));
            args.push(format!("{a}: tensor<{dtype}>, {b}: tensor<{dtype}>"));
            keys.push((a, b));
        }
        let (a, b) = &keys[0];
        let direction = if self.descending { Direction::Gt } else { Direction::Lt }.spelling();
        let kind = if dtypes[0].is_float() { "TOTALORDER" } else { super::select::compare_type(dtypes[0]) };
        let key = format!("tensor<{}>", dtypes[0]);
        let (before, pad) = (cx.fresh("before"), cx.pad());
        let region: String = [
            format!("^bb0({}):", args.join(", ")),
            format!("  {before} = stablehlo.compare {direction}, {a}, {b}, {kind} : ({key}, {key}) -> tensor<i1>"),
            format!("  stablehlo.return {before} : tensor<i1>"),
        ]
        .map(|line| format!("{pad}{line}\n"))
        .concat();
        let attrs = format!("dimension = {} : i64, is_stable = true", self.axis);
        let (operands, signature) = (cx.operands(), cx.signature());
        format!("\"stablehlo.sort\"({operands}) <{{{attrs}}}> ({{\n{region}{pad}}}) : {signature}")
    }

    fn result_count(&self, inputs: usize) -> usize {
        inputs
    }

    /// Each cotangent goes back to where its element came from.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let positions = cx.graph().iota(DType::I32, &cx.input_aval(0).shape, self.axis);
        let key = cx.input(0);
        let (_, from) = pair(cx.graph().apply(self.clone(), &[&key, &positions]), &key);
        cx.each(|cx, i| cx.cotangent(i).add_along(&from, self.axis, key.shape()))
    }
}

/// The k largest elements along the last axis, from the largest down, and their positions (i32). Of equal elements the
/// earlier comes first.
#[derive(Clone, Debug)]
pub struct TopK {
    /// How many.
    pub k: usize,
}

op_info!(TopK, 1, "top_k", "the k largest elements of the last axis and their positions");

impl Op for TopK {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let x = inputs[0];
        Class::Numeric.check(x)?;
        match x.shape.split_last() {
            Some((&n, outer)) if self.k <= n => {
                let shape = [outer, &[self.k]].concat();
                Ok(vec![Aval::new(x.dtype, &shape), Aval::new(DType::I32, &shape)])
            }
            Some((n, _)) => Err(format!("k is {}, but the last axis of {x} has length {n}", self.k)),
            None => Err(format!("needs at least one axis, found {x}")),
        }
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("chlo.top_k({}, k = {}) : {} -> {}", cx.operands(), self.k, cx.input(0).mlir(), cx.result_types())
    }

    fn result_count(&self, _inputs: usize) -> usize {
        2
    }

    /// The cotangents of the values, at their positions.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (shape, at, ct) = (cx.input_aval(0).shape, cx.output(1), cx.ct());
        Ok(vec![Some(ct.add_along(&at, shape.len() - 1, &shape))])
    }
}

impl Tensor {
    /// Sorted along an axis, from the smallest up or the largest down; the sort is stable and floats are in total order
    /// (NaN counts as the largest).
    #[track_caller]
    pub fn sort(&self, axis: isize, descending: bool) -> Tensor {
        self.sort_with(&[], axis, descending).into_iter().next().unwrap_or_else(|| self.clone())
    }

    /// [`Tensor::sort`] with other tensors of the same shape put in the same order: this one sorted, then those.
    #[track_caller]
    pub fn sort_with(&self, others: &[&Tensor], axis: isize, descending: bool) -> Vec<Tensor> {
        let all: Vec<&Tensor> = std::iter::once(self).chain(others.iter().copied()).collect();
        match self.axis("sort", axis) {
            Some(axis) => self.graph.apply(Sort { axis, descending }, &all),
            None => all.into_iter().cloned().collect(),
        }
    }

    /// The positions (i32) that sort this tensor along an axis, and the sorted tensor: (sorted, positions).
    #[track_caller]
    pub fn argsort(&self, axis: isize, descending: bool) -> (Tensor, Tensor) {
        let Some(position) = self.axis("argsort", axis) else { return (self.clone(), self.clone()) };
        let positions = self.graph.iota(DType::I32, self.shape(), position);
        pair(self.sort_with(&[&positions], axis, descending), self)
    }

    /// The k largest elements of the last axis, from the largest down, and their positions (i32). Of equal elements the
    /// earlier comes first; floats are in total order, as in [`Tensor::sort`].
    #[track_caller]
    pub fn top_k(&self, k: usize) -> (Tensor, Tensor) {
        pair(self.graph.apply(TopK { k }, &[self]), self)
    }

    /// [`Tensor::top_k`] of floats without NaN for a k of 1 or more that is small: the largest is taken k times, which for a
    /// few costs less than the sort that a CPU makes of the whole axis.
    #[track_caller]
    pub fn largest(&self, k: usize) -> (Tensor, Tensor) {
        let axis = self.rank().saturating_sub(1);
        let position = self.graph.iota(DType::I32, self.shape(), axis);
        let (mut values, mut positions, mut rest) = (Vec::new(), Vec::new(), self.clone());
        for _ in 0..k {
            let at = rest.argmax(-1).expand_dims(-1);
            values.push(rest.take_along(&at, -1));
            rest = position.eq(&at.broadcast_to(self.shape())).select(f64::NEG_INFINITY, &rest);
            positions.push(at);
        }
        let join = |parts: Vec<Tensor>| self.graph.concatenate(&parts.iter().collect::<Vec<_>>(), -1);
        (join(values), join(positions))
    }
}

#[cfg(test)]
mod tests {
    use crate::DType::{F32, U8};
    use crate::graph::Graph;
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn text() {
        let text = lines(|g| vec![g.arg("x", F32, &[2, 8]).argsort(-1, true).1]);
        assert_eq!(
            text,
            [
                "%iota = stablehlo.iota dim = 1 : tensor<2x8xi32>",
                "%sort, %sort_1 = \"stablehlo.sort\"(%x, %iota) <{dimension = 1 : i64, is_stable = true}> ({",
                "^bb0(%a: tensor<f32>, %b: tensor<f32>, %a_1: tensor<i32>, %b_1: tensor<i32>):",
                "%before = stablehlo.compare GT, %a, %b, TOTALORDER : (tensor<f32>, tensor<f32>) -> tensor<i1>",
                "stablehlo.return %before : tensor<i1>",
                "}) : (tensor<2x8xf32>, tensor<2x8xi32>) -> (tensor<2x8xf32>, tensor<2x8xi32>)",
            ]
        );
        assert!(lines(|g| vec![g.arg("x", U8, &[8]).sort(0, false)])[2].contains("compare LT, %a, %b, UNSIGNED"));
        assert_eq!(
            last_line(|g| vec![g.arg("x", F32, &[2, 8]).top_k(3).0]),
            "%top_k, %top_k_1 = chlo.top_k(%x, k = 3) : tensor<2x8xf32> -> (tensor<2x3xf32>, tensor<2x3xi32>)"
        );
    }

    #[test]
    fn errors() {
        let x = |g: &Graph| g.arg("x", F32, &[2, 8]);
        assert_eq!(error(|g| vec![x(g).top_k(9).0]), "top_k: k is 9, but the last axis of f32[2,8] has length 8");
        assert_eq!(error(|g| vec![g.arg("x", F32, &[]).top_k(0).1]), "top_k: needs at least one axis, found f32[]");
        assert_eq!(error(|g| vec![x(g).sort(2, true)]), "sort: axis 2 of f32[2,8], which has rank 2");
        assert_eq!(
            error(|g| x(g).sort_with(&[&g.arg("y", F32, &[8])], 1, true)),
            "sort: the operands must have one shape: f32[2,8] and f32[8]"
        );
    }
}
