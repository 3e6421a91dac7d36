//! Tokenizer and chat template of a checkpoint, in whichever form it lies.

use converter::{Checkpoint, Kind};
use serde_json::Value;

use super::{ChatTemplate, Tokenizer};
use crate::Error;

impl Tokenizer {
    /// The tokenizer of a folder's files, or of a GGUF's metadata.
    ///
    /// # Errors
    /// A file that is missing or damaged, named in the error.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Tokenizer, Error> {
        if checkpoint.kind() != Kind::Gguf {
            let convert = |bytes: &[u8]| converter::tokenizer::from_sentencepiece(bytes).map_err(Into::into);
            return Ok(Tokenizer::from_dir_with(checkpoint.path(), convert)?);
        }
        let config = side_json(checkpoint, "tokenizer_config.json")?;
        match side_json(checkpoint, "tokenizer.json")? {
            Some(tokenizer) => Ok(Tokenizer::from_json(&tokenizer, config.as_ref())?),
            None => Err(super::Error::NoTokenizer { dir: checkpoint.path().to_path_buf() }.into()),
        }
    }
}

impl ChatTemplate {
    /// The chat template of a folder's files, or of a GGUF's metadata.
    ///
    /// # Errors
    /// [`super::Error::NoChatTemplate`] where the model has none; a template that cannot be parsed.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<ChatTemplate, Error> {
        if checkpoint.kind() != Kind::Gguf {
            return Ok(ChatTemplate::from_dir(checkpoint.path())?);
        }
        let config = side_json(checkpoint, "tokenizer_config.json")?.unwrap_or(Value::Null);
        Ok(ChatTemplate::from_config(&config)?)
    }
}

fn side_json(checkpoint: &Checkpoint, name: &str) -> Result<Option<Value>, Error> {
    let Some(bytes) = checkpoint.side_file(name)? else { return Ok(None) };
    let path = checkpoint.path().join(name);
    Ok(Some(serde_json::from_slice(&bytes).map_err(|source| super::Error::Json { path, source })?))
}
