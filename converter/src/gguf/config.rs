//! The model's configuration, from GGUF metadata to the form of a Hugging Face `config.json`.

use serde_json::{Map, Value as Json, json};

use super::metadata::{Metadata, Value};
use super::{GgufFile, ROPE_FACTORS, TensorType};
use crate::error::Error;

/// Keys of the architecture that are read or have no effect on the result. Any other is an error, because it may
/// change the result.
const KNOWN: [&str; 24] = [
    "llama.attention.causal",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.attention.value_length",
    "llama.block_count",
    "llama.context_length",
    "llama.embedding_length",
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.feed_forward_length",
    "llama.rope.dimension_count",
    "llama.rope.freq_base",
    "llama.rope.scale_linear",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.factor",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "llama.rope.scaling.type",
    "llama.tensor_data_layout",
    "llama.use_parallel_residual",
    "llama.vocab_size",
    "llama.attention.sliding_window",
];

/// Numbers of attention heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) key_value: usize,
}

impl Heads {
    pub(super) fn read(metadata: &Metadata) -> Result<Self, Error> {
        const QUERY: &str = "llama.attention.head_count";
        const KEY_VALUE: &str = "llama.attention.head_count_kv";
        let query = size_in_all_layers(metadata, QUERY)?.ok_or_else(|| metadata.missing(QUERY))?;
        let key_value = size_in_all_layers(metadata, KEY_VALUE)?.unwrap_or(query);
        Ok(Self { query, key_value })
    }
}

/// A positive size.
fn size(metadata: &Metadata, key: &str) -> Result<Option<usize>, Error> {
    match metadata.u32(key)? {
        Some(0) => Err(Error::config(&metadata.path, key, "must be positive, found 0")),
        found => Ok(found.map(|size| size as usize)),
    }
}

/// A positive size that may be given per layer, if it is the same in all of them.
fn size_in_all_layers(metadata: &Metadata, key: &str) -> Result<Option<usize>, Error> {
    let Some(Value::Array(layers)) = metadata.get(key) else { return size(metadata, key) };
    let differ = || Error::config(&metadata.path, key, "must be the same positive number in all layers");
    let first = layers.first().and_then(Value::as_u64).filter(|&size| size > 0).ok_or_else(differ)?;
    if layers.iter().any(|layer| layer.as_u64() != Some(first)) {
        return Err(differ());
    }
    u32::try_from(first).map(|size| Some(size as usize)).map_err(|_| differ())
}

fn required(metadata: &Metadata, key: &str) -> Result<usize, Error> {
    size(metadata, key)?.ok_or_else(|| metadata.missing(key))
}

/// See [`GgufFile::hf_config`].
pub(super) fn hf_config(file: &GgufFile) -> Result<Json, Error> {
    let metadata = file.metadata();
    refuse_unsupported(metadata)?;

    let heads = Heads::read(metadata)?;
    let d_model = required(metadata, "llama.embedding_length")?;
    let head_dim = head_dim(metadata, d_model, heads)?;
    let vocab_size = match size(metadata, "llama.vocab_size")? {
        Some(size) => size,
        None => file
            .tensor("model.embed_tokens.weight")
            .map(|embedding| embedding.shape()[0])
            .ok_or_else(|| metadata.missing("llama.vocab_size"))?,
    };
    let eps = metadata
        .f64("llama.attention.layer_norm_rms_epsilon")?
        .ok_or_else(|| metadata.missing("llama.attention.layer_norm_rms_epsilon"))?;
    let theta = metadata.f64("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let scaling = rope_scaling(file, theta, head_dim)?;

    let mut rope_parameters = json!({ "rope_theta": theta, "rope_type": "default" });
    if let (Some(parameters), Some(scaling)) = (rope_parameters.as_object_mut(), &scaling) {
        parameters.extend(scaling.clone());
    }
    let has = |hf_name: &str| file.tensor(hf_name).is_some();
    let dtype = dtype(file);
    Ok(json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": has("model.layers.0.self_attn.q_proj.bias"),
        "attention_dropout": 0.0,
        "bos_token_id": metadata.u32("tokenizer.ggml.bos_token_id")?,
        "dtype": dtype,
        "eos_token_id": metadata.u32("tokenizer.ggml.eos_token_id")?,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": d_model,
        "initializer_range": 0.02,
        "intermediate_size": size_in_all_layers(metadata, "llama.feed_forward_length")?
            .ok_or_else(|| metadata.missing("llama.feed_forward_length"))?,
        "max_position_embeddings": required(metadata, "llama.context_length")?,
        "mlp_bias": has("model.layers.0.mlp.gate_proj.bias"),
        "model_type": "llama",
        "num_attention_heads": heads.query,
        "num_hidden_layers": required(metadata, "llama.block_count")?,
        "num_key_value_heads": heads.key_value,
        "pad_token_id": metadata.u32("tokenizer.ggml.padding_token_id")?,
        "pretraining_tp": 1,
        "rms_norm_eps": six_digits(eps),
        "rope_parameters": rope_parameters,
        "rope_scaling": scaling,
        "rope_theta": theta,
        "tie_word_embeddings": !has("lm_head.weight"),
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": vocab_size,
    }))
}

