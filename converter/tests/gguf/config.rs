use converter::gguf::GgufFile;
use serde_json::{Value as Json, json};

use super::builder::{Builder, V};
use super::data;

fn config(builder: &Builder) -> Json {
    builder.open().unwrap().hf_config().unwrap()
}

fn refused(builder: &Builder) -> String {
    match builder.open() {
        Ok(file) => file.hf_config().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_whole_configuration() {
    let builder = Builder::llama()
        .with("tokenizer.ggml.bos_token_id", V::U32(1))
        .with("tokenizer.ggml.eos_token_id", V::U32(2))
        .with("llama.rope.freq_base", V::F32(100_000.0))
        .with("llama.rope.dimension_count", V::U32(16));
    let rope = json!({ "rope_theta": 100_000.0, "rope_type": "default" });
    let expected = json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 1,
        "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32,
        "initializer_range": 0.02, "intermediate_size": 64, "max_position_embeddings": 128, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 2,
        "pad_token_id": null, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_parameters": rope, "rope_scaling": null,
        "rope_theta": 100_000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "use_cache": true,
        "vocab_size": 300,
    });
    assert_eq!(config(&builder), expected);
}

#[test]
fn a_model_with_everything() {
    let config = GgufFile::open(&data("tiny.gguf")).unwrap().hf_config().unwrap();
    assert_eq!(config["attention_bias"], true);
    assert_eq!(config["mlp_bias"], false);
    assert_eq!(config["tie_word_embeddings"], false);
    assert_eq!(config["head_dim"], 16);
    assert_eq!(config["rms_norm_eps"], 1e-6);
    let llama3 = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(config["rope_scaling"], llama3);
    assert_eq!(config["rope_parameters"]["rope_theta"], 500_000.0);
    assert_eq!(config["rope_parameters"]["factor"], 32.0);
}

#[test]
fn defaults_of_what_may_be_absent() {
    let builder = Builder::llama()
        .without("llama.attention.head_count_kv")
        .without("llama.attention.key_length")
        .without("llama.vocab_size")
        .f32("token_embd.weight", &[5, 32], (0..160).map(|i| i as f32));
    let config = config(&builder);
    assert_eq!(config["num_key_value_heads"], 4);
    assert_eq!(config["head_dim"], 8);
    assert_eq!(config["rope_theta"], 10_000.0);
    assert_eq!(config["vocab_size"], 5);
    assert_eq!(config["dtype"], "float32");
}

#[test]
fn sizes_may_be_given_per_layer_if_they_agree() {
    const KEY: &str = "llama.attention.head_count_kv";
    assert_eq!(config(&Builder::llama().with(KEY, V::U32s(vec![2, 2])))["num_key_value_heads"], 2);
    let error = refused(&Builder::llama().with(KEY, V::U32s(vec![2, 1])));
    assert!(error.contains("llama.attention.head_count_kv: must be the same positive number"), "{error}");
}

#[test]
fn linear_scaling_old_and_new() {
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    let new = Builder::llama()
        .with("llama.rope.scaling.type", V::Str("linear"))
        .with("llama.rope.scaling.factor", V::F32(4.0));
    assert_eq!(config(&new)["rope_scaling"], linear);
    assert_eq!(
        config(&new)["rope_parameters"],
        json!({ "rope_theta": 10_000.0, "rope_type": "linear", "factor": 4.0 })
    );
    let old = Builder::llama().with("llama.rope.scale_linear", V::F32(4.0));
    assert_eq!(config(&old)["rope_scaling"], linear);
    let none = Builder::llama().with("llama.rope.scaling.type", V::Str("none"));
    assert_eq!(config(&none)["rope_scaling"], Json::Null);
}

