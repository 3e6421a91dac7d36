//! The members of the family: a table entry each. What a member adds to Llama is said here and nowhere else.
//!
//! # Adding a member
//!
//! 1. Write an entry of [`FAMILIES`]: the `model_type`, the names in `architectures`, how its tensors are called
//!    ([`Names`], usually `..LLAMA`), what its configuration class assumes where `config.json` is silent
//!    ([`Defaults`]), and a function that reads its own keys into [`Blocks`], the choice of blocks.
//! 2. If it has a block that no member has yet, add that block to `src/model/`, its parameters as optional leaves to
//!    [`Llama`](crate::layout::Llama), and the choice to [`Blocks`]. The decoder itself is shared: it applies what the tree has.
//! 3. Add two small random checkpoints to `scripts/make_golden.py` and run it; `xllama golden check` must pass.
//!
//! Every key that the function does not read is refused unless it is known to change nothing, so a key cannot be
//! forgotten silently. `olmo2` below is a member whose norms stand elsewhere, in under twenty lines.

use serde_json::Value;

use super::moe::{self, MoeConfig};
use super::rope::RopeDefaults;
use super::{Keys, LayerConfig};
use crate::error::Result;

/// A member of the family: what `model_type` selects.
pub(super) struct Family {
    pub(super) model_type: &'static str,
    /// Values of `architectures` that are this model with its language head.
    pub(super) architectures: &'static [&'static str],
    pub(super) names: Names,
    pub(super) defaults: Defaults,
    /// Reads the keys that only some members have.
    pub(super) read: fn(&mut Keys<'_>, &Sizes) -> Result<Blocks>,
}

/// How Hugging Face calls what differs between members; inside of `model.layers.N.`, a `.weight` follows. A norm without name is
/// not there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Names {
    /// Before attention.
    pub(crate) input_norm: Option<&'static str>,
    /// On what attention gives, before it is added.
    pub(crate) attn_out_norm: Option<&'static str>,
    /// Before the feed-forward.
    pub(crate) post_attn_norm: Option<&'static str>,
    /// On what the feed-forward gives, before it is added.
    pub(crate) mlp_out_norm: Option<&'static str>,
    /// Whether q, k and v lie in one tensor `qkv_proj`, and gate and up in `gate_up_proj`.
    pub(crate) fused: bool,
    /// The mixture of experts.
    pub(crate) moe: &'static str,
    /// Gate, up and down projection of `experts.E`.
    pub(crate) expert: [&'static str; 3],
    /// The expert that every token takes.
    pub(crate) shared_expert: &'static str,
}

const LLAMA: Names = Names {
    input_norm: Some("input_layernorm"),
    attn_out_norm: None,
    post_attn_norm: Some("post_attention_layernorm"),
    mlp_out_norm: None,
    fused: false,
    moe: "mlp",
    expert: ["gate_proj", "up_proj", "down_proj"],
    shared_expert: "shared_expert",
};

const GEMMA: Names = Names {
    attn_out_norm: Some("post_attention_layernorm"),
    post_attn_norm: Some("pre_feedforward_layernorm"),
    mlp_out_norm: Some("post_feedforward_layernorm"),
    ..LLAMA
};

/// What transformers' configuration class assumes where a key is absent.
pub(super) struct Defaults {
    pub(super) n_kv_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
    pub(super) rope: RopeDefaults,
    pub(super) tie_word_embeddings: bool,
    /// Beginning, end and padding of a text.
    pub(super) token_ids: [Option<u32>; 3],
    /// The key that names the function on the gate.
    pub(super) activation_key: &'static str,
}

const DEFAULTS: Defaults = Defaults {
    n_kv_heads: None,
    head_dim: None,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    rope: RopeDefaults { theta: 10_000.0, partial: 1.0, local_theta: None },
    tie_word_embeddings: false,
    token_ids: [Some(1), Some(2), None],
    activation_key: "hidden_act",
};

const QWEN: Defaults = Defaults { max_position_embeddings: 32_768, token_ids: [None; 3], ..DEFAULTS };

const MISTRAL: Defaults = Defaults { n_kv_heads: Some(8), max_position_embeddings: 131_072, ..DEFAULTS };

const GEMMA_DEFAULTS: Defaults = Defaults {
    n_kv_heads: Some(4),
    head_dim: Some(256),
    max_position_embeddings: 8192,
    tie_word_embeddings: true,
    token_ids: [Some(2), Some(1), Some(0)],
    activation_key: "hidden_activation",
    ..DEFAULTS
};

/// Sizes that the readers need.
pub(super) struct Sizes {
    pub(super) n_layers: usize,
    pub(super) d_ff: usize,
}

