//! Stop strings that may span tokens.

use super::Error;

/// Ends a streamed text at the first stop string.
///
/// The first is the one that is complete first; of two complete at the same character, the longer. What could
/// still become a stop string is withheld, so a caller never prints part of one. The result does not depend on how
/// the text is cut into pieces.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that came in and has not been handed out: a proper prefix of some stop string.
    withheld: String,
    stopped: Option<usize>,
}

/// What one piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopResult {
    /// Text that is certainly before any stop string.
    pub emit: String,
    /// The index of the stop string that ended the text, once one has.
    pub stopped: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these strings; with none it hands every piece on at once.
    ///
    /// # Errors
    /// [`Error::EmptyStop`] where a string is empty.
    pub fn new(stops: Vec<String>) -> Result<Self, Error> {
        if let Some(index) = stops.iter().position(String::is_empty) {
            return Err(Error::EmptyStop { index });
        }
        Ok(Self { stops, withheld: String::new(), stopped: None })
    }

    /// Takes the next piece of text. After a stop string nothing is emitted any more.
    pub fn push(&mut self, piece: &str) -> StopResult {
        if self.stopped.is_some() {
            return StopResult { emit: String::new(), stopped: self.stopped };
        }
        let new_from = self.withheld.len();
        let mut text = std::mem::take(&mut self.withheld);
        text.push_str(piece);

        for (at, c) in text[new_from..].char_indices() {
            let end = new_from + at + c.len_utf8();
            let complete = self.stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
            // Of equal strings the first: max_by_key keeps the last, so look from the end.
            if let Some((index, stop)) = complete.rev().max_by_key(|(_, stop)| stop.len()) {
                text.truncate(end - stop.len());
                self.stopped = Some(index);
                return StopResult { emit: text, stopped: self.stopped };
            }
        }

        let keep = text
            .char_indices()
            .map(|(at, _)| at)
            .find(|&at| self.stops.iter().any(|stop| stop.starts_with(&text[at..])))
            .unwrap_or(text.len());
        self.withheld = text.split_off(keep);
        StopResult { emit: text, stopped: None }
    }

    /// The text withheld so far, for a generation that ends otherwise than by a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.withheld)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|s| s.to_string()).collect()).unwrap()
    }

    /// The definition, over the whole text at once.
    fn naive(stops: &[String], text: &str) -> (String, Option<usize>) {
        for (at, c) in text.char_indices() {
            let end = at + c.len_utf8();
            let mut best: Option<usize> = None;
            for (i, stop) in stops.iter().enumerate() {
                if text[..end].ends_with(stop.as_str()) && best.is_none_or(|b| stop.len() > stops[b].len()) {
                    best = Some(i);
                }
            }
            if let Some(i) = best {
                return (text[..end - stops[i].len()].to_owned(), Some(i));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn a_stop_string_over_three_pieces_is_never_shown() {
        let mut m = matcher(&["\nUser:"]);
        assert_eq!(m.push("Hello."), StopResult { emit: "Hello.".into(), stopped: None });
        assert_eq!(m.push("\nUs"), StopResult { emit: "".into(), stopped: None });
        assert_eq!(m.push("er"), StopResult { emit: "".into(), stopped: None });
        assert_eq!(m.push(": more"), StopResult { emit: "".into(), stopped: Some(0) });
        assert_eq!(m.push("again"), StopResult { emit: "".into(), stopped: Some(0) });
        assert_eq!(m.finish(), "");
    }

    #[test]
    fn a_false_start_is_released() {
        let mut m = matcher(&["\nUser:"]);
        assert_eq!(m.push("a\nUse").emit, "a");
        assert_eq!(m.push("ful").emit, "\nUseful");
        assert_eq!(m.push("\n").emit, "");
        assert_eq!(m.finish(), "\n");
    }

    #[test]
    fn the_first_complete_wins_and_then_the_longest() {
        assert_eq!(matcher(&["abcd", "bc"]).push("abcd"), StopResult { emit: "a".into(), stopped: Some(1) });
        assert_eq!(matcher(&["c", "abc"]).push("abc"), StopResult { emit: "".into(), stopped: Some(1) });
        assert_eq!(matcher(&["c", "c"]).push("abc"), StopResult { emit: "ab".into(), stopped: Some(0) });
    }

    #[test]
    fn without_stop_strings_nothing_is_withheld() {
        assert_eq!(matcher(&[]).push("ab"), StopResult { emit: "ab".into(), stopped: None });
    }

    #[test]
    fn an_empty_stop_string_is_an_error() {
        let error = StopMatcher::new(vec!["a".into(), "".into()]).unwrap_err();
        assert_eq!(error.to_string(), "stop string 1 is empty; a stop string needs at least one character");
    }

    proptest! {
        #[test]
        fn any_cut_gives_what_the_definition_gives(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,5}", 0..8),
        ) {
            let text: String = pieces.concat();
            let mut m = StopMatcher::new(stops.clone()).unwrap();
            let mut out = String::new();
            let mut stopped = None;
            for piece in &pieces {
                let result = m.push(piece);
                out.push_str(&result.emit);
                stopped = result.stopped;
            }
            out.push_str(&m.finish());
            prop_assert_eq!((out, stopped), naive(&stops, &text));
        }

        #[test]
        fn what_could_become_a_stop_string_and_nothing_else_is_withheld(
            stops in prop::collection::vec("[ab]{1,4}", 1..4),
            text in "[ab]{0,12}",
        ) {
            let mut m = StopMatcher::new(stops.clone()).unwrap();
            let mut shown = 0;
            for end in 1..=text.len() {
                let result = m.push(&text[end - 1..end]);
                if result.stopped.is_some() {
                    break;
                }
                shown += result.emit.len();
                let could_be = |from: &usize| stops.iter().any(|stop| stop.starts_with(&text[*from..end]));
                prop_assert_eq!(shown, (0..end).find(could_be).unwrap_or(end));
            }
        }
    }
}
