//! `xllama emit`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::json;
use xla::DType;
use xla::graph::Platform;
use xla::pjrt::{Client, CompileOptions, OptionOverride};
use xllama::Error;
use xllama::precision::Precision;
use xllama::runtime::{Blueprint, StepSpec, build, cache_len};

use super::Context;
use super::generate::context_len;
use super::model_args::ModelArgs;

/// Write the program of a model as text.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama emit --program decode --format stablehlo -o decode.mlir")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Which program.
    #[arg(long, value_enum)]
    program: Which,
    /// As we build it, or as the plugin optimizes it.
    #[arg(long, value_enum, default_value_t = Format::Stablehlo)]
    format: Format,
    /// The file to write [default: standard output].
    #[arg(short, long, value_name = "F")]
    out: Option<PathBuf>,
    /// Batch slots.
    #[arg(long, value_name = "B", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Positions of the cache [default: 2048, up to the model's own].
    #[arg(long, value_name = "N")]
    max_seq: Option<usize>,
    /// Tokens of one prefill.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum Which {
    Prefill,
    Decode,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Stablehlo,
    Hlo,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        if context.json && self.out.is_none() {
            let what = "is needed with --json: standard output then holds the JSON alone".into();
            return Err(Error::Option { name: "out".into(), what }.into());
        }
        let checkpoint = self.model.model.open(context)?;
        let cfg = checkpoint.config();
        let tokens = match self.program {
            Which::Prefill => self.prompt_tokens as usize,
            Which::Decode => 1,
        };
        let asked = self.max_seq.unwrap_or(2048.min(cfg.context_len()));
        let len = cache_len(context_len(&checkpoint, tokens, asked, Some(asked))?);
        let precision = Precision::of(self.model.dtype, DType::F32);
        let mesh = &self.model.mesh;
        let plugin = match self.format {
            Format::Stablehlo => None,
            Format::Hlo => {
                Some(self.model.device.client(&self.model.device.plugin_path(context)?, mesh.mesh.devices())?)
            }
        };
        let platform = match (&plugin, &self.model.device.device) {
            (Some((_, client)), _) => Platform::named(client.platform_name()),
            (None, Some(name)) if !name.contains(['/', '.']) => Platform::named(name),
            _ => Platform::Cpu,
        };
        let model = Blueprint::new(cfg, checkpoint.params(), precision, mesh.mesh, platform)?;
        let model = model.with_partitioner(mesh.emission());
        let cache = model.cache_shape(&self.model.cache.options(), self.batch.into(), len);
        mesh.mesh.check_cache(&cache)?;
        let spec = StepSpec::alone(tokens, cache, &model);
        let text = model.stablehlo(&build(&spec, &model)?);
        let text = match &plugin {
            None => text,
            Some((plugin, client)) => optimized(plugin.path(), client, &text, model.compile_options())?,
        };
        match &self.out {
            None => std::io::stdout().write_all(text.as_bytes())?,
            Some(path) => super::output::Output::new(path)?.write(text.as_bytes())?,
        }
        if let Some(path) = &self.out {
            let json = json!({ "out": path, "bytes": text.len() });
            context.print(&json, || println!("{}: {} bytes", path.display(), text.len()));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The plugin's optimized HLO as text: PJRT hands it out as a protocol buffer only, so the compiler is asked to dump it.
fn optimized(plugin: &Path, client: &Client, text: &str, mut options: CompileOptions) -> anyhow::Result<String> {
    let folder = tempfile::tempdir()?;
    let dump = folder.path().display().to_string();
    options.env_options.insert("xla_dump_to".into(), OptionOverride::Str(dump));
    options.env_options.insert("xla_dump_hlo_as_text".into(), OptionOverride::Bool(true));
    client.compile(text, &options)?;
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder.path())?.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>()?;
    files.retain(|p| p.to_string_lossy().ends_with("after_optimizations.txt"));
    files.sort();
    let file = files.last().ok_or_else(|| Error::Device {
        name: plugin.display().to_string(),
        what: "the plugin wrote no optimized program as text; use --format stablehlo".into(),
    })?;
    Ok(std::fs::read_to_string(file)?)
}
