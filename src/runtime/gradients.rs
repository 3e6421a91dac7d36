//! Programs that compute gradients.

use xla::DType::I32;
use xla::graph::{Graph, Module, Save, Tensor};

use converter::layout::Piece;

use super::handlers::of_training;
use super::program::Blueprint;
use crate::Error;
use crate::kv_cache::{CacheShape, KvCache, LayerCache, Place};
use crate::model::{self, Loss, LossOptions, Targets};
use crate::params::{self, Attention, DeviceArray, FeedForward, Llama, Lora, Mlp, Param, Weight};

/// A program that computes the gradients of a batch, by everything that shapes it.
#[derive(Clone, Debug)]
pub struct GradientSpec {
    /// B, texts.
    pub batch: usize,
    /// S, tokens of each.
    pub tokens: usize,
    /// What is differentiated.
    pub loss: LossOptions,
    /// What the blocks keep for the gradient.
    pub save: Save,
}

/// The loss of a batch under the model that these arrays are: all of its parameters', in tree order, in their own types or f32;
/// tokens and targets (B, S) i32; `dropout` the state, u64 (2), of what adapters drop.
#[track_caller]
pub(super) fn loss_of(
    g: &Graph,
    arrays: &[Tensor],
    tokens: &Tensor,
    targets: &Tensor,
    dropout: Option<&Tensor>,
    spec: &GradientSpec,
    model: &Blueprint,
) -> Loss {
    let (cfg, b, s) = (&model.cfg, spec.batch, spec.tokens);
    let mut arrays = arrays.iter();
    let mut next = |_: &DeviceArray| arrays.next().expect("an array for each parameter").clone();
    let mut p = params::weights(g, &model.params, model.devices(), &mut next);
    if let Some(state) = dropout {
        drop_inputs(&mut p, state);
    }
    let place = Place {
        positions: g.iota(I32, &[b, s], 1),
        first: g.full(0i64, I32, &[b]),
        valid: None,
        table: None,
        read_len: s,
    };
    let none = KvCache { layers: cfg.layers.iter().map(|_| LayerCache { arrays: Vec::new() }).collect() };
    let frequencies = model::frequencies(g, b, Some(s), cfg);
    let decoded = model::forward(&p, tokens, &place, &frequencies, &none, &spec.cache(model), cfg);
    let hidden = model::final_norm(&p, &decoded.hidden, cfg);
    let targets = Targets { ids: targets, tokens: None };
    Loss::new(&p, &hidden, &decoded.router_logits, targets, &spec.loss, cfg)
}

/// Gives each adapter a state of its own: the same key, and counters that lie further apart than any uses.
fn drop_inputs(p: &mut Llama<Weight>, state: &Tensor) {
    let g = state.graph();
    let mut number = 0i64;
    let mut one = |lora: &mut Option<Lora<Weight>>| {
        if let Some(lora) = lora {
            let offset = g.constant(&[0u64, (number as u64) << 40], &[2]);
            lora.dropout = Some(Weight::Float(state + offset));
            number += 1;
        }
    };
    for layer in &mut p.layers {
        let Attention { q_lora, k_lora, v_lora, out_lora, .. } = &mut layer.attention;
        [q_lora, k_lora, v_lora, out_lora].into_iter().for_each(&mut one);
        let mlp = match &mut layer.feed_forward {
            FeedForward::Dense(mlp) => Some(mlp),
            FeedForward::Experts(moe) => moe.shared.as_mut(),
        };
        if let Some(Mlp { gate_lora, up_lora, down_lora, .. }) = mlp {
            [gate_lora, up_lora, down_lora].into_iter().for_each(&mut one);
        }
    }
}

impl GradientSpec {
    /// No cache, as attention is told of it.
    pub(crate) fn cache(&self, model: &Blueprint) -> CacheShape {
        CacheShape { batch: self.batch, len: 0, dtype: model.dtype, pages: None, platform: model.platform }
    }

    /// An empty graph for it.
    pub(super) fn graph(&self, name: &str, model: &Blueprint) -> Graph {
        let g = model.graph(name, &self.cache(model), self.tokens);
        g.set_training(self.save.clone());
        g.set_kernels(of_training(model.kernels));
        g
    }
}