#[test]
fn factors_that_are_not_llama3s_are_refused() {
    let file = GgufFile::open(&data("tiny.gguf")).unwrap();
    let theta = file.metadata().f64("llama.rope.freq_base").unwrap().unwrap() as f32;
    let with = |factors: Vec<f32>| {
        Builder::llama().with("llama.rope.freq_base", V::F32(theta)).f32(
            "rope_freqs.weight",
            &[factors.len() as u64],
            factors.into_iter(),
        )
    };
    // Wavelengths of theta 500000 and head size 16: 6.3, 32, 167, 862, 4443, 22907, …; the fifth is in the transition.
    let wavelength = 2.0 * std::f64::consts::PI * 500_000f64.sqrt();
    let smooth = (8192.0 / wavelength - 1.0) / 3.0;
    let smooth = (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32;
    let good = vec![1.0, 1.0, 1.0, 1.0, smooth, 8.0, 8.0, 8.0];
    let config = with(good.clone()).open().unwrap().hf_config().unwrap();
    assert_eq!(config["rope_scaling"]["factor"], 8.0);

    for (at, value) in [(0, 1.5), (4, smooth * 1.001), (5, 7.0), (7, f32::NAN)] {
        let mut bad = good.clone();
        bad[at] = value;
        let error = refused(&with(bad));
        assert!(error.contains("rope_freqs.weight") && error.contains("other scalings are not supported"), "{error}");
    }
    assert!(refused(&with(good[..7].to_vec())).contains("must have 8 elements, half of what rotates, found 7"));
    let error = refused(&with(good).with("llama.rope.scale_linear", V::F32(2.0)));
    assert!(error.contains("only one can be"), "{error}");
    let ones = with(vec![1.0; 8]).open().unwrap().hf_config().unwrap();
    assert_eq!(ones["rope_scaling"], Json::Null);
}

#[test]
fn values_that_would_change_the_result_are_refused() {
    for (key, value, message) in [
        ("llama.rope.scaling.type", V::Str("su"), "is `su`; `none`, `linear`, `yarn` and `longrope` are supported"),
        ("llama.rope.scaling.type", V::Str("yarn"), "llama.rope.scaling.factor: is required and absent"),
        ("llama.rope.scaling.type", V::Str("linear"), "llama.rope.scaling.factor: is required and absent"),
        ("llama.rope.scale_linear", V::F32(-1.0), "must be positive, found -1"),
        ("llama.rope.scaling.attn_factor", V::F32(1.5), "is 1.5; only 1 is supported"),
        ("llama.rope.freq_base", V::F32(f32::NAN), "llama.rope.freq_base: must be a finite number"),
        ("llama.rope.dimension_count", V::U32(8), "must be the head size 16, found 8"),
        ("llama.attention.value_length", V::U32(8), "must be the head size 16, found 8"),
        ("llama.attention.head_count", V::U32(0), "must be positive, found 0"),
        ("llama.attention.head_count", V::I32(-4), "must be an unsigned 32-bit integer, found -4"),
        ("llama.attention.causal", V::Bool(false), "only true is supported"),
        ("llama.expert_count", V::U32(8), "llama.expert_used_count: is required and absent"),
        ("llama.attention.sliding_window", V::U32(4096), "is 4096; only 0 is supported"),
        ("llama.attention.scale", V::F32(0.5), "llama.attention.scale: may change the result"),
        ("llama.block_count", V::Str("one"), "must be an unsigned 32-bit integer, found the string \"one\""),
        ("general.architecture", V::Str("mamba"), "`mamba` is not supported; supported: llama, qwen2, qwen3, qwen2moe"),
        ("split.count", V::U32(3), "is 3: this is one part of a split model"),
    ] {
        let error = refused(&Builder::llama().with(key, value));
        assert!(error.starts_with("model.gguf: ") && error.contains(message), "{key}: {error}");
    }
    let indivisible = Builder::llama().without("llama.attention.key_length").with("llama.embedding_length", V::U32(30));
    assert!(refused(&indivisible).contains("30 is not a multiple of llama.attention.head_count 4"));
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.vocab_size",
    ] {
        let error = refused(&Builder::llama().without(key));
        assert!(error.contains(&format!("{key}: is required and absent")), "{error}");
    }
}

#[test]
fn tensors_of_other_models_are_named() {
    let error = refused(&Builder::llama().f32("blk.0.ssm_conv1d.weight", &[8, 32], (0..256).map(|i| i as f32)));
    assert!(
        error.contains("blk.0.ssm_conv1d.weight") && error.contains("not a tensor of the architecture `llama`"),
        "{error}"
    );
    let error = refused(&Builder::llama().f32("blk.0.attn_q.weight", &[12, 1], (0..12).map(|i| i as f32)));
    assert!(error.contains("has 12 rows, which 4 heads of an even size cannot share"), "{error}");
}
