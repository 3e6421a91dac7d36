//! How much the cache may hold.

use crate::{Error, bytes};

/// The variable that sets the limit.
pub const VARIABLE: &str = "XLLAMA_EXECUTABLE_CACHE_BYTES";

/// Without the variable.
const DEFAULT: u64 = 4 << 30;

/// The limit in bytes; 0 means that nothing is stored.
///
/// # Errors
/// [`Error::Variable`] if the variable is no number of bytes.
pub fn limit() -> Result<u64, Error> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(DEFAULT) };
    let text = text.to_string_lossy();
    bytes::parse(&text).map_err(|why| Error::Variable {
        name: VARIABLE,
        what: format!("must be a number of bytes such as 512MiB or 4GiB, or 0 to store nothing; found {text:?}: {why}"),
    })
}
