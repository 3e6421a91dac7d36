//! The pivot of the project: one tree of parameters, generic over what hangs at its leaves.
//!
//! A leaf is a declaration ([`Param`]), a host array, a graph tensor or a device buffer; the tree is the same, so there
//! is no second list of parameter names anywhere. [`Llama::declare`] has one line per parameter, with its Hugging Face
//! name and an einsum-like pattern from Hugging Face's shape to ours. Letters: V vocabulary, M d_model, H query heads,
//! G key/value heads, K head_dim, F d_ff; a group in brackets is one axis of the stored tensor.
//!
//! Query head h reads key/value head h / (H / G): H splits as (G, R), in that order.

use crate::DType;
use crate::config::ModelConfig;

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

/// One decoder block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DecoderBlock<T> {
    /// RMSNorm before attention, (M).
    pub input_norm: T,
    /// Self-attention.
    pub attention: Attention<T>,
    /// RMSNorm before the feed-forward, (M).
    pub post_attn_norm: T,
    /// The feed-forward.
    pub mlp: Mlp<T>,
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
}

/// Walks one field of a tree: `one` leaf, `maybe` a leaf, one `node`, or `each` node of a list.
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
    (map each $e:expr, $f:ident) => {
        $e.into_iter().map(|node| node.try_map($f)).collect::<Result<_, E>>()?
    };
    (borrow one $e:expr) => {
        &$e
    };
    (borrow each $e:expr) => {
        $e.iter().map(|node| node.as_ref()).collect()
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
tree!(DecoderBlock { input_norm: one, attention: node, post_attn_norm: one, mlp: node });
tree!(Attention {
    q_proj: one,
    k_proj: one,
    v_proj: one,
    out_proj: one,
    q_bias: maybe,
    k_bias: maybe,
    v_bias: maybe,
    out_bias: maybe,
});
tree!(Mlp { gate_proj: one, up_proj: one, down_proj: one, gate_bias: maybe, up_bias: maybe, down_bias: maybe });

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
    /// Its name in a Hugging Face checkpoint: `model.layers.3.self_attn.q_proj.weight`.
    pub hf_name: String,
    /// Einsum-like pattern from Hugging Face's shape to ours: `(HK)M->MHK`.
    pub pattern: &'static str,
    /// Axis letters here: `MHK`.
    pub axes: &'static str,
    /// Shape here, one size per letter of `axes`.
    pub shape: Vec<usize>,
    /// Shape in a Hugging Face checkpoint.
    pub hf_shape: Vec<usize>,
    /// How Hugging Face's form becomes ours.
    pub layout: Layout,
    /// Logical sharding axis of each axis: `embed`, `heads`, `kv_heads`, `head_dim`, `mlp`, `vocab`.
    pub logical: Vec<&'static str>,
    /// Element type: the checkpoint's own where the declaration comes from an opened checkpoint, else that of the
    /// configuration (float32 if it names none).
    pub dtype: DType,
}

impl Llama<Param> {
    /// The parameters that a model of this configuration has. Each line: name here, name there, and the pattern from
    /// there to here.
    pub fn declare(cfg: &ModelConfig) -> Llama<Param> {
        let model = Scope { cfg, here: String::new(), there: "model.".into() };
        Llama {
            embedding: model.param("embedding", "embed_tokens.weight", "VM->VM"),
            layers: (0..cfg.n_layers).map(|i| DecoderBlock::declare(cfg, i)).collect(),
            final_norm: model.param("final_norm", "norm.weight", "M->M"),
            lm_head: (!cfg.tie_word_embeddings).then(|| {
                Scope { cfg, here: String::new(), there: String::new() }.param("lm_head", "lm_head.weight", "VM->MV")
            }),
        }
    }
}

impl DecoderBlock<Param> {
    /// The parameters of block `i`.
    pub fn declare(cfg: &ModelConfig, i: usize) -> DecoderBlock<Param> {
        let b = Scope { cfg, here: format!("layers.{i}."), there: format!("model.layers.{i}.") };
        let attention_bias = |here, there, pattern| cfg.attention_bias.then(|| b.param(here, there, pattern));
        let mlp_bias = |here, there, pattern| cfg.mlp_bias.then(|| b.param(here, there, pattern));
        DecoderBlock {
            input_norm: b.param("input_norm", "input_layernorm.weight", "M->M"),
            attention: Attention {
                q_proj: b.param("attention.q_proj", "self_attn.q_proj.weight", "(HK)M->MHK"),
                k_proj: b.param("attention.k_proj", "self_attn.k_proj.weight", "(GK)M->MGK"),
                v_proj: b.param("attention.v_proj", "self_attn.v_proj.weight", "(GK)M->MGK"),
                out_proj: b.param("attention.out_proj", "self_attn.o_proj.weight", "M(HK)->HKM"),
                q_bias: attention_bias("attention.q_bias", "self_attn.q_proj.bias", "(HK)->HK"),
                k_bias: attention_bias("attention.k_bias", "self_attn.k_proj.bias", "(GK)->GK"),
                v_bias: attention_bias("attention.v_bias", "self_attn.v_proj.bias", "(GK)->GK"),
                out_bias: attention_bias("attention.out_bias", "self_attn.o_proj.bias", "M->M"),
            },
            post_attn_norm: b.param("post_attn_norm", "post_attention_layernorm.weight", "M->M"),
            mlp: Mlp {
                gate_proj: b.param("mlp.gate_proj", "mlp.gate_proj.weight", "FM->MF"),
                up_proj: b.param("mlp.up_proj", "mlp.up_proj.weight", "FM->MF"),
                down_proj: b.param("mlp.down_proj", "mlp.down_proj.weight", "MF->FM"),
                gate_bias: mlp_bias("mlp.gate_bias", "mlp.gate_proj.bias", "F->F"),
                up_bias: mlp_bias("mlp.up_bias", "mlp.up_proj.bias", "F->F"),
                down_bias: mlp_bias("mlp.down_bias", "mlp.down_proj.bias", "M->M"),
            },
        }
    }
}

