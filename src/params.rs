//! The parameter tree in the graph and on the device. The tree itself, with the one list of names, axes and
//! shardings, is declared in [`converter::layout`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use converter::Checkpoint;
pub use converter::layout::{Attention, DecoderBlock, FeedForward, Llama, Mlp, Moe, Param};
use xla::DType;
use xla::graph::{ArgAttrs, Graph, Tensor};
use xla::pjrt::{Buffer, Client, Device, HostData, MappedBytes};

use crate::Error;

/// Declares every parameter as an argument of the graph, in tree order.
pub fn declare_args(g: &Graph, params: &Llama<Param>, dtype: DType) -> Llama<Tensor> {
    let arg =
        |p: &Param| g.arg_with(&p.name, device_dtype(p, dtype), &p.shape, ArgAttrs { sharding: Some(&p.logical) });
    params.as_ref().map(&mut |p| arg(p))
}

/// The type that a parameter has on the device where the model runs in `dtype`.
pub fn device_dtype(param: &Param, dtype: DType) -> DType {
    if param.precise { DType::F32 } else { dtype }
}

/// Puts every parameter on the device as `dtype`, in tree order. Arrays that lie in a converted file as they are
/// needed are handed over in place; others are read and converted by `threads` threads.
/// `progress` gets bytes done and bytes in all.
pub fn upload(
    checkpoint: &Checkpoint,
    dtype: DType,
    client: &Client,
    device: &Device,
    threads: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<Buffer>, Error> {
    let params = checkpoint.params().iter();
    let bytes = |p: &Param| (p.elements() * device_dtype(p, dtype).size()) as u64;
    let total = params.iter().map(|p| bytes(p)).sum();
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let one = |p: &Param| -> Result<Buffer, Error> {
        let dtype = device_dtype(p, dtype);
        let host_dtype = host_dtype(dtype)?;
        let place = if p.dtype == host_dtype { checkpoint.place(p)? } else { None };
        let data = match place {
            Some(bytes) => HostData::Shared(Arc::new(MappedBytes::new(&bytes.file, bytes.range)?)),
            None => HostData::Shared(Arc::new(checkpoint.read(p, host_dtype)?)),
        };
        let buffer = client.upload(data, dtype, &p.shape, Some(device))?;
        progress(done.fetch_add(bytes(p), Ordering::Relaxed) + bytes(p), total);
        Ok(buffer)
    };
    let worker = || {
        let mut mine = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            match params.get(i) {
                None => return Ok(mine),
                Some(p) => mine.push((i, one(p).inspect_err(|_| next.store(usize::MAX / 2, Ordering::Relaxed))?)),
            }
        }
    };
    let parts: Vec<Result<Vec<(usize, Buffer)>, Error>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().map(|h| h.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    });
    let mut buffers = Vec::with_capacity(params.len());
    for part in parts {
        buffers.extend(part?);
    }
    buffers.sort_unstable_by_key(|(i, _)| *i);
    Ok(buffers.into_iter().map(|(_, b)| b).collect())
}

/// The checkpoint library's name of a parameter dtype.
pub fn host_dtype(dtype: DType) -> Result<converter::DType, Error> {
    match dtype {
        DType::F32 => Ok(converter::DType::F32),
        DType::BF16 => Ok(converter::DType::BF16),
        DType::F16 => Ok(converter::DType::F16),
        other => Err(Error::Option { name: "dtype".into(), what: format!("must be f32, bf16 or f16, found {other}") }),
    }
}
