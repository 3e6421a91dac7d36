//! A model in training on its devices: parameters, the optimizer's state, and the step that moves them.

use std::path::Path;
use std::sync::Arc;

use converter::Checkpoint;
use xla::DType::F32;
use xla::graph::{Module, Platform};
use xla::pjrt::{Client, LoadedExecutable, Plugin};

use super::engine::LoadOptions;
use super::exec_cache::ExecutableCache;
use super::gradients::trains;
use super::handlers::of_client;
use super::placement::{Array, ArrayLayout, Placement};
use super::program::Blueprint;
use super::train_step::{METRICS, TrainSpec, build_train};
use super::upload::upload;
use crate::Error;
use crate::config::LoraConfig;
use crate::params::Param;

/// What a step tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// What was differentiated, before the step.
    pub loss: f32,
    /// The mean of −log p(target).
    pub cross_entropy: f32,
    /// Positions that counted.
    pub count: f32,
    /// The norm of the whole gradient, before it was clipped.
    pub norm: f32,
    /// The learning rate.
    pub rate: f32,
}

/// A model in training.
pub struct Trainer {
    placement: Placement,
    model: Blueprint,
    spec: TrainSpec,
    module: Module,
    executable: LoadedExecutable,
    results: Vec<Arc<ArrayLayout>>,
    /// Those of all parameters, in tree order; those that are trained in f32.
    params: Vec<Array>,
    /// For each array whether it is trained.
    trained: Vec<bool>,
    /// The optimizer's arrays, then the number of steps.
    state: Vec<Array>,
    /// Of what adapters drop.
    seed: Option<Array>,
}

