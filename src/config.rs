//! The model's configuration, as `config.json` has it.

pub use converter::config::{Activation, ModelConfig, Rope, RopeKind};
