//! How a model is split over devices: the axes of a mesh, the one table from logical axes to them, and what must divide.

use std::fmt;
use std::str::FromStr;

use xla::graph::{Mesh, Platform, Rules};

use crate::Error;
use crate::config::ModelConfig;
use crate::kv_cache::CacheShape;

/// Devices along each axis of a mesh; 1 where an axis is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MeshShape {
    /// Batch slots are split.
    pub data: usize,
    /// Parameters are split, and gathered layer by layer; batch slots too where it divides them.
    pub fsdp: usize,
    /// Experts are split, and tokens go to them; batch slots too where it divides them.
    pub expert: usize,
    /// The tokens of a prefill are split.
    pub sequence: usize,
    /// Heads, the feed-forward's width and the vocabulary are split.
    pub model: usize,
}

impl Default for MeshShape {
    fn default() -> Self {
        MeshShape { data: 1, fsdp: 1, expert: 1, sequence: 1, model: 1 }
    }
}

/// Tokens of a slot for each `model` device from which on each keeps and normalises only its part of the residual stream: the sums of
/// products are scattered and the normalised rows gathered in the type of the weights, instead of sums for everyone in f32.
const RESIDUAL_TOKENS: usize = 16;

impl MeshShape {
    /// The axes by name, those first whose devices may stand far apart: devices are numbered with the last as the fastest.
    pub fn axes(&self) -> [(&'static str, usize); 5] {
        let MeshShape { data, fsdp, expert, sequence, model } = *self;
        [("data", data), ("fsdp", fsdp), ("expert", expert), ("sequence", sequence), ("model", model)]
    }

    /// Number of devices.
    pub fn devices(&self) -> usize {
        self.axes().iter().map(|(_, n)| n).product()
    }

    /// The mesh of the axes that are used; `None` for one device.
    pub fn mesh(&self) -> Option<Mesh> {
        Mesh::new(self.axes().into_iter().filter(|(_, n)| *n > 1)).ok()
    }

    /// The table from logical to mesh axes for a program over `tokens` tokens of each slot of `cache`.
    ///
    /// | logical | of | mesh |
    /// |---|---|---|
    /// | batch | activations, cache | data; fsdp and expert where they divide it; none where slots share pages |
    /// | sequence | activations | sequence where it divides the tokens |
    /// | tokens | the residual stream | as sequence; on a TPU also model, where many tokens are left for each device |
    /// | heads, kv_heads, mlp, vocab | parameters, activations, cache, logits | model |
    /// | experts | parameters | expert |
    /// | embed | parameters | fsdp |
    /// | hidden, head_dim, rank, positions, pages | the rest | none |
    pub fn rules(&self, cache: &CacheShape, tokens: usize) -> Rules {
        let mut split_batch = Vec::new();
        let mut ways = 1;
        for (axis, n) in [("data", self.data), ("fsdp", self.fsdp), ("expert", self.expert)] {
            if cache.pages.is_none() && cache.batch.is_multiple_of(ways * n) {
                split_batch.push(axis);
                ways *= n;
            }
        }
        let split_tokens = if tokens.is_multiple_of(self.sequence) { &["sequence"][..] } else { &[] };
        let mut split_residual = split_tokens.to_vec();
        let ways = self.model * if split_tokens.is_empty() { 1 } else { self.sequence };
        if cache.platform == Platform::Tpu && tokens.is_multiple_of(ways) && tokens / ways >= RESIDUAL_TOKENS {
            split_residual.push("model");
        }
        Rules::new(&[
            ("batch", &split_batch),
            ("sequence", split_tokens),
            ("tokens", &split_residual),
            ("heads", &["model"]),
            ("kv_heads", &["model"]),
            ("mlp", &["model"]),
            ("vocab", &["model"]),
            ("experts", &["expert"]),
            ("embed", &["fsdp"]),
            ("hidden", &[]),
            ("head_dim", &[]),
            ("rank", &[]),
            ("positions", &[]),
            ("pages", &[]),
        ])
    }

    /// The number of key/value heads that the model has on this mesh: its own where `model` divides them, else one for each
    /// of the `model` devices, so that every head stands on `model` / G of them.
    pub fn kv_heads(&self, cfg: &ModelConfig) -> usize {
        if cfg.n_kv_heads.is_multiple_of(self.model) { cfg.n_kv_heads } else { self.model }
    }

    /// The vocabulary with what `model` lacks to divide it in parts that are multiples of `whole`.
    pub fn vocab(&self, cfg: &ModelConfig, whole: usize) -> usize {
        if self.model == 1 { cfg.vocab_size } else { cfg.vocab_size.next_multiple_of(self.model * whole) }
    }

    /// `batch` with the slots that `data` lacks to divide it.
    pub fn batch(&self, batch: usize) -> usize {
        batch.next_multiple_of(self.data)
    }

    /// Refuses a cache that the mesh cannot split.
    ///
    /// # Errors
    /// [`Error::Option`] for pages, which all slots share, where slots are split.
    pub fn check_cache(&self, cache: &CacheShape) -> Result<(), Error> {
        match cache.pages {
            Some(_) if self.data > 1 => Err(Error::Option {
                name: "mesh".into(),
                what: format!(
                    "data={}: slots share the pages of --cache-page, so they cannot be split; leave one of the two away",
                    self.data
                ),
            }),
            _ => Ok(()),
        }
    }

    /// Refuses a mesh that does not divide the model, with both numbers and what would work.
    ///
    /// # Errors
    /// [`Error::Option`] for the first axis that does not divide.
    pub fn check(&self, cfg: &ModelConfig) -> Result<(), Error> {
        for (axis, n) in self.axes() {
            let Some((what, length)) = refusal(axis, n, cfg) else { continue };
            let fits: Vec<String> = (1..=length.max(1))
                .filter(|&n| refusal(axis, n, cfg).is_none())
                .take_while(|&n| n <= 1024)
                .map(|n| n.to_string())
                .collect();
            return Err(Error::Option {
                name: "mesh".into(),
                what: format!("{axis}={n}: {what}; {axis} can be {} for this model", join_or(&fits)),
            });
        }
        Ok(())
    }
}

/// What `n` devices along `axis` do not divide, in words, and the largest number that could.
fn refusal(axis: &str, n: usize, cfg: &ModelConfig) -> Option<(String, usize)> {
    let undivided = |what: &str, length: usize| {
        (!length.is_multiple_of(n)).then(|| (format!("{length} {what} cannot be split over {n} devices"), length))
    };
    match axis {
        "model" => {
            let (h, g) = (cfg.n_heads, cfg.n_kv_heads);
            let shared = (!g.is_multiple_of(n) && !n.is_multiple_of(g)).then(|| {
                (format!("{g} key/value heads can neither be split over nor repeated on {n} devices evenly"), h)
            });
            let dense = cfg.layers.iter().any(|layer| !layer.sparse);
            let moe = cfg.moe.as_ref().filter(|_| cfg.layers.iter().any(|layer| layer.sparse));
            undivided("query heads", h)
                .or(shared)
                .or_else(|| dense.then(|| undivided("columns of the feed-forward (intermediate)", cfg.d_ff))?)
                .or_else(|| undivided("columns of an expert (intermediate)", moe?.d_ff))
                .or_else(|| undivided("columns of the shared expert (intermediate)", moe?.shared?.d_ff))
                .map(|(what, _)| (what, h))
        }
        "fsdp" => undivided("columns of the residual stream (hidden)", cfg.d_model),
        "expert" => match &cfg.moe {
            Some(moe) => undivided("experts", moe.n_experts),
            None => (n > 1).then(|| (format!("the model has no experts to be split over {n} devices"), 1)),
        },
        // batch slots are padded, the tokens of a prefill rounded up
        _ => None,
    }
}

/// `1, 2 or 4`.
fn join_or(items: &[String]) -> String {
    match items {
        [] => "nothing".into(),
        [one] => one.clone(),
        [some @ .., last] => format!("{} or {last}", some.join(", ")),
    }
}

impl FromStr for MeshShape {
    type Err = String;

