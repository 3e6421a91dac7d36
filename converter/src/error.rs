//! The one error type of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong with a checkpoint. Every message names the file, what was required, what was found and, where it
/// helps, what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation on a file or folder.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was being done, as a present participle (`reading`).
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what its format says it must be (truncated, overlapping offsets, not JSON, …).
    #[error("{}: {what}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what was required.
        what: String,
    },
    /// A value of `config.json` (or of a GGUF's metadata) is missing, absurd, or not supported.
    #[error("{}: {key}: {what}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The key, as written in the file.
        key: String,
        /// What is wrong, what was found, and what is supported.
        what: String,
    },
    /// One tensor has the wrong shape or type, or cannot be converted.
    #[error("{}: parameter {name}: {what}", path.display())]
    Tensor {
        /// The file or folder that holds it.
        path: PathBuf,
        /// Its name there.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The tensors of a checkpoint are not the parameters that its configuration requires.
    #[error("{}: {}", path.display(), mismatch(missing, unexpected))]
    Mismatch {
        /// The checkpoint.
        path: PathBuf,
        /// All parameters that are not there, each with its expected shape.
        missing: Vec<String>,
        /// All tensors that no parameter uses, each with its shape.
        unexpected: Vec<String>,
    },
    /// The destination of a conversion cannot be used.
    #[error("{}: {what}", path.display())]
    Destination {
        /// The destination as given.
        path: PathBuf,
        /// Why, and what to do.
        what: String,
    },
    /// The caller asked to stop; nothing was left under the final name.
    #[error("cancelled; nothing was written under the final name")]
    Cancelled,
}

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err`: an [`Error::Io`] about `path`; `action` reads like `reading`.
    pub fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { path: path.to_path_buf(), action, source }
    }

    /// An [`Error::Format`] about `path`.
    pub fn format(path: &Path, what: impl Into<String>) -> Error {
        Error::Format { path: path.to_path_buf(), what: what.into() }
    }

    /// An [`Error::Config`] about `key` of `path`.
    pub fn config(path: &Path, key: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Config { path: path.to_path_buf(), key: key.into(), what: what.into() }
    }

    /// An [`Error::Tensor`] about the tensor `name` of `path`.
    pub fn tensor(path: &Path, name: impl Into<String>, what: impl Into<String>) -> Error {
        Error::Tensor { path: path.to_path_buf(), name: name.into(), what: what.into() }
    }
}

/// Both lists in one sentence.
fn mismatch(missing: &[String], unexpected: &[String]) -> String {
    let parts = [(missing, "parameter", "missing"), (unexpected, "tensor", "that this model does not use")];
    let parts = parts.into_iter().filter(|(names, ..)| !names.is_empty());
    let text = parts.map(|(names, noun, what)| {
        let s = if names.len() == 1 { "" } else { "s" };
        format!("{} {noun}{s} {what}: {}", names.len(), first(names))
    });
    text.collect::<Vec<_>>().join("; ") + ". The configuration and the weights do not belong together"
}

/// The first few names and how many more there are.
fn first(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(", … and {} more", names.len() - SHOWN));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_with_a_count() {
        let missing = (0..6).map(|i| format!("t{i}")).collect();
        let error = Error::Mismatch { path: "model".into(), missing, unexpected: vec!["x [2]".into()] };
        assert_eq!(
            error.to_string(),
            "model: 6 parameters missing: t0, t1, t2, t3, … and 2 more; 1 tensor that this model does not use: x [2]. \
             The configuration and the weights do not belong together"
        );
    }
}