/// A float32 of the file as the short decimal number that it was made from: 9.99999974e-06 was 1e-05.
fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// The type that holds the matrices without loss; bfloat16 for quantized ones, whose values have no better home.
fn dtype(file: &GgufFile) -> &'static str {
    let matrices = || file.tensors().iter().filter(|tensor| tensor.shape().len() > 1).map(|tensor| tensor.kind());
    if matrices().any(TensorType::is_quantized) || matrices().all(|kind| kind == TensorType::Bf16) {
        "bfloat16"
    } else if matrices().all(|kind| kind == TensorType::F16) {
        "float16"
    } else {
        "float32"
    }
}

/// Metadata of the architecture with a meaning that is not implemented.
fn refuse_unsupported(metadata: &Metadata) -> Result<(), Error> {
    let refuse = |key: &str, what: String| Err(Error::config(&metadata.path, key, what));
    for (key, _) in metadata.iter() {
        if key.starts_with("llama.") && !KNOWN.contains(&key) {
            return refuse(
                key,
                format!("may change the result and is not supported; known keys are {}", KNOWN.join(", ")),
            );
        }
    }
    for key in ["llama.expert_count", "llama.expert_used_count", "llama.attention.sliding_window"] {
        if let Some(count @ 1..) = metadata.u64(key)? {
            return refuse(key, format!("is {count}; only 0 is supported"));
        }
    }
    for (key, required) in [("llama.attention.causal", true), ("llama.use_parallel_residual", false)] {
        if metadata.bool(key)?.is_some_and(|found| found != required) {
            return refuse(key, format!("only {required} is supported"));
        }
    }
    Ok(())
}

fn head_dim(metadata: &Metadata, d_model: usize, heads: Heads) -> Result<usize, Error> {
    const KEY: &str = "llama.attention.key_length";
    let head_dim = match size(metadata, KEY)? {
        Some(size) => size,
        None if d_model.is_multiple_of(heads.query) => d_model / heads.query,
        None => {
            let what = format!(
                "is absent, and llama.embedding_length {d_model} is not a multiple of llama.attention.head_count {}",
                heads.query
            );
            return Err(Error::config(&metadata.path, KEY, what));
        }
    };
    // Values as wide as keys, and all of a head rotated, is what the architecture does elsewhere.
    for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if let Some(found) = size(metadata, key)?.filter(|&found| found != head_dim) {
            let what = format!("must be the head size {head_dim}, found {found}");
            return Err(Error::config(&metadata.path, key, what));
        }
    }
    Ok(head_dim)
}

