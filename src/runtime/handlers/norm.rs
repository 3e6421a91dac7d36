//! Normalisation.

use kernels::{Isa, rms_norm};
use xla::pjrt::{CallFrame, FfiError, Handler};

use super::XlaPool;
use super::linear::values;
use crate::model::RMS_NORM;

/// [`RMS_NORM`].
pub(super) struct RmsNorm;

impl Handler for RmsNorm {
    const NAME: &'static str = RMS_NORM;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let (epsilon, offset) = (frame.attribute("epsilon")?, frame.attribute("offset")?);
        let (x, weight) = (frame.arg(0)?, values(frame, 1)?);
        rms_norm(Isa::detected(), &XlaPool::new(frame), x, weight, epsilon, offset, frame.result(0)?);
        Ok(())
    }
}
