//! Rotary position embedding: what it is, and its frequencies. How `config.json` says it is in [`read`], how it is
//! stretched for a longer context in [`extend`].

mod extend;
mod read;

use std::f32::consts::PI;

pub(crate) use extend::extend;
pub use extend::{ExtensionKind, RopeExtension};
pub(super) use read::{RopeDefaults, read};

/// Rotary position embedding: the pair i of a head turns by `inv_freq[i]` per position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How many of a head's elements turn, from the first (even); the others pass as they are.
    pub dim: usize,
    /// How the frequencies are stretched for longer contexts.
    pub kind: RopeKind,
}

/// How the frequencies are stretched for longer contexts (`modeling_rope_utils.py` of transformers).
#[derive(Clone, Debug, PartialEq)]
pub enum RopeKind {
    /// Not at all. The NTK-aware change of base is this too: it is no type of its own, only a larger `theta`.
    Default,
    /// Positions are divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Dynamic NTK: past the context of the training, `theta` grows with the length of the text.
    Dynamic {
        /// How fast it grows.
        factor: f64,
        /// The longest text that is not stretched.
        max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071): pairs that turn often within the context are kept, those that turn seldom are divided by
    /// a factor, those between are blended.
    Yarn {
        /// The divisor of the lowest frequencies.
        factor: f64,
        /// Pairs that turn more often than this within the context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are divided.
        beta_slow: f64,
        /// Whether the blend begins and ends at whole pairs.
        truncate: bool,
        /// What cos and sin are multiplied with.
        attention_factor: f64,
        /// The context before the stretch.
        original_max_position_embeddings: f64,
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
    /// LongRoPE (arXiv 2402.13753): each pair has its own divisor, one for short and one for long texts.
    LongRope {
        /// The divisors for texts within the original context, one per turning pair.
        short: Vec<f64>,
        /// The divisors for longer texts.
        long: Vec<f64>,
        /// What cos and sin are multiplied with, for short texts too.
        attention_factor: f64,
        /// The context before the stretch.
        original_max_position_embeddings: f64,
    },
}

impl Rope {
    /// Angle per position of each turning pair, `dim / 2` of them, in float32 with the operations of transformers in their
    /// order: `theta^(-2i / dim)`, then stretched. The power is the nearest float32; PyTorch's own, where it uses vector
    /// instructions, can be the float32 beside that.
    ///
    /// `len` is the number of positions of the text, and matters only where [`Rope::depends_on_length`].
    pub fn inv_freq(&self, len: usize) -> Vec<f32> {
        let theta = self.theta_at(len);
        let (low, high) = self.blended_pairs();
        let pair = |i: usize| {
            let power = powf(theta, (2 * i) as f32 / self.dim as f32);
            match &self.kind {
                RopeKind::Default | RopeKind::Dynamic { .. } => 1.0 / power,
                RopeKind::Linear { factor } => 1.0 / power / *factor as f32,
                RopeKind::Yarn { factor, .. } => {
                    let kept = 1.0 - ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    1.0 / (*factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
                }
                &RopeKind::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: context,
                } => {
                    let inv_freq = 1.0 / power;
                    // PyTorch divides a number by a tensor as the number times the reciprocal
                    let wavelength = 1.0 / inv_freq * (2.0 * PI);
                    if wavelength < (context / high_freq_factor) as f32 {
                        inv_freq
                    } else if wavelength > (context / low_freq_factor) as f32 {
                        inv_freq / factor as f32
                    } else {
                        let blend = (1.0 / wavelength * context as f32 - low_freq_factor as f32)
                            / (high_freq_factor - low_freq_factor) as f32;
                        (1.0 - blend) * inv_freq / factor as f32 + blend * inv_freq
                    }
                }
                RopeKind::LongRope { short, long, .. } => {
                    let divisors = if self.length_class(len) == 0 { short } else { long };
                    1.0 / (divisors[i] as f32 * power)
                }
            }
        };
        (0..self.dim / 2).map(pair).collect()
    }

    /// Whether [`Rope::inv_freq`] differs between lengths.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.kind, RopeKind::Dynamic { .. } | RopeKind::LongRope { .. })
    }

    /// Two lengths with the same answer have the same frequencies: 0 up to the original context; past it 1 for
    /// [`RopeKind::LongRope`] and the length itself for [`RopeKind::Dynamic`].
    pub fn length_class(&self, len: usize) -> usize {
        match self.kind {
            RopeKind::Dynamic { max_position_embeddings, .. } if len > max_position_embeddings => len,
            RopeKind::LongRope { original_max_position_embeddings, .. } => {
                (len as f64 > original_max_position_embeddings) as usize
            }
            _ => 0,
        }
    }

    /// What cos and sin are multiplied with (`attention_scaling` in transformers).
    pub fn attention_factor(&self) -> f64 {
        match self.kind {
            RopeKind::Yarn { attention_factor, .. } | RopeKind::LongRope { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// The base for a text of `len` tokens.
    fn theta_at(&self, len: usize) -> f32 {
        let RopeKind::Dynamic { factor, max_position_embeddings: context } = self.kind else {
            return self.theta as f32;
        };
        let exponent = self.dim as f64 / (self.dim as f64 - 2.0);
        if len > context {
            // the length is a tensor there, so all but the exponent is float32
            let growth = factor as f32 * len as f32 / context as f32 - (factor - 1.0) as f32;
            self.theta as f32 * (growth as f64).powf(exponent) as f32
        } else {
            // 1 but for rounding, which counts
            let context = context as f64;
            (self.theta * (factor * context / context - (factor - 1.0)).powf(exponent)) as f32
        }
    }

    /// Where YaRN's blend begins and ends, as pair numbers.
    fn blended_pairs(&self) -> (f64, f64) {
        let RopeKind::Yarn { beta_fast, beta_slow, truncate, original_max_position_embeddings: context, .. } =
            self.kind
        else {
            return (0.0, 0.0);
        };
        let dim = self.dim as f64;
        // the pair that makes so many turns within the context
        let pair = |turns: f64| (dim * (context / (turns * 2.0 * std::f64::consts::PI)).ln()) / (2.0 * self.theta.ln());
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // as transformers keeps from dividing by zero
        (low, if low == high { high + 0.001 } else { high })
    }
}

impl RopeKind {
    /// The name that files give it as `rope_type`.
    pub fn name(&self) -> &'static str {
        match self {
            RopeKind::Default => "default",
            RopeKind::Linear { .. } => "linear",
            RopeKind::Dynamic { .. } => "dynamic",
            RopeKind::Yarn { .. } => "yarn",
            RopeKind::Llama3 { .. } => "llama3",
            RopeKind::LongRope { .. } => "longrope",
        }
    }
}

/// The nearest float32 to the power.
fn powf(base: f32, exponent: f32) -> f32 {
    (base as f64).powf(exponent as f64) as f32
}

#[cfg(test)]
mod tests;
