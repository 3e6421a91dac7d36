//! A model on a device: parameters uploaded once, programs compiled when first needed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use converter::Checkpoint;
use xla::DType;
use xla::graph::{Emission, Module, Platform};
use xla::pjrt::{Client, LoadedExecutable, Plugin};

use super::exec_cache::{ExecutableCache, Origin};
use super::handlers::of_client;
use super::placement::{Array, ArrayLayout, Placement};
use super::program::{self, Blueprint, CacheProgram, StepSpec};
use super::upload::upload;
use crate::Error;
use crate::config::ModelConfig;
use crate::kv_cache::CacheShape;
use crate::precision::Precision;
use crate::sharding::MeshShape;

/// How sessions keep their cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheOptions {
    /// Element type; if `None` that of the parameters, but f16 where these are packed on a CPU. int8 has a scale for each position and head.
    pub dtype: Option<DType>,
    /// Keep layers with full attention in pages of so many positions, which slots share; otherwise each slot has its own array.
    pub page_size: Option<usize>,
    /// Pages in the pool; enough for all slots if `None`.
    pub pages: Option<usize>,
}

/// How a model is put on its devices.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// What is multiplied.
    pub precision: Precision,
    /// The devices.
    pub mesh: MeshShape,
    /// For whom the sharding of programs is written.
    pub partitioner: Emission,
    /// Where executables are cached, if they are.
    pub cache: Option<PathBuf>,
    /// For what the graph's forms are chosen, if not for the devices it runs on: every form runs everywhere.
    pub forms: Option<Platform>,
    /// Whether operations that have a kernel for this machine go to it, where one device runs the model; else everything is
    /// XLA's own.
    pub kernels: bool,
}

impl LoadOptions {
    /// Floats on one device.
    pub fn new(dtype: DType, cache: Option<PathBuf>) -> LoadOptions {
        LoadOptions {
            precision: dtype.into(),
            mesh: MeshShape::default(),
            partitioner: Emission::Shardy,
            cache,
            forms: None,
            kernels: true,
        }
    }
}

/// A model, ready to run.
pub struct Engine {
    plugin: Plugin,
    placement: Placement,
    model: Blueprint,
    params: Vec<Array>,
    cache_options: CacheOptions,
    executables: ExecutableCache,
    programs: Mutex<HashMap<StepSpec, Arc<Program>>>,
    /// Those of them that came compiled.
    adopted: Mutex<Vec<StepSpec>>,
    cache_programs: Mutex<HashMap<(CacheProgram, CacheShape), Arc<Program>>>,
    compiled: Mutex<CompileStats>,
}

