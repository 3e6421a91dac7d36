//! The pivot of the project: one tree of parameters, generic over what hangs at its leaves.
//!
//! A leaf is a declaration ([`Param`]), a host array, a graph tensor or a device buffer; the tree is the same, so there
//! is no second list of parameter names anywhere. [`Llama::declare`] has one line per parameter, with its Hugging Face
//! name and an einsum-like pattern from Hugging Face's shape to ours. Letters: V vocabulary, M d_model, H query heads,
//! G key/value heads, K head_dim, F d_ff, E experts, J rank of an adapter; a group in brackets is one axis of the stored tensor, and `E:`
//! before a pattern says that there is such a tensor for each expert.
//!
//! Query head h reads key/value head h / (H / G): H splits as (G, R), in that order.

use std::collections::HashMap;

use crate::config::{AttentionConfig, LayerConfig, LoraProjection, ModelConfig, MoeConfig, QkNorm};
use crate::{DType, Packing};

/// All parameters of a Llama.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Llama<T> {
    /// Token embedding, (V, M).
    pub embedding: T,
    /// The decoder blocks, first to last.
    pub layers: Vec<DecoderBlock<T>>,
    /// RMSNorm before the head, (M).
    pub final_norm: T,
    /// Output head, (M, V); `None` where it is tied to the embedding.
    pub lm_head: Option<T>,
}

/// One decoder block. Which norms there are, and so where they stand, is the family member's choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecoderBlock<T> {
    /// RMSNorm before attention, (M).
    pub input_norm: Option<T>,
    /// Self-attention.
    pub attention: Attention<T>,
    /// RMSNorm of what attention gives, before it is added, (M).
    pub attn_out_norm: Option<T>,
    /// RMSNorm before the feed-forward, (M).
    pub post_attn_norm: Option<T>,
    /// The feed-forward.
    pub feed_forward: FeedForward<T>,
    /// RMSNorm of what the feed-forward gives, before it is added, (M).
    pub mlp_out_norm: Option<T>,
}

/// The feed-forward of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FeedForward<T> {
    /// One for all tokens.
    Dense(Mlp<T>),
    /// A mixture of experts.
    Experts(Moe<T>),
}

/// Self-attention with grouped key/value heads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attention<T> {
    /// (M, H, K).
    pub q_proj: T,
    /// (M, G, K).
    pub k_proj: T,
    /// (M, G, K).
    pub v_proj: T,
    /// (H, K, M).
    pub out_proj: T,
    /// (H, K).
    pub q_bias: Option<T>,
    /// (G, K).
    pub k_bias: Option<T>,
    /// (G, K).
    pub v_bias: Option<T>,
    /// (M).
    pub out_bias: Option<T>,
    /// RMSNorm of queries, (K) or over all heads (H, K).
    pub q_norm: Option<T>,
    /// RMSNorm of keys, (K) or over all heads (G, K).
    pub k_norm: Option<T>,
    /// Adapter of `q_proj`: (M, J), (J, H, K).
    pub q_lora: Option<Lora<T>>,
    /// Adapter of `k_proj`: (M, J), (J, G, K).
    pub k_lora: Option<Lora<T>>,
    /// Adapter of `v_proj`: (M, J), (J, G, K).
    pub v_lora: Option<Lora<T>>,
    /// Adapter of `out_proj`: (H, K, J), (J, M).
    pub out_lora: Option<Lora<T>>,
}

/// A low-rank adapter of a projection W: W + (alpha / rank) · a·b in its place (Hu et al. 2021, section 4.1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lora<T> {
    /// From the projection's input to rank J.
    pub a: T,
    /// From rank J to the projection's output.
    pub b: T,
    /// The state of the generator, u64 (2), that drops parts of the input; only where a graph trains.
    pub dropout: Option<T>,
}

