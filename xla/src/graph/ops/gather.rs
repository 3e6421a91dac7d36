//! Windows picked out by a tensor of positions.

use super::reduce::Fold;
use super::scatter::Scatter;
use super::{Op, OpInfo, op_info};
use crate::graph::aval::{Aval, array_attr, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// Windows of the first operand at the positions that the second gives. Positions at which a window would stick out
/// are moved inside. The attributes are those of StableHLO's gather.
#[derive(Clone, Debug)]
pub struct Gather {
    /// Axes of the result that run inside a window.
    pub offset_dims: Vec<usize>,
    /// Axes of the operand whose window has length 1 and is dropped.
    pub collapsed_slice_dims: Vec<usize>,
    /// Axes of the operand that go along with [`Gather::start_indices_batching_dims`].
    pub operand_batching_dims: Vec<usize>,
    /// Axes of the positions that go along with the operand's.
    pub start_indices_batching_dims: Vec<usize>,
    /// For each component of a position, the axis of the operand.
    pub start_index_map: Vec<usize>,
    /// The axis of the positions along which the components of one position lie; its rank, where each position is one
    /// number.
    pub index_vector_dim: usize,
    /// The window's shape.
    pub slice_sizes: Vec<usize>,
    /// A promise that the positions never decrease.
    pub indices_are_sorted: bool,
}

op_info!(Gather, 2, "gather", "windows picked out by a tensor of positions");

impl Op for Gather {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (x, at) = (inputs[0], inputs[1]);
        if !at.dtype.is_integer() {
            return Err(format!("positions must be integers, found {at}: cast them"));
        }
        if self.index_vector_dim > at.rank() {
            return Err(format!("index_vector_dim {} of positions {at}", self.index_vector_dim));
        }
        let components = at.shape.get(self.index_vector_dim).copied().unwrap_or(1);
        if components != self.start_index_map.len() {
            let wanted = self.start_index_map.len();
            return Err(format!("positions {at} have {components} components, start_index_map names {wanted}"));
        }
        let sizes = &self.slice_sizes;
        if sizes.len() != x.rank() || sizes.iter().zip(&x.shape).any(|(size, n)| size > n) {
            return Err(format!("a window of {sizes:?} does not fit into {x}"));
        }
        let dropped: Vec<usize> = [&self.collapsed_slice_dims[..], &self.operand_batching_dims].concat();
        if let Some(axis) = dropped.iter().chain(&self.start_index_map).find(|&&axis| axis >= x.rank()) {
            return Err(format!("axis {axis} of {x}, which has rank {}", x.rank()));
        }
        if let Some(axis) = dropped.iter().find(|&&axis| sizes[axis] > 1) {
            return Err(format!("axis {axis} of a window of {sizes:?} is dropped, so it must have length 1"));
        }
        let window: Vec<usize> = (0..x.rank()).filter(|axis| !dropped.contains(axis)).map(|axis| sizes[axis]).collect();
        if window.len() != self.offset_dims.len() {
            let dims = &self.offset_dims;
            return Err(format!("offset_dims {dims:?} must name {} axes, those kept of {sizes:?}", window.len()));
        }
        let batch = (0..at.rank()).filter(|&axis| axis != self.index_vector_dim).map(|axis| at.shape[axis]);
        let mut batch = batch.collect::<Vec<_>>().into_iter();
        let mut window = window.into_iter();
        let rank = batch.len() + window.len();
        if let Some(axis) = self.offset_dims.iter().find(|&&axis| axis >= rank) {
            return Err(format!("offset_dims names axis {axis} of a result of rank {rank}"));
        }
        let shape: Vec<usize> = (0..rank)
            .filter_map(|axis| if self.offset_dims.contains(&axis) { window.next() } else { batch.next() })
            .collect();
        Ok(vec![Aval::new(x.dtype, &shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let mut dims = vec![format!("offset_dims = {}", list(&self.offset_dims))];
        for (name, axes) in [
            ("collapsed_slice_dims", &self.collapsed_slice_dims),
            ("operand_batching_dims", &self.operand_batching_dims),
            ("start_indices_batching_dims", &self.start_indices_batching_dims),
            ("start_index_map", &self.start_index_map),
        ] {
            if !axes.is_empty() {
                dims.push(format!("{name} = {}", list(axes)));
            }
        }
        dims.push(format!("index_vector_dim = {}", self.index_vector_dim));
        let attrs = format!(
            "dimension_numbers = #stablehlo.gather<{}>, indices_are_sorted = {}, slice_sizes = {}",
            dims.join(", "),
            self.indices_are_sorted,
            array_attr(&self.slice_sizes)
        );
        format!("\"stablehlo.gather\"({}) <{{{attrs}}}> : {}", cx.operands(), cx.signature())
    }

    /// The cotangents added up where their windows were read.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (x, at, ct) = (cx.input_aval(0), cx.input(1), cx.ct());
        let op = Scatter {
            update_window_dims: self.offset_dims.clone(),
            inserted_window_dims: self.collapsed_slice_dims.clone(),
            input_batching_dims: self.operand_batching_dims.clone(),
            scatter_indices_batching_dims: self.start_indices_batching_dims.clone(),
            scatter_dims_to_operand_dims: self.start_index_map.clone(),
            index_vector_dim: self.index_vector_dim,
            fold: Some(Fold::Sum),
            indices_are_sorted: self.indices_are_sorted,
            unique_indices: false,
        };
        // A scatter leaves a window out that a gather moves inside.
        let last: Vec<i64> =
            self.start_index_map.iter().map(|&axis| (x.shape[axis] - self.slice_sizes[axis]) as i64).collect();
        let inside = moved_inside(&at, &last, self.index_vector_dim);
        let zeros = cx.graph().full(0i64, x.dtype, &x.shape);
        Ok(vec![Some(cx.graph().apply1(op, &[&zeros, &inside, &ct])), None])
    }
}

/// The largest position of each component, as a tensor of the shape of the positions.
pub(crate) fn last_positions(at: &Tensor, last: &[i64], index_vector_dim: usize) -> Tensor {
    match last {
        [one] => at.graph.full(*one, at.dtype(), at.shape()),
        _ => {
            let each = at.graph.constant(last, &[last.len()]).cast(at.dtype());
            each.broadcast(at.shape(), &[index_vector_dim])
        }
    }
}

/// Positions with each component at least 0 and at most its last one.
fn moved_inside(at: &Tensor, last: &[i64], index_vector_dim: usize) -> Tensor {
    let last = last_positions(at, last, index_vector_dim);
    at.minimum(&last).maximum(0i64)
}

impl Tensor {
    /// The slices of `axis` at `indices` (integers of any shape): axis `axis` is replaced by the axes of `indices`, as
    /// in an embedding lookup, `table.take(&tokens, 0)`. An index out of range is moved to the nearest one in range.
    #[track_caller]
    pub fn take(&self, indices: &Tensor, axis: isize) -> Tensor {
        let Some(axis) = self.axis("take", axis) else { return self.clone() };
        let n = indices.rank();
        let mut slice_sizes = self.shape().to_vec();
        slice_sizes[axis] = 1;
        let op = Gather {
            offset_dims: (0..axis).chain(axis + n..self.rank() - 1 + n).collect(),
            collapsed_slice_dims: vec![axis],
            operand_batching_dims: vec![],
            start_indices_batching_dims: vec![],
            start_index_map: vec![axis],
            index_vector_dim: n,
            slice_sizes,
            indices_are_sorted: false,
        };
        self.graph.apply1(op, &[self, indices])
    }

    /// For each position of `indices`, the element of this at that index along `axis` and the same position along
    /// every other axis; `indices` has this tensor's shape in all axes but `axis`. An index out of range is moved to the
    /// nearest one in range. What puts a permutation along (`take_along_axis` in NumPy, `gather` in PyTorch).
    #[track_caller]
    pub fn take_along(&self, indices: &Tensor, axis: isize) -> Tensor {
        let Some(axis) = self.axis("take_along", axis) else { return self.clone() };
        let others: Vec<usize> = (0..self.rank()).filter(|&other| other != axis).collect();
        let fits = indices.rank() == self.rank() && others.iter().all(|&i| indices.shape()[i] == self.shape()[i]);
        if !fits {
            let message = format!(
                "take_along: indices {} must have the shape of {} but for axis {axis}",
                indices.aval, self.aval
            );
            self.graph.fail(std::panic::Location::caller(), message);
            return self.clone();
        }
        let op = Gather {
            offset_dims: vec![],
            collapsed_slice_dims: vec![axis],
            operand_batching_dims: others.clone(),
            start_indices_batching_dims: others,
            start_index_map: vec![axis],
            index_vector_dim: indices.rank(),
            slice_sizes: vec![1; self.rank()],
            indices_are_sorted: false,
        };
        self.graph.apply1(op, &[self, indices])
    }
}

#[cfg(test)]
mod tests {
    use crate::DType::{F32, I32};
    use crate::graph::Graph;
    use crate::graph::testing::{error, last_line};

    #[test]
    fn text() {
        assert_eq!(
            last_line(|g| vec![g.arg("x", F32, &[10, 6]).take(&g.arg("i", I32, &[2, 3]), 0)]),
            "%gather = \"stablehlo.gather\"(%x, %i) <{dimension_numbers = #stablehlo.gather<offset_dims = [2], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 2>, indices_are_sorted = false, slice_sizes = array<i64: 1, 6>}> : (tensor<10x6xf32>, tensor<2x3xi32>) -> tensor<2x3x6xf32>"
        );
        let middle = last_line(|g| vec![g.arg("x", F32, &[4, 10, 6]).take(&g.arg("i", I32, &[2, 3]), 1)]);
        assert!(middle.contains("offset_dims = [0, 3]") && middle.ends_with("-> tensor<4x2x3x6xf32>"), "{middle}");
        let along = last_line(|g| vec![g.arg("x", F32, &[2, 8]).take_along(&g.arg("i", I32, &[2, 3]), -1)]);
        assert!(along.contains("operand_batching_dims = [0], start_indices_batching_dims = [0]"), "{along}");
        assert!(along.ends_with("-> tensor<2x3xf32>"), "{along}");
    }

    #[test]
    fn errors() {
        let x = |g: &Graph| g.arg("x", F32, &[2, 8]);
        assert_eq!(
            error(|g| vec![x(g).take(&g.arg("i", F32, &[3]), 0)]),
            "gather: positions must be integers, found f32[3]: cast them"
        );
        assert!(error(|g| vec![x(g).take(&g.arg("i", I32, &[3]), 2)]).contains("take: axis 2 of f32[2,8]"));
        assert_eq!(
            error(|g| vec![x(g).take_along(&g.arg("i", I32, &[3, 3]), 1)]),
            "take_along: indices i32[3,3] must have the shape of f32[2,8] but for axis 1"
        );
    }
}
