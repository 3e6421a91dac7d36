//! The list of tokens that a user asks to add.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// Tokens to add, in the order of their ids, and the file that names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedTokens {
    pub(super) file: PathBuf,
    pub(super) tokens: Vec<AddedToken>,
}

/// A token that is found in text before anything else is, as it stands there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedToken {
    /// Its text.
    pub content: String,
    /// Whether it is left out of decoded text, as the tokens that begin and end a text are.
    pub special: bool,
    /// Where in its file it stands: `line 3`.
    pub(super) place: String,
}

impl AddedTokens {
    /// Reads a file of tokens; see [`AddedTokens::parse`].
    ///
    /// # Errors
    /// [`Error::Io`], and those of [`AddedTokens::parse`].
    pub fn read(file: &Path) -> Result<AddedTokens> {
        let text = fs::read(file).map_err(Error::io(file, "reading"))?;
        let text = String::from_utf8(text).map_err(|_| Error::format(file, "not UTF-8 text"))?;
        AddedTokens::parse(&text, file)
    }

    /// One token a line, taken literally; blank lines are passed over. A line that begins with `{"` is the long form
    /// `{"content": "<tool>", "special": true}`. Or all of it is a JSON list of strings and long forms. `file` is named
    /// in errors.
    ///
    /// # Errors
    /// [`Error::Format`], naming the line, for a long form that is none, an empty token, or one that is there twice; also
    /// where there is no token at all.
    pub fn parse(text: &str, file: &Path) -> Result<AddedTokens> {
        let text = text.trim_start_matches('\u{feff}');
        let fail = |what: String| Error::format(file, what);
        let entries: Vec<(String, Value)> = match serde_json::from_str(text) {
            Ok(Value::Array(list)) => (1..).map(|i| format!("entry {i}")).zip(list).collect(),
            _ if file.extension().is_some_and(|e| e == "json") => {
                return Err(fail("expected a JSON list of tokens; for one token a line, use another extension".into()));
            }
            _ => {
                let lines = (1..).map(|i| format!("line {i}")).zip(text.lines());
                let entry = |(place, line): (String, &str)| match line.starts_with("{\"") {
                    true => match serde_json::from_str(line) {
                        Ok(value) => Ok((place, value)),
                        Err(e) => Err(fail(format!("{place}: not valid JSON: {e}"))),
                    },
                    false => Ok((place, Value::from(line))),
                };
                lines.filter(|(_, line)| !line.trim().is_empty()).map(entry).collect::<Result<_>>()?
            }
        };
        let mut places: HashMap<String, String> = HashMap::new();
        let mut tokens = Vec::with_capacity(entries.len());
        for (place, value) in entries {
            let (content, special) = read(&value).ok_or_else(|| {
                fail(format!(
                    "{place}: expected text or {{\"content\": \"…\", \"special\": true or false}}, found {value}"
                ))
            })?;
            if content.is_empty() {
                return Err(fail(format!("{place}: the token is empty")));
            }
            if let Some(first) = places.insert(content.clone(), place.clone()) {
                return Err(fail(format!("{place}: the token {content:?} stands at {first} already")));
            }
            tokens.push(AddedToken { content, special, place });
        }
        if tokens.is_empty() {
            return Err(fail("expected at least one token, found none".into()));
        }
        Ok(AddedTokens { file: file.to_path_buf(), tokens })
    }

    /// The tokens.
    pub fn tokens(&self) -> &[AddedToken] {
        &self.tokens
    }
}

/// Content and whether it is special.
fn read(value: &Value) -> Option<(String, bool)> {
    if let Value::String(content) = value {
        return Some((content.clone(), false));
    }
    let object = value.as_object()?;
    if object.keys().any(|key| key != "content" && key != "special") {
        return None;
    }
    let special = object.get("special").map_or(Some(false), Value::as_bool)?;
    Some((object.get("content")?.as_str()?.to_string(), special))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<(String, bool, String)>, String> {
        parse_as("tokens.txt", text)
    }

    fn parse_as(file: &str, text: &str) -> Result<Vec<(String, bool, String)>, String> {
        let tokens = AddedTokens::parse(text, Path::new(file)).map_err(|e| e.to_string())?.tokens;
        Ok(tokens.into_iter().map(|t| (t.content, t.special, t.place)).collect())
    }

    fn token(content: &str, special: bool, place: &str) -> (String, bool, String) {
        (content.into(), special, place.into())
    }

    #[test]
    fn lines_are_literal_and_blank_ones_are_passed_over() {
        let text = "\u{feff}<a>\r\n\n \t\n[INST]\n{\"content\": \"<b>\", \"special\": true}\n{x}\n c\n\"d\"";
        let expected = [
            token("<a>", false, "line 1"),
            token("[INST]", false, "line 4"),
            token("<b>", true, "line 5"),
            token("{x}", false, "line 6"),
            token(" c", false, "line 7"),
            token("\"d\"", false, "line 8"),
        ];
        assert_eq!(parse(text), Ok(expected.to_vec()));
    }

    #[test]
    fn a_list_has_strings_and_long_forms() {
        let text = r#"["<a>", {"content": "<b>"}, {"special": true, "content": "\n"}]"#;
        let expected = [token("<a>", false, "entry 1"), token("<b>", false, "entry 2"), token("\n", true, "entry 3")];
        assert_eq!(parse(text), Ok(expected.to_vec()));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, message) in [
            ("a\n\nb\na", "tokens.txt: line 4: the token \"a\" stands at line 1 already"),
            (
                "a\n{\"content\": 3}",
                "tokens.txt: line 2: expected text or {\"content\": \"…\", \"special\": true or false}, found {\"content\":3}",
            ),
            (
                "{\"content\": \"a\", \"lstrip\": true}",
                "tokens.txt: line 1: expected text or {\"content\": \"…\", \"special\": true or false}, found {\"content\":\"a\",\"lstrip\":true}",
            ),
            (
                "{\"content\": \"a\", \"special\": 1}",
                "tokens.txt: line 1: expected text or {\"content\": \"…\", \"special\": true or false}, found {\"content\":\"a\",\"special\":1}",
            ),
            (
                "[\"a\", 7]",
                "tokens.txt: entry 2: expected text or {\"content\": \"…\", \"special\": true or false}, found 7",
            ),
            ("[\"\"]", "tokens.txt: entry 1: the token is empty"),
            ("[\"a\", {\"content\": \"a\"}]", "tokens.txt: entry 2: the token \"a\" stands at entry 1 already"),
            ("\n \n", "tokens.txt: expected at least one token, found none"),
            ("[]", "tokens.txt: expected at least one token, found none"),
        ] {
            assert_eq!(parse(text), Err(message.to_string()), "{text}");
        }
        let error = parse("a\n{\"content\": \"b\"").unwrap_err();
        assert!(error.starts_with("tokens.txt: line 2: not valid JSON: "), "{error}");
        let error = parse_as("tokens.json", "[\"a\"").unwrap_err();
        assert_eq!(error, "tokens.json: expected a JSON list of tokens; for one token a line, use another extension");
    }
}
