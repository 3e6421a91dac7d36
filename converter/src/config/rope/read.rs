//! The keys of `config.json` about rotary embedding.

use serde_json::{Map, Value};

use super::super::Keys;
use super::{Rope, RopeKind};
use crate::error::Result;

/// What the family assumes where the file is silent.
#[derive(Clone, Copy, Debug)]
pub(in crate::config) struct RopeDefaults {
    /// Base of the wavelengths.
    pub theta: f64,
    /// Share of a head that turns.
    pub partial: f64,
    /// Base of the wavelengths of windowed layers, where those have an embedding of their own.
    pub local_theta: Option<f64>,
}

/// The embeddings of one model.
#[derive(Debug)]
pub(in crate::config) struct Ropes {
    /// That of layers with full attention, and of all layers where `sliding` is none.
    pub full: Rope,
    /// That of windowed layers where the family gives those their own.
    pub sliding: Option<Rope>,
}

/// An object with rotary keys, and its place in the file.
type Entry<'a> = (&'static str, &'a Map<String, Value>);

/// The name of each kind, and the keys that it reads beside those that all kinds have.
const KINDS: [(&str, &[&str]); 6] = [
    ("default", &[]),
    ("linear", &["factor"]),
    ("dynamic", &["factor"]),
    (
        "yarn",
        &[
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        ],
    ),
    ("llama3", &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]),
    ("longrope", &["factor", "attention_factor", "long_factor", "original_max_position_embeddings", "short_factor"]),
];

/// Reads `rope_theta`, `rope_scaling`, `rope_parameters`, `partial_rotary_factor`, `original_max_position_embeddings` and,
/// for a family with a `local_theta`, `rope_local_base_freq` and one object per layer type in `rope_parameters`.
///
/// # Errors
/// Whatever is said twice must agree; kinds and keys that are not known are refused by name.
pub(in crate::config) fn read(
    keys: &mut Keys<'_>,
    head_dim: usize,
    max_position_embeddings: usize,
    defaults: &RopeDefaults,
) -> Result<Ropes> {
    let (mut full, mut sliding) = (Vec::new(), Vec::new());
    let windowed = defaults.local_theta.is_some();
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(value) = keys.get(key) else { continue };
        let object = object(keys, key, value)?;
        let nested = object.contains_key("full_attention") || object.contains_key("sliding_attention");
        let by_layer_type = windowed && key == "rope_parameters";
        if nested != by_layer_type {
            return Err(keys.error(
                key,
                if nested {
                    "one object per layer type is not supported here with this model_type".to_string()
                } else {
                    format!(
                        "expected one object per layer type, {{\"full_attention\": {{…}}, \"sliding_attention\": {{…}}}}, found {value}; transformers passes over what stands here"
                    )
                },
            ));
        }
        if !nested {
            full.push((key, object));
            continue;
        }
        for (name, value) in object.iter().filter(|(_, value)| !value.is_null()) {
            let (place, entries) = match name.as_str() {
                "full_attention" => ("rope_parameters.full_attention", &mut full),
                "sliding_attention" => ("rope_parameters.sliding_attention", &mut sliding),
                _ => return Err(keys.error(key, format!("{name} {value} is not supported beside the layer types"))),
            };
            entries.push((place, self::object(keys, place, value)?));
        }
    }
    let phi3 = keys.object.get("model_type").is_some_and(|name| name == "phi3");
    let reader = Reader {
        head_dim,
        max_position_embeddings,
        partial: keys.number("partial_rotary_factor")?,
        default_partial: defaults.partial,
        // the families whose heads can turn in part; the others pass over the key
        partial_counts: phi3 || defaults.partial != 1.0,
        original: keys.number("original_max_position_embeddings")?,
        // Phi3Config assumes this number, whatever the context
        default_original: if phi3 { 4096.0 } else { max_position_embeddings as f64 },
        windowed,
    };
    Ok(Ropes {
        full: reader.rope(keys, &full, "rope_theta", defaults.theta)?,
        sliding: match defaults.local_theta {
            Some(theta) => Some(reader.rope(keys, &sliding, "rope_local_base_freq", theta)?),
            None => None,
        },
    })
}

