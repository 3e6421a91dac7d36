//! The decoder: embedding, L blocks, final norm, head (Touvron et al. 2023).

use xla::DType;
use xla::graph::{Kernel, Platform, Tensor, einsum_as};

use super::attention::{LayerInput, attention};
use super::linear::{all_rows, by_kernel, in_rows, product, takes_kernel, weights_of, with_weights};
use super::mlp::mlp;
use super::moe::moe;
use super::rms_norm::{rms_norm, rms_norm_twice};
use super::rope::{Rope, ropes};
use crate::config::{LayerConfig, ModelConfig};
use crate::kv_cache::{CacheShape, KvCache, LayerCache, Layout, Place};
use crate::params::{DecoderBlock, FeedForward, Llama, Weight};

/// The logical axes of the residual stream.
const RESIDUAL: [&str; 3] = ["batch", "tokens", "hidden"];

/// The kernel of the embedding's lookup: ids (n) i32 and a weight (V, M); (n, M) f32. The attributes are those of [`LINEAR`](super::LINEAR).
pub const TAKE_ROWS: &str = "xllama.take_rows";

/// The rows `tokens` (B, S) of the embedding, (B, S, M) f32.
#[track_caller]
fn embed(embedding: &Weight, tokens: &Tensor) -> Tensor {
    // Rows of parts are gathered, and not the table.
    let embedding = embedding.in_parts();
    match embedding {
        Weight::Float(table) if !tokens.graph().has_kernel(TAKE_ROWS) => return table.take(tokens, 0).cast(DType::F32),
        Weight::Grouped(table) => return table.take(tokens).float().cast(DType::F32),
        _ => {}
    }
    let [b, s] = [0, 1].map(|axis| tokens.dim(axis));
    let (ids, weights) = (tokens.reshape(&[b * s]), [embedding.clone()]);
    let (kernel, inputs) = with_weights(Kernel::new(TAKE_ROWS), &ids, &weights);
    let rows = tokens.graph().kernel(kernel, &inputs, |args| {
        let (ids, weights) = weights_of(args, &weights);
        vec![weights[0].float().take(ids, 0).cast(DType::F32)]
    });
    rows[0].reshape(&[b, s, embedding.shape()[1]])
}

/// What the decoder gives.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// The hidden states (B, S, M) f32, before the [`final_norm`].
    pub hidden: Tensor,
    /// The updated cache.
    pub cache: KvCache<Tensor>,
    /// The logits (B, S, E) of the routers, layer by layer, where the graph is for training.
    pub router_logits: Vec<Tensor>,
}

/// Runs S new tokens of each slot through the decoder. `tokens`: (B, S) i32; `frequencies`: those of
/// [`frequencies`](super::frequencies).
#[track_caller]
pub fn forward(
    p: &Llama<Weight>,
    tokens: &Tensor,
    place: &Place,
    frequencies: &[Tensor],
    cache: &KvCache<Tensor>,
    shape: &CacheShape,
    cfg: &ModelConfig,
) -> Decoded {
    let g = tokens.graph();
    let ropes = ropes(&place.positions, frequencies, cfg);

    let mut x = embed(&p.embedding, tokens);
    if cfg.embedding_scale != 1.0 {
        // rounded to the parameters' type, as the checkpoint was trained
        let scale = g.scalar(cfg.embedding_scale, p.embedding.dtype()).cast(DType::F32);
        x = &x * scale.broadcast(x.shape(), &[]);
    }
    x = x.shard(RESIDUAL).named("embedding");
    let mut layers = Vec::with_capacity(cfg.n_layers);
    let mut router_logits = Vec::new();
    let mut i = 0;
    while i < cfg.n_layers {
        let layer = &cfg.layers[i];
        let _scope = g.scope(&format!("layers.{i}"));
        let rope = layer.rope.map(|rope| &ropes[rope]);
        let at = LayerInput { rope, place, cache: &cache.layers[i], layout: shape.layout(layer) };
        let alike = cfg.layers[i..].iter().take_while(|other| *other == layer).count();
        if g.training() && g.platform() != Platform::Cpu && alike > 1 {
            let (out, logits) = scan_blocks(&p.layers[i..i + alike], &x, &at, layer, cfg);
            x = out;
            router_logits.extend(logits);
            layers.extend(cache.layers[i..i + alike].iter().cloned());
            i += alike;
            continue;
        }
        let block = call_block(&p.layers[i], &x, &at, layer, cfg);
        x = block.x.named("out");
        layers.push(block.cache);
        router_logits.extend(block.router_logits);
        i += 1;
    }
    Decoded { hidden: x, cache: KvCache { layers }, router_logits }
}

