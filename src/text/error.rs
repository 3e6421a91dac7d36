//! What can go wrong between text and tokens.

use std::error::Error as StdError;
use std::path::PathBuf;

/// An error of this module: what was required, what was found, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder holds neither form of a tokenizer.
    #[error(
        "{}: a model folder needs tokenizer.json or tokenizer.model, and has neither; copy one from where the model came from",
        dir.display()
    )]
    NoTokenizer {
        /// The folder that was searched.
        dir: PathBuf,
    },

    /// A file is there but cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A file that should hold JSON does not.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing ended.
        source: serde_json::Error,
    },

    /// The tokenizer's file is JSON, but not a tokenizer.
    #[error("{origin}: not a tokenizer that can be used: {source}")]
    BadTokenizer {
        /// The file, or what else the tokenizer came from.
        origin: String,
        /// What the parser said.
        source: Box<dyn StdError + Send + Sync>,
    },

    /// A value in `tokenizer_config.json` has the wrong type.
    #[error("tokenizer_config.json: {key} should be {expected}, found {found}")]
    BadConfig {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },

    /// Text could not be turned into tokens.
    #[error("the tokenizer cannot encode this text: {0}")]
    Encode(#[source] Box<dyn StdError + Send + Sync>),

    /// Tokens could not be turned into text.
    #[error("the tokenizer cannot decode these tokens: {0}")]
    Decode(#[source] Box<dyn StdError + Send + Sync>),

    /// A stop string without a character would stop before the first token.
    #[error("stop string {index} is empty; a stop string needs at least one character")]
    EmptyStop {
        /// Its place in the list, from 0.
        index: usize,
    },

    /// The model has no chat template.
    #[error(
        "{}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); a model without one continues text and does not chat",
        dir.display()
    )]
    NoChatTemplate {
        /// The folder, or what else the template was sought in.
        dir: PathBuf,
    },

    /// The template does not parse.
    #[error("the chat template does not parse, line {line}: {message}")]
    TemplateSyntax {
        /// The line of the template, from 1.
        line: usize,
        /// What the parser expected.
        message: String,
    },

    /// The template called `raise_exception`: the conversation is not one that the model knows.
    #[error("the chat template refused: {message}")]
    TemplateRefused {
        /// The template's own words.
        message: String,
    },

    /// The template failed while it ran.
    #[error("the chat template failed, line {line}: {message}")]
    TemplateFailed {
        /// The line of the template, from 1.
        line: usize,
        /// What went wrong.
        message: String,
    },

    /// A conversation without a message.
    #[error("a chat template needs at least one message, found none")]
    NoMessages,
}
