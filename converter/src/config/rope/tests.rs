//! Frequencies against those of transformers 5.23, the spellings of the keys, and the rewriting for longer contexts.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::ModelConfig;
use crate::config::Keys;
use crate::error::Result;

const LLAMA: RopeDefaults = RopeDefaults { theta: 1e4, partial: 1.0, local_theta: None };
const GEMMA: RopeDefaults = RopeDefaults { theta: 1e6, partial: 1.0, local_theta: Some(1e4) };
const GLM: RopeDefaults = RopeDefaults { theta: 1e4, partial: 0.5, local_theta: None };

/// The embeddings of full and of windowed layers.
fn try_read(config: Value, head_dim: usize, context: usize, defaults: &RopeDefaults) -> Result<(Rope, Option<Rope>)> {
    let object = config.as_object().expect("an object");
    let mut keys = Keys { object, file: Path::new("config.json"), read: Vec::new() };
    read(&mut keys, head_dim, context, defaults).map(|ropes| (ropes.full, ropes.sliding))
}

fn rope(config: Value, head_dim: usize, context: usize) -> Rope {
    try_read(config, head_dim, context, &LLAMA).expect("valid").0
}

fn message(config: Value) -> String {
    try_read(config, 8, 128, &LLAMA).expect_err("must be refused").to_string()
}

#[test]
fn default_and_linear() {
    assert_eq!(rope(json!({}), 8, 128).inv_freq(1), [1.0, 0.1, 0.01, 0.001]);
    let linear = json!({"rope_theta": 50000, "rope_scaling": {"type": "linear", "factor": 2.5}});
    assert_eq!(rope(linear, 8, 128).inv_freq(1), [0.4, 0.026749615, 0.0017888544, 0.000119627904]);
}

#[test]
fn dynamic_depends_on_the_length_past_the_context() {
    let dynamic =
        rope(json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2.5, "rope_theta": 50000.0}}), 8, 128);
    assert!(dynamic.depends_on_length());
    assert_eq!([1, 128, 129, 300].map(|len| dynamic.length_class(len)), [0, 0, 129, 300]);
    assert_eq!(dynamic.inv_freq(128), [1.0, 0.066874035, 0.004472136, 0.00029906977]);
    assert_eq!(dynamic.inv_freq(129), [1.0, 0.06644424, 0.004414837, 0.00029334048]);
    assert_eq!(dynamic.inv_freq(300), [1.0, 0.040937006, 0.0016758386, 6.860381e-5]);
}

#[test]
fn yarn() {
    let with = |changes: Value| {
        let mut object = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024});
        object.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        rope(json!({"rope_scaling": object}), 16, 128)
    };
    let blended = [1.0, 0.31622776, 0.081250004, 0.019764237, 0.004375, 0.00079056947, 0.00025, 7.905695e-5];
    let plain = with(json!({}));
    assert_eq!(plain.inv_freq(1), blended);
    assert_eq!(plain.attention_factor(), 1.138629436111989);
    assert!(!plain.depends_on_length());

    let fraction =
        with(json!({"truncate": false, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.2}));
    let expected = [1.0, 0.31622776, 0.1, 0.018701805, 0.0025, 0.00079056947, 0.00025, 7.905695e-5];
    assert_eq!(fraction.inv_freq(1), expected);
    assert!((fraction.attention_factor() - 0.9405715251010841).abs() < 1e-15);

    // 0 is as good as absent
    let zero = with(json!({"attention_factor": 1.25, "beta_fast": 0, "mscale": 0, "mscale_all_dim": 1.2}));
    assert_eq!((zero.inv_freq(1), zero.attention_factor()), (blended.to_vec(), 1.25));

    // the factor is the ratio of the contexts where it is absent
    let ratio =
        rope(json!({"rope_scaling": {"rope_type": "yarn"}, "original_max_position_embeddings": 1024}), 16, 4096);
    assert_eq!(ratio, plain);
}

