//! The programs that a model runs: one step over S tokens of B slots, in the forms that prefill, decode and the
//! checkers need. All have the same head of arguments: parameters, cache, tokens, position.

use converter::Packing;
use xla::DType;
use xla::graph::{Emission, Graph, Module, Platform, Sharding, Tensor};
use xla::pjrt::{CompileOptions, OptionOverride};

use super::engine::CacheOptions;
use crate::Error;
use crate::config::ModelConfig;
use crate::generation::sampling::{SamplerArgs, SamplerSpec, best, log_softmax, sample};
use crate::kv_cache::{CacheShape, KvCache, Layout, Pages, Place};
use crate::model;
use crate::params::{self, Devices, Llama, Param, Weight};
use crate::precision::Precision;
use crate::sharding::MeshShape;

/// What a step gives back besides the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// The sampled next token (B, 1) and the next position (B), then the log-probabilities that the spec asks for.
    Token(SamplerSpec),
    /// After the last token that counts: the `count` most likely ids (B, n) i32 and their log-probabilities (B, n) f32, and if
    /// `hidden`, the hidden states of all S positions (B, S, M) f32. For searches, whose next tokens the host chooses.
    Best {
        /// n.
        count: usize,
        /// Whether hidden states are wanted.
        hidden: bool,
    },
    /// Logits of all S positions, (B, S, V) f32.
    Logits,
    /// Logits and every named value of the model, for comparison with goldens.
    Activations,
}

/// A program, by everything that shapes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepSpec {
    /// S: tokens per slot in one run. 1 with [`Output::Token`] is the decode step.
    pub tokens: usize,
    /// The cache it runs on.
    pub cache: CacheShape,
    /// Cache positions that attention reads where all are kept.
    pub read_len: usize,
    /// What comes back.
    pub output: Output,
}

impl StepSpec {
    /// The step that takes the likeliest token, by itself: a prefill of an empty cache, or decode of a full one.
    pub fn alone(tokens: usize, cache: CacheShape, model: &Blueprint) -> StepSpec {
        let end = if tokens == 1 { cache.len } else { tokens };
        let output = Output::Token(SamplerSpec::default());
        StepSpec { tokens, cache, read_len: model.read_len(&cache, tokens, end), output }
    }

    /// True for the step that feeds itself: one token in, one token out, nothing from the host.
    pub fn is_decode(&self) -> bool {
        self.tokens == 1 && matches!(self.output, Output::Token(_))
    }
}

/// Elements of a TPU's vector along the last axis.
const LANES: usize = 128;

/// A model as programs are built of it.
#[derive(Clone, Debug)]
pub struct Blueprint {
    /// Its configuration, with as many key/value heads as the mesh needs.
    pub cfg: ModelConfig,
    /// Its parameters with the shapes that they have on the mesh: key/value heads repeated, vocabulary padded.
    pub params: Llama<Param>,
    /// The type of parameters, products and, unless it is said otherwise, the cache.
    pub dtype: DType,
    /// The devices.
    pub mesh: MeshShape,
    /// What they are.
    pub platform: Platform,
    /// For whom the sharding is written.
    pub partitioner: Emission,
    /// Kernels that the plugin knows.
    pub kernels: &'static [&'static str],
}

impl Blueprint {
    /// A model of these parameters on a mesh. What is packed stays so where a group lies on one device.
    ///
    /// # Errors
    /// Those of [`MeshShape::check`].
    pub fn new(
        cfg: &ModelConfig,
        params: &Llama<Param>,
        precision: impl Into<Precision>,
        mesh: MeshShape,
        platform: Platform,
    ) -> Result<Blueprint, Error> {
        mesh.check(cfg)?;
        let precision = precision.into();
        let dtype = precision.dtype;
        let devices = Devices { dtype, platform, mesh };
        let packed = |p: Param| {
            let packing = precision.packing(&p).and_then(|packing| devices.packing(&p, packing));
            Param { packing, ..p }
        };
        // libtpu copies a head of integers whose parts are not whole vectors.
        let integers = params.iter().into_iter().any(|p| precision.packing(p).is_some());
        let whole = if platform == Platform::Tpu && integers { LANES } else { 1 };
        let params = params::on_mesh(params, cfg, mesh, whole).map(&mut |p| packed(p));
        let n_kv_heads = mesh.kv_heads(cfg);
        let mut cfg = cfg.clone();
        cfg.n_kv_heads = n_kv_heads;
        Ok(Blueprint { cfg, params, dtype, mesh, platform, partitioner: Emission::Shardy, kernels: &[] })
    }

