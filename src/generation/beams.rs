//! Beam search: the device gives each beam's likeliest next tokens, the host keeps the best texts.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use super::generate::{Clock, FinishReason, Timing};
use crate::Error;
use crate::runtime::Session;

/// What to search for.
#[derive(Clone, Debug)]
pub struct BeamOptions {
    /// Tokens of a text at most.
    pub max_tokens: usize,
    /// Texts are compared by the sum of their log-probabilities over length^penalty: above 0 favours long ones.
    pub length_penalty: f32,
    /// Stop as soon as there are N whole texts; otherwise once no text in progress, as long as it is now, beats the worst
    /// of them.
    pub early_stopping: bool,
    /// Ids that end a text.
    pub stop_ids: BTreeSet<u32>,
}

/// A text that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Beam {
    /// Its ids, a stop id included.
    pub tokens: Vec<u32>,
    /// The sum of their log-probabilities, divided by their number to the power of the length penalty.
    pub score: f32,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// What a search found.
#[derive(Clone, Debug)]
pub struct BeamSearch {
    /// At most N texts, the best first.
    pub beams: Vec<Beam>,
    /// How long it took; a step counts as one token.
    pub timing: Timing,
}

/// A text in progress.
#[derive(Clone, Debug, Default)]
struct Running {
    tokens: Vec<u32>,
    /// The sum of its log-probabilities.
    sum: f32,
}

/// The N most likely continuations of `prompt` that beam search with the N slots of `session` finds: `generate` of
/// `transformers` with `num_beams=N, do_sample=False`. The prompt goes to slot 0; the other slots lose what they held.
pub fn beam_search(
    session: &mut Session,
    prompt: &[u32],
    options: &BeamOptions,
    interrupt: &AtomicBool,
) -> Result<BeamSearch, Error> {
    let n = session.cache_shape().batch;
    let vocab = session.engine().config().vocab_size;
    let room = session.cache_shape().len.saturating_sub(session.used()[0] + prompt.len());
    let max_tokens = options.max_tokens.min(room + 1);
    // Of so many continuations of one text N do not end it: all that can go on, and all that can be among the N best.
    let count = (n + options.stop_ids.len()).min(vocab);

    let clock = Clock::new(session.engine());
    let mut timing = Timing { prompt_tokens: prompt.len(), ..Timing::default() };
    let mut running = vec![Running::default()];
    let mut found: Vec<Beam> = Vec::new();
    let mut rows = vec![Vec::new(); n];
    rows[0] = prompt.to_vec();
    for len in 1..=max_tokens {
        let best = session.best(&rows, count, false)?;
        if len == 1 {
            timing.prefill = clock.elapsed();
        }
        let mut candidates: Vec<(usize, u32, f32)> = Vec::new();
        for (slot, (text, best)) in running.iter().zip(best).enumerate() {
            let sums = best.log_probabilities.iter().map(|x| text.sum + x);
            candidates.extend(best.ids.into_iter().zip(sums).map(|(id, sum)| (slot, id, sum)));
        }
        candidates.sort_by(|a, b| b.2.total_cmp(&a.2));

        let divisor = (len as f32).powf(options.length_penalty);
        let cut = match interrupt.load(Ordering::Relaxed) {
            true => Some(FinishReason::Interrupted),
            false => (len == max_tokens).then_some(FinishReason::Length),
        };
        let mut parents = Vec::new();
        let mut going = Vec::new();
        for (rank, (slot, id, sum)) in candidates.into_iter().enumerate() {
            let end = if options.stop_ids.contains(&id) { Some(FinishReason::Stop) } else { cut };
            let tokens = || running[slot].tokens.iter().copied().chain([id]).collect();
            match end {
                // Whole texts count only among the N best; those after them are there to go on in their place.
                Some(finish_reason) if rank < n => {
                    found.push(Beam { tokens: tokens(), score: sum / divisor, finish_reason });
                }
                None if going.len() < n => {
                    going.push(Running { tokens: tokens(), sum });
                    parents.push(slot);
                }
                _ => {}
            }
        }
        found.sort_by(|a, b| b.score.total_cmp(&a.score));
        found.truncate(n);
        timing.decoded = len - 1;
        let Some(best) = going.first() else { break };
        if found.len() == n && (options.early_stopping || best.sum / divisor <= found[n - 1].score) {
            break;
        }
        parents.resize(n, 0);
        session.reorder(&parents)?;
        rows = going.iter().map(|text| text.tokens[len - 1..].to_vec()).collect();
        rows.resize(n, Vec::new());
        running = going;
    }
    timing.decode = clock.elapsed().saturating_sub(timing.prefill);
    Ok(BeamSearch { beams: found, timing })
}
