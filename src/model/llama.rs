//! The decoder: embedding, L blocks, final norm, head (Touvron et al. 2023).

use xla::DType;
use xla::graph::{Platform, Tensor, einsum_as};

use super::attention::{LayerInput, attention};
use super::linear::{all_rows, in_rows};
use super::mlp::mlp;
use super::moe::moe;
use super::rms_norm::{rms_norm, rms_norm_twice};
use super::rope::{Rope, ropes};
use crate::config::{LayerConfig, ModelConfig};
use crate::kv_cache::{CacheShape, KvCache, LayerCache, Layout, Place};
use crate::params::{DecoderBlock, FeedForward, Llama};

/// The logical axes of the residual stream.
const RESIDUAL: [&str; 3] = ["batch", "tokens", "hidden"];

/// Runs S new tokens of each slot through the decoder. `tokens`: (B, S) i32; `frequencies`: those of
/// [`frequencies`](super::frequencies). Returns the normalised hidden states (B, S, M) in f32 and the updated cache.
#[track_caller]
pub fn forward(
    p: &Llama<Tensor>,
    tokens: &Tensor,
    place: &Place,
    frequencies: &[Tensor],
    cache: &KvCache<Tensor>,
    shape: &CacheShape,
    cfg: &ModelConfig,
) -> (Tensor, KvCache<Tensor>) {
    let g = tokens.graph();
    let ropes = ropes(&place.positions, frequencies, cfg);

    let mut x = p.embedding.take(tokens, 0).cast(DType::F32);
    if cfg.embedding_scale != 1.0 {
        // rounded to the parameters' type, as the checkpoint was trained
        let scale = g.scalar(cfg.embedding_scale, p.embedding.dtype()).cast(DType::F32);
        x = &x * scale.broadcast(x.shape(), &[]);
    }
    x = x.shard(RESIDUAL).named("embedding");
    let mut layers = Vec::with_capacity(cfg.n_layers);
    for (i, layer) in cfg.layers.iter().enumerate() {
        let _scope = g.scope(&format!("layers.{i}"));
        let rope = layer.rope.map(|rope| &ropes[rope]);
        let at = LayerInput { rope, place, cache: &cache.layers[i], layout: shape.layout(layer) };
        let (out, cache) = call_block(&p.layers[i], &x, &at, layer, cfg);
        x = out.named("out");
        layers.push(cache);
    }
    (rms_norm(&x, &p.final_norm, cfg).named("final_norm"), KvCache { layers })
}

/// The block as a function of the module, traced once for each kind of layer and called L times: small text, and the
/// fastest form measured.
#[track_caller]
fn call_block(
    p: &DecoderBlock<Tensor>,
    x: &Tensor,
    at: &LayerInput<'_>,
    layer: &LayerConfig,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let LayerInput { rope, place, cache, layout } = *at;
    let mut inputs = vec![x, &place.positions, &place.first];
    inputs.extend(place.valid.iter().chain(&place.table));
    inputs.extend(rope.iter().flat_map(|rope| [&rope.cos, &rope.sin]));
    inputs.extend(&cache.arrays);
    inputs.extend(p.iter());
    let outputs = x.graph().call(&block_name(layer, layout), &inputs, |args| {
        let mut args = args.iter().cloned();
        let mut next = || args.next().expect("a function gets as many arguments as it was called with");
        let x = next();
        let place = Place {
            positions: next(),
            first: next(),
            valid: place.valid.as_ref().map(|_| next()),
            table: place.table.as_ref().map(|_| next()),
            read_len: place.read_len,
        };
        let rope = rope.map(|_| Rope { cos: next(), sin: next() });
        let cache = LayerCache { arrays: cache.arrays.iter().map(|_| next()).collect() };
        let p = p.as_ref().map(&mut |_| next());
        let at = LayerInput { rope: rope.as_ref(), place: &place, cache: &cache, layout };
        let (x, cache) = decoder_block(&p, &x, &at, cfg);
        std::iter::once(x).chain(cache.arrays).collect()
    });
    let (x, arrays) = outputs.split_first().expect("the block returns x and its cache");
    (x.clone(), LayerCache { arrays: arrays.to_vec() })
}

