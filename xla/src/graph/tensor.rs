//! Handles to values of a graph, and the operators on them.

use std::fmt;
use std::panic::Location;
use std::rc::Rc;

use super::aval::Aval;
use super::graph::Graph;
use super::module::ValueId;
use super::ops::binary::{Add, And, Div, Mul, Or, Rem, Sub, Xor};
use super::ops::constant::{Constant, Scalar};
use super::ops::unary::{Neg, Not};
use crate::DType;

/// A handle to one value of a [`Graph`]. Cloning is cheap.
#[derive(Clone)]
pub struct Tensor {
    pub(crate) graph: Graph,
    pub(crate) frame: u32,
    pub(crate) id: ValueId,
    pub(crate) aval: Rc<Aval>,
}

impl Tensor {
    /// Length of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.aval.shape
    }

    /// Length of one axis; negative counts from the end. An axis that does not exist is recorded as an error and
    /// gives 1.
    #[track_caller]
    pub fn dim(&self, axis: isize) -> usize {
        self.axis("dim", axis).map_or(1, |axis| self.shape()[axis])
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.aval.rank()
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.aval.dtype
    }

    /// Element type and shape.
    pub fn aval(&self) -> &Aval {
        &self.aval
    }

    /// The graph that this belongs to.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The value's place in the body that it belongs to.
    pub fn id(&self) -> ValueId {
        self.id
    }

    /// The readable name, where one was given.
    pub fn name(&self) -> Option<String> {
        self.graph.name_of(self)
    }

    /// Names the value: in the text's value names and locations, and as a tap (see [`Graph::taps`]).
    pub fn named(&self, name: &str) -> Tensor {
        self.graph.set_name(self, name);
        self.clone()
    }

    /// The position of an axis (negative counts from the end); recorded as an error where there is none.
    #[track_caller]
    pub(crate) fn axis(&self, op: &str, axis: isize) -> Option<usize> {
        let rank = self.rank() as isize;
        let position = if axis < 0 { axis + rank } else { axis };
        if (0..rank).contains(&position) {
            return Some(position as usize);
        }
        self.graph.fail(Location::caller(), format!("{op}: axis {axis} of {}, which has rank {rank}", self.aval));
        None
    }

    /// [`Tensor::axis`] for several axes, in the given order, each at most once.
    #[track_caller]
    pub(crate) fn axes(&self, op: &str, axes: &[isize]) -> Option<Vec<usize>> {
        let mut positions = Vec::new();
        for &axis in axes {
            let position = self.axis(op, axis)?;
            if positions.contains(&position) {
                self.graph.fail(Location::caller(), format!("{op}: axis {axis} is given twice in {axes:?}"));
                return None;
            }
            positions.push(position);
        }
        Some(positions)
    }

    /// A constant of this tensor's type and shape.
    #[track_caller]
    pub(crate) fn splat(&self, value: Scalar) -> Tensor {
        self.graph.apply1(Constant::splat(value, self.dtype(), self.shape()), &[])
    }

    /// The other operand: a tensor as it is, a number as a constant of this tensor's type and shape.
    #[track_caller]
    pub(crate) fn operand<'a>(&self, operand: impl Into<Operand<'a>>) -> Tensor {
        match operand.into() {
            Operand::Tensor(tensor) => tensor.clone(),
            Operand::Number(value) => self.splat(value),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({})", self.aval)
    }
}

/// What may stand beside a tensor: another tensor of the same type and shape, or a number (`f64` or `i64`), which
/// becomes a constant of the tensor's type and shape.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// A tensor.
    Tensor(&'a Tensor),
    /// A number.
    Number(Scalar),
}

impl<'a> From<&'a Tensor> for Operand<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Operand::Tensor(tensor)
    }
}

impl From<f64> for Operand<'_> {
    fn from(value: f64) -> Self {
        Operand::Number(value.into())
    }
}

impl From<i64> for Operand<'_> {
    fn from(value: i64) -> Self {
        Operand::Number(value.into())
    }
}

/// One operator for every pairing of tensors, references and numbers.
macro_rules! operator {
    ($trait:ident, $method:ident, $op:expr $(, $number:ty)*) => {
        operator!(@pair $trait, $method, $op, Tensor, Tensor);
        operator!(@pair $trait, $method, $op, Tensor, &Tensor);
        operator!(@pair $trait, $method, $op, &Tensor, Tensor);
        operator!(@pair $trait, $method, $op, &Tensor, &Tensor);
        $(
            operator!(@number $trait, $method, $op, Tensor, $number);
            operator!(@number $trait, $method, $op, &Tensor, $number);
        )*
    };
    (@pair $trait:ident, $method:ident, $op:expr, $left:ty, $right:ty) => {
        impl std::ops::$trait<$right> for $left {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, right: $right) -> Tensor {
                self.graph.apply1($op, &[&self, &right])
            }
        }
    };
    (@number $trait:ident, $method:ident, $op:expr, $tensor:ty, $number:ty) => {
        impl std::ops::$trait<$number> for $tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, right: $number) -> Tensor {
                let right = self.splat(right.into());
                self.graph.apply1($op, &[&self, &right])
            }
        }
        impl std::ops::$trait<$tensor> for $number {
            type Output = Tensor;
            #[track_caller]
            fn $method(self, right: $tensor) -> Tensor {
                let left = right.splat(self.into());
                right.graph.apply1($op, &[&left, &right])
            }
        }
    };
}

operator!(Add, add, Add, f64, i64);
operator!(Sub, sub, Sub, f64, i64);
operator!(Mul, mul, Mul, f64, i64);
operator!(Div, div, Div, f64, i64);
operator!(Rem, rem, Rem, f64, i64);
operator!(BitAnd, bitand, And);
operator!(BitOr, bitor, Or);
operator!(BitXor, bitxor, Xor);

macro_rules! prefix_operator {
    ($trait:ident, $method:ident, $op:expr) => {
        impl std::ops::$trait for Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self) -> Tensor {
                self.graph.apply1($op, &[&self])
            }
        }
        impl std::ops::$trait for &Tensor {
            type Output = Tensor;
            #[track_caller]
            fn $method(self) -> Tensor {
                self.graph.apply1($op, &[self])
            }
        }
    };
}

prefix_operator!(Neg, neg, Neg);
prefix_operator!(Not, not, Not);