/// What the top level of the file says to all embeddings.
struct Reader {
    head_dim: usize,
    max_position_embeddings: usize,
    partial: Option<f64>,
    default_partial: f64,
    /// Whether the family heeds a part other than the whole.
    partial_counts: bool,
    original: Option<f64>,
    default_original: f64,
    /// Whether windowed layers have their own embedding.
    windowed: bool,
}

impl Reader {
    /// The embedding that `entries` and the top-level key `theta_key` describe together.
    fn rope(&self, keys: &mut Keys<'_>, entries: &[Entry<'_>], theta_key: &'static str, theta: f64) -> Result<Rope> {
        let mut thetas = Said::new(theta_key, keys.number(theta_key)?);
        let mut partials = Said::new("partial_rotary_factor", self.partial);
        for &(place, object) in entries {
            let mut inner = Keys { object, file: keys.file, read: Vec::new() };
            thetas.add(keys, place, "rope_theta", number(&mut inner, place, "rope_theta")?)?;
            let partial = number(&mut inner, place, "partial_rotary_factor")?;
            partials.add(keys, place, "partial_rotary_factor", partial)?;
        }
        let (place, theta) = thetas.0.unwrap_or((theta_key, theta));
        if !(theta > 1.0 && theta <= 1e30) {
            return Err(keys.error(place, format!("expected a base above 1, found {theta}")));
        }
        let (place, partial) = partials.0.unwrap_or(("partial_rotary_factor", self.default_partial));
        let found = if place == "partial_rotary_factor" { "" } else { "partial_rotary_factor " };
        if !self.partial_counts && partial != 1.0 {
            let what = format!("{found}{partial} is not supported with this model_type; supported: 1.0");
            return Err(keys.error(place, what));
        }
        let dim = (self.head_dim as f64 * partial) as usize;
        if dim < 2 || !dim.is_multiple_of(2) || dim > self.head_dim {
            let what = format!(
                "{found}{partial} of a head of {} elements is {dim} that turn; pairs turn, so that must be an even number from 2 to the size of the head",
                self.head_dim
            );
            return Err(keys.error(place, what));
        }
        let mut kinds = Said::new("", None);
        for &(place, object) in entries {
            let mut inner = Keys { object, file: keys.file, read: Vec::new() };
            let kind = self.kind(&mut inner, place, dim)?;
            kinds.add(keys, place, "scaling", Some(kind))?;
        }
        Ok(Rope { theta, dim, kind: kinds.0.map_or(RopeKind::Default, |(_, kind)| kind) })
    }

    /// The kind that one object describes. `place` is where it stands; `dim` is how many elements turn.
    fn kind(&self, keys: &mut Keys<'_>, place: &'static str, dim: usize) -> Result<RopeKind> {
        let (name, known) = kind_name(keys, place)?;
        for (key, value) in keys.object {
            let neutral = key == "factor" && value.as_f64() == Some(1.0)
                || key == "original_max_position_embeddings"
                    && value.as_f64() == Some(self.max_position_embeddings as f64);
            if !value.is_null()
                && !neutral
                && !["rope_type", "type", "rope_theta", "partial_rotary_factor"].contains(&key.as_str())
                && !known.contains(&key.as_str())
            {
                return Err(keys.error(place, format!("{key} {value} is not supported with rope_type {name}")));
            }
        }
        let mut values = Values { keys, place, name };
        Ok(match name {
            "default" => RopeKind::Default,
            "linear" => RopeKind::Linear { factor: values.required("factor")? },
            "dynamic" if dim < 4 => {
                return Err(values.error(format!("needs at least 4 elements that turn, found {dim}")));
            }
            "dynamic" => RopeKind::Dynamic {
                factor: values.required("factor")?,
                max_position_embeddings: self.max_position_embeddings,
            },
            "yarn" => {
                let context = self.original(&mut values)?;
                let factor = self.factor(&mut values, context)?;
                let attention_factor = match values.positive("attention_factor")? {
                    Some(value) => value,
                    None => {
                        // 0 counts as absent, there and below
                        let [mscale, all_dim] = ["mscale", "mscale_all_dim"].map(|key| values.not_zero(key));
                        let scale = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
                        match (mscale?, all_dim?) {
                            (Some(mscale), Some(all_dim)) => scale(mscale) / scale(all_dim),
                            _ => scale(1.0),
                        }
                    }
                };
                RopeKind::Yarn {
                    factor,
                    beta_fast: values.not_zero("beta_fast")?.unwrap_or(32.0),
                    beta_slow: values.not_zero("beta_slow")?.unwrap_or(1.0),
                    truncate: self.truncate(&values)?,
                    attention_factor: values.attention_factor(attention_factor)?,
                    original_max_position_embeddings: context,
                }
            }
            "llama3" => {
                let [low_freq_factor, high_freq_factor] =
                    [values.required("low_freq_factor")?, values.required("high_freq_factor")?];
                if low_freq_factor >= high_freq_factor {
                    return Err(keys.error(
                        place,
                        format!("low_freq_factor {low_freq_factor} must be below high_freq_factor {high_freq_factor}"),
                    ));
                }
                RopeKind::Llama3 {
                    factor: values.required("factor")?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: self.original(&mut values)?,
                }
            }
            _ => {
                let context = self.original(&mut values)?;
                let factor = self.factor(&mut values, context)?;
                let attention_factor = match values.positive("attention_factor")? {
                    Some(value) => value,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / context.ln()).sqrt(),
                };
                RopeKind::LongRope {
                    short: values.divisors("short_factor", dim)?,
                    long: values.divisors("long_factor", dim)?,
                    attention_factor: values.attention_factor(attention_factor)?,
                    original_max_position_embeddings: context,
                }
            }
        })
    }

    /// The context before the stretch: of the object, of the top level, or what transformers assumes.
    fn original(&self, values: &mut Values<'_, '_>) -> Result<f64> {
        let mut said = Said::new("original_max_position_embeddings", self.original);
        let here = values.positive("original_max_position_embeddings")?;
        said.add(values.keys, values.place, "original_max_position_embeddings", here)?;
        match said.0 {
            Some((_, context)) if context > 0.0 => Ok(context),
            Some((place, context)) => {
                Err(values.keys.error(place, format!("expected a number of tokens above 0, found {context}")))
            }
            None => Ok(self.default_original),
        }
    }

    /// How much longer the context became: said, or the ratio of the contexts.
    fn factor(&self, values: &mut Values<'_, '_>, original: f64) -> Result<f64> {
        Ok(values.positive("factor")?.unwrap_or(self.max_position_embeddings as f64 / original))
    }

    fn truncate(&self, values: &Values<'_, '_>) -> Result<bool> {
        match values.keys.object.get("truncate") {
            None | Some(Value::Bool(true)) => Ok(true),
            Some(Value::Bool(false)) if self.windowed => {
                Err(values
                    .error("truncate false is not supported with this model_type; transformers passes over it here"))
            }
            Some(Value::Bool(false)) => Ok(false),
            Some(other) => Err(values.error(format!("truncate: expected true or false, found {other}"))),
        }
    }
}

