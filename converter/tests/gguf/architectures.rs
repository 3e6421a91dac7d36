//! What each architecture does to names, values and configuration.

use converter::gguf::GgufFile;
use serde_json::{Value as Json, json};

use super::builder::{Builder, Row, V};

/// The configuration of `file`, which must have these keys with these values.
fn assert_config(builder: &Builder, expected: Json) {
    let config = builder.open().unwrap().hf_config().unwrap();
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(config.get(key), Some(value), "{key}");
    }
}

fn refused(builder: &Builder) -> String {
    match builder.open() {
        Ok(file) => file.hf_config().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

/// All values of a tensor, which must have this shape.
fn values(file: &GgufFile, name: &str, shape: &[usize]) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
    assert_eq!(tensor.shape(), shape, "{name}");
    let mut out = vec![0.0; shape.iter().product()];
    file.read_rows(name, 0..shape[0], &mut out).unwrap();
    out
}

fn counted(range: std::ops::Range<usize>) -> Vec<f32> {
    range.map(|i| i as f32).collect()
}

/// A mixture of 3 experts of width 8, of which a token takes 2.
fn mixture(architecture: &'static str) -> Builder {
    let key = |key: &str| format!("{architecture}.{key}");
    let exps = ["gate", "up", "down"].map(|name| format!("blk.0.ffn_{name}_exps.weight"));
    Builder::of(architecture)
        .with(&key("vocab_size"), V::U32(300))
        .with(&key("expert_count"), V::U32(3))
        .with(&key("expert_used_count"), V::U32(2))
        .counted("blk.0.ffn_gate_inp.weight", &[3, 32])
        .counted(&exps[0], &[3, 8, 32])
        .counted(&exps[1], &[3, 8, 32])
        .counted(&exps[2], &[3, 32, 8])
}

fn gemma3() -> Builder {
    Builder::of("gemma3")
        .with("gemma3.block_count", V::U32(7))
        .with("gemma3.rope.freq_base", V::F32(1e6))
        .with("gemma3.attention.sliding_window", V::U32(512))
        .counted("token_embd.weight", &[5, 32])
}

#[test]
fn gemma3_has_windows_and_two_thetas() {
    let window = "sliding_attention";
    assert_config(
        &gemma3(),
        json!({
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": 5,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": [window, window, window, window, window, "full_attention", window],
            "query_pre_attn_scalar": 16,
            "sliding_window": 512,
            "final_logit_softcapping": null,
            "tie_word_embeddings": true,
            "rope_parameters": {
                "full_attention": { "rope_theta": 1e6, "rope_type": "default" },
                "sliding_attention": { "rope_theta": 1e4, "rope_type": "default" },
            },
            "rope_local_base_freq": 1e4,
        }),
    );
    let config = gemma3().open().unwrap().hf_config().unwrap();
    assert!(config.get("hidden_act").is_none(), "{config}");

    let scaled = gemma3()
        .with("gemma3.rope.scaling.type", V::Str("linear"))
        .with("gemma3.rope.scaling.factor", V::F32(8.0))
        .with("gemma3.rope.freq_base_swa", V::F32(2e4))
        .with("gemma3.final_logit_softcapping", V::F32(30.0));
    assert_config(
        &scaled,
        json!({
            "rope_parameters": {
                "full_attention": { "rope_theta": 1e6, "rope_type": "linear", "factor": 8.0 },
                "sliding_attention": { "rope_theta": 2e4, "rope_type": "default" },
            },
            "final_logit_softcapping": 30.0,
        }),
    );
    let full = gemma3().without("gemma3.attention.sliding_window");
    assert_config(&full, json!({ "sliding_window": null, "layer_types": vec!["full_attention"; 7] }));
    // 62 layers: 27B, which scales queries by the width per head.
    assert_config(&gemma3().with("gemma3.block_count", V::U32(62)), json!({ "query_pre_attn_scalar": 8 }));
}

#[test]
fn layers_with_a_window_as_the_file_says() {
    const PATTERN: &str = "gemma3.attention.sliding_window_pattern";
    let [window, full] = ["sliding_attention", "full_attention"];
    let three = gemma3().with("gemma3.block_count", V::U32(3));
    let with = |value| three.clone().with(PATTERN, value);
    assert_config(&with(V::U32(2)), json!({ "layer_types": [window, full, window] }));
    assert_config(&with(V::Bools(vec![false, true, true])), json!({ "layer_types": [full, window, window] }));
    for bad in [V::Bools(vec![true]), V::U32s(vec![1, 1, 1])] {
        let error = refused(&with(bad));
        assert!(error.contains("must be a number, or true or false for each of 3 layers"), "{error}");
    }
    assert!(refused(&with(V::U32(0))).contains("must be positive, found 0"));
}

#[test]
fn gemma_norms_are_stored_with_1_added_and_its_heads_are_not_interleaved() {
    let norms = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"];
    let file = norms
        .iter()
        .fold(gemma3(), |file, norm| file.counted(&format!("blk.2.{norm}.weight"), &[32]))
        .counted("blk.2.attn_q_norm.weight", &[16])
        .counted("output_norm.weight", &[32])
        .counted("blk.2.attn_q.weight", &[64, 32])
        .open()
        .unwrap();
    let minus_one: Vec<f32> = (0..32).map(|i| i as f32 - 1.0).collect();
    for name in
        ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    {
        assert_eq!(values(&file, &format!("model.layers.2.{name}.weight"), &[32]), minus_one, "{name}");
    }
    assert_eq!(values(&file, "model.norm.weight", &[32]), minus_one);
    assert_eq!(values(&file, "model.layers.2.self_attn.q_norm.weight", &[16]), minus_one[..16]);
    assert_eq!(values(&file, "model.layers.2.self_attn.q_proj.weight", &[64, 32]), counted(0..64 * 32));
    assert_eq!(values(&file, "model.embed_tokens.weight", &[5, 32]), counted(0..160));
}

#[test]
fn gemma2_caps_and_alternates() {
    let gemma2 = Builder::of("gemma2").with("gemma2.block_count", V::U32(3)).counted("token_embd.weight", &[5, 32]);
    assert_config(
        &gemma2,
        json!({
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 4096,
            "query_pre_attn_scalar": 16,
        }),
    );
    assert_config(
        &gemma2.clone().with("gemma2.attn_logit_softcapping", V::F32(20.0)),
        json!({ "attn_logit_softcapping": 20.0 }),
    );
    assert_config(&gemma2.with("gemma2.block_count", V::U32(46)), json!({ "query_pre_attn_scalar": 8 }));
}

#[test]
fn qwen_is_told_from_llama_by_biases_and_norms() {
    let qwen2 = Builder::of("qwen2").with("qwen2.vocab_size", V::U32(300)).counted("blk.0.attn_q.bias", &[64]);
    assert_config(&qwen2, json!({ "model_type": "qwen2", "use_sliding_window": false, "head_dim": 16 }));
    let file = qwen2.open().unwrap();
    assert_eq!(values(&file, "model.layers.0.self_attn.q_proj.bias", &[64]), counted(0..64));

    let qwen3 = Builder::of("qwen3").with("qwen3.vocab_size", V::U32(300)).counted("blk.0.attn_k_norm.weight", &[16]);
    assert_config(
        &qwen3,
        json!({ "model_type": "qwen3", "attention_bias": false, "architectures": ["Qwen3ForCausalLM"] }),
    );
    assert_eq!(values(&qwen3.open().unwrap(), "model.layers.0.self_attn.k_norm.weight", &[16]), counted(0..16));

    let error = refused(&qwen2.with("qwen2.attention.sliding_window", V::U32(64)));
    assert!(error.contains("qwen2.attention.sliding_window: is 64; only 0 is supported"), "{error}");
}

#[test]
fn stacked_experts_are_one_tensor_each() {
    for (architecture, moe, names) in
        [("llama", "block_sparse_moe", ["w1", "w3", "w2"]), ("qwen3moe", "mlp", ["gate_proj", "up_proj", "down_proj"])]
    {
        let file = mixture(architecture).open().unwrap();
        assert_eq!(file.tensors().len(), 1 + 3 * 3);
        assert_eq!(values(&file, &format!("model.layers.0.{moe}.gate.weight"), &[3, 32]), counted(0..96));
        for (name, shape) in names.into_iter().zip([[8, 32], [8, 32], [32, 8]]) {
            for expert in 0..3 {
                let name = format!("model.layers.0.{moe}.experts.{expert}.{name}.weight");
                assert_eq!(values(&file, &name, &shape), counted(expert * 256..(expert + 1) * 256), "{name}");
            }
        }
    }
}

/// Q8_0: blocks of a float16 scale and 32 bytes, one block a row here.
#[test]
fn a_quantized_expert_begins_at_its_own_block() {
    let mut builder = Builder::of("qwen3moe").with("qwen3moe.vocab_size", V::U32(300));
    let name = "blk.0.ffn_up_exps.weight".to_owned();
    builder.rows.push(Row { name, dims: vec![32, 2, 3], kind: 8, offset: 0 });
    for row in 0..6 {
        builder.data.extend(half_one());
        builder.data.extend([row; 32]);
    }
    let file = builder.open().unwrap();
    let tensor = file.tensor("model.layers.0.mlp.experts.2.up_proj.weight").unwrap();
    assert_eq!((tensor.bytes(), tensor.kind().name(), tensor.gguf_name()), (68, "Q8_0", "blk.0.ffn_up_exps.weight"));
    let expected: Vec<f32> = [[4.0; 32], [5.0; 32]].concat();
    assert_eq!(values(&file, "model.layers.0.mlp.experts.2.up_proj.weight", &[2, 32]), expected);
}

fn half_one() -> [u8; 2] {
    0x3c00u16.to_le_bytes()
}

#[test]
fn mixtures_of_experts() {
    assert_config(
        &mixture("llama"),
        json!({
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
        }),
    );
    let qwen3 = json!({
        "model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": true,
        "moe_intermediate_size": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    });
    assert_config(&mixture("qwen3moe"), qwen3);
    let named = mixture("qwen3moe").with("qwen3moe.expert_feed_forward_length", V::U32(24));
    assert_config(&named, json!({ "moe_intermediate_size": 24 }));

    let qwen2 = mixture("qwen2moe")
        .counted("blk.0.ffn_up_shexp.weight", &[12, 32])
        .counted("blk.0.ffn_gate_inp_shexp.weight", &[32]);
    assert_config(
        &qwen2,
        json!({ "model_type": "qwen2_moe", "norm_topk_prob": false, "shared_expert_intermediate_size": 12 }),
    );
    let file = qwen2.open().unwrap();
    assert_eq!(values(&file, "model.layers.0.mlp.shared_expert_gate.weight", &[1, 32]), counted(0..32));

    let error = refused(&mixture("qwen3moe").with("qwen3moe.expert_gating_func", V::U32(2)));
    assert!(error.contains("qwen3moe.expert_gating_func: is 2; only 1 is supported"), "{error}");
    let error = refused(&mixture("qwen3moe").with("qwen3moe.expert_weights_scale", V::F32(2.0)));
    assert!(error.contains("qwen3moe.expert_weights_scale: may change the result"), "{error}");
    let flat = Builder::of("qwen3moe").counted("blk.0.ffn_up_exps.weight", &[24, 32]);
    assert!(refused(&flat).contains("has the shape [24, 32]; experts are stacked in three axes"));
}

#[test]
fn more_experts_than_any_model_has_are_refused_before_they_are_listed() {
    let many = Builder::of("qwen3moe").f32(
        "blk.0.ffn_up_exps.weight",
        &[(1 << 20) + 1, 1, 1],
        [0.0].into_iter().cycle().take((1 << 20) + 1),
    );
    let error = refused(&many);
    assert!(error.contains("blk.0.ffn_up_exps.weight") && error.contains("a file may have 1048576"), "{error}");
}

#[test]
fn glm4_leaves_out_the_layers_that_only_draft() {
    let keys = [
        ("block_count", V::U32(3)),
        ("nextn_predict_layers", V::U32(1)),
        ("leading_dense_block_count", V::U32(1)),
        ("expert_shared_count", V::U32(1)),
        ("expert_gating_func", V::U32(2)),
        ("expert_weights_scale", V::F32(2.5)),
        ("expert_weights_norm", V::Bool(true)),
        ("rope.dimension_count", V::U32(8)),
    ];
    let glm4 =
        keys.into_iter().fold(mixture("glm4moe"), |file, (key, value)| file.with(&format!("glm4moe.{key}"), value));
    let glm4 = glm4
        .counted("blk.1.exp_probs_b.bias", &[3])
        .counted("blk.1.post_attention_norm.weight", &[32])
        .counted("blk.2.attn_norm.weight", &[32])
        .counted("blk.2.nextn.eh_proj.weight", &[32, 64]);
    assert_config(
        &glm4,
        json!({
            "model_type": "glm4_moe", "num_hidden_layers": 2, "n_routed_experts": 3, "num_experts_per_tok": 2,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": true,
            "n_group": 1, "topk_group": 1, "use_qk_norm": false, "moe_intermediate_size": 8,
            "rope_parameters": { "rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5 },
        }),
    );
    let file = glm4.open().unwrap();
    assert_eq!(values(&file, "model.layers.1.mlp.gate.e_score_correction_bias", &[3]), counted(0..3));
    assert_eq!(values(&file, "model.layers.1.post_attention_layernorm.weight", &[32]), counted(0..32));
    assert!(file.tensors().iter().all(|tensor| !tensor.hf_name().starts_with("model.layers.2.")));
    let error = refused(&glm4.with("glm4moe.nextn_predict_layers", V::U32(3)));
    assert!(error.contains("must be less than the 3 blocks, found 3"), "{error}");
}

#[test]
fn phi3_is_fused_and_may_scale_for_long_contexts() {
    let phi3 = Builder::of("phi3")
        .with("phi3.vocab_size", V::U32(300))
        .with("phi3.rope.dimension_count", V::U32(8))
        .with("phi3.attention.sliding_window", V::U32(0))
        .counted("blk.0.attn_qkv.weight", &[128, 32])
        .counted("blk.0.ffn_up.weight", &[128, 32]);
    assert_config(
        &phi3,
        json!({
            "model_type": "phi3", "sliding_window": null, "original_max_position_embeddings": 128,
            "rope_parameters": { "rope_theta": 10_000.0, "rope_type": "default", "partial_rotary_factor": 0.5 },
        }),
    );
    let file = phi3.open().unwrap();
    assert_eq!(values(&file, "model.layers.0.self_attn.qkv_proj.weight", &[128, 32]), counted(0..4096));
    assert_eq!(values(&file, "model.layers.0.mlp.gate_up_proj.weight", &[128, 32]), counted(0..4096));

    // 128 / 64 of the original context: √(1 + ln 2 / ln 64).
    let long = phi3
        .with("phi3.rope.scaling.original_context_length", V::U32(64))
        .with("phi3.rope.scaling.attn_factor", V::F32((1.0 + 1.0 / 6.0f32).sqrt()))
        .f32("rope_factors_long.weight", &[4], [4.0, 5.0, 6.0, 7.0].into_iter())
        .f32("rope_factors_short.weight", &[4], [1.0, 1.5, 2.0, 2.5].into_iter());
    let scaling = json!({
        "rope_theta": 10_000.0, "rope_type": "longrope", "partial_rotary_factor": 0.5,
        "long_factor": [4.0, 5.0, 6.0, 7.0], "short_factor": [1.0, 1.5, 2.0, 2.5],
        "original_max_position_embeddings": 64,
    });
    assert_config(&long, json!({ "original_max_position_embeddings": 64, "rope_parameters": scaling }));
    let other = long.with("phi3.rope.scaling.attn_factor", V::F32(1.5)).open().unwrap().hf_config().unwrap();
    assert_eq!(other["rope_parameters"]["attention_factor"], 1.5);
}

#[test]
fn yarn_with_its_two_bounds() {
    let yarn = Builder::llama()
        .with("llama.rope.scaling.type", V::Str("yarn"))
        .with("llama.rope.scaling.factor", V::F32(4.0))
        .with("llama.rope.scaling.original_context_length", V::U32(32));
    let scaling = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 });
    assert_config(&yarn, json!({ "rope_scaling": scaling }));
    let bounds = yarn.with("llama.rope.scaling.yarn_beta_fast", V::F32(16.0));
    assert_eq!(bounds.open().unwrap().hf_config().unwrap()["rope_scaling"]["beta_fast"], 16.0);
    let both = bounds.counted("rope_freqs.weight", &[8]);
    assert!(refused(&both).contains("llama.rope.scaling.type asks for another scaling; only one can be"));
}