/// The gated feed-forward.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mlp<T> {
    /// (M, F).
    pub gate_proj: T,
    /// (M, F).
    pub up_proj: T,
    /// (F, M).
    pub down_proj: T,
    /// (F).
    pub gate_bias: Option<T>,
    /// (F).
    pub up_bias: Option<T>,
    /// (M).
    pub down_bias: Option<T>,
    /// Adapter of `gate_proj`: (M, J), (J, F).
    pub gate_lora: Option<Lora<T>>,
    /// Adapter of `up_proj`: (M, J), (J, F).
    pub up_lora: Option<Lora<T>>,
    /// Adapter of `down_proj`: (F, J), (J, M).
    pub down_lora: Option<Lora<T>>,
}

/// A mixture of experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moe<T> {
    /// (M, E).
    pub router: T,
    /// Added to the scores for the choice only, (E).
    pub correction_bias: Option<T>,
    /// (E, M, F).
    pub gate_proj: T,
    /// (E, M, F).
    pub up_proj: T,
    /// (E, F, M).
    pub down_proj: T,
    /// The expert that every token takes.
    pub shared: Option<Mlp<T>>,
    /// Scales what the shared expert gives, (M).
    pub shared_gate: Option<T>,
}

/// Walks one field of a tree: `one` leaf, `maybe` a leaf, one `node`, `maybe_node`, or `each` node of a list.
macro_rules! walk {
    (map one $e:expr, $f:ident) => {
        $f($e)?
    };
    (map maybe $e:expr, $f:ident) => {
        $e.map(&mut *$f).transpose()?
    };
    (map node $e:expr, $f:ident) => {
        $e.try_map($f)?
    };
    (map maybe_node $e:expr, $f:ident) => {
        $e.map(|node| node.try_map($f)).transpose()?
    };
    (map each $e:expr, $f:ident) => {
        $e.into_iter().map(|node| node.try_map($f)).collect::<Result<_, E>>()?
    };
    (borrow one $e:expr) => {
        &$e
    };
    (borrow each $e:expr) => {
        $e.iter().map(|node| node.as_ref()).collect()
    };
    (borrow maybe_node $e:expr) => {
        $e.as_ref().map(|node| node.as_ref())
    };
    (borrow $node_or_maybe:ident $e:expr) => {
        $e.as_ref()
    };
}

/// The functions that every tree has. The fields are named once more here, and the compiler refuses a list that is not
/// complete.
macro_rules! tree {
    ($name:ident { $($field:ident: $kind:ident),* $(,)? }) => {
        impl<T> $name<T> {
            /// The same tree with `f` applied to every leaf, in declaration order.
            ///
            /// # Errors
            /// The first error of `f`; later leaves are not visited.
            pub fn try_map<U, E>(self, f: &mut impl FnMut(T) -> Result<U, E>) -> Result<$name<U>, E> {
                Ok($name { $($field: walk!(map $kind self.$field, f)),* })
            }

            /// The same tree with `f` applied to every leaf, in declaration order.
            pub fn map<U>(self, f: &mut impl FnMut(T) -> U) -> $name<U> {
                let Ok(tree) = self.try_map(&mut |leaf| Ok::<U, std::convert::Infallible>(f(leaf)));
                tree
            }

            /// A tree of references to the leaves.
            pub fn as_ref(&self) -> $name<&T> {
                $name { $($field: walk!(borrow $kind self.$field)),* }
            }

            /// The leaves in declaration order.
            pub fn iter(&self) -> Vec<&T> {
                self.as_ref().into_leaves()
            }

            /// The leaves in declaration order.
            pub fn into_leaves(self) -> Vec<T> {
                let mut leaves = Vec::new();
                self.map(&mut |leaf| leaves.push(leaf));
                leaves
            }

            /// Rebuilds a tree of the structure of `self` (its layers, its optional parameters) from leaves in
            /// declaration order, the inverse of `into_leaves`. `None` unless there is exactly one leaf for each place.
            pub fn from_leaves<U>(&self, leaves: impl IntoIterator<Item = U>) -> Option<$name<U>> {
                let mut leaves = leaves.into_iter();
                let tree = self.as_ref().try_map(&mut |_| leaves.next().ok_or(())).ok()?;
                leaves.next().is_none().then_some(tree)
            }
        }
    };
}

