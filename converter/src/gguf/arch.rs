//! The architectures of GGUF files: a table entry each, with what differs between them.
//!
//! The names are those of the `gguf` Python package; what is interleaved, stacked or stored with 1 added is what
//! llama.cpp's converter does to a Hugging Face checkpoint.

use super::config::{self, Family};

/// GGUF's name of a part of a block, and Hugging Face's. `{}` stands for the expert's number: such a tensor has all
/// experts, the number being its slowest axis. A name with a dot is that of one tensor, others have `.weight` or `.bias`.
pub(super) type Part = (&'static str, &'static str);

/// One architecture.
#[derive(Debug)]
pub(super) struct Architecture {
    /// `general.architecture`, with which the names of its metadata begin.
    pub(super) name: &'static str,
    /// `model_type` of Hugging Face's configuration, and the class that it is for.
    pub(super) model_type: &'static str,
    pub(super) class: &'static str,
    /// What a block is made of.
    pub(super) block: &'static [&'static [Part]],
    /// Whether the rows of each query and key head are interleaved.
    pub(super) interleaved: bool,
    /// Whether the weights of norms are stored with 1 added.
    pub(super) norms_plus_one: bool,
    /// Whether SentencePiece pieces merge in their order, whatever their scores, and runs of spaces are spelled as such.
    pub(super) ordered_pieces: bool,
    /// Metadata that is read for it beside [`config::COMMON`].
    pub(super) keys: &'static [&'static str],
    /// Whether only a part of each head may rotate.
    pub(super) partial_rotary: bool,
    /// Its own part of the configuration.
    pub(super) config: Family,
}