/// A compiled step.
pub struct Program {
    /// Loaded on the engine's devices.
    executable: LoadedExecutable,
    /// Names of the results, the cache first.
    pub results: Vec<String>,
    layouts: Vec<Arc<ArrayLayout>>,
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
    /// Puts `checkpoint` on the first devices of `client`.
    ///
    /// # Errors
    /// A mesh that does not divide the model or has more devices than there are (before anything is read); what reading and
    /// uploading say.
    pub fn load(
        plugin: Plugin,
        client: Client,
        checkpoint: &Checkpoint,
        options: LoadOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Engine, Error> {
        let LoadOptions { precision, mesh, partitioner, cache, forms, kernels } = options;
        let platform = forms.unwrap_or(Platform::named(client.platform_name()));
        let model = Blueprint::new(checkpoint.config(), checkpoint.params(), precision, mesh, platform)?
            .with_partitioner(partitioner)
            .with_kernels(of_client(&plugin, &client, kernels));
        let executables = ExecutableCache::new(cache, &plugin, &client);
        let placement = Placement::new(client, mesh)?;
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let params = upload(checkpoint, &model, &placement, threads, progress)?;
        Ok(Engine {
            plugin,
            placement,
            model,
            params,
            cache_options: CacheOptions::default(),
            executables,
            programs: Mutex::default(),
            adopted: Mutex::default(),
            cache_programs: Mutex::default(),
            compiled: Mutex::default(),
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.model.cfg
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
        self.model.dtype
    }

    /// The model as its programs are built.
    pub fn model(&self) -> &Blueprint {
        &self.model
    }

    /// The plugin that runs it.
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// The devices.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Parameters on the devices, in tree order.
    pub fn params(&self) -> &[Array] {
        &self.params
    }

    /// Bytes of all parameters as they are on the device.
    pub fn weight_bytes(&self) -> u64 {
        self.model.params.iter().iter().map(|p| self.model.devices().bytes(p)).sum()
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
        let program = Arc::new(self.compile(&program::build(spec, &self.model)?, started)?);
        lock(&self.programs).insert(*spec, program.clone());
        Ok(program)
    }

    /// Takes a step that was compiled elsewhere, for use in place of any that it covers.
    pub fn adopt(&self, spec: StepSpec, module: &Module, executable: LoadedExecutable) {
        lock(&self.programs).insert(spec, Arc::new(self.loaded(module, executable)));
        lock(&self.adopted).push(spec);
    }

    /// The adopted step that does what `spec` does, or `spec` itself: a decode step may read more positions than are used.
    pub fn covering(&self, spec: StepSpec) -> StepSpec {
        let covers = |own: &&StepSpec| {
            let reads = if spec.tokens == 1 { own.read_len >= spec.read_len } else { own.read_len == spec.read_len };
            reads && StepSpec { read_len: spec.read_len, ..**own } == spec
        };
        let adopted = lock(&self.adopted);
        adopted.iter().filter(covers).min_by_key(|own| own.read_len).copied().unwrap_or(spec)
    }

    /// The adopted prefill for a text of `len` tokens: the smallest that takes them all, else the largest.
    pub fn adopted_prefill(&self, cache: CacheShape, len: usize) -> Option<usize> {
        let adopted = lock(&self.adopted);
        let sizes = adopted.iter().filter(|own| own.cache == cache && own.tokens > 1);
        let sizes: Vec<usize> = sizes.map(|own| own.tokens).collect();
        sizes.iter().filter(|size| **size >= len).min().or(sizes.iter().max()).copied()
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
    pub fn cache_program(&self, program: CacheProgram, shape: CacheShape) -> Result<Arc<Program>, Error> {
        if let Some(found) = lock(&self.cache_programs).get(&(program, shape)) {
            return Ok(found.clone());
        }
        let started = Instant::now();
        let module = program::build_cache_program(program, shape, &self.model)?;
        let compiled = Arc::new(self.compile(&module, started)?);
        lock(&self.cache_programs).insert((program, shape), compiled.clone());
        Ok(compiled)
    }

    fn compile(&self, module: &Module, started: Instant) -> Result<Program, Error> {
        let options = self.placement.assign(self.model.compile_options());
        let (executable, origin) =
            self.executables.get(self.placement.client(), &self.model.stablehlo(module), &options)?;
        let mut stats = lock(&self.compiled);
        stats.time += started.elapsed();
        match origin {
            Origin::Compiled => stats.compiled += 1,
            Origin::Cached => stats.cached += 1,
        }
        Ok(self.loaded(module, executable))
    }

    fn loaded(&self, module: &Module, executable: LoadedExecutable) -> Program {
        let results = module.outputs().iter().map(|output| output.name.clone()).collect();
        let layouts = module.outputs().iter();
        let layouts = layouts.map(|output| self.placement.layout(&output.aval.shape, output.sharding.as_ref()));
        Program { executable, results, layouts: layouts.collect() }
    }

    /// Runs a program over `args`.
    pub fn execute(&self, program: &Program, args: &[&Array]) -> Result<Vec<Array>, Error> {
        self.placement.execute(&program.executable, args, &program.layouts)
    }
}

/// The data behind these locks is valid whatever happened to the thread that held them.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