tree!(Llama { embedding: one, layers: each, final_norm: one, lm_head: maybe });
tree!(DecoderBlock {
    input_norm: maybe,
    attention: node,
    attn_out_norm: maybe,
    post_attn_norm: maybe,
    feed_forward: node,
    mlp_out_norm: maybe,
});
tree!(Attention {
    q_proj: one,
    k_proj: one,
    v_proj: one,
    out_proj: one,
    q_bias: maybe,
    k_bias: maybe,
    v_bias: maybe,
    out_bias: maybe,
    q_norm: maybe,
    k_norm: maybe,
    q_lora: maybe_node,
    k_lora: maybe_node,
    v_lora: maybe_node,
    out_lora: maybe_node,
});
tree!(Lora { a: one, b: one, dropout: maybe });
tree!(Mlp {
    gate_proj: one,
    up_proj: one,
    down_proj: one,
    gate_bias: maybe,
    up_bias: maybe,
    down_bias: maybe,
    gate_lora: maybe_node,
    up_lora: maybe_node,
    down_lora: maybe_node,
});
tree!(Moe {
    router: one,
    correction_bias: maybe,
    gate_proj: one,
    up_proj: one,
    down_proj: one,
    shared: maybe_node,
    shared_gate: maybe,
});

impl<T> FeedForward<T> {
    /// As of the other trees: `f` applied to every leaf, in declaration order.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<U, E>(self, f: &mut impl FnMut(T) -> Result<U, E>) -> Result<FeedForward<U>, E> {
        Ok(match self {
            FeedForward::Dense(mlp) => FeedForward::Dense(mlp.try_map(f)?),
            FeedForward::Experts(moe) => FeedForward::Experts(moe.try_map(f)?),
        })
    }

    /// A tree of references to the leaves.
    pub fn as_ref(&self) -> FeedForward<&T> {
        match self {
            FeedForward::Dense(mlp) => FeedForward::Dense(mlp.as_ref()),
            FeedForward::Experts(moe) => FeedForward::Experts(moe.as_ref()),
        }
    }
}

impl<T: Default> Default for FeedForward<T> {
    fn default() -> Self {
        FeedForward::Dense(Mlp::default())
    }
}

/// How a tensor of Hugging Face's form becomes ours. Both keep the elements in place or transpose two axes: splitting
/// an axis into (heads, head_dim) moves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The same bytes, at most with an axis split.
    Same,
    /// Seen as a matrix, (rows, columns) becomes (columns, rows).
    Transposed,
}

/// The declaration of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Its name here, the path of fields in [`Llama`]: `layers.3.attention.q_proj`.
    pub name: String,
    /// Where it lies in a Hugging Face checkpoint: one piece, or for `E:` patterns one for each expert, in order.
    pub pieces: Vec<Piece>,
    /// Einsum-like pattern from the shape of a piece to ours: `(HK)M->MHK`, `E:FM->MF`.
    pub pattern: &'static str,
    /// Axis letters here: `MHK`, `EMF`.
    pub axes: String,
    /// Shape here, one size per letter of `axes`.
    pub shape: Vec<usize>,
    /// How Hugging Face's form becomes ours.
    pub layout: Layout,
    /// Logical sharding axis of each axis: `embed`, `heads`, `kv_heads`, `head_dim`, `mlp`, `vocab`, `experts`.
    pub logical: Vec<&'static str>,
    /// Whether it stays float32 whatever the type of the others.
    pub precise: bool,
    /// Element type: the checkpoint's own where the declaration comes from an opened checkpoint, else that of the
    /// configuration (float32 if it names none). Where the parameter is packed, the type that it has as floats.
    pub dtype: DType,
    /// How the checkpoint stores it as integers; `None` where it has floats.
    pub packing: Option<Packing>,
}

/// The product that a parameter is contracted in: K terms into N outputs, once for each expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contraction {
    /// How many experts have a matrix of their own.
    pub experts: Option<usize>,
    /// Terms: d_model of `q_proj` (M, H, K) and of the embedding (V, M), heads × head_dim of `out_proj` (H, K, M).
    pub k: usize,
    /// Outputs: heads × head_dim of `q_proj`, the vocabulary of the embedding.
    pub n: usize,
}

