//! A program to compile: which model, which step, on which mesh, and what it needs by arithmetic alone.

use std::collections::HashMap;

use xla::graph::{Emission, Module, Platform, Save};
use xla::pjrt::CompileOptions;

use super::target::Target;
use crate::Error;
use crate::config::ModelConfig;
use crate::kv_cache::CacheShape;
use crate::model::LossOptions;
use crate::params::{Llama, Param};
use crate::precision::Precision;
use crate::runtime::{Blueprint, CacheOptions, GradientSpec, StepSpec, TrainSpec, build, build_train};
use crate::sharding::MeshShape;

/// Which step of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many tokens of each slot into an empty cache, and the first token drawn.
    Prefill {
        /// S.
        tokens: usize,
    },
    /// One token of each slot, on a cache that is full.
    Decode,
    /// A step of training over texts of so many tokens, as [`TrainSpec::new`] has it.
    Train {
        /// S.
        tokens: usize,
        /// In how many parts the batch is run (A).
        microbatches: usize,
        /// What blocks keep for the gradient.
        keep: Keep,
    },
}

/// What a block keeps for its gradient; the rest is computed once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// All that the gradient reads.
    Everything,
    /// The results of products.
    Dots,
    /// Nothing.
    Nothing,
}

impl From<Keep> for Save {
    fn from(keep: Keep) -> Save {
        match keep {
            Keep::Everything => Save::Everything,
            Keep::Dots => Save::Dots,
            Keep::Nothing => Save::Nothing,
        }
    }
}

impl Step {
    /// `prefill`, `decode` or `train`.
    pub fn name(self) -> &'static str {
        match self {
            Step::Prefill { .. } => "prefill",
            Step::Decode => "decode",
            Step::Train { .. } => "train",
        }
    }

    /// S: tokens of each slot in one run.
    pub fn tokens(self) -> usize {
        match self {
            Step::Prefill { tokens } | Step::Train { tokens, .. } => tokens,
            Step::Decode => 1,
        }
    }
}

/// A program to compile.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// What the user calls the model.
    pub model: &'a str,
    /// Its configuration.
    pub cfg: &'a ModelConfig,
    /// Its parameters.
    pub params: &'a Llama<Param>,
    /// Type of products, and how parameters are packed; the cache's type too unless `cache` says otherwise.
    pub precision: Precision,
    /// Which step.
    pub step: Step,
    /// B: slots, over all devices; texts of a training step.
    pub batch: usize,
    /// T: positions of the cache, of which training has none.
    pub len: usize,
    /// How the cache is kept.
    pub cache: CacheOptions,
    /// How it is split.
    pub mesh: MeshShape,
    /// For whom the text says so.
    pub partitioner: Emission,
    /// What it is to run on.
    pub platform: Platform,
    /// Kernels that the plugin knows.
    pub kernels: &'static [&'static str],
}

/// A program as text, with what is known of it before it is compiled.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The cache that it runs on; of training one without positions.
    pub cache: CacheShape,
    /// StableHLO.
    pub text: String,
    /// What every target of the platform compiles it with.
    pub options: CompileOptions,
    /// Bytes and operations of one device.
    pub sizes: Sizes,
}

/// What one run of a program needs on one device, by the shapes alone.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sizes {
    /// Bytes of all arguments.
    pub arguments: u64,
    /// Bytes of parameters among them.
    pub weights: u64,
    /// Bytes of the cache among them.
    pub cache: u64,
    /// Bytes of an optimizer's state among them.
    pub state: u64,
    /// Bytes that training writes in place of arguments.
    pub written: u64,
    /// Bytes of experts that no token of the step can have chosen, even if every token chose others.
    pub idle_experts: u64,
    /// Operations of the model's products, split evenly: what the model asks for, not what a program makes of it.
    pub flops: f64,
}

