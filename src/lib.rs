//! The Llama family, compiled: a checkpoint becomes per-head parameters, the forward becomes one StableHLO graph, and
//! the graph runs through PJRT on CPU, GPU and TPU.
//!
//! Data flows one way: file → [`converter`] → [`params`] → graph ([`model`]) → executable ([`runtime`]) → tokens
//! ([`generation`]) → text ([`text`]).

pub mod bytes;
pub mod compile;
pub mod config;
pub mod distributed;
mod error;
pub mod generation;
pub mod golden;
pub mod kv_cache;
pub mod model;
pub mod models;
pub mod params;
pub mod perplexity;
pub mod precision;
pub mod runtime;
pub mod sharding;
pub mod text;
pub mod training;

pub use error::Error;
