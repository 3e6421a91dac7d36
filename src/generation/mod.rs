//! Text from a model: options, the sampler in the graph, the loop that streams, and searches on the host.

mod beams;
mod contrastive;
mod generate;
pub mod options;
pub mod sampling;
mod writer;

pub use beams::{Beam, BeamOptions, BeamSearch, beam_search};
pub use contrastive::contrastive_search;
pub use generate::{FinishReason, GenerateOptions, Generation, Timing, generate, samples};
pub use options::SamplingOptions;
