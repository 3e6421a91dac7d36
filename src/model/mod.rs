//! The model as the paper has it: one file per block, einsum strings with the letters of the design.
//!
//! B batch, S query positions, T key positions, V vocabulary, M d_model, H query heads, G key/value heads,
//! R = H/G query heads per key/value head, K head_dim, F d_ff, E experts, J rank of an adapter, L layers.

mod attention;
mod cache_pieces;
mod linear;
mod llama;
mod lora;
mod loss;
mod mlp;
mod moe;
mod pieces;
mod rms_norm;
mod rope;
mod router_loss;
mod rows;
mod scores;

pub use attention::{ATTENTION_STEP, LayerInput, attention};
pub use linear::LINEAR;
pub use llama::{Block, Decoded, TAKE_ROWS, decoder_block, final_norm, forward, lm_head};
pub use loss::{IGNORED, Loss, LossOptions, Targets};
pub use mlp::{GATE, GATE_GRADIENT, GATED, mlp};
pub use moe::{EXPERTS, moe};
pub use rms_norm::{RMS_NORM, rms_norm};
pub use rope::{Rope, frequencies, ropes};
pub use router_loss::{load_balancing_loss, router_z_loss};
pub use scores::{ATTEND, ATTEND_GRADIENT, Queries};