impl Job<'_> {
    /// The model as the program is built of it.
    ///
    /// # Errors
    /// Those of [`Blueprint::new`].
    fn blueprint(&self) -> Result<Blueprint, Error> {
        let model = Blueprint::new(self.cfg, self.params, self.precision, self.mesh, self.platform)?;
        Ok(model.with_partitioner(self.partitioner).with_kernels(self.kernels))
    }

    /// The program.
    ///
    /// # Errors
    /// Those of [`Blueprint::new`], [`MeshShape::check_cache`] and [`build`].
    pub fn prepare(&self) -> Result<Prepared, Error> {
        let model = self.blueprint()?;
        let (cache, read_len, module) = match self.step {
            Step::Train { tokens, microbatches, keep } => {
                let spec = self.train_spec(tokens, microbatches, keep)?;
                (spec.gradient.cache(&model), tokens, build_train(&spec, &model)?)
            }
            Step::Prefill { .. } | Step::Decode => {
                let cache = model.cache_shape(&self.cache, self.batch, self.len);
                let spec = StepSpec::alone(self.step.tokens(), cache, &model);
                self.mesh.check_cache(&spec.cache)?;
                (spec.cache, spec.read_len, build(&spec, &model)?)
            }
        };
        let sizes = self.sizes(read_len, &module);
        Ok(Prepared { cache, text: model.stablehlo(&module), options: model.compile_options(), sizes })
    }

    fn train_spec(&self, tokens: usize, microbatches: usize, keep: Keep) -> Result<TrainSpec, Error> {
        let batch = self.batch / microbatches.max(1);
        if batch * microbatches != self.batch {
            let what = format!("{microbatches}: {} texts (--batch) cannot be split into as many parts", self.batch);
            return Err(Error::Option { name: "microbatches".into(), what });
        }
        let loss = LossOptions::default();
        Ok(TrainSpec::new(GradientSpec { batch, tokens, loss, save: keep.into() }, microbatches))
    }

    /// Tokens that one run takes or gives, those that were asked for only.
    pub fn tokens(&self) -> usize {
        self.batch * self.step.tokens()
    }

    fn sizes(&self, read_len: usize, module: &Module) -> Sizes {
        let params: HashMap<&str, &Param> = self.params.iter().into_iter().map(|p| (p.name.as_str(), p)).collect();
        let mut sizes = Sizes { flops: self.flops(read_len) / self.mesh.devices() as f64, ..Sizes::default() };
        for arg in module.args() {
            let shape = match (&arg.sharding, module.mesh()) {
                (Some(sharding), Some(mesh)) => sharding.local_shape(mesh, &arg.aval.shape),
                _ => arg.aval.shape.clone(),
            };
            let bytes = (shape.iter().product::<usize>() * arg.aval.dtype.bits()).div_ceil(8) as u64;
            sizes.arguments += bytes;
            let trains = matches!(self.step, Step::Train { .. });
            if trains && arg.aliased_output.is_some() {
                sizes.written += bytes;
            }
            // A packed parameter is several arguments, `NAME.q` and more; an optimizer has `NAME.m` and more.
            let part_of = || arg.name.rsplit_once('.').and_then(|(name, part)| Some((params.get(name)?, part)));
            match params.get(arg.name.as_str()).map(|param| (param, "")).or_else(part_of) {
                Some((_, "m" | "v")) if trains => sizes.state += bytes,
                Some((param, _)) => {
                    sizes.weights += bytes;
                    sizes.idle_experts += (bytes as f64 * self.idle(param)) as u64;
                }
                None if arg.name.starts_with("cache/") => sizes.cache += bytes,
                None => {}
            }
        }
        sizes
    }

    /// The share of a parameter that the step cannot need.
    fn idle(&self, param: &Param) -> f64 {
        match &self.cfg.moe {
            Some(moe) if param.axes.starts_with('E') => {
                let chosen = (self.tokens() * moe.top_k) as f64 / moe.n_experts as f64;
                1.0 - chosen.min(1.0)
            }
            _ => 0.0,
        }
    }

    /// Operations of all products over all devices: 2 · tokens · the parameters that a token meets, the head for the last
    /// token of each slot only, and 4 · H · K for every pair of a query and a key that it sees. Training takes three times as many,
    /// with the head for all tokens; beside adapters twice as many for what they leave as it is.
    fn flops(&self, read_len: usize) -> f64 {
        let cfg = self.cfg;
        let met = |p: &&Param| -> f64 {
            let share = match &cfg.moe {
                Some(moe) if p.axes.starts_with('E') => moe.top_k as f64 / moe.n_experts as f64,
                _ => 1.0,
            };
            p.elements() as f64 * share
        };
        let multiplies = |p: &&Param| p.name.ends_with("_proj") || p.name.ends_with("router");
        let layers: f64 = self.params.iter().iter().filter(|p| multiplies(p)).map(met).sum();
        let head = (cfg.vocab_size * cfg.d_model) as f64;
        let pairs = |window: Option<usize>| -> f64 {
            let seen = |keys: usize| window.map_or(keys, |w| keys.min(w)) as f64;
            match self.step {
                Step::Decode => seen(read_len),
                Step::Prefill { tokens } | Step::Train { tokens, .. } => (1..=tokens).map(seen).sum(),
            }
        };
        let scores: f64 = cfg.layers.iter().map(|layer| pairs(layer.window)).sum();
        let (batch, tokens) = (self.batch as f64, self.step.tokens() as f64);
        if matches!(self.step, Step::Train { .. }) {
            let frozen = cfg.lora.is_some();
            let adapters =
                self.params.iter().into_iter().filter(|p| p.is_adapter()).map(Param::elements).sum::<usize>();
            let products = if frozen { 2.0 * (layers + head) + 3.0 * adapters as f64 } else { 3.0 * (layers + head) };
            let pairs = 4.0 * (cfg.n_heads * cfg.head_dim) as f64 * scores;
            return batch * (2.0 * tokens * products + 3.0 * pairs);
        }
        2.0 * batch * (tokens * layers + head) + 4.0 * batch * (cfg.n_heads * cfg.head_dim) as f64 * scores
    }
}

