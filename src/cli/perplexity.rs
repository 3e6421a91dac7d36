//! `xllama perplexity`.

use std::path::PathBuf;
use std::process::ExitCode;

use converter::Precision;
use serde_json::json;
use xllama::Error;
use xllama::perplexity::{Windows, score};

use super::Context;
use super::model_args::{CacheArgs, ModelArgs, parse_precision};

/// Measure the perplexity of a text.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama perplexity book.txt --context 512 --dtype bf16 --kl-base f32")]
pub struct Args {
    /// A UTF-8 text file.
    file: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of a window.
    #[arg(long, value_name = "N", default_value_t = 512)]
    context: usize,
    /// Tokens from one window to the next [default: the context].
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Use at most this many tokens of the text.
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Add mean and largest KL divergence against a run in this type.
    #[arg(long, value_name = "DTYPE", value_parser = parse_precision)]
    kl_base: Option<Precision>,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let text = std::fs::read_to_string(&self.file).map_err(Error::io("reading", &self.file))?;
        let stride = self.stride.unwrap_or(self.context);
        let plugin = self.model.device.plugin_path(context)?;
        let checkpoint = self.model.model.open(context)?;
        let trained = checkpoint.config().context_len();
        if self.context < 2 || self.context > trained {
            let what = format!(
                "must be between 2 and {trained} (max_position_embeddings of the model), found {}",
                self.context
            );
            return Err(Error::Option { name: "context".into(), what }.into());
        }
        if stride == 0 || stride > self.context {
            let what = format!("must be between 1 and --context {}, found {stride}", self.context);
            return Err(Error::Option { name: "stride".into(), what }.into());
        }
        let base_checkpoint = self.kl_base.map(|_| self.model.model.open(context)).transpose()?;
        let loaded = self.model.load_checkpoint(context, plugin.clone(), checkpoint)?;
        let base = match (base_checkpoint, self.kl_base) {
            (Some(checkpoint), Some(precision)) => {
                // The base keeps its cache in its own type.
                let cache = CacheArgs { cache_dtype: None, cache_page: None };
                let args = ModelArgs { dtype: Some(precision), cache, ..self.model.clone() };
                Some(args.load_checkpoint(context, plugin, checkpoint)?)
            }
            _ => None,
        };
        let mut ids = loaded.tokenizer()?.encode(&text, true)?;
        ids.truncate(self.max_tokens.unwrap_or(usize::MAX));
        if ids.len() < 2 {
            return Err(
                Error::Empty(format!("{} has {} tokens, two are needed", self.file.display(), ids.len())).into()
            );
        }
        let guard = context.interrupt.watch();
        let windows = Windows { context: self.context, stride };
        let progress = |done: u64, total: u64| context.reporter.say(&format!("{done} of {total} tokens"));
        let score = score(&loaded.engine, base.as_ref().map(|b| &b.engine), &ids, windows, guard.flag(), &progress)?;
        context.reporter.clear();
        let kl = |x: f64| base.is_some().then_some(x);
        let json = json!({
            "perplexity": score.perplexity(),
            "tokens": score.tokens,
            "nll": score.nll / score.tokens as f64,
            "kl_mean": kl(score.kl_mean()),
            "kl_max": kl(score.kl_max),
            "dtype": loaded.engine.model().weights(),
        });
        context.print(&json, || {
            println!(
                "perplexity {:.4} over {} tokens ({})",
                score.perplexity(),
                score.tokens,
                loaded.engine.model().weights()
            );
            if let Some(base) = &base {
                let dtype = base.engine.model().weights();
                println!("KL against {dtype}: mean {:.3e}, max {:.3e} nats", score.kl_mean(), score.kl_max);
            }
        });
        Ok(ExitCode::SUCCESS)
    }
}
