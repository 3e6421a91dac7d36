//! Pins what a configuration means in both spellings, and that nothing that changes the result is passed over.

use serde_json::json;

use super::*;

/// Two layers, R = 3, head_dim is not d_model / n_heads, all biases, untied.
pub(crate) fn small() -> ModelConfig {
    ModelConfig::from_value(&small_json(), Path::new("config.json")).expect("valid")
}

fn small_json() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 33, "hidden_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 28, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false, "bos_token_id": 1,
        "eos_token_id": [2, 3], "dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    })
}

/// `small_json` with keys replaced; a null removes the key.
fn with(changes: Value) -> Result<ModelConfig> {
    let mut value = small_json();
    let object = value.as_object_mut().expect("an object");
    for (key, change) in changes.as_object().expect("an object") {
        if change.is_null() {
            object.remove(key);
        } else {
            object.insert(key.clone(), change.clone());
        }
    }
    ModelConfig::from_value(&value, Path::new("config.json"))
}

fn message(changes: Value) -> String {
    with(changes).expect_err("must be refused").to_string()
}

#[test]
fn both_spellings_mean_the_same() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192});
    let old = with(json!({"rope_parameters": null, "dtype": null, "rope_theta": 500000, "torch_dtype": "bfloat16",
                          "rope_scaling": llama3}))
    .expect("valid");
    let mut parameters = llama3;
    parameters["rope_theta"] = json!(5e5);
    let new = with(json!({"rope_parameters": parameters, "dtype": "bfloat16"})).expect("valid");
    assert_eq!((&old.ropes, old.dtype), (&new.ropes, new.dtype));
    assert_eq!(
        new.ropes[0].kind,
        RopeKind::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        }
    );
    let linear =
        with(json!({"rope_parameters": null, "rope_scaling": {"type": "linear", "factor": 2}})).expect("valid");
    assert_eq!(linear.ropes, [Rope { theta: 10_000.0, dim: 8, kind: RopeKind::Linear { factor: 2.0 } }]);
}

#[test]
fn defaults_are_those_of_transformers() {
    let cfg = with(json!({"num_key_value_heads": null, "head_dim": null, "hidden_size": 24, "rms_norm_eps": null,
                          "tie_word_embeddings": null, "bos_token_id": null, "eos_token_id": null, "architectures": null}))
        .expect("valid");
    assert_eq!((cfg.n_kv_heads, cfg.head_dim, cfg.rms_norm_eps, cfg.tie_word_embeddings), (6, 4, 1e-6, false));
    assert_eq!((cfg.bos_token_id, cfg.eos_token_ids, cfg.pad_token_id), (Some(1), vec![2], None));
    assert_eq!(with(json!({"pad_token_id": -1})).expect("an old spelling of none").pad_token_id, None);
}

#[test]
fn what_is_said_twice_must_agree() {
    assert!(message(json!({"rope_theta": 1e4})).contains("contradicts rope_theta"));
    assert!(message(json!({"torch_dtype": "float16"})).contains("contradicts torch_dtype float16"));
    assert!(message(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).contains("contradicts rope_scaling"));
    assert!(
        message(json!({"rope_parameters": {"rope_type": "linear", "type": "default", "factor": 2.0}}))
            .contains("contradicts")
    );
    with(json!({"rope_theta": 5e5, "rope_scaling": null, "torch_dtype": "float32"})).expect("the same in both");
}

#[test]
fn whatever_changes_the_result_is_refused_by_name() {
    for (changes, part) in [
        (
            json!({"model_type": "mamba"}),
            "model_type: `mamba` is not supported; supported: llama, mistral, mixtral, qwen2, qwen3, qwen2_moe, qwen3_moe, glm4_moe, phi3, gemma2, gemma3_text, smollm3, olmo2",
        ),
        (json!({"model_type": null}), "model_type: required"),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), "architectures: "),
        (json!({"hidden_act": "mish"}), "hidden_act: `mish`"),
        (json!({"rope_parameters": {"rope_type": "linear"}}), "factor must be a number above 0"),
        (json!({"rope_parameters": {"rope_type": "default", "factor": 4.0}}), "factor 4.0 is not supported"),
        (json!({"rope_parameters": 3}), "expected an object, found 3"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        (json!({"sliding_window": 4096}), "sliding_window: 4096"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor: 0.5"),
        (json!({"rope_interleaved": true}), "rope_interleaved: true"),
        (json!({"layer_types": ["full_attention", "sliding_attention"]}), "layer_types"),
        (json!({"logits_scaling": 8.0}), "logits_scaling: unknown key"),
        (json!({"dtype": "float8_e4m3fn"}), "dtype: "),
    ] {
        let found = message(changes);
        assert!(found.contains(part), "{found}");
    }
    with(json!({"_name_or_path": "x", "use_cache": true, "sliding_window": null, "pretraining_tp": 2, "layer_types": ["full_attention"],
                "partial_rotary_factor": 1.0, "is_encoder_decoder": false})).expect("nothing that matters");
}

