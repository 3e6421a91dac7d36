//! The likeliest token.

use kernels::{Isa, argmax};
use xla::pjrt::{CallFrame, FfiError, Handler};

use super::XlaPool;
use crate::generation::sampling::ARGMAX;

/// [`ARGMAX`].
pub(super) struct Argmax;

impl Handler for Argmax {
    const NAME: &'static str = ARGMAX;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        argmax(Isa::detected(), &XlaPool::new(frame), frame.arg(0)?, frame.result(0)?);
        Ok(())
    }
}
