//! Folds over windows, and running sums.

use super::reduce::Fold;
use super::scatter::combiner;
use super::slice::Pad;
use super::{Op, OpInfo, op_info};
use crate::graph::aval::{Aval, array_attr, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// The elements of each position of a sliding window folded into one, beginning with the second operand (a scalar).
#[derive(Clone, Debug)]
pub struct ReduceWindow {
    /// What folds two elements.
    pub fold: Fold,
    /// The window's length, per axis.
    pub window: Vec<usize>,
    /// How far the window moves, per axis.
    pub strides: Vec<usize>,
    /// Elements of the fold's identity before and after, per axis.
    pub padding: Vec<(usize, usize)>,
}

op_info!(ReduceWindow, 2, "reduce_window", "elements of a sliding window folded into one");

impl Op for ReduceWindow {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (x, start) = (inputs[0], inputs[1]);
        self.fold.class().check(x)?;
        if start.rank() != 0 || start.dtype != x.dtype {
            return Err(format!("the fold of {x} begins with a {}[], found {start}", x.dtype));
        }
        if [self.window.len(), self.strides.len(), self.padding.len()].iter().any(|&n| n != x.rank()) {
            return Err(format!("{x} has rank {}: give a window, stride and padding for each axis", x.rank()));
        }
        let mut shape = Vec::new();
        for (axis, &n) in x.shape.iter().enumerate() {
            let (window, stride, (low, high)) = (self.window[axis], self.strides[axis], self.padding[axis]);
            let padded = n.saturating_add(low).saturating_add(high);
            if window == 0 || stride == 0 || window > padded {
                return Err(format!(
                    "a window of {window} moving by {stride} over axis {axis} of {x}, padded to {padded}"
                ));
            }
            shape.push((padded - window) / stride + 1);
        }
        Ok(vec![Aval::new(x.dtype, &shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let rows: Vec<String> = self.padding.iter().map(|(low, high)| format!("[{low}, {high}]")).collect();
        let attrs = format!(
            "padding = dense<{}> : tensor<{}x2xi64>, window_dimensions = {}, window_strides = {}",
            list(&rows),
            rows.len(),
            array_attr(&self.window),
            array_attr(&self.strides)
        );
        let region = combiner(cx, Some(self.fold));
        format!("\"stablehlo.reduce_window\"({}) <{{{attrs}}}> ({region}) : {}", cx.operands(), cx.signature())
    }

    /// Each element has the cotangents of the windows that it is in: sums over windows of the cotangents, set apart by the
    /// strides.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        if self.fold != Fold::Sum || cx.wants(1) {
            return Err(format!(
                "only sums over windows have a derivative, and that of their elements; this is {self:?}"
            ));
        }
        let (x, ct) = (cx.input_aval(0), cx.ct());
        let interior: Vec<usize> = self.strides.iter().map(|step| step - 1).collect();
        let low: Vec<i64> =
            self.window.iter().zip(&self.padding).map(|(&window, &(low, _))| window as i64 - 1 - low as i64).collect();
        let high = (0..x.rank()).map(|axis| {
            let spread = (ct.shape()[axis] - 1) * self.strides[axis] + 1;
            (x.shape[axis] + self.window[axis]) as i64 - 1 - spread as i64 - low[axis]
        });
        let pad = Pad { high: high.collect(), low, interior };
        let zero = ct.graph.scalar(0i64, ct.dtype());
        let spread = ct.graph.apply1(pad, &[&ct, &zero]);
        let ones = vec![1; x.rank()];
        let sums = spread.reduce_window(Fold::Sum, &self.window, &ones, &vec![(0, 0); x.rank()]);
        Ok(vec![Some(sums), None])
    }
}

impl Tensor {
    /// The elements of a sliding window folded into one: per axis the window's length, how far it moves, and how many
    /// elements that change nothing stand before and after.
    #[track_caller]
    pub fn reduce_window(&self, fold: Fold, window: &[usize], strides: &[usize], padding: &[(usize, usize)]) -> Tensor {
        let start = self.graph.scalar(fold.identity(self.dtype()), self.dtype());
        let (window, strides, padding) = (window.to_vec(), strides.to_vec(), padding.to_vec());
        self.graph.apply1(ReduceWindow { fold, window, strides, padding }, &[self, &start])
    }

    /// Running sums along an axis: position i holds the sum of positions 0 to i.
    #[track_caller]
    pub fn cumsum(&self, axis: isize) -> Tensor {
        let Some(axis) = self.axis("cumsum", axis) else { return self.clone() };
        let rank = self.rank();
        let length = self.shape()[axis];
        let mut window = vec![1; rank];
        window[axis] = length.max(1);
        let mut padding = vec![(0, 0); rank];
        padding[axis] = (window[axis] - 1, 0);
        self.reduce_window(Fold::Sum, &window, &vec![1; rank], &padding)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::F32;
    use crate::graph::testing::{error, lines};

    #[test]
    fn text() {
        let text =
            lines(|g| vec![g.arg("x", F32, &[2, 8]).reduce_window(Fold::Max, &[1, 3], &[1, 2], &[(0, 0), (1, 1)])]);
        assert_eq!(
            text[1],
            "%reduce_window = \"stablehlo.reduce_window\"(%x, %constant) <{padding = dense<[[0, 0], [1, 1]]> : tensor<2x2xi64>, window_dimensions = array<i64: 1, 3>, window_strides = array<i64: 1, 2>}> ({"
        );
        assert!(text[3].contains("stablehlo.maximum"));
        assert!(text[5].ends_with("-> tensor<2x4xf32>"), "{text:?}");
        let sums = lines(|g| vec![g.arg("x", F32, &[2, 8]).cumsum(-1)]);
        assert!(sums[1].contains("dense<[[0, 0], [7, 0]]>") && sums[1].contains("array<i64: 1, 8>"), "{sums:?}");
    }

    #[test]
    fn errors() {
        let window = |n: usize| error(|g| vec![g.arg("x", F32, &[4]).reduce_window(Fold::Sum, &[n], &[1], &[(0, 0)])]);
        assert_eq!(window(5), "reduce_window: a window of 5 moving by 1 over axis 0 of f32[4], padded to 4");
        assert!(
            error(|g| vec![g.arg("x", F32, &[4]).reduce_window(Fold::Sum, &[], &[], &[])]).contains("for each axis")
        );
    }
}