#[test]
fn absurd_sizes_are_refused() {
    for (changes, part) in [
        (json!({"hidden_size": 0}), "hidden_size: expected a whole number from 1"),
        (json!({"hidden_size": -4}), "found -4"),
        (json!({"hidden_size": "20"}), "found \"20\""),
        (json!({"vocab_size": 1e30}), "vocab_size: "),
        (json!({"vocab_size": null}), "vocab_size: required"),
        (
            json!({"hidden_size": 2147483647, "intermediate_size": 2147483647, "num_hidden_layers": 10000}),
            "one of them must be wrong",
        ),
        (json!({"num_hidden_layers": 2147483647}), "num_hidden_layers: expected at most 10000, found 2147483647"),
        (json!({"num_key_value_heads": 4}), "6 query heads cannot share 4"),
        (json!({"head_dim": 7}), "7 is odd"),
        (json!({"head_dim": null}), "required, since hidden_size 20 is not a multiple of num_attention_heads 6"),
        (json!({"eos_token_id": 33}), "eos_token_id: expected token ids from 0 to 32 (vocab_size - 1), found 33"),
        (json!({"bos_token_id": -1}), "found -1"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
        (json!({"rope_parameters": {"rope_theta": 0.0}}), "expected a base above 1"),
    ] {
        let found = message(changes);
        assert!(found.contains(part), "{found}");
    }
    for text in ["", "[]", "{", "\u{feff}{}", "{\"rms_norm_eps\": NaN}"] {
        ModelConfig::from_json(text, Path::new("config.json")).expect_err("not a configuration");
    }
}

/// A configuration of another member, with the sizes of `small_json`.
fn member(model_type: &str, architecture: &str, changes: Value) -> Result<ModelConfig> {
    let mut value =
        json!({"model_type": model_type, "architectures": [architecture], "attention_bias": null, "mlp_bias": null});
    value.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
    with(value)
}

#[test]
fn each_member_has_its_blocks() {
    let windows = |cfg: &ModelConfig| cfg.layers.iter().map(|layer| layer.window).collect::<Vec<_>>();
    let mistral = member("mistral", "MistralForCausalLM", json!({"sliding_window": 16})).expect("valid");
    assert_eq!(windows(&mistral), [Some(16), Some(16)]);
    let absent = member("mistral", "MistralForCausalLM", json!({})).expect("valid");
    let null = ModelConfig::from_value(
        &{
            let mut raw = absent.raw.clone();
            raw["sliding_window"] = Value::Null;
            raw
        },
        Path::new("c"),
    )
    .expect("valid");
    assert_eq!((windows(&absent), windows(&null)), (vec![Some(4096); 2], vec![None; 2]));

    let qwen = |changes| member("qwen2", "Qwen2ForCausalLM", changes).expect("valid");
    assert!(qwen(json!({})).attention.qkv_bias && !qwen(json!({})).attention.out_bias);
    assert_eq!(windows(&qwen(json!({"sliding_window": 16, "max_window_layers": 0}))), [None, None]);
    let some = json!({"use_sliding_window": true, "sliding_window": 16, "max_window_layers": 1});
    assert_eq!(windows(&qwen(some)), [None, Some(16)]);

    let gemma = json!({"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"], "hidden_act": null,
                       "attn_logit_softcapping": 50.0,
                       "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64, "rope_parameters": null,
                       "rope_theta": 1e6, "rope_local_base_freq": 1e4});
    let gemma = member("gemma3_text", "Gemma3ForCausalLM", gemma).expect("valid");
    assert_eq!(
        gemma.layers.iter().map(|l| (l.window, l.rope)).collect::<Vec<_>>(),
        [(None, Some(0)), (Some(16), Some(1))]
    );
    assert_eq!((gemma.attention.scale, gemma.norm_offset, gemma.embedding_scale), (0.125, 1.0, 20f64.sqrt()));
    assert_eq!((gemma.ropes[0].theta, gemma.ropes[1].theta, gemma.attention.softcap), (1e6, 1e4, None));

    let smol = member("smollm3", "SmolLM3ForCausalLM", json!({"no_rope_layers": [1, 0]})).expect("valid");
    assert_eq!(smol.layers.iter().map(|l| l.rope).collect::<Vec<_>>(), [Some(0), None]);

    let glm = json!({"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "n_shared_experts": 2,
                     "moe_intermediate_size": 12, "routed_scaling_factor": 1.5, "use_qk_norm": true});
    let glm = member("glm4_moe", "Glm4MoeForCausalLM", glm).expect("valid");
    let moe = glm.moe.as_ref().expect("experts");
    assert_eq!((moe.groups, moe.scale, glm.ropes[0].dim), (Some(ExpertGroups { count: 4, kept: 2 }), 1.5, 4));
    assert_eq!(moe.shared, Some(SharedExpert { d_ff: 24, gated: false }));
    assert_eq!(glm.layers.iter().map(|l| l.sparse).collect::<Vec<_>>(), [false, true]);
}

