//! Parts of tensors, and tensors out of parts, at positions known when the graph is built.

use std::panic::Location;

use super::shape::wide_sum;
use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::{Aval, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::graph::Graph;
use crate::graph::tensor::{Operand, Tensor};

/// Every `stride`-th element from `start` up to `limit`, along each axis.
#[derive(Clone, Debug)]
pub struct Slice {
    /// First position, per axis.
    pub start: Vec<usize>,
    /// The position after the last, per axis.
    pub limit: Vec<usize>,
    /// Step, per axis.
    pub stride: Vec<usize>,
}

op_info!(Slice, 1, "slice", "a part at fixed positions");

impl Op for Slice {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let x = inputs[0];
        let Slice { start, limit, stride } = self;
        if [start.len(), limit.len(), stride.len()].iter().any(|&n| n != x.rank()) {
            return Err(format!("{x} has rank {}: give a start, limit and stride for each axis", x.rank()));
        }
        let mut shape = Vec::new();
        for (axis, &n) in x.shape.iter().enumerate() {
            let (from, to, step) = (start[axis], limit[axis], stride[axis]);
            if from > to || to > n || step == 0 {
                return Err(format!("positions {from}..{to} by {step} of axis {axis} of {x}, which has length {n}"));
            }
            shape.push((to - from).div_ceil(step));
        }
        Ok(vec![Aval::new(x.dtype, &shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let axes = self.start.iter().zip(&self.limit).zip(&self.stride);
        let ranges: Vec<_> = axes
            .map(|((start, limit), stride)| match stride {
                1 => format!("{start}:{limit}"),
                _ => format!("{start}:{limit}:{stride}"),
            })
            .collect();
        format!("stablehlo.slice {} {} : {}", cx.operands(), list(&ranges), cx.signature())
    }

    /// Zeros where nothing was taken.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (x, ct) = (cx.input_aval(0), cx.ct());
        let interior: Vec<usize> = self.stride.iter().map(|step| step - 1).collect();
        let low: Vec<i64> = self.start.iter().map(|&start| start as i64).collect();
        let high = (0..x.rank()).map(|axis| {
            let taken = ct.shape()[axis];
            let spread = taken + taken.saturating_sub(1) * interior[axis];
            x.shape[axis] as i64 - low[axis] - spread as i64
        });
        let pad = Pad { high: high.collect(), low, interior };
        let zero = ct.graph.scalar(0i64, ct.dtype());
        Ok(vec![Some(ct.graph.apply1(pad, &[&ct, &zero]))])
    }
}

/// Copies of the second operand (a scalar) around and between the elements of the first.
#[derive(Clone, Debug)]
pub struct Pad {
    /// Elements before the first, per axis; negative takes elements away.
    pub low: Vec<i64>,
    /// Elements after the last, per axis; negative takes elements away.
    pub high: Vec<i64>,
    /// Elements between two neighbours, per axis.
    pub interior: Vec<usize>,
}

op_info!(Pad, 2, "pad", "elements put around and between");

impl Op for Pad {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (x, value) = (inputs[0], inputs[1]);
        if [self.low.len(), self.high.len(), self.interior.len()].iter().any(|&n| n != x.rank()) {
            return Err(format!("{x} has rank {}: give low, high and interior for each axis", x.rank()));
        }
        if value.rank() != 0 || value.dtype != x.dtype {
            return Err(format!("the padding of {x} must be {}[], found {value}", x.dtype));
        }
        let mut shape = Vec::new();
        for (axis, &n) in x.shape.iter().enumerate() {
            let between = n.saturating_sub(1).saturating_mul(self.interior[axis]);
            let (low, high) = (self.low[axis], self.high[axis]);
            let length =
                usize::try_from((n as i64).saturating_add(between as i64).saturating_add(low).saturating_add(high));
            shape.push(
                length
                    .map_err(|_| format!("padding {low} and {high} leaves less than nothing of axis {axis} of {x}"))?,
            );
        }
        Ok(vec![Aval::new(x.dtype, &shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let [low, high] = [&self.low, &self.high].map(|v| list(v));
        let interior = list(&self.interior);
        let operands = cx.operands();
        format!("stablehlo.pad {operands}, low = {low}, high = {high}, interior = {interior} : {}", cx.signature())
    }

    /// The operand's places; the padding has the rest.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (x, ct) = (cx.input_aval(0), cx.ct());
        let zero = ct.graph.scalar(0i64, ct.dtype());
        // What was put around goes, what was taken away comes back as zeros; then the elements between go.
        let back = |side: &[i64]| side.iter().map(|n| -n).collect::<Vec<i64>>();
        let pad = Pad { low: back(&self.low), high: back(&self.high), interior: vec![0; x.rank()] };
        let spread = ct.graph.apply1(pad, &[&ct, &zero]);
        let stride: Vec<usize> = self.interior.iter().map(|n| n + 1).collect();
        let slice = Slice { start: vec![0; x.rank()], limit: spread.shape().to_vec(), stride };
        let inner = ct.graph.apply1(slice, &[&spread]);
        let all = |x: &Tensor| wide_sum(x, &(0..x.rank() as isize).collect::<Vec<_>>());
        cx.each(|_, i| if i == 0 { inner.clone() } else { all(&ct) - all(&inner) })
    }
}

/// Tensors one after the other along an axis.
#[derive(Clone, Debug)]
pub struct Concatenate {
    /// The axis that grows.
    pub axis: usize,
}

op_info!(Concatenate, 1.., "concatenate", "tensors one after the other along an axis");

impl Op for Concatenate {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let first = inputs[0];
        let axis = self.axis;
        if axis >= first.rank() {
            return Err(format!("axis {axis} of {first}, which has rank {}", first.rank()));
        }
        let mut result = first.clone();
        for (i, part) in inputs.iter().enumerate().skip(1) {
            let others = |aval: &Aval| {
                let kept: Vec<usize> =
                    aval.shape.iter().enumerate().filter(|(i, _)| *i != axis).map(|(_, &n)| n).collect();
                (aval.dtype, aval.rank(), kept)
            };
            if others(part) != others(first) {
                return Err(format!(
                    "parts must agree in element type and in every axis but {axis}: \
                     part 0 is {first}, part {i} is {part}"
                ));
            }
            result.shape[axis] = result.shape[axis].saturating_add(part.shape[axis]);
        }
        Ok(vec![result])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.concatenate {}, dim = {} : {}", cx.operands(), self.axis, cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let ct = cx.ct();
        let mut from = 0;
        let parts: Vec<(usize, usize)> = (0..cx.operand_count())
            .map(|i| {
                let part = (from, from + cx.input_aval(i).shape[self.axis]);
                from = part.1;
                part
            })
            .collect();
        cx.each(|_, i| {
            let (mut start, mut limit) = (vec![0; ct.rank()], ct.shape().to_vec());
            (start[self.axis], limit[self.axis]) = parts[i];
            ct.graph.apply1(Slice { start, limit, stride: vec![1; ct.rank()] }, &[&ct])
        })
    }
}

impl Graph {
    /// Tensors one after the other along `axis` (negative counts from the end). Errors: no tensors, or tensors that
    /// differ in element type or another axis.
    #[track_caller]
    pub fn concatenate(&self, parts: &[&Tensor], axis: isize) -> Tensor {
        let Some(first) = parts.first() else {
            self.fail(Location::caller(), "concatenate: needs at least one tensor, found none".into());
            return self.placeholder(Aval::new(DType::F32, &[]));
        };
        let Some(axis) = first.axis("concatenate", axis) else { return (*first).clone() };
        if parts.len() == 1 { (*first).clone() } else { self.apply1(Concatenate { axis }, parts) }
    }
}

impl Tensor {
    /// Every `stride`-th element from `start` up to `limit` (not included), along each axis.
    #[track_caller]
    pub fn slice(&self, start: &[usize], limit: &[usize], stride: &[usize]) -> Tensor {
        let [start, limit, stride] = [start, limit, stride].map(<[usize]>::to_vec);
        self.graph.apply1(Slice { start, limit, stride }, &[self])
    }

    /// `length` positions of one axis from `start` on; the other axes whole. Negative axes count from the end.
    #[track_caller]
    pub fn narrow(&self, axis: isize, start: usize, length: usize) -> Tensor {
        let Some(axis) = self.axis("narrow", axis) else { return self.clone() };
        let mut first = vec![0; self.rank()];
        let mut limit = self.shape().to_vec();
        first[axis] = start;
        limit[axis] = start.saturating_add(length);
        self.slice(&first, &limit, &vec![1; self.rank()])
    }

    /// This tensor with `low` elements of `value` before and `high` after it, and `interior` between neighbours,
    /// along each axis. Negative `low` and `high` take elements away.
    #[track_caller]
    pub fn pad<'a>(&self, value: impl Into<Operand<'a>>, low: &[i64], high: &[i64], interior: &[usize]) -> Tensor {
        let value = match value.into() {
            Operand::Tensor(value) => value.clone(),
            Operand::Number(value) => self.graph.scalar(value, self.dtype()),
        };
        let [low, high] = [low, high].map(<[i64]>::to_vec);
        self.graph.apply1(Pad { low, high, interior: interior.to_vec() }, &[self, &value])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{F32, I32};
    use crate::graph::testing::{error, last_line};

    #[test]
    fn text() {
        let x = |g: &Graph| g.arg("x", F32, &[4, 6]);
        assert_eq!(
            last_line(|g| vec![x(g).slice(&[1, 0], &[3, 6], &[1, 4])]),
            "%slice = stablehlo.slice %x [1:3, 0:6:4] : (tensor<4x6xf32>) -> tensor<2x2xf32>"
        );
        assert!(last_line(|g| vec![x(g).narrow(-1, 2, 3)]).contains("[0:4, 2:5]"));
        assert_eq!(
            last_line(|g| vec![x(g).pad(0.0, &[1, -1], &[0, 2], &[0, 1])]),
            "%pad = stablehlo.pad %x, %constant, low = [1, -1], high = [0, 2], interior = [0, 1] : (tensor<4x6xf32>, tensor<f32>) -> tensor<5x12xf32>"
        );
        assert_eq!(
            last_line(|g| vec![g.concatenate(&[&x(g), &g.arg("y", F32, &[4, 1])], 1)]),
            "%concatenate = stablehlo.concatenate %x, %y, dim = 1 : (tensor<4x6xf32>, tensor<4x1xf32>) -> tensor<4x7xf32>"
        );
    }

    #[test]
    fn errors() {
        let x = |g: &Graph| g.arg("x", F32, &[4, 6]);
        assert_eq!(
            error(|g| vec![x(g).narrow(0, 3, 2)]),
            "slice: positions 3..5 by 1 of axis 0 of f32[4,6], which has length 4"
        );
        assert_eq!(error(|g| vec![x(g).narrow(2, 0, 1)]), "narrow: axis 2 of f32[4,6], which has rank 2");
        assert!(error(|g| vec![x(g).slice(&[0], &[1], &[1])]).contains("give a start, limit and stride for each axis"));
        assert!(
            error(|g| vec![x(g).pad(0.0, &[-5, 0], &[0, 0], &[0, 0])]).contains("leaves less than nothing of axis 0")
        );
        assert!(error(|g| vec![x(g).pad(&g.arg("v", I32, &[]), &[0, 0], &[0, 0], &[0, 0])]).contains("must be f32[]"));
        assert_eq!(
            error(|g| vec![g.concatenate(&[&x(g), &g.arg("y", F32, &[3, 6])], 1)]),
            "concatenate: parts must agree in element type and in every axis but 1: part 0 is f32[4,6], part 1 is f32[3,6]"
        );
        assert_eq!(error(|g| vec![g.concatenate(&[], 1)]), "concatenate: needs at least one tensor, found none");
    }
}
