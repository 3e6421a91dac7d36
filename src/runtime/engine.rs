//! A model on a device: parameters uploaded once, programs compiled when first needed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use converter::Checkpoint;
use xla::DType;
use xla::pjrt::{Buffer, Client, CompileOptions, Device, LoadedExecutable, OptionOverride, Plugin};

use super::exec_cache::{ExecutableCache, Origin};
use super::program::{self, CacheProgram, StepSpec};
use crate::Error;
use crate::config::ModelConfig;
use crate::kv_cache::{CacheShape, Pages};
use crate::params::{self, Llama, Param};

/// How sessions keep their cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// Element type; that of the parameters if `None`. int8 has a scale for each position and head.
    pub dtype: Option<DType>,
    /// Keep layers with full attention in pages of so many positions, which slots share; otherwise each slot has its own array.
    pub page_size: Option<usize>,
    /// Pages in the pool; enough for all slots if `None`.
    pub pages: Option<usize>,
}

impl CacheOptions {
    /// A cache of `batch` slots of at least `len` positions, of parameters in `dtype`.
    pub fn shape(&self, batch: usize, mut len: usize, dtype: DType) -> CacheShape {
        let pages = self.page_size.map(|size| {
            len = len.next_multiple_of(size);
            Pages { size, count: self.pages.unwrap_or(batch * len / size) }
        });
        CacheShape { batch, len, dtype: self.dtype.unwrap_or(dtype), pages }
    }
}

/// A model, ready to run.
pub struct Engine {
    plugin: Plugin,
    client: Client,
    device: Device,
    cfg: ModelConfig,
    declared: Llama<Param>,
    params: Vec<Buffer>,
    dtype: DType,
    cache_options: CacheOptions,
    executables: ExecutableCache,
    programs: Mutex<HashMap<StepSpec, Arc<Program>>>,
    cache_programs: Mutex<HashMap<(CacheProgram, CacheShape), Arc<LoadedExecutable>>>,
    compiled: Mutex<CompileStats>,
}

/// A compiled step.
pub struct Program {
    /// Loaded on the engine's device.
    pub executable: LoadedExecutable,
    /// Names of the results, the cache first.
    pub results: Vec<String>,
}

/// What compiling has cost so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct CompileStats {
    /// Time spent in building, compiling or loading programs.
    pub time: Duration,
    /// Programs that were compiled.
    pub compiled: usize,
    /// Programs that came from the cache on disk.
    pub cached: usize,
}

impl Engine {
    /// Uploads `checkpoint` as `dtype` to the first device of `client`. Executables are cached in `cache` if given.
    pub fn load(
        plugin: Plugin,
        client: Client,
        checkpoint: &Checkpoint,
        dtype: DType,
        cache: Option<PathBuf>,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Engine, Error> {
        let device = client.addressable_devices().into_iter().next().ok_or_else(|| Error::Device {
            name: plugin.path().display().to_string(),
            what: "the plugin has no device on this machine".into(),
        })?;
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let params = params::upload(checkpoint, dtype, &client, &device, threads, progress)?;
        Ok(Engine {
            executables: ExecutableCache::new(cache, &plugin, &client),
            plugin,
            client,
            device,
            cfg: checkpoint.config().clone(),
            declared: checkpoint.params().clone(),
            params,
            dtype,
            cache_options: CacheOptions::default(),
            programs: Mutex::default(),
            cache_programs: Mutex::default(),
            compiled: Mutex::default(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.cfg
    }

    /// The same engine with caches kept as `options` say.
    pub fn with_cache(mut self, options: CacheOptions) -> Engine {
        self.cache_options = options;
        self
    }

    /// How its sessions keep their cache.
    pub fn cache_options(&self) -> CacheOptions {
        self.cache_options
    }

    /// The type of the parameters, and of caches unless [`CacheOptions`] name another.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The plugin that runs it.
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// The client.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Parameters on the device, in tree order.
    pub fn params(&self) -> &[Buffer] {
        &self.params
    }

    /// Bytes of all parameters as they are on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.declared.iter().iter().map(|p| (p.elements() * params::device_dtype(p, self.dtype).size()) as u64).sum()
    }

    /// What compiling has cost so far.
    pub fn compile_stats(&self) -> CompileStats {
        *lock(&self.compiled)
    }

    /// The executable of `spec`: built, compiled or loaded from disk when first asked for.
    pub fn program(&self, spec: &StepSpec) -> Result<Arc<Program>, Error> {
        if let Some(found) = lock(&self.programs).get(spec) {
            return Ok(found.clone());
        }
        let started = Instant::now();
        let module = program::build(spec, &self.declared, self.dtype, &self.cfg)?;
        let results = module.outputs().iter().map(|o| o.name.clone()).collect();
        let program = Arc::new(Program { executable: self.compile(&module.stablehlo(), started)?, results });
        lock(&self.programs).insert(*spec, program.clone());
        Ok(program)
    }

    /// Gets several programs at once, each on a thread of its own.
    pub fn prepare(&self, specs: &[StepSpec]) -> Result<(), Error> {
        let (started, before) = (Instant::now(), self.compile_stats().time);
        let done = std::thread::scope(|scope| {
            let handles: Vec<_> = specs.iter().map(|s| scope.spawn(move || self.program(s).map(drop))).collect();
            handles.into_iter().try_for_each(|h| h.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
        });
        // The threads worked side by side: what it took is the time of the whole.
        lock(&self.compiled).time = before + started.elapsed();
        done
    }

    /// A program over a cache alone, with its arguments and results in the order of [`crate::kv_cache::KvCache::iter`].
    pub fn cache_program(&self, program: CacheProgram, shape: CacheShape) -> Result<Arc<LoadedExecutable>, Error> {
        if let Some(found) = lock(&self.cache_programs).get(&(program, shape)) {
            return Ok(found.clone());
        }
        let started = Instant::now();
        let module = program::build_cache_program(program, shape, &self.cfg)?;
        let executable = Arc::new(self.compile(&module.stablehlo(), started)?);
        lock(&self.cache_programs).insert((program, shape), executable.clone());
        Ok(executable)
    }

    fn compile(&self, text: &str, started: Instant) -> Result<LoadedExecutable, Error> {
        let (executable, origin) = self.executables.get(&self.client, text, &compile_options(&self.client))?;
        let mut stats = lock(&self.compiled);
        stats.time += started.elapsed();
        match origin {
            Origin::Compiled => stats.compiled += 1,
            Origin::Cached => stats.cached += 1,
        }
        Ok(executable)
    }
}

/// Options for every program. On a CPU with 512-bit vectors LLVM prefers 256 bits unless told, and a one-row product in
/// f32 gains 3 to 10 %; and XLA:CPU's fast minimum and maximum would drop NaN, which StableHLO keeps.
pub fn compile_options(client: &Client) -> CompileOptions {
    let mut options = CompileOptions::default();
    if client.platform_name().eq_ignore_ascii_case("cpu") {
        options.env_options.insert("xla_cpu_prefer_vector_width".into(), OptionOverride::Int(512));
        options.env_options.insert("xla_cpu_enable_fast_min_max".into(), OptionOverride::Bool(false));
    }
    options
}

/// The data behind these locks is valid whatever happened to the thread that held them.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
