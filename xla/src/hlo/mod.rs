//! Reading what a compiler made of a program: loops, cycles, collectives, copies.
//!
//! [`Executable::optimized_program`](crate::pjrt::Executable::optimized_program) gives a serialized HLO module, the
//! program of one device after all passes. [`Module::parse`] reads it, whatever plugin made it:
//!
//! ```no_run
//! # fn show(exe: &xla::pjrt::Executable) -> Result<(), Box<dyn std::error::Error>> {
//! let program = exe.optimized_program()?;
//! let module = xla::hlo::Module::parse(&program.format, &program.bytes)?;
//! println!("reads {} bytes of parameters", module.parameter_bytes());
//! if let Some(cycles) = module.cycles() {
//!     println!("{} cycles by the TPU compiler's estimate", cycles.total);
//! }
//! for (kind, sum) in module.collective_sums() {
//!     println!("{} × {kind}: {} bytes", sum.count, sum.bytes);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Files: `module` (the program as data), `read` (from bytes, with `shape`, `literal` and `groups` for parts of an
//! instruction and `wire` for the protocol-buffer format), `trips` and `origin` (loops), `walk` (what runs how often),
//! `cost`, `collectives`, `copies` (what is read off it). The messages are those of XLA's `hlo.proto` and
//! `xla_data.proto`; what is not needed is skipped.

mod collectives;
mod copies;
mod cost;
mod error;
mod groups;
mod literal;
mod module;
mod origin;
mod read;
mod shape;
#[cfg(test)]
mod testing;
mod trips;
mod walk;
mod wire;

pub use collectives::{Collective, CollectiveKind, CollectiveSum};
pub use copies::DataCopy;
pub use cost::{Cost, Cycles};
pub use error::HloError;
pub use literal::Scalar;
pub use module::{Alias, Computation, Instruction, Module};
pub use shape::{ArrayShape, Element, Shape};
