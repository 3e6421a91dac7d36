//! Mixtures of experts.

use kernels::{Isa, Order, experts};
use xla::pjrt::{CallFrame, FfiError, Handler};

use super::XlaPool;
use super::linear::{activation, input, weights};
use crate::model::EXPERTS;

/// [`EXPERTS`].
pub(super) struct Experts;

impl Handler for Experts {
    const NAME: &'static str = EXPERTS;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let act = activation(frame)?;
        let count = |name: &str| {
            let n: i64 = frame.attribute(name)?;
            usize::try_from(n).map_err(|_| FfiError::invalid(format!("{name}: a size required, found {n}")))
        };
        let (all, width) = (count("experts")?, count("width")?);
        let (x, rows, m) = input(frame)?;
        let own = weights(frame, &[(m, width), (m, width), (width, m)], Order::Kn)?;
        let own = experts::Experts { gate: &own[0], up: &own[1], down: &own[2], count: all };
        let last = frame.num_args() - 2;
        let (ids, shares, out) = (frame.arg(last)?, frame.arg(last + 1)?, frame.result(0)?);
        experts::experts(Isa::detected(), &XlaPool::new(frame), x, rows, &own, act, ids, shares, out);
        Ok(())
    }
}
