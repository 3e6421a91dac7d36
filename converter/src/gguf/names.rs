//! Tensor names of GGUF files, as Hugging Face spells them.

use super::arch::{Architecture, Part, SHARED_EXPERT_GATE};

/// What a GGUF tensor is in a Hugging Face checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HfName {
    /// With `{}` in place of the expert's number where the tensor has all experts.
    pub(super) name: String,
    pub(super) role: Role,
}

/// What a tensor is, as far as it matters for reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The weights of a norm.
    Norm,
    /// The query projection.
    Query,
    /// The key projection.
    Key,
    /// All experts of one projection.
    Experts,
    /// A matrix of one row, stored as a vector.
    Row,
    /// Anything else.
    Plain,
}

/// `blk.N.rest` as N and rest.
pub(super) fn block(gguf: &str) -> Option<(usize, &str)> {
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    // "+1" and "01" parse, but are not how a layer is written.
    let index: u32 = layer.parse().ok().filter(|index: &u32| index.to_string() == layer)?;
    Some((index as usize, rest))
}

impl Architecture {
    /// The Hugging Face name of a GGUF tensor, `None` if the architecture has no such tensor.
    pub(super) fn hf_name(&self, gguf: &str) -> Option<HfName> {
        let named = |name: &str, role| Some(HfName { name: name.to_owned(), role });
        match gguf {
            "token_embd.weight" => return named("model.embed_tokens.weight", Role::Plain),
            "output_norm.weight" => return named("model.norm.weight", Role::Norm),
            "output.weight" => return named("lm_head.weight", Role::Plain),
            _ => {}
        }
        let (layer, rest) = block(gguf)?;
        let find = |name: &str| self.block.iter().copied().flatten().find(|part: &&Part| part.0 == name);
        let (part, leaf) = rest.split_once('.').filter(|(_, leaf)| matches!(*leaf, "weight" | "bias"))?;
        if let Some((_, hf)) = find(rest) {
            return named(&format!("model.layers.{layer}.{hf}"), Role::Plain);
        }
        let (_, hf) = find(part)?;
        let role = match part {
            "attn_q" => Role::Query,
            "attn_k" => Role::Key,
            SHARED_EXPERT_GATE => Role::Row,
            _ if part.ends_with("_norm") => Role::Norm,
            _ if hf.contains("{}") => Role::Experts,
            _ => Role::Plain,
        };
        named(&format!("model.layers.{layer}.{hf}.{leaf}"), role)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hf(architecture: &str, gguf: &str) -> Option<(String, Role)> {
        Architecture::find(architecture).unwrap().hf_name(gguf).map(|hf| (hf.name, hf.role))
    }

    #[test]
    fn names_of_every_part() {
        for (architecture, gguf, name, role) in [
            ("llama", "token_embd.weight", "model.embed_tokens.weight", Role::Plain),
            ("llama", "output.weight", "lm_head.weight", Role::Plain),
            ("gemma2", "output_norm.weight", "model.norm.weight", Role::Norm),
            ("llama", "blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight", Role::Norm),
            ("llama", "blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight", Role::Plain),
            ("llama", "blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight", Role::Norm),
            ("llama", "blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias", Role::Query),
            ("llama", "blk.3.attn_k.weight", "model.layers.3.self_attn.k_proj.weight", Role::Key),
            ("qwen2", "blk.3.attn_v.bias", "model.layers.3.self_attn.v_proj.bias", Role::Plain),
            ("llama", "blk.3.ffn_down.bias", "model.layers.3.mlp.down_proj.bias", Role::Plain),
            ("llama", "blk.3.ffn_gate_inp.weight", "model.layers.3.block_sparse_moe.gate.weight", Role::Plain),
            (
                "llama",
                "blk.3.ffn_down_exps.weight",
                "model.layers.3.block_sparse_moe.experts.{}.w2.weight",
                Role::Experts,
            ),
            ("qwen3", "blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight", Role::Norm),
            ("qwen3moe", "blk.3.ffn_up_exps.weight", "model.layers.3.mlp.experts.{}.up_proj.weight", Role::Experts),
            ("qwen2moe", "blk.3.ffn_gate_inp_shexp.weight", "model.layers.3.mlp.shared_expert_gate.weight", Role::Row),
            ("qwen2moe", "blk.3.ffn_up_shexp.weight", "model.layers.3.mlp.shared_expert.up_proj.weight", Role::Plain),
            ("gemma3", "blk.3.ffn_norm.weight", "model.layers.3.pre_feedforward_layernorm.weight", Role::Norm),
            ("gemma3", "blk.3.post_ffw_norm.weight", "model.layers.3.post_feedforward_layernorm.weight", Role::Norm),
            ("olmo2", "blk.3.post_attention_norm.weight", "model.layers.3.post_attention_layernorm.weight", Role::Norm),
            ("phi3", "blk.3.attn_qkv.weight", "model.layers.3.self_attn.qkv_proj.weight", Role::Plain),
            ("phi3", "blk.3.ffn_up.weight", "model.layers.3.mlp.gate_up_proj.weight", Role::Plain),
            (
                "glm4moe",
                "blk.3.ffn_gate_shexp.weight",
                "model.layers.3.mlp.shared_experts.gate_proj.weight",
                Role::Plain,
            ),
            ("glm4moe", "blk.3.exp_probs_b.bias", "model.layers.3.mlp.gate.e_score_correction_bias", Role::Plain),
            (
                "glm4moe",
                "blk.3.post_attention_norm.weight",
                "model.layers.3.post_attention_layernorm.weight",
                Role::Norm,
            ),
        ] {
            assert_eq!(hf(architecture, gguf), Some((name.to_owned(), role)), "{architecture} {gguf}");
        }
    }

    #[test]
    fn foreign_names_are_not_guessed() {
        for (architecture, gguf) in [
            ("qwen2", "blk.0.ffn_gate_inp.weight"),
            ("olmo2", "blk.0.attn_norm.weight"),
            ("phi3", "blk.0.ffn_gate.weight"),
            ("llama", "blk.01.attn_q.weight"),
            ("llama", "blk.+1.attn_q.weight"),
            ("llama", "blk.0.attn_q.scale"),
            ("llama", "blk.0.attn_q"),
            ("glm4moe", "blk.0.exp_probs_b.weight"),
            ("llama", "output"),
            ("llama", ""),
        ] {
            assert_eq!(hf(architecture, gguf), None, "{architecture} {gguf}");
        }
    }
}
