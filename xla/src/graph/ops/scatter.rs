//! Windows written at a tensor of positions.

use super::gather::{Gather, last_positions};
use super::reduce::Fold;
use super::{Op, OpInfo, op_info};
use crate::graph::aval::{Aval, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// The first operand with the windows of the third written at the positions that the second gives. A window that
/// would stick out is left away. The attributes are those of StableHLO's scatter.
#[derive(Clone, Debug)]
pub struct Scatter {
    /// Axes of the updates that run inside a window.
    pub update_window_dims: Vec<usize>,
    /// Axes of the operand whose window has length 1 and is not in the updates.
    pub inserted_window_dims: Vec<usize>,
    /// Axes of the operand that go along with [`Scatter::scatter_indices_batching_dims`].
    pub input_batching_dims: Vec<usize>,
    /// Axes of the positions that go along with the operand's.
    pub scatter_indices_batching_dims: Vec<usize>,
    /// For each component of a position, the axis of the operand.
    pub scatter_dims_to_operand_dims: Vec<usize>,
    /// The axis of the positions along which the components of one position lie; its rank, where each position is one
    /// number.
    pub index_vector_dim: usize,
    /// What combines the old element with the new; `None` takes the new one.
    pub fold: Option<Fold>,
    /// A promise that the positions never decrease.
    pub indices_are_sorted: bool,
    /// A promise that no position is given twice.
    pub unique_indices: bool,
}

op_info!(Scatter, 3, "scatter", "windows written at a tensor of positions");

impl Op for Scatter {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (x, at, updates) = (inputs[0], inputs[1], inputs[2]);
        if !at.dtype.is_integer() {
            return Err(format!("positions must be integers, found {at}: cast them"));
        }
        if updates.dtype != x.dtype {
            return Err(format!("the updates of {x} must be of its element type, found {updates}"));
        }
        if let Some(fold) = self.fold {
            fold.class().check(x)?;
        }
        if self.index_vector_dim > at.rank() {
            return Err(format!("index_vector_dim {} of positions {at}", self.index_vector_dim));
        }
        let components = at.shape.get(self.index_vector_dim).copied().unwrap_or(1);
        if components != self.scatter_dims_to_operand_dims.len() {
            let wanted = self.scatter_dims_to_operand_dims.len();
            return Err(format!("positions {at} have {components} components, scatter_dims_to_operand_dims {wanted}"));
        }
        let dropped: Vec<usize> = [&self.inserted_window_dims[..], &self.input_batching_dims].concat();
        if let Some(axis) = dropped.iter().chain(&self.scatter_dims_to_operand_dims).find(|&&axis| axis >= x.rank()) {
            return Err(format!("axis {axis} of {x}, which has rank {}", x.rank()));
        }
        let kept: Vec<usize> = (0..x.rank()).filter(|axis| !dropped.contains(axis)).collect();
        let window = &self.update_window_dims;
        if window.len() != kept.len() || window.iter().any(|&axis| axis >= updates.rank()) {
            return Err(format!(
                "update_window_dims {window:?} must name {} axes of the updates {updates}",
                kept.len()
            ));
        }
        for (&axis, &of) in window.iter().zip(&kept) {
            if updates.shape[axis] > x.shape[of] {
                return Err(format!("axis {axis} of the updates {updates} is longer than axis {of} of {x}"));
            }
        }
        let positions: Vec<usize> =
            (0..at.rank()).filter(|&axis| axis != self.index_vector_dim).map(|axis| at.shape[axis]).collect();
        let given: Vec<usize> =
            (0..updates.rank()).filter(|axis| !window.contains(axis)).map(|axis| updates.shape[axis]).collect();
        if positions != given {
            return Err(format!("the updates {updates} have {given:?} windows, the positions {at} are {positions:?}"));
        }
        Ok(vec![x.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let mut dims = vec![format!("update_window_dims = {}", list(&self.update_window_dims))];
        for (name, axes) in [
            ("inserted_window_dims", &self.inserted_window_dims),
            ("input_batching_dims", &self.input_batching_dims),
            ("scatter_indices_batching_dims", &self.scatter_indices_batching_dims),
            ("scatter_dims_to_operand_dims", &self.scatter_dims_to_operand_dims),
        ] {
            if !axes.is_empty() {
                dims.push(format!("{name} = {}", list(axes)));
            }
        }
        dims.push(format!("index_vector_dim = {}", self.index_vector_dim));
        let attrs = format!(
            "indices_are_sorted = {}, scatter_dimension_numbers = #stablehlo.scatter<{}>, unique_indices = {}",
            self.indices_are_sorted,
            dims.join(", "),
            self.unique_indices
        );
        let region = combiner(cx, self.fold);
        format!("\"stablehlo.scatter\"({}) <{{{attrs}}}> ({region}) : {}", cx.operands(), cx.signature())
    }

    /// The updates have the cotangents of where they were written; the operand has them all where they were added to it, and
    /// those of what was not overwritten.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        match self.fold {
            Some(Fold::Sum) => {}
            None if self.unique_indices => {}
            None => {
                return Err("which of several updates of one place stays is not known: promise unique indices".into());
            }
            Some(fold) => return Err(format!("only sums and overwriting have a derivative, not {fold:?}")),
        }
        let (x, updates) = (cx.input_aval(0), cx.input_aval(2));
        let (at, ct) = (cx.input(1), cx.ct());
        let mut slice_sizes = vec![1; x.rank()];
        let dropped =
            |axis: &usize| self.inserted_window_dims.contains(axis) || self.input_batching_dims.contains(axis);
        let kept = (0..x.rank()).filter(|axis| !dropped(axis));
        kept.zip(&self.update_window_dims).for_each(|(axis, &of)| slice_sizes[axis] = updates.shape[of]);
        cx.each(|cx, i| {
            if i == 0 {
                let zeros = cx.graph().full(0i64, updates.dtype, &updates.shape);
                return match self.fold {
                    Some(_) => ct.clone(),
                    None => cx.graph().apply1(self.clone(), &[&ct, &at, &zeros]),
                };
            }
            let op = Gather {
                offset_dims: self.update_window_dims.clone(),
                collapsed_slice_dims: self.inserted_window_dims.clone(),
                operand_batching_dims: self.input_batching_dims.clone(),
                start_indices_batching_dims: self.scatter_indices_batching_dims.clone(),
                start_index_map: self.scatter_dims_to_operand_dims.clone(),
                index_vector_dim: self.index_vector_dim,
                slice_sizes: slice_sizes.clone(),
                indices_are_sorted: self.indices_are_sorted,
            };
            let read = cx.graph().apply1(op, &[&ct, &at]);
            // A gather moves a window inside that a scatter leaves out.
            let last = self.scatter_dims_to_operand_dims.iter().map(|&axis| (x.shape[axis] - slice_sizes[axis]) as i64);
            let last = last_positions(&at, &last.collect::<Vec<_>>(), self.index_vector_dim);
            let mut fits = at.ge(0i64) & at.le(&last);
            if self.index_vector_dim < at.rank() {
                fits = fits.all(&[self.index_vector_dim as isize]);
            }
            let positions: Vec<usize> =
                (0..updates.rank()).filter(|axis| !self.update_window_dims.contains(axis)).collect();
            fits.broadcast(&updates.shape, &positions).select(&read, &read.splat(0.0.into()))
        })
    }
}

