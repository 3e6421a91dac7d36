//! The loop: prefill, then decode with the next step dispatched before the last token is read.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::options::SamplingOptions;
use super::writer::Writer;
use crate::Error;
use crate::kv_cache::CacheShape;
use crate::runtime::{Drawn, Engine, Session};
use crate::text::Tokenizer;

/// What to generate.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: SamplingOptions,
    /// Ids that end the text; the id itself is kept among the tokens and not shown.
    pub stop_ids: BTreeSet<u32>,
    /// Strings that end the text; neither they nor what follows is shown.
    pub stop_strings: Vec<String>,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// Ctrl-C.
    Interrupted,
}

impl FinishReason {
    /// As `--json` spells it.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Interrupted => "interrupted",
        }
    }
}

/// Times of one generation, without that of compiling.
#[derive(Clone, Copy, Debug, Default)]
pub struct Timing {
    /// From the call to the first token on the host.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// Prompt tokens run.
    pub prompt_tokens: usize,
    /// Tokens drawn after the first.
    pub decoded: usize,
}

impl Timing {
    /// Prompt tokens per second.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Generated tokens per second after the first.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decoded, self.decode)
    }
}

/// Measures from when it was made, and leaves out what compiling took.
pub(super) struct Clock<'e> {
    engine: &'e Engine,
    started: Instant,
    compiled: Duration,
}

impl<'e> Clock<'e> {
    pub(super) fn new(engine: &'e Engine) -> Clock<'e> {
        Clock { engine, started: Instant::now(), compiled: engine.compile_stats().time }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed().saturating_sub(self.engine.compile_stats().time.saturating_sub(self.compiled))
    }
}

fn rate(n: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { n as f64 / time.as_secs_f64() }
}

/// A text and how it came to be.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The generated text, without stop strings and special tokens.
    pub text: String,
    /// The generated ids, a stop id included.
    pub tokens: Vec<u32>,
    /// For each of them its log-probability and the most likely ids, where [`SamplingOptions::log_probabilities`] asks for it.
    pub log_probabilities: Vec<Drawn>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timing: Timing,
}

/// Appends `prompt` to the one slot of a session and generates. `on_text` gets pieces of whole characters as they
/// come. `interrupt` ends the text early.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    interrupt: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation, Error> {
    let mut all = samples(session, tokenizer, prompt, options, interrupt, &mut |_, piece| on_text(piece))?;
    Ok(all.swap_remove(0))
}

/// Appends `prompt` to slot 0 and generates a text in every slot, each as [`generate`] gives it alone with the seed of
/// `options` plus its number. The other slots lose what they held. `on_text` also gets the number of the text.
///
/// A slot whose text ends before the others' is freed.
pub fn samples(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    interrupt: &AtomicBool,
    on_text: &mut dyn FnMut(usize, &str),
) -> Result<Vec<Generation>, Error> {
    let count = session.cache_shape().batch;
    let mut texts =
        (0..count).map(|_| Writer::new(tokenizer, options, prompt.len())).collect::<Result<Vec<Writer>, Error>>()?;
    let base = session.used()[0] + prompt.len();
    // The last token drawn needs no place in the cache.
    let max_tokens = options.max_tokens.min(session.cache_shape().len.saturating_sub(base) + 1);
    let clock = Clock::new(session.engine());
    let mut prefill = Duration::ZERO;
    let mut read = match max_tokens {
        0 => None,
        _ => {
            begin(session, prompt, &options.sampling)?;
            Some(session.read_tokens()?)
        }
    };
    let mut i = 0;
    while let Some(now) = read.take() {
        i += 1;
        // The step after this token is on its way before the token is here.
        if i < max_tokens {
            session.decode()?;
            read = Some(session.read_tokens()?);
        }
        let drawn = now.wait()?;
        if i == 1 {
            prefill = clock.elapsed();
        }
        let end = match interrupt.load(Ordering::Relaxed) {
            true => Some(FinishReason::Interrupted),
            false => (i == max_tokens).then_some(FinishReason::Length),
        };
        for (slot, (text, drawn)) in texts.iter_mut().zip(drawn).enumerate().filter(|(_, (text, _))| !text.ended) {
            session.know(slot, drawn.id);
            text.push(drawn, end, &mut |piece| on_text(slot, piece))?;
            text.out.timing = Timing {
                prefill,
                decode: clock.elapsed().saturating_sub(prefill),
                decoded: text.out.tokens.len() - 1,
                ..text.out.timing
            };
        }
        if texts.iter().all(|text| text.ended) {
            break;
        }
        (0..count).filter(|&slot| texts[slot].ended).for_each(|slot| session.free(slot));
    }
    // Steps dispatched past the end wrote nothing that counts: a text ends before its last token.
    for (slot, text) in texts.iter().enumerate().filter(|(_, text)| !text.out.tokens.is_empty()) {
        session.truncate(slot, base + text.out.tokens.len() - 1);
    }
    Ok(texts.into_iter().map(|text| text.out).collect())
}

/// Gives every slot the prompt and draws the token that follows it. All but its last token is run once, in slot 0, whose
/// cache the others copy.
fn begin(session: &mut Session, prompt: &[u32], sampling: &SamplingOptions) -> Result<(), Error> {
    let CacheShape { batch, len, .. } = session.cache_shape();
    let mut all: Vec<SamplingOptions> = (0..batch as u64)
        .map(|i| SamplingOptions { seed: sampling.seed.wrapping_add(i), ..sampling.clone() })
        .collect();
    let used = session.used()[0];
    // The last token is run as a chunk of two.
    let shared = prompt.split_last().filter(|(_, head)| batch > 1 && !head.is_empty() && used + prompt.len() < len);
    let Some((last, head)) = shared else {
        return session.prefill(&vec![prompt.to_vec(); batch], &all, None);
    };
    if used == 0 {
        session.set_length(0, prompt.len())?;
    }
    session.start(0, head, sampling)?;
    session.reorder(&vec![0; batch])?;
    all.iter_mut().for_each(|sampling| sampling.history.extend(head));
    session.prefill(&vec![vec![*last]; batch], &all, Some(2))
}
