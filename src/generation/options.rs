//! What a user asks of a generation, checked once, and its form on the device.

use super::sampling::SamplerSpec;
use crate::Error;

/// How the next token is chosen. [`SamplingOptions::default`] is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k largest logits; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most likely ids whose probability reaches p, 0 < p ≤ 1.
    pub top_p: f32,
    /// Keep ids at least this likely relative to the most likely one, 0 ≤ p ≤ 1.
    pub min_p: f32,
    /// Keep the ids whose surprise is nearest to the entropy, until their probability reaches p, 0 < p ≤ 1 (locally typical
    /// sampling, Meister et al. 2023); 1 is off.
    pub typical_p: f32,
    /// Divides (or multiplies, if negative) the logits of ids seen in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from ids already generated; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted for each time an id was generated; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, same text.
    pub seed: u64,
    /// Give the log-probability of each token drawn, and those of this many most likely ids.
    pub log_probabilities: Option<usize>,
    /// Ids that stand before the prompt in the same text; the repetition penalty counts them too.
    pub history: Vec<u32>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        SamplingOptions {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            log_probabilities: None,
            history: Vec::new(),
        }
    }
}

/// The numbers of [`SamplingOptions`] as one row of f32 for the device.
pub struct Settings;

impl Settings {
    /// Numbers in a row.
    pub const LEN: usize = 8;
    /// Column of the temperature.
    pub const TEMPERATURE: usize = 0;
    /// Column of top-k; the vocabulary size where all are kept.
    pub const TOP_K: usize = 1;
    /// Column of top-p.
    pub const TOP_P: usize = 2;
    /// Column of min-p.
    pub const MIN_P: usize = 3;
    /// Column of the repetition penalty.
    pub const REPETITION: usize = 4;
    /// Column of the presence penalty.
    pub const PRESENCE: usize = 5;
    /// Column of the frequency penalty.
    pub const FREQUENCY: usize = 6;
    /// Column of typical-p.
    pub const TYPICAL_P: usize = 7;
}

impl SamplingOptions {
    /// Checks every number against its range and every id against the vocabulary.
    pub fn validate(&self, vocab: usize) -> Result<(), Error> {
        let check = |ok: bool, name: &str, range: &str, found: f32| match ok {
            true => Ok(()),
            false => Err(Error::Option { name: name.into(), what: format!("must be {range}, found {found}") }),
        };
        let t = self.temperature;
        check(t.is_finite() && t >= 0.0, "temperature", "a number of at least 0 (0 is greedy)", t)?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top-p", "above 0 and at most 1", self.top_p)?;
        check((0.0..=1.0).contains(&self.min_p), "min-p", "between 0 and 1", self.min_p)?;
        check(self.typical_p > 0.0 && self.typical_p <= 1.0, "typical-p", "above 0 and at most 1", self.typical_p)?;
        let r = self.repetition_penalty;
        check(r.is_finite() && r > 0.0, "repetition-penalty", "a number above 0 (1 is off)", r)?;
        check(self.presence_penalty.is_finite(), "presence-penalty", "a finite number", self.presence_penalty)?;
        check(self.frequency_penalty.is_finite(), "frequency-penalty", "a finite number", self.frequency_penalty)?;
        if let Some(n) = self.log_probabilities
            && n > vocab
        {
            let what = format!("must be at most {vocab}, the ids of the model, found {n}");
            return Err(Error::Option { name: "logprobs".into(), what });
        }
        for &(id, bias) in &self.logit_bias {
            check(
                !bias.is_nan() && bias < f32::INFINITY,
                "logit-bias",
                "a finite number, or -inf to forbid an id",
                bias,
            )?;
            if id as usize >= vocab {
                return Err(Error::TokenId { id: i64::from(id), vocab, place: "logit-bias".into() });
            }
        }
        Ok(())
    }

    /// Which parts of the sampler these options need.
    pub fn spec(&self) -> SamplerSpec {
        SamplerSpec {
            random: self.temperature > 0.0,
            typical: self.temperature > 0.0 && self.typical_p < 1.0,
            penalties: self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0,
            bias: !self.logit_bias.is_empty(),
            log_probabilities: self.log_probabilities,
        }
    }

    /// The row of [`Settings`].
    pub fn settings(&self, vocab: usize) -> [f32; Settings::LEN] {
        let top_k = if self.top_k == 0 { vocab } else { self.top_k.min(vocab) };
        // A temperature so small that logits overflow is greedy in all but name: keep the quotient finite.
        let temperature = self.temperature.max(1e-4);
        [
            temperature,
            top_k as f32,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.typical_p,
        ]
    }
}