/// The first `layers` layers of a model, which compile in a fraction of the time.
///
/// # Errors
/// [`Error::Option`] for none, or more than there are.
pub fn cut(cfg: &ModelConfig, layers: usize) -> Result<ModelConfig, Error> {
    if layers == 0 || layers > cfg.n_layers {
        let what = format!("must be 1 to {}, the layers of the model, found {layers}", cfg.n_layers);
        return Err(Error::Option { name: "layers".into(), what });
    }
    let mut cfg = cfg.clone();
    cfg.n_layers = layers;
    cfg.layers.truncate(layers);
    cfg.raw["num_hidden_layers"] = layers.into();
    Ok(cfg)
}

/// Every way to split a model over exactly so many devices by data, fsdp, expert and model, the most model-parallel first.
pub fn meshes(devices: usize, cfg: &ModelConfig) -> Vec<MeshShape> {
    let divisors = |n: usize| (1..=n).rev().filter(move |d| n.is_multiple_of(*d));
    let mut meshes = Vec::new();
    for model in divisors(devices) {
        for expert in divisors(devices / model) {
            for fsdp in divisors(devices / model / expert) {
                let data = devices / model / expert / fsdp;
                let mesh = MeshShape { data, fsdp, expert, sequence: 1, model };
                if mesh.check(cfg).is_ok() {
                    meshes.push(mesh);
                }
            }
        }
    }
    meshes
}

