//! The model's configuration, from GGUF metadata to the form of a Hugging Face `config.json`.
//!
//! What a GGUF file does not say (which layers see a window, by what queries are scaled) is what llama.cpp assumes for
//! the architecture.

use std::ops::Range;

use serde_json::{Map, Value as Json, json};

use super::arch::Architecture;
use super::metadata::{Metadata, Value};
use super::{GgufFile, ROPE_FACTORS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT, TensorType};
use crate::error::Error;

/// Metadata of every architecture that is read or has no effect on the result, without the architecture's name. What is
/// neither here nor among the architecture's own is an error, because it may change the result.
pub(super) const COMMON: [&str; 26] = [
    "attention.causal",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "use_parallel_residual",
    "vocab_size",
];

/// Of [`COMMON`], those that only some architectures know; where it is not among the others' own keys it must be 0.
const MUST_BE_ZERO: [&str; 3] = ["attention.sliding_window", "expert_count", "expert_used_count"];

/// Metadata under the architecture's name.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) metadata: &'a Metadata,
    pub(super) architecture: &'static Architecture,
}

impl<'a> Keys<'a> {
    /// The full name of a key.
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture.name)
    }

    fn error(&self, key: &str, what: impl Into<String>) -> Error {
        Error::config(&self.metadata.path, self.full(key), what)
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, Error> {
        value.ok_or_else(|| self.metadata.missing(&self.full(key)))
    }

    fn f64(&self, key: &str) -> Result<Option<f64>, Error> {
        self.metadata.f64(&self.full(key))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.metadata.bool(&self.full(key))
    }

    /// A count, which may be 0.
    fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        Ok(self.metadata.u32(&self.full(key))?.map(|count| count as usize))
    }

    /// A positive size.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, Error> {
        match self.count(key)? {
            Some(0) => Err(self.error(key, "must be positive, found 0")),
            found => Ok(found),
        }
    }

    fn required_size(&self, key: &str) -> Result<usize, Error> {
        self.required(key, self.size(key)?)
    }

    /// A positive size that may be given per layer, if it is the same in all of them.
    fn size_in_all_layers(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some(Value::Array(layers)) = self.metadata.get(&self.full(key)) else { return self.size(key) };
        let differ = || self.error(key, "must be the same positive number in all layers");
        let first = layers.first().and_then(Value::as_u64).filter(|&size| size > 0).ok_or_else(differ)?;
        if layers.iter().any(|layer| layer.as_u64() != Some(first)) {
            return Err(differ());
        }
        u32::try_from(first).map(|size| Some(size as usize)).map_err(|_| differ())
    }

    /// How many layers there are.
    pub(super) fn layers(&self) -> Result<Layers, Error> {
        let all = self.required_size("block_count")?;
        let drafting = match self.architecture.keys.contains(&"nextn_predict_layers") {
            true => self.count("nextn_predict_layers")?.unwrap_or(0),
            false => 0,
        };
        if drafting >= all {
            return Err(
                self.error("nextn_predict_layers", format!("must be less than the {all} blocks, found {drafting}"))
            );
        }
        Ok(Layers { decoder: all - drafting, all })
    }

    /// Refuses metadata of the architecture with a meaning that is not implemented.
    fn refuse_unsupported(&self) -> Result<(), Error> {
        let own = self.architecture.keys;
        let prefix = self.full("");
        for key in self.metadata.iter().filter_map(|(key, _)| key.strip_prefix(&prefix)) {
            if !COMMON.contains(&key) && !own.contains(&key) {
                let known: Vec<&str> = COMMON.iter().chain(own).copied().collect();
                let what = format!("may change the result and is not supported; known are {}", known.join(", "));
                return Err(self.error(key, what));
            }
        }
        for key in MUST_BE_ZERO.into_iter().filter(|key| !own.contains(key)) {
            if let Some(count @ 1..) = self.count(key)? {
                return Err(self.error(key, format!("is {count}; only 0 is supported")));
            }
        }
        for (key, required) in [("attention.causal", true), ("use_parallel_residual", false)] {
            if self.bool(key)?.is_some_and(|found| found != required) {
                return Err(self.error(key, format!("only {required} is supported")));
            }
        }
        Ok(())
    }
}