    /// The devices as they have its parameters.
    pub fn devices(&self) -> Devices {
        Devices { dtype: self.dtype, platform: self.platform, mesh: self.mesh }
    }

    /// The same with sharding written for another partitioner.
    pub fn with_partitioner(self, partitioner: Emission) -> Blueprint {
        Blueprint { partitioner, ..self }
    }

    /// The same with calls of these kernels, where one device runs all of it: a partitioner does not look into them.
    pub fn with_kernels(self, kernels: &'static [&'static str]) -> Blueprint {
        Blueprint { kernels: if self.devices().in_blocks() { kernels } else { &[] }, ..self }
    }

    /// A program's text as its compiler takes it.
    pub fn stablehlo(&self, module: &Module) -> String {
        module.stablehlo_with(self.partitioner)
    }

    /// How its programs are compiled.
    pub fn compile_options(&self) -> CompileOptions {
        let options = compile_options(self.platform);
        match self.mesh.devices() {
            1 => options,
            devices => CompileOptions {
                use_shardy_partitioner: self.partitioner == Emission::Shardy,
                env_options: options.env_options,
                ..CompileOptions::sharded(devices)
            },
        }
    }

    /// A cache of `batch` slots, more if the mesh asks for it, of at least `len` positions.
    pub fn cache_shape(&self, options: &CacheOptions, batch: usize, mut len: usize) -> CacheShape {
        let batch = self.mesh.batch(batch);
        let pages = options.page_size.map(|size| {
            len = len.next_multiple_of(size);
            Pages { size, count: options.pages.unwrap_or(batch * len / size) }
        });
        // Beside packed weights f32 would lose what reading these saves.
        let packed = self.platform == Platform::Cpu && self.params.iter().into_iter().any(|p| p.packing.is_some());
        let dtype = options.dtype.unwrap_or(if packed { DType::F16 } else { self.dtype });
        CacheShape { batch, len, dtype, pages, platform: self.platform }
    }

    /// Cache positions that a step over `tokens` tokens reads which ends at position `end`: coarse steps, so that few programs
    /// serve many lengths. What begins at position 0 sees itself only; rings are read whole, so that one program serves a model
    /// that has nothing else; and a kernel finds the end by itself.
    pub fn read_len(&self, cache: &CacheShape, tokens: usize, end: usize) -> usize {
        let rings = self.cfg.layers.iter().all(|layer| matches!(cache.layout(layer), Layout::Ring { .. }));
        let by_kernel = self.kernels.contains(&model::ATTEND) && cache.pages.is_none();
        let least = if tokens == 1 { READ_MIN } else { tokens };
        match (rings || by_kernel, end == tokens && tokens > 1) {
            (true, _) => cache.len,
            (_, true) => tokens,
            _ => end.max(least).next_power_of_two().min(cache.len),
        }
    }

    /// What the weights are: a float type, or the packing of most matrices.
    pub fn weights(&self) -> &'static str {
        let packings = self.params.iter().into_iter().filter_map(|p| p.packing);
        // The embedding and the head may have more.
        let packing = packings.min_by_key(|packing| packing.format.codes().1);
        packing.map_or(self.dtype.name(), Packing::name)
    }

    /// V with the padding that the mesh asks for.
    pub fn vocab(&self) -> usize {
        self.params.embedding.shape[0]
    }

    /// How an array with these logical axes lies on the mesh in programs over `cache`; `None` without a mesh.
    pub fn sharding(&self, cache: &CacheShape, logical: &[&str], dims: &[usize]) -> Option<Sharding> {
        self.mesh.rules(cache, 1).resolve(&self.mesh.mesh()?, logical, dims).ok()
    }

    /// An empty graph of a program over `tokens` tokens of each slot of `cache`.
    pub(super) fn graph(&self, name: &str, cache: &CacheShape, tokens: usize) -> Graph {
        let g = Graph::new(name);
        g.set_platform(self.platform);
        g.set_kernels(self.kernels);
        if let Some(mesh) = self.mesh.mesh() {
            g.set_mesh(mesh, self.mesh.rules(cache, tokens));
            // Loops and slices between its custom calls crash GSPMD in the builds that were tried.
            g.without_manual(self.partitioner == Emission::Gspmd);
        }
        g
    }
}