    /// Reads `model=4,data=2`.
    fn from_str(text: &str) -> Result<MeshShape, String> {
        let mut mesh = MeshShape::default();
        let mut seen = Vec::new();
        for part in text.split(',') {
            let (axis, n) = part.split_once('=').ok_or_else(|| format!("expected AXIS=N, found {part:?}"))?;
            let (axis, n) = (axis.trim(), n.trim());
            let size = match n.parse::<usize>() {
                Ok(n) if (1..=1 << 20).contains(&n) => n,
                _ => return Err(format!("{axis}: expected a number of devices, at least 1, found {n:?}")),
            };
            let place = match axis {
                "data" => &mut mesh.data,
                "fsdp" => &mut mesh.fsdp,
                "expert" => &mut mesh.expert,
                "sequence" => &mut mesh.sequence,
                "model" => &mut mesh.model,
                _ => return Err(format!("no axis {axis:?}: the axes are data, fsdp, expert, sequence and model")),
            };
            if seen.contains(&axis) {
                return Err(format!("axis {axis} is given twice"));
            }
            (seen, *place) = ([seen, vec![axis]].concat(), size);
        }
        Ok(mesh)
    }
}

impl fmt::Display for MeshShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used: Vec<String> =
            self.axes().iter().filter(|(_, n)| *n > 1).map(|(axis, n)| format!("{axis}={n}")).collect();
        f.write_str(if used.is_empty() { "1 device" } else { "" })?;
        f.write_str(&used.join(","))
    }
}