/// Numbers of layers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layers {
    /// Those of the decoder, which come first.
    decoder: usize,
    /// With those that only draft further tokens.
    all: usize,
}

impl Layers {
    /// The layers that only draft further tokens (multi-token prediction); transformers leaves them out, too.
    pub(super) fn drafting(self) -> Range<usize> {
        self.decoder..self.all
    }
}

/// Numbers of attention heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) key_value: usize,
}

impl Heads {
    pub(super) fn read(keys: &Keys<'_>) -> Result<Self, Error> {
        const QUERY: &str = "attention.head_count";
        let query = keys.required(QUERY, keys.size_in_all_layers(QUERY)?)?;
        let key_value = keys.size_in_all_layers("attention.head_count_kv")?.unwrap_or(query);
        Ok(Self { query, key_value })
    }
}

/// What the families' own parts of the configuration are made from.
pub(super) struct Model<'a> {
    file: &'a GgufFile,
    keys: Keys<'a>,
    layers: usize,
    d_model: usize,
    heads: Heads,
    head_dim: usize,
    rope: Rope,
}

/// The rotary embedding in Hugging Face's form.
struct Rope {
    theta: f64,
    /// All but theta; `None` for the plain one.
    scaling: Option<Map<String, Json>>,
}

/// The keys that only some families have, or that have another value there.
pub(super) type Family = fn(&Model<'_>) -> Result<Json, Error>;

/// See [`GgufFile::hf_config`].
pub(super) fn hf_config(file: &GgufFile) -> Result<Json, Error> {
    let (keys, metadata) = (file.keys(), file.metadata());
    keys.refuse_unsupported()?;

    let heads = Heads::read(&keys)?;
    let d_model = keys.required_size("embedding_length")?;
    let head_dim = head_dim(&keys, d_model, heads)?;
    let vocab_size = match (keys.size("vocab_size")?, file.tensor("model.embed_tokens.weight")) {
        (Some(size), _) => size,
        (None, Some(embedding)) => embedding.shape()[0],
        (None, None) => return Err(metadata.missing(&keys.full("vocab_size"))),
    };
    const EPS: &str = "attention.layer_norm_rms_epsilon";
    let eps = keys.required(EPS, keys.f64(EPS)?)?;
    let d_ff = keys.required("feed_forward_length", keys.size_in_all_layers("feed_forward_length")?)?;
    let rope = Rope::read(file, &keys, head_dim)?;
    let layers = keys.layers()?.decoder;
    let dtype = dtype(file);

    let mut config = object(json!({
        "architectures": [file.architecture.class],
        "attention_dropout": 0.0,
        "bos_token_id": metadata.u32("tokenizer.ggml.bos_token_id")?,
        "dtype": dtype,
        "eos_token_id": metadata.u32("tokenizer.ggml.eos_token_id")?,
        "head_dim": head_dim,
        "hidden_size": d_model,
        "initializer_range": 0.02,
        "intermediate_size": d_ff,
        "max_position_embeddings": keys.required_size("context_length")?,
        "model_type": file.architecture.model_type,
        "num_attention_heads": heads.query,
        "num_hidden_layers": layers,
        "num_key_value_heads": heads.key_value,
        "pad_token_id": metadata.u32("tokenizer.ggml.padding_token_id")?,
        "rms_norm_eps": six_digits(eps),
        "rope_parameters": rope.parameters(),
        "rope_scaling": rope.scaling,
        "rope_theta": rope.theta,
        "tie_word_embeddings": file.tensor("lm_head.weight").is_none(),
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": vocab_size,
    }));
    let model = Model { file, keys, layers, d_model, heads, head_dim, rope };
    config.extend(object((file.architecture.config)(&model)?));
    if !config.contains_key("hidden_activation") {
        config.insert("hidden_act".to_owned(), "silu".into());
    }
    config.sort_keys();
    Ok(Json::Object(config))
}

/// The members of a JSON object.
fn object(value: Json) -> Map<String, Json> {
    if let Json::Object(map) = value { map } else { Map::new() }
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

fn head_dim(keys: &Keys<'_>, d_model: usize, heads: Heads) -> Result<usize, Error> {
    const KEY: &str = "attention.key_length";
    let head_dim = match keys.size(KEY)? {
        Some(size) => size,
        None if d_model.is_multiple_of(heads.query) => d_model / heads.query,
        None => {
            let (embedding, query) = (keys.full("embedding_length"), keys.full("attention.head_count"));
            let what = format!("is absent, and {embedding} {d_model} is not a multiple of {query} {}", heads.query);
            return Err(keys.error(KEY, what));
        }
    };
    const VALUES: &str = "attention.value_length";
    if let Some(found) = keys.size(VALUES)?.filter(|&found| found != head_dim) {
        return Err(keys.error(VALUES, format!("must be the head size {head_dim}, found {found}")));
    }
    Ok(head_dim)
}

impl Rope {
    fn read(file: &GgufFile, keys: &Keys<'_>, head_dim: usize) -> Result<Rope, Error> {
        const ROTATED: &str = "rope.dimension_count";
        let rotated = keys.size(ROTATED)?.unwrap_or(head_dim);
        let partial = keys.architecture.partial_rotary;
        if rotated > head_dim || rotated != head_dim && !partial {
            return Err(keys.error(ROTATED, format!("must be the head size {head_dim}, found {rotated}")));
        }
        let theta = keys.f64("rope.freq_base")?.unwrap_or(10_000.0);
        let mut scaling = scaling(file, keys, theta, rotated)?;
        if partial {
            let scaling = scaling.get_or_insert_with(|| object(json!({ "rope_type": "default" })));
            scaling.insert("partial_rotary_factor".to_owned(), (rotated as f64 / head_dim as f64).into());
        }
        Ok(Rope { theta, scaling })
    }

    /// `rope_parameters`.
    fn parameters(&self) -> Map<String, Json> {
        let mut parameters = object(json!({ "rope_theta": self.theta, "rope_type": "default" }));
        parameters.extend(self.scaling.clone().unwrap_or_default());
        parameters
    }
}

/// `rope_scaling` in Hugging Face's form; `None` for the plain rotary embedding. Of each head, `rotated` elements rotate.
fn scaling(file: &GgufFile, keys: &Keys<'_>, theta: f64, rotated: usize) -> Result<Option<Map<String, Json>>, Error> {
    const TYPE: &str = "rope.scaling.type";
    let path = &keys.metadata.path;
    let declared = declared_scaling(keys)?;
    let [llama3_factors, long, short] =
        [ROPE_FACTORS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT].map(|name| file.rope_factors(name));
    let (llama3_factors, long, short) = (llama3_factors?, long?, short?);
    for (name, factors) in [(ROPE_FACTORS, &llama3_factors), (ROPE_FACTORS_LONG, &long), (ROPE_FACTORS_SHORT, &short)] {
        let Some(factors) = factors else { continue };
        if declared.is_some() {
            let what = format!("exists, and {} asks for another scaling; only one can be", keys.full(TYPE));
            return Err(Error::tensor(path, name, what));
        }
        if factors.len() != rotated / 2 {
            let what = format!("must have {} elements, half of what rotates, found {}", rotated / 2, factors.len());
            return Err(Error::tensor(path, name, what));
        }
    }
    const ATTENTION: &str = "rope.scaling.attn_factor";
    let attention_factor = keys.f64(ATTENTION)?.unwrap_or(1.0);
    if let (Some(long), Some(short)) = (&long, &short) {
        return longrope(keys, long, short, attention_factor).map(Some);
    }
    if attention_factor != 1.0 {
        return Err(keys.error(ATTENTION, format!("is {attention_factor}; only 1 is supported")));
    }
    match (declared, llama3_factors) {
        (Some(declared), _) => Ok(Some(declared)),
        (None, Some(factors)) => {
            llama3(&factors, theta, rotated).map_err(|what| Error::tensor(path, ROPE_FACTORS, what))
        }
        (None, None) => Ok(None),
    }
}

/// The scaling that metadata names: positions divided by a factor, or YaRN.
fn declared_scaling(keys: &Keys<'_>) -> Result<Option<Map<String, Json>>, Error> {
    const TYPE: &str = "rope.scaling.type";
    const FACTOR: &str = "rope.scaling.factor";
    // Before there was a type, files had the factor alone.
    const OLD_FACTOR: &str = "rope.scale_linear";
    const ORIGINAL: &str = "rope.scaling.original_context_length";
    let old = keys.f64(OLD_FACTOR)?;
    let name = keys.metadata.str(&keys.full(TYPE))?;
    let (key, factor) = match name {
        Some("none" | "longrope") => return Ok(None),
        Some("linear") => (FACTOR, keys.required(FACTOR, keys.f64(FACTOR)?.or(old))?),
        Some("yarn") => (FACTOR, keys.required(FACTOR, keys.f64(FACTOR)?)?),
        Some(other) => {
            let what =
                format!("is `{other}`; `none`, `linear`, `yarn` and `longrope` are supported, and the llama3 factors");
            return Err(keys.error(TYPE, what));
        }
        None => match old {
            Some(factor) => (OLD_FACTOR, factor),
            None => return Ok(None),
        },
    };
    if factor <= 0.0 {
        return Err(keys.error(key, format!("must be positive, found {factor}")));
    }
    if name != Some("yarn") {
        return Ok((factor != 1.0).then(|| object(json!({ "rope_type": "linear", "factor": factor }))));
    }
    let mut yarn = object(json!({
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.required_size(ORIGINAL)?,
    }));
    for (key, hf) in [("rope.scaling.yarn_beta_fast", "beta_fast"), ("rope.scaling.yarn_beta_slow", "beta_slow")] {
        if let Some(beta) = keys.f64(key)? {
            yarn.insert(hf.to_owned(), six_digits(beta).into());
        }
    }
    Ok(Some(yarn))
}

/// LongRoPE's parameters: divisors of the frequencies up to the original context, and beyond it.
///
/// Attention is scaled by the factor that transformers computes from the two contexts; one that differs is written down.
fn longrope(keys: &Keys<'_>, long: &[f32], short: &[f32], attention_factor: f64) -> Result<Map<String, Json>, Error> {
    const TOLERANCE: f64 = 1e-5;
    let context = keys.required_size("context_length")? as f64;
    let original = keys.required_size("rope.scaling.original_context_length")?;
    let scale = context / original as f64;
    let usual = if scale > 1.0 { (1.0 + scale.ln() / (original as f64).ln()).sqrt() } else { 1.0 };
    let mut parameters = object(json!({
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }));
    if (attention_factor - usual).abs() > TOLERANCE * usual {
        parameters.insert("attention_factor".to_owned(), attention_factor.into());
    }
    Ok(parameters)
}

/// The parameters of Llama 3.1's rotary scaling from the divisors of the frequencies, which is all that a GGUF keeps
/// of them.
///
/// Only Llama 3's own parameters (low 1, high 4, original context 8192, any factor) are recognized, and only if they
/// give the divisors of the file to within the rounding of float32 powers.
fn llama3(factors: &[f32], theta: f64, rotated: usize) -> Result<Option<Map<String, Json>>, String> {
    const TOLERANCE: f64 = 1e-5;
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    const ORIGINAL: f64 = 8192.0;
    if factors.iter().all(|&factor| factor == 1.0) {
        return Ok(None);
    }
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    for (i, &found) in factors.iter().enumerate() {
        let frequency = theta.powf(-((2 * i) as f64) / rotated as f64);
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
    Ok(Some(object(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL as u64,
    }))))
}

impl Model<'_> {
    /// Whether the file has this tensor in its first layer.
    fn has(&self, part: &str) -> bool {
        self.file.tensor(&format!("model.layers.0.{part}")).is_some()
    }

    /// Rows of the first tensor of this part, whatever its layer.
    fn rows_of(&self, part: &str) -> Option<usize> {
        let tensors = self.file.tensors().iter();
        tensors.filter(|tensor| tensor.hf_name().ends_with(part)).map(|tensor| tensor.shape()[0]).next()
    }

    /// The width that `key` gives or, in files that are older than the key, the tensors do.
    fn width(&self, key: &str, part: &str) -> Result<usize, Error> {
        self.keys.required(key, self.keys.size(key)?.or_else(|| self.rows_of(part)))
    }

    /// The number of experts and how many of them a token takes. `gating` is the function of the family's router, as
    /// GGUF numbers them: 1 softmax, 2 sigmoid.
    fn experts(&self, gating: usize) -> Result<(usize, usize), Error> {
        const GATING: &str = "expert_gating_func";
        if let Some(found) = self.keys.count(GATING)?.filter(|&found| found != gating) {
            return Err(self.keys.error(GATING, format!("is {found}; only {gating} is supported")));
        }
        Ok((self.keys.required_size("expert_count")?, self.keys.required_size("expert_used_count")?))
    }

    /// `layer_types`: full attention in every `period`-th layer, if the file does not say otherwise.
    fn layer_types(&self, period: usize) -> Result<Vec<&'static str>, Error> {
        const PATTERN: &str = "attention.sliding_window_pattern";
        let every = |period: usize| (1..=self.layers).map(|layer| !layer.is_multiple_of(period)).collect();
        let windowed: Vec<bool> = match self.keys.metadata.get(&self.keys.full(PATTERN)) {
            Some(Value::Array(layers)) => {
                let flags = layers.iter().map(Value::as_bool).collect::<Option<Vec<bool>>>();
                let flags = flags.filter(|flags| flags.len() == self.layers);
                let what = || format!("must be a number, or true or false for each of {} layers", self.layers);
                flags.ok_or_else(|| self.keys.error(PATTERN, what()))?
            }
            Some(_) => every(self.keys.required_size(PATTERN)?),
            None => every(period),
        };
        Ok(windowed.into_iter().map(|window| if window { "sliding_attention" } else { "full_attention" }).collect())
    }

    /// What queries are scaled by the root of: the head size, but in the model of so many layers the width of the
    /// stream over the number of heads. Files do not say it.
    fn query_scalar(&self, layers_of_27b: usize) -> usize {
        if self.layers == layers_of_27b { self.d_model / self.heads.query } else { self.head_dim }
    }
}