/// Rows of a tensor in a Hugging Face checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name: `model.layers.3.self_attn.q_proj.weight`.
    pub name: String,
    /// The tensor's shape, all of it.
    pub shape: Vec<usize>,
    /// The first row that belongs to the piece.
    pub first_row: usize,
    /// How many do.
    pub rows: usize,
}

impl Piece {
    /// Elements in a row.
    pub fn columns(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.rows * self.columns()
    }
}

/// A tensor of a Hugging Face checkpoint with the pieces that lie in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Index of the parameter (in declaration order) and of the piece, from the first row to the last.
    pub parts: Vec<(usize, usize)>,
}

impl Llama<Param> {
    /// The parameters that a model of this configuration has. Each line: name here, name there, and the pattern from
    /// there to here.
    pub fn declare(cfg: &ModelConfig) -> Llama<Param> {
        let model = Scope { cfg, here: String::new(), there: "model.".into(), d_ff: cfg.d_ff };
        Llama {
            embedding: model.param("embedding", "embed_tokens.weight", "VM->VM"),
            layers: cfg.layers.iter().enumerate().map(|(i, layer)| DecoderBlock::declare(cfg, i, layer)).collect(),
            final_norm: model.param("final_norm", "norm.weight", "M->M"),
            lm_head: (!cfg.tie_word_embeddings)
                .then(|| Scope { there: String::new(), ..model }.param("lm_head", "lm_head.weight", "VM->MV")),
        }
    }

    /// The same parameters with the adapters that `cfg.lora` asks for: of attention, of dense feed-forwards, and of experts that
    /// every token takes, but not of those that a router chooses. Their names there are those of the package peft.
    pub fn with_adapters(mut self, cfg: &ModelConfig) -> Llama<Param> {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let there = format!("base_model.model.model.layers.{i}.");
            let block = Scope { cfg, here: format!("layers.{i}."), there, d_ff: cfg.d_ff };
            layer.attention.add_adapters(&block.at("attention.", "self_attn.", cfg.d_ff));
            match (&mut layer.feed_forward, &cfg.moe) {
                (FeedForward::Dense(mlp), _) => mlp.add_adapters(&block.at("mlp.", "mlp.", cfg.d_ff)),
                (FeedForward::Experts(Moe { shared: Some(mlp), .. }), Some(MoeConfig { shared: Some(shared), .. })) => {
                    let there = format!("{}.{}.", cfg.names.moe, cfg.names.shared_expert);
                    mlp.add_adapters(&block.at("moe.shared.", &there, shared.d_ff));
                }
                _ => {}
            }
        }
        self
    }

    /// The tensors of a Hugging Face checkpoint of this model, in declaration order.
    pub fn hf_tensors(&self) -> Vec<HfTensor> {
        let mut tensors: Vec<HfTensor> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        for (i, param) in self.iter().into_iter().enumerate() {
            for (j, piece) in param.pieces.iter().enumerate() {
                let place = *places.entry(&piece.name).or_insert_with(|| {
                    tensors.push(HfTensor { name: piece.name.clone(), shape: piece.shape.clone(), parts: Vec::new() });
                    tensors.len() - 1
                });
                tensors[place].parts.push((i, j));
            }
        }
        tensors
    }
}

impl DecoderBlock<Param> {
    /// The parameters of block `i`.
    pub fn declare(cfg: &ModelConfig, i: usize, layer: &LayerConfig) -> DecoderBlock<Param> {
        let names = cfg.names;
        let b = Scope { cfg, here: format!("layers.{i}."), there: format!("model.layers.{i}."), d_ff: cfg.d_ff };
        let norm = |here, there: Option<&str>| there.map(|there| b.param(here, &format!("{there}.weight"), "M->M"));
        DecoderBlock {
            input_norm: norm("input_norm", names.input_norm),
            attention: Attention::declare(&b.at("attention.", "self_attn.", cfg.d_ff)),
            attn_out_norm: norm("attn_out_norm", names.attn_out_norm),
            post_attn_norm: norm("post_attn_norm", names.post_attn_norm),
            feed_forward: match &cfg.moe {
                Some(moe) if layer.sparse => {
                    FeedForward::Experts(Moe::declare(moe, &b.at("moe.", &format!("{}.", names.moe), moe.d_ff)))
                }
                _ => FeedForward::Dense(Mlp::declare(&b.at("mlp.", "mlp.", cfg.d_ff))),
            },
            mlp_out_norm: norm("mlp_out_norm", names.mlp_out_norm),
        }
    }
}

