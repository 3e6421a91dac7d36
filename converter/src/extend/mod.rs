//! A larger vocabulary and a longer context: what is asked for, and the `config.json` that says so.
//!
//! The tensors follow in [`Checkpoint::extended`](crate::Checkpoint::extended), the tokenizer's files in [`tokenizer`].

mod tokenizer;
mod tokens;

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use crate::config::{self, RopeExtension};
use crate::error::{Error, Result};
pub(crate) use tokenizer::{Files, extend_tokenizer};
pub use tokens::{AddedToken, AddedTokens};

/// How a model is to be larger than its source. Nothing else of it changes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extension {
    /// Rows of the embedding and of the output head, at least those of the source. Without a value there are as many as
    /// the source and the added tokens need.
    pub vocab_size: Option<usize>,
    /// Tokens that the tokenizer gets. They take the ids that follow its highest, as transformers gives them; in a model with
    /// more rows than tokens these are rows that no token had, and they become new ones.
    pub tokens: Option<AddedTokens>,
    /// A longer context.
    pub rope: Option<RopeExtension>,
}

impl Extension {
    /// Rewrites `config.json`, named `file` in errors; `ids` are those of the added tokens. Whether the result is a
    /// configuration is for its reader to check.
    pub(crate) fn rewrite(&self, config: &mut Value, old: usize, ids: &Range<usize>, file: &Path) -> Result<()> {
        let needed = old.max(ids.end);
        let wanted = self.vocab_size.unwrap_or(needed);
        if wanted < needed {
            let why = match ids.end > old {
                true => format!("the added tokens need ids up to {}", ids.end - 1),
                false => format!("the model has {old} tokens, and none can be taken away"),
            };
            let what = format!("cannot become {wanted}: {why}; ask for at least {needed}");
            return Err(Error::config(file, "vocab_size", what));
        }
        if wanted != old {
            config["vocab_size"] = json!(wanted);
        }
        self.rope.as_ref().map_or(Ok(()), |rope| config::extend(config, rope, file))
    }
}
