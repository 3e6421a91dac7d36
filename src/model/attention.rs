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

/// softmax(q·kᵀ·scale)·v with the S new keys and values written to the cache first. `x`: (B, S, M) → (B, S, M) in f32,
/// given twice: for the queries, and for keys and values (see `rms_norm_twice`).
///
/// Query head h reads key/value head h / R: H splits as (G, R).
#[track_caller]
pub fn attention(
    p: &Attention<Tensor>,
    x: &[Tensor; 2],
    at: &LayerInput<'_>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let heads = ["batch", "sequence", "heads", "head_dim"];
    let kv_heads = ["batch", "sequence", "kv_heads", "head_dim"];

    let [for_q, x] = x;
    let q = linear("BSM,MHK->BSHK", for_q, &p.q_proj, p.q_bias.as_ref()).shard(heads).named("q");
    let k = linear("BSM,MGK->BSGK", x, &p.k_proj, p.k_bias.as_ref()).shard(kv_heads).named("k");
    let v = linear("BSM,MGK->BSGK", x, &p.v_proj, p.v_bias.as_ref()).shard(kv_heads).named("v");
    let q = head_norm(q, p.q_norm.as_ref(), "q_norm", cfg);
    let k = head_norm(k, p.k_norm.as_ref(), "k_norm", cfg);
    let (q, k) = match at.rope {
        Some(rope) => (rope.rotate(&q).named("q_rope"), rope.rotate(&k).named("k_rope")),
        None => (q, k),
    };

    let q = q * cfg.attention.scale;
    let (out, cache) = over_cache(&q, &k, &v, at, cfg);
    let out = out.shard(heads);

    (linear("BSHK,HKM->BSM", &out, &p.out_proj, p.out_bias.as_ref()).named("out"), cache)
}

/// The cache's step and softmax(q·kᵀ)·v, each device with its own slots and heads: (B, S, H, K) f32, and the updated cache.
/// Where devices share the tokens of a prefill, each has its own queries and gets the keys and values of all of them.
#[track_caller]
fn over_cache(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    at: &LayerInput<'_>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    const HEADS: &[&str] = &["batch", "sequence", "heads", ""];
    const KV_HEADS: &[&str] = &["batch", "sequence", "kv_heads", ""];
    let LayerInput { place, cache, layout, .. } = *at;
    let axes = layout.axes(q.graph().platform());
    let mut inputs: Vec<(&Tensor, &[&str])> = vec![(q, HEADS), (k, KV_HEADS), (v, KV_HEADS)];
    inputs.extend([(&place.positions, &["batch", "sequence"][..]), (&place.first, &["batch"])]);
    inputs.extend(place.valid.iter().map(|valid| (valid, &["batch"][..])));
    inputs.extend(place.table.iter().map(|table| (table, &["batch", ""][..])));
    inputs.extend(cache.arrays.iter().map(|array| (array, axes)));
    let mut outputs = vec![HEADS];
    outputs.extend(cache.arrays.iter().map(|_| axes));

    let results = q.graph().manual_computation(&inputs, &outputs, |args| {
        let mut args = args.iter().cloned();
        let mut next = || args.next().expect("a body gets as many arguments as it was given");
        let (q, k, v, positions) = (next(), next(), next(), next());
        let g = q.graph();
        let tokens = g.piece_axes("sequence");
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let all = |x: Tensor| if tokens.is_empty() { x } else { x.all_gather(1, &tokens) };
        let (k, v) = (all(k), all(v));
        let place = Place {
            positions: all(positions.clone()),
            first: next(),
            valid: place.valid.as_ref().map(|_| next()),
            table: place.table.as_ref().map(|_| next()),
            read_len: place.read_len,
        };
        let cache = LayerCache { arrays: cache.arrays.iter().map(|_| next()).collect() };
        let (past, cache) = cache.step(&k, &v, &place, layout);

        // An int8 cache is multiplied in the type of the parameters.
        let dtype = if past.scales.is_some() { DType::F32 } else { past.k.dtype() };
        let [b, s, h, width] = [0, 1, 2, 3].map(|axis| q.dim(axis));
        let groups = k.dim(2);
        let q = q.cast(dtype).reshape(&[b, s, groups, h / groups, width]);
        let first_row = (!tokens.is_empty()).then(|| &positions.narrow(1, 0, 1) - place.positions.narrow(1, 0, 1));
        let first_row = first_row.map(|rows| rows.narrow(0, 0, 1).reshape(&[]));
        let queries = Queries { q, positions: &positions, first_row, softcap: cfg.attention.softcap, sinks: None };
        let out = queries.attend(&past).reshape(&[b, s, h, width]);
        std::iter::once(out).chain(cache.arrays).collect()
    });
    let (out, arrays) = results.split_first().expect("the body returns its output and the cache");
    (out.clone(), LayerCache { arrays: arrays.to_vec() })
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
