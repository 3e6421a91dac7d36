//! Published models by name, so that compiling needs no file: one row each, which becomes the `config.json` that its
//! authors publish and is read as any other.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::Error;
use crate::config::ModelConfig;

/// A published model. Letters in brackets are the axis letters.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// What `--model` calls it.
    pub name: &'static str,
    /// `model_type` of its `config.json`.
    pub model_type: &'static str,
    /// V, M, F, L, H, G.
    sizes: [usize; 6],
    /// `max_position_embeddings`.
    context: usize,
    /// `rope_theta`.
    theta: f64,
    /// `rms_norm_eps`.
    eps: f64,
    /// The other keys, as a JSON object.
    more: &'static str,
}

const LLAMA3_8X: &str = r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
const LLAMA3_2_1B: &str = r#"{"head_dim": 64, "tie_word_embeddings": true, "rope_scaling": {"rope_type": "llama3",
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
const LLAMA3_2_3B: &str = r#"{"head_dim": 128, "tie_word_embeddings": true, "rope_scaling": {"rope_type": "llama3",
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}"#;
const MISTRAL: &str = r#"{"sliding_window": 4096}"#;
const MIXTRAL: &str = r#"{"sliding_window": null, "num_local_experts": 8, "num_experts_per_tok": 2}"#;
const QWEN3: &str = r#"{"head_dim": 128, "attention_bias": false, "use_sliding_window": false}"#;
const QWEN3_TIED: &str =
    r#"{"head_dim": 128, "attention_bias": false, "use_sliding_window": false, "tie_word_embeddings": true}"#;
const QWEN3_MOE: &str = r#"{"head_dim": 128, "attention_bias": false, "use_sliding_window": false, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": true, "decoder_sparse_step": 1,
    "mlp_only_layers": []}"#;

/// Every preset, family by family. `mistral-7b` is version 0.1, whose layers see 4,096 positions; `llama-3.1-405b` is the
/// one with 8 key/value heads that is published today (the first files had 16, each twice).
#[rustfmt::skip]
pub const PRESETS: &[Preset] = &[
    //       name              model_type   V        M      F      L    H    G    context  theta      eps   more
    preset("llama-7b",        "llama",     [32_000,  4096,  11_008, 32,  32,  32], 2048,    10_000.0,  1e-6, "{}"),
    preset("llama-13b",       "llama",     [32_000,  5120,  13_824, 40,  40,  40], 2048,    10_000.0,  1e-6, "{}"),
    preset("llama-33b",       "llama",     [32_000,  6656,  17_920, 60,  52,  52], 2048,    10_000.0,  1e-6, "{}"),
    preset("llama-65b",       "llama",     [32_000,  8192,  22_016, 80,  64,  64], 2048,    10_000.0,  1e-5, "{}"),
    preset("llama-2-7b",      "llama",     [32_000,  4096,  11_008, 32,  32,  32], 4096,    10_000.0,  1e-5, "{}"),
    preset("llama-2-13b",     "llama",     [32_000,  5120,  13_824, 40,  40,  40], 4096,    10_000.0,  1e-5, "{}"),
    preset("llama-2-70b",     "llama",     [32_000,  8192,  28_672, 80,  64,  8],  4096,    10_000.0,  1e-5, "{}"),
    preset("llama-3-8b",      "llama",     [128_256, 4096,  14_336, 32,  32,  8],  8192,    500_000.0, 1e-5, "{}"),
    preset("llama-3-70b",     "llama",     [128_256, 8192,  28_672, 80,  64,  8],  8192,    500_000.0, 1e-5, "{}"),
    preset("llama-3.1-8b",    "llama",     [128_256, 4096,  14_336, 32,  32,  8],  131_072, 500_000.0, 1e-5, LLAMA3_8X),
    preset("llama-3.1-70b",   "llama",     [128_256, 8192,  28_672, 80,  64,  8],  131_072, 500_000.0, 1e-5, LLAMA3_8X),
    preset("llama-3.1-405b",  "llama",     [128_256, 16384, 53_248, 126, 128, 8],  131_072, 500_000.0, 1e-5, LLAMA3_8X),
    preset("llama-3.2-1b",    "llama",     [128_256, 2048,  8192,   16,  32,  8],  131_072, 500_000.0, 1e-5, LLAMA3_2_1B),
    preset("llama-3.2-3b",    "llama",     [128_256, 3072,  8192,   28,  24,  8],  131_072, 500_000.0, 1e-5, LLAMA3_2_3B),
    preset("llama-3.3-70b",   "llama",     [128_256, 8192,  28_672, 80,  64,  8],  131_072, 500_000.0, 1e-5, LLAMA3_8X),
    preset("mistral-7b",      "mistral",   [32_000,  4096,  14_336, 32,  32,  8],  32_768,  10_000.0,  1e-5, MISTRAL),
    preset("mixtral-8x7b",    "mixtral",   [32_000,  4096,  14_336, 32,  32,  8],  32_768,  1e6,       1e-5, MIXTRAL),
    preset("qwen3-0.6b",      "qwen3",     [151_936, 1024,  3072,   28,  16,  8],  40_960,  1e6,       1e-6, QWEN3_TIED),
    preset("qwen3-1.7b",      "qwen3",     [151_936, 2048,  6144,   28,  16,  8],  40_960,  1e6,       1e-6, QWEN3_TIED),
    preset("qwen3-4b",        "qwen3",     [151_936, 2560,  9728,   36,  32,  8],  40_960,  1e6,       1e-6, QWEN3_TIED),
    preset("qwen3-8b",        "qwen3",     [151_936, 4096,  12_288, 36,  32,  8],  40_960,  1e6,       1e-6, QWEN3),
    preset("qwen3-14b",       "qwen3",     [151_936, 5120,  17_408, 40,  40,  8],  40_960,  1e6,       1e-6, QWEN3),
    preset("qwen3-32b",       "qwen3",     [151_936, 5120,  25_600, 64,  64,  8],  40_960,  1e6,       1e-6, QWEN3),
    preset("qwen3-30b-a3b",   "qwen3_moe", [151_936, 2048,  6144,   48,  32,  4],  40_960,  1e6,       1e-6, QWEN3_MOE),
];