/// Blocks of one kind as a loop over their stacked parameters: x after the last, and the logits of their routers. The compilers of
/// accelerators write calls out, and a training step of many layers would take them half an hour; the copy is small beside it.
#[track_caller]
fn scan_blocks(
    p: &[DecoderBlock<Weight>],
    x: &Tensor,
    at: &LayerInput<'_>,
    layer: &LayerConfig,
    cfg: &ModelConfig,
) -> (Tensor, Vec<Tensor>) {
    let g = x.graph();
    let leaves: Vec<Vec<&Weight>> = p.iter().map(DecoderBlock::iter).collect();
    let stacks: Vec<Tensor> = (0..leaves[0].len())
        .flat_map(|leaf| Weight::stack(&leaves.iter().map(|layer| layer[leaf]).collect::<Vec<_>>()))
        .collect();
    let place = at.place;
    let mut whole = vec![&place.positions, &place.first];
    whole.extend(at.rope.iter().flat_map(|rope| [&rope.cos, &rope.sin]));
    let (carried, logits) =
        g.scan("layers", p.len(), &whole, &[x], &stacks.iter().collect::<Vec<_>>(), |whole, x, own| {
            let place =
                Place { positions: whole[0].clone(), first: whole[1].clone(), valid: None, table: None, ..*place };
            let rope = at.rope.map(|_| Rope { cos: whole[2].clone(), sin: whole[3].clone() });
            let mut own = own.iter().cloned();
            let mut next = || own.next().expect("a turn gets a piece of each stack");
            let p = p[0].as_ref().map(&mut |weight| weight.with(&mut next));
            let at = LayerInput { rope: rope.as_ref(), place: &place, ..*at };
            let block = call_block(&p, &x[0], &at, layer, cfg);
            (vec![block.x], block.router_logits.into_iter().collect())
        });
    let of_layer = |i: usize| logits.iter().map(move |all| all.narrow(0, i, 1).reshape(&all.shape()[1..]));
    (carried[0].clone(), (0..p.len()).flat_map(of_layer).collect())
}

/// The hidden states (B, S, M) as the head reads them, f32.
#[track_caller]
pub fn final_norm(p: &Llama<Weight>, x: &Tensor, cfg: &ModelConfig) -> Tensor {
    rms_norm(x, &p.final_norm.float(), cfg).named("final_norm")
}

/// What a block gives: x (B, S, M), its cache, and the logits (B, S, E) of its router, if it has one.
pub struct Block {
    /// The residual stream, f32.
    pub x: Tensor,
    /// The updated cache.
    pub cache: LayerCache<Tensor>,
    /// The router's.
    pub router_logits: Option<Tensor>,
}

/// The block as a function of the module, traced once for each kind of layer and called L times: small text, and the
/// fastest form measured.
#[track_caller]
fn call_block(
    p: &DecoderBlock<Weight>,
    x: &Tensor,
    at: &LayerInput<'_>,
    layer: &LayerConfig,
    cfg: &ModelConfig,
) -> Block {
    let LayerInput { rope, place, cache, layout } = *at;
    let training = x.graph().training();
    let mut inputs = vec![x, &place.positions, &place.first];
    inputs.extend(place.valid.iter().chain(&place.table));
    inputs.extend(rope.iter().flat_map(|rope| [&rope.cos, &rope.sin]));
    inputs.extend(&cache.arrays);
    inputs.extend(p.iter().into_iter().flat_map(Weight::tensors));
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
        let p = p.as_ref().map(&mut |weight| weight.with(&mut next));
        let at = LayerInput { rope: rope.as_ref(), place: &place, cache: &cache, layout };
        let block = decoder_block(&p, &x, &at, cfg);
        let router_logits = block.router_logits.filter(|_| training);
        std::iter::once(block.x).chain(block.cache.arrays).chain(router_logits).collect()
    });
    let (x, outputs) = outputs.split_first().expect("the block returns x and its cache");
    let (arrays, router_logits) = outputs.split_at(cache.arrays.len());
    let cache = LayerCache { arrays: arrays.to_vec() };
    Block { x: x.clone(), cache, router_logits: router_logits.first().cloned() }
}