const SOFTMAX: usize = 1;
const SIGMOID: usize = 2;

/// Llama, and Mixtral, which has no architecture of its own.
pub(super) fn llama(model: &Model<'_>) -> Result<Json, Error> {
    if model.keys.count("expert_count")?.unwrap_or(0) == 0 {
        return Ok(json!({
            "attention_bias": model.has("self_attn.q_proj.bias"),
            "mlp_bias": model.has("mlp.gate_proj.bias"),
            "pretraining_tp": 1,
        }));
    }
    let (experts, taken) = model.experts(SOFTMAX)?;
    Ok(json!({
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_experts_per_tok": taken,
        "num_local_experts": experts,
        "output_router_logits": false,
        "sliding_window": null,
    }))
}

pub(super) fn qwen2(_: &Model<'_>) -> Result<Json, Error> {
    Ok(json!({ "use_sliding_window": false }))
}

pub(super) fn qwen3(model: &Model<'_>) -> Result<Json, Error> {
    Ok(json!({ "attention_bias": model.has("self_attn.q_proj.bias"), "use_sliding_window": false }))
}

pub(super) fn qwen2_moe(model: &Model<'_>) -> Result<Json, Error> {
    let shared = model.width("expert_shared_feed_forward_length", "mlp.shared_expert.up_proj.weight")?;
    qwen_moe(
        model,
        json!({
            "norm_topk_prob": false,
            "qkv_bias": model.has("self_attn.q_proj.bias"),
            "shared_expert_intermediate_size": shared,
        }),
    )
}

