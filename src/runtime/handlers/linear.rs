//! Products with weights, floats or packed.

use kernels::linear::{Linear as Matrix, Order, Values, Weight, gated, linear, take_rows};
use kernels::packed::{Bits, Packed, Scales};
use kernels::{Activation, Isa};
use xla::DType;
use xla::pjrt::{CallFrame, FfiError, Handler};

use super::{XlaPool, size};
use crate::model::{GATED, LINEAR, TAKE_ROWS};

/// [`LINEAR`].
pub(super) struct Linear;

impl Handler for Linear {
    const NAME: &'static str = LINEAR;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let order = if frame.attribute("transposed")? { Order::Nk } else { Order::Kn };
        let results = frame.num_results();
        let n = |i| size(frame.result_array(i)?.dims(), 1, "result");
        let n: Vec<usize> = (0..results).map(n).collect::<Result<_, _>>()?;
        let (x, rows, k) = input(frame)?;
        let weights = weights(frame, &n.iter().map(|&n| (k, n)).collect::<Vec<_>>(), order)?;
        let mut out: Vec<&mut [f32]> = (0..results).map(|i| frame.result(i)).collect::<Result<_, _>>()?;
        linear(Isa::detected(), &XlaPool::new(frame), x, rows, &weights, None, &mut out);
        Ok(())
    }
}

/// [`GATED`].
pub(super) struct Gated;

impl Handler for Gated {
    const NAME: &'static str = GATED;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let activation = activation(frame)?;
        let n = size(frame.result_array(0)?.dims(), 1, "result")?;
        let (x, rows, k) = input(frame)?;
        let weights = weights(frame, &[(k, n), (k, n)], Order::Kn)?;
        let out = frame.result(0)?;
        gated(Isa::detected(), &XlaPool::new(frame), x, rows, &weights[0], &weights[1], activation, out);
        Ok(())
    }
}

/// [`TAKE_ROWS`].
pub(super) struct TakeRows;

impl Handler for TakeRows {
    const NAME: &'static str = TAKE_ROWS;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let k = size(frame.result_array(0)?.dims(), 1, "result")?;
        // (V, M), or codes (V/16, M/g, bytes), whose padding counts as rows here: no id is as large.
        let table = frame.arg_array(1)?.dims();
        let n = size(table, 0, "the table")? * if table.len() == 3 { kernels::packed::BLOCK } else { 1 };
        let table = weights(frame, &[(k, n)], Order::Nk)?;
        take_rows(&table[0], frame.arg(0)?, frame.result(0)?);
        Ok(())
    }
}

/// What the attribute `activation` says.
pub(super) fn activation(frame: &CallFrame<'_>) -> Result<Activation, FfiError> {
    let name: &str = frame.attribute("activation")?;
    Activation::named(name).ok_or_else(|| FfiError::invalid(format!("unknown activation {name:?}")))
}

/// x (rows, K).
pub(super) fn input<'a>(frame: &CallFrame<'a>) -> Result<(&'a [f32], usize, usize), FfiError> {
    let dims = frame.arg_array(0)?.dims();
    Ok((frame.arg(0)?, size(dims, 0, "x")?, size(dims, 1, "x")?))
}

/// The weights behind the first argument, each of which contracts K terms into N outputs, as the attributes `groups` and `mins`
/// say; where there are experts, those of all of them.
pub(super) fn weights<'a>(
    frame: &CallFrame<'a>,
    shapes: &[(usize, usize)],
    order: Order,
) -> Result<Vec<Matrix<'a>>, FfiError> {
    let (groups, mins): (&[i64], &[i64]) = (frame.attribute("groups")?, frame.attribute("mins")?);
    if groups.len() != shapes.len() || mins.len() != shapes.len() {
        let found = format!("{} weights required, found {} groups and {} mins", shapes.len(), groups.len(), mins.len());
        return Err(FfiError::invalid(found));
    }
    let mut next = 1..;
    let mut next = || next.next().unwrap_or_default();
    let one = |((&(k, n), &group), &mins): ((&(usize, usize), &i64), &i64)| {
        let weight = match usize::try_from(group).unwrap_or(0) {
            0 => Weight::Rows { values: values(frame, next())?, order },
            group => {
                let i = next();
                let codes = frame.arg_array(i)?.dims();
                let bytes = size(codes, codes.len().saturating_sub(1), "codes")?;
                let bits = if bytes == group * kernels::packed::BLOCK { Bits::Eight } else { Bits::Four };
                let (q, scales) = (frame.arg(i)?, scales(frame, next())?);
                let mins = if mins == 0 { None } else { Some(self::scales(frame, next())?) };
                Weight::Packed(Packed { bits, group, q, scales, mins })
            }
        };
        Ok(Matrix { weight, k, n })
    };
    shapes.iter().zip(groups).zip(mins).map(one).collect()
}

/// An argument of floats.
pub(super) fn values<'a>(frame: &CallFrame<'a>, i: usize) -> Result<Values<'a>, FfiError> {
    Ok(match frame.arg_array(i)?.dtype()? {
        DType::F32 => Values::F32(frame.arg(i)?),
        DType::BF16 => Values::Bf16(frame.arg(i)?),
        DType::F16 => Values::F16(frame.arg(i)?),
        other => return Err(FfiError::invalid(format!("argument {i}: f32, bf16 or f16 required, found {other}"))),
    })
}

fn scales<'a>(frame: &CallFrame<'a>, i: usize) -> Result<Scales<'a>, FfiError> {
    Ok(match frame.arg_array(i)?.dtype()? {
        DType::F16 => Scales::F16(frame.arg(i)?),
        DType::F32 => Scales::F32(frame.arg(i)?),
        other => return Err(FfiError::invalid(format!("scales {i}: f16 or f32 required, found {other}"))),
    })
}