/// `rope_scaling` in Hugging Face's form; `None` for the plain rotary embedding.
fn rope_scaling(file: &GgufFile, theta: f64, head_dim: usize) -> Result<Option<Map<String, Json>>, Error> {
    const TYPE: &str = "llama.rope.scaling.type";
    let metadata = file.metadata();
    let linear = linear_factor(metadata)?;
    let attn_factor = "llama.rope.scaling.attn_factor";
    if let Some(found) = metadata.f64(attn_factor)?.filter(|&found| found != 1.0) {
        return Err(Error::config(&metadata.path, attn_factor, format!("is {found}; only 1 is supported")));
    }
    match (linear, file.rope_factors()?) {
        (Some(_), Some(_)) => Err(Error::config(
            &metadata.path,
            TYPE,
            format!("is linear and the tensor {ROPE_FACTORS} exists; only one can be"),
        )),
        (Some(factor), None) => Ok(object(json!({ "rope_type": "linear", "factor": factor }))),
        (None, Some(factors)) => {
            llama3(&factors, theta, head_dim).map_err(|what| Error::tensor(&metadata.path, ROPE_FACTORS, what))
        }
        (None, None) => Ok(None),
    }
}

/// The factor by which positions are divided, if they are.
fn linear_factor(metadata: &Metadata) -> Result<Option<f64>, Error> {
    const TYPE: &str = "llama.rope.scaling.type";
    const FACTOR: &str = "llama.rope.scaling.factor";
    // Before there was a type, files had the factor alone.
    const OLD_FACTOR: &str = "llama.rope.scale_linear";
    let old = metadata.f64(OLD_FACTOR)?;
    let (key, factor) = match metadata.str(TYPE)? {
        Some("none") => return Ok(None),
        Some("linear") => (FACTOR, metadata.f64(FACTOR)?.or(old).ok_or_else(|| metadata.missing(FACTOR))?),
        Some(other) => {
            let what = format!("is `{other}`; `none` and `linear` are supported, and the llama3 factors");
            return Err(Error::config(&metadata.path, TYPE, what));
        }
        None => match old {
            Some(factor) => (OLD_FACTOR, factor),
            None => return Ok(None),
        },
    };
    if factor <= 0.0 {
        return Err(Error::config(&metadata.path, key, format!("must be positive, found {factor}")));
    }
    Ok((factor != 1.0).then_some(factor))
}

fn object(value: Json) -> Option<Map<String, Json>> {
    if let Json::Object(map) = value { Some(map) } else { None }
}

/// The parameters of Llama 3.1's rotary scaling from the divisors of the frequencies, which is all that a GGUF keeps
/// of them.
///
/// Only Llama 3's own parameters (low 1, high 4, original context 8192, any factor) are recognized, and only if they
/// give the divisors of the file to within the rounding of float32 powers.
fn llama3(factors: &[f32], theta: f64, head_dim: usize) -> Result<Option<Map<String, Json>>, String> {
    const TOLERANCE: f64 = 1e-5;
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL: f64 = 8192.0;
    if factors.len() != head_dim / 2 {
        return Err(format!("must have {} elements, half the head size, found {}", head_dim / 2, factors.len()));
    }
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(None);
    }
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    for (i, &found) in factors.iter().enumerate() {
        let frequency = theta.powf(-((2 * i) as f64) / head_dim as f64);
        let wavelength = 2.0 * std::f64::consts::PI / frequency;
        let expected = if wavelength < ORIGINAL / HIGH {
            1.0
        } else if wavelength > ORIGINAL / LOW {
            factor
        } else {
            let smooth = (ORIGINAL / wavelength - LOW) / (HIGH - LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        };
        let close = (f64::from(found) - expected).abs() <= TOLERANCE * expected;
        if !close {
            return Err(format!(
                "has {found} at {i}, where llama3 scaling with factor {factor}, low_freq_factor {LOW}, \
                 high_freq_factor {HIGH} and original_max_position_embeddings {ORIGINAL} has {expected}; other \
                 scalings are not supported"
            ));
        }
    }
    Ok(object(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL as u64,
    })))
}