/// What tells one kind of layer from another: `decoder_block`, `decoder_block_window512_nope`, ….
fn block_name(layer: &LayerConfig, layout: Layout) -> String {
    let window = if let Layout::Ring { window } = layout { format!("_window{window}") } else { String::new() };
    let rope = match layer.rope {
        Some(0) => String::new(),
        Some(i) => format!("_rope{i}"),
        None => "_nope".into(),
    };
    format!("decoder_block{window}{rope}{}", if layer.sparse { "_experts" } else { "" })
}

/// One block: attention, then the feed-forward, each added to the residual stream (B, S, M), f32. Norms stand before
/// them, after them, or both, as the tree has it.
#[track_caller]
pub fn decoder_block(
    p: &DecoderBlock<Tensor>,
    x: &Tensor,
    at: &LayerInput<'_>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let g = x.graph();
    let norm = |x: Tensor, weight: &Option<Tensor>, name: &str| match weight {
        Some(weight) => rms_norm(&x, weight, cfg).named(name),
        None => x,
    };
    let h = match &p.input_norm {
        Some(weight) => {
            let [for_q, h] = rms_norm_twice(x, weight, cfg);
            [for_q, h.named("input_norm")]
        }
        None => [x.clone(), x.clone()],
    };
    let (h, cache) = {
        let _scope = g.scope("attention");
        attention(&p.attention, &h, at, cfg)
    };
    let x = (x + norm(h, &p.attn_out_norm, "attn_out_norm")).shard(RESIDUAL);

    let h = norm(x.clone(), &p.post_attn_norm, "post_attn_norm");
    let h = {
        let _scope = g.scope("mlp");
        match &p.feed_forward {
            FeedForward::Dense(p) => mlp(p, &h, cfg),
            FeedForward::Experts(p) => moe(p, &h, cfg),
        }
        .named("out")
    };
    ((&x + norm(h, &p.mlp_out_norm, "mlp_out_norm")).shard(RESIDUAL), cache)
}

/// Logits (B, S, V) in f32 of normalised hidden states (B, S, M); a tied head reads the embedding (V, M). Where a mesh pads
/// the vocabulary, the logits past it are −∞.
#[track_caller]
pub fn lm_head(p: &Llama<Tensor>, hidden: &Tensor, cfg: &ModelConfig) -> Tensor {
    let rows = hidden.dim(0) * hidden.dim(1);
    let weight = p.lm_head.as_ref().unwrap_or(&p.embedding);
    let hidden = all_rows(&hidden.cast(weight.dtype()));
    let logits = match &p.lm_head {
        Some(head) => in_rows(&hidden, |hidden| einsum_as("BSM,MV->BSV", hidden, head, DType::F32)),
        // XLA:CPU transposes the right side of a one-row product in memory, the whole embedding at every step.
        None if rows == 1 && hidden.graph().platform() == Platform::Cpu => {
            einsum_as("VM,BSM->BSV", &p.embedding, &hidden, DType::F32)
        }
        None => in_rows(&hidden, |hidden| einsum_as("BSM,VM->BSV", hidden, &p.embedding, DType::F32)),
    };
    let logits = match cfg.logit_softcap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    };
    let logits = match logits.dim(2) == cfg.vocab_size {
        true => logits,
        false => {
            let id = logits.graph().iota(DType::I32, logits.shape(), 2);
            id.lt(cfg.vocab_size as i64).select(&logits, f64::NEG_INFINITY)
        }
    };
    let tokens = if logits.dim(1) == 1 { "" } else { "sequence" };
    logits.shard(["batch", tokens, "vocab"]).named("logits")
}
