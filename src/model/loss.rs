//! The loss of a language model: the cross-entropy of logits that are never there as a whole, and what is added to it.

mod by_tokens;
mod by_vocabulary;

use xla::DType::F32;
use xla::graph::Tensor;

use super::router_loss::{load_balancing_loss, router_z_loss};
use crate::config::ModelConfig;
use crate::params::{Llama, Weight};

/// The target of a position that does not count.
pub const IGNORED: i32 = -100;

/// What the loss is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossOptions {
    /// ε: the target has 1 − ε of the probability that is asked for, and ε is spread over the vocabulary (Szegedy et al. 2016,
    /// section 7).
    pub label_smoothing: f64,
    /// Weight of (log Σ e^logit)², which keeps logits from growing (Chowdhery et al. 2022, PaLM, section 5).
    pub z_loss: f64,
    /// Weight of the mixtures' [`load_balancing_loss`].
    pub load_balancing: f64,
    /// Weight of the mixtures' [`router_z_loss`].
    pub router_z_loss: f64,
}

/// What a loss is computed for.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// The next token of each position, (B, S) i32; a negative one does not count.
    pub ids: &'a Tensor,
    /// 1 where there is a token and 0 where there is padding, (B, S): which tokens the routers' losses are of; all if `None`.
    pub tokens: Option<&'a Tensor>,
}

/// The loss and its parts, f32 scalars.
#[derive(Clone, Debug)]
pub struct Loss {
    /// What is differentiated: the mean cross-entropy with all that is added to it.
    pub total: Tensor,
    /// The mean of −log p(target) over the positions that count, without smoothing.
    pub cross_entropy: Tensor,
    /// Number of positions that count.
    pub count: Tensor,
}

impl Loss {
    /// The loss of normalised hidden states (B, S, M) under the model's head. The logits (B·S, V) are never there as a whole: on one
    /// device they come by tokens, on a mesh by the vocabulary. Of no positions at all the loss is 0.
    #[track_caller]
    pub fn new(
        p: &Llama<Weight>,
        hidden: &Tensor,
        router_logits: &[Tensor],
        targets: Targets<'_>,
        options: &LossOptions,
        cfg: &ModelConfig,
    ) -> Loss {
        let g = hidden.graph();
        let rows = hidden.dim(0) * hidden.dim(1);
        let ids = targets.ids.reshape(&[rows]);
        let counts = ids.ge(0i64).cast(F32);
        let count = counts.sum(&[0]);
        let head = p.lm_head.as_ref().unwrap_or(&p.embedding);
        let whole = Whole {
            hidden: hidden.reshape(&[rows, hidden.dim(2)]).cast(head.dtype()),
            head: head.float(),
            tied: p.lm_head.is_none(),
            share: counts / count.maximum(1.0).broadcast(&[rows], &[]),
            ids,
        };
        let [mut total, cross_entropy] = match g.mesh() {
            None => by_tokens::means(&whole, options, cfg),
            Some(_) => by_vocabulary::sums(&whole, cfg).means(&whole.share, options, cfg),
        };
        if let (Some(moe), false) = (&cfg.moe, router_logits.is_empty()) {
            let flat: Vec<Tensor> = router_logits.iter().map(|x| x.reshape(&[1, rows, x.dim(2)])).collect();
            let logits = g.concatenate(&flat.iter().collect::<Vec<_>>(), 0);
            if options.load_balancing != 0.0 {
                total = total + load_balancing_loss(&logits, moe.top_k, targets.tokens) * options.load_balancing;
            }
            if options.router_z_loss != 0.0 {
                total = total + router_z_loss(&logits, targets.tokens) * options.router_z_loss;
            }
        }
        Loss { total, cross_entropy, count }
    }
}

/// What the cross-entropy is computed of.
struct Whole {
    /// Normalised hidden states (N, M), of the head's type.
    hidden: Tensor,
    /// The head (V, M), or (M, V) where it is not the embedding.
    head: Tensor,
    /// Whether it is the embedding.
    tied: bool,
    /// The next token of each row, (N) i32.
    ids: Tensor,
    /// What each row has of the mean, (N) f32.
    share: Tensor,
}

/// What is summed over the vocabulary, of each row, (N) f32.
struct Sums {
    /// log Σ e^logit.
    log: Tensor,
    /// The target's logit.
    target: Tensor,
    /// Σ logit.
    all: Tensor,
}

impl Sums {
    /// What is differentiated, and the cross-entropy alone: means over the rows.
    fn means(&self, share: &Tensor, options: &LossOptions, cfg: &ModelConfig) -> [Tensor; 2] {
        let own = &self.log - &self.target;
        let mut each = own.clone();
        if options.label_smoothing != 0.0 {
            let spread = &self.log - &self.all / cfg.vocab_size as f64;
            each = each * (1.0 - options.label_smoothing) + spread * options.label_smoothing;
        }
        if options.z_loss != 0.0 {
            each = each + self.log.square() * options.z_loss;
        }
        [each, own].map(|x| (x * share).sum(&[0]))
    }
}