/// Options for every program of one device. On a CPU with 512-bit vectors LLVM prefers 256 bits unless told, and a one-row
/// product in f32 gains 3 to 10 %; and XLA:CPU's fast minimum and maximum would drop NaN, which StableHLO keeps.
pub fn compile_options(platform: Platform) -> CompileOptions {
    let mut options = CompileOptions::default();
    if platform == Platform::Cpu {
        options.env_options.insert("xla_cpu_prefer_vector_width".into(), OptionOverride::Int(512));
        options.env_options.insert("xla_cpu_enable_fast_min_max".into(), OptionOverride::Bool(false));
    }
    options
}

/// Decode reads the cache up to a power of two from here on, so that a long cache costs only what is in it.
const READ_MIN: usize = 512;

/// Builds the step as a module.
///
/// Arguments: parameters (in declaration order), cache (donated), tokens (B, S), position (B), the table of pages (B, N) where the
/// cache is paged, and frequencies where they depend on the length of the text; all but decode add `valid` (B), how many
/// of the S tokens count. Prefill with [`Output::Token`] adds `last` (B), 1 where the prompt ends here, and `token` (B, 1), kept
/// where it does not; then the sampler's. Results: cache, then what [`Output`] says, tokens and positions first, the
/// sampler's counts last.
pub fn build(spec: &StepSpec, model: &Blueprint) -> Result<Module, Error> {
    let cfg = &model.cfg;
    let name = match spec.output {
        Output::Token(_) if spec.is_decode() => "decode",
        Output::Token(_) => "prefill",
        Output::Best { .. } => "search",
        Output::Logits => "logits",
        Output::Activations => "activations",
    };
    let g = model.graph(name, &spec.cache, spec.tokens);
    if spec.output == Output::Activations {
        // What is inside functions and kernels has no names.
        g.inline_calls(true);
        g.set_kernels(&[]);
    }
    let p = params::declare_args(&g, &model.params, model.devices());
    let cache = KvCache::declare(&g, spec.cache, cfg);
    let (b, s) = (spec.cache.batch, spec.tokens);
    let tokens = g.arg("tokens", DType::I32, &[b, s]);
    let first = g.arg("position", DType::I32, &[b]);
    let place = Place {
        positions: first.broadcast(&[b, s], &[0]) + g.iota(DType::I32, &[b, s], 1),
        table: spec.cache.pages.map(|_| g.arg("table", DType::I32, &[b, spec.cache.table_len()])),
        read_len: spec.read_len,
        valid: None,
        first,
    };
    let frequencies = model::frequencies(&g, b, None, cfg);
    let place = Place { valid: (!spec.is_decode()).then(|| g.arg("valid", DType::I32, &[b])), ..place };
    let step = Step { spec, p: &p, tokens, place, frequencies, cache, cfg };

    match spec.output {
        Output::Token(sampler) => step.token(&g, sampler),
        Output::Best { count, hidden } => {
            let states = model::final_norm(&p, &step.forward(&g), cfg);
            let last = step.last(&states);
            let logits = model::lm_head(&p, &last, cfg).reshape(&[b, p.embedding.shape()[0]]);
            let (ids, log_probabilities) = best(&log_softmax(&logits), count);
            g.output("ids", &ids);
            g.output("log_probabilities", &log_probabilities);
            if hidden {
                g.output("hidden", &states);
            }
        }
        Output::Logits | Output::Activations => {
            let hidden = model::final_norm(&p, &step.forward(&g), cfg);
            g.output_sharded("logits", &model::lm_head(&p, &hidden, cfg), &["batch", "sequence", "vocab"]);
            if spec.output == Output::Activations {
                for (name, value) in g.taps().into_iter().filter(|(name, _)| name != "logits") {
                    g.output(&name, &value);
                }
            }
        }
    }
    Ok(g.finish()?)
}