/// Arguments: parameters (in declaration order), tokens (B, S) and targets (B, S), i32. Results: `loss`, `cross_entropy` and `count`,
/// f32 scalars, then the gradient of each parameter that is trained ([`trains`]) under `gradient/` and its name, in its own type
/// and layout.
///
/// # Errors
/// Those of the graph; packed parameters that are trained, which have no gradient.
pub fn build_gradients(spec: &GradientSpec, model: &Blueprint) -> Result<Module, Error> {
    let g = spec.graph("gradients", model);
    let mut arrays = Vec::new();
    for array in model.params.iter().into_iter().flat_map(|param| model.devices().arrays(param)) {
        arrays.push(params::declare(&g, &array, array.dtype));
    }
    let tokens = g.arg("tokens", I32, &[spec.batch, spec.tokens]);
    let targets = g.arg("targets", I32, &[spec.batch, spec.tokens]);
    let loss = loss_of(&g, &arrays, &tokens, &targets, None, spec, model);
    g.output("loss", &loss.total);
    g.output("cross_entropy", &loss.cross_entropy);
    g.output("count", &loss.count);
    let trained = trained(model)?;
    let tensors: Vec<&Tensor> = trained.iter().map(|&(_, at)| &arrays[at]).collect();
    let gradients = gradients_of(&g, &loss.total, &tensors, &trained);
    for ((param, _), gradient) in trained.iter().zip(gradients) {
        g.output_sharded(&format!("gradient/{}", param.name), &of_all_copies(&gradient, param), &param.logical);
    }
    Ok(g.finish()?)
}

/// Whether a training moves a parameter: the adapters where the model has any, else all.
pub fn trains(param: &Param, model: &Blueprint) -> bool {
    model.cfg.lora.is_none() || param.is_adapter()
}

/// The parameters that are trained, each with the place of its array among all arrays.
///
/// # Errors
/// [`Error::Option`] for one that is packed.
pub(super) fn trained(model: &Blueprint) -> Result<Vec<(&Param, usize)>, Error> {
    let mut at = 0;
    let mut found = Vec::new();
    for param in model.params.iter() {
        if trains(param, model) {
            if param.packing.is_some() {
                let what = format!(
                    "{}: {} has integers, which cannot be trained; train adapters beside it, or choose a float type",
                    model.weights(),
                    param.name
                );
                return Err(Error::Option { name: "dtype".into(), what });
            }
            found.push((param, at));
        }
        at += model.devices().arrays(param).len();
    }
    Ok(found)
}

/// The gradient of a scalar with respect to trained parameters, laid out over the mesh as these are: of key/value heads of which a
/// mesh has copies, that of one copy.
#[track_caller]
pub(super) fn gradients_of(g: &Graph, loss: &Tensor, tensors: &[&Tensor], trained: &[(&Param, usize)]) -> Vec<Tensor> {
    let own = |(gradient, (param, _)): (Tensor, &(&Param, usize))| {
        let gradient = gradient.shard(&param.logical);
        match copies(param) {
            None => gradient,
            // What is moved by one copy is moved by all.
            Some((axis, times)) => {
                let mut split = gradient.shape().to_vec();
                split.splice(axis..=axis, [split[axis] / times, times]);
                gradient.reshape(&split).sum(&[axis as isize + 1])
            }
        }
    };
    g.grad(loss, tensors).into_iter().zip(trained).map(own).collect()
}

/// What [`gradients_of`] gives, for each copy of a key/value head.
#[track_caller]
pub(super) fn of_all_copies(gradient: &Tensor, param: &Param) -> Tensor {
    let Some((axis, times)) = copies(param) else { return gradient.clone() };
    let mut split = gradient.shape().to_vec();
    split.insert(axis + 1, times);
    let kept: Vec<usize> = (0..split.len()).filter(|&i| i != axis + 1).collect();
    gradient.broadcast(&split, &kept).reshape(&param.shape).shard(&param.logical)
}

/// The axis of key/value heads, and how often a mesh has each, if more than once.
pub(super) fn copies(param: &Param) -> Option<(usize, usize)> {
    let axis = param.logical.iter().position(|&logical| logical == "kv_heads")?;
    let stored: usize = param.pieces.iter().map(Piece::elements).sum();
    let times = param.elements() / stored;
    (times > 1).then_some((axis, times))
}
