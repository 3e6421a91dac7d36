//! A text as its tokens come: whole characters out, stop ids and stop strings found.

use super::generate::{FinishReason, GenerateOptions, Generation, Timing};
use crate::Error;
use crate::runtime::Drawn;
use crate::text::{StopMatcher, TextStream, Tokenizer};

/// One text in progress.
pub(super) struct Writer<'a> {
    stream: TextStream<'a>,
    stops: StopMatcher,
    options: &'a GenerateOptions,
    /// What there is of it.
    pub(super) out: Generation,
    /// True once nothing is added any more.
    pub(super) ended: bool,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        tokenizer: &'a Tokenizer,
        options: &'a GenerateOptions,
        prompt_tokens: usize,
    ) -> Result<Writer<'a>, Error> {
        let out = Generation {
            text: String::new(),
            tokens: Vec::new(),
            log_probabilities: Vec::new(),
            finish_reason: FinishReason::Length,
            timing: Timing { prompt_tokens, ..Timing::default() },
        };
        let stops = StopMatcher::new(options.stop_strings.clone())?;
        Ok(Writer { stream: TextStream::new(tokenizer), stops, options, out, ended: false })
    }

    /// Adds a token. `end` is why it is the last one, if it is for a reason outside of the text.
    pub(super) fn push(
        &mut self,
        drawn: Drawn,
        end: Option<FinishReason>,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<(), Error> {
        let id = drawn.id;
        self.out.tokens.push(id);
        if drawn.log_probability.is_some() {
            self.out.log_probabilities.push(drawn);
        }
        let stop_id = self.options.stop_ids.contains(&id);
        let end = if stop_id { Some(FinishReason::Stop) } else { end };
        let mut piece = if stop_id { None } else { self.stream.push(id)? };
        // Bytes that wait for the rest of a character may hold a stop string already.
        let held_stop = || -> Result<bool, Error> {
            let held = self.stream.held()?;
            Ok(self.options.stop_strings.iter().any(|stop| held.contains(stop.as_str())))
        };
        if piece.is_none() && (stop_id || !self.options.stop_strings.is_empty() && held_stop()?) {
            piece = self.stream.finish()?;
        }
        if self.write(piece, on_text) {
            return Ok(());
        }
        if let Some(reason) = end {
            let rest = self.stream.finish()?;
            if !self.write(rest, on_text) {
                emit(&mut self.out.text, &self.stops.finish(), on_text);
                (self.ended, self.out.finish_reason) = (true, reason);
            }
        }
        Ok(())
    }

    /// Adds a piece of text; true if a stop string ends it.
    fn write(&mut self, piece: Option<String>, on_text: &mut dyn FnMut(&str)) -> bool {
        let Some(piece) = piece else { return false };
        let result = self.stops.push(&piece);
        emit(&mut self.out.text, &result.emit, on_text);
        if result.stopped.is_some() {
            (self.ended, self.out.finish_reason) = (true, FinishReason::Stop);
        }
        self.ended
    }
}

fn emit(text: &mut String, piece: &str, on_text: &mut dyn FnMut(&str)) {
    if !piece.is_empty() {
        text.push_str(piece);
        on_text(piece);
    }
}