const ATTENTION: &[Part] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
];
const FUSED: &[Part] = &[
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
const QK_NORM: &[Part] = &[("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
const MLP: &[Part] = &[("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")];

const PRE_NORMS: &[Part] = &[("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];
const POST_NORMS: &[Part] =
    &[("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")];
const GEMMA_NORMS: &[Part] = &[("attn_norm", "input_layernorm"), ("ffn_norm", "pre_feedforward_layernorm")];
const GLM_NORMS: &[Part] = &[("attn_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")];

const MIXTRAL_EXPERTS: &[Part] = &[
    ("ffn_gate_inp", "block_sparse_moe.gate"),
    ("ffn_gate_exps", "block_sparse_moe.experts.{}.w1"),
    ("ffn_up_exps", "block_sparse_moe.experts.{}.w3"),
    ("ffn_down_exps", "block_sparse_moe.experts.{}.w2"),
];
const EXPERTS: &[Part] = &[
    ("ffn_gate_inp", "mlp.gate"),
    ("ffn_gate_exps", "mlp.experts.{}.gate_proj"),
    ("ffn_up_exps", "mlp.experts.{}.up_proj"),
    ("ffn_down_exps", "mlp.experts.{}.down_proj"),
];
const QWEN_SHARED_EXPERT: &[Part] = &[
    (SHARED_EXPERT_GATE, "mlp.shared_expert_gate"),
    ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
    ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
];
const GLM_SHARED_EXPERT: &[Part] = &[
    ("ffn_gate_shexp", "mlp.shared_experts.gate_proj"),
    ("ffn_up_shexp", "mlp.shared_experts.up_proj"),
    ("ffn_down_shexp", "mlp.shared_experts.down_proj"),
    ("exp_probs_b.bias", "mlp.gate.e_score_correction_bias"),
];

/// A matrix of one row, which GGUF keeps as a vector.
pub(super) const SHARED_EXPERT_GATE: &str = "ffn_gate_inp_shexp";

const EXPERT_KEYS: &[&str] = &["expert_count", "expert_used_count", "expert_gating_func", "expert_feed_forward_length"];

const LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    block: &[ATTENTION, PRE_NORMS, MLP, MIXTRAL_EXPERTS],
    interleaved: true,
    norms_plus_one: false,
    ordered_pieces: false,
    keys: &["expert_count", "expert_used_count", "expert_gating_func"],
    partial_rotary: false,
    config: config::llama,
};

/// What the others have in common: nothing about their tensors needs undoing.
const PLAIN: Architecture = Architecture { interleaved: false, keys: &[], ..LLAMA };

/// The known architectures, in the order in which messages list them.
pub(super) const ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    Architecture {
        name: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        block: &[ATTENTION, PRE_NORMS, MLP],
        config: config::qwen2,
        ..PLAIN
    },
    Architecture {
        name: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        block: &[ATTENTION, QK_NORM, PRE_NORMS, MLP],
        config: config::qwen3,
        ..PLAIN
    },
    Architecture {
        name: "qwen2moe",
        model_type: "qwen2_moe",
        class: "Qwen2MoeForCausalLM",
        block: &[ATTENTION, PRE_NORMS, MLP, EXPERTS, QWEN_SHARED_EXPERT],
        keys: &[
            "expert_count",
            "expert_used_count",
            "expert_gating_func",
            "expert_feed_forward_length",
            "expert_shared_feed_forward_length",
        ],
        config: config::qwen2_moe,
        ..PLAIN
    },
    Architecture {
        name: "qwen3moe",
        model_type: "qwen3_moe",
        class: "Qwen3MoeForCausalLM",
        block: &[ATTENTION, QK_NORM, PRE_NORMS, MLP, EXPERTS],
        keys: EXPERT_KEYS,
        config: config::qwen3_moe,
        ..PLAIN
    },
    Architecture {
        name: "gemma2",
        model_type: "gemma2",
        class: "Gemma2ForCausalLM",
        block: &[ATTENTION, GEMMA_NORMS, POST_NORMS, MLP],
        norms_plus_one: true,
        ordered_pieces: true,
        keys: &[
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ],
        config: config::gemma2,
        ..PLAIN
    },
    Architecture {
        name: "gemma3",
        model_type: "gemma3_text",
        class: "Gemma3ForCausalLM",
        block: &[ATTENTION, QK_NORM, GEMMA_NORMS, POST_NORMS, MLP],
        norms_plus_one: true,
        ordered_pieces: true,
        keys: &[
            "attention.sliding_window",
            "attention.sliding_window_pattern",
            "final_logit_softcapping",
            "rope.freq_base_swa",
        ],
        config: config::gemma3,
        ..PLAIN
    },
    Architecture {
        name: "phi3",
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        block: &[FUSED, PRE_NORMS],
        keys: &["attention.sliding_window"],
        partial_rotary: true,
        config: config::phi3,
        ..PLAIN
    },
    Architecture {
        name: "olmo2",
        model_type: "olmo2",
        class: "Olmo2ForCausalLM",
        block: &[ATTENTION, QK_NORM, POST_NORMS, MLP],
        config: config::olmo2,
        ..PLAIN
    },
    Architecture {
        name: "smollm3",
        model_type: "smollm3",
        class: "SmolLM3ForCausalLM",
        block: &[ATTENTION, PRE_NORMS, MLP],
        interleaved: true,
        config: config::smollm3,
        ..PLAIN
    },
    Architecture {
        name: "glm4moe",
        model_type: "glm4_moe",
        class: "Glm4MoeForCausalLM",
        block: &[ATTENTION, QK_NORM, GLM_NORMS, MLP, EXPERTS, GLM_SHARED_EXPERT],
        keys: &[
            "expert_count",
            "expert_used_count",
            "expert_gating_func",
            "expert_feed_forward_length",
            "expert_group_count",
            "expert_group_used_count",
            "expert_shared_count",
            "expert_weights_norm",
            "expert_weights_scale",
            "leading_dense_block_count",
            "nextn_predict_layers",
        ],
        partial_rotary: true,
        config: config::glm4_moe,
        ..PLAIN
    },
];

impl Architecture {
    /// The architecture of this name, or what to say where there is none.
    pub(super) fn find(name: &str) -> Result<&'static Architecture, String> {
        ARCHITECTURES.iter().find(|architecture| architecture.name == name).ok_or_else(|| {
            let known: Vec<&str> = ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
            format!("`{name}` is not supported; supported: {}", known.join(", "))
        })
    }
}
