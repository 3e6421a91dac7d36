//! Grouped-query attention over the cache (Ainslie et al. 2023; R = 1 is multi-head, G = 1 multi-query).

use xla::DType;
use xla::graph::{Attr, Kernel, Tensor};

use super::cache_pieces::{by_slots, slots};
use super::linear::linears;
use super::lora::adapter;
use super::rms_norm::rms_norm;
use super::rope::Rope;
use super::scores::Queries;
use crate::config::{ModelConfig, QkNorm};
use crate::kv_cache::{LayerCache, Layout, Place, SLACK};
use crate::params::{Attention, Weight};

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
    p: &Attention<Weight>,
    x: &[Tensor; 2],
    at: &LayerInput<'_>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let heads = ["batch", "sequence", "heads", "head_dim"];
    let kv_heads = ["batch", "sequence", "kv_heads", "head_dim"];

    let [for_q, x] = x;
    let [q, k, v] = linears([
        ("BSM,MHK->BSHK", for_q, &p.q_proj, p.q_bias.as_ref(), adapter(&p.q_lora, cfg)),
        ("BSM,MGK->BSGK", x, &p.k_proj, p.k_bias.as_ref(), adapter(&p.k_lora, cfg)),
        ("BSM,MGK->BSGK", x, &p.v_proj, p.v_bias.as_ref(), adapter(&p.v_lora, cfg)),
    ]);
    let (q, k, v) = (q.shard(heads).named("q"), k.shard(kv_heads).named("k"), v.shard(kv_heads).named("v"));
    let q = head_norm(q, p.q_norm.as_ref(), "q_norm", cfg);
    let k = head_norm(k, p.k_norm.as_ref(), "k_norm", cfg);
    let (out, cache) = match step_kernel(q.dim(1), at, cfg) {
        Some(kernel) => step_by_kernel(kernel, [&q, &k, &v], at, cfg),
        None => step(&q, &k, &v, at, cfg),
    };
    let out = out.shard(heads);

    let [y] = linears([("BSHK,HKM->BSM", &out, &p.out_proj, p.out_bias.as_ref(), adapter(&p.out_lora, cfg))]);
    (y.named("out"), cache)
}

/// Queries and keys rotated, keys and values into the cache, and attention over it. q (B, S, H, K), k and v (B, S, G, K), f32; the
/// result is (B, S, H, K) f32 and the updated cache.
#[track_caller]
fn step(q: &Tensor, k: &Tensor, v: &Tensor, at: &LayerInput<'_>, cfg: &ModelConfig) -> (Tensor, LayerCache<Tensor>) {
    let (q, k) = match at.rope {
        Some(rope) => (rope.rotate(q).named("q_rope"), rope.rotate(k).named("k_rope")),
        None => (q.clone(), k.clone()),
    };
    over_cache(&(q * cfg.attention.scale), &k, v, at, cfg)
}

/// The kernel of a step of attention: q, k, v, then cos and sin where the attribute `rotates`, positions (B, S) and first positions (B) i32, how
/// many tokens count (B) i32 where `counts`, and the arrays of the cache, which it updates in place. The attributes `scale`,
/// `softcap` and `window` are 0 where there is none; `ring` says that position p lies at p modulo T.
pub const ATTENTION_STEP: &str = "xllama.attention_step";

/// The call of the kernel that does [`step`] for S tokens, where there is one for this layout.
fn step_kernel(tokens: usize, at: &LayerInput<'_>, cfg: &ModelConfig) -> Option<Kernel> {
    let window = match at.layout {
        Layout::Static => None,
        // Tokens are written before the first of them looks back: past the slack the oldest keys that it sees would be lost.
        Layout::Ring { window } if tokens <= SLACK => Some(window),
        Layout::Ring { .. } | Layout::Paged(_) | Layout::Own { .. } => return None,
    };
    let kernel = Kernel::new(ATTENTION_STEP)
        .attr("rotates", Attr::Bool(at.rope.is_some()))
        .attr("counts", Attr::Bool(window.is_some() && at.place.valid.is_some()))
        .attr("scale", Attr::F32(cfg.attention.scale as f32))
        .attr("softcap", Attr::F32(cfg.attention.softcap.unwrap_or(0.0) as f32))
        .attr("window", Attr::I64(window.unwrap_or(0) as i64))
        .attr("ring", Attr::Bool(window.is_some()));
    at.cache.arrays[0].graph().has_kernel(ATTENTION_STEP).then_some(kernel)
}