impl Attention<Param> {
    fn declare(s: &Scope<'_>) -> Attention<Param> {
        let AttentionConfig { qkv_bias, out_bias, qk_norm, .. } = s.cfg.attention;
        let bias = |wanted: bool, here, there, pattern| wanted.then(|| s.param(here, there, pattern));
        let norm = |here, there, whole| {
            qk_norm.map(|norm| s.param(here, there, if norm == QkNorm::Whole { whole } else { "K->K" }))
        };
        let [q, k, v] = match s.cfg.names.fused {
            true => s.fused(
                "qkv_proj.weight",
                [("q_proj", "(HK)M->MHK"), ("k_proj", "(GK)M->MGK"), ("v_proj", "(GK)M->MGK")],
            ),
            false => [
                s.param("q_proj", "q_proj.weight", "(HK)M->MHK"),
                s.param("k_proj", "k_proj.weight", "(GK)M->MGK"),
                s.param("v_proj", "v_proj.weight", "(GK)M->MGK"),
            ],
        };
        Attention {
            q_proj: q,
            k_proj: k,
            v_proj: v,
            out_proj: s.param("out_proj", "o_proj.weight", "M(HK)->HKM"),
            q_bias: bias(qkv_bias, "q_bias", "q_proj.bias", "(HK)->HK"),
            k_bias: bias(qkv_bias, "k_bias", "k_proj.bias", "(GK)->GK"),
            v_bias: bias(qkv_bias, "v_bias", "v_proj.bias", "(GK)->GK"),
            out_bias: bias(out_bias, "out_bias", "o_proj.bias", "M->M"),
            q_norm: norm("q_norm", "q_norm.weight", "(HK)->HK"),
            k_norm: norm("k_norm", "k_norm.weight", "(GK)->GK"),
            q_lora: None,
            k_lora: None,
            v_lora: None,
            out_lora: None,
        }
    }

    fn add_adapters(&mut self, s: &Scope<'_>) {
        self.q_lora = s.adapter(LoraProjection::Q, ["JM->MJ", "(HK)J->JHK"]);
        self.k_lora = s.adapter(LoraProjection::K, ["JM->MJ", "(GK)J->JGK"]);
        self.v_lora = s.adapter(LoraProjection::V, ["JM->MJ", "(GK)J->JGK"]);
        self.out_lora = s.adapter(LoraProjection::Out, ["J(HK)->HKJ", "MJ->JM"]);
    }
}

impl Mlp<Param> {
    fn declare(s: &Scope<'_>) -> Mlp<Param> {
        let bias = |here, there, pattern| s.cfg.mlp_bias.then(|| s.param(here, there, pattern));
        let [gate, up] = match s.cfg.names.fused {
            true => s.fused("gate_up_proj.weight", [("gate_proj", "FM->MF"), ("up_proj", "FM->MF")]),
            false => {
                [s.param("gate_proj", "gate_proj.weight", "FM->MF"), s.param("up_proj", "up_proj.weight", "FM->MF")]
            }
        };
        Mlp {
            gate_proj: gate,
            up_proj: up,
            down_proj: s.param("down_proj", "down_proj.weight", "MF->FM"),
            gate_bias: bias("gate_bias", "gate_proj.bias", "F->F"),
            up_bias: bias("up_bias", "up_proj.bias", "F->F"),
            down_bias: bias("down_bias", "down_proj.bias", "M->M"),
            gate_lora: None,
            up_lora: None,
            down_lora: None,
        }
    }

