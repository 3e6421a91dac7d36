//! The general dot product, which [`einsum`](crate::graph::einsum()) writes by letters.

use super::custom_call::{Attr, CustomCall};
use super::unary::Class;
use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::Platform;
use crate::graph::aval::{Aval, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::tensor::Tensor;

/// How exact a dot of f32 tensors is on hardware that has faster, coarser multipliers (TPU, GPU).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// The hardware's fastest: on TPU, f32 operands are rounded to bf16.
    #[default]
    Default,
    /// In between: on TPU three bf16 passes.
    High,
    /// Full f32.
    Highest,
}

/// Products summed over the contracted axes. The result has the batch axes, the left operand's other axes, then the
/// right operand's.
#[derive(Clone, Debug)]
pub struct DotGeneral {
    /// Axes that are paired and kept: (left, right).
    pub batch: Vec<(usize, usize)>,
    /// Axes that are paired and summed over: (left, right).
    pub contract: Vec<(usize, usize)>,
    /// Element type of the result, in which the sum is kept.
    pub dtype: DType,
    /// What is asked of the hardware.
    pub precision: Precision,
}

/// The kernel that products of float matrices go to in f32 where the host program brings one. Of both operands and the result the
/// batch axes come first. Its attributes: `sizes`, batch, M, K and N; `left` and `right`, whether the contracted axes of that
/// operand stand last.
pub const MATMUL: &str = "xla.matmul";

/// Rows, columns or terms below which packing operands for [`MATMUL`] costs more than it gives.
const LEAST: usize = 8;

op_info!(DotGeneral, 2, "dot_general", "products summed over paired axes");

impl DotGeneral {
    /// The axes of an operand of this rank that are not paired; `side` picks its axis from a pair.
    fn free(&self, rank: usize, side: impl Fn(&(usize, usize)) -> usize) -> Vec<usize> {
        let paired: Vec<usize> = self.batch.iter().chain(&self.contract).map(side).collect();
        (0..rank).filter(|axis| !paired.contains(axis)).collect()
    }

    /// The product as a call of [`MATMUL`], where it is one of matrices as they lie in memory.
    fn kernel(&self, left: &Aval, right: &Aval) -> Option<CustomCall> {
        let floats = [left, right].iter().all(|x| matches!(x.dtype, DType::F32 | DType::BF16 | DType::F16));
        let leading = self.batch.iter().enumerate().all(|(axis, &pair)| pair == (axis, axis));
        if !floats || !leading || self.dtype != DType::F32 {
            return None;
        }
        let mut contract = self.contract.clone();
        contract.sort_unstable();
        let (of_left, of_right): (Vec<usize>, Vec<usize>) = contract.into_iter().unzip();
        let batch = self.batch.len();
        // The axes of each in order, at its end or behind the batch: then it is a matrix.
        let last = |axes: &[usize], rank: usize| match () {
            _ if axes.iter().copied().eq(rank - axes.len()..rank) => Some(true),
            _ if axes.iter().copied().eq(batch..batch + axes.len()) => Some(false),
            _ => None,
        };
        let (left_last, right_last) = (last(&of_left, left.rank())?, last(&of_right, right.rank())?);
        let size = |axes: &[usize]| axes.iter().map(|&axis| left.shape[axis]).product::<usize>();
        let (batch, k) = (left.shape[..batch].iter().product::<usize>(), size(&of_left));
        let lines = |x: &Aval| x.shape.iter().product::<usize>().checked_div(batch * k);
        let (m, n) = (lines(left)?, lines(right)?);
        (m.min(k).min(n) >= LEAST).then(|| {
            CustomCall::new(MATMUL, Vec::new())
                .attr("sizes", Attr::I64s([batch, m, k, n].map(|size| size as i64).to_vec()))
                .attr("left", Attr::Bool(left_last))
                .attr("right", Attr::Bool(right_last))
        })
    }

    /// The product of these, with axes that are contracted one after the other as one: XLA:CPU turns what has several in memory, at
    /// a tenth of the speed of a copy.
    fn of(mut self, left: &Tensor, right: &Tensor) -> Tensor {
        let graph = left.graph();
        let (mut left, mut right) = (left.clone(), right.clone());
        self.contract.sort_unstable();
        while let Some(at) = self.contract.windows(2).position(|w| w[1] == (w[0].0 + 1, w[0].1 + 1))
            && graph.platform() == Platform::Cpu
            && graph.mesh().is_none()
        {
            let (l, r) = self.contract.remove(at + 1);
            (left, right) = (left.join(l), right.join(r));
            let closer =
                |(a, b): &mut (usize, usize)| (*a, *b) = (*a - usize::from(*a >= l), *b - usize::from(*b >= r));
            self.batch.iter_mut().chain(&mut self.contract).for_each(closer);
        }
        graph.apply1(self, &[&left, &right])
    }
}