#[test]
fn llama3() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192});
    let config = json!({"rope_theta": 5e5, "rope_scaling": scaling});
    let expected = [1.0, 0.19392276, 0.03760603, 0.007292665, 0.000524846, 3.4281024e-5, 6.6478697e-6, 1.2891732e-6];
    assert_eq!(rope(config.clone(), 16, 131_072).inv_freq(1), expected);
    let wide = rope(config, 128, 131_072).inv_freq(1);
    assert_eq!(
        [24, 29, 31, 34, 40].map(|i| wide[i]),
        [0.007292665, 0.0021665706, 0.00085675146, 0.00017850779, 3.4281024e-5]
    );
}

#[test]
fn longrope_has_two_sets() {
    let phi3 = |name: &str| {
        let scaling = json!({"type": name, "short_factor": [1.0, 1.25, 1.5, 2], "long_factor": [1.0, 3.5, 9.0, 20.0]});
        let config = json!({"model_type": "phi3", "original_max_position_embeddings": 64, "rope_theta": 10000.0,
                            "partial_rotary_factor": 0.5, "rope_scaling": scaling});
        rope(config, 16, 256)
    };
    let rope = phi3("longrope");
    assert!(rope.depends_on_length());
    assert_eq!([1, 64, 65, 256].map(|len| rope.length_class(len)), [0, 0, 1, 1]);
    assert_eq!(rope.inv_freq(64), [1.0, 0.08, 0.006666667, 0.0005]);
    assert_eq!(rope.inv_freq(65), [1.0, 0.028571429, 0.0011111111, 5e-5]);
    assert!((rope.attention_factor() - 1.1547005383792517).abs() < 1e-15);
    // the names that early files used
    assert_eq!(phi3("su"), rope);
    assert_eq!(phi3("yarn"), rope);
}

#[test]
fn part_of_a_head() {
    let config = json!({"rope_parameters": {"rope_theta": 1e6}});
    let glm = try_read(config, 16, 128, &GLM).expect("valid").0;
    assert_eq!(glm.dim, 8);
    assert_eq!(glm.inv_freq(1), [1.0, 0.031_622_78, 0.001, 3.162_277_4e-5]);
    for (config, part) in [
        (json!({"partial_rotary_factor": 0.3}), "partial_rotary_factor: 0.3 of a head of 10 elements is 3 that turn"),
        (json!({"partial_rotary_factor": 2.0}), "is 20 that turn"),
        (json!({"rope_parameters": {"partial_rotary_factor": -1}}), "rope_parameters: partial_rotary_factor -1"),
        (
            json!({"partial_rotary_factor": 0.2, "rope_scaling": {"partial_rotary_factor": 1.0}}),
            "partial_rotary_factor 1.0 contradicts partial_rotary_factor, which says 0.2",
        ),
    ] {
        let found = try_read(config, 10, 128, &GLM).expect_err("must be refused").to_string();
        assert!(found.contains(part), "{found}");
    }
    assert!(message(json!({"partial_rotary_factor": 0.5})).contains("0.5 is not supported with this model_type"));
}

