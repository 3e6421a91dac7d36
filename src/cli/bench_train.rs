//! `xllama bench --train`.

use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;
use xla::graph::Platform;
use xllama::Error;
use xllama::compile::Keep;
use xllama::model::{IGNORED, LossOptions};
use xllama::runtime::{GradientSpec, TrainSpec, Trainer};

use super::bench::{Args, Spread};
use super::{Context, table};

/// A training and its one batch.
struct Training {
    trainer: Trainer,
    tokens: Vec<i32>,
    targets: Vec<i32>,
}

/// One measured step.
struct Step {
    seconds: f64,
    loss: f32,
}

impl Args {
    /// Measures steps of training over one batch of a fixed pseudo-text.
    pub(super) fn run_train(&self, context: &Context) -> anyhow::Result<ExitCode> {
        let (length, batch, parts) = (self.prompt_tokens, self.batch, usize::from(self.training.microbatches));
        if !batch.is_multiple_of(parts) {
            let what = format!("{parts}: {batch} texts (--batch) cannot be split into as many parts");
            return Err(Error::Option { name: "microbatches".into(), what }.into());
        }
        let plugin_path = self.model.device.plugin_path(context)?;
        let checkpoint = self.model.model.open(context)?;
        let limit = checkpoint.config().context_len();
        if length > limit {
            let what = format!("{length} are more than the {limit} positions that the model was made for");
            return Err(Error::Option { name: "prompt-tokens".into(), what }.into());
        }
        let started = Instant::now();
        let (plugin, client, options) = self.model.open(&plugin_path, &checkpoint)?;
        let save = match Platform::named(client.platform_name()) {
            // What is cheap to compute once more is dear to keep where memory is slow.
            Platform::Cpu => Keep::Dots,
            _ => Keep::Everything,
        };
        let save = self.training.keep(save).into();
        let gradient = GradientSpec { batch: batch / parts, tokens: length, loss: LossOptions::default(), save };
        let (spec, adapters) = (TrainSpec::new(gradient, parts), (self.training.lora(), 0));
        let progress = |done, total| context.reporter.bytes("loading parameters", done, total);
        let dtype = options.precision.name();
        context.reporter.say("compiling the step");
        let trainer = Trainer::load(&plugin, client, &checkpoint, options, adapters, spec, &progress)?;
        let load_s = started.elapsed().as_secs_f64();

        let vocab = checkpoint.config().vocab_size as u64;
        let tokens: Vec<i32> = (0..(batch * length) as u64).map(|i| ((i * 7919 + 13) % vocab) as i32).collect();
        let target = |row: &[i32]| row[1..].iter().copied().chain([IGNORED]).collect::<Vec<_>>();
        let targets = tokens.chunks(length).flat_map(target).collect();
        let mut training = Training { trainer, tokens, targets };
        context.reporter.say("a first step");
        let first = training.step()?;
        if self.interactive {
            context.reporter.clear();
            return training.interact(&first);
        }

        let mut steps = Vec::new();
        for i in 0..self.repeat {
            context.reporter.say(&format!("step {} of {}", i + 1, self.repeat));
            steps.push(training.step()?);
        }
        context.reporter.clear();
        let rate = Spread::of(steps.iter().map(|step| (batch * length) as f64 / step.seconds));
        let losses: Vec<f32> = std::iter::once(&first).chain(&steps).map(|step| step.loss).collect();
        let json = json!({
            "train_tok_s": rate.json(),
            "load_s": load_s,
            "losses": losses,
            "peak_rss_mb": peak_rss_mb(),
            "dtype": dtype,
        });
        context.print(&json, || {
            let cells = [rate.median, rate.min, rate.max].map(|rate| format!("{rate:.1}"));
            let mut row = vec![format!("training of {batch} × {length} (tok/s)")];
            row.extend(cells);
            table::print(&["", "median", "min", "max"], &[row], &[1, 2, 3]);
            let memory = peak_rss_mb().map_or(String::new(), |mb| format!("; peak memory {mb:.0} MB"));
            println!("{dtype}; load and compile {load_s:.1} s{memory}");
        });
        Ok(ExitCode::SUCCESS)
    }
}

impl Training {
    fn step(&mut self) -> Result<Step, Error> {
        let started = Instant::now();
        let metrics = self.trainer.step(&self.tokens, &self.targets)?;
        Ok(Step { seconds: started.elapsed().as_secs_f64(), loss: metrics.loss })
    }

    fn interact(&mut self, first: &Step) -> anyhow::Result<ExitCode> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", json!({ "ready": true, "loss": first.loss }))?;
        out.flush()?;
        for line in std::io::stdin().lock().lines() {
            line?;
            let step = self.step()?;
            let answer = json!({ "step_s": step.seconds, "loss": step.loss, "peak_rss_mb": peak_rss_mb() });
            writeln!(out, "{answer}")?;
            out.flush()?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The most memory that this process has held, in MB, where the system says it.
fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kib| kib * 1024.0 / 1e6)
}
