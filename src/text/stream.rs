//! Text from ids that arrive one at a time.

use super::{Error, Tokenizer};

/// Turns ids into text as they come, in whole characters.
///
/// What all calls return, joined, is exactly `decode` of all ids: the spaces in front of words, the bytes of a character
/// that is spread over tokens, and U+FFFD in the place of bytes that are not UTF-8 included. Text is held back only
/// while a later token could change it:
///
/// - the end of the text, while it may be the beginning of a character;
/// - tokens that stand for one byte each (`<0xE2>`), until a token of another kind follows: the decoder reads their
///   run as a whole, and one wrong byte makes every byte of it U+FFFD.
///
/// ```text
/// ids      ▁Hi   <0xF0> <0x9F> <0x99> <0x82>   !
/// push     Hi                                  🙂!
/// ```
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The tokens that led to the last text handed out, then those since. A decoder treats the first token of a text
    /// differently (it strips its space), so new tokens are never decoded without one in front of them.
    ids: Vec<u32>,
    /// How many of `ids` were there when the text was last handed out to its end.
    settled: usize,
    /// How many bytes of the text of `ids` have been handed out.
    emitted: usize,
}

impl<'a> TextStream<'a> {
    /// A stream that leaves special tokens out.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, skip_special: true, ids: Vec::new(), settled: 0, emitted: 0 }
    }

    /// A stream that shows special tokens (`</s>`) as text.
    pub fn keeping_special(tokenizer: &'a Tokenizer) -> Self {
        Self { skip_special: false, ..Self::new(tokenizer) }
    }

    /// Takes the next id; returns the text that is certain now and was not before.
    ///
    /// # Errors
    /// [`Error::Decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>, Error> {
        let Some(token) = self.tokenizer.token(id) else { return Ok(None) };
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(None);
        }
        self.ids.push(id);
        if self.tokenizer.is_byte(&token) {
            return Ok(None);
        }

        let text = self.tokenizer.decode(&self.ids, false)?;
        // Of bytes that are no character only the last few can still become one.
        let certain = text.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(&text);
        let new = certain.get(self.emitted..).unwrap_or_default().to_owned();
        self.emitted += new.len();

        if !new.is_empty() && certain.len() == text.len() {
            self.ids.drain(..self.settled);
            self.settled = self.ids.len();
            self.emitted = self.tokenizer.decode(&self.ids, false)?.len();
        }
        Ok(Some(new).filter(|new| !new.is_empty()))
    }

    /// The text that is held back, as it would be if the ids ended here.
    ///
    /// # Errors
    /// [`Error::Decode`].
    pub fn held(&self) -> Result<String, Error> {
        let text = self.tokenizer.decode(&self.ids, false)?;
        Ok(text.get(self.emitted..).unwrap_or_default().to_owned())
    }

    /// The text held back so far, for the end of a generation. A part of a character becomes U+FFFD.
    ///
    /// # Errors
    /// [`Error::Decode`].
    pub fn finish(&mut self) -> Result<Option<String>, Error> {
        let text = self.tokenizer.decode(&self.ids, false)?;
        let rest = text.get(self.emitted..).unwrap_or_default().to_owned();
        self.emitted += rest.len();
        Ok(Some(rest).filter(|rest| !rest.is_empty()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tokenizer::tests::fixture;
    use super::*;

    /// What each push returned, then what `finish` did.
    fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<Option<String>> {
        let mut stream = TextStream::new(tokenizer);
        let mut pieces: Vec<_> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        assert_eq!(stream.finish().unwrap(), None, "finish is done once");
        pieces
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn a_character_over_four_tokens_comes_whole() {
        let tokenizer = fixture("byte_level");
        let ids = tokenizer.encode("a🙂!", false).unwrap();
        assert_eq!(ids.len(), 6);
        assert_eq!(pieces(&tokenizer, &ids), [some("a"), None, None, None, some("🙂"), some("!"), None]);
    }

    #[test]
    fn byte_tokens_come_when_their_run_has_ended() {
        let tokenizer = fixture("byte_tokens");
        let ids = tokenizer.encode("a🙂!", false).unwrap();
        let tokens: Vec<_> = ids.iter().map(|id| tokenizer.token(*id).unwrap()).collect();
        assert_eq!(tokens, ["▁a", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<0x21>"]);
        assert_eq!(pieces(&tokenizer, &ids), [some("a"), None, None, None, None, None, some("🙂!")]);
    }

    #[test]
    fn half_a_character_is_replaced_at_the_end_only() {
        let tokenizer = fixture("byte_level");
        let mut ids = tokenizer.encode("a🙂", false).unwrap();
        ids.pop();
        assert_eq!(pieces(&tokenizer, &ids), [some("a"), None, None, None, some("\u{FFFD}")]);
        ids.extend(tokenizer.encode("b", false).unwrap());
        assert_eq!(pieces(&tokenizer, &ids), [some("a"), None, None, None, some("\u{FFFD}b"), None]);
    }

    #[test]
    fn only_the_first_space_of_a_text_is_the_tokenizers() {
        let tokenizer = fixture("byte_tokens");
        let [space, on] = ["▁", "▁on"].map(|token| tokenizer.id(token).unwrap());
        assert_eq!(pieces(&tokenizer, &[on, on]), [some("on"), some(" on"), None]);
        assert_eq!(pieces(&tokenizer, &[space, on]), [None, some(" on"), None]);
        assert_eq!(pieces(&tokenizer, &[on, 2, 1, on]), [some("on"), None, None, some(" on"), None]);
        assert_eq!(pieces(&tokenizer, &[on, space, space, on]), [some("on"), some(" "), some(" "), some(" on"), None]);
    }

    #[test]
    fn special_tokens_are_shown_on_request() {
        let tokenizer = fixture("byte_level");
        let mut stream = TextStream::keeping_special(&tokenizer);
        assert_eq!(stream.push(2).unwrap(), some("</s>"));
        assert_eq!(TextStream::new(&tokenizer).push(2).unwrap(), None);
    }

    #[test]
    fn ids_that_are_no_tokens_have_no_text() {
        assert_eq!(pieces(&fixture("byte_level"), &[99_999]), [None, None]);
    }

    proptest! {
        #[test]
        fn the_pieces_joined_are_the_decoded_text(
            // Few ids, so that characters, runs of bytes and special tokens meet often.
            ids in prop::collection::vec(prop_oneof![0u32..6, 100u32..262, 262u32..360], 0..40),
            base in prop_oneof![Just("byte_level"), Just("byte_tokens")],
            keep_special: bool,
        ) {
            let tokenizer = fixture(base);
            let mut stream = TextStream { skip_special: !keep_special, ..TextStream::new(&tokenizer) };
            let mut text = String::new();
            for id in &ids {
                text.extend(stream.push(*id).unwrap());
            }
            text.extend(stream.finish().unwrap());
            prop_assert_eq!(text, tokenizer.decode(&ids, !keep_special).unwrap());
        }

        #[test]
        fn text_that_was_encoded_never_shows_a_replacement(words in "[a-e é🙂日\n]{0,12}") {
            let tokenizer = fixture("byte_level");
            let ids = tokenizer.encode(&words, false).unwrap();
            let pieces = pieces(&tokenizer, &ids);
            prop_assert!(pieces.iter().flatten().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
            prop_assert_eq!(pieces.into_iter().flatten().collect::<String>(), words);
        }
    }
}
