//! `config.json`: what a model is, read strictly.
//!
//! A key that changes the result is either understood or an error that names the key and its value; a key that changes
//! nothing is in a list of such keys. Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
//! transformers 5 (`rope_parameters`, `dtype`); a file with both must say the same in both.

mod family;
mod keys;
mod lora;
mod moe;
mod rope;

use std::path::Path;

pub use kernels::Activation;
use serde_json::{Map, Value};

use crate::DType;
use crate::error::{Error, Result};

pub(crate) use family::Names;
pub use family::QkNorm;
use family::{FAMILIES, Family, Sizes};
pub use lora::{LoraConfig, LoraProjection};
pub use moe::{ExpertGroups, MoeConfig, Router, SharedExpert};
pub(crate) use rope::extend;
pub use rope::{ExtensionKind, Rope, RopeExtension, RopeKind};

/// The configuration of a model. Letters in brackets are the axis letters used everywhere.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The member of the family, as `config.json` names it: `llama`.
    pub model_type: String,
    /// Number of token ids (V).
    pub vocab_size: usize,
    /// Width of the residual stream (M).
    pub d_model: usize,
    /// Number of decoder blocks (L).
    pub n_layers: usize,
    /// Query heads (H).
    pub n_heads: usize,
    /// Key/value heads (G), a divisor of `n_heads`; query head h reads key/value head h / (H / G).
    pub n_kv_heads: usize,
    /// Width of one head (K); not always `d_model / n_heads`.
    pub head_dim: usize,
    /// Width of the feed-forward (F).
    pub d_ff: usize,
    /// The context that the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// What each layer is made of.
    pub layers: Vec<LayerConfig>,
    /// The rotary position embeddings that layers refer to.
    pub ropes: Vec<Rope>,
    /// Attention, as all layers have it.
    pub attention: AttentionConfig,
    /// The mixture of experts, if layers have one.
    pub moe: Option<MoeConfig>,
    /// What a norm's weight is added to before it multiplies: 0, or 1 (Gemma).
    pub norm_offset: f64,
    /// What the embedding is multiplied with: 1, or √d_model (Gemma).
    pub embedding_scale: f64,
    /// c, where logits become c·tanh(logits / c).
    pub logit_softcap: Option<f64>,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the three feed-forward projections have biases.
    pub mlp_bias: bool,
    /// The function on the gate of the feed-forward.
    pub hidden_act: Activation,
    /// The id that begins a text, if there is one.
    pub bos_token_id: Option<u32>,
    /// The ids that end a text; `generation_config.json` can name others.
    pub eos_token_ids: Vec<u32>,
    /// The id that fills a batch, if there is one.
    pub pad_token_id: Option<u32>,
    /// The element type that the configuration names; the tensors' own types are in the checkpoint.
    pub dtype: Option<DType>,
    /// The adapters that are beside its projections; `config.json` says nothing of them.
    pub lora: Option<LoraConfig>,
    /// How tensors are called.
    pub(crate) names: &'static Names,
    /// The whole `config.json`, keys in order.
    pub raw: Value,
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerConfig {
    /// How many positions a query sees, itself included; all before it if `None`.
    pub window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] turns queries and keys; none if `None`.
    pub rope: Option<usize>,
    /// Whether the feed-forward is the mixture of experts.
    pub sparse: bool,
}

/// Attention, as all layers have it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// What q·k is multiplied with.
    pub scale: f64,
    /// c, where scores become c·tanh(scores / c).
    pub softcap: Option<f64>,
    /// Whether the q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has one.
    pub out_bias: bool,
    /// RMSNorm of queries and keys.
    pub qk_norm: Option<QkNorm>,
}

/// Every name that transformers gives to a supported activation.
const ACTIVATIONS: [(&str, Activation); 6] = [
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("relu", Activation::Relu),
];