/// What tells one kind of layer from another: `decoder_block`, `decoder_block_window512_nope`, ….
fn block_name(layer: &LayerConfig, layout: Layout) -> String {
    let window = match layout {
        Layout::Ring { window } | Layout::Own { window: Some(window), .. } => format!("_window{window}"),
        _ => String::new(),
    };
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
pub fn decoder_block(p: &DecoderBlock<Weight>, x: &Tensor, at: &LayerInput<'_>, cfg: &ModelConfig) -> Block {
    let g = x.graph();
    // A product of integers rounds what it multiplies, and that has no derivative.
    let here = |weight: &Weight| if g.training() { Weight::Float(weight.float()) } else { weight.whole() };
    let p = &p.as_ref().map(&mut |weight| here(weight));
    let norm = |x: Tensor, weight: &Option<Weight>, name: &str| match weight {
        Some(weight) => rms_norm(&x, &weight.float(), cfg).named(name),
        None => x,
    };
    let h = match &p.input_norm {
        Some(weight) => {
            let [for_q, h] = rms_norm_twice(x, &weight.float(), cfg);
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
    let (h, router_logits) = {
        let _scope = g.scope("mlp");
        let (h, router_logits) = match &p.feed_forward {
            FeedForward::Dense(p) => (mlp(p, &h, cfg), None),
            FeedForward::Experts(p) => {
                let (h, router_logits) = moe(p, &h, cfg);
                (h, Some(router_logits))
            }
        };
        (h.named("out"), router_logits)
    };
    let x = (&x + norm(h, &p.mlp_out_norm, "mlp_out_norm")).shard(RESIDUAL);
    Block { x, cache, router_logits }
}

/// Hidden states (B, S, M) times a head (M, V), or (V, M) where it is the embedding: (B, S, V) f32.
#[track_caller]
fn float_head(hidden: &Tensor, head: &Weight, tied: bool) -> Tensor {
    let rows = hidden.dim(0) * hidden.dim(1);
    let hidden = all_rows(&hidden.cast(head.dtype()));
    match tied {
        false => in_rows(&hidden, |hidden| product("BSM,MV->BSV", hidden, head)),
        // XLA:CPU transposes the right side of a one-row product in memory, the whole embedding at every step.
        true if rows == 1 && hidden.graph().platform() == Platform::Cpu => {
            einsum_as("VM,BSM->BSV", &head.float(), &hidden, DType::F32)
        }
        true => in_rows(&hidden, |hidden| product("BSM,VM->BSV", hidden, head)),
    }
}

/// Hidden states (B, S, M) and the head as they are multiplied. Of a head that `fsdp` splits along what is contracted, each device
/// takes its own part while the rows are few: sums of partial logits are less to send than the matrix, the largest of all.
#[track_caller]
fn head_operands(hidden: &Tensor, head: &Weight) -> (Tensor, Weight) {
    let g = hidden.graph();
    let (batch, parts) = (g.mesh_axes("batch"), g.mesh_axes("embed"));
    let few = 2 * hidden.dim(0) * hidden.dim(1) < hidden.dim(2);
    match few && !parts.is_empty() && parts.iter().all(|axis| !batch.contains(axis)) {
        true => (hidden.shard(["batch", "", "embed"]), head.in_parts().clone()),
        false => (hidden.clone(), head.whole()),
    }
}

/// Logits (B, S, V) in f32 of normalised hidden states (B, S, M); a tied head reads the embedding (V, M). Where a mesh pads
/// the vocabulary, the logits past it are −∞.
#[track_caller]
pub fn lm_head(p: &Llama<Weight>, hidden: &Tensor, cfg: &ModelConfig) -> Tensor {
    let (weight, tied) = (p.lm_head.as_ref().unwrap_or(&p.embedding), p.lm_head.is_none());
    let logits = match weight {
        weight if takes_kernel(hidden, weight) => by_kernel(hidden, &[(1, weight)], tied).remove(0),
        weight => {
            let (hidden, weight) = head_operands(hidden, weight);
            float_head(&hidden, &weight, tied)
        }
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