struct Step<'a> {
    spec: &'a StepSpec,
    p: &'a Llama<Weight>,
    tokens: Tensor,
    place: Place,
    frequencies: Vec<Tensor>,
    cache: KvCache<Tensor>,
    cfg: &'a ModelConfig,
}

impl Step<'_> {
    /// Hidden states (B, S, M) before the last norm; the updated cache is given back.
    fn forward(&self, g: &Graph) -> Tensor {
        let Step { spec, p, tokens, place, frequencies, cache, cfg } = self;
        let decoded = model::forward(p, tokens, place, frequencies, cache, &spec.cache, cfg);
        for (old, new) in cache.iter().zip(decoded.cache.iter()) {
            g.output_aliased(&old.name().unwrap_or_default(), new, old);
        }
        decoded.hidden
    }

    /// The states of the last token that counts, (B, 1, M).
    fn last(&self, hidden: &Tensor) -> Tensor {
        match &self.place.valid {
            Some(valid) if self.spec.tokens > 1 => last_row(hidden, valid),
            _ => hidden.clone(),
        }
    }

    fn token(&self, g: &Graph, sampler: SamplerSpec) {
        let b = self.spec.cache.batch;
        let prefill = (!self.spec.is_decode()).then(|| Prefill::declare(g, b, &sampler));
        let args = SamplerArgs::declare(g, sampler, b, self.p.embedding.shape()[0]);
        let hidden = self.forward(g);
        let norm = |x: &Tensor| model::final_norm(self.p, x, self.cfg);
        // Only the last position that counts goes through the head, and on a TPU through the norm.
        let last = match g.platform() {
            Platform::Tpu => norm(&self.last(&hidden)),
            _ => self.last(&norm(&hidden)),
        };
        let next = match &self.place.valid {
            Some(valid) => &self.place.first + valid,
            None => &self.place.first + 1i64,
        };
        let logits = model::lm_head(self.p, &last, self.cfg).reshape(&[b, self.p.embedding.shape()[0]]);
        let sampled = sample(&logits, &next, &args);
        let token = sampled.reshape(&[b, 1]);
        let token = match &prefill {
            Some(prefill) => prefill.ends(&[b, 1]).select(&token, &prefill.token),
            None => token,
        };
        g.output("token", &token);
        g.output("position", &next);
        if let Some(count) = sampler.log_probabilities {
            let all = log_softmax(&logits);
            let (ids, values) = best(&all, count);
            let now = [all.take_along(&token, 1), ids, values];
            for (i, (name, now)) in LOG_PROBABILITIES.into_iter().zip(now).enumerate() {
                let value = match &prefill {
                    Some(prefill) => prefill.ends(now.shape()).select(&now, &prefill.log_probabilities[i]),
                    None => now,
                };
                g.output(name, &value);
            }
        }
        if let Some(counts) = &args.output_counts {
            let id = g.iota(DType::I32, counts.shape(), 1);
            let mut drawn = id.eq(&token.broadcast_to(counts.shape())).cast(DType::I32);
            if let Some(prefill) = &prefill {
                drawn = drawn * prefill.ends(counts.shape()).cast(DType::I32);
            }
            g.output_aliased("sampler/output_counts", &(counts + drawn), counts);
        }
    }
}

/// Of the token drawn, ids of the most likely, and theirs.
const LOG_PROBABILITIES: [&str; 3] = ["log_probability", "best_ids", "best_log_probabilities"];

/// What a prefill is given beside a step's arguments: which slots end here, and what the others keep.
struct Prefill {
    last: Tensor,
    token: Tensor,
    log_probabilities: Vec<Tensor>,
}

