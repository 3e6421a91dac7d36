//! Ops that move elements without computing.

use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::{Aval, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// An operand placed on some axes of a larger shape and repeated along the others.
#[derive(Clone, Debug)]
pub struct BroadcastInDim {
    /// The result's shape.
    pub shape: Vec<usize>,
    /// For each axis of the operand, the axis of the result that it becomes.
    pub dims: Vec<usize>,
}

op_info!(BroadcastInDim, 1, "broadcast_in_dim", "an operand repeated along new axes");

impl Op for BroadcastInDim {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let x = inputs[0];
        let (shape, dims) = (&self.shape, &self.dims);
        if dims.len() != x.rank() {
            return Err(format!("{x} has rank {}, so it needs as many axes of {shape:?}, found {dims:?}", x.rank()));
        }
        if dims.iter().enumerate().any(|(i, dim)| *dim >= shape.len() || dims[..i].contains(dim)) {
            return Err(format!("the axes of {x} become axes {dims:?}, which must be different axes of {shape:?}"));
        }
        for (i, (&dim, &n)) in dims.iter().zip(&x.shape).enumerate() {
            if n != shape[dim] && n != 1 {
                let wanted = shape[dim];
                return Err(format!(
                    "axis {i} of {x} has length {n}, axis {dim} of {shape:?} has {wanted}: it must be equal or 1"
                ));
            }
        }
        Ok(vec![Aval::new(x.dtype, shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.broadcast_in_dim {}, dims = {} : {}", cx.operands(), list(&self.dims), cx.signature())
    }

    /// The sum over what was repeated.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let x = cx.input_aval(0);
        let repeated = |axis: usize| match self.dims.iter().position(|&dim| dim == axis) {
            Some(i) => x.shape[i] != self.shape[axis],
            None => true,
        };
        let axes: Vec<isize> = (0..self.shape.len()).filter(|&axis| repeated(axis)).map(|axis| axis as isize).collect();
        let sum = wide_sum(&cx.ct(), &axes);
        // What is left has the order of the result; the operand's axes may have another.
        let mut left: Vec<usize> = (0..x.rank()).filter(|&i| !repeated(self.dims[i])).collect();
        let order = left.clone();
        left.sort_by_key(|&i| self.dims[i]);
        let position = |i: &usize| left.iter().position(|j| j == i).unwrap_or_default();
        Ok(vec![Some(sum.transpose(&order.iter().map(position).collect::<Vec<_>>()).reshape(&x.shape))])
    }
}

/// The same elements in the same order under another shape.
#[derive(Clone, Debug)]
pub struct Reshape {
    /// The result's shape.
    pub shape: Vec<usize>,
}

op_info!(Reshape, 1, "reshape", "the same elements under another shape");

impl Op for Reshape {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let result = Aval::new(inputs[0].dtype, &self.shape);
        if result.elements() != inputs[0].elements() {
            let (found, wanted) = (inputs[0].elements(), result.elements());
            return Err(format!("{} has {found} elements, {:?} takes {wanted}", inputs[0], self.shape));
        }
        Ok(vec![result])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.reshape {} : {}", cx.operands(), cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let shape = cx.input_aval(0).shape;
        Ok(vec![Some(cx.ct().reshape(&shape))])
    }
}

/// The axes in another order.
#[derive(Clone, Debug)]
pub struct Transpose {
    /// For each axis of the result, the axis of the operand that it is.
    pub permutation: Vec<usize>,
}

op_info!(Transpose, 1, "transpose", "the axes in another order");

impl Op for Transpose {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let x = inputs[0];
        let mut sorted = self.permutation.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..x.rank()) {
            return Err(format!("{:?} is not an order of the {} axes of {x}", self.permutation, x.rank()));
        }
        let shape: Vec<usize> = self.permutation.iter().map(|&axis| x.shape[axis]).collect();
        Ok(vec![Aval::new(x.dtype, &shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.transpose {}, dims = {} : {}", cx.operands(), list(&self.permutation), cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let mut inverse = vec![0; self.permutation.len()];
        self.permutation.iter().enumerate().for_each(|(to, &from)| inverse[from] = to);
        Ok(vec![Some(cx.ct().transpose(&inverse))])
    }
}

/// Some axes in reverse.
#[derive(Clone, Debug)]
pub struct Reverse {
    /// The axes that are reversed.
    pub axes: Vec<usize>,
}

op_info!(Reverse, 1, "reverse", "elements of some axes in reverse");

impl Op for Reverse {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let x = inputs[0];
        if let Some(axis) = self.axes.iter().find(|&&axis| axis >= x.rank()) {
            return Err(format!("axis {axis} of {x}, which has rank {}", x.rank()));
        }
        Ok(vec![x.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("stablehlo.reverse {}, dims = {} : {}", cx.operands(), list(&self.axes), cx.output_type(0))
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let ct = cx.ct();
        Ok(vec![Some(ct.graph.apply1(self.clone(), &[&ct]))])
    }
}

/// The sum over these axes, kept in f32 for floats of 16 bits.
pub(crate) fn wide_sum(x: &Tensor, axes: &[isize]) -> Tensor {
    if axes.is_empty() {
        return x.clone();
    }
    let dtype = x.dtype();
    let wide = if dtype.bits() < 32 { DType::F32 } else { dtype };
    x.cast(wide).sum(axes).cast(dtype)
}

impl Tensor {
    /// This tensor in a larger shape: axis i becomes axis `dims[i]` of `shape`, and its elements are repeated along
    /// the axes that `dims` leaves out and along those where it has length 1.
    #[track_caller]
    pub fn broadcast(&self, shape: &[usize], dims: &[usize]) -> Tensor {
        self.graph.apply1(BroadcastInDim { shape: shape.to_vec(), dims: dims.to_vec() }, &[self])
    }

    /// This tensor in a larger shape by NumPy's rule: axes are aligned at the end, those of length 1 or missing are
    /// repeated. `self` where it has that shape already.
    #[track_caller]
    pub fn broadcast_to(&self, shape: &[usize]) -> Tensor {
        if self.shape() == shape {
            return self.clone();
        }
        // Too high a rank leaves axis numbers that the op's own rule rejects.
        let skip = shape.len().saturating_sub(self.rank());
        let dims: Vec<usize> = (skip..skip + self.rank()).collect();
        self.broadcast(shape, &dims)
    }

    /// The same elements, row by row, under another shape. `self` where it has that shape already.
    #[track_caller]
    pub fn reshape(&self, shape: &[usize]) -> Tensor {
        if self.shape() == shape {
            return self.clone();
        }
        self.graph.apply1(Reshape { shape: shape.to_vec() }, &[self])
    }

    /// The axes in another order: axis i of the result is axis `permutation[i]` of this. `self` where nothing moves.
    #[track_caller]
    pub fn transpose(&self, permutation: &[usize]) -> Tensor {
        if permutation.iter().copied().eq(0..self.rank()) {
            return self.clone();
        }
        self.graph.apply1(Transpose { permutation: permutation.to_vec() }, &[self])
    }

    /// A new axis of length 1 before position `axis` (the result's; negative counts from its end).
    #[track_caller]
    pub fn expand_dims(&self, axis: isize) -> Tensor {
        let rank = self.rank() as isize + 1;
        let position = if axis < 0 { axis + rank } else { axis };
        let mut shape = self.shape().to_vec();
        if !(0..rank).contains(&position) {
            let message = format!("expand_dims: axis {axis} of a result of rank {rank}, from {}", self.aval);
            self.graph.fail(std::panic::Location::caller(), message);
            return self.clone();
        }
        shape.insert(position as usize, 1);
        self.reshape(&shape)
    }

    /// The elements of these axes in reverse; negative counts from the end.
    #[track_caller]
    pub fn reverse(&self, axes: &[isize]) -> Tensor {
        let Some(axes) = self.axes("reverse", axes) else { return self.clone() };
        self.graph.apply1(Reverse { axes }, &[self])
    }
}

#[cfg(test)]
mod tests {
    use crate::DType::F32;
    use crate::graph::Graph;
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn text() {
        let x = |g: &Graph| g.arg("x", F32, &[2, 1]);
        assert_eq!(
            last_line(|g| vec![x(g).broadcast(&[2, 4, 3], &[0, 2])]),
            "%broadcast_in_dim = stablehlo.broadcast_in_dim %x, dims = [0, 2] : (tensor<2x1xf32>) -> tensor<2x4x3xf32>"
        );
        assert!(last_line(|g| vec![x(g).broadcast_to(&[5, 2, 3])]).contains("dims = [1, 2]"));
        assert_eq!(
            last_line(|g| vec![x(g).reshape(&[2])]),
            "%reshape = stablehlo.reshape %x : (tensor<2x1xf32>) -> tensor<2xf32>"
        );
        assert!(last_line(|g| vec![x(g).expand_dims(-1)]).ends_with("-> tensor<2x1x1xf32>"));
        assert!(last_line(|g| vec![x(g).expand_dims(0)]).ends_with("-> tensor<1x2x1xf32>"));
        assert_eq!(
            last_line(|g| vec![x(g).transpose(&[1, 0])]),
            "%transpose = stablehlo.transpose %x, dims = [1, 0] : (tensor<2x1xf32>) -> tensor<1x2xf32>"
        );
        assert_eq!(
            last_line(|g| vec![x(g).reverse(&[-1])]),
            "%reverse = stablehlo.reverse %x, dims = [1] : tensor<2x1xf32>"
        );
    }

    #[test]
    fn nothing_to_do_adds_nothing() {
        let x = |g: &Graph| g.arg("x", F32, &[2, 3]);
        assert!(lines(|g| vec![x(g).reshape(&[2, 3]).transpose(&[0, 1]).broadcast_to(&[2, 3])]).is_empty());
    }

    #[test]
    fn errors() {
        let x = |g: &Graph| g.arg("x", F32, &[2, 3]);
        assert_eq!(
            error(|g| vec![x(g).broadcast_to(&[2, 4])]),
            "broadcast_in_dim: axis 1 of f32[2,3] has length 3, axis 1 of [2, 4] has 4: it must be equal or 1"
        );
        assert!(error(|g| vec![x(g).broadcast_to(&[3])]).contains("must be different axes of [3]"));
        assert!(error(|g| vec![x(g).broadcast(&[2, 3], &[0])]).contains("has rank 2, so it needs as many axes"));
        assert_eq!(error(|g| vec![x(g).reshape(&[4])]), "reshape: f32[2,3] has 6 elements, [4] takes 4");
        assert_eq!(
            error(|g| vec![x(g).transpose(&[0, 0])]),
            "transpose: [0, 0] is not an order of the 2 axes of f32[2,3]"
        );
        assert_eq!(error(|g| vec![x(g).reverse(&[2])]), "reverse: axis 2 of f32[2,3], which has rank 2");
        assert_eq!(error(|g| vec![x(g).reverse(&[1, -1])]), "reverse: axis -1 is given twice in [1, -1]");
        assert!(error(|g| vec![x(g).expand_dims(4)]).contains("axis 4 of a result of rank 3"));
    }
}
