//! The tokenizer's files with further tokens. Nothing that was in them changes, not even a space.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::AddedTokens;
use crate::error::{Error, Result};
use crate::tokenizer::from_sentencepiece_with;
use crate::tokenizer::json::added_token;

/// Content of files by name.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// What is read of a `tokenizer.json`.
#[derive(Deserialize)]
struct Tokenizer<'a> {
    #[serde(borrow)]
    added_tokens: &'a RawValue,
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
struct Model<'a> {
    /// Ids by token, or tokens in the order of their ids, each the first of a list.
    #[serde(borrow)]
    vocab: &'a RawValue,
}

/// An entry of `added_tokens`.
#[derive(Deserialize)]
struct Known<'a> {
    id: usize,
    #[serde(borrow)]
    content: Cow<'a, str>,
}

/// What is read of a `tokenizer_config.json`.
#[derive(Deserialize)]
struct Config<'a> {
    #[serde(borrow)]
    added_tokens_decoder: Option<&'a RawValue>,
}

/// Adds tokens to the tokenizer in `folder`, whose files are `files`. The result is the files that changed, and the ids
/// of the new tokens in their order: those that follow the highest that a token has, as the `tokenizers` library gives them
/// whatever a file says. In a model with more rows than tokens they are the ids of rows that no token had.
///
/// # Errors
/// [`Error::Format`] where there is no tokenizer to extend, it has one of the tokens already, or its ids have gaps; those
/// of [`from_sentencepiece_with`].
pub(crate) fn extend_tokenizer(added: &AddedTokens, folder: &Path, files: &Files) -> Result<(Files, Range<usize>)> {
    let [json_path, config_path, list_path] =
        ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"].map(|name| folder.join(name));
    let text = |path: &Path| {
        let bytes = path.file_name().and_then(|name| files.get(name.to_str()?));
        let text = bytes.map(|bytes| str::from_utf8(bytes).map_err(|_| Error::format(path, "not UTF-8 text")));
        text.transpose()
    };
    let config = text(&config_path)?;
    let tokenizer = match (text(&json_path)?, files.get("tokenizer.model")) {
        (Some(tokenizer), _) => Cow::from(tokenizer),
        (None, Some(model)) => {
            let settings = config.map_or(Ok(Value::Null), |config| parse(config, &config_path))?;
            format!("{:#}\n", from_sentencepiece_with(model, &settings)?).into()
        }
        (None, None) => {
            let what = "expected tokenizer.json or tokenizer.model, to add tokens to; found neither";
            return Err(Error::format(folder, what));
        }
    };

    let found: Tokenizer<'_> = parse(&tokenizer, &json_path)?;
    let mut known = vocabulary(found.model.vocab.get(), &json_path)?;
    let list: Vec<Known<'_>> = parse(found.added_tokens.get(), &json_path)?;
    known.extend(list.into_iter().map(|token| (token.content, token.id)));
    for token in &added.tokens {
        if let Some(id) = known.get(token.content.as_str()) {
            let what = format!("{}: the tokenizer has the token {:?} already, as {id}", token.place, token.content);
            return Err(Error::format(&added.file, what));
        }
    }
    let ids = known.len()..known.len() + added.tokens.len();
    let check = |taken: &mut dyn Iterator<Item = usize>, path: &Path| match taken.max() {
        Some(highest) if highest >= ids.start => {
            let what = format!(
                "the id {highest} is taken, but {} has {} tokens, so that the next one gets the id {1}; save the tokenizer with transformers, so that its files agree",
                json_path.display(),
                ids.start
            );
            Err(Error::format(path, what))
        }
        _ => Ok(()),
    };
    check(&mut known.values().copied(), &json_path)?;

    let mut changed = Files::new();
    let tokens = || ids.clone().zip(&added.tokens);
    let entries = tokens().map(|(id, token)| {
        let rest = added_token(&token.content, token.special).to_string();
        format!("{{\"id\":{id},{}", &rest[1..])
    });
    changed.insert("tokenizer.json".into(), append(&tokenizer, found.added_tokens.get(), entries));
    if let Some(config) = config
        && let Some(decoder) = parse::<Config<'_>>(config, &config_path)?.added_tokens_decoder
    {
        let known: HashMap<usize, IgnoredAny> = parse(decoder.get(), &config_path)?;
        check(&mut known.into_keys(), &config_path)?;
        let entries = tokens().map(|(id, token)| format!("\"{id}\":{}", added_token(&token.content, token.special)));
        changed.insert("tokenizer_config.json".into(), append(config, decoder.get(), entries));
    }
    if let Some(list) = text(&list_path)? {
        let known: HashMap<String, usize> = parse(list, &list_path)?;
        check(&mut known.into_values(), &list_path)?;
        let entries = tokens().map(|(id, token)| format!("{}:{id}", json!(token.content)));
        changed.insert("added_tokens.json".into(), append(list, list.trim(), entries));
    }
    Ok((changed, ids))
}

/// The ids of a model's tokens.
fn vocabulary<'a>(vocab: &'a str, path: &Path) -> Result<HashMap<Cow<'a, str>, usize>> {
    /// A key or string without a copy where it has no escapes.
    #[derive(Deserialize, PartialEq, Eq, Hash)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

    if vocab.starts_with('[') {
        let list: Vec<(Text<'a>, IgnoredAny)> = parse(vocab, path)?;
        return Ok(list.into_iter().enumerate().map(|(id, (token, _))| (token.0, id)).collect());
    }
    let ids: HashMap<Text<'a>, usize> = parse(vocab, path)?;
    Ok(ids.into_iter().map(|(token, id)| (token.0, id)).collect())
}

/// `text` with further entries at the end of `list`, a JSON list or object that is a part of it.
fn append(text: &str, list: &str, entries: impl Iterator<Item = String>) -> Vec<u8> {
    let kept = list[..list.len() - 1].trim_end();
    let start = list.as_ptr().addr() - text.as_ptr().addr();
    let entries: Vec<String> = entries.map(|entry| format!("\n    {entry}")).collect();
    let comma = if kept.len() > 1 { "," } else { "" };
    let [before, after] = [&text[..start + kept.len()], &text[start + list.len() - 1..]];
    format!("{before}{comma}{}\n  {after}", entries.join(",")).into_bytes()
}

fn parse<'a, T: Deserialize<'a>>(text: &'a str, path: &Path) -> Result<T> {
    serde_json::from_str(text).map_err(|e| Error::format(path, format!("not what a tokenizer's file must be: {e}")))
}
