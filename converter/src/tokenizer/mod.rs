//! Tokenizers of other formats as the `tokenizer.json` of Hugging Face's `tokenizers` library.
//!
//! - [`from_sentencepiece`]: the SentencePiece file `tokenizer.model` of Llama 1 and 2 and their kin.
//! - the vocabulary of a GGUF file, through [`crate::gguf::GgufFile::tokenizer_files`].

pub(crate) mod byte_level;
pub(crate) mod json;
mod merges;
mod protobuf;
pub(crate) mod sentencepiece;

use std::path::Path;

use serde_json::Value as Json;

use crate::error::Error;

/// Turns the bytes of a SentencePiece `tokenizer.model` into the contents of a `tokenizer.json`.
///
/// The result encodes as SentencePiece itself does, with what transformers adds for Llama: control pieces and
/// `<unk>` in the text are recognized, user-defined pieces become added tokens, and the beginning-of-sequence token
/// is put in front. That is transformers' behaviour for folders with `"legacy": true`, and of its SentencePiece-based
/// class; for other settings see [`from_sentencepiece_with`].
///
/// # Errors
/// [`Error::Format`] if the bytes are not a SentencePiece model, or one of a kind (word, character, whitespace as
/// suffix) that cannot be expressed.
pub fn from_sentencepiece(model: &[u8]) -> Result<Json, Error> {
    from_sentencepiece_with(model, &Json::Null)
}

/// The same, with the settings of the folder's `tokenizer_config.json` (`null` for none).
///
/// - `add_bos_token` (default true) and `add_eos_token` (default false);
/// - `add_prefix_space` (default: what the model file says): whether a space is put in front of the text;
/// - `legacy` (default true): if false, that space goes only in front of the whole text, not after every special
///   token, and not where the text begins with a space already, as in transformers' fast tokenizer.
///
/// # Errors
/// As [`from_sentencepiece`]; [`Error::Config`] for a setting that is not a boolean.
pub fn from_sentencepiece_with(model: &[u8], tokenizer_config: &Json) -> Result<Json, Error> {
    let setting = |key: &str, default: bool| match tokenizer_config.get(key) {
        None | Some(Json::Null) => Ok(default),
        Some(Json::Bool(value)) => Ok(*value),
        Some(other) => {
            Err(Error::config(Path::new("tokenizer_config.json"), key, format!("must be a boolean, found {other}")))
        }
    };
    let format_error = |what: String| Error::format(Path::new("tokenizer.model"), what);
    let mut model = protobuf::parse_model(model).map_err(format_error)?;
    model.add_bos = setting("add_bos_token", model.add_bos)?;
    model.add_eos = setting("add_eos_token", model.add_eos)?;
    model.add_dummy_prefix = setting("add_prefix_space", model.add_dummy_prefix)?;
    model.legacy = setting("legacy", model.legacy)?;
    model.to_json().map_err(format_error)
}