#[test]
fn olmo2_norms_what_blocks_give_and_smollm3_leaves_every_fourth_layer_unrotated() {
    let olmo2 = Builder::of("olmo2").with("olmo2.vocab_size", V::U32(300)).counted("blk.0.post_ffw_norm.weight", &[32]);
    assert_config(&olmo2, json!({ "model_type": "olmo2", "attention_bias": false }));
    let file = olmo2.open().unwrap();
    assert_eq!(values(&file, "model.layers.0.post_feedforward_layernorm.weight", &[32]), counted(0..32));

    let smollm3 = Builder::of("smollm3")
        .with("smollm3.vocab_size", V::U32(300))
        .with("smollm3.block_count", V::U32(5))
        .counted("blk.0.attn_k.weight", &[32, 1]);
    assert_config(&smollm3, json!({ "model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0, 1] }));
    let file = smollm3.open().unwrap();
    // Two heads of 16 rows, interleaved.
    let rows = values(&file, "model.layers.0.self_attn.k_proj.weight", &[32, 1]);
    assert_eq!((rows[1], rows[8], rows[17]), (2.0, 1.0, 18.0));
}

#[test]
fn keys_of_other_architectures_are_refused() {
    for (architecture, key) in [("qwen3", "expert_shared_count"), ("olmo2", "attention.sliding_window_pattern")] {
        let builder = Builder::of(architecture).with(&format!("{architecture}.{key}"), V::U32(1));
        let error = refused(&builder.counted("token_embd.weight", &[5, 32]));
        assert!(
            error.contains(&format!("{architecture}.{key}: may change the result and is not supported")),
            "{error}"
        );
    }
}