/// What one axis letter stands for.
pub(crate) struct Axis {
    pub(crate) size: usize,
    /// The word for it in messages.
    pub(crate) noun: &'static str,
    /// Its logical sharding axis.
    pub(crate) logical: &'static str,
}

impl ModelConfig {
    /// Reads the text of a `config.json`; `file` is named in errors.
    ///
    /// # Errors
    /// [`Error::Format`] if it is not a JSON object, [`Error::Config`] for the first key that is missing, absurd,
    /// contradictory, or changes the result and is not supported.
    pub fn from_json(text: &str, file: &Path) -> Result<ModelConfig> {
        let value = serde_json::from_str(text).map_err(|e| Error::format(file, format!("not valid JSON: {e}")))?;
        ModelConfig::from_value(&value, file)
    }

    /// As [`ModelConfig::from_json`], from a parsed value.
    ///
    /// # Errors
    /// The same.
    pub fn from_value(value: &Value, file: &Path) -> Result<ModelConfig> {
        let Some(object) = value.as_object() else {
            return Err(Error::format(file, "expected a JSON object with the model's configuration"));
        };
        let mut keys = Keys { object, file, read: Vec::new() };
        let family = family(&mut keys)?;

        let defaults = &family.defaults;
        let d_model = keys.size("hidden_size")?;
        let n_layers = keys.size("num_hidden_layers")?;
        if n_layers > MAX_LAYERS {
            return Err(keys.error("num_hidden_layers", format!("expected at most {MAX_LAYERS}, found {n_layers}")));
        }
        let n_heads = keys.size("num_attention_heads")?;
        let n_kv_heads = match keys.optional_size("num_key_value_heads")? {
            Some(n) => n,
            None if object.contains_key("num_key_value_heads") => n_heads,
            None => defaults.n_kv_heads.unwrap_or(n_heads),
        };
        if n_heads % n_kv_heads != 0 {
            let what = format!(
                "{n_heads} query heads cannot share {n_kv_heads} key/value heads evenly; num_attention_heads must be a multiple"
            );
            return Err(keys.error("num_key_value_heads", what));
        }
        let head_dim = match keys.optional_size("head_dim")?.or(defaults.head_dim) {
            Some(size) => size,
            None if d_model % n_heads == 0 => d_model / n_heads,
            None => {
                let what =
                    format!("required, since hidden_size {d_model} is not a multiple of num_attention_heads {n_heads}");
                return Err(keys.error("head_dim", what));
            }
        };
        if head_dim % 2 != 0 {
            return Err(
                keys.error("head_dim", format!("{head_dim} is odd; rotary embedding turns pairs, so it must be even"))
            );
        }
        let vocab_size = keys.size("vocab_size")?;
        let rms_norm_eps = keys.number("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps);
        if !(0.0..1.0).contains(&rms_norm_eps) {
            return Err(keys
                .error("rms_norm_eps", format!("expected a small number that is not negative, found {rms_norm_eps}")));
        }
        let d_ff = keys.size("intermediate_size")?;
        check_parameter_count(&keys, [vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff])?;
        let max_position_embeddings =
            keys.optional_size("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let blocks = (family.read)(&mut keys, &Sizes { n_layers, d_ff })?;
        let ropes = rope::read(&mut keys, head_dim, max_position_embeddings, &defaults.rope)?;
        let [bos, eos, pad] = defaults.token_ids;
        let cfg = ModelConfig {
            model_type: family.model_type.to_string(),
            vocab_size,
            d_model,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            d_ff,
            max_position_embeddings,
            rms_norm_eps,
            layers: blocks.layers(n_layers, ropes.sliding.is_some()),
            ropes: std::iter::once(ropes.full).chain(ropes.sliding).collect(),
            attention: AttentionConfig {
                scale: blocks.query_scalar.unwrap_or(head_dim as f64).powf(-0.5),
                softcap: blocks.attention_softcap,
                qkv_bias: blocks.qkv_bias,
                out_bias: blocks.out_bias,
                qk_norm: blocks.qk_norm,
            },
            moe: blocks.moe,
            norm_offset: if blocks.gemma { 1.0 } else { 0.0 },
            embedding_scale: if blocks.gemma { (d_model as f64).sqrt() } else { 1.0 },
            logit_softcap: blocks.logit_softcap,
            tie_word_embeddings: keys.optional_flag("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
            mlp_bias: blocks.mlp_bias,
            hidden_act: keys.activation(defaults.activation_key)?,
            bos_token_id: keys.token_ids("bos_token_id", bos, vocab_size)?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id", eos, vocab_size)?,
            pad_token_id: keys.token_ids("pad_token_id", pad, vocab_size)?.first().copied(),
            dtype: keys.dtype()?,
            lora: None,
            names: &family.names,
            raw: value.clone(),
        };
        keys.check_the_rest()?;
        cfg.check_expert_count(file)?;
        Ok(cfg)
    }

    /// Number of query heads that read one key/value head (R).
    pub fn queries_per_kv_head(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// What the axis letter stands for. F is that of the dense feed-forward; experts have their own.
    pub(crate) fn axis(&self, letter: char) -> Axis {
        let experts = self.moe.as_ref().map_or(0, |moe| moe.n_experts);
        let (size, noun, logical) = match letter {
            'E' => (experts, "experts", "experts"),
            'V' => (self.vocab_size, "vocabulary", "vocab"),
            'M' => (self.d_model, "hidden", "embed"),
            'H' => (self.n_heads, "heads", "heads"),
            'G' => (self.n_kv_heads, "key/value heads", "kv_heads"),
            'K' => (self.head_dim, "head_dim", "head_dim"),
            'F' => (self.d_ff, "intermediate", "mlp"),
            'J' => (self.lora.as_ref().map_or(0, |lora| lora.rank), "rank", "rank"),
            other => unreachable!("axis letter {other}"),
        };
        Axis { size, noun, logical }
    }

    /// Positions that the model is made for: `max_position_embeddings`, times the factor where dynamic NTK stretches.
    pub fn context_len(&self) -> usize {
        let stretch = |rope: &Rope| match rope.kind {
            RopeKind::Dynamic { factor, .. } => (self.max_position_embeddings as f64 * factor.max(1.0)) as usize,
            _ => self.max_position_embeddings,
        };
        // positions are int32
        self.ropes.iter().map(stretch).max().unwrap_or(self.max_position_embeddings).min(i32::MAX as usize)
    }

    /// The windows that layers have, each once.
    pub fn windows(&self) -> Vec<usize> {
        let mut windows: Vec<usize> = self.layers.iter().filter_map(|layer| layer.window).collect();
        windows.sort_unstable();
        windows.dedup();
        windows
    }

    /// Whether a checkpoint may hold one more block, which predicts the token after the next (`num_nextn_predict_layers`).
    pub(crate) fn predicts_further(&self) -> bool {
        self.raw.get("num_nextn_predict_layers").and_then(Value::as_u64).is_some_and(|n| n > 0)
    }

    /// Refuses mixtures that no machine could hold.
    fn check_expert_count(&self, file: &Path) -> Result<()> {
        let Some(moe) = &self.moe else { return Ok(()) };
        if moe.n_experts.saturating_mul(self.n_layers) > MAX_EXPERTS {
            let what = format!("{} in each of {} layers are more than {MAX_EXPERTS}", moe.n_experts, self.n_layers);
            return Err(Error::config(file, "experts", what));
        }
        let shared = moe.shared.map_or(0, |shared| shared.d_ff);
        let width = moe.n_experts as u128 * moe.d_ff as u128 + shared as u128;
        let total = 3 * self.n_layers as u128 * self.d_model as u128 * width;
        if total > PARAMETER_LIMIT {
            let what = format!(
                "{} experts of width {} in {} layers are {total} parameters, more than {PARAMETER_LIMIT}: one of the sizes must be wrong",
                moe.n_experts, moe.d_ff, self.n_layers
            );
            return Err(Error::config(file, "experts", what));
        }
        Ok(())
    }
}

/// More layers than any model has: each takes memory before there is a tensor to compare it with.
const MAX_LAYERS: usize = 10_000;

/// The same of experts, over all layers.
const MAX_EXPERTS: usize = 1 << 20;

/// More parameters than any machine could hold.
const PARAMETER_LIMIT: u128 = 1 << 45;

/// Refuses sizes whose parameters no machine could hold, so that later products cannot overflow.
fn check_parameter_count(keys: &Keys<'_>, sizes: [usize; 7]) -> Result<()> {
    let [v, m, l, h, g, k, f] = sizes.map(|size| size as u128);
    let total = 2 * v * m + l * (2 * m * (h + g) * k + 3 * m * f);
    if total > PARAMETER_LIMIT {
        let what =
            format!("the sizes multiply to {total} parameters, more than {PARAMETER_LIMIT}: one of them must be wrong");
        return Err(keys.error("hidden_size", what));
    }
    Ok(())
}

/// The values of `model_type` that are understood.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// Finds the entry of [`FAMILIES`] that the file is about.
fn family(keys: &mut Keys<'_>) -> Result<&'static Family> {
    let known = || model_types().collect::<Vec<_>>().join(", ");
    let model_type = match keys.get("model_type") {
        Some(Value::String(name)) => name.clone(),
        Some(other) => return Err(keys.error("model_type", format!("expected a name ({}), found {other}", known()))),
        None => return Err(keys.error("model_type", format!("required; supported: {}", known()))),
    };
    let Some(family) = FAMILIES.iter().find(|f| f.model_type == model_type) else {
        return Err(keys.error("model_type", format!("`{model_type}` is not supported; supported: {}", known())));
    };
    if let Some(value) = keys.get("architectures") {
        let fits = value
            .as_array()
            .is_some_and(|list| list.iter().all(|a| a.as_str().is_some_and(|a| family.architectures.contains(&a))));
        if !fits {
            let what = format!(
                "{value} is not supported with model_type {model_type}; expected [\"{}\"]",
                family.architectures[0]
            );
            return Err(keys.error("architectures", what));
        }
    }
    Ok(family)
}

/// Reads keys of one object and remembers which.
pub(crate) struct Keys<'a> {
    pub(crate) object: &'a Map<String, Value>,
    pub(crate) file: &'a Path,
    read: Vec<&'static str>,
}

impl<'a> Keys<'a> {
    /// The value of `key` unless it is absent or null.
    pub(crate) fn get(&mut self, key: &'static str) -> Option<&'a Value> {
        self.read.push(key);
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn error(&self, key: &str, what: impl Into<String>) -> Error {
        Error::config(self.file, key, what)
    }

    fn size(&mut self, key: &'static str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.error(key, "required, but not in the file"))
    }

    /// A positive number that fits an int32, as shapes and ids do.
    fn optional_size(&mut self, key: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=i32::MAX as usize).contains(&n) => Ok(Some(n)),
            _ => Err(self.error(key, format!("expected a whole number from 1 to {}, found {value}", i32::MAX))),
        }
    }

    pub(crate) fn number(&mut self, key: &'static str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.error(key, format!("expected a number, found {value}"))),
        }
    }

    /// A number above 0.
    fn positive(&mut self, key: &'static str) -> Result<Option<f64>> {
        match self.number(key)? {
            // what is divided by, or rooted, must stay a float32
            Some(x) if !(1e-30..=1e30).contains(&x) => {
                Err(self.error(key, format!("expected a number from 1e-30 to 1e30, found {x}")))
            }
            found => Ok(found),
        }
    }

    /// A whole number, 0 included.
    fn optional_count(&mut self, key: &'static str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|&n| n <= i32::MAX as u64) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(self.error(key, format!("expected a whole number from 0 to {}, found {value}", i32::MAX))),
        }
    }

    fn optional_flag(&mut self, key: &'static str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(other) => Err(self.error(key, format!("expected true or false, found {other}"))),
        }
    }

    /// A boolean that is false when absent.
    fn flag(&mut self, key: &'static str) -> Result<bool> {
        Ok(self.optional_flag(key)?.unwrap_or(false))
    }

    /// One item per layer, each as `item` reads it.
    fn list<T>(&mut self, key: &'static str, len: usize, item: impl Fn(&Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(list) = value.as_array().filter(|list| list.len() == len) else {
            let found = value.as_array().map_or_else(|| value.to_string(), |list| format!("{} items", list.len()));
            return Err(
                self.error(key, format!("expected a list with one item for each of {len} layers, found {found}"))
            );
        };
        let one = |v: &Value| item(v).ok_or_else(|| self.error(key, format!("{v} is not supported")));
        list.iter().map(one).collect::<Result<_>>().map(Some)
    }

