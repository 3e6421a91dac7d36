//! Attention over a cache.

use kernels::Isa;
use kernels::attention::{self, Gradients, Kv, KvMut, Place, Sizes, Step};
use kernels::rope::Angles;
use xla::DType;
use xla::pjrt::{CallFrame, FfiError, Handler};

use super::{XlaPool, size};
use crate::model::{ATTEND, ATTEND_GRADIENT, ATTENTION_STEP};

/// [`ATTEND`].
pub(super) struct Attend;

impl Handler for Attend {
    const NAME: &'static str = ATTEND;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let (problem, _) = problem(frame)?;
        attention::attend(Isa::detected(), &XlaPool::new(frame), &problem, frame.result(0)?);
        Ok(())
    }
}

/// [`ATTEND_GRADIENT`].
pub(super) struct AttendGradient;

impl Handler for AttendGradient {
    const NAME: &'static str = ATTEND_GRADIENT;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let (problem, behind) = problem(frame)?;
        let cotangent = frame.arg(behind)?;
        let mut gradients = Gradients { q: frame.result(0)?, k: frame.result(1)?, v: frame.result(2)? };
        attention::attend_gradient(Isa::detected(), &XlaPool::new(frame), &problem, cotangent, &mut gradients);
        Ok(())
    }
}

/// The arguments of [`ATTEND`], and how many there are.
fn problem<'a>(frame: &CallFrame<'a>) -> Result<(attention::Attend<'a>, usize), FfiError> {
    let window = usize::try_from(frame.attribute::<i64>("window")?).ok().filter(|&w| w > 0);
    let softcap = Some(frame.attribute::<f32>("softcap")?).filter(|&cap| cap != 0.0);
    let (q, k) = (frame.arg_array(0)?.dims(), frame.arg_array(2)?.dims());
    let [batch, queries, groups, heads, width] = [0, 1, 2, 3, 4].map(|axis| size(q, axis, "q"));
    let sizes = Sizes {
        batch: batch?,
        queries: queries?,
        groups: groups?,
        heads: heads?,
        width: width?,
        keys: size(k, 2, "k")?,
    };
    let int8 = frame.arg_array(2)?.dtype()? == DType::I8;
    let behind = if int8 { 6 } else { 4 };
    let scales = |i: usize| if int8 { frame.arg(i).map(Some) } else { Ok(None) };
    let problem = attention::Attend {
        q: frame.arg(0)?,
        k: kv(frame, 2, scales(4)?)?,
        v: kv(frame, 3, scales(5)?)?,
        positions: frame.arg(1)?,
        key_positions: if window.is_some() { Some(frame.arg(behind)?) } else { None },
        window,
        softcap,
        sizes,
    };
    Ok((problem, behind + usize::from(window.is_some())))
}

fn kv<'a>(frame: &CallFrame<'a>, i: usize, scales: Option<&'a [f32]>) -> Result<Kv<'a>, FfiError> {
    Ok(match (frame.arg_array(i)?.dtype()?, scales) {
        (DType::I8, Some(scales)) => Kv::I8 { q: frame.arg(i)?, scales },
        (DType::F32, None) => Kv::F32(frame.arg(i)?),
        (DType::BF16, None) => Kv::Bf16(frame.arg(i)?),
        (DType::F16, None) => Kv::F16(frame.arg(i)?),
        (other, _) => {
            return Err(FfiError::invalid(format!("a cache of f32, bf16, f16 or int8 required, found {other}")));
        }
    })
}

/// [`ATTENTION_STEP`].
pub(super) struct AttentionStep;

impl Handler for AttentionStep {
    const NAME: &'static str = ATTENTION_STEP;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let (q, k) = (frame.arg_array(0)?.dims(), frame.arg_array(1)?.dims());
        let [batch, queries, all_heads, width] = [0, 1, 2, 3].map(|axis| size(q, axis, "q"));
        let groups = size(k, 2, "k")?;
        let mut next = 3..;
        let mut next = || next.next().unwrap_or_default();
        let angles = match frame.attribute("rotates")? {
            true => Some(Angles { cos: frame.arg(next())?, sin: frame.arg(next())? }),
            false => None,
        };
        let (positions, first) = (frame.arg(next())?, frame.arg(next())?);
        let valid = if frame.attribute("counts")? { Some(frame.arg(next())?) } else { None };
        let keys = size(frame.arg_array(next())?.dims(), 2, "the cache")?;
        let ring = frame.attribute("ring")?;
        let step = Step {
            q: frame.arg(0)?,
            k: frame.arg(1)?,
            v: frame.arg(2)?,
            angles,
            scale: frame.attribute("scale")?,
            positions,
            place: Place { first, valid, ring },
            window: usize::try_from(frame.attribute::<i64>("window")?).ok().filter(|&w| w > 0),
            softcap: Some(frame.attribute::<f32>("softcap")?).filter(|&cap| cap != 0.0),
            sizes: Sizes {
                batch: batch?,
                queries: queries?,
                groups,
                heads: all_heads? / groups.max(1),
                width: width?,
                keys,
            },
        };
        let (mut k, mut v) = (kv_mut(frame, 1)?, kv_mut(frame, 2)?);
        attention::step(Isa::detected(), &XlaPool::new(frame), &step, &mut k, &mut v, frame.result(0)?);
        Ok(())
    }
}

/// The cache in result `i`, which holds what the argument held; scales are two results further.
fn kv_mut<'a>(frame: &mut CallFrame<'a>, i: usize) -> Result<KvMut<'a>, FfiError> {
    Ok(match frame.result_array(i)?.dtype()? {
        DType::I8 => KvMut::I8 { q: frame.result(i)?, scales: frame.result(i + 2)? },
        DType::F32 => KvMut::F32(frame.result(i)?),
        DType::BF16 => KvMut::Bf16(frame.result(i)?),
        DType::F16 => KvMut::F16(frame.result(i)?),
        other => return Err(FfiError::invalid(format!("a cache of f32, bf16, f16 or int8 required, found {other}"))),
    })
}