#[test]
fn windowed_layers_have_their_own() {
    let read = |config| try_read(config, 8, 128, &GEMMA);
    let old = json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 10000});
    let (full, sliding) = read(old).expect("valid");
    assert_eq!(full.inv_freq(1), [0.125, 0.0039528473, 0.000125, 3.952_847e-6]);
    assert_eq!(sliding.as_ref().expect("its own").inv_freq(1), [1.0, 0.1, 0.01, 0.001]);
    let new = json!({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                         "sliding_attention": null}});
    assert_eq!(read(new).expect("valid"), (full, sliding));

    for (config, part) in [
        (json!({"rope_parameters": {"rope_theta": 5e4}}), "rope_parameters: expected one object per layer type"),
        (
            json!({"rope_parameters": {"full_attention": {}, "rope_theta": 5e4}}),
            "rope_theta 50000.0 is not supported beside the layer types",
        ),
        (
            json!({"rope_theta": 2e4, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
            "rope_parameters.full_attention: rope_theta 10000.0 contradicts rope_theta, which says 20000.0",
        ),
        (
            json!({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0, "truncate": false}}}),
            "truncate false is not supported",
        ),
        (json!({"rope_parameters": {"sliding_attention": 3}}), "expected an object, found 3"),
    ] {
        let found = read(config).expect_err("must be refused").to_string();
        assert!(found.contains(part), "{found}");
    }
    assert!(message(json!({"rope_parameters": {"full_attention": {}}})).contains("is not supported here"));
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    let long = |short: Value| json!({"rope_scaling": {"rope_type": "longrope", "short_factor": short, "long_factor": [1, 1, 1, 1]}});
    let scaling = |value: Value| json!({"rope_scaling": value});
    for (config, part) in [
        (json!({"rope_theta": 1}), "rope_theta: expected a base above 1, found 1"),
        (json!({"rope_theta": "big"}), "rope_theta: expected a number, found \"big\""),
        (json!({"rope_theta": 2e4, "rope_scaling": {"rope_theta": 1e4}}), "contradicts rope_theta, which says 20000.0"),
        (json!({"rope_parameters": 3}), "expected an object, found 3"),
        (
            scaling(json!({"rope_type": "ntk", "factor": 2})),
            "rope_type \"ntk\" is not supported; supported: default, linear, dynamic, yarn, llama3, longrope",
        ),
        (scaling(json!({"type": "mrope", "mrope_section": [1, 1]})), "\"mrope\" is not supported"),
        (
            scaling(json!({"rope_type": "linear", "type": "dynamic"})),
            "type \"dynamic\" contradicts rope_type \"linear\"",
        ),
        (scaling(json!({"rope_type": 7})), "rope_type: expected a name, found 7"),
        (scaling(json!({"factor": 4.0})), "factor 4.0 is not supported with rope_type default"),
        (
            scaling(json!({"rope_type": "linear", "factor": 2, "beta": 1})),
            "beta 1 is not supported with rope_type linear",
        ),
        (
            scaling(json!({"rope_type": "linear"})),
            "factor must be a number above 0 with rope_type linear, found nothing",
        ),
        (scaling(json!({"rope_type": "dynamic", "factor": -1})), "above 0 with rope_type dynamic, found -1"),
        (scaling(json!({"rope_type": "yarn", "factor": "4"})), "factor: expected a number, found \"4\""),
        (scaling(json!({"rope_type": "yarn", "truncate": null})), "truncate: expected true or false, found null"),
        (
            scaling(json!({"rope_type": "yarn", "factor": 1e300, "mscale": 1e308, "mscale_all_dim": 1})),
            "give a number above 0 as attention_factor",
        ),
        (
            json!({"original_max_position_embeddings": 64,
                   "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32}}),
            "original_max_position_embeddings 32.0 contradicts original_max_position_embeddings, which says 64.0",
        ),
        (
            scaling(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
            "low_freq_factor 4 must be below high_freq_factor 4",
        ),
        (long(json!([1, 1, 1])), "short_factor: expected 4 numbers, one per pair of the 8 elements that turn, found 3"),
        (long(json!([1, 1, 0, 1])), "short_factor: expected numbers above 0, found 0"),
        (long(json!(1)), "short_factor: expected a list of 4 numbers, found 1"),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}),
            "contradicts rope_scaling",
        ),
    ] {
        let found = message(config);
        assert!(found.contains(part), "{found}");
    }
    let two = json!({"rope_scaling": {"type": "dynamic", "factor": 2}});
    assert!(try_read(two, 2, 128, &LLAMA).expect_err("refused").to_string().contains("at least 4 elements that turn"));
    // what changes nothing
    rope(json!({"rope_theta": null, "rope_scaling": {"type": "default", "factor": 1.0, "beta_fast": null}}), 8, 128);
    rope(
        json!({"rope_scaling": {"type": "dynamic", "factor": 2, "original_max_position_embeddings": 128},
                "original_max_position_embeddings": 64}),
        8,
        128,
    );
}

