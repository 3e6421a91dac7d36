//! Rotary position embedding: its keys, and its frequencies.

use std::f32::consts::PI;

use serde_json::Value;

use super::Keys;
use crate::error::Result;

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub kind: RopeKind,
}

/// How the frequencies are stretched for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeKind {
    /// Not at all.
    Default,
    /// Positions are divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths are divided by a factor, short ones kept, those between are blended.
    Llama3 {
        /// The divisor of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context before the stretch.
        original_max_position_embeddings: f64,
    },
}

impl Rope {
    /// Angle per position of each pair of a head, `head_dim / 2` of them, in float32 as transformers computes them:
    /// `theta^(-2i / head_dim)`, then stretched (`modeling_rope_utils.py`, `_compute_llama3_parameters`).
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f64> {
        (0..head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_dim as f32;
                // through double precision, so that the power is the nearest float32
                let power = (self.theta as f32 as f64).powf(exponent as f64) as f32;
                self.kind.stretch(1.0 / power) as f64
            })
            .collect()
    }
}

impl RopeKind {
    fn stretch(self, inv_freq: f32) -> f32 {
        match self {
            RopeKind::Default => inv_freq,
            RopeKind::Linear { factor } => inv_freq / factor as f32,
            RopeKind::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: context,
            } => {
                let wavelength = 2.0 * PI / inv_freq;
                if wavelength < (context / high_freq_factor) as f32 {
                    inv_freq
                } else if wavelength > (context / low_freq_factor) as f32 {
                    inv_freq / factor as f32
                } else {
                    let blend = (context as f32 / wavelength - low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - blend) * inv_freq / factor as f32 + blend * inv_freq
                }
            }
        }
    }
}

/// Reads `rope_theta`, `rope_scaling` and `rope_parameters`. Whatever is said twice must agree.
pub(super) fn read(keys: &mut Keys<'_>) -> Result<Rope> {
    let mut theta = keys.number("rope_theta")?.map(|value| ("rope_theta", value));
    let mut kind: Option<(&str, RopeKind)> = None;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(value) = keys.get(key) else { continue };
        let Some(object) = value.as_object() else {
            return Err(keys.error(key, format!("expected an object, found {value}")));
        };
        let mut inner = Keys { object, file: keys.file, read: Vec::new() };
        let found = read_kind(&mut inner, key)?;
        match kind {
            Some((other, first)) if first != found => {
                return Err(keys.error(key, format!("{value} contradicts {other}, which says {first:?}")));
            }
            _ => kind = Some((key, found)),
        }
        if let Some(here) = number(&mut inner, key, "rope_theta")? {
            match theta {
                Some((other, first)) if first != here => {
                    return Err(keys.error(key, format!("rope_theta {here} contradicts {other}, which says {first}")));
                }
                _ => theta = Some((key, here)),
            }
        }
    }
    let (key, theta) = theta.unwrap_or(("rope_theta", 10_000.0));
    if theta <= 1.0 {
        return Err(keys.error(key, format!("expected a base above 1, found {theta}")));
    }
    Ok(Rope { theta, kind: kind.map_or(RopeKind::Default, |(_, kind)| kind) })
}

/// The kind that one object describes. `place` is the object's key.
fn read_kind(keys: &mut Keys<'_>, place: &'static str) -> Result<RopeKind> {
    let [new, old] = ["rope_type", "type"].map(|key| keys.get(key));
    let name = match (new, old) {
        (Some(new), Some(old)) if new != old => {
            return Err(keys.error(place, format!("rope_type {new} contradicts type {old}")));
        }
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => &Value::String("default".into()),
    };
    let known: &[&str] = match name.as_str() {
        Some("default") => &[],
        Some("linear") => &["factor"],
        Some("llama3") => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        _ => {
            return Err(
                keys.error(place, format!("rope_type {name} is not supported; supported: default, linear, llama3"))
            );
        }
    };
    for (key, value) in keys.object {
        let neutral = key == "partial_rotary_factor" && value.as_f64() == Some(1.0)
            || key == "factor" && value.as_f64() == Some(1.0);
        if !value.is_null()
            && !neutral
            && !["rope_type", "type", "rope_theta"].contains(&key.as_str())
            && !known.contains(&key.as_str())
        {
            return Err(keys.error(place, format!("{key} {value} is not supported with rope_type {name}")));
        }
    }
    let mut required = |key| {
        let value = number(keys, place, key)?;
        value.filter(|&x| x > 0.0).ok_or_else(|| {
            let found = value.map_or("nothing".to_string(), |x| x.to_string());
            keys.error(place, format!("{key} must be a number above 0 with rope_type {name}, found {found}"))
        })
    };
    Ok(match known {
        [] => RopeKind::Default,
        [_] => RopeKind::Linear { factor: required("factor")? },
        _ => {
            let kind = RopeKind::Llama3 {
                factor: required("factor")?,
                low_freq_factor: required("low_freq_factor")?,
                high_freq_factor: required("high_freq_factor")?,
                original_max_position_embeddings: required("original_max_position_embeddings")?,
            };
            if let RopeKind::Llama3 { low_freq_factor: low, high_freq_factor: high, .. } = kind
                && low >= high
            {
                return Err(keys.error(place, format!("low_freq_factor {low} must be below high_freq_factor {high}")));
            }
            kind
        }
    })
}

/// A number inside of the object `place`.
fn number(keys: &mut Keys<'_>, place: &'static str, key: &'static str) -> Result<Option<f64>> {
    match keys.get(key) {
        None => Ok(None),
        Some(value) => match value.as_f64().filter(|x| x.is_finite()) {
            Some(x) => Ok(Some(x)),
            None => Err(keys.error(place, format!("{key}: expected a number, found {value}"))),
        },
    }
}