/// The entry of [`KINDS`] that one object names.
fn kind_name(keys: &mut Keys<'_>, place: &'static str) -> Result<(&'static str, &'static [&'static str])> {
    let mut names = Said::new("", None);
    for key in ["rope_type", "type"] {
        let name = match keys.get(key) {
            None => continue,
            // as early Phi-3 files call it
            Some(Value::String(name)) if name == "su" => "longrope",
            Some(Value::String(name)) if name == "yarn" && keys.object.contains_key("short_factor") => "longrope",
            Some(Value::String(name)) => name.as_str(),
            Some(other) => return Err(keys.error(place, format!("{key}: expected a name, found {other}"))),
        };
        match names.0 {
            Some((first_key, first)) if first != name => {
                return Err(keys.error(place, format!("{key} \"{name}\" contradicts {first_key} \"{first}\"")));
            }
            _ => names = Said::new(key, Some(name)),
        }
    }
    let name = names.0.map_or("default", |(_, name)| name);
    KINDS.into_iter().find(|(known, _)| *known == name).ok_or_else(|| {
        let known = KINDS.map(|(name, _)| name).join(", ");
        keys.error(place, format!("rope_type \"{name}\" is not supported; supported: {known}"))
    })
}

/// A value and where it was said first.
struct Said<T>(Option<(&'static str, T)>);

impl<T: PartialEq + std::fmt::Debug> Said<T> {
    fn new(place: &'static str, value: Option<T>) -> Self {
        Said(value.map(|value| (place, value)))
    }

    /// Adds what `key` says at `place`, which must be the same.
    fn add(&mut self, keys: &Keys<'_>, place: &'static str, key: &str, value: Option<T>) -> Result<()> {
        match (&self.0, value) {
            (Some((first_place, first)), Some(value)) if *first != value => {
                let what = format!("{key} {value:?} contradicts {first_place}, which says {first:?}");
                return Err(keys.error(place, what));
            }
            (None, Some(value)) => self.0 = Some((place, value)),
            _ => {}
        }
        Ok(())
    }
}

/// The values of one object, whose kind is `name`.
struct Values<'k, 'a> {
    keys: &'k mut Keys<'a>,
    place: &'static str,
    name: &'static str,
}

impl Values<'_, '_> {
    fn error(&self, what: impl std::fmt::Display) -> crate::Error {
        self.keys.error(self.place, format!("rope_type {}: {what}", self.name))
    }

    /// A number above 0, if there is one.
    fn positive(&mut self, key: &'static str) -> Result<Option<f64>> {
        match number(self.keys, self.place, key)? {
            Some(x) if x <= 0.0 => Err(self
                .keys
                .error(self.place, format!("{key} must be a number above 0 with rope_type {}, found {x}", self.name))),
            found => Ok(found),
        }
    }

    fn required(&mut self, key: &'static str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| {
            self.keys.error(
                self.place,
                format!("{key} must be a number above 0 with rope_type {}, found nothing", self.name),
            )
        })
    }

    /// A number above 0, if there is one that is not 0.
    fn not_zero(&mut self, key: &'static str) -> Result<Option<f64>> {
        match number(self.keys, self.place, key)? {
            Some(0.0) => Ok(None),
            _ => self.positive(key),
        }
    }

    fn attention_factor(&self, found: f64) -> Result<f64> {
        if found.is_finite() && found > 0.0 {
            return Ok(found);
        }
        Err(self
            .error(format!("cos and sin would be multiplied with {found}; give a number above 0 as attention_factor")))
    }

    /// A list with one number above 0 per turning pair.
    fn divisors(&mut self, key: &'static str, dim: usize) -> Result<Vec<f64>> {
        let found = self.keys.get(key);
        let Some(list) = found.and_then(Value::as_array) else {
            let found = found.map_or("nothing".to_string(), Value::to_string);
            return Err(self.error(format!("{key}: expected a list of {} numbers, found {found}", dim / 2)));
        };
        if list.len() != dim / 2 {
            return Err(self.error(format!(
                "{key}: expected {} numbers, one per pair of the {dim} elements that turn, found {}",
                dim / 2,
                list.len()
            )));
        }
        let divisor = |value: &Value| {
            value
                .as_f64()
                .filter(|&x| x.is_finite() && x > 0.0)
                .ok_or_else(|| self.error(format!("{key}: expected numbers above 0, found {value}")))
        };
        list.iter().map(divisor).collect()
    }
}

fn object<'a>(keys: &Keys<'_>, place: &str, value: &'a Value) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| keys.error(place, format!("expected an object, found {value}")))
}

/// A number inside of the object at `place`.
fn number(keys: &mut Keys<'_>, place: &'static str, key: &'static str) -> Result<Option<f64>> {
    let Some(value) = keys.get(key) else { return Ok(None) };
    match value.as_f64().filter(|x| x.is_finite()) {
        Some(x) => Ok(Some(x)),
        None => Err(keys.error(place, format!("{key}: expected a number, found {value}"))),
    }
}
