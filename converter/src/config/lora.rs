//! Low-rank adapters: which projections have one, and of what size.

use serde::{Deserialize, Serialize};

/// The adapters of a model, in the words of peft's `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// The rank of a·b (J), at least 1.
    #[serde(rename = "r")]
    pub rank: usize,
    /// What a·b is multiplied with, times the rank.
    #[serde(rename = "lora_alpha")]
    pub alpha: f64,
    /// The part of an adapter's input that training drops, from 0 to below 1.
    #[serde(rename = "lora_dropout", default)]
    pub dropout: f64,
    /// Which projections have one.
    #[serde(rename = "target_modules")]
    pub projections: Vec<LoraProjection>,
}

/// A projection that can have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LoraProjection {
    /// Queries.
    #[serde(rename = "q_proj")]
    Q,
    /// Keys.
    #[serde(rename = "k_proj")]
    K,
    /// Values.
    #[serde(rename = "v_proj")]
    V,
    /// What attention gives.
    #[serde(rename = "o_proj")]
    Out,
    /// The gate of the feed-forward.
    #[serde(rename = "gate_proj")]
    Gate,
    /// What the gate multiplies.
    #[serde(rename = "up_proj")]
    Up,
    /// What the feed-forward gives.
    #[serde(rename = "down_proj")]
    Down,
}

impl LoraConfig {
    /// α / r: what a·b is multiplied with.
    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// What is wrong with its numbers, in words.
    ///
    /// # Errors
    /// The first of them that is outside its range, or no projection at all.
    pub fn check(&self) -> Result<(), String> {
        match self {
            LoraConfig { rank: 0, .. } => Err("rank must be at least 1, found 0".into()),
            LoraConfig { alpha, .. } if !alpha.is_finite() => Err(format!("alpha must be finite, found {alpha}")),
            LoraConfig { dropout, .. } if !(0.0..1.0).contains(dropout) => {
                Err(format!("dropout must be at least 0 and below 1, found {dropout}"))
            }
            LoraConfig { projections, .. } if projections.is_empty() => {
                let all: Vec<&str> = LoraProjection::ALL.iter().map(|p| p.name()).collect();
                Err(format!("projections must name at least one of {}", all.join(", ")))
            }
            _ => Ok(()),
        }
    }
}

impl LoraProjection {
    /// All of them.
    pub const ALL: [LoraProjection; 7] = {
        use LoraProjection::*;
        [Q, K, V, Out, Gate, Up, Down]
    };

    /// The projection's name in a Hugging Face checkpoint.
    pub fn name(self) -> &'static str {
        match self {
            LoraProjection::Q => "q_proj",
            LoraProjection::K => "k_proj",
            LoraProjection::V => "v_proj",
            LoraProjection::Out => "o_proj",
            LoraProjection::Gate => "gate_proj",
            LoraProjection::Up => "up_proj",
            LoraProjection::Down => "down_proj",
        }
    }

    /// The name that begins the field of its adapter.
    pub(crate) fn here(self) -> &'static str {
        match self {
            LoraProjection::Out => "out",
            other => other.name().trim_end_matches("_proj"),
        }
    }
}
