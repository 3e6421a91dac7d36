//! act(gate) ⊙ up.

use kernels::Isa;
use xla::pjrt::{CallFrame, FfiError, Handler};

use super::XlaPool;
use super::linear::activation;
use crate::model::{GATE, GATE_GRADIENT};

/// [`GATE`].
pub(super) struct Gate;

impl Handler for Gate {
    const NAME: &'static str = GATE;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let (activation, pool) = (activation(frame)?, XlaPool::new(frame));
        kernels::gate(Isa::detected(), &pool, activation, frame.arg(0)?, frame.arg(1)?, frame.result(0)?);
        Ok(())
    }
}

/// [`GATE_GRADIENT`].
pub(super) struct GateGradient;

impl Handler for GateGradient {
    const NAME: &'static str = GATE_GRADIENT;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let (activation, pool) = (activation(frame)?, XlaPool::new(frame));
        let (gate, up, cotangent) = (frame.arg(0)?, frame.arg(1)?, frame.arg(2)?);
        let (of_gate, of_up) = (frame.result(0)?, frame.result(1)?);
        kernels::gate_gradient(Isa::detected(), &pool, activation, gate, up, cotangent, of_gate, of_up);
        Ok(())
    }
}