/// Which blocks a model is made of. The default is Llama without biases.
#[derive(Default)]
pub(super) struct Blocks {
    pub(super) qkv_bias: bool,
    pub(super) out_bias: bool,
    pub(super) mlp_bias: bool,
    pub(super) qk_norm: Option<QkNorm>,
    /// Divides q·k as its square root; head_dim if `None`.
    pub(super) query_scalar: Option<f64>,
    pub(super) attention_softcap: Option<f64>,
    pub(super) logit_softcap: Option<f64>,
    /// Whether norms multiply with 1 + weight and the embedding with √d_model.
    pub(super) gemma: bool,
    /// One per layer; empty for full attention everywhere.
    pub(super) windows: Vec<Option<usize>>,
    /// One per layer, whether positions rotate; empty for all.
    pub(super) rotated: Vec<bool>,
    pub(super) moe: Option<MoeConfig>,
    /// One per layer, whether it has the mixture; empty for all, if there is a mixture.
    pub(super) sparse: Vec<bool>,
}

impl Blocks {
    /// What each layer is made of.
    pub(super) fn layers(&self, n_layers: usize, has_sliding_rope: bool) -> Vec<LayerConfig> {
        let layer = |i: usize| {
            let window = self.windows.get(i).copied().flatten();
            let rope = usize::from(has_sliding_rope && window.is_some());
            LayerConfig {
                window,
                rope: self.rotated.get(i).copied().unwrap_or(true).then_some(rope),
                sparse: self.moe.is_some() && self.sparse.get(i).copied().unwrap_or(true),
            }
        };
        (0..n_layers).map(layer).collect()
    }
}

/// RMSNorm of queries and keys before they rotate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QkNorm {
    /// Over each head, weights (K) shared by the heads.
    PerHead,
    /// Over all heads together, weights (H, K) and (G, K).
    Whole,
}

