//! Compiling for hardware that is not there: published models by name, targets, and what the compiler says of them.
//!
//! [`Target`] → [`Machine`] (the devices as a plugin describes them); [`Job`] (model, step, mesh) → text; both →
//! [`Report`], and an [`ExecutableFile`] that can be loaded where the devices are.

pub mod chips;
mod file;
mod job;
pub mod memory;
pub mod presets;
mod report;
mod sweep;
mod target;

pub use file::{ExecutableFile, Identity, program_hash};
pub use job::{Job, Keep, Prepared, Sizes, Step, cut, mesh_for, meshes};
pub use report::{Figures, Memory, Report, compile};
pub use sweep::{Row, sweep};
pub use target::{Compiled, Machine, Target};
