//! The key/value cache: the arrays of each layer, in the layout that suits it, donated to every step.
//!
//! | layout | arrays | for |
//! |---|---|---|
//! | static | (B, G, T, K); on a TPU (B, T, G, K) | layers that see everything |
//! | ring | the same with T = W + 32 | layers that see a window of W positions: position p lies at p mod (W + 32) |
//! | paged | (P, page, G, K) | layers that see everything, where slots share a pool of P pages through a table |
//! | own | none | training, whose step has all of its tokens |
//!
//! Heads come before positions so that each head's keys are a matrix as it lies and XLA:CPU multiplies with it in place: of
//! (B, T, G, K) it first transposes the whole cache, at every layer of every step. On a TPU the transpose costs nothing, and
//! only with positions first is the write of one position per slot a single scatter in place. An int8 cache has a scale for
//! each position and head beside it, the last axis of length 1.
//!
//! [`Slots`] is the host's half: which slot holds which tokens, and which pages.

mod slots;
mod step;

pub use slots::{PageCopy, Slots};
pub use step::{Order, Past, Place};

use xla::DType;
use xla::graph::{ArgAttrs, Graph, Platform, Tensor};

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
    /// T, positions per slot; 0 where nothing is kept.
    pub len: usize,
    /// Element type; int8 comes with scales.
    pub dtype: DType,
    /// A pool of pages instead of an array per slot.
    pub pages: Option<Pages>,
    /// What it lies on.
    pub platform: Platform,
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
    /// Nothing is kept: the tokens of the step are all that there are.
    Own {
        /// W, where a query sees only so many positions.
        window: Option<usize>,
        /// The type of keys and values.
        dtype: DType,
    },
}

/// Positions that a ring holds beside its window, so that a few may be taken back: steps that were on their way when the
/// text ended, and the end of an answer that a chat template writes differently.
pub const SLACK: usize = 32;

impl CacheShape {
    /// The layout of one layer: a ring wherever the window is shorter than the cache, so that no other layout has to mask it.
    pub fn layout(&self, layer: &LayerConfig) -> Layout {
        match (layer.window, self.pages) {
            (window, _) if self.len == 0 => Layout::Own { window, dtype: self.dtype },
            (Some(window), _) if window < self.len => Layout::Ring { window },
            (_, Some(pages)) => Layout::Paged(pages),
            (_, None) => Layout::Static,
        }
    }

    /// Name, type and dimensions of the arrays of one layer.
    pub fn arrays(&self, cfg: &ModelConfig, layer: &LayerConfig) -> Vec<(&'static str, DType, [usize; 4])> {
        let (g, k) = (cfg.n_kv_heads, cfg.head_dim);
        let dims = |width: usize| match self.layout(layer) {
            Layout::Static => self.slot_array(g, self.len, width),
            Layout::Ring { window } => self.slot_array(g, window + SLACK, width),
            Layout::Paged(pages) => [pages.count, pages.size, g, width],
            Layout::Own { .. } => [0; 4],
        };
        if let Layout::Own { .. } = self.layout(layer) {
            return Vec::new();
        }
        let mut arrays = vec![("k", self.dtype, dims(k)), ("v", self.dtype, dims(k))];
        if self.dtype == DType::I8 {
            arrays.extend([("k_scale", DType::F32, dims(1)), ("v_scale", DType::F32, dims(1))]);
        }
        arrays
    }

    fn slot_array(&self, g: usize, t: usize, width: usize) -> [usize; 4] {
        match position_axis(self.platform) {
            1 => [self.batch, t, g, width],
            _ => [self.batch, g, t, width],
        }
    }

    /// N, pages that one slot can have; 0 without a pool.
    pub fn table_len(&self) -> usize {
        self.pages.map_or(0, |pages| self.len / pages.size)
    }
}

/// Where positions stand in the arrays of slots: 2 of (B, G, T, K), or 1 of (B, T, G, K).
fn position_axis(platform: Platform) -> isize {
    if platform == Platform::Tpu { 1 } else { 2 }
}

impl Layout {
    /// The logical axes of its arrays.
    pub fn axes(&self, platform: Platform) -> &'static [&'static str] {
        match self {
            Layout::Paged(_) => &["pages", "positions", "kv_heads", "head_dim"],
            _ if position_axis(platform) == 1 => &["batch", "positions", "kv_heads", "head_dim"],
            _ => &["batch", "kv_heads", "positions", "head_dim"],
        }
    }
}

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
            let axes = shape.layout(layer).axes(shape.platform);
            let arg = |(part, dtype, dims): (&str, DType, [usize; 4])| {
                g.arg_with(&format!("cache/{i}/{part}"), dtype, &dims, ArgAttrs { sharding: Some(axes) })
            };
            LayerCache { arrays: shape.arrays(cfg, layer).into_iter().map(arg).collect() }
        };
        KvCache { layers: cfg.layers.iter().enumerate().map(layer).collect() }
    }
}