/// [`step`] by its kernel.
#[track_caller]
fn step_by_kernel(
    mut kernel: Kernel,
    [q, k, v]: [&Tensor; 3],
    at: &LayerInput<'_>,
    cfg: &ModelConfig,
) -> (Tensor, LayerCache<Tensor>) {
    let LayerInput { rope, place, cache, layout } = *at;
    let valid = place.valid.as_ref().filter(|_| layout != Layout::Static);
    let mut inputs = vec![q, k, v];
    inputs.extend(rope.iter().flat_map(|rope| [&rope.cos, &rope.sin]));
    inputs.extend([&place.positions, &place.first]);
    inputs.extend(valid);
    for (i, array) in cache.arrays.iter().enumerate() {
        kernel = kernel.alias(1 + i, inputs.len());
        inputs.push(array);
    }
    let results = q.graph().kernel(kernel, &inputs, |args| {
        let mut args = args.iter().cloned();
        let mut next = || args.next().expect("as many as it was called with");
        let (q, k, v) = (next(), next(), next());
        let rope = rope.map(|_| Rope { cos: next(), sin: next() });
        let (positions, first) = (next(), next());
        let place = Place { positions, first, valid: valid.map(|_| next()), table: None, read_len: place.read_len };
        let cache = LayerCache { arrays: cache.arrays.iter().map(|_| next()).collect() };
        let at = LayerInput { rope: rope.as_ref(), place: &place, cache: &cache, layout };
        let (out, cache) = step(&q, &k, &v, &at, cfg);
        std::iter::once(out).chain(cache.arrays).collect()
    });
    let (out, arrays) = results.split_first().expect("the step returns its output and the cache");
    (out.clone(), LayerCache { arrays: arrays.to_vec() })
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
        let [b, s, h, width] = [0, 1, 2, 3].map(|axis| q.dim(axis));
        let groups = k.dim(2);
        let split = |dtype: DType| q.cast(dtype).reshape(&[b, s, groups, h / groups, width]);
        let softcap = cfg.attention.softcap;
        if let Some(slots) = slots(&cache, k.dim(1), &place, layout) {
            let dtype = cache.arrays[0].dtype();
            let queries = Queries { q: split(dtype), positions: &positions, first_row: None, softcap, sinks: None };
            let own = [&k.cast(dtype), &v.cast(dtype)];
            let (out, cache) = by_slots(&queries, own, &cache, place.read_len, slots);
            let (_, cache) = cache.step(&k, &v, &place, layout);
            return std::iter::once(out.reshape(&[b, s, h, width])).chain(cache.arrays).collect();
        }
        let (past, cache) = cache.step(&k, &v, &place, layout);

        // An int8 cache is multiplied in the type of the parameters.
        let q = split(if past.scales.is_some() { DType::F32 } else { past.k.dtype() });
        let first_row = (!tokens.is_empty()).then(|| &positions.narrow(1, 0, 1) - place.positions.narrow(1, 0, 1));
        let first_row = first_row.map(|rows| rows.narrow(0, 0, 1).reshape(&[]));
        let queries = Queries { q, positions: &positions, first_row, softcap, sinks: None };
        let out = queries.attend(&past).reshape(&[b, s, h, width]);
        std::iter::once(out).chain(cache.arrays).collect()
    });
    let (out, arrays) = results.split_first().expect("the body returns its output and the cache");
    (out.clone(), LayerCache { arrays: arrays.to_vec() })
}

/// RMSNorm of queries or keys, (B, S, heads, K): over each head, or over all of them.
#[track_caller]
fn head_norm(x: Tensor, weight: Option<&Weight>, name: &str, cfg: &ModelConfig) -> Tensor {
    let Some(weight) = weight else { return x };
    let normed = match cfg.attention.qk_norm {
        Some(QkNorm::Whole) => {
            let width = x.dim(2) * x.dim(3);
            let flat = x.reshape(&[x.dim(0), x.dim(1), width]);
            rms_norm(&flat, &weight.float().reshape(&[width]), cfg).reshape(x.shape())
        }
        _ => rms_norm(&x, &weight.float(), cfg),
    };
    normed.named(name)
}
