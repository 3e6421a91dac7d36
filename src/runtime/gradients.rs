//! Programs that compute gradients.

use xla::DType::I32;
use xla::graph::{Module, Save, Tensor};

use super::program::Blueprint;
use crate::Error;
use crate::kv_cache::{CacheShape, KvCache, LayerCache, Place};
use crate::model::{self, Loss, LossOptions, Targets};
use crate::params::{self, Llama, Weight};

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

/// The loss of a batch: tokens and targets (B, S) i32.
#[track_caller]
fn loss_of(p: &Llama<Weight>, tokens: &Tensor, targets: &Tensor, spec: &GradientSpec, model: &Blueprint) -> Loss {
    let g = tokens.graph();
    let (cfg, b, s) = (&model.cfg, spec.batch, spec.tokens);
    let place = Place {
        positions: g.iota(I32, &[b, s], 1),
        first: g.full(0i64, I32, &[b]),
        valid: None,
        table: None,
        read_len: s,
    };
    let none = KvCache { layers: cfg.layers.iter().map(|_| LayerCache { arrays: Vec::new() }).collect() };
    let frequencies = model::frequencies(g, b, Some(s), cfg);
    let decoded = model::forward(p, tokens, &place, &frequencies, &none, &spec.cache(model), cfg);
    let hidden = model::final_norm(p, &decoded.hidden, cfg);
    let targets = Targets { ids: targets, tokens: None };
    Loss::new(p, &hidden, &decoded.router_logits, targets, &spec.loss, cfg)
}

impl GradientSpec {
    /// No cache, as attention is told of it.
    fn cache(&self, model: &Blueprint) -> CacheShape {
        CacheShape { batch: self.batch, len: 0, dtype: model.dtype, pages: None, platform: model.platform }
    }
}

/// Arguments: parameters (in declaration order), tokens (B, S) and targets (B, S), i32. Results: `loss`, `cross_entropy` and `count`,
/// f32 scalars, then the gradient of each parameter under `gradient/` and its name, in its own type and layout.
///
/// # Errors
/// Those of the graph; packed parameters, which have no gradient.
pub fn build_gradients(spec: &GradientSpec, model: &Blueprint) -> Result<Module, Error> {
    let g = model.graph("gradients", &spec.cache(model), spec.tokens);
    g.set_training(spec.save.clone());
    let params = params::declare_args(&g, &model.params, model.devices());
    let tokens = g.arg("tokens", I32, &[spec.batch, spec.tokens]);
    let targets = g.arg("targets", I32, &[spec.batch, spec.tokens]);
    let loss = loss_of(&params, &tokens, &targets, spec, model);
    g.output("loss", &loss.total);
    g.output("cross_entropy", &loss.cross_entropy);
    g.output("count", &loss.count);
    let tensors: Vec<&Tensor> = params.iter().into_iter().flat_map(Weight::tensors).collect();
    for ((param, tensor), gradient) in model.params.iter().into_iter().zip(&tensors).zip(g.grad(&loss.total, &tensors))
    {
        debug_assert_eq!(tensor.shape(), gradient.shape());
        g.output_sharded(&format!("gradient/{}", param.name), &gradient, &param.logical);
    }
    Ok(g.finish()?)
}
