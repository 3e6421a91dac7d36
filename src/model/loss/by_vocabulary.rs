//! Cross-entropy over blocks of the vocabulary, one after another with a running maximum and sum (Milakov and Gimelshein 2018,
//! arXiv:1805.02867), which are computed once more for the gradient. Every device needs its own columns of the head alone.

use xla::DType::{F32, I32};
use xla::graph::{Save, einsum_as};

use super::{Sums, Whole};
use crate::config::ModelConfig;

/// Columns of the vocabulary that are computed at a time.
const BLOCK: usize = 8192;

/// What is summed over the vocabulary.
#[track_caller]
pub(super) fn sums(whole: &Whole, cfg: &ModelConfig) -> Sums {
    let Whole { hidden, head, tied, ids, .. } = whole;
    let (g, tied) = (hidden.graph(), *tied);
    let axis = if tied { 0 } else { 1 };
    let vocab = head.dim(axis);
    // Each device that has a part of the vocabulary has a part of each block.
    let parts: usize = g.mesh_axes("vocab").iter().map(|mesh_axis| g.devices_along(mesh_axis)).product();
    let n = hidden.dim(0);
    let row = |value: f64| g.full(value, F32, &[n]);
    // The largest logit so far, a number to subtract, without a gradient; Σ e^(logit − that); the target's; Σ logit.
    let mut sums = [row(f64::from(f32::MIN)), row(0.0), row(0.0), row(0.0)];
    let (own, step) = (vocab / parts, BLOCK.min(vocab / parts));
    let by_part = match tied {
        true => head.reshape(&[parts, own, head.dim(1)]),
        false => head.reshape(&[head.dim(0), parts, own]),
    };
    for start in (0..own).step_by(step) {
        let width = step.min(own - start);
        let block = match (tied, own == width) {
            (_, true) => by_part.clone(),
            (true, _) => by_part.narrow(1, start, width),
            (false, _) => by_part.narrow(2, start, width),
        };
        // The id of a column is that of its part, of the block, and its own.
        let first = g.scalar(start as i64, I32);
        let inputs = [hidden, ids, &block, &first, &sums[0], &sums[1], &sums[2], &sums[3]];
        let next = g.checkpoint("vocabulary_block", Save::Nothing, &inputs, |args| {
            let [hidden, ids, block, first, highest, total, target, all] = args else { return args.to_vec() };
            let logits = match (parts, tied) {
                // A matrix is what XLA:CPU multiplies without turning it.
                (1, true) => einsum_as("NM,VM->NV", hidden, &block.reshape(&block.shape()[1..]), F32).expand_dims(1),
                (1, false) => {
                    let matrix = block.reshape(&[block.dim(0), block.dim(2)]);
                    einsum_as("NM,MV->NV", hidden, &matrix, F32).expand_dims(1)
                }
                (_, true) => einsum_as("NM,PVM->NPV", hidden, block, F32),
                (_, false) => einsum_as("NM,MPV->NPV", hidden, block, F32),
            };
            let logits = match cfg.logit_softcap {
                Some(cap) => (logits / cap).tanh() * cap,
                None => logits,
            };
            let shape = logits.shape().to_vec();
            let g = logits.graph();
            let column = g.iota(I32, &shape, 1) * own as i64 + g.iota(I32, &shape, 2) + first.broadcast(&shape, &[]);
            // A mesh may pad the vocabulary.
            let real = column.lt(cfg.vocab_size as i64);
            let shown = real.select(&logits, f64::from(f32::MIN));
            let now = highest.maximum(&shown.max(&[1, 2])).stop_gradient();
            let weights = (&shown - now.broadcast(&shape, &[0])).exp();
            let total = total * (highest - &now).exp() + weights.sum(&[1, 2]);
            let here = column.eq(&ids.broadcast(&shape, &[0]));
            let target = target + here.select(&logits, 0.0).sum(&[1, 2]);
            let all = all + real.select(&logits, 0.0).sum(&[1, 2]);
            vec![now, total, target, all]
        });
        sums = next.try_into().unwrap_or_else(|_| unreachable!("a block gives what it was given"));
    }
    let [highest, total, target, all] = sums;
    Sums { log: highest + total.log(), target, all }
}
