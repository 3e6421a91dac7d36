//! Options that say how the next token is chosen, and how many texts there are to be.

use xllama::Error;
use xllama::generation::SamplingOptions;

/// The sampler's options; greedy when no temperature is given.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 is greedy; larger is more random [default: what the model's generation_config.json asks for, else 0].
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Choose among the K most likely tokens; 0 is all.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the most likely tokens that reach probability P together.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Leave out tokens less than P times as likely as the most likely one.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Choose among the tokens whose surprise is nearest to the expected one, until they reach probability P.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    typical_p: Option<f32>,
    /// Divide the logits of tokens already seen; 1 is off.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtract from the logits of tokens already generated.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtract from logits for each time the token was generated.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Add X to the logit of a token id; may be given several times.
    #[arg(long, value_name = "ID=X", value_parser = parse_bias, allow_negative_numbers = true)]
    logit_bias: Vec<(u32, f32)>,
    /// Same seed, same text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("must be ID=X, for example 42=-1.5")?;
    let id = id.trim().parse().map_err(|e| format!("token id {id:?}: {e}"))?;
    let bias = bias.trim().parse().map_err(|e| format!("bias {bias:?}: {e}"))?;
    Ok((id, bias))
}

impl SamplingArgs {
    /// The options, with the model's own `generation_config` (if it asks for sampling) where none is given.
    pub fn options(&self, generation_config: Option<&serde_json::Value>) -> SamplingOptions {
        let sampled = generation_config.filter(|c| c["do_sample"].as_bool() == Some(true));
        let number = |key: &str| sampled.and_then(|c| c[key].as_f64()).map(|x| x as f32);
        SamplingOptions {
            temperature: self.temperature.or(number("temperature")).unwrap_or(if sampled.is_some() {
                1.0
            } else {
                0.0
            }),
            top_k: self.top_k.or(number("top_k").map(|k| k as usize)).unwrap_or(0),
            top_p: self.top_p.or(number("top_p")).unwrap_or(1.0),
            min_p: self.min_p.or(number("min_p")).unwrap_or(0.0),
            typical_p: self.typical_p.or(number("typical_p")).unwrap_or(1.0),
            repetition_penalty: self.repetition_penalty.or(number("repetition_penalty")).unwrap_or(1.0),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            log_probabilities: None,
            history: Vec::new(),
        }
    }

    /// The options that were given and would change what a search finds, which none of them does.
    fn given(&self) -> impl Iterator<Item = &'static str> {
        let given = [
            ("temperature", self.temperature.is_some_and(|t| t != 0.0)),
            ("top-k", self.top_k.is_some_and(|k| k != 0)),
            ("top-p", self.top_p.is_some()),
            ("min-p", self.min_p.is_some()),
            ("typical-p", self.typical_p.is_some()),
            ("repetition-penalty", self.repetition_penalty.is_some()),
            ("presence-penalty", self.presence_penalty != 0.0),
            ("frequency-penalty", self.frequency_penalty != 0.0),
            ("logit-bias", !self.logit_bias.is_empty()),
            ("seed", self.seed != 0),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name)
    }
}

/// Several texts, searches, and log-probabilities.
#[derive(clap::Args, Clone)]
#[command(next_help_heading = "Several texts and searches")]
pub struct SearchArgs {
    /// Generate N texts, with the seeds --seed, --seed + 1, …
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    samples: Option<u16>,
    /// Search for the N most likely texts; the best is printed, and --json has all.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    beams: Option<u16>,
    /// Compare beams by log-probability over length^X, so that more than 0 favours long ones [default: 1].
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    length_penalty: Option<f32>,
    /// Stop at N whole texts, though one in progress might do better than the worst of them.
    #[arg(long)]
    early_stopping: bool,
    /// Contrastive search: among the --top-k likeliest tokens, the one with the most probability · (1 − A) − likeness to what
    /// stands there · A; 0.6 with --top-k 4 is a good start.
    #[arg(long, value_name = "A", allow_negative_numbers = true)]
    penalty_alpha: Option<f32>,
    /// Give the log-probability of each token, and the N likeliest with theirs: the model's own, before penalties, biases,
    /// temperature and filters.
    #[arg(long, value_name = "N")]
    logprobs: Option<usize>,
}

