//! StableHLO graphs as plain data ([`graph`]), and the PJRT C API ([`pjrt`]). Knows no model.
//!
//! The two halves do not know each other: a graph becomes text, and `pjrt` compiles text.

pub mod dtype;
pub mod graph;
pub mod hlo;
pub mod pjrt;
pub mod wheel;

pub use dtype::DType;