/// The members, in the order in which messages list them.
pub(super) const FAMILIES: &[Family] = &[
    Family {
        model_type: "llama",
        architectures: &["LlamaForCausalLM", "LLaMAForCausalLM", "LlamaForCausalLm"],
        names: LLAMA,
        defaults: DEFAULTS,
        read: |keys, _| {
            let bias = keys.flag("attention_bias")?;
            Ok(Blocks { qkv_bias: bias, out_bias: bias, mlp_bias: keys.flag("mlp_bias")?, ..Blocks::default() })
        },
    },
    Family {
        model_type: "mistral",
        architectures: &["MistralForCausalLM"],
        names: LLAMA,
        defaults: MISTRAL,
        read: |keys, sizes| Ok(Blocks { windows: keys.window_everywhere(Some(4096), sizes)?, ..Blocks::default() }),
    },
    Family {
        model_type: "mixtral",
        architectures: &["MixtralForCausalLM"],
        names: Names { moe: "block_sparse_moe", expert: ["w1", "w3", "w2"], ..LLAMA },
        defaults: Defaults { rms_norm_eps: 1e-5, rope: RopeDefaults { theta: 1e6, ..DEFAULTS.rope }, ..MISTRAL },
        read: |keys, sizes| {
            let windows = keys.window_everywhere(None, sizes)?;
            Ok(Blocks { windows, moe: Some(moe::mixtral(keys, sizes)?), ..Blocks::default() })
        },
    },
    Family {
        model_type: "qwen2",
        architectures: &["Qwen2ForCausalLM"],
        names: LLAMA,
        defaults: QWEN,
        read: |keys, sizes| {
            let windows = keys.window_from_layer(sizes)?;
            Ok(Blocks { qkv_bias: true, windows, ..Blocks::default() })
        },
    },
    Family {
        model_type: "qwen3",
        architectures: &["Qwen3ForCausalLM"],
        names: LLAMA,
        defaults: Defaults { head_dim: Some(128), ..QWEN },
        read: |keys, sizes| {
            let bias = keys.flag("attention_bias")?;
            let windows = keys.window_from_layer(sizes)?;
            let qk_norm = Some(QkNorm::PerHead);
            Ok(Blocks { qkv_bias: bias, out_bias: bias, qk_norm, windows, ..Blocks::default() })
        },
    },
    Family {
        model_type: "qwen2_moe",
        architectures: &["Qwen2MoeForCausalLM"],
        names: LLAMA,
        defaults: QWEN,
        read: |keys, sizes| {
            Ok(Blocks {
                qkv_bias: keys.optional_flag("qkv_bias")?.unwrap_or(true),
                windows: keys.window_every_other(sizes)?,
                sparse: moe::sparse_steps(keys, sizes)?,
                moe: Some(moe::qwen(keys, true)?),
                ..Blocks::default()
            })
        },
    },
    Family {
        model_type: "qwen3_moe",
        architectures: &["Qwen3MoeForCausalLM"],
        names: LLAMA,
        defaults: Defaults { n_kv_heads: Some(4), ..QWEN },
        read: |keys, sizes| {
            let bias = keys.flag("attention_bias")?;
            if keys.optional_flag("use_qk_norm")? == Some(false) {
                return Err(
                    keys.error("use_qk_norm", "false is not supported with model_type qwen3_moe; expected true")
                );
            }
            let windows = match keys.flag("use_sliding_window")? {
                true => keys.window_everywhere(Some(4096), sizes)?,
                false => keys.no_windows(),
            };
            Ok(Blocks {
                qkv_bias: bias,
                out_bias: bias,
                qk_norm: Some(QkNorm::PerHead),
                windows,
                sparse: moe::sparse_steps(keys, sizes)?,
                moe: Some(moe::qwen(keys, false)?),
                ..Blocks::default()
            })
        },
    },
    Family {
        model_type: "glm4_moe",
        architectures: &["Glm4MoeForCausalLM"],
        names: Names { shared_expert: "shared_experts", ..LLAMA },
        defaults: Defaults {
            n_kv_heads: Some(8),
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-5,
            rope: RopeDefaults { partial: 0.5, ..DEFAULTS.rope },
            ..QWEN
        },
        read: |keys, sizes| {
            let dense = keys.optional_count("first_k_dense_replace")?.unwrap_or(1);
            Ok(Blocks {
                qkv_bias: keys.flag("attention_bias")?,
                qk_norm: keys.flag("use_qk_norm")?.then_some(QkNorm::PerHead),
                sparse: (0..sizes.n_layers).map(|i| i >= dense).collect(),
                moe: Some(moe::glm4(keys)?),
                ..Blocks::default()
            })
        },
    },
    Family {
        model_type: "phi3",
        architectures: &["Phi3ForCausalLM"],
        names: Names { fused: true, ..LLAMA },
        defaults: Defaults {
            max_position_embeddings: 4096,
            rms_norm_eps: 1e-5,
            token_ids: [Some(1), Some(32_000), Some(32_000)],
            ..DEFAULTS
        },
        read: |keys, sizes| Ok(Blocks { windows: keys.window_everywhere(None, sizes)?, ..Blocks::default() }),
    },
    Family {
        model_type: "gemma2",
        architectures: &["Gemma2ForCausalLM"],
        names: GEMMA,
        defaults: GEMMA_DEFAULTS,
        read: |keys, sizes| {
            Ok(Blocks {
                windows: keys.window_by_layer_type(Some(4096), sizes, |i| i % 2 == 0)?,
                ..gemma(keys, [Some(50.0), Some(30.0)])?
            })
        },
    },
    Family {
        model_type: "gemma3_text",
        architectures: &["Gemma3ForCausalLM"],
        names: GEMMA,
        defaults: Defaults {
            max_position_embeddings: 131_072,
            rope: RopeDefaults { theta: 1e6, partial: 1.0, local_theta: Some(10_000.0) },
            ..GEMMA_DEFAULTS
        },
        read: |keys, sizes| {
            let pattern = keys.optional_size("sliding_window_pattern")?.unwrap_or(6);
            Ok(Blocks {
                qk_norm: Some(QkNorm::PerHead),
                windows: keys.window_by_layer_type(Some(4096), sizes, |i| (i + 1) % pattern != 0)?,
                // transformers reads the key and does not hand it to attention
                attention_softcap: None,
                ..gemma(keys, [None, None])?
            })
        },
    },
    Family {
        model_type: "smollm3",
        architectures: &["SmolLM3ForCausalLM"],
        names: LLAMA,
        defaults: Defaults {
            n_kv_heads: Some(4),
            max_position_embeddings: 32_768,
            rope: RopeDefaults { theta: 2e6, ..DEFAULTS.rope },
            tie_word_embeddings: true,
            token_ids: [Some(128_000), Some(128_001), Some(128_004)],
            ..DEFAULTS
        },
        read: |keys, sizes| {
            let bias = keys.flag("attention_bias")?;
            let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
            let rotated = match keys.list("no_rope_layers", sizes.n_layers, Value::as_u64)? {
                Some(ones) => ones.into_iter().map(|one| one != 0).collect(),
                None => (1..=sizes.n_layers).map(|i| !i.is_multiple_of(interval)).collect::<Vec<bool>>(),
            };
            let windows = match keys.flag("use_sliding_window")? {
                true => keys.window_by_layer_type(None, sizes, |i| !rotated[i])?,
                false => keys.no_windows(),
            };
            let mlp_bias = keys.flag("mlp_bias")?;
            Ok(Blocks { qkv_bias: bias, out_bias: bias, mlp_bias, rotated, windows, ..Blocks::default() })
        },
    },
    Family {
        model_type: "olmo2",
        architectures: &["Olmo2ForCausalLM"],
        names: Names {
            input_norm: None,
            attn_out_norm: Some("post_attention_layernorm"),
            post_attn_norm: None,
            mlp_out_norm: Some("post_feedforward_layernorm"),
            ..LLAMA
        },
        defaults: Defaults { rms_norm_eps: 1e-5, token_ids: [None, Some(50_279), Some(1)], ..DEFAULTS },
        read: |keys, _| {
            let bias = keys.flag("attention_bias")?;
            Ok(Blocks { qkv_bias: bias, out_bias: bias, qk_norm: Some(QkNorm::Whole), ..Blocks::default() })
        },
    },
];

