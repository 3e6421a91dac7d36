//! The integration tests of the workspace, as one binary; each module says what it pins.

mod architecture;
mod attention;
mod bad_input;
mod cache;
mod cli;
mod conversion;
mod generation;
mod golden;
mod moe;
mod perplexity;
mod search;
mod support;
