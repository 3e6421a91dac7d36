//! The key/value cache: one pair of arrays per layer, (B, G, T, K) each, donated to every step.
//!
//! Heads before positions: each head's keys are a matrix as it lies, so that XLA:CPU multiplies with it in place. With
//! (B, T, G, K) it first transposes the whole cache, at every layer of every step.

use xla::DType;
use xla::graph::{ArgAttrs, Graph, Tensor};

use crate::config::ModelConfig;

/// The logical axes of a cache array (B, G, T, K).
pub const CACHE_AXES: [&str; 4] = ["batch", "kv_heads", "sequence", "head_dim"];

/// Keys and values of one layer.
#[derive(Clone, Debug)]
pub struct LayerCache<T> {
    /// Keys after rotation, (B, G, T, K).
    pub k: T,
    /// Values, (B, G, T, K).
    pub v: T,
}

/// The caches of all layers, in order.
#[derive(Clone, Debug)]
pub struct KvCache<T> {
    /// One entry per layer.
    pub layers: Vec<LayerCache<T>>,
}

/// What a cache array is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheShape {
    /// B, batch slots.
    pub batch: usize,
    /// T, positions per slot.
    pub len: usize,
    /// Element type.
    pub dtype: DType,
}

impl CacheShape {
    /// The dimensions (B, G, T, K) of each array.
    pub fn dims(&self, cfg: &ModelConfig) -> [usize; 4] {
        [self.batch, cfg.n_kv_heads, self.len, cfg.head_dim]
    }
}

impl<T> KvCache<T> {
    /// The arrays in argument order: k then v of each layer.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.layers.iter().flat_map(|l| [&l.k, &l.v])
    }
}

impl KvCache<Tensor> {
    /// Declares the cache as arguments of the graph, in the order of [`KvCache::iter`].
    pub fn declare(g: &Graph, shape: CacheShape, cfg: &ModelConfig) -> KvCache<Tensor> {
        let arg = |i: usize, part: &str| {
            let attrs = ArgAttrs { sharding: Some(&CACHE_AXES) };
            g.arg_with(&format!("cache/{i}/{part}"), shape.dtype, &shape.dims(cfg), attrs)
        };
        KvCache { layers: (0..cfg.n_layers).map(|i| LayerCache { k: arg(i, "k"), v: arg(i, "v") }).collect() }
    }
}

impl LayerCache<Tensor> {
    /// Writes new keys and values (B, S, G, K) at `position` (B), the first of S positions of each slot.
    ///
    /// A single slot's window must lie inside the cache; with several slots a window that does not is dropped whole
    /// (StableHLO scatter), which is what a slot that has nothing to write relies on.
    #[track_caller]
    pub fn update(&self, k: &Tensor, v: &Tensor, position: &Tensor) -> LayerCache<Tensor> {
        let (k, v) = (write(&self.k, k, position).named("k_cache"), write(&self.v, v, position).named("v_cache"));
        // Without the barrier XLA:CPU fuses the write into its readers, once each, and copies the cache for every one.
        match &k.graph().optimization_barrier(&[&k, &v])[..] {
            [k, v] => LayerCache { k: k.clone(), v: v.clone() },
            _ => unreachable!("a barrier returns what it was given"),
        }
    }

    /// The first `len` positions (B, G, len, K): what a step that ends at or before `len` reads.
    #[track_caller]
    pub fn read(&self, len: usize) -> LayerCache<Tensor> {
        LayerCache { k: self.k.narrow(2, 0, len), v: self.v.narrow(2, 0, len) }
    }
}

/// Writes (B, S, G, K) at positions `position` (B) of a cache (B, G, T, K).
#[track_caller]
fn write(cache: &Tensor, new: &Tensor, position: &Tensor) -> Tensor {
    let new = new.cast(cache.dtype()).transpose(&[0, 2, 1, 3]);
    let [b, g, t, k] = [0, 1, 2, 3].map(|axis| cache.dim(axis));
    if b == 1 {
        let zero = cache.graph().scalar(0i64, DType::I32);
        cache.dynamic_update_slice(&new, &[&zero, &zero, &position.reshape(&[]), &zero])
    } else {
        // A scatter has one window per row: each head of each slot is a row of its own.
        let rows = position.broadcast(&[b, g], &[0]).reshape(&[b * g]);
        let new = new.reshape(&[b * g, new.dim(2), k]);
        cache.reshape(&[b * g, t, k]).update_positions(&new, &rows).reshape(&[b, g, t, k])
    }
}
