//! Grouped-query attention over the cache (Ainslie et al. 2023; R = 1 is multi-head, G = 1 multi-query).

use xla::DType;
use xla::graph::{Tensor, einsum_as};

use super::linear::linear;
use super::rope::Rope;
use crate::config::ModelConfig;
use crate::kv_cache::LayerCache;
use crate::params::Attention;

/// Which cache positions each query may see, shared by all layers.
#[derive(Clone, Debug)]
pub struct Mask {
    /// True where query s of slot b sees cache position t: (B, S, T), with T the positions that are read.
    pub visible: Tensor,
    /// First position of the S new tokens of each slot, (B) i32: where the cache is written.
    pub position: Tensor,
}

impl Mask {
    /// The causal mask of queries at `positions` (B, S) over the first `read_len` cache positions. A `read_len` of S says
    /// that every slot begins at position 0: there is no other way for S tokens to end there.
    #[track_caller]
    pub fn causal(positions: &Tensor, position: &Tensor, read_len: usize) -> Mask {
        let shape = [positions.dim(0), positions.dim(1), read_len];
        let key = positions.graph().iota(DType::I32, &shape, 2);
        let visible = key.le(&positions.broadcast(&shape, &[0, 1])).named("visible");
        Mask { visible, position: position.clone() }
    }
}

/// softmax(q·kᵀ/√K)·v with the S new keys and values written to the cache first. `x`: (B, S, M) → (B, S, M) in f32.
///
/// Query head h reads key/value head h / R: H splits as (G, R). The sum of the softmax divides after the product with v.
#[track_caller]
pub fn attention(
    p: &Attention<Tensor>,
    x: &Tensor,
    rope: &Rope,
    mask: &Mask,
    cache: &LayerCache<Tensor>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let (b, s) = (x.dim(0), x.dim(1));
    let (h, g, k_dim) = (cfg.n_heads, cfg.n_kv_heads, cfg.head_dim);
    let heads = ["batch", "sequence", "heads", "head_dim"];
    let kv_heads = ["batch", "sequence", "kv_heads", "head_dim"];

    let q = linear("BSM,MHK->BSHK", x, &p.q_proj, p.q_bias.as_ref()).shard(heads).named("q");
    let k = linear("BSM,MGK->BSGK", x, &p.k_proj, p.k_bias.as_ref()).shard(kv_heads).named("k");
    let v = linear("BSM,MGK->BSGK", x, &p.v_proj, p.v_bias.as_ref()).shard(kv_heads).named("v");
    let q = rope.rotate(&q).named("q_rope");
    let k = rope.rotate(&k).named("k_rope");

    let cache = cache.update(&k, &v, &mask.position);
    let past = cache.read(mask.visible.dim(2));

    let q = (q * (k_dim as f64).powf(-0.5)).cast(past.k.dtype()).reshape(&[b, s, g, cfg.queries_per_kv_head(), k_dim]);
    let out = match s == past.k.dim(2) && s > BLOCK && s.is_multiple_of(BLOCK) {
        true => in_blocks(&q, &past, &mask.visible),
        false => attend(&q, &past.k, &past.v, &mask.visible),
    };
    let out = out.reshape(&[b, s, h, k_dim]).shard(heads);

    (linear("BSHK,HKM->BSM", &out, &p.out_proj, p.out_bias.as_ref()).named("out"), cache)
}

/// Query rows of one block where a whole prompt is attended to at once.
const BLOCK: usize = 128;

/// Attention of S queries over exactly the S positions they stand at: block by block, each over its past only, which
/// leaves out most of the scores that the mask would throw away.
#[track_caller]
fn in_blocks(q: &Tensor, past: &LayerCache<Tensor>, visible: &Tensor) -> Tensor {
    let blocks: Vec<Tensor> = (0..q.dim(1) / BLOCK)
        .map(|i| {
            let (start, end) = (i * BLOCK, (i + 1) * BLOCK);
            let past = past.read(end);
            let visible = visible.narrow(1, start, BLOCK).narrow(2, 0, end);
            attend(&q.narrow(1, start, BLOCK), &past.k, &past.v, &visible)
        })
        .collect();
    q.graph().concatenate(&blocks.iter().collect::<Vec<_>>(), 1)
}

/// softmax(q·kᵀ)·v over what is visible. `q` (B, S, G, R, K), `k` and `v` (B, G, T, K), `visible` (B, S, T) → (B, S, G, R, K), f32.
#[track_caller]
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, visible: &Tensor) -> Tensor {
    let scores = einsum_as("BSGRK,BGTK->BGSRT", q, k, DType::F32);
    let visible = visible.broadcast(scores.shape(), &[0, 2, 4]);
    let scores = visible.select(&scores, f64::from(f32::MIN));
    let weights = (&scores - scores.max_keep(&[4]).broadcast_to(scores.shape())).exp();
    let total = weights.sum(&[4]);
    let out = einsum_as("BGSRT,BGTK->BGSRK", &weights.cast(v.dtype()), v, DType::F32);
    (&out / total.broadcast(out.shape(), &[0, 1, 2, 3])).transpose(&[0, 2, 1, 3, 4])
}
