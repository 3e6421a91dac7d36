//! Parts of tensors at positions known when the program runs.

use super::{Op, OpInfo, op_info};
use crate::graph::aval::{Aval, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// The rule of start positions: one integer scalar per axis, all of one type.
fn check_starts(x: &Aval, starts: &[&Aval]) -> Result<(), String> {
    if starts.len() != x.rank() {
        return Err(format!("{x} has rank {}, so it needs as many start positions, found {}", x.rank(), starts.len()));
    }
    for (axis, start) in starts.iter().enumerate() {
        if start.rank() != 0 || !start.dtype.is_integer() || start.dtype != starts[0].dtype {
            return Err(format!("start positions must be integer scalars of one type: that of axis {axis} is {start}"));
        }
    }
    Ok(())
}

/// The rule of a window: no axis longer than the tensor's.
fn check_window(x: &Aval, sizes: &[usize]) -> Result<(), String> {
    if sizes.len() != x.rank() || sizes.iter().zip(&x.shape).any(|(size, n)| size > n) {
        return Err(format!("a window of {sizes:?} does not fit into {x}"));
    }
    Ok(())
}

/// A window of fixed size at a position given by scalars, one per axis. A position at which the window would stick out
/// is moved inside.
#[derive(Clone, Debug)]
pub struct DynamicSlice {
    /// The window's shape.
    pub sizes: Vec<usize>,
}

op_info!(DynamicSlice, 1.., "dynamic_slice", "a window at a position given by scalars");

impl Op for DynamicSlice {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        check_starts(inputs[0], &inputs[1..])?;
        check_window(inputs[0], &self.sizes)?;
        Ok(vec![Aval::new(inputs[0].dtype, &self.sizes)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.dynamic_slice {}, sizes = {} : {}", cx.operands(), list(&self.sizes), cx.signature())
    }

    /// Zeros around the window.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (x, ct) = (cx.input_aval(0), cx.ct());
        let starts: Vec<Tensor> = (1..cx.operand_count()).map(|i| cx.input(i)).collect();
        let starts: Vec<&Tensor> = starts.iter().collect();
        cx.each(|cx, _| cx.graph().full(0i64, x.dtype, &x.shape).dynamic_update_slice(&ct, &starts))
    }
}

/// A tensor with a window replaced, at a position given by scalars, one per axis. A position at which the window would
/// stick out is moved inside.
#[derive(Clone, Debug)]
pub struct DynamicUpdateSlice;

op_info!(DynamicUpdateSlice, 2.., "dynamic_update_slice", "a tensor with a window replaced");

impl Op for DynamicUpdateSlice {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (x, update) = (inputs[0], inputs[1]);
        check_starts(x, &inputs[2..])?;
        check_window(x, &update.shape)?;
        if x.dtype != update.dtype {
            return Err(format!("the window must have the element type of {x}, found {update}"));
        }
        Ok(vec![x.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.dynamic_update_slice {} : {}", cx.operands(), cx.signature())
    }

    /// The window goes to the update, what is around it to the operand.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (update, ct) = (cx.input_aval(1), cx.ct());
        let starts: Vec<Tensor> = (2..cx.operand_count()).map(|i| cx.input(i)).collect();
        let starts: Vec<&Tensor> = starts.iter().collect();
        cx.each(|cx, i| match i {
            0 => ct.dynamic_update_slice(&cx.graph().full(0i64, update.dtype, &update.shape), &starts),
            _ => ct.dynamic_slice(&starts, &update.shape),
        })
    }
}

impl Tensor {
    /// The window of shape `sizes` that begins at `starts` (one integer scalar per axis), moved inside where it would
    /// stick out.
    #[track_caller]
    pub fn dynamic_slice(&self, starts: &[&Tensor], sizes: &[usize]) -> Tensor {
        let inputs: Vec<&Tensor> = std::iter::once(self).chain(starts.iter().copied()).collect();
        self.graph.apply1(DynamicSlice { sizes: sizes.to_vec() }, &inputs)
    }

    /// This tensor with the window that begins at `starts` (one integer scalar per axis) replaced by `update`; the
    /// window is moved inside where it would stick out.
    #[track_caller]
    pub fn dynamic_update_slice(&self, update: &Tensor, starts: &[&Tensor]) -> Tensor {
        let inputs: Vec<&Tensor> = [self, update].into_iter().chain(starts.iter().copied()).collect();
        self.graph.apply1(DynamicUpdateSlice, &inputs)
    }
}

#[cfg(test)]
mod tests {
    use crate::DType::{BF16, F32, I32};
    use crate::graph::Graph;
    use crate::graph::testing::{error, last_line};

    #[test]
    fn text() {
        let args = |g: &Graph| (g.arg("x", F32, &[4, 6]), g.arg("i", I32, &[]));
        assert_eq!(
            last_line(|g| {
                let (x, i) = args(g);
                vec![x.dynamic_slice(&[&i, &i], &[1, 2])]
            }),
            "%dynamic_slice = stablehlo.dynamic_slice %x, %i, %i, sizes = [1, 2] : (tensor<4x6xf32>, tensor<i32>, tensor<i32>) -> tensor<1x2xf32>"
        );
        assert_eq!(
            last_line(|g| {
                let (x, i) = args(g);
                vec![x.dynamic_update_slice(&g.arg("u", F32, &[1, 6]), &[&i, &i])]
            }),
            "%dynamic_update_slice = stablehlo.dynamic_update_slice %x, %u, %i, %i : (tensor<4x6xf32>, tensor<1x6xf32>, tensor<i32>, tensor<i32>) -> tensor<4x6xf32>"
        );
    }

    #[test]
    fn errors() {
        let x = |g: &Graph| g.arg("x", F32, &[4]);
        assert_eq!(
            error(|g| vec![x(g).dynamic_slice(&[], &[1])]),
            "dynamic_slice: f32[4] has rank 1, so it needs as many start positions, found 0"
        );
        assert!(
            error(|g| vec![x(g).dynamic_slice(&[&g.arg("i", F32, &[])], &[1])]).contains("integer scalars of one type")
        );
        assert!(
            error(|g| vec![x(g).dynamic_slice(&[&g.arg("i", I32, &[])], &[5])])
                .contains("[5] does not fit into f32[4]")
        );
        let update = |dtype, n: usize| {
            error(|g| vec![x(g).dynamic_update_slice(&g.arg("u", dtype, &[n]), &[&g.arg("i", I32, &[])])])
        };
        assert!(update(F32, 5).contains("does not fit into f32[4]"));
        assert!(update(BF16, 2).contains("must have the element type of f32[4], found bf16[2]"));
    }
}
