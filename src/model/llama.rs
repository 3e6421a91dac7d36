//! The decoder: embedding, L blocks, final norm, head (Touvron et al. 2023).

use xla::DType;
use xla::graph::{Tensor, einsum_as};

use super::attention::{Mask, attention};
use super::mlp::mlp;
use super::rms_norm::rms_norm;
use super::rope::{Rope, rope};
use crate::config::ModelConfig;
use crate::kv_cache::{KvCache, LayerCache};
use crate::params::{DecoderBlock, Llama};

const RESIDUAL: [&str; 3] = ["batch", "sequence", "embed"];

/// Runs S new tokens of each slot through the decoder. `tokens`: (B, S) i32; `position`: (B) i32, the cache position
/// of each slot's first new token; `read_len`: how many cache positions attention reads (at least the last position
/// written, plus one). Returns the normalised hidden states (B, S, M) in f32 and the updated cache.
#[track_caller]
pub fn forward(
    p: &Llama<Tensor>,
    tokens: &Tensor,
    position: &Tensor,
    cache: &KvCache<Tensor>,
    read_len: usize,
    cfg: &ModelConfig,
) -> (Tensor, KvCache<Tensor>) {
    let g = tokens.graph();
    let shape = [tokens.dim(0), tokens.dim(1)];
    let positions = position.broadcast(&shape, &[0]) + g.iota(DType::I32, &shape, 1);
    let rope = rope(&positions, cfg);
    let mask = Mask::causal(&positions, position, read_len);

    let mut x = p.embedding.take(tokens, 0).cast(DType::F32).shard(RESIDUAL).named("embedding");
    let mut layers = Vec::with_capacity(cfg.n_layers);
    for (i, (block, layer)) in p.layers.iter().zip(&cache.layers).enumerate() {
        let _scope = g.scope(&format!("layers.{i}"));
        let (out, layer) = call_block(block, &x, &rope, &mask, layer, cfg);
        x = out.named("out");
        layers.push(layer);
    }
    (rms_norm(&x, &p.final_norm, cfg.rms_norm_eps).named("final_norm"), KvCache { layers })
}

/// The block as a function of the module, traced once and called L times: small text, and the fastest form measured.
#[track_caller]
fn call_block(
    p: &DecoderBlock<Tensor>,
    x: &Tensor,
    rope: &Rope,
    mask: &Mask,
    cache: &LayerCache<Tensor>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let mut inputs = vec![x, &rope.cos, &rope.sin, &mask.visible, &mask.position, &cache.k, &cache.v];
    inputs.extend(p.iter());
    let outputs = x.graph().call("decoder_block", &inputs, |args| {
        let [x, cos, sin, visible, position, k, v, leaves @ ..] = args else {
            unreachable!("a function gets as many arguments as it was called with");
        };
        let mut leaves = leaves.iter().cloned();
        let p = p.as_ref().map(&mut |_| leaves.next().expect("one argument per parameter"));
        let rope = Rope { cos: cos.clone(), sin: sin.clone() };
        let mask = Mask { visible: visible.clone(), position: position.clone() };
        let cache = LayerCache { k: k.clone(), v: v.clone() };
        let (x, cache) = decoder_block(&p, x, &rope, &mask, &cache, cfg);
        vec![x, cache.k, cache.v]
    });
    match &outputs[..] {
        [x, k, v] => (x.clone(), LayerCache { k: k.clone(), v: v.clone() }),
        _ => unreachable!("the block returns x, k and v"),
    }
}

/// One pre-norm block: attention, then the feed-forward, each added to the residual stream (B, S, M), f32.
#[track_caller]
pub fn decoder_block(
    p: &DecoderBlock<Tensor>,
    x: &Tensor,
    rope: &Rope,
    mask: &Mask,
    cache: &LayerCache<Tensor>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let g = x.graph();
    let h = rms_norm(x, &p.input_norm, cfg.rms_norm_eps).named("input_norm");
    let (h, cache) = {
        let _scope = g.scope("attention");
        attention(&p.attention, &h, rope, mask, cache, cfg)
    };
    let x = (x + &h).shard(RESIDUAL);

    let h = rms_norm(&x, &p.post_attn_norm, cfg.rms_norm_eps).named("post_attn_norm");
    let h = {
        let _scope = g.scope("mlp");
        mlp(&p.mlp, &h, cfg).named("out")
    };
    ((&x + &h).shard(RESIDUAL), cache)
}

/// Logits (B, S, V) in f32 of normalised hidden states (B, S, M); a tied head reads the embedding (V, M).
#[track_caller]
pub fn lm_head(p: &Llama<Tensor>, hidden: &Tensor) -> Tensor {
    let rows = hidden.dim(0) * hidden.dim(1);
    let weight = p.lm_head.as_ref().unwrap_or(&p.embedding);
    let hidden = hidden.cast(weight.dtype());
    let logits = match &p.lm_head {
        Some(head) => einsum_as("BSM,MV->BSV", &hidden, head, DType::F32),
        // XLA:CPU transposes the right side of a one-row product in memory, the whole embedding at every step.
        None if rows == 1 => einsum_as("VM,BSM->BSV", &p.embedding, &hidden, DType::F32),
        None => einsum_as("BSM,VM->BSV", &hidden, &p.embedding, DType::F32),
    };
    logits.shard(["batch", "sequence", "vocab"]).named("logits")
}
