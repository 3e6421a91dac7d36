//! The model as the paper has it: one file per block, einsum strings with the letters of the design.
//!
//! B batch, S query positions, T key positions, V vocabulary, M d_model, H query heads, G key/value heads,
//! R = H/G query heads per key/value head, K head_dim, F d_ff, L layers.

mod attention;
mod linear;
mod llama;
mod mlp;
mod rms_norm;
mod rope;

pub use attention::{Mask, attention};
pub use llama::{decoder_block, forward, lm_head};
pub use mlp::mlp;
pub use rms_norm::rms_norm;
pub use rope::{Rope, rope};