impl Op for DotGeneral {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (left, right) = (inputs[0], inputs[1]);
        Class::Numeric.check(left)?;
        Class::Numeric.check(right)?;
        for (i, &(l, r)) in self.batch.iter().chain(&self.contract).enumerate() {
            if l >= left.rank() || r >= right.rank() {
                return Err(format!("axis pair ({l}, {r}) of {left} and {right}: there is no such axis"));
            }
            let before = || self.batch.iter().chain(&self.contract).take(i);
            if before().any(|pair| pair.0 == l || pair.1 == r) {
                return Err(format!("axis pair ({l}, {r}) of {left} and {right}: an axis is in one pair at most"));
            }
            if left.shape[l] != right.shape[r] {
                let (n, m) = (left.shape[l], right.shape[r]);
                return Err(format!("axis {l} of {left} has length {n}, axis {r} of {right} has {m}: they are paired"));
            }
        }
        let batch = self.batch.iter().map(|&(l, _)| left.shape[l]);
        let left_free = self.free(left.rank(), |pair| pair.0).into_iter().map(|axis| left.shape[axis]);
        let right_free = self.free(right.rank(), |pair| pair.1).into_iter().map(|axis| right.shape[axis]);
        let shape: Vec<usize> = batch.chain(left_free).chain(right_free).collect();
        Ok(vec![Aval::new(self.dtype, &shape)])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        if cx.has_kernel(MATMUL)
            && let Some(call) = self.kernel(cx.input(0), cx.input(1))
        {
            return call.stablehlo(cx);
        }
        let pairs = |pairs: &[(usize, usize)]| {
            let (left, right): (Vec<usize>, Vec<usize>) = pairs.iter().copied().unzip();
            format!("{} x {}", list(&left), list(&right))
        };
        let mut text = format!("stablehlo.dot_general {}", cx.operands());
        if !self.batch.is_empty() {
            text += &format!(", batching_dims = {}", pairs(&self.batch));
        }
        text += &format!(", contracting_dims = {}", pairs(&self.contract));
        match self.precision {
            Precision::Default => {}
            Precision::High => text += ", precision = [HIGH, HIGH]",
            Precision::Highest => text += ", precision = [HIGHEST, HIGHEST]",
        }
        format!("{text} : {}", cx.signature())
    }

    /// The cotangent times the other operand, over the axes that this one does not have.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let ct = cx.ct();
        cx.each(|cx, i| {
            let (own, other) = (cx.input_aval(i), cx.input(1 - i));
            let side = |pair: &(usize, usize), of: usize| if of == 0 { pair.0 } else { pair.1 };
            let free = |of: usize, rank: usize| self.free(rank, |pair| side(pair, of));
            let (own_free, other_free) = (free(i, own.rank()), free(1 - i, other.rank()));
            // The result has batch, left, right axes.
            let n = self.batch.len();
            let after = if i == 0 { n + own_free.len() } else { n };
            let batch: Vec<(usize, usize)> =
                self.batch.iter().enumerate().map(|(at, pair)| (at, side(pair, 1 - i))).collect();
            let contract: Vec<(usize, usize)> =
                other_free.iter().enumerate().map(|(at, &axis)| (after + at, axis)).collect();
            // Its axes: batch, then this operand's own and the contracted ones, in the order of the other operand.
            let mut contracted = self.contract.clone();
            contracted.sort_by_key(|pair| side(pair, 1 - i));
            let paired: Vec<usize> = contracted.iter().map(|pair| side(pair, i)).collect();
            let batches: Vec<usize> = self.batch.iter().map(|pair| side(pair, i)).collect();
            let op = |batch, contract| DotGeneral { batch, contract, dtype: own.dtype, precision: self.precision };
            let (ct, exchanged) = (ct.cast(other.dtype()), [&batches[..], &paired, &own_free].concat());
            if exchanged.is_sorted() {
                let swapped = |pairs: Vec<(usize, usize)>| pairs.into_iter().map(|(l, r)| (r, l)).collect();
                return op(swapped(batch), swapped(contract)).of(&other, &ct);
            }
            let product = op(batch, contract).of(&ct, &other);
            let axes = [batches, own_free, paired].concat();
            let mut order = vec![0; axes.len()];
            axes.iter().enumerate().for_each(|(from, &to)| order[to] = from);
            product.transpose(&order)
        })
    }
}

impl Tensor {
    /// This axis and the one before it as one.
    fn join(&self, axis: usize) -> Tensor {
        let mut shape = self.shape().to_vec();
        shape[axis - 1] *= shape.remove(axis);
        self.reshape(&shape)
    }

