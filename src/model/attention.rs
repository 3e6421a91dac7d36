//! Grouped-query attention over the cache (Ainslie et al. 2023; R = 1 is multi-head, G = 1 multi-query).

use xla::DType;
use xla::graph::Tensor;

use super::linear::linear;
use super::rms_norm::rms_norm;
use super::rope::Rope;
use super::scores::Queries;
use crate::config::{ModelConfig, QkNorm};
use crate::kv_cache::{LayerCache, Layout, Place};
use crate::params::Attention;

/// What a layer is given beside the residual stream.
#[derive(Clone, Copy, Debug)]
pub struct LayerInput<'a> {
    /// The angles; `None` where positions do not rotate.
    pub rope: Option<&'a Rope>,
    /// Where the new tokens stand.
    pub place: &'a Place,
    /// The layer's cache.
    pub cache: &'a LayerCache<Tensor>,
    /// How positions lie in it.
    pub layout: Layout,
}

/// softmax(q·kᵀ·scale)·v with the S new keys and values written to the cache first. `x`: (B, S, M) → (B, S, M) in f32.
///
/// Query head h reads key/value head h / R: H splits as (G, R).
#[track_caller]
pub fn attention(
    p: &Attention<Tensor>,
    x: &Tensor,
    at: &LayerInput<'_>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let (b, s) = (x.dim(0), x.dim(1));
    let (h, g, k_dim) = (cfg.n_heads, cfg.n_kv_heads, cfg.head_dim);
    let heads = ["batch", "sequence", "heads", "head_dim"];
    let kv_heads = ["batch", "sequence", "kv_heads", "head_dim"];

    let q = linear("BSM,MHK->BSHK", x, &p.q_proj, p.q_bias.as_ref()).shard(heads).named("q");
    let k = linear("BSM,MGK->BSGK", x, &p.k_proj, p.k_bias.as_ref()).shard(kv_heads).named("k");
    let v = linear("BSM,MGK->BSGK", x, &p.v_proj, p.v_bias.as_ref()).shard(kv_heads).named("v");
    let q = head_norm(q, p.q_norm.as_ref(), "q_norm", cfg);
    let k = head_norm(k, p.k_norm.as_ref(), "k_norm", cfg);
    let (q, k) = match at.rope {
        Some(rope) => (rope.rotate(&q).named("q_rope"), rope.rotate(&k).named("k_rope")),
        None => (q, k),
    };

    let (past, cache) = at.cache.step(&k, &v, at.place, at.layout);

    // An int8 cache is multiplied in the type of the parameters.
    let dtype = if past.scales.is_some() { DType::F32 } else { past.k.dtype() };
    let q = (q * cfg.attention.scale).cast(dtype).reshape(&[b, s, g, cfg.queries_per_kv_head(), k_dim]);
    let queries = Queries { q, positions: &at.place.positions, softcap: cfg.attention.softcap, sinks: None };
    let out = queries.attend(&past).reshape(&[b, s, h, k_dim]).shard(heads);

    (linear("BSHK,HKM->BSM", &out, &p.out_proj, p.out_bias.as_ref()).named("out"), cache)
}

/// RMSNorm of queries or keys, (B, S, heads, K): over each head, or over all of them.
#[track_caller]
fn head_norm(x: Tensor, weight: Option<&Tensor>, name: &str, cfg: &ModelConfig) -> Tensor {
    let Some(weight) = weight else { return x };
    let normed = match cfg.attention.qk_norm {
        Some(QkNorm::Whole) => {
            let width = x.dim(2) * x.dim(3);
            let flat = x.reshape(&[x.dim(0), x.dim(1), width]);
            rms_norm(&flat, &weight.reshape(&[width]), cfg).reshape(x.shape())
        }
        _ => rms_norm(&x, weight, cfg),
    };
    normed.named(name)
}
