//! The integration tests of the workspace, as one binary; each module says what it pins.

mod architecture;
mod attention;
mod bad_input;
mod cache;
mod cli;
mod compile;
mod conversion;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod distributed;
mod exec_cache;
mod forms;
mod generation;
mod golden;
mod kernels;
mod mesh;
mod moe;
mod optimizers;
mod packed;
mod perplexity;
mod search;
mod support;
mod train_step;
mod training;