/// The region that combines an old and a new element of operand 0's type.
pub(crate) fn combiner(cx: &mut Cx<'_, '_>, fold: Option<Fold>) -> String {
    let scalar = format!("tensor<{}>", cx.input(0).dtype);
    let (old, new) = (cx.fresh("old"), cx.fresh("new"));
    let pad = cx.pad();
    let head = format!("{pad}^bb0({old}: {scalar}, {new}: {scalar}):\n");
    let Some(fold) = fold else {
        return format!("{{\n{head}{pad}  stablehlo.return {new} : {scalar}\n{pad}}}");
    };
    let both = cx.fresh("both");
    let line = format!("{pad}  {both} = {} {old}, {new} : {scalar}\n", fold.spelling());
    format!("{{\n{head}{line}{pad}  stablehlo.return {both} : {scalar}\n{pad}}}")
}

impl Tensor {
    /// Zeros of shape `shape` with this tensor added at `indices` along `axis`: what undoes [`Tensor::take_along`].
    #[track_caller]
    pub(crate) fn add_along(&self, indices: &Tensor, axis: usize, shape: &[usize]) -> Tensor {
        let others: Vec<usize> = (0..self.rank()).filter(|&other| other != axis).collect();
        let op = Scatter {
            update_window_dims: vec![],
            inserted_window_dims: vec![axis],
            input_batching_dims: others.clone(),
            scatter_indices_batching_dims: others,
            scatter_dims_to_operand_dims: vec![axis],
            index_vector_dim: self.rank(),
            fold: Some(Fold::Sum),
            indices_are_sorted: false,
            unique_indices: false,
        };
        let zeros = self.graph.full(0i64, self.dtype(), shape);
        self.graph.apply1(op, &[&zeros, indices, self])
    }

    /// This tensor (N, …) or (B, T, …) with `updates` written at `indices`, whose last axis holds one component for
    /// each of this tensor's first axes; `updates` has the other axes of `indices`, then the rest of this tensor's.
    /// `fold` combines old and new elements (`None` takes the new). An index out of range writes nothing.
    ///
    /// A key/value cache (B, T, G, K) takes one position per batch slot with indices (B, 2) and updates (B, G, K).
    /// `unique` promises sorted indices without a repetition, which lets the write happen in place.
    #[track_caller]
    pub fn scatter(&self, indices: &Tensor, updates: &Tensor, fold: Option<Fold>, unique: bool) -> Tensor {
        let components = indices.shape().last().copied().unwrap_or(0).min(self.rank());
        let batch = indices.rank().saturating_sub(1);
        let op = Scatter {
            update_window_dims: (batch..batch + self.rank() - components).collect(),
            inserted_window_dims: (0..components).collect(),
            input_batching_dims: vec![],
            scatter_indices_batching_dims: vec![],
            scatter_dims_to_operand_dims: (0..components).collect(),
            index_vector_dim: batch,
            fold,
            indices_are_sorted: unique,
            unique_indices: unique,
        };
        self.graph.apply1(op, &[self, indices, updates])
    }

