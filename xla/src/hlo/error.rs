//! Why the bytes of a program could not be read.

/// What was wrong with a serialized program. All of them mean damaged bytes or a format that is not known here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HloError {
    /// The format is not one of those read here.
    #[error(
        "the plugin gives its optimized program as \"{format}\"; only `hlo` and `hlo_with_config` (serialized \
         HloModuleProto) can be read"
    )]
    Format {
        /// The format that was found.
        format: String,
    },

    /// The bytes are not a protocol-buffer message of this kind.
    #[error("damaged HLO program: {message}, {trouble}")]
    Damaged {
        /// The message that was being read, by its name in `hlo.proto` or `xla_data.proto`.
        message: &'static str,
        /// What was found there, with its offset in that message.
        trouble: String,
    },

    /// An id names nothing, or what it names is called in a circle.
    #[error("damaged HLO program: {what} {id} of {holder} {trouble}")]
    Reference {
        /// What kind of thing the id should name.
        what: &'static str,
        /// The id.
        id: i64,
        /// The instruction, computation or module that holds it.
        holder: String,
        /// What is the matter with it.
        trouble: &'static str,
    },
}
