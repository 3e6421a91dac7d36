//! From a checkpoint and a device to steps of the model: programs, executables, sequences.

pub mod device;
mod draws;
mod engine;
mod exec_cache;
mod program;
mod session;

pub use draws::{Drawn, TokenRead};
pub use engine::{CacheOptions, CompileStats, Engine, Program, compile_options};
pub use exec_cache::hex;
pub use program::{Output, StepSpec, build};
pub use session::{Best, CHUNKS, Session, cache_len, chunked_logits};