/// One row.
const fn preset(
    name: &'static str,
    model_type: &'static str,
    sizes: [usize; 6],
    context: usize,
    theta: f64,
    eps: f64,
    more: &'static str,
) -> Preset {
    Preset { name, model_type, sizes, context, theta, eps, more }
}

/// The preset called `name`.
pub fn find(name: &str) -> Option<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name)
}

/// The names, for messages: `llama-7b, llama-13b, …`.
pub fn names() -> String {
    PRESETS.iter().map(|preset| preset.name).collect::<Vec<_>>().join(", ")
}

impl Preset {
    /// Its `config.json`. Where that names a type it says bf16, as there are no weights whose type it could be.
    pub fn json(&self) -> Value {
        let [vocab, hidden, ffn, layers, heads, kv_heads] = self.sizes;
        let mut config = json!({
            "model_type": self.model_type,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": self.context,
            "rope_theta": self.theta,
            "rms_norm_eps": self.eps,
            "hidden_act": "silu",
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
        });
        let more: Map<String, Value> = serde_json::from_str(self.more).unwrap_or_default();
        for (key, value) in more {
            config[key] = value;
        }
        config
    }

    /// The configuration.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the row is not a valid configuration.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        Ok(ModelConfig::from_value(&self.json(), Path::new(&format!("the preset {}", self.name)))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::Llama;

    /// What the authors' files hold, tensor by tensor.
    const PUBLISHED: [(&str, usize); 24] = [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.3-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
        ("qwen3-30b-a3b", 30_532_122_624),
    ];

    #[test]
    fn every_preset_has_as_many_parameters_as_are_published() {
        let counted = PRESETS.iter().map(|preset| {
            // The extra keys of a row must be an object: what does not parse would be left out silently.
            serde_json::from_str::<Map<String, Value>>(preset.more).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
            let cfg = preset.config().unwrap_or_else(|e| panic!("{}: {e}", preset.name));
            (preset.name, Llama::declare(&cfg).iter().iter().map(|p| p.elements()).sum::<usize>())
        });
        assert_eq!(counted.collect::<Vec<_>>(), PUBLISHED);
    }

    #[test]
    fn names_are_unlike_and_found() {
        let mut names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), PRESETS.len());
        assert!(find("llama-3.1-405b").is_some() && find("llama-4").is_none());
    }
}
