//! Perplexity of a text over sliding windows, and the KL divergence between two runs of it.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::Error;
use crate::golden::log_sum_exp;
use crate::runtime::{Engine, chunked_logits};

/// How a text is cut.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Tokens that a window holds.
    pub context: usize,
    /// Tokens from one window to the next; what a window shares with the one before is context only.
    pub stride: usize,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Sum of −ln p of these, nats.
    pub nll: f64,
    /// Sum over positions of KL(base ‖ this), nats.
    pub kl_sum: f64,
    /// Largest of these.
    pub kl_max: f64,
}

impl Score {
    /// exp of the mean negative log-likelihood.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }

    /// Mean KL per predicted token.
    pub fn kl_mean(&self) -> f64 {
        self.kl_sum / self.tokens as f64
    }
}

/// Scores `ids` with `engine`, beside `base` if given. `progress` gets tokens done and in all.
pub fn score(
    engine: &Engine,
    base: Option<&Engine>,
    ids: &[u32],
    windows: Windows,
    cancel: &AtomicBool,
    progress: &dyn Fn(u64, u64),
) -> Result<Score, Error> {
    let vocab = engine.config().vocab_size;
    let mut score = Score::default();
    let mut scored = 1;
    let mut begin = 0;
    while scored < ids.len() {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let end = (begin + windows.context).min(ids.len());
        let window = &ids[begin..end];
        let chunk = windows.context.min(512);
        let ours = chunked_logits(engine, window, chunk)?;
        let theirs = base.map(|b| chunked_logits(b, window, chunk)).transpose()?;
        // The first token of a window has nothing before it to be predicted from.
        for target in scored.max(begin + 1)..end {
            let at = (target - begin - 1) * vocab;
            let row = log_softmax(&ours[at..][..vocab]);
            score.nll -= row[ids[target] as usize];
            score.tokens += 1;
            if let Some(theirs) = &theirs {
                let p = log_softmax(&theirs[at..][..vocab]);
                let kl: f64 = p.iter().zip(&row).map(|(p, q)| p.exp() * (p - q)).sum();
                score.kl_sum += kl.max(0.0);
                score.kl_max = score.kl_max.max(kl);
            }
        }
        scored = end;
        begin += windows.stride;
        progress(scored as u64, ids.len() as u64);
    }
    Ok(score)
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let lse = log_sum_exp(row.iter());
    row.iter().map(|&x| f64::from(x) - lse).collect()
}
