//! Llama-family checkpoints as per-head host arrays.
//!
//! [`Checkpoint::open`] reads the headers of a Hugging Face folder, a folder written by [`convert`], or a GGUF file, and
//! checks every tensor against the tree of parameters that its configuration declares ([`layout`]). Tensors are then
//! read one by one in per-head form, used in place, or streamed to another folder ([`convert`], [`export_hf`]); trained
//! values go to one by [`save`]. Matrices
//! may be stored as integers with scales ([`Packing`]); they are read as floats like all others, or as they are stored.
//! This crate knows no PJRT and no graph.

mod array;
mod checkpoint;
pub mod config;
mod convert;
mod dtype;
mod error;
mod extend;
pub mod gguf;
pub mod layout;
mod packing;
mod pool;
mod quantize;
mod save;
mod shard;
mod staging;
pub mod tokenizer;
mod writer;

pub use array::{HostArray, HostBytes};
pub use checkpoint::{ArrayBytes, Checkpoint, Kind, PackedArrays, Progress};
pub use config::{Activation, ModelConfig, Rope, RopeKind};
pub use convert::{ConvertOptions, Report, convert, export_hf};
pub use dtype::DType;
pub use error::{Error, Result};
pub use extend::{AddedToken, AddedTokens, Extension};
pub use layout::{Attention, Contraction, DecoderBlock, Layout, Llama, Mlp, Param};
pub use packing::{Packing, Precision, ScaleType};
pub use save::save;
pub use shard::FileBytes;
