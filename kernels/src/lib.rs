//! Numeric kernels over slices: products with float and packed weights, attention, norms. Knows no graph, no PJRT and no files.
//!
//! Every kernel is one source, generic over [`simd::Simd`], and runs on any [`Isa`] of the machine; what it computes
//! does not depend on how many threads the [`Pool`] has, but for the last digits of attention, which is cut into blocks by it.

#[macro_use]
mod isa;
pub mod attention;
pub mod experts;
mod gate;
pub mod linear;
pub mod matmul;
mod norm;
pub mod packed;
mod pool;
pub mod rope;
mod sample;
mod scratch;
pub mod simd;

pub use gate::{Activation, gate, gate_gradient};
pub use isa::Isa;
pub use linear::{Linear, Order, Values, Weight, gated, linear, take_rows};
pub use matmul::matmul;
pub use norm::rms_norm;
pub use packed::Packed;
pub use pool::{Pool, Serial, Threads};
pub use sample::argmax;