pub(super) fn qwen3_moe(model: &Model<'_>) -> Result<Json, Error> {
    qwen_moe(model, json!({ "attention_bias": model.has("self_attn.q_proj.bias"), "norm_topk_prob": true }))
}

/// What both of Qwen's mixtures have, and `own`.
fn qwen_moe(model: &Model<'_>, own: Json) -> Result<Json, Error> {
    let (experts, taken) = model.experts(SOFTMAX)?;
    let mut config = object(json!({
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": model.width("expert_feed_forward_length", "mlp.experts.0.up_proj.weight")?,
        "num_experts": experts,
        "num_experts_per_tok": taken,
        "output_router_logits": false,
        "use_sliding_window": false,
    }));
    config.extend(object(own));
    Ok(Json::Object(config))
}

pub(super) fn gemma2(model: &Model<'_>) -> Result<Json, Error> {
    let cap = |key: &str, default: f64| Ok::<_, Error>(model.keys.f64(key)?.map_or(default, six_digits));
    Ok(json!({
        "attention_bias": false,
        "attn_logit_softcapping": cap("attn_logit_softcapping", 50.0)?,
        "final_logit_softcapping": cap("final_logit_softcapping", 30.0)?,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": model.layer_types(2)?,
        "query_pre_attn_scalar": model.query_scalar(46),
        "sliding_window": model.keys.size("attention.sliding_window")?.unwrap_or(4096),
    }))
}

