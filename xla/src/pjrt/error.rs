//! What can go wrong between this process and a plugin.

use std::path::PathBuf;

/// Any failure of the PJRT layer. Messages say what was asked, what was found and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be opened as a shared library of this machine.
    #[error("cannot open the PJRT plugin {}: {reason}", path.display())]
    Open {
        /// The file that was given.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A shared library, but not a PJRT plugin.
    #[error("{} is not a PJRT plugin: {reason}", path.display())]
    NotAPlugin {
        /// The file that was given.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// The plugin and this program do not speak the same version of the API.
    #[error(
        "plugin {} has PJRT API {}.{} and this program speaks {}.{}: {reason}",
        path.display(), found.0, found.1, ours.0, ours.1
    )]
    VersionSkew {
        /// The plugin's file.
        path: PathBuf,
        /// Its version, major and minor.
        found: (i32, i32),
        /// Ours.
        ours: (i32, i32),
        /// What does not fit and what to install.
        reason: String,
    },
    /// The plugin has no such function or extension.
    #[error("plugin {} (PJRT API {}.{}) has no {function}", path.display(), api.0, api.1)]
    Unsupported {
        /// The function or extension of the API.
        function: &'static str,
        /// The plugin's file.
        path: PathBuf,
        /// Its version, major and minor.
        api: (i32, i32),
    },
    /// The plugin refused a call, or work on the device failed.
    #[error("cannot {doing}: {message} ({code:?})")]
    Plugin {
        /// What was being done.
        doing: &'static str,
        /// The plugin's status code.
        code: Code,
        /// The plugin's message.
        message: String,
    },
    /// A call that was refused before it reached the plugin.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// The status code, where the plugin gave one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::Plugin { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// True where the plugin does not have what was asked: no such function, or it answered "unimplemented".
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Error::Unsupported { .. } | Error::Plugin { code: Code::Unimplemented, .. })
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Error::Invalid(message.into())
    }
}

/// Status codes of PJRT, which are those of Abseil and gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Code {
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl Code {
    pub(super) fn from_raw(raw: i32) -> Self {
        use Code::*;
        const ALL: [Code; 16] = [
            Cancelled,
            Unknown,
            InvalidArgument,
            DeadlineExceeded,
            NotFound,
            AlreadyExists,
            PermissionDenied,
            ResourceExhausted,
            FailedPrecondition,
            Aborted,
            OutOfRange,
            Unimplemented,
            Internal,
            Unavailable,
            DataLoss,
            Unauthenticated,
        ];
        usize::try_from(raw - 1).ok().and_then(|i| ALL.get(i).copied()).unwrap_or(Unknown)
    }
}
