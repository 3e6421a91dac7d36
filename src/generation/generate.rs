//! The loop: prefill, then decode with the next step dispatched before the last token is read.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::options::SamplingOptions;
use crate::Error;
use crate::runtime::Session;
use crate::text::{StopMatcher, TextStream, Tokenizer};

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

/// Times of one generation.
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
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// How long it took.
    pub timing: Timing,
}

/// Appends `prompt` to slot 0 of a session of one slot and generates. `on_text` gets pieces of whole characters as
/// they come. `interrupt` ends the text early.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    interrupt: &AtomicBool,
    on_text: &mut dyn FnMut(&str),
) -> Result<Generation, Error> {
    let mut stream = TextStream::new(tokenizer);
    let mut stops = StopMatcher::new(options.stop_strings.clone())?;
    let mut out = Generation {
        text: String::new(),
        tokens: Vec::new(),
        finish_reason: FinishReason::Length,
        timing: Timing { prompt_tokens: prompt.len(), ..Timing::default() },
    };
    let room = session.cache_shape().len.saturating_sub(session.used()[0] + prompt.len());
    // The last token drawn needs no place in the cache.
    let max_tokens = options.max_tokens.min(room + 1);
    if max_tokens == 0 {
        return Ok(out);
    }

    let started = Instant::now();
    let base = session.used()[0] + prompt.len();
    session.prefill(&[prompt.to_vec()], std::slice::from_ref(&options.sampling), None)?;
    let mut read = session.read_tokens()?;
    let mut first = None;
    for i in 0..max_tokens {
        // The step after this token is on its way before the token is here.
        let next = match i + 1 < max_tokens {
            true => {
                session.decode()?;
                Some(session.read_tokens()?)
            }
            false => None,
        };
        let id = read.wait()?[0];
        first.get_or_insert_with(Instant::now);
        out.tokens.push(id);
        let stop_id = options.stop_ids.contains(&id);
        let mut piece = if stop_id { stream.finish()? } else { stream.push(id)? };
        // Bytes that wait for the rest of a character may hold a stop string already.
        if piece.is_none() && !options.stop_strings.is_empty() {
            let held = stream.held()?;
            if options.stop_strings.iter().any(|s| held.contains(s.as_str())) {
                piece = stream.finish()?;
            }
        }
        let mut stopped = stop_id;
        if let Some(piece) = piece {
            let result = stops.push(&piece);
            emit(&mut out.text, &result.emit, on_text);
            stopped |= result.stopped.is_some();
            if result.stopped.is_some() {
                out.finish_reason = FinishReason::Stop;
                break;
            }
        }
        if stopped {
            out.finish_reason = FinishReason::Stop;
            emit(&mut out.text, &stops.finish(), on_text);
            break;
        }
        if interrupt.load(Ordering::Relaxed) {
            out.finish_reason = FinishReason::Interrupted;
        }
        match next {
            Some(next) if out.finish_reason != FinishReason::Interrupted => read = next,
            _ => {
                if let Some(piece) = stream.finish()? {
                    let result = stops.push(&piece);
                    emit(&mut out.text, &result.emit, on_text);
                    if result.stopped.is_some() {
                        out.finish_reason = FinishReason::Stop;
                        break;
                    }
                }
                emit(&mut out.text, &stops.finish(), on_text);
                break;
            }
        }
    }
    let first = first.unwrap_or(started);
    out.timing.prefill = first - started;
    out.timing.decode = first.elapsed();
    out.timing.decoded = out.tokens.len().saturating_sub(1);
    // Steps dispatched past the end wrote nothing that counts: the text ends before its last token.
    session.truncate(0, base + out.tokens.len() - 1);
    Ok(out)
}

fn emit(text: &mut String, piece: &str, on_text: &mut dyn FnMut(&str)) {
    if !piece.is_empty() {
        text.push_str(piece);
        on_text(piece);
    }
}
