//! Products of two matrices.

use kernels::Isa;
use kernels::matmul::{Operand, Sizes, Together, matmul};
use xla::graph::MATMUL;
use xla::pjrt::{CallFrame, FfiError, Handler};

use super::{XlaPool, linear, size};

/// [`MATMUL`].
pub(super) struct Matmul;

impl Handler for Matmul {
    const NAME: &'static str = MATMUL;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let sizes: &[i64] = frame.attribute("sizes")?;
        let size = |axis| size(sizes, axis, "sizes");
        let sizes = Sizes { batch: size(0)?, m: size(1)?, k: size(2)?, n: size(3)? };
        let operand = |i, terms_last: bool| {
            let together = if terms_last { Together::Terms } else { Together::Lines };
            Ok::<_, FfiError>(Operand { values: linear::values(frame, i)?, together })
        };
        let (left, right) = (operand(0, frame.attribute("left")?)?, operand(1, frame.attribute("right")?)?);
        matmul(Isa::detected(), &XlaPool::new(frame), sizes, left, right, frame.result(0)?);
        Ok(())
    }
}