/// The mesh for a target of so many devices: the one that was asked for, else the most model-parallel one.
///
/// # Errors
/// [`Error::Option`] where the target has more or fewer devices, with meshes that fit, and where the model does not divide.
pub fn mesh_for(
    asked: Option<MeshShape>,
    target: &Target,
    devices: usize,
    cfg: &ModelConfig,
) -> Result<MeshShape, Error> {
    let has = |n: usize| if n == 1 { "1 device".into() } else { format!("{n} devices") };
    let wrong = |what: String| Error::Option { name: "mesh".into(), what };
    match asked {
        Some(mesh) if mesh.devices() == devices => mesh.check(cfg).map(|()| mesh),
        Some(mesh) => {
            let some: Vec<String> = meshes(devices, cfg).iter().take(6).map(MeshShape::to_string).collect();
            let fits = if some.is_empty() { "none for this model".to_string() } else { some.join("; ") };
            let (asked, found) = (has(mesh.devices()), has(devices));
            Err(wrong(format!("{mesh}: has {asked}, but {target} has {found}; meshes that fit: {fits}")))
        }
        None => meshes(devices, cfg).first().copied().ok_or_else(|| {
            let found = has(devices);
            wrong(format!(
                "is needed: {target} has {found}, and data, fsdp, expert and model cannot split the model over them"
            ))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::presets;
    use xla::DType;

    fn job<'a>(cfg: &'a ModelConfig, params: &'a Llama<Param>, step: Step) -> Job<'a> {
        let (mesh, partitioner) = (MeshShape::default(), Emission::Shardy);
        let (cache, platform) = (CacheOptions::default(), Platform::Tpu);
        let (batch, len) = (8, 2048);
        Job {
            model: "m",
            cfg,
            params,
            precision: DType::BF16.into(),
            step,
            batch,
            len,
            cache,
            mesh,
            partitioner,
            platform,
            kernels: &[],
        }
    }

    fn model(name: &str) -> (ModelConfig, Llama<Param>) {
        let cfg = presets::find(name).expect("a preset").config().expect("valid");
        let params = Llama::declare(&cfg);
        (cfg, params)
    }

    #[test]
    fn a_shard_of_llama_2_7b_is_as_large_as_its_published_size_says() {
        let (cfg, params) = model("llama-2-7b");
        let mesh = MeshShape { model: 8, ..MeshShape::default() };
        let job = Job { mesh, ..job(&cfg, &params, Step::Decode) };
        let sizes = job.prepare().expect("it builds").sizes;
        // The norms are whole on each device, 266,240 values of them, and f32 on a TPU.
        let norms = 266_240u64;
        assert_eq!(sizes.weights, 2 * (6_738_415_616 - norms) / 8 + 4 * norms);
        // k and v of 32 layers: 8 slots × 4 heads × 2048 × 128 in bf16
        assert_eq!(sizes.cache, 2 * 32 * 8 * 4 * 2048 * 128 * 2);
        assert!(sizes.arguments - sizes.weights - sizes.cache < 1024, "{sizes:?}");
        // Two operations for each parameter but the embedding's and norms', and the scores; over 8 devices.
        let products = 2.0 * 8.0 * (6_738_415_616 - norms - 131_072_000) as f64;
        let scores = 8.0 * 4.0 * 32.0 * 4096.0 * 2048.0;
        assert_eq!(sizes.flops, (products + scores) / 8.0);
    }

    #[test]
    fn a_mixture_reads_and_multiplies_with_the_experts_that_were_chosen() {
        let (cfg, params) = model("mixtral-8x7b");
        let experts = 3u64 * 8 * 32 * 4096 * 14_336;
        let sizes = |batch| {
            let job = Job { batch, ..job(&cfg, &params, Step::Decode) };
            self::sizes(&job)
        };
        // One token takes 2 of 8.
        assert_eq!(sizes(1).idle_experts, 2 * experts * 3 / 4);
        assert_eq!(sizes(4).idle_experts, 0);
        let dense = (sizes(4).weights / 2 - experts) as f64;
        let flops = 2.0 * (dense + experts as f64 / 4.0) + 4.0 * 32.0 * 4096.0 * 2048.0;
        assert!((sizes(1).flops / flops - 1.0).abs() < 0.02, "{} {flops}", sizes(1).flops);
    }

    fn sizes(job: &Job<'_>) -> Sizes {
        job.prepare().expect("it builds").sizes
    }

    fn flops(job: &Job<'_>) -> f64 {
        job.prepare().expect("it divides").sizes.flops
    }

    #[test]
    fn a_prefill_sees_half_of_all_pairs_and_a_window_fewer() {
        let (cfg, params) = model("llama-2-7b");
        let tokens = Step::Prefill { tokens: 512 };
        let long = flops(&job(&cfg, &params, tokens));
        let layers = 6_476_005_376.0; // all but norms, embedding and head
        let scores = 4.0 * 32.0 * 4096.0 * (512.0 * 513.0 / 2.0);
        assert_eq!(long, 8.0 * (2.0 * (512.0 * layers + 32_000.0 * 4096.0) + scores));

        let (mut cfg, params) = model("mistral-7b");
        let whole = flops(&job(&cfg, &params, tokens));
        cfg.layers.iter_mut().for_each(|layer| layer.window = Some(1));
        let one = flops(&job(&cfg, &params, tokens));
        assert_eq!(whole - one, 8.0 * 4.0 * 32.0 * 4096.0 * (512.0 * 513.0 / 2.0 - 512.0));
    }

    #[test]
    fn a_model_can_be_cut_to_its_first_layers() {
        let (cfg, params) = model("mixtral-8x7b");
        let two = cut(&cfg, 2).expect("two of 32");
        assert_eq!((two.n_layers, two.layers.len(), &two.raw["num_hidden_layers"]), (2, 2, &2.into()));
        assert_eq!(Llama::declare(&two).layers[..], params.layers[..2]);
        assert!(cut(&cfg, 0).is_err() && cut(&cfg, 33).is_err() && cut(&cfg, 32).is_ok_and(|whole| whole == cfg));
    }

    #[test]
    fn meshes_are_those_that_divide() {
        let names = |devices, cfg: &ModelConfig| -> Vec<String> {
            meshes(devices, cfg).iter().map(MeshShape::to_string).collect()
        };
        let (llama, _) = model("llama-2-7b");
        assert_eq!(
            names(4, &llama),
            ["model=4", "fsdp=2,model=2", "data=2,model=2", "fsdp=4", "data=2,fsdp=2", "data=4"]
        );
        let (mixtral, _) = model("mixtral-8x7b");
        assert!(names(8, &mixtral).contains(&"expert=8".to_string()));
        // 24 query heads and 8 key/value heads: neither 16 devices nor 24 share them evenly
        let (small, _) = model("llama-3.2-3b");
        assert!(!names(16, &small).contains(&"model=16".to_string()));
        assert_eq!(names(1, &llama), ["1 device"]);
    }
}