pub(super) fn gemma3(model: &Model<'_>) -> Result<Json, Error> {
    let window = model.keys.size("attention.sliding_window")?;
    // Without a window every layer is a full one.
    let layer_types = model.layer_types(if window.is_some() { 6 } else { 1 })?;
    let local_theta = model.keys.f64("rope.freq_base_swa")?.unwrap_or(10_000.0);
    Ok(json!({
        "attention_bias": false,
        "attn_logit_softcapping": null,
        "final_logit_softcapping": model.keys.f64("final_logit_softcapping")?.map(six_digits),
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layer_types,
        "query_pre_attn_scalar": model.query_scalar(62),
        "rope_local_base_freq": local_theta,
        "rope_parameters": {
            "full_attention": model.rope.parameters(),
            "sliding_attention": { "rope_theta": local_theta, "rope_type": "default" },
        },
        "sliding_window": window,
    }))
}

pub(super) fn phi3(model: &Model<'_>) -> Result<Json, Error> {
    let original = model.keys.size("rope.scaling.original_context_length")?;
    let window = model.keys.count("attention.sliding_window")?.filter(|&window| window > 0);
    Ok(json!({
        "original_max_position_embeddings": original.map_or_else(|| model.keys.required_size("context_length"), Ok)?,
        "sliding_window": window,
    }))
}