/// Keys that files on the hub carry although transformers does not read them there.
#[test]
fn what_real_files_carry_is_passed_over() {
    for (model_type, architecture, extra) in [
        (
            "phi3",
            "Phi3ForCausalLM",
            json!({"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": false, "mlp_bias": false,
                   "lm_head_bias": false, "full_attn_mod": 1, "interpolate_factor": 1, "sliding_window": 2047,
                   "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 64}),
        ),
        (
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            json!({"max_window_layers": 48, "use_sliding_window": false, "sliding_window": null, "qkv_bias": false,
                   "use_qk_norm": true, "shared_expert_intermediate_size": 0, "norm_topk_prob": true, "num_experts": 8,
                   "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 0.001,
                   "output_router_logits": false, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        ),
        (
            "smollm3",
            "SmolLM3ForCausalLM",
            json!({"max_window_layers": 28, "use_sliding_window": true, "sliding_window": null, "pretraining_tp": 2,
                   "no_rope_layers": [1, 0], "no_rope_layer_interval": 4, "mlp_bias": false}),
        ),
        (
            "qwen2",
            "Qwen2ForCausalLM",
            json!({"use_mrope": false, "use_sliding_window": false, "sliding_window": 131072, "max_window_layers": 28}),
        ),
        (
            "gemma2",
            "Gemma2ForCausalLM",
            json!({"sliding_window_size": 4096, "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"}),
        ),
    ] {
        let cfg = member(model_type, architecture, extra).unwrap_or_else(|e| panic!("{model_type}: {e}"));
        if model_type == "smollm3" {
            assert!(cfg.windows().is_empty(), "no window is named, so none is there");
        }
    }
}

#[test]
fn what_a_member_cannot_be_is_refused() {
    let mixtral = |changes| member("mixtral", "MixtralForCausalLM", changes).expect_err("must be refused").to_string();
    let glm = |changes| member("glm4_moe", "Glm4MoeForCausalLM", changes).expect_err("must be refused").to_string();
    for (found, part) in [
        (mixtral(json!({"num_local_experts": 2, "num_experts_per_tok": 3})), "3 is more than the 2 experts"),
        (mixtral(json!({"num_local_experts": 2000000000})), "2000000000 in each of 2 layers are more than 1048576"),
        (
            mixtral(json!({"shared_expert_intermediate_size": 4})),
            "shared_expert_intermediate_size: 4 changes the result",
        ),
        (
            member("qwen3_moe", "Qwen3MoeForCausalLM", json!({"use_qk_norm": false}))
                .expect_err("no such thing")
                .to_string(),
            "use_qk_norm: false is not supported",
        ),
        (
            member("gemma2", "Gemma2ForCausalLM", json!({"final_logit_softcapping": 1e300}))
                .expect_err("overflows")
                .to_string(),
            "from 1e-30 to 1e30, found 1",
        ),
        (glm(json!({"n_routed_experts": 9, "n_group": 2})), "2 groups do not divide n_routed_experts 9"),
        (
            glm(json!({"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3})),
            "too few experts",
        ),
        (
            member("gemma2", "Gemma2ForCausalLM", json!({"layer_types": ["full_attention"]}))
                .expect_err("one of two")
                .to_string(),
            "one item for each of 2 layers, found 1 items",
        ),
        (
            member(
                "qwen3",
                "Qwen3ForCausalLM",
                json!({"layer_types": ["chunked_attention", "full_attention"], "use_sliding_window": true}),
            )
            .expect_err("another attention")
            .to_string(),
            "\"chunked_attention\" is not supported",
        ),
        (
            member(
                "gemma3_text",
                "Gemma3ForCausalLM",
                json!({"use_bidirectional_attention": true, "rope_parameters": null}),
            )
            .expect_err("not causal")
            .to_string(),
            "use_bidirectional_attention: true changes the result",
        ),
    ] {
        assert!(found.contains(part), "{found}");
    }
}
