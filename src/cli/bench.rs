//! `xllama bench`.

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;
use xllama::Error;
use xllama::generation::SamplingOptions;
use xllama::runtime::{Engine, Session, TokenRead, kernel_calls};

use super::bench_profile::Profile;
use super::generate::context_len;
use super::model_args::ModelArgs;
use super::train_args::TrainArgs;
use super::{Context, table};

/// Measure prefill and decode, or steps of training: median, smallest and largest of several runs.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  xllama bench --prompt-tokens 512 --gen-tokens 64 --repeat 5
  xllama bench --train --batch 4 --prompt-tokens 256 --dtype bf16 --lora-rank 8")]
pub struct Args {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Tokens of the prompt, or of each text of a training step.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub(super) prompt_tokens: usize,
    /// Tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    gen_tokens: usize,
    /// Runs that count; one more goes first.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = positive)]
    pub(super) repeat: usize,
    /// Add where the time of a decoded token goes: each kernel, and what is between two tokens.
    #[arg(long, conflicts_with = "interactive")]
    profile: bool,
    /// Run once for each line on standard input and answer with a line of JSON: for measuring beside other programs.
    #[arg(long)]
    pub(super) interactive: bool,
    /// Measure steps of training.
    #[arg(long, conflicts_with_all = ["gen_tokens", "profile"], help_heading = "Training")]
    train: bool,
    /// Texts of a training step.
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = positive, requires = "train", help_heading = "Training")]
    pub(super) batch: usize,
    #[command(flatten, next_help_heading = "Training")]
    pub(super) training: TrainArgs,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "must be a whole number above 0".into())
}

/// One measured run.
struct Run {
    prefill: f64,
    decode: f64,
    tokens: Vec<u32>,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        if self.train {
            return self.run_train(context);
        }
        self.training.refuse("--train")?;
        let loaded = self.model.load(context)?;
        context_len(&loaded.checkpoint, self.prompt_tokens.saturating_add(self.gen_tokens), 0, None)?;
        let engine = &loaded.engine;
        let warm = self.once(engine)?;
        let compile = engine.compile_stats();
        if self.interactive {
            return self.interact(engine);
        }

        let mut runs = Vec::new();
        for i in 0..self.repeat {
            context.reporter.say(&format!("run {} of {}", i + 1, self.repeat));
            runs.push(self.once(engine)?);
        }
        context.reporter.clear();
        // A second engine finds every program in the cache on disk.
        let cached = {
            let again = self.model.load(context)?;
            self.once(&again.engine)?;
            again.engine.compile_stats()
        };
        let prefill = Spread::of(runs.iter().map(|r| r.prefill));
        let decode = Spread::of(runs.iter().map(|r| r.decode));
        let bandwidth = decode.median * engine.weight_bytes() as f64 / 1e9;
        let profile = if self.profile { Some(self.profile(engine)?) } else { None };
        let mut json = json!({
            "prefill_tok_s": prefill.json(),
            "decode_tok_s": decode.json(),
            "load_s": loaded.load_time.as_secs_f64(),
            "compile_s": compile.time.as_secs_f64(),
            "compile_was_cached": compile.compiled == 0,
            "compile_cached_s": cached.time.as_secs_f64(),
            "weights_bytes": engine.weight_bytes(),
            "decode_bandwidth_gb_s": bandwidth,
            "dtype": engine.model().weights(),
            "first_tokens": &warm.tokens[..warm.tokens.len().min(16)],
        });
        if let Some(profile) = &profile {
            json["profile"] = profile.json();
        }
        context.print(&json, || {
            let row = |what: String, s: &Spread| vec![what, format!("{:.1}", s.median), format!("{:.1}", s.min), format!("{:.1}", s.max)];
            let rows = [
                row(format!("prefill of {} (tok/s)", self.prompt_tokens), &prefill),
                row(format!("decode of {} (tok/s)", self.gen_tokens), &decode),
            ];
            table::print(&["", "median", "min", "max"], &rows, &[1, 2, 3]);
            println!(
                "{} weights {:.1} MB, decode reads them at {bandwidth:.1} GB/s; load {:.2} s, compile {:.2} s{}, from cache {:.2} s",
                engine.model().weights(),
                engine.weight_bytes() as f64 / 1e6,
                loaded.load_time.as_secs_f64(),
                compile.time.as_secs_f64(),
                if compile.compiled == 0 { " (from cache)" } else { "" },
                cached.time.as_secs_f64(),
            );
            if let Some(profile) = &profile {
                profile.print();
            }
        });
        Ok(ExitCode::SUCCESS)
    }

    /// Prefill of a fixed pseudo-text, then greedy decoding.
    fn once(&self, engine: &Engine) -> anyhow::Result<Run> {
        let prompt = self.prompt(engine);
        let mut session = Session::new(engine, 1, self.prompt_tokens + self.gen_tokens)?;
        engine.prepare(&session.programs(prompt.len(), SamplingOptions::default().spec()))?;
        let started = Instant::now();
        session.prefill(&[prompt], &[SamplingOptions::default()], None)?;
        let mut tokens = ids(session.read_tokens()?)?;
        let prefill = self.prompt_tokens as f64 / started.elapsed().as_secs_f64();

        let started = Instant::now();
        tokens.extend(self.decode(&mut session)?);
        let decode = self.gen_tokens as f64 / started.elapsed().as_secs_f64();
        Ok(Run { prefill, decode, tokens })
    }

    /// A fixed pseudo-text.
    fn prompt(&self, engine: &Engine) -> Vec<u32> {
        let vocab = engine.config().vocab_size as u64;
        (0..self.prompt_tokens as u64).map(|i| ((i * 7919 + 13) % vocab) as u32).collect()
    }

    /// Decodes after a prefill; the next step is on its way before a token is read.
    fn decode(&self, session: &mut Session<'_>) -> anyhow::Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(self.gen_tokens);
        session.decode()?;
        for i in 0..self.gen_tokens {
            let read = session.read_tokens()?;
            if i + 1 < self.gen_tokens {
                session.decode()?;
            }
            tokens.extend(ids(read)?);
        }
        Ok(tokens)
    }

    /// Decodes once more with an eye on the kernels.
    fn profile(&self, engine: &Engine) -> anyhow::Result<Profile> {
        let mut session = Session::new(engine, 1, self.prompt_tokens + self.gen_tokens)?;
        session.prefill(&[self.prompt(engine)], &[SamplingOptions::default()], None)?;
        session.read_tokens()?.wait()?;
        let (decoded, calls) = kernel_calls(|| self.decode(&mut session));
        decoded?;
        Ok(Profile::of(&calls, self.gen_tokens))
    }

    fn interact(&self, engine: &Engine) -> anyhow::Result<ExitCode> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", json!({ "ready": true }))?;
        out.flush()?;
        for line in std::io::stdin().lock().lines() {
            line?;
            let run = self.once(engine)?;
            let first = &run.tokens[..run.tokens.len().min(16)];
            writeln!(out, "{}", json!({ "prefill_tok_s": run.prefill, "decode_tok_s": run.decode, "tokens": first }))?;
            out.flush()?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The tokens of a step, one for each slot.
fn ids(read: TokenRead) -> Result<Vec<u32>, Error> {
    Ok(read.wait()?.into_iter().map(|drawn| drawn.id).collect())
}

pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 };
        Spread { median, min: values[0], max: values[values.len() - 1] }
    }

    pub(super) fn json(&self) -> serde_json::Value {
        json!({ "median": self.median, "min": self.min, "max": self.max })
    }
}
