//! Text in and out of the model: tokens, streamed text, stop strings, chat templates.
//!
//! Everything here agrees with `transformers`: the ids of a prompt, the text of a list of ids, the
//! prompt that a conversation becomes. What was compared, and with which version, stands above each
//! test. Nothing in this module knows a model or a device.
//!
//! - [`Tokenizer`]: text to ids and back, from the files of a Hugging Face folder.
//! - [`TextStream`]: ids one at a time to text, in whole characters only.
//! - [`StopMatcher`]: ends a text at a stop string, even one that spans several tokens.
//! - [`ChatTemplate`]: a conversation to the prompt that the model was trained on.

mod chat_template;
mod clock;
mod error;
mod of_checkpoint;
mod python;
mod stop;
mod stream;
mod tokenizer;

pub use chat_template::{ChatTemplate, Message, RenderOptions};
pub use error::Error;
pub use stop::{StopMatcher, StopResult};
pub use stream::TextStream;
pub use tokenizer::Tokenizer;