/// How texts come to be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// One, token by token.
    Draw,
    /// So many, token by token.
    Samples(usize),
    /// Beam search.
    Beams { count: usize, length_penalty: f32, early_stopping: bool },
    /// Contrastive search.
    Contrastive { alpha: f32, top_k: usize },
}

impl Method {
    /// How many slots it needs.
    pub fn slots(self) -> usize {
        match self {
            Method::Draw => 1,
            Method::Samples(count) | Method::Beams { count, .. } => count,
            Method::Contrastive { top_k, .. } => top_k,
        }
    }
}

impl SearchArgs {
    /// What is asked for, beside these options of the sampler and `--stop`.
    ///
    /// # Errors
    /// [`Error::Option`] where options contradict each other.
    pub fn method(&self, sampling: &SamplingArgs, stop: &[String]) -> Result<Method, Error> {
        let option = |name: &str, what: String| Error::Option { name: name.into(), what };
        let asked = [
            ("samples", self.samples.is_some()),
            ("beams", self.beams.is_some()),
            ("penalty-alpha", self.penalty_alpha.is_some()),
        ];
        let asked: Vec<&str> = asked.iter().filter(|(_, given)| *given).map(|(name, _)| *name).collect();
        if let [name, other, ..] = asked[..] {
            return Err(option(name, format!("and --{other} are different ways to choose a text; give one of them")));
        }
        let of_beams = [("length-penalty", self.length_penalty.is_some()), ("early-stopping", self.early_stopping)];
        if let (None, Some((name, _))) = (self.beams, of_beams.iter().find(|(_, given)| *given)) {
            return Err(option(name, "says how beams are chosen; add --beams N, for example 4".into()));
        }
        let refuse = |name: &str, more: Option<&str>, why: &str| match more {
            Some(more) => Err(option(name, format!("cannot be combined with --{more}: {why}; leave one of them out"))),
            None => Ok(()),
        };
        let logprobs = self.logprobs.map(|_| "logprobs");
        if let Some(count) = self.beams {
            let why = "a beam search looks for the most likely texts of the model and draws nothing";
            refuse("beams", sampling.given().next(), why)?;
            refuse("beams", logprobs, "a beam comes with its score")?;
            refuse("beams", stop.first().map(|_| "stop"), "a beam ends where the model ends it")?;
            let length_penalty = self.length_penalty.unwrap_or(1.0);
            if !length_penalty.is_finite() {
                return Err(option("length-penalty", format!("must be a finite number, found {length_penalty}")));
            }
            return Ok(Method::Beams { count: count.into(), length_penalty, early_stopping: self.early_stopping });
        }
        if let Some(alpha) = self.penalty_alpha {
            let why = "contrastive search draws nothing and has its own penalty";
            refuse("penalty-alpha", sampling.given().find(|name| *name != "top-k"), why)?;
            refuse("penalty-alpha", logprobs, "contrastive search does not choose by probability alone")?;
            if !(0.0..=1.0).contains(&alpha) {
                return Err(option("penalty-alpha", format!("must be between 0 and 1, found {alpha}")));
            }
            let Some(top_k) = sampling.top_k.filter(|k| *k > 0) else {
                let what = "needs --top-k K, the number of tokens to choose among; --top-k 4 is a good start";
                return Err(option("penalty-alpha", what.into()));
            };
            return Ok(Method::Contrastive { alpha, top_k });
        }
        Ok(self.samples.map_or(Method::Draw, |count| Method::Samples(count.into())))
    }

    /// Adds what these options ask of the sampler.
    ///
    /// # Errors
    /// [`Error::Option`] where several samples would all be the same.
    pub fn complete(&self, mut sampling: SamplingOptions) -> Result<SamplingOptions, Error> {
        if let Some(count) = self.samples
            && count > 1
            && sampling.temperature == 0.0
        {
            let what = format!("{count} would give the same text {count} times: add --temperature, for example 0.8");
            return Err(Error::Option { name: "samples".into(), what });
        }
        sampling.log_probabilities = self.logprobs;
        Ok(sampling)
    }
}
