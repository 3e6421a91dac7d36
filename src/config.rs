//! The model's configuration, as `config.json` has it.

pub use converter::config::{
    Activation, AttentionConfig, ExpertGroups, LayerConfig, LoraConfig, LoraProjection, ModelConfig, MoeConfig, QkNorm,
    Rope, RopeKind, Router, SharedExpert,
};