/// What both Gemmas share. `softcaps`: of attention and of the logits, where the file does not name them.
fn gemma(keys: &mut Keys<'_>, softcaps: [Option<f64>; 2]) -> Result<Blocks> {
    // transformers reads hidden_activation; files of version 4 carry hidden_act beside it.
    keys.get("hidden_act");
    let bias = keys.flag("attention_bias")?;
    Ok(Blocks {
        qkv_bias: bias,
        out_bias: bias,
        query_scalar: Some(keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0)),
        attention_softcap: keys.softcap("attn_logit_softcapping", softcaps[0])?,
        logit_softcap: keys.softcap("final_logit_softcapping", softcaps[1])?,
        gemma: true,
        ..Blocks::default()
    })
}

/// How the members say which layers see a window only. The window counts the position itself: query s sees
/// s − window + 1 … s.
impl Keys<'_> {
    /// `sliding_window`, for all layers. `default` is what an absent key means.
    fn window_everywhere(&mut self, default: Option<usize>, sizes: &Sizes) -> Result<Vec<Option<usize>>> {
        let window = self.window(default)?;
        // Version 5 refuses other layer types for these members, and version 4 ignored the key.
        let expected = if window.is_some() { SLIDING } else { FULL };
        if let Some(types) = self.layer_types(sizes.n_layers)?
            && let Some(other) = types.iter().find(|kind| **kind != expected)
        {
            let what = format!("\"{other}\" contradicts sliding_window, which makes every layer \"{expected}\"");
            return Err(self.error("layer_types", what));
        }
        Ok(vec![window; sizes.n_layers])
    }

    /// Qwen: windows from layer `max_window_layers` on, if `use_sliding_window`.
    fn window_from_layer(&mut self, sizes: &Sizes) -> Result<Vec<Option<usize>>> {
        let first = self.optional_count("max_window_layers")?.unwrap_or(28);
        match self.flag("use_sliding_window")? {
            true => self.window_by_layer_type(Some(4096), sizes, |i| i >= first),
            false => Ok(self.no_windows()),
        }
    }

    /// qwen2_moe: windows on every other layer before `max_window_layers`, if `use_sliding_window`.
    fn window_every_other(&mut self, sizes: &Sizes) -> Result<Vec<Option<usize>>> {
        let end = self.optional_count("max_window_layers")?.unwrap_or(28);
        match self.flag("use_sliding_window")? {
            true => self.window_by_layer_type(Some(4096), sizes, |i| i.is_multiple_of(2) && i < end),
            false => Ok(self.no_windows()),
        }
    }

    /// `sliding_window` (`default` if it is absent) for the layers that `layer_types` names or, without that, `slides` picks.
    fn window_by_layer_type(
        &mut self,
        default: Option<usize>,
        sizes: &Sizes,
        slides: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>> {
        let window = self.window(default)?;
        let slides: Vec<bool> = match self.layer_types(sizes.n_layers)? {
            Some(types) => types.iter().map(|kind| *kind == SLIDING).collect(),
            None => (0..sizes.n_layers).map(|i| window.is_some() && slides(i)).collect(),
        };
        if window.is_none() && slides.contains(&true) {
            return Err(self.error("sliding_window", format!("required, since layer_types names \"{SLIDING}\"")));
        }
        Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect())
    }

    /// Full attention everywhere, whatever `sliding_window` says. `layer_types` is checked with the keys that are left.
    fn no_windows(&mut self) -> Vec<Option<usize>> {
        self.get("sliding_window");
        Vec::new()
    }

    fn window(&mut self, default: Option<usize>) -> Result<Option<usize>> {
        match self.object.contains_key("sliding_window") {
            true => self.optional_size("sliding_window"),
            false => Ok(default),
        }
    }

    /// `layer_types`, one known name per layer.
    fn layer_types(&mut self, n_layers: usize) -> Result<Option<Vec<&'static str>>> {
        self.list("layer_types", n_layers, |value| [FULL, SLIDING].into_iter().find(|name| value == name))
    }

    fn softcap(&mut self, key: &'static str, default: Option<f64>) -> Result<Option<f64>> {
        match self.object.contains_key(key) {
            true => self.positive(key),
            false => Ok(default),
        }
    }
}

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";