impl Prefill {
    fn declare(g: &Graph, b: usize, sampler: &SamplerSpec) -> Prefill {
        let last = g.arg("last", DType::I32, &[b]);
        let token = g.arg("token", DType::I32, &[b, 1]);
        let kept = sampler.log_probabilities.map(|n| [(DType::F32, 1), (DType::I32, n), (DType::F32, n)]);
        let kept = kept.into_iter().flatten().zip(LOG_PROBABILITIES);
        let log_probabilities = kept.map(|((dtype, n), name)| g.arg(&format!("kept/{name}"), dtype, &[b, n])).collect();
        Prefill { last, token, log_probabilities }
    }

    /// True in the rows of the slots whose prompt ends here.
    fn ends(&self, shape: &[usize]) -> Tensor {
        self.last.ne(0i64).reshape(&[shape[0], 1]).broadcast_to(shape)
    }
}

/// Row `valid − 1` of each slot (the first where nothing counts): (B, S, M), (B) → (B, 1, M).
fn last_row(hidden: &Tensor, valid: &Tensor) -> Tensor {
    let g = hidden.graph();
    let (b, m) = (hidden.dim(0), hidden.dim(2));
    if g.mesh().is_some() {
        // A slice would first gather what is split; a sum with one term is exact.
        let place = g.iota(DType::I32, &hidden.shape()[..2], 1);
        let last = place.eq(&(valid - 1i64).maximum(0).broadcast(place.shape(), &[0]));
        let row = last.broadcast(hidden.shape(), &[0, 1]).select(hidden, 0.0).sum_keep(&[1]);
        return row.shard(["batch", "", "hidden"]);
    }
    let zero = g.scalar(0i64, DType::I32);
    let rows: Vec<Tensor> = (0..b)
        .map(|i| {
            let row = valid.narrow(0, i, 1).reshape(&[]) - 1i64;
            hidden.narrow(0, i, 1).dynamic_slice(&[&zero, &row, &zero], &[1, 1, m])
        })
        .collect();
    g.concatenate(&rows.iter().collect::<Vec<_>>(), 0)
}

/// What is done to a cache between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CacheProgram {
    /// Makes it, of zeros: a masked position still takes part in a product, where 0 · NaN is NaN.
    New,
    /// Slot i becomes a copy of slot `parents[i]`, (B) i32. Pages stay as they are: slots share them.
    Reorder,
    /// Page `to[i]` becomes a copy of page `from[i]`, (n) i32 each; a `to` past the last page writes nothing.
    CopyPages {
        /// n.
        count: usize,
    },
}

/// Builds a program over the cache alone, which is donated and given back.
pub fn build_cache_program(program: CacheProgram, shape: CacheShape, model: &Blueprint) -> Result<Module, Error> {
    let cfg = &model.cfg;
    let arrays = || {
        let layers = cfg.layers.iter().enumerate();
        layers.flat_map(|(i, layer)| {
            shape.arrays(cfg, layer).into_iter().map(move |array| (i, shape.layout(layer), array))
        })
    };
    let g = model.graph("cache", &shape, 1);
    if program == CacheProgram::New {
        for (i, layout, (part, dtype, dims)) in arrays() {
            g.output_sharded(&format!("cache/{i}/{part}"), &g.full(0.0, dtype, &dims), layout.axes(shape.platform));
        }
        return Ok(g.finish()?);
    }
    let old = KvCache::declare(&g, shape, cfg);
    let index = |name: &str, n: usize| g.arg(name, DType::I32, &[n]);
    // What is done to the arrays of slots, and to pools of pages.
    type Change = Box<dyn Fn(&Tensor) -> Tensor>;
    let (slots, pools): (Change, Change) = match program {
        CacheProgram::CopyPages { count } => {
            let (from, to) = (index("from", count), index("to", count).reshape(&[count, 1]));
            (Box::new(Tensor::clone), Box::new(move |pool| pool.scatter(&to, &pool.take(&from, 0), None, false)))
        }
        _ => {
            let parents = index("parents", shape.batch);
            (Box::new(move |array| array.take(&parents, 0)), Box::new(Tensor::clone))
        }
    };
    for (array, (_, layout, _)) in old.iter().zip(arrays()) {
        let new = if matches!(layout, Layout::Paged(_)) { pools(array) } else { slots(array) };
        g.output_aliased(&array.name().unwrap_or_default(), &new, array);
    }
    Ok(g.finish()?)
}
