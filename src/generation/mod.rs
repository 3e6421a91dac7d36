//! Text from a model: options, the sampler in the graph, and the loop that streams.

mod generate;
pub mod options;
pub mod sampling;

pub use generate::{FinishReason, GenerateOptions, Generation, Timing, generate};
pub use options::SamplingOptions;
