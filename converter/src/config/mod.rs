//! `config.json`: what a model is, read strictly.
//!
//! A key that changes the result is either understood or an error that names the key and its value; a key that changes
//! nothing is in a list of such keys. Both spellings are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and
//! transformers 5 (`rope_parameters`, `dtype`); a file with both must say the same in both.

mod keys;
mod rope;

use std::path::Path;

use serde_json::{Map, Value};

use crate::DType;
use crate::error::{Error, Result};

pub use rope::{Rope, RopeKind};

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
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the q, k, v and output projections have biases.
    pub attention_bias: bool,
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
    /// The whole `config.json`, keys in order.
    pub raw: Value,
}

/// The function on the gate of the feed-forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · sigmoid(x).
    Silu,
    /// Gaussian error linear unit with the error function.
    Gelu,
    /// Gaussian error linear unit in its tanh approximation.
    GeluTanh,
    /// max(x, 0).
    Relu,
}

impl Activation {
    /// Every name that transformers gives to a supported function.
    const NAMES: [(&'static str, Activation); 6] = [
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("relu", Activation::Relu),
    ];
}

/// A member of the family: what `model_type` selects. Another member is another entry of [`FAMILIES`].
struct Family {
    model_type: &'static str,
    /// Values of `architectures` that are this model with its language head.
    architectures: &'static [&'static str],
}

const FAMILIES: &[Family] =
    &[Family { model_type: "llama", architectures: &["LlamaForCausalLM", "LLaMAForCausalLM", "LlamaForCausalLm"] }];

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

        let d_model = keys.size("hidden_size")?;
        let n_heads = keys.size("num_attention_heads")?;
        let n_kv_heads = keys.optional_size("num_key_value_heads")?.unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            let what = format!(
                "{n_heads} query heads cannot share {n_kv_heads} key/value heads evenly; num_attention_heads must be a multiple"
            );
            return Err(keys.error("num_key_value_heads", what));
        }
        let head_dim = match keys.optional_size("head_dim")? {
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
        let rms_norm_eps = keys.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(0.0..1.0).contains(&rms_norm_eps) {
            return Err(keys
                .error("rms_norm_eps", format!("expected a small number that is not negative, found {rms_norm_eps}")));
        }
        let cfg = ModelConfig {
            model_type: family.model_type.to_string(),
            vocab_size,
            d_model,
            n_layers: keys.size("num_hidden_layers")?,
            n_heads,
            n_kv_heads,
            head_dim,
            d_ff: keys.size("intermediate_size")?,
            max_position_embeddings: keys.optional_size("max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps,
            rope: rope::read(&mut keys)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            attention_bias: keys.flag("attention_bias")?,
            mlp_bias: keys.flag("mlp_bias")?,
            hidden_act: keys.activation()?,
            bos_token_id: keys.token_ids("bos_token_id", Some(1), vocab_size)?.first().copied(),
            eos_token_ids: keys.token_ids("eos_token_id", Some(2), vocab_size)?,
            pad_token_id: keys.token_ids("pad_token_id", None, vocab_size)?.first().copied(),
            dtype: keys.dtype()?,
            raw: value.clone(),
        };
        keys.check_the_rest()?;
        cfg.check_parameter_count(file)?;
        Ok(cfg)
    }

    /// Number of query heads that read one key/value head (R).
    pub fn queries_per_kv_head(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// What the axis letter stands for.
    pub(crate) fn axis(&self, letter: char) -> Axis {
        let (size, noun, logical) = match letter {
            'V' => (self.vocab_size, "vocabulary", "vocab"),
            'M' => (self.d_model, "hidden", "embed"),
            'H' => (self.n_heads, "heads", "heads"),
            'G' => (self.n_kv_heads, "key/value heads", "kv_heads"),
            'K' => (self.head_dim, "head_dim", "head_dim"),
            'F' => (self.d_ff, "intermediate", "mlp"),
            other => unreachable!("axis letter {other}"),
        };
        Axis { size, noun, logical }
    }

    /// Refuses configurations whose parameters no machine could hold, so that later products cannot overflow.
    fn check_parameter_count(&self, file: &Path) -> Result<()> {
        const LIMIT: u128 = 1 << 45;
        let [v, m, l, h, g, k, f] =
            [self.vocab_size, self.d_model, self.n_layers, self.n_heads, self.n_kv_heads, self.head_dim, self.d_ff]
                .map(|size| size as u128);
        let total = 2 * v * m + l * (2 * m * (h + g) * k + 3 * m * f);
        if total > LIMIT {
            let what =
                format!("the sizes multiply to {total} parameters, more than {LIMIT}: one of them must be wrong");
            return Err(Error::config(file, "hidden_size", what));
        }
        Ok(())
    }
}

/// Finds the entry of [`FAMILIES`] that the file is about.
fn family(keys: &mut Keys<'_>) -> Result<&'static Family> {
    let known = || FAMILIES.iter().map(|f| f.model_type).collect::<Vec<_>>().join(", ");
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

    /// A boolean that is false when absent.
    fn flag(&mut self, key: &'static str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.error(key, format!("expected true or false, found {other}"))),
        }
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

    fn activation(&mut self) -> Result<Activation> {
        let name = match self.get("hidden_act") {
            None => return Ok(Activation::Silu),
            Some(value) => value.as_str().map_or_else(|| value.to_string(), str::to_string),
        };
        let found = Activation::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|&(_, act)| act).ok_or_else(|| {
            let known = Activation::NAMES.map(|(name, _)| name).join(", ");
            self.error("hidden_act", format!("`{name}` is not supported; supported: {known}"))
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
