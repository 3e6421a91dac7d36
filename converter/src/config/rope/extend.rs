//! A longer context by another rotary embedding: `config.json` rewritten so that transformers reads the same.

use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};

use super::RopeKind;
use crate::ModelConfig;
use crate::error::{Error, Result};

/// A stretch of the context, written `yarn:4`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeExtension {
    /// How the frequencies change.
    pub kind: ExtensionKind,
    /// How many times as long the context becomes; above 1.
    pub factor: f64,
}

/// The kinds of [`RopeExtension`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtensionKind {
    /// [`RopeKind::Linear`].
    Linear,
    /// [`RopeKind::Dynamic`].
    Dynamic,
    /// [`RopeKind::Yarn`] with its defaults.
    Yarn,
    /// The NTK-aware change of base: `theta · factor^(dim / (dim - 2))`, which divides the lowest frequency by the factor
    /// and keeps the highest.
    Ntk,
}

impl ExtensionKind {
    const NAMES: [(&str, ExtensionKind); 4] = [
        ("linear", ExtensionKind::Linear),
        ("dynamic", ExtensionKind::Dynamic),
        ("yarn", ExtensionKind::Yarn),
        ("ntk", ExtensionKind::Ntk),
    ];
}

impl FromStr for RopeExtension {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parse = || {
            let (name, factor) = text.split_once(':')?;
            let (_, kind) = ExtensionKind::NAMES.into_iter().find(|(known, _)| *known == name)?;
            let factor = factor.parse().ok().filter(|x: &f64| x.is_finite() && *x > 1.0)?;
            Some(RopeExtension { kind, factor })
        };
        let known = ExtensionKind::NAMES.map(|(name, _)| name).join(", ");
        parse().ok_or_else(|| {
            format!("expected KIND:FACTOR with one of {known} and a factor above 1, as in yarn:4; found `{text}`")
        })
    }
}

/// Rewrites a `config.json` for a context that is `extension.factor` times as long. `file` is named in errors.
///
/// The spelling that the file uses (`rope_scaling` of transformers 4, `rope_parameters` of 5, or both) is the one that is
/// written. `max_position_embeddings` is multiplied, except for [`ExtensionKind::Dynamic`]: there it is the length from
/// which transformers stretches. Where windowed layers have their own embedding, it stays as it is.
///
/// # Errors
/// If the configuration is not supported, is stretched already, or cannot be stretched in this way.
pub(crate) fn extend(config: &mut Value, extension: &RopeExtension, file: &Path) -> Result<()> {
    let model = ModelConfig::from_value(config, file)?;
    let rope = &model.ropes[0];
    let refuse = |key: &str, what: String| Err(Error::config(file, key, what));
    let RopeExtension { kind, factor } = *extension;
    if rope.kind != RopeKind::Default {
        let what = format!(
            "the rotary embedding is scaled already ({}); only an unscaled one can be extended",
            rope.kind.name()
        );
        return refuse("rope_type", what);
    }
    if model.model_type == "phi3" && kind != ExtensionKind::Ntk {
        return refuse("model_type", "transformers reads no such scaling with phi3; use ntk".to_string());
    }
    if rope.dim < 4 && matches!(kind, ExtensionKind::Ntk | ExtensionKind::Dynamic) {
        return refuse("rope_theta", format!("a changed base needs at least 4 elements that turn, found {}", rope.dim));
    }
    let context = model.max_position_embeddings;
    let longer = context as f64 * factor;
    if kind != ExtensionKind::Dynamic && (longer.fract() != 0.0 || longer > i32::MAX as f64) {
        return refuse(
            "max_position_embeddings",
            format!("{context} × {factor} must be a whole number of tokens up to {}", i32::MAX),
        );
    }

    let ntk = kind == ExtensionKind::Ntk;
    let dim = rope.dim as f64;
    let theta = if ntk { rope.theta * factor.powf(dim / (dim - 2.0)) } else { rope.theta };
    let scaling = match kind {
        ExtensionKind::Linear => json!({"rope_type": "linear", "factor": factor}),
        ExtensionKind::Dynamic => json!({"rope_type": "dynamic", "factor": factor}),
        ExtensionKind::Yarn => {
            json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": context})
        }
        ExtensionKind::Ntk => json!({"rope_type": "default"}),
    };
    let nested = model.ropes.len() > 1;
    let Some(object) = config.as_object_mut() else { unreachable!("it was read as a configuration") };
    let present = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    let [new, has_theta, has_scaling] = ["rope_parameters", "rope_theta", "rope_scaling"].map(present);
    let old = !new || has_theta || has_scaling;
    if old && (ntk || !has_theta) {
        object.insert("rope_theta".to_string(), json!(theta));
    }
    let mut parameters = None;
    if new {
        let mut place = &mut object["rope_parameters"];
        if nested {
            place = &mut place["full_attention"];
        }
        *place = stretched(place, &scaling, Some(theta));
        parameters = Some(place.clone());
    }
    if old && (!ntk || has_scaling) {
        // transformers 5 reads this one where a file has both, so it has to be complete
        let before = object.get("rope_scaling").unwrap_or(&Value::Null);
        let inner_theta = before.get("rope_theta").map(|_| theta);
        let after = parameters.unwrap_or_else(|| stretched(before, &scaling, inner_theta));
        object.insert("rope_scaling".to_string(), after);
    }
    if kind != ExtensionKind::Dynamic {
        object.insert("max_position_embeddings".to_string(), json!(longer as u64));
    }
    // that what was written is one configuration
    ModelConfig::from_value(config, file).map(drop)
}

/// One object of rotary keys, unscaled before, with the keys of `scaling`; `theta` is written if given.
fn stretched(before: &Value, scaling: &Value, theta: Option<f64>) -> Value {
    let mut after = before.as_object().cloned().unwrap_or_default();
    // what an unscaled one can say about scaling is neutral
    after.retain(|key, _| ["rope_theta", "partial_rotary_factor"].contains(&key.as_str()));
    after.extend(scaling.as_object().cloned().unwrap_or_default());
    if let Some(theta) = theta {
        after.insert("rope_theta".to_string(), json!(theta));
    }
    Value::Object(after)
}
