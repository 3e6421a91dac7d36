//! The model as the paper has it: one file per block, einsum strings with the letters of the design.
//!
//! B batch, S query positions, T key positions, V vocabulary, M d_model, H query heads, G key/value heads,
//! R = H/G query heads per key/value head, K head_dim, F d_ff, E experts, L layers.

mod attention;
mod linear;
mod llama;
mod mlp;
mod moe;
mod rms_norm;
mod rope;
mod router_loss;
mod rows;
mod scores;

pub use attention::{LayerInput, attention};
pub use llama::{decoder_block, forward, lm_head};
pub use mlp::mlp;
pub use moe::moe;
pub use rms_norm::rms_norm;
pub use rope::{Rope, frequencies, ropes};
pub use router_loss::{load_balancing_loss, router_z_loss};
pub use scores::Queries;
