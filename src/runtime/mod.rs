//! From a checkpoint and a device to steps of the model: programs, executables, sequences.

pub mod device;
mod draws;
mod engine;
pub mod exec_cache;
mod gradients;
mod handlers;
mod placement;
mod program;
mod regroup;
mod session;
mod train_step;
mod trainer;
mod upload;

pub use draws::{Drawn, TokenRead};
pub use engine::{CacheOptions, CompileStats, Engine, LoadOptions, Program};
pub use exec_cache::hex;
pub use gradients::{GradientSpec, build_gradients, trains};
pub use handlers::{KernelCall, kernel_calls, register as register_kernels};
pub use placement::{Array, ArrayLayout, Placement};
pub use program::{Blueprint, Output, StepSpec, build, compile_options};
pub use session::{Best, CHUNKS, Session, cache_len, chunked_logits};
pub use train_step::{TrainSpec, build_train, decays};
pub use trainer::{Metrics, Trainer};
