//! Contrastive search (Su et al. 2022, "A Contrastive Framework for Neural Text Generation").

use std::sync::atomic::{AtomicBool, Ordering};

use super::generate::{Clock, FinishReason, GenerateOptions, Generation, Timing};
use super::writer::Writer;
use crate::Error;
use crate::runtime::{Drawn, Session};
use crate::text::Tokenizer;

/// Appends `prompt` to slot 0 of a fresh session of K slots and chooses each token v among the K likeliest by
///
/// (1 − α) · p(v) − α · max_j cos(h_v, h_j),
///
/// where h are hidden states after the last norm: of the candidate, and of every token before it. The slots run the
/// candidates side by side, so that a token costs one step. Of `options`, those that say when a text ends are followed.
///
/// # Errors
/// [`Error::Option`] unless 0 ≤ `alpha` ≤ 1, and what running the model may give.
pub fn contrastive_search(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    alpha: f32,
    options: &GenerateOptions,
    interrupt: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation, Error> {
    if !(0.0..=1.0).contains(&alpha) {
        let what = format!("must be between 0 and 1, found {alpha}");
        return Err(Error::Option { name: "penalty-alpha".into(), what });
    }
    let slots = session.cache_shape().batch;
    let cfg = session.engine().config();
    let (count, m) = (slots.min(cfg.vocab_size), cfg.d_model);
    let mut text = Writer::new(tokenizer, options, prompt.len())?;
    // The last token is run too, as a candidate.
    let room = session.cache_shape().len.saturating_sub(session.used()[0] + prompt.len());
    let max_tokens = options.max_tokens.min(room);
    if max_tokens == 0 {
        return Ok(text.out);
    }

    let clock = Clock::new(session.engine());
    let mut prefill = None;
    let mut rows = vec![Vec::new(); slots];
    rows[0] = prompt.to_vec();
    let mut next = session.best(&rows, count, true)?.swap_remove(0);
    session.reorder(&vec![0; slots])?;
    let mut past = next.hidden.clone();
    past.chunks_mut(m).for_each(normalise);
    for i in 1..=max_tokens {
        let mut rows: Vec<Vec<u32>> = next.ids.iter().map(|id| vec![*id]).collect();
        rows.resize(slots, Vec::new());
        let mut tried = session.best(&rows, count, true)?;
        tried.truncate(count);
        tried.iter_mut().for_each(|candidate| normalise(&mut candidate.hidden));
        let mut chosen = (0, f32::NEG_INFINITY);
        for (slot, candidate) in tried.iter().enumerate() {
            let similar = past.chunks(m).map(|h| dot(h, &candidate.hidden)).fold(-1.0, f32::max);
            let score = (1.0 - alpha) * next.log_probabilities[slot].exp() - alpha * similar;
            if score > chosen.1 {
                chosen = (slot, score);
            }
        }
        let slot = chosen.0;
        session.reorder(&vec![slot; slots])?;
        let prefill = *prefill.get_or_insert_with(|| clock.elapsed());
        let end = match interrupt.load(Ordering::Relaxed) {
            true => Some(FinishReason::Interrupted),
            false => (i == max_tokens).then_some(FinishReason::Length),
        };
        text.push(Drawn { id: next.ids[slot], log_probability: None, best: Vec::new() }, end, on_text)?;
        text.out.timing =
            Timing { prefill, decode: clock.elapsed().saturating_sub(prefill), decoded: i - 1, ..text.out.timing };
        if text.ended {
            break;
        }
        next = tried.swap_remove(slot);
        past.extend(&next.hidden);
    }
    Ok(text.out)
}

/// Makes its length 1; zeros stay.
fn normalise(h: &mut [f32]) {
    let length = dot(h, h).sqrt().max(1e-8);
    h.iter_mut().for_each(|x| *x /= length);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