    /// One id, a list of ids, or none. `default` is what transformers assumes when the key is absent (not null).
    fn token_ids(&mut self, key: &'static str, default: Option<u32>, vocab_size: usize) -> Result<Vec<u32>> {
        let absent = !self.object.contains_key(key);
        let Some(value) = self.get(key) else {
            return Ok(default.filter(|&id| absent && (id as usize) < vocab_size).into_iter().collect());
        };
        if key == "pad_token_id" && value.as_i64() == Some(-1) {
            return Ok(Vec::new());
        }
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        values
            .iter()
            .map(|id| match id.as_u64() {
                Some(n) if n < vocab_size as u64 => Ok(n as u32),
                _ => Err(self.error(
                    key,
                    format!("expected token ids from 0 to {} (vocab_size - 1), found {id}", vocab_size - 1),
                )),
            })
            .collect()
    }

    fn activation(&mut self, key: &'static str) -> Result<Activation> {
        let name = match self.get(key) {
            None if key == "hidden_activation" => return Ok(Activation::GeluTanh),
            None => return Ok(Activation::Silu),
            Some(value) => value.as_str().map_or_else(|| value.to_string(), str::to_string),
        };
        let found = ACTIVATIONS.iter().find(|(known, _)| *known == name);
        found.map(|&(_, act)| act).ok_or_else(|| {
            let known = ACTIVATIONS.map(|(name, _)| name).join(", ");
            self.error(key, format!("`{name}` is not supported; supported: {known}"))
        })
    }

    fn dtype(&mut self) -> Result<Option<DType>> {
        let mut found: Option<(&str, DType)> = None;
        for key in ["torch_dtype", "dtype"] {
            let Some(value) = self.get(key) else { continue };
            let Some(dtype) = value.as_str().and_then(DType::parse) else {
                return Err(self
                    .error(key, format!("{value} is not supported; supported: float16, bfloat16, float32, float64")));
            };
            match found {
                Some((other, first)) if first != dtype => {
                    return Err(self.error(key, format!("{value} contradicts {other} {}", first.torch_name())));
                }
                _ => found = Some((key, dtype)),
            }
        }
        Ok(found.map(|(_, dtype)| dtype))
    }

    /// Every key that was not read must be known to change nothing, or have the one value that changes nothing.
    fn check_the_rest(&self) -> Result<()> {
        for (key, value) in self.object {
            if self.read.contains(&key.as_str()) || value.is_null() || keys::changes_nothing(key, value) {
                continue;
            }
            return Err(self.error(key, match keys::required_value(key) {
                Some(required) => format!("{value} changes the result and is not supported; supported: {required}"),
                None => format!("unknown key with value {value}; it may change the result, so the model is refused. Remove the key if it has no effect"),
            }));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