impl Trainer {
    /// Puts `checkpoint` on the first devices of `client` and compiles the step. With `lora` the parameters stay as they are, in the
    /// precision of `options`, and adapters are trained: a begins with uniform numbers within ±1/√inputs, drawn from `seed`, b with
    /// zeros. Else all parameters are trained: f32 on the devices, and multiplied in the precision of `options`.
    ///
    /// # Errors
    /// Those of [`Blueprint::new`], [`build_train`], of reading and of the plugin.
    pub fn load(
        plugin: &Plugin,
        client: Client,
        checkpoint: &Checkpoint,
        options: LoadOptions,
        (lora, seed): (Option<LoraConfig>, u64),
        spec: TrainSpec,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Trainer, Error> {
        let LoadOptions { precision, mesh, partitioner, cache, forms, kernels } = options;
        let platform = forms.unwrap_or(Platform::named(client.platform_name()));
        let mut cfg = checkpoint.config().clone();
        cfg.lora = lora;
        let params = checkpoint.params().clone().with_adapters(&cfg);
        let model = Blueprint::new(&cfg, &params, precision, mesh, platform)?
            .with_partitioner(partitioner)
            .with_kernels(of_client(plugin, &client, kernels));
        let module = build_train(&spec, &model)?;
        let executables = ExecutableCache::new(cache, plugin, &client);
        let placement = Placement::new(client, mesh)?;
        let compile = placement.assign(model.compile_options());
        let (executable, _) = executables.get(placement.client(), &model.stablehlo(&module), &compile)?;

        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let masters = Blueprint { dtype: F32, ..model.clone() };
        let read = if cfg.lora.is_some() { &model } else { &masters };
        let mut stored = upload(checkpoint, read, &placement, threads, progress)?.into_iter();
        let mut declared = module.args().iter();
        let mut next = || declared.next().expect("an argument for each array");
        let (mut params, mut trained) = (Vec::new(), Vec::new());
        for (number, param) in model.params.iter().into_iter().enumerate() {
            for array in model.devices().arrays(param) {
                let arg = next();
                trained.push(trains(param, &model));
                params.push(match param.is_adapter() {
                    true => {
                        let values = first_values(param, seed.wrapping_add((number as u64) << 32));
                        placement.split(&values, &array.shape, arg.sharding.as_ref())?
                    }
                    false => stored.next().expect("an array for each that is stored"),
                });
            }
        }
        let zeros = module.args()[params.len()..].iter().take_while(|arg| arg.name != "step");
        let mut state = zeros
            .map(|arg| {
                let elements = arg.aval.shape.iter().product();
                placement.split(&vec![0f32; elements], &arg.aval.shape, arg.sharding.as_ref())
            })
            .collect::<Result<Vec<_>, _>>()?;
        state.push(placement.replicate(&[0i32], &[])?);
        let drops = module.args().iter().any(|arg| arg.name == "seed");
        let seed = drops.then(|| placement.replicate(&[seed, 0], &[2])).transpose()?;
        let results = module.outputs().iter();
        let results = results.map(|output| placement.layout(&output.aval.shape, output.sharding.as_ref())).collect();
        Ok(Trainer { placement, model, spec, module, executable, results, params, trained, state, seed })
    }

    /// The model as its step is built.
    pub fn model(&self) -> &Blueprint {
        &self.model
    }

    /// Its step.
    pub fn spec(&self) -> &TrainSpec {
        &self.spec
    }

    /// One step over `tokens` and `targets`, (A, B, S) row-major: the id after each token, or a negative number where that does
    /// not count.
    ///
    /// # Errors
    /// [`Error::Empty`] for another number of ids; the plugin's. The parameters are lost if the step fails.
    pub fn step(&mut self, tokens: &[i32], targets: &[i32]) -> Result<Metrics, Error> {
        let TrainSpec { microbatches, gradient, .. } = &self.spec;
        let dims = [*microbatches, gradient.batch, gradient.tokens];
        let ids: usize = dims.iter().product();
        if tokens.len() != ids || targets.len() != ids {
            let (a, b) = (tokens.len(), targets.len());
            return Err(Error::Empty(format!("a step of {dims:?} takes {ids} tokens and targets, found {a} and {b}")));
        }
        let batch_args = self.module.args().len() - 2;
        let mut put = [tokens, targets].into_iter().zip(&self.module.args()[batch_args..]);
        let mut batch = || {
            let (values, arg) = put.next().expect("two");
            self.placement.split(values, &dims, arg.sharding.as_ref())
        };
        let batch = [batch()?, batch()?];
        let args: Vec<&Array> = self.params.iter().chain(&self.state).chain(&self.seed).chain(&batch).collect();
        let mut results = self.placement.execute(&self.executable, &args, &self.results)?;
        let metrics = results.split_off(results.len() - METRICS.len());
        self.state = results.split_off(self.trained.iter().filter(|trained| **trained).count());
        let trained = self.params.iter_mut().zip(&self.trained).filter(|(_, trained)| **trained);
        trained.zip(results).for_each(|((old, _), new)| *old = new);
        let mut values = Vec::with_capacity(METRICS.len());
        for metric in &metrics {
            values.push(metric.to_vec::<f32>()?[0]);
        }
        let [loss, cross_entropy, count, norm, rate] = values[..] else { unreachable!("as many as there are names") };
        Ok(Metrics { loss, cross_entropy, count, norm, rate })
    }

    /// What is trained, as it is now: f32.
    pub fn trained(&self) -> Vec<(&Param, &Array)> {
        let params = self.model.params.iter().into_iter();
        let arrays = params.flat_map(|param| self.model.devices().arrays(param).into_iter().map(move |_| param));
        let all = arrays.zip(&self.params).zip(&self.trained);
        all.filter(|(_, trained)| **trained).map(|(pair, _)| pair).collect()
    }

    /// Writes the parameters as they are now, f32, as the per-head folder `dst`; what else is in it comes from `checkpoint`, of which
    /// the training began.
    ///
    /// # Errors
    /// Those of [`converter::save`]; [`Error::Empty`] where adapters are trained, which are no checkpoint; the plugin's.
    pub fn save(&self, checkpoint: &Checkpoint, dst: &Path) -> Result<(), Error> {
        if self.model.cfg.lora.is_some() {
            return Err(Error::Empty("adapters alone are no checkpoint that could be saved".into()));
        }
        let mut trained = self.trained().into_iter();
        converter::save(checkpoint, dst, |stored| {
            let (param, array) = trained.next().expect("all parameters are trained");
            Ok(stored_part(array.to_vec()?, stored, param))
        })
    }

    /// Puts other values in place of what is trained: `values` gives them row-major for each parameter.
    ///
    /// # Errors
    /// [`Error::Empty`] for another number of values; the plugin's.
    pub fn set_trained(&mut self, mut values: impl FnMut(&Param) -> Vec<f32>) -> Result<(), Error> {
        let mut new = Vec::new();
        for (param, _) in self.trained() {
            let values = values(param);
            if values.len() != param.elements() {
                let (name, wanted, found) = (&param.name, param.elements(), values.len());
                return Err(Error::Empty(format!("{name} has {wanted} values, found {found}")));
            }
            let sharding = self.module.args().iter().find(|arg| arg.name == param.name);
            let sharding = sharding.and_then(|arg| arg.sharding.as_ref());
            new.push(self.placement.split(&values, &param.shape, sharding)?);
        }
        let trained = self.params.iter_mut().zip(&self.trained).filter(|(_, trained)| **trained);
        trained.zip(new).for_each(|((old, _), new)| *old = new);
        Ok(())
    }
}

/// The values of a parameter as a checkpoint has it, where a mesh has copies of its key/value heads or a longer vocabulary.
fn stored_part(values: Vec<f32>, stored: &Param, on_mesh: &Param) -> Vec<f32> {
    let Some(axis) = (0..stored.shape.len()).find(|&axis| stored.shape[axis] != on_mesh.shape[axis]) else {
        return values;
    };
    let (n, all) = (stored.shape[axis], on_mesh.shape[axis]);
    let times = if stored.logical[axis] == "kv_heads" { all / n } else { 1 };
    let inner: usize = stored.shape[axis + 1..].iter().product();
    let of_row =
        |row: &[f32]| -> Vec<f32> { (0..n).flat_map(|i| &row[i * times * inner..][..inner]).copied().collect() };
    values.chunks(all * inner).flat_map(of_row).collect()
}

/// What an adapter begins with (Hu et al. 2021, section 4.1): b with zeros, so that it changes nothing.
fn first_values(param: &Param, seed: u64) -> Vec<f32> {
    if param.axes.starts_with('J') {
        return vec![0.0; param.elements()];
    }
    let inputs = param.elements() / param.shape.last().copied().unwrap_or(1);
    let bound = 1.0 / (inputs as f64).sqrt();
    let uniform = |i: u64| (split_mix(seed.wrapping_add(i)) >> 11) as f64 / (1u64 << 53) as f64;
    (1..=param.elements() as u64).map(|i| (bound * (2.0 * uniform(i) - 1.0)) as f32).collect()
}

/// The output of SplitMix64 (Steele et al. 2014) for state number `i`.
fn split_mix(i: u64) -> u64 {
    let mut z = i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