/// Where declarations stand: the prefix of names here and there.
struct Scope<'a> {
    cfg: &'a ModelConfig,
    here: String,
    there: String,
}

impl Scope<'_> {
    fn param(&self, here: &str, there: &str, pattern: &'static str) -> Param {
        let (stored, axes) = pattern.split_once("->").expect("a pattern has an arrow");
        let stored: Vec<&str> = stored_axes(stored);
        let layout = if stored.concat() == axes {
            Layout::Same
        } else {
            assert_eq!([stored[1], stored[0]].concat(), axes, "{pattern} is neither an identity nor a transpose");
            Layout::Transposed
        };
        Param {
            name: format!("{}{here}", self.here),
            hf_name: format!("{}{there}", self.there),
            pattern,
            axes,
            shape: axes.chars().map(|a| self.cfg.axis(a).size).collect(),
            hf_shape: stored.iter().map(|group| group.chars().map(|a| self.cfg.axis(a).size).product()).collect(),
            layout,
            logical: axes.chars().map(|a| self.cfg.axis(a).logical).collect(),
            dtype: self.cfg.dtype.unwrap_or(DType::F32),
        }
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

    /// Where Hugging Face's shape comes from, for messages: `9 heads × 64, hidden 576`.
    pub fn arithmetic(&self, cfg: &ModelConfig) -> String {
        let stored = self.pattern.split_once("->").map_or(self.pattern, |(stored, _)| stored);
        let axis = |group: &str| match group.chars().collect::<Vec<_>>()[..] {
            [a] => format!("{} {}", cfg.axis(a).noun, cfg.axis(a).size),
            [a, b] => format!("{} {} × {}", cfg.axis(a).size, cfg.axis(a).noun, cfg.axis(b).size),
            _ => group.to_string(),
        };
        stored_axes(stored).into_iter().map(axis).collect::<Vec<_>>().join(", ")
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
            (q.name.as_str(), q.hf_name.as_str()),
            ("layers.1.attention.q_proj", "model.layers.1.self_attn.q_proj.weight")
        );
        assert_eq!((q.axes, &q.shape[..], &q.hf_shape[..]), ("MHK", &[20, 6, 8][..], &[48, 20][..]));
        assert_eq!((q.layout, &q.logical[..]), (Layout::Transposed, &["embed", "heads", "head_dim"][..]));
        assert_eq!(q.arithmetic(&small()), "6 heads × 8, hidden 20");
        let o = &p.layers[0].attention.out_proj;
        assert_eq!((o.axes, &o.shape[..], &o.hf_shape[..]), ("HKM", &[6, 8, 20][..], &[20, 48][..]));
        let bias = p.layers[0].attention.k_bias.as_ref().expect("attention_bias is on");
        assert_eq!((&bias.shape[..], &bias.hf_shape[..], bias.layout), (&[2, 8][..], &[16][..], Layout::Same));
        assert_eq!(p.lm_head.as_ref().map(|h| h.shape.clone()), Some(vec![20, 33]));
        let tied = Llama::declare(&ModelConfig { tie_word_embeddings: true, ..small() });
        assert!(tied.lm_head.is_none());
    }

    #[test]
    fn a_name_is_the_path_of_fields_and_unique() {
        let p = Llama::declare(&small());
        assert_eq!(p.layers[1].mlp.down_bias.as_ref().map(|b| b.name.as_str()), Some("layers.1.mlp.down_bias"));
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
        assert_eq!(numbers.layers[1].input_norm, 17);
        assert_eq!(numbers.iter().into_iter().copied().collect::<Vec<_>>(), (0..35).collect::<Vec<_>>());
        assert!(p.from_leaves(0..34).is_none() && p.from_leaves(0..36).is_none());
        assert_eq!(numbers.clone().try_map(&mut |x| if x < 20 { Ok(x) } else { Err(x) }), Err(20));
        assert_eq!(p.layers[0].from_leaves(numbers.layers[0].clone().into_leaves()), Some(numbers.layers[0].clone()));
    }
}
