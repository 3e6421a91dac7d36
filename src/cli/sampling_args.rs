//! Options that say how the next token is chosen.

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
            repetition_penalty: self.repetition_penalty.or(number("repetition_penalty")).unwrap_or(1.0),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            history: Vec::new(),
        }
    }
}
