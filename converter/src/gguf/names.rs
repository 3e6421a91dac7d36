//! Tensor names of the GGUF architecture `llama`, as Hugging Face spells them.

/// A tensor's name and the heads whose rows GGUF interleaves.
pub(super) struct HfName {
    pub(super) name: String,
    pub(super) rotary: Option<Rotary>,
}

/// Which head count splits the rows of a rotary projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rotary {
    Query,
    Key,
}

/// The parts of a decoder block: GGUF, Hugging Face.
const BLOCK: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The Hugging Face name of a GGUF tensor, `None` if the architecture has no such tensor.
pub(super) fn hf_name(gguf: &str) -> Option<HfName> {
    let plain = |name: &str| Some(HfName { name: name.to_owned(), rotary: None });
    match gguf {
        "token_embd.weight" => return plain("model.embed_tokens.weight"),
        "output_norm.weight" => return plain("model.norm.weight"),
        "output.weight" => return plain("lm_head.weight"),
        _ => {}
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    // "+1" and "01" parse, but are not how a layer is written.
    let index: u32 = layer.parse().ok().filter(|index: &u32| index.to_string() == layer)?;
    let (part, leaf) = rest.split_once('.')?;
    if !matches!(leaf, "weight" | "bias") {
        return None;
    }
    let (_, hf) = BLOCK.iter().find(|(gguf, _)| *gguf == part)?;
    let rotary = match part {
        "attn_q" => Some(Rotary::Query),
        "attn_k" => Some(Rotary::Key),
        _ => None,
    };
    Some(HfName { name: format!("model.layers.{index}.{hf}.{leaf}"), rotary })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_part() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
            ("blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
            ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
            ("blk.3.attn_q.bias", "model.layers.3.self_attn.q_proj.bias"),
            ("blk.3.ffn_down.bias", "model.layers.3.mlp.down_proj.bias"),
        ] {
            assert_eq!(hf_name(gguf).map(|n| n.name).as_deref(), Some(hf), "{gguf}");
        }
    }

    #[test]
    fn only_query_and_key_rows_are_interleaved() {
        assert_eq!(hf_name("blk.0.attn_q.weight").unwrap().rotary, Some(Rotary::Query));
        assert_eq!(hf_name("blk.0.attn_k.bias").unwrap().rotary, Some(Rotary::Key));
        assert_eq!(hf_name("blk.0.attn_v.weight").unwrap().rotary, None);
    }

    #[test]
    fn foreign_names_are_not_guessed() {
        for gguf in [
            "blk.0.ffn_gate_inp.weight",
            "blk.01.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk.0.attn_q.scale",
            "output",
            "",
        ] {
            assert!(hf_name(gguf).is_none(), "{gguf}");
        }
    }
}
