//! StableHLO graphs as plain data.
//!
//! A [`Graph`] is built by calling methods on [`Tensor`] handles; [`Graph::finish`] gives a [`Module`], whose
//! [`Module::stablehlo`] is the text that a PJRT plugin compiles. Mistakes do not interrupt the building: the first one
//! is kept with the caller's file and line and comes back from `finish`.
//!
//! ```
//! use xla::DType;
//! use xla::graph::{Graph, einsum};
//!
//! let g = Graph::new("mlp");
//! let x = g.arg("x", DType::F32, &[2, 8]);
//! let w = g.arg("w", DType::F32, &[8, 3]);
//! let y = einsum("BM,MF->BF", &x, &w).named("hidden").silu();
//! g.output("y", &(y * 0.5));
//! let module = g.finish()?;
//! assert!(module.stablehlo().contains("stablehlo.dot_general"));
//! # Ok::<(), xla::graph::GraphError>(())
//! ```
//!
//! Files: `graph` (building), `tensor` (handles and operators), `ops/` (each op declared once), `einsum`, `sharding`
//! (meshes and rules), `kernel` (ops that may have one), `grad` (derivatives), `module` (the finished data), `emit` (its text).

mod aval;
mod einsum;
mod emit;
mod error;
mod grad;
#[allow(clippy::module_inception)]
mod graph;
mod kernel;
mod module;
pub mod ops;
mod sharding;
mod tensor;
#[cfg(test)]
mod testing;

pub use aval::Aval;
pub use einsum::{einsum, einsum_as, einsum1};
pub use emit::{Cx, Emission};
pub use error::GraphError;
pub use grad::{Cotangents, Save, Vjp};
pub use graph::{ArgAttrs, Graph, Platform, Rewrite, Scope};
pub use kernel::Kernel;
pub use module::{Arg, Body, Function, Module, Node, Output, Value, ValueId};
pub use ops::Gradient;
pub use ops::constant::{Element, Scalar};
pub use ops::control::Branch;
pub use ops::custom_call::{Attr, CustomCall};
pub use ops::dot::{MATMUL, Precision};
pub use ops::random::Algorithm;
pub use ops::reduce::Fold;
pub use sharding::{Mesh, Rules, Sharding, ShardingError};
pub use tensor::{Operand, Tensor};
