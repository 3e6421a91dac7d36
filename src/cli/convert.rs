//! `xllama convert-params` and `xllama export-hf`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use converter::config::RopeExtension;
use converter::{AddedTokens, ConvertOptions, DType, Extension, Precision, Report};
use serde_json::json;
use xllama::{Error, bytes};

use super::Context;
use super::model_args::{ModelArg, parse_precision};
use super::progress::mebibytes;

/// Turn a Hugging Face folder or a GGUF file into per-head parameters.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  xllama convert-params ~/models/Llama-3.2-1B ~/models/Llama-3.2-1B.params --dtype bf16\n  \
                  xllama convert-params smollm2-135m ./small --dtype int4\n  \
                  xllama convert-params smollm2-135m ./long --rope-scaling yarn:4 --add-tokens tokens.txt"
)]
pub struct ConvertArgs {
    /// Type of the written parameters: f32, bf16 or f16, or int8 or int4 with a scale for every 32 terms, norms, biases and
    /// routers as they are [default: the source's, of a quantized GGUF too].
    #[arg(long, value_parser = parse_precision)]
    dtype: Option<Precision>,
    #[command(flatten)]
    paths: Paths,
}

/// Turn per-head parameters back into a folder that transformers loads; the round trip is bit-identical unless the model is
/// extended.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama export-hf smollm2-135m ./SmolLM2-135M")]
pub struct ExportArgs {
    /// Type of the written parameters: f32, bf16 or f16 [default: the source's; that of its config.json for a packed model, bf16
    /// for a quantized GGUF].
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    #[command(flatten)]
    paths: Paths,
}

#[derive(clap::Args)]
struct Paths {
    /// A model folder, a .gguf file or a short name.
    src: String,
    /// The folder to write; it must not exist or be empty.
    dst: PathBuf,
    /// Start a new file when one would grow past this, for example 2GB or 500MiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    shard_size: Option<u64>,
    /// Rows of the embedding and of the output head; new ones are the mean of the old [default: as many as are needed].
    #[arg(long, value_name = "N")]
    vocab_size: Option<usize>,
    /// Add the tokens of this file to the tokenizer: one a line (literally, or as {"content": "<tool>", "special": true}), or
    /// a JSON list of them.
    #[arg(long, value_name = "FILE")]
    add_tokens: Option<PathBuf>,
    /// Stretch the context: yarn:4, linear:2, dynamic:2 or ntk:4.
    #[arg(long, value_name = "KIND:FACTOR")]
    rope_scaling: Option<RopeExtension>,
}

type Work = fn(
    &std::path::Path,
    &std::path::Path,
    &ConvertOptions,
    &(dyn Fn(u64, u64) + Sync),
    &AtomicBool,
) -> converter::Result<Report>;

impl ConvertArgs {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        self.paths.run(context, "converting", self.dtype, converter::convert)
    }
}

impl ExportArgs {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        self.paths.run(context, "exporting", self.dtype.map(Precision::Float), converter::export_hf)
    }
}

impl Paths {
    fn run(self, context: &Context, what: &str, dtype: Option<Precision>, work: Work) -> anyhow::Result<ExitCode> {
        let src = ModelArg { model: self.src.clone() }.path(context)?;
        let guard = context.interrupt.watch();
        let tokens = self.add_tokens.as_deref().map(AddedTokens::read).transpose().map_err(Error::from)?;
        let extension = Extension { vocab_size: self.vocab_size, tokens, rope: self.rope_scaling };
        let options = ConvertOptions { dtype, shard_size: self.shard_size, extension, ..ConvertOptions::default() };
        let progress = |done, total| context.reporter.bytes(what, done, total);
        let report = work(&src, &self.dst, &options, &progress, guard.flag()).map_err(Error::from)?;
        context.reporter.clear();
        for note in &report.notes {
            context.reporter.note(note);
        }
        let json = json!({
            "tensors": report.tensors,
            "bytes": report.bytes,
            "vocab_size": report.vocab_size,
            "added_tokens": report.added_tokens,
            "seconds": report.seconds,
            "peak_rss_bytes": peak_rss(),
        });
        context.print(&json, || {
            let rate = mebibytes((report.bytes as f64 / report.seconds.max(1e-9)) as u64);
            println!(
                "{}: {} tensors, {} in {:.2} s ({rate}/s)",
                self.dst.display(),
                report.tensors,
                mebibytes(report.bytes),
                report.seconds
            );
        });
        Ok(ExitCode::SUCCESS)
    }
}

/// The most memory this process has had resident, where the system tells (Linux: VmHWM).
pub fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|k| k * 1024)
}

fn parse_dtype(name: &str) -> Result<DType, String> {
    DType::parse(name).filter(|d| *d != DType::F64).ok_or_else(|| "must be f32, bf16 or f16".into())
}

fn parse_size(text: &str) -> Result<u64, String> {
    match bytes::parse(text)? {
        0 => Err("must be above 0".into()),
        size => Ok(size),
    }
}
