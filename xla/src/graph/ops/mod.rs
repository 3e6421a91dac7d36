//! The operations, each declared once: attributes, shape and dtype rule, StableHLO text, and the [`Tensor`] methods
//! that make it. [`ALL`] lists them.
//!
//! [`Tensor`]: super::Tensor

use std::any::Any;
use std::fmt;

use super::aval::Aval;
use super::emit::Cx;
use super::grad::{Cotangents, Vjp};
use super::module::Body;
use super::tensor::Tensor;

pub mod binary;
pub mod collective;
pub mod constant;
pub mod control;
pub mod convert;
pub mod custom_call;
pub mod custom_vjp;
pub mod dot;
pub mod dynamic;
pub mod gather;
pub mod manual;
pub mod random;
pub mod reduce;
pub mod scan;
pub mod scatter;
pub mod select;
pub mod shape;
pub mod sharding;
pub mod slice;
pub mod sort;
pub mod unary;
pub mod window;

pub use control::Call;

/// What is known of an op without its attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpInfo {
    /// The name: that of StableHLO, without dialect, where there is one.
    pub name: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// The fewest and the most operands.
    pub operands: (usize, usize),
    /// Whether a gradient flows through it.
    pub gradient: Gradient,
}

/// Whether a gradient flows through an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gradient {
    /// By [`Op::vjp`].
    Flows,
    /// The derivative is zero everywhere that there is one, or the results are no floats.
    Zero(&'static str),
    /// There is no rule: differentiating through it is an error.
    Missing(&'static str),
}

/// One operation with its attributes.
pub trait Op: Any + fmt::Debug {
    /// Name, summary and number of operands; the same that [`ALL`] lists.
    fn info(&self) -> &'static OpInfo;

    /// Element types and shapes of the results. The number of operands is that of
    /// [`Op::info`]. Errors: the sentence that the user reads, without the op's name.
    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String>;

    /// The right-hand side of the op's line.
    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String;

    /// Number of results for this number of operands.
    fn result_count(&self, _inputs: usize) -> usize {
        1
    }

    /// The cotangents of the operands, given those of the results: the derivative, written with other ops. Asked only where
    /// the gradient of something depends on it.
    fn vjp(&self, _cx: &mut Vjp<'_, '_>) -> Cotangents {
        match self.info().gradient {
            Gradient::Zero(_) => Ok(_cx.nothing()),
            Gradient::Missing(why) => Err(why.to_string()),
            Gradient::Flows => Err("the op has no rule".to_string()),
        }
    }

    /// The operand that the only result is, where nothing is computed: it has no line of its own.
    fn passes(&self) -> Option<usize> {
        None
    }

    /// The bodies inside, for a walk over the whole module.
    fn regions(&self) -> Vec<&Body> {
        Vec::new()
    }
}

impl dyn Op {
    /// The attributes, where this is an op of that type.
    pub fn downcast_ref<T: Op>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// Declares the number of operands (`2`, or `1..` for one or more), the name and the summary of an op beside its type, and
/// why no gradient flows where none does: `Zero "why"`, `Missing "why"`.
macro_rules! op_info {
    ($type:ty, $least:literal.., $name:literal, $summary:literal $(, $gradient:ident $why:literal)?) => {
        op_info!(@ $type, ($least, usize::MAX), $name, $summary $(, $gradient $why)?);
    };
    ($type:ty, $count:literal, $name:literal, $summary:literal $(, $gradient:ident $why:literal)?) => {
        op_info!(@ $type, ($count, $count), $name, $summary $(, $gradient $why)?);
    };
    (@ $type:ty, $operands:expr, $name:literal, $summary:literal) => {
        op_info!(@@ $type, $operands, $name, $summary, super::Gradient::Flows);
    };
    (@ $type:ty, $operands:expr, $name:literal, $summary:literal, $gradient:ident $why:literal) => {
        op_info!(@@ $type, $operands, $name, $summary, super::Gradient::$gradient($why));
    };
    (@@ $type:ty, $operands:expr, $name:literal, $summary:literal, $gradient:expr) => {
        impl $type {
            /// Name, summary, number of operands, and whether a gradient flows.
            pub const INFO: OpInfo =
                OpInfo { name: $name, summary: $summary, operands: $operands, gradient: $gradient };
        }
    };
}
pub(crate) use op_info;

/// The two results of an op that has two.
fn pair(results: Vec<Tensor>, fallback: &Tensor) -> (Tensor, Tensor) {
    let mut results = results.into_iter();
    let mut next = || results.next().unwrap_or_else(|| fallback.clone());
    (next(), next())
}

/// Every op, grouped by the file that declares it.
pub const ALL: &[OpInfo] = &[
    unary::Abs::INFO,
    unary::Cbrt::INFO,
    unary::Ceil::INFO,
    unary::Clz::INFO,
    unary::Cos::INFO,
    unary::Erf::INFO,
    unary::Exp::INFO,
    unary::Expm1::INFO,
    unary::Floor::INFO,
    unary::IsFinite::INFO,
    unary::Log::INFO,
    unary::Log1p::INFO,
    unary::Logistic::INFO,
    unary::Neg::INFO,
    unary::Not::INFO,
    unary::Popcnt::INFO,
    unary::Round::INFO,
    unary::RoundAfz::INFO,
    unary::Rsqrt::INFO,
    unary::Sign::INFO,
    unary::Sin::INFO,
    unary::Sqrt::INFO,
    unary::Tan::INFO,
    unary::Tanh::INFO,
    binary::Add::INFO,
    binary::And::INFO,
    binary::Atan2::INFO,
    binary::Div::INFO,
    binary::Maximum::INFO,
    binary::Minimum::INFO,
    binary::Mul::INFO,
    binary::Or::INFO,
    binary::Pow::INFO,
    binary::Rem::INFO,
    binary::ShiftLeft::INFO,
    binary::ShiftRightArithmetic::INFO,
    binary::ShiftRightLogical::INFO,
    binary::Sub::INFO,
    binary::Xor::INFO,
    select::Compare::INFO,
    select::Select::INFO,
    select::Clamp::INFO,
    convert::Convert::INFO,
    convert::BitcastConvert::INFO,
    convert::ReducePrecision::INFO,
    convert::StopGradient::INFO,
    constant::Constant::INFO,
    constant::Iota::INFO,
    shape::BroadcastInDim::INFO,
    shape::Reshape::INFO,
    shape::Transpose::INFO,
    shape::Reverse::INFO,
    slice::Slice::INFO,
    slice::Pad::INFO,
    slice::Concatenate::INFO,
    dynamic::DynamicSlice::INFO,
    dynamic::DynamicUpdateSlice::INFO,
    gather::Gather::INFO,
    scatter::Scatter::INFO,
    dot::DotGeneral::INFO,
    reduce::Reduce::INFO,
    reduce::ArgReduce::INFO,
    window::ReduceWindow::INFO,
    sort::Sort::INFO,
    sort::TopK::INFO,
    random::RngBitGenerator::INFO,
    control::Call::INFO,
    scan::Scan::INFO,
    control::While::INFO,
    control::Case::INFO,
    control::OptimizationBarrier::INFO,
    custom_call::CustomCall::INFO,
    custom_vjp::CustomVjp::INFO,
    sharding::ShardingConstraint::INFO,
    manual::ManualComputation::INFO,
    collective::AllReduce::INFO,
    collective::AllGather::INFO,
    collective::ReduceScatter::INFO,
    collective::AllToAll::INFO,
    collective::CollectivePermute::INFO,
    collective::PartitionId::INFO,
    collective::ReplicaId::INFO,
];
