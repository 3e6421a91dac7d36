//! Cross-entropy over blocks of tokens, each with the whole vocabulary: then the derivative by a block's logits is at hand as soon as
//! they are, and no logit is computed twice (as in Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989). On every device it takes
//! an array of the head's size for the head's gradient.

use xla::DType::{F32, I32};
use xla::graph::{Tensor, einsum_as};

use super::{LossOptions, Sums, Whole};
use crate::config::ModelConfig;

/// Logits of a block, 128 MiB of f32: each block reads and writes the head's gradient once.
const LOGITS: usize = 1 << 25;

/// Never all logits in one; and more blocks than these only make the program larger.
const BLOCKS: [usize; 2] = [2, 16];

/// What is differentiated, and the cross-entropy alone, which is not.
#[track_caller]
pub(super) fn means(whole: &Whole, options: &LossOptions, cfg: &ModelConfig) -> [Tensor; 2] {
    let Whole { hidden, head, tied, ids, share } = whole;
    let forward = |args: &[Tensor]| {
        let [hidden, head, ids, share] = args else { return Default::default() };
        let n = hidden.dim(0);
        let rows = n.div_ceil((n * cfg.vocab_size).div_ceil(LOGITS).clamp(BLOCKS[0], BLOCKS[1])).max(1);
        let (mut sums, mut by_hidden) = (Vec::new(), Vec::new());
        for start in (0..n.max(1)).step_by(rows) {
            let own = |x: &Tensor| x.narrow(0, start, rows.min(n - start));
            let (head, tied) = (head.clone(), *tied);
            let part = Whole { hidden: own(hidden), head, tied, ids: own(ids), share: own(share) };
            let (next, by_part) = block(&part, options, cfg);
            sums = match start {
                0 => next.to_vec(),
                _ => sums.iter().zip(&next).map(|(sum, next): (&Tensor, _)| sum + next).collect(),
            };
            by_hidden.push(by_part);
        }
        let by_hidden = hidden.graph().concatenate(&by_hidden.iter().collect::<Vec<_>>(), 0);
        let by_head = sums.split_off(2);
        (sums, [vec![by_hidden], by_head].concat())
    };
    let backward = |kept: &[Tensor], cotangents: &[Tensor]| {
        let one =
            |i: usize, whole: &Tensor| (&kept[i] * cotangents[0].broadcast(kept[i].shape(), &[])).cast(whole.dtype());
        vec![Some(one(0, hidden)), Some(one(1, head)), None, None]
    };
    let means = hidden.graph().custom_vjp("token_blocks", &[hidden, head, ids, share], forward, backward);
    means.try_into().unwrap_or_else(|_| unreachable!("the forward half gives two"))
}

/// Of a block of tokens: its parts of both means and the derivative of the first by the head; and that by the block's hidden states.
/// All are f32.
#[track_caller]
fn block(block: &Whole, options: &LossOptions, cfg: &ModelConfig) -> ([Tensor; 3], Tensor) {
    let Whole { hidden, head, tied, ids, share } = block;
    let logits = match tied {
        true => einsum_as("NM,VM->NV", hidden, head, F32),
        false => einsum_as("NM,MV->NV", hidden, head, F32),
    };
    let (logits, bend) = match cfg.logit_softcap {
        Some(cap) => {
            let tanh = (logits / cap).tanh();
            (&tanh * cap, Some(1.0 - tanh.square()))
        }
        None => (logits, None),
    };
    let over = |x: &Tensor| x.broadcast(logits.shape(), &[0]);
    let highest = logits.max(&[1]);
    let powers = (&logits - over(&highest)).exp();
    let power = powers.sum(&[1]);
    let is_target = hidden.graph().iota(I32, logits.shape(), 1).eq(&over(ids));
    let target = is_target.select(&logits, 0.0).sum(&[1]);
    let sums = Sums { log: highest + power.log(), target, all: logits.sum(&[1]) };
    let [total, cross_entropy] = sums.means(share, options, cfg);

    // The derivative of log Σ e^logit is the softmax.
    let mut slope = 1.0 / power;
    if options.z_loss != 0.0 {
        slope = slope * (&sums.log * (2.0 * options.z_loss) + 1.0);
    }
    let smoothing = options.label_smoothing;
    let mut by_logits = powers * over(&slope);
    if smoothing != 0.0 {
        by_logits = by_logits - smoothing / cfg.vocab_size as f64;
    }
    by_logits = is_target.select(&(&by_logits - (1.0 - smoothing)), &by_logits) * over(share);
    if let Some(bend) = bend {
        by_logits = by_logits * bend;
    }
    let by_logits = by_logits.cast(head.dtype());
    let (by_hidden, by_head) = match tied {
        true => (einsum_as("NV,VM->NM", &by_logits, head, F32), einsum_as("NV,NM->VM", &by_logits, hidden, F32)),
        false => (einsum_as("NV,MV->NM", &by_logits, head, F32), einsum_as("NM,NV->MV", hidden, &by_logits, F32)),
    };
    ([total, cross_entropy, by_head], by_hidden)
}
