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
    assert_eq!((old.rope, old.dtype), (new.rope, new.dtype));
    assert_eq!(
        new.rope.kind,
        RopeKind::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        }
    );
    let linear =
        with(json!({"rope_parameters": null, "rope_scaling": {"type": "linear", "factor": 2}})).expect("valid");
    assert_eq!(linear.rope, Rope { theta: 10_000.0, kind: RopeKind::Linear { factor: 2.0 } });
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
            .contains("contradicts type")
    );
    with(json!({"rope_theta": 5e5, "rope_scaling": null, "torch_dtype": "float32"})).expect("the same in both");
}

#[test]
fn whatever_changes_the_result_is_refused_by_name() {
    for (changes, part) in [
        (json!({"model_type": "mamba"}), "model_type: `mamba` is not supported; supported: llama"),
        (json!({"model_type": null}), "model_type: required"),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), "architectures: "),
        (json!({"hidden_act": "mish"}), "hidden_act: `mish`"),
        (
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
            "\"yarn\" is not supported; supported: default, linear, llama3",
        ),
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
            json!({"hidden_size": 2147483647, "intermediate_size": 2147483647, "num_hidden_layers": 2147483647}),
            "one of them must be wrong",
        ),
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

#[test]
fn frequencies() {
    let rope = Rope { theta: 10_000.0, kind: RopeKind::Default };
    assert_eq!(rope.inv_freq(8), [1.0, 0.1f32 as f64, 0.01f32 as f64, 0.001f32 as f64]);
    let linear = Rope { kind: RopeKind::Linear { factor: 4.0 }, ..rope };
    assert_eq!(linear.inv_freq(4), [0.25, 0.0025f32 as f64]);

    // from transformers 5.23: ROPE_INIT_FUNCTIONS["llama3"] with Llama 3.1's values; 24 is kept, 40 divided
    let stretch = RopeKind::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    let llama3 = Rope { theta: 500_000.0, kind: stretch }.inv_freq(128);
    let expected = [
        (24, 0.00729266507551074),
        (29, 0.0021665706299245358),
        (31, 0.0008567514596506953),
        (34, 0.0001785077911335975),
        (40, 3.428102354519069e-05),
    ];
    for (i, value) in expected {
        assert_eq!(llama3[i], value, "{i}");
    }
}