    fn add_adapters(&mut self, s: &Scope<'_>) {
        self.gate_lora = s.adapter(LoraProjection::Gate, ["JM->MJ", "FJ->JF"]);
        self.up_lora = s.adapter(LoraProjection::Up, ["JM->MJ", "FJ->JF"]);
        self.down_lora = s.adapter(LoraProjection::Down, ["JF->FJ", "MJ->JM"]);
    }
}

impl Moe<Param> {
    fn declare(moe: &MoeConfig, s: &Scope<'_>) -> Moe<Param> {
        let [gate, up, down] = s.cfg.names.expert.map(|name| format!("experts.{{}}.{name}.weight"));
        let shared_name = s.cfg.names.shared_expert;
        Moe {
            router: s.param("router", "gate.weight", "EM->ME"),
            correction_bias: moe
                .correction_bias
                .then(|| s.param("correction_bias", "gate.e_score_correction_bias", "E->E")),
            gate_proj: s.param("gate_proj", &gate, "E:FM->MF"),
            up_proj: s.param("up_proj", &up, "E:FM->MF"),
            down_proj: s.param("down_proj", &down, "E:MF->FM"),
            shared: moe.shared.map(|shared| Mlp::declare(&s.at("shared.", &format!("{shared_name}."), shared.d_ff))),
            shared_gate: moe
                .shared
                .filter(|shared| shared.gated)
                .map(|_| s.param("shared_gate", &format!("{shared_name}_gate.weight"), "1M->M")),
        }
    }
}

/// Where declarations stand: the prefix of names here and there, and what F is.
struct Scope<'a> {
    cfg: &'a ModelConfig,
    here: String,
    there: String,
    d_ff: usize,
}