/// A model with these rotary keys.
fn model(model_type: &str, rotary: Value) -> Value {
    let mut config = json!({"model_type": model_type, "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                            "intermediate_size": 16, "max_position_embeddings": 128});
    config.as_object_mut().expect("an object").extend(rotary.as_object().expect("an object").clone());
    config
}

fn extended(spec: &str, mut config: Value) -> Result<Value> {
    extend(&mut config, &spec.parse().expect("a specification"), Path::new("config.json"))?;
    Ok(config)
}

#[test]
fn longer_contexts() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
    let mut yarn_with_theta = yarn.clone();
    yarn_with_theta["rope_theta"] = json!(5e5);
    for (spec, model_type, before, after) in [
        // the spelling of transformers 4
        (
            "yarn:4",
            "llama",
            json!({"rope_theta": 500000, "rope_scaling": null}),
            json!({"rope_theta": 500000, "rope_scaling": yarn, "max_position_embeddings": 512}),
        ),
        (
            "linear:2.5",
            "llama",
            json!({}),
            json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.5},
                   "max_position_embeddings": 320}),
        ),
        (
            "ntk:8",
            "llama",
            json!({"rope_scaling": {"type": "default", "rope_theta": 1e4}}),
            json!({"rope_theta": 160000.0, "rope_scaling": {"rope_type": "default", "rope_theta": 160000.0},
                   "max_position_embeddings": 1024}),
        ),
        // that of 5, and both
        (
            "dynamic:2.3",
            "qwen3",
            json!({"rope_parameters": {"type": "default", "rope_theta": 5e5}}),
            json!({"rope_parameters": {"rope_type": "dynamic", "factor": 2.3, "rope_theta": 5e5}}),
        ),
        (
            "yarn:4",
            "llama",
            json!({"rope_theta": 5e5, "rope_scaling": null, "rope_parameters": {"rope_theta": 5e5}}),
            json!({"rope_theta": 5e5, "rope_scaling": yarn_with_theta, "rope_parameters": yarn_with_theta,
                   "max_position_embeddings": 512}),
        ),
        (
            "ntk:8",
            "phi3",
            json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
            json!({"rope_theta": 160000.0, "rope_parameters": {"rope_theta": 160000.0, "rope_type": "default"},
                   "max_position_embeddings": 1024}),
        ),
        // only the layers with full attention
        (
            "yarn:4",
            "gemma3_text",
            json!({"rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}}}),
            json!({"rope_parameters": {"full_attention": yarn_with_theta, "sliding_attention": {"rope_theta": 1e4}},
                   "max_position_embeddings": 512}),
        ),
        (
            "linear:8",
            "gemma3_text",
            json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
            json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 1024,
                   "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ),
    ] {
        let found = extended(spec, model(model_type, before)).expect("can be extended");
        let close = |place: &mut Value| {
            // 8^(4/3) is 16 but for rounding
            if let Some(x) = place.as_f64() {
                *place = json!((x * 1e6).round() / 1e6);
            }
        };
        let mut rounded = found.clone();
        for pointer in ["/rope_theta", "/rope_scaling/rope_theta", "/rope_parameters/rope_theta"] {
            rounded.pointer_mut(pointer).filter(|_| spec.starts_with("ntk")).map(close);
        }
        assert_eq!(rounded, model(model_type, after), "{spec}");
        ModelConfig::from_value(&found, Path::new("config.json")).expect("still a configuration");
    }
}

#[test]
fn what_cannot_be_longer() {
    for (spec, model_type, rotary, part) in [
        ("yarn:4", "llama", json!({"rope_scaling": {"type": "linear", "factor": 2}}), "is scaled already (linear)"),
        ("yarn:1.01", "llama", json!({}), "128 × 1.01 must be a whole number of tokens"),
        ("linear:1e9", "llama", json!({}), "must be a whole number of tokens up to 2147483647"),
        ("yarn:4", "phi3", json!({}), "transformers reads no such scaling with phi3"),
        ("ntk:4", "llama", json!({"head_dim": 2}), "at least 4 elements that turn, found 2"),
        ("yarn:4", "llama", json!({"vocab_size": 0}), "vocab_size"),
    ] {
        let found = extended(spec, model(model_type, rotary)).expect_err("must be refused").to_string();
        assert!(found.contains(part), "{found}");
    }
    for text in ["yarn", "yarn:", "yarn:1", "yarn:inf", "yarn:NaN", "rope:4", "linear:-2", ""] {
        let found = text.parse::<RopeExtension>().expect_err("must be refused");
        assert!(found.contains("linear, dynamic, yarn, ntk") && found.contains(&format!("`{text}`")), "{found}");
    }
}