    /// Products summed over the `contract` axis pairs (left, right), for each position of the `batch` pairs. The
    /// result is of type `dtype` (in which the sum is kept) and has the batch axes, this tensor's other axes, then
    /// the right one's. `einsum` is the readable way to write it.
    #[track_caller]
    pub fn dot_general(
        &self,
        right: &Tensor,
        batch: &[(usize, usize)],
        contract: &[(usize, usize)],
        dtype: DType,
    ) -> Tensor {
        let (batch, contract) = (batch.to_vec(), contract.to_vec());
        let precision = self.graph.precision();
        self.graph.apply1(DotGeneral { batch, contract, dtype, precision }, &[self, right])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{BF16, F32};
    use crate::graph::testing::{error, last_line};

    #[test]
    fn text() {
        let dot = |precision| {
            last_line(|g| {
                g.set_precision(precision);
                let (x, y) = (g.arg("x", BF16, &[2, 3, 4]), g.arg("y", BF16, &[2, 5, 4]));
                vec![x.dot_general(&y, &[(0, 0)], &[(2, 2)], F32)]
            })
        };
        assert_eq!(
            dot(Precision::Default),
            "%dot_general = stablehlo.dot_general %x, %y, batching_dims = [0] x [0], contracting_dims = [2] x [2] : (tensor<2x3x4xbf16>, tensor<2x5x4xbf16>) -> tensor<2x3x5xf32>"
        );
        assert!(dot(Precision::Highest).contains("precision = [HIGHEST, HIGHEST]"));
    }

    #[test]
    fn a_kernel_takes_products_of_float_matrices_as_they_lie() {
        let sizes = |left: &[usize], right: &[usize], batch: &[(usize, usize)], contract: &[(usize, usize)]| {
            let text = last_line(|g| {
                g.set_kernels(&[MATMUL]);
                let (x, y) = (g.arg("x", F32, left), g.arg("y", BF16, right));
                vec![x.dot_general(&y, batch, contract, F32)]
            });
            let attrs = text.split_once("backend_config = ").map(|(_, attrs)| attrs.split('}').next().unwrap_or(attrs));
            attrs.map(|attrs| attrs.replace("array<i64: ", "").replace(" : i64", "") + "}")
        };
        let call = |sizes: &str, left: bool, right: bool| {
            Some(format!("{{\"sizes\" = {sizes}>, \"left\" = {left}, \"right\" = {right}}}"))
        };
        // BSM,MHK; a gradient of it by the weight; by x, over two axes.
        assert_eq!(sizes(&[2, 9, 16], &[16, 4, 8], &[], &[(2, 0)]), call("1, 18, 16, 32", true, false));
        assert_eq!(sizes(&[18, 16], &[18, 4, 8], &[], &[(0, 0)]), call("1, 16, 18, 32", false, false));
        assert_eq!(sizes(&[18, 4, 8], &[16, 4, 8], &[], &[(2, 2), (1, 1)]), call("1, 18, 32, 16", true, true));
        assert_eq!(sizes(&[3, 9, 16], &[3, 16, 8], &[(0, 0)], &[(2, 1)]), call("3, 9, 16, 8", true, false));
        // Few rows; a batch axis, a contracted one, or a pair of them that would have to be moved.
        assert_eq!(sizes(&[7, 16], &[16, 32], &[], &[(1, 0)]), None);
        assert_eq!(sizes(&[9, 3, 16], &[3, 16, 8], &[(1, 0)], &[(2, 1)]), None);
        assert_eq!(sizes(&[9, 16, 9], &[16, 8], &[], &[(1, 0)]), None);
        assert_eq!(sizes(&[9, 4, 8], &[8, 4, 16], &[], &[(1, 1), (2, 0)]), None);
        // Another result than f32.
        let text = last_line(|g| {
            g.set_kernels(&[MATMUL]);
            let x = g.arg("x", BF16, &[16, 16]);
            vec![x.dot_general(&x, &[], &[(1, 0)], BF16)]
        });
        assert!(text.contains("stablehlo.dot_general"), "{text}");
    }

    #[test]
    fn errors() {
        let dot = |batch: &[(usize, usize)], contract: &[(usize, usize)]| {
            error(|g| vec![g.arg("x", F32, &[2, 3]).dot_general(&g.arg("y", F32, &[3, 2]), batch, contract, F32)])
        };
        assert_eq!(
            dot(&[], &[(0, 0)]),
            "dot_general: axis 0 of f32[2,3] has length 2, axis 0 of f32[3,2] has 3: they are paired"
        );
        assert!(dot(&[], &[(2, 0)]).contains("there is no such axis"));
        assert!(dot(&[(0, 1)], &[(0, 1)]).contains("an axis is in one pair at most"));
    }
}