pub(super) fn olmo2(_: &Model<'_>) -> Result<Json, Error> {
    Ok(json!({ "attention_bias": false }))
}

pub(super) fn smollm3(model: &Model<'_>) -> Result<Json, Error> {
    const INTERVAL: usize = 4;
    let rotated: Vec<u8> = (1..=model.layers).map(|layer| u8::from(!layer.is_multiple_of(INTERVAL))).collect();
    Ok(json!({
        "attention_bias": model.has("self_attn.q_proj.bias"),
        "layer_types": vec!["full_attention"; model.layers],
        "mlp_bias": false,
        "no_rope_layer_interval": INTERVAL,
        "no_rope_layers": rotated,
        "use_sliding_window": false,
    }))
}

pub(super) fn glm4_moe(model: &Model<'_>) -> Result<Json, Error> {
    let keys = &model.keys;
    let (experts, taken) = model.experts(SIGMOID)?;
    Ok(json!({
        "attention_bias": model.has("self_attn.q_proj.bias"),
        "first_k_dense_replace": keys.count("leading_dense_block_count")?.unwrap_or(0),
        "moe_intermediate_size": model.width("expert_feed_forward_length", "mlp.experts.0.up_proj.weight")?,
        "n_group": keys.size("expert_group_count")?.unwrap_or(1),
        "n_routed_experts": experts,
        "n_shared_experts": keys.required_size("expert_shared_count")?,
        "norm_topk_prob": keys.bool("expert_weights_norm")?.unwrap_or(false),
        "num_experts_per_tok": taken,
        "routed_scaling_factor": keys.f64("expert_weights_scale")?.map_or(1.0, six_digits),
        "topk_group": keys.size("expert_group_used_count")?.unwrap_or(1),
        "use_qk_norm": model.has("self_attn.q_norm.weight"),
    }))
}