    /// This tensor (B, T, …) with, in each batch slot b, `updates[b]` (S, …) written at positions `start[b]` …
    /// `start[b] + S − 1` of axis 1: the step of a key/value cache. `start` is (B), `updates` (B, S, …). A slot whose
    /// window does not fit is left as it was.
    #[track_caller]
    pub fn update_positions(&self, updates: &Tensor, start: &Tensor) -> Tensor {
        let batch = self.shape().first().copied().unwrap_or(1);
        let slots = self.graph.iota(start.dtype(), &[batch, 1], 0);
        let indices = self.graph.concatenate(&[&slots, &start.reshape(&[batch, 1])], 1);
        let op = Scatter {
            update_window_dims: (1..self.rank()).collect(),
            inserted_window_dims: vec![0],
            input_batching_dims: vec![],
            scatter_indices_batching_dims: vec![],
            scatter_dims_to_operand_dims: vec![0, 1],
            index_vector_dim: 1,
            fold: None,
            indices_are_sorted: true,
            unique_indices: true,
        };
        self.graph.apply1(op, &[self, &indices, updates])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{BF16, F32, I32};
    use crate::graph::Graph;
    use crate::graph::testing::{error, lines};

    fn cache(g: &Graph) -> Tensor {
        g.arg("c", BF16, &[8, 2048, 3, 128])
    }

    #[test]
    fn one_position_per_slot() {
        let text =
            lines(|g| vec![cache(g).scatter(&g.arg("i", I32, &[8, 2]), &g.arg("n", BF16, &[8, 3, 128]), None, true)]);
        assert_eq!(
            text,
            [
                "%scatter = \"stablehlo.scatter\"(%c, %i, %n) <{indices_are_sorted = true, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [1, 2], inserted_window_dims = [0, 1], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 1>, unique_indices = true}> ({",
                "^bb0(%old: tensor<bf16>, %new: tensor<bf16>):",
                "stablehlo.return %new : tensor<bf16>",
                "}) : (tensor<8x2048x3x128xbf16>, tensor<8x2xi32>, tensor<8x3x128xbf16>) -> tensor<8x2048x3x128xbf16>",
            ]
        );
    }

    #[test]
    fn several_positions_per_slot() {
        let text =
            lines(|g| vec![cache(g).update_positions(&g.arg("n", BF16, &[8, 5, 3, 128]), &g.arg("p", I32, &[8]))]);
        assert_eq!(
            text[..3],
            [
                "%iota = stablehlo.iota dim = 0 : tensor<8x1xi32>",
                "%reshape = stablehlo.reshape %p : (tensor<8xi32>) -> tensor<8x1xi32>",
                "%concatenate = stablehlo.concatenate %iota, %reshape, dim = 1 : (tensor<8x1xi32>, tensor<8x1xi32>) -> tensor<8x2xi32>",
            ]
        );
        assert!(text[3].contains("update_window_dims = [1, 2, 3], inserted_window_dims = [0]"), "{}", text[3]);
    }

    #[test]
    fn folds() {
        let text = lines(|g| {
            let (x, i, u) = (g.arg("x", F32, &[4]), g.arg("i", I32, &[3, 1]), g.arg("u", F32, &[3]));
            vec![x.scatter(&i, &u, Some(Fold::Sum), false)]
        });
        assert!(text[0].contains("unique_indices = false") && text[2].contains("stablehlo.add %old, %new"), "{text:?}");
    }

    #[test]
    fn errors() {
        let update = |dtype, shape: &[usize], positions: &[usize]| {
            error(|g| vec![cache(g).update_positions(&g.arg("n", dtype, shape), &g.arg("p", I32, positions))])
        };
        assert!(update(F32, &[8, 5, 3, 128], &[8]).contains("must be of its element type, found f32[8,5,3,128]"));
        assert!(
            update(BF16, &[8, 5, 4, 128], &[8]).contains("axis 2 of the updates bf16[8,5,4,128] is longer than axis 2")
        );
        assert!(update(BF16, &[7, 5, 3, 128], &[8]).contains("have [7] windows, the positions i32[8,2] are [8]"));
        assert!(update(BF16, &[8, 3, 128], &[8]).contains("update_window_dims [1, 2, 3] must name 3 axes"));
        assert!(
            error(|g| {
                vec![cache(g).scatter(&g.arg("i", F32, &[8, 2]), &g.arg("n", BF16, &[8, 3, 128]), None, true)]
            })
            .contains("positions must be integers")
        );
    }
}