impl Scope<'_> {
    /// A scope inside of this one.
    fn at(&self, here: &str, there: &str, d_ff: usize) -> Scope<'_> {
        Scope { cfg: self.cfg, here: format!("{}{here}", self.here), there: format!("{}{there}", self.there), d_ff }
    }

    fn size(&self, letter: char) -> usize {
        match letter {
            'F' => self.d_ff,
            '1' => 1,
            letter => self.cfg.axis(letter).size,
        }
    }

    /// One parameter. In the name of an `E:` pattern, `{}` stands for the expert's number.
    fn param(&self, here: &str, there: &str, pattern: &'static str) -> Param {
        let (per_expert, plain) = match pattern.strip_prefix("E:") {
            Some(plain) => (true, plain),
            None => (false, pattern),
        };
        let (stored, axes) = plain.split_once("->").expect("a pattern has an arrow");
        let stored: Vec<&str> = stored_axes(stored);
        let layout = if stored.concat().trim_start_matches('1') == axes {
            Layout::Same
        } else {
            assert_eq!([stored[1], stored[0]].concat(), axes, "{pattern} is neither an identity nor a transpose");
            Layout::Transposed
        };
        let shape: Vec<usize> = stored.iter().map(|group| group.chars().map(|a| self.size(a)).product()).collect();
        let piece = |name: String| Piece { name, rows: shape[0], shape: shape.clone(), first_row: 0 };
        let there = format!("{}{there}", self.there);
        let (axes, pieces) = match per_expert {
            true => {
                let of_expert = |e: usize| piece(there.replace("{}", &e.to_string()));
                (format!("E{axes}"), (0..self.size('E')).map(of_expert).collect())
            }
            false => (axes.to_string(), vec![piece(there)]),
        };
        Param {
            name: format!("{}{here}", self.here),
            pieces,
            pattern,
            shape: axes.chars().map(|a| self.size(a)).collect(),
            logical: axes.chars().map(|a| self.cfg.axis(a).logical).collect(),
            axes,
            layout,
            // transformers: `_keep_in_fp32_modules_strict`
            precise: here == "correction_bias",
            dtype: self.cfg.dtype.unwrap_or(DType::F32),
            packing: None,
        }
    }

    /// The adapter of a projection, if the configuration has one: the patterns of a and b.
    fn adapter(&self, projection: LoraProjection, [a, b]: [&'static str; 2]) -> Option<Lora<Param>> {
        let here = projection.here();
        self.cfg.lora.as_ref().filter(|lora| lora.projections.contains(&projection)).map(|_| {
            let param = |leaf: &str, there: &str, pattern| Param {
                dtype: DType::F32,
                ..self.param(&format!("{here}_lora.{leaf}"), &format!("{}.{there}.weight", projection.name()), pattern)
            };
            Lora { a: param("a", "lora_A", a), b: param("b", "lora_B", b), dropout: None }
        })
    }

    /// Parameters whose rows follow each other in one tensor.
    fn fused<const N: usize>(&self, there: &str, parts: [(&str, &'static str); N]) -> [Param; N] {
        let mut params = parts.map(|(here, pattern)| self.param(here, there, pattern));
        let total = params.iter().map(|p| p.pieces[0].rows).sum();
        let mut first = 0;
        for piece in params.iter_mut().map(|p| &mut p.pieces[0]) {
            piece.first_row = first;
            piece.shape[0] = total;
            first += piece.rows;
        }
        params
    }
}

/// The axes of a stored tensor as groups of letters: `(HK)M` is `["HK", "M"]`.
fn stored_axes(mut text: &'static str) -> Vec<&'static str> {
    let mut groups = Vec::new();
    while !text.is_empty() {
        let (group, rest) = match text.strip_prefix('(') {
            Some(inner) => inner.split_once(')').expect("a bracket closes"),
            None => text.split_at(1),
        };
        groups.push(group);
        text = rest;
    }
    groups
}

impl Param {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The product that it is contracted in, where it may be packed for that: every matrix but a router, whose scores
    /// choose, a gate with one output, and an adapter. Hugging Face's form has the outputs as rows and the terms as columns.
    pub fn contraction(&self) -> Option<Contraction> {
        let per_expert = self.pattern.starts_with("E:");
        let stored = self.stored();
        let left = self.precise || self.is_adapter();
        let matrix = stored_axes(stored).len() == 2 && !stored.starts_with(['1', 'E']) && !left;
        let piece = self.pieces.first().filter(|_| matrix)?;
        Some(Contraction { experts: per_expert.then_some(self.pieces.len()), k: piece.columns(), n: piece.rows })
    }

    /// Whether it belongs to a [`Lora`].
    pub fn is_adapter(&self) -> bool {
        self.axes.contains('J')
    }

    /// The last axis that is contracted, along which the terms of a group of a packed parameter follow each other.
    pub fn group_axis(&self) -> Option<usize> {
        self.contraction()?;
        self.axes.find(self.contracted_axes().chars().next_back()?)
    }

    /// The letters of the axes that are contracted.
    pub fn contracted_axes(&self) -> &'static str {
        stored_axes(self.stored()).last().copied().unwrap_or_default()
    }

    /// The axes of a piece as Hugging Face has it.
    fn stored(&self) -> &'static str {
        self.pattern.trim_start_matches("E:").split_once("->").map_or(self.pattern, |(stored, _)| stored)
    }

    /// Bytes that it takes as it is stored.
    pub fn stored_bytes(&self) -> u64 {
        let bytes = match (self.packing, self.contraction()) {
            (Some(packing), Some(of)) => {
                let scales = packing.scales_shape(of).iter().product::<usize>() * packing.scales.dtype().size();
                let times = if packing.format.mins { 2 } else { 1 };
                packing.q_shape(of).iter().product::<usize>() + times * scales
            }
            _ => self.elements() * self.dtype.size(),
        };
        bytes as u64
    }

    /// Where Hugging Face's shape comes from, for messages: `9 heads × 64, hidden 576`.
    pub fn arithmetic(&self, cfg: &ModelConfig) -> String {
        let size = |a: char| match self.axes.find(a) {
            Some(at) => self.shape[at],
            None => 1,
        };
        let axis = |group: &str| match group.chars().collect::<Vec<_>>()[..] {
            ['1'] => "1".to_string(),
            [a] => format!("{} {}", cfg.axis(a).noun, size(a)),
            [a, b] => format!("{} {} × {}", size(a), cfg.axis(a).noun, size(b)),
            _ => group.to_string(),
        };
        let axes = stored_axes(self.stored()).into_iter().map(axis).collect::<Vec<_>>().join(", ");
        match self.pieces[0].shape[0] == self.pieces[0].rows {
            true => axes,
            false => format!("rows {} on: {axes}", self.pieces[0].first_row),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::small;

    #[test]
    fn declaration_follows_the_configuration() {
        let p = Llama::declare(&small());
        let q = &p.layers[1].attention.q_proj;
        assert_eq!(
            (q.name.as_str(), q.pieces[0].name.as_str()),
            ("layers.1.attention.q_proj", "model.layers.1.self_attn.q_proj.weight")
        );
        assert_eq!((q.axes.as_str(), &q.shape[..], &q.pieces[0].shape[..]), ("MHK", &[20, 6, 8][..], &[48, 20][..]));
        assert_eq!((q.layout, &q.logical[..]), (Layout::Transposed, &["embed", "heads", "head_dim"][..]));
        assert_eq!(q.arithmetic(&small()), "6 heads × 8, hidden 20");
        let o = &p.layers[0].attention.out_proj;
        assert_eq!((o.axes.as_str(), &o.shape[..], &o.pieces[0].shape[..]), ("HKM", &[6, 8, 20][..], &[20, 48][..]));
        let bias = p.layers[0].attention.k_bias.as_ref().expect("attention_bias is on");
        assert_eq!((&bias.shape[..], &bias.pieces[0].shape[..], bias.layout), (&[2, 8][..], &[16][..], Layout::Same));
        assert_eq!(p.lm_head.as_ref().map(|h| h.shape.clone()), Some(vec![20, 33]));
        let tied = Llama::declare(&ModelConfig { tie_word_embeddings: true, ..small() });
        assert!(tied.lm_head.is_none());
    }

    #[test]
    fn what_is_contracted_has_terms_and_outputs() {
        let p = Llama::declare(&small());
        let of = |param: &Param| param.contraction().map(|c| (c.k, c.n));
        let attention = &p.layers[0].attention;
        assert_eq!((of(&attention.q_proj), of(&attention.k_proj)), (Some((20, 48)), Some((20, 16))));
        assert_eq!((of(&attention.out_proj), of(&p.embedding)), (Some((48, 20)), Some((20, 33))));
        assert_eq!(p.lm_head.as_ref().map(of), Some(Some((20, 33))));
        assert_eq!((of(&p.final_norm), attention.q_bias.as_ref().and_then(of)), (None, None));
        let axes = [&attention.q_proj, &attention.out_proj, &p.embedding, &p.final_norm].map(Param::group_axis);
        assert_eq!(axes, [Some(0), Some(1), Some(1), None]);
    }

    #[test]
    fn a_name_is_the_path_of_fields_and_unique() {
        let p = Llama::declare(&small());
        let FeedForward::Dense(mlp) = &p.layers[1].feed_forward else { panic!("Llama has no experts") };
        assert_eq!(mlp.down_bias.as_ref().map(|b| b.name.as_str()), Some("layers.1.mlp.down_bias"));
        let mut names: Vec<&str> = p.iter().into_iter().map(|x| x.name.as_str()).collect();
        assert_eq!(names.len(), 3 + 2 * 16);
        assert_eq!((names[0], names[1], names[34]), ("embedding", "layers.0.input_norm", "lm_head"));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 35);
    }

    #[test]
    fn leaves_and_back() {
        let p = Llama::declare(&small());
        let numbers = p.from_leaves(0..35).expect("as many as there are");
        assert_eq!(numbers.layers[1].input_norm, Some(17));
        assert_eq!(numbers.iter().into_iter().copied().collect::<Vec<_>>(), (0..35).collect::<Vec<_>>());
        assert!(p.from_leaves(0..34).is_none() && p.from_leaves(0..36).is_none());
        assert_eq!(numbers.clone().try_map(&mut |x| if x < 20 { Ok(x) } else { Err(x) }), Err(20));
        assert_eq!(p.layers[0].from_leaves(numbers.layers[0].clone().into_leaves()), Some(numbers.layers[0].clone()));
    }
}
