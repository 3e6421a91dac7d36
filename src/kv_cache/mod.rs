//! The key/value cache: the arrays of each layer, in the layout that suits it, donated to every step.
//!
//! | layout | arrays | for |
//! |---|---|---|
//! | static | (B, G, T, K) | layers that see everything |
//! | ring | (B, G, W + 32, K) | layers that see a window of W positions: position p lies at p mod (W + 32) |
//! | paged | (P, page, G, K) | layers that see everything, where slots share a pool of P pages through a table |
//!
//! Heads before positions where the layout has them so: each head's keys are a matrix as it lies, so that XLA:CPU multiplies
//! with it in place. With (B, T, G, K) it first transposes the whole cache, at every layer of every step. An int8 cache has a
//! scale for each position and head beside it, the last axis of length 1.
//!
//! [`Slots`] is the host's half: which slot holds which tokens, and which pages.

mod slots;
mod step;

pub use slots::{PageCopy, Slots};
pub use step::{Order, Past, Place};

use xla::DType;
use xla::graph::{ArgAttrs, Graph, Tensor};

use crate::config::{LayerConfig, ModelConfig};

/// The arrays of one layer: keys after rotation and values, then the scales of both if they are int8.
#[derive(Clone, Debug)]
pub struct LayerCache<T> {
    /// k, v, or k, v, scale of k, scale of v.
    pub arrays: Vec<T>,
}

/// The caches of all layers, in order.
#[derive(Clone, Debug)]
pub struct KvCache<T> {
    /// One entry per layer.
    pub layers: Vec<LayerCache<T>>,
}

/// What a cache is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheShape {
    /// B, batch slots.
    pub batch: usize,
    /// T, positions per slot.
    pub len: usize,
    /// Element type; int8 comes with scales.
    pub dtype: DType,
    /// A pool of pages instead of an array per slot.
    pub pages: Option<Pages>,
}

/// A pool of pages that all slots share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pages {
    /// Positions in a page; it divides the length.
    pub size: usize,
    /// P, pages in the pool.
    pub count: usize,
}

/// How a layer's positions lie in its arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Position t at t.
    Static,
    /// Position t at t modulo the window and [`SLACK`].
    Ring {
        /// W: how many positions a query sees.
        window: usize,
    },
    /// Position t in page t / size of the slot.
    Paged(Pages),
}

/// Positions that a ring holds beside its window, so that a few may be taken back: steps that were on their way when the
/// text ended, and the end of an answer that a chat template writes differently.
pub const SLACK: usize = 32;

impl CacheShape {
    /// The layout of one layer: a ring wherever the window is shorter than the cache, so that no other layout has to mask it.
    pub fn layout(&self, layer: &LayerConfig) -> Layout {
        match (layer.window, self.pages) {
            (Some(window), _) if window < self.len => Layout::Ring { window },
            (_, Some(pages)) => Layout::Paged(pages),
            (_, None) => Layout::Static,
        }
    }

    /// Name, type and dimensions of the arrays of one layer.
    pub fn arrays(&self, cfg: &ModelConfig, layer: &LayerConfig) -> Vec<(&'static str, DType, [usize; 4])> {
        let (g, k) = (cfg.n_kv_heads, cfg.head_dim);
        let dims = |width: usize| match self.layout(layer) {
            Layout::Static => [self.batch, g, self.len, width],
            Layout::Ring { window } => [self.batch, g, window + SLACK, width],
            Layout::Paged(pages) => [pages.count, pages.size, g, width],
        };
        let mut arrays = vec![("k", self.dtype, dims(k)), ("v", self.dtype, dims(k))];
        if self.dtype == DType::I8 {
            arrays.extend([("k_scale", DType::F32, dims(1)), ("v_scale", DType::F32, dims(1))]);
        }
        arrays
    }

    /// N, pages that one slot can have; 0 without a pool.
    pub fn table_len(&self) -> usize {
        self.pages.map_or(0, |pages| self.len / pages.size)
    }
}

/// The logical axes of an array (B, G, T, K), and of (P, page, G, K).
const AXES: [&str; 4] = ["batch", "kv_heads", "sequence", "head_dim"];
const PAGED_AXES: [&str; 4] = ["pages", "sequence", "kv_heads", "head_dim"];

impl<T> KvCache<T> {
    /// The arrays in argument order: layer by layer.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.layers.iter().flat_map(|layer| &layer.arrays)
    }
}

impl KvCache<Tensor> {
    /// Declares the cache as arguments of the graph, in the order of [`KvCache::iter`].
    pub fn declare(g: &Graph, shape: CacheShape, cfg: &ModelConfig) -> KvCache<Tensor> {
        let layer = |(i, layer): (usize, &LayerConfig)| {
            let axes = if matches!(shape.layout(layer), Layout::Paged(_)) { PAGED_AXES } else { AXES };
            let arg = |(part, dtype, dims): (&str, DType, [usize; 4])| {
                g.arg_with(&format!("cache/{i}/{part}"), dtype, &dims, ArgAttrs { sharding: Some(&axes) })
            };
            LayerCache { arrays: shape.arrays(cfg, layer).into_iter().map(arg).collect() }
        };
        KvCache { layers: cfg.layers.iter().enumerate().map(layer).collect() }
    }
}
