//! The first mistake made while a graph was built.

use std::panic::Location;

/// What was wrong, and the line of the caller's code that asked for it.
///
/// Displays as `src/model/attention.rs:41:17: einsum "BSM,MHK->BSHK": axis M is 576 on the left and 512 on the
/// right (in layers.0/attention)`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{location}: {message}{}", if scope.is_empty() { String::new() } else { format!(" (in {scope})") })]
pub struct GraphError {
    /// Where the operation was asked for: the caller's file, line and column.
    pub location: &'static Location<'static>,
    /// The open scopes at that time, joined with `/`.
    pub scope: String,
    /// What was required and what was found.
    pub message: String,
}
