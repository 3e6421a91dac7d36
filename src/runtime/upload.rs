//! From a checkpoint to the devices: each gets its part of every parameter, and only what is needed is read.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use converter::{ArrayBytes, Checkpoint, HostArray, PackedArrays, Packing};
use xla::DType;
use xla::pjrt::{HostData, MappedBytes};

use super::engine::CacheOptions;
use super::placement::{Array, Placement};
use super::program::Blueprint;
use crate::Error;
use crate::params::{Param, device_arrays, device_bytes, device_dtype, host_dtype};

/// The place of a parameter in tree order, and its arrays.
type Uploaded = (usize, Vec<Array>);

/// Puts every parameter on the devices, in tree order. Parts that lie in a file as they are needed are handed over in
/// place; others are read and converted by `threads` threads. `progress` gets bytes done and bytes in all.
pub fn upload(
    checkpoint: &Checkpoint,
    model: &Blueprint,
    placement: &Placement,
    threads: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<Array>, Error> {
    let stored = checkpoint.params().iter();
    let params = model.params.iter();
    let bytes = |p: &Param| device_bytes(p, model.dtype, model.platform);
    let total = params.iter().map(|p| bytes(p)).sum();
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let one = |i: usize| -> Result<Vec<Array>, Error> {
        let arrays = match params[i].packing {
            Some(packing) => upload_packed(checkpoint, stored[i], packing, model, placement)?,
            None => vec![upload_one(checkpoint, stored[i], params[i], model, placement)?],
        };
        let bytes = bytes(params[i]);
        progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
        Ok(arrays)
    };
    let worker = || {
        let mut mine = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            match i < params.len() {
                false => return Ok(mine),
                true => mine.push((i, one(i).inspect_err(|_| next.store(usize::MAX / 2, Ordering::Relaxed))?)),
            }
        }
    };
    let parts: Vec<Result<Vec<Uploaded>, Error>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().map(|h| h.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    });
    let mut arrays = Vec::with_capacity(params.len());
    for part in parts {
        arrays.extend(part?);
    }
    arrays.sort_unstable_by_key(|(i, _)| *i);
    Ok(arrays.into_iter().flat_map(|(_, arrays)| arrays).collect())
}

/// Puts the arrays of a packed parameter on the device, in place where the file has them.
fn upload_packed(
    checkpoint: &Checkpoint,
    stored: &Param,
    packing: Packing,
    model: &Blueprint,
    placement: &Placement,
) -> Result<Vec<Array>, Error> {
    let PackedArrays { q, scales, mins, .. } = checkpoint.packed(stored, packing)?;
    let param = Param { packing: Some(packing), ..stored.clone() };
    let arrays = device_arrays(&param, model.dtype, model.platform);
    let upload = |(bytes, (_, dtype, shape)): (ArrayBytes, (String, DType, Vec<usize>))| {
        let data = HostData::Shared(match bytes {
            ArrayBytes::File(bytes) => Arc::new(MappedBytes::new(&bytes.file, bytes.range)?),
            ArrayBytes::Memory(bytes) => Arc::new(bytes),
        });
        placement.upload(dtype, &shape, None, |_| Ok(data.clone()))
    };
    [Some(q), Some(scales), mins].into_iter().flatten().zip(arrays).map(upload).collect()
}

/// Puts a parameter, which the checkpoint has as `stored`, on the devices as `param`.
fn upload_one(
    checkpoint: &Checkpoint,
    stored: &Param,
    param: &Param,
    model: &Blueprint,
    placement: &Placement,
) -> Result<Array, Error> {
    let dtype = device_dtype(param, model.dtype, model.platform);
    let host = host_dtype(dtype)?;
    let one = CacheOptions::default().shape(1, 1, dtype, model.platform);
    let sharding = model.sharding(&one, &param.logical, &param.shape);
    placement.upload(dtype, &param.shape, sharding.as_ref(), |part| {
        let source = source(stored, param, part);
        let place = if stored.dtype == host { checkpoint.place_part(stored, &source)? } else { None };
        let missing = |(a, b): (&Range<usize>, &Range<usize>)| a.len() != b.len();
        let padded = source.iter().zip(part).any(missing);
        Ok(match place.filter(|_| !padded) {
            Some(bytes) => HostData::Shared(Arc::new(MappedBytes::new(&bytes.file, bytes.range)?)),
            None => {
                let array = checkpoint.read_part(stored, host, &source)?;
                HostData::Shared(Arc::new(if padded { pad(&array, part, &param.name)? } else { array }))
            }
        })
    })
}

/// The part of the stored parameter that is behind a part of it on the mesh, where key/value heads may stand several times
/// and the vocabulary may be longer.
fn source(stored: &Param, param: &Param, part: &[Range<usize>]) -> Vec<Range<usize>> {
    let range = |axis: usize| {
        let (n, on_mesh, range) = (stored.shape[axis], param.shape[axis], part[axis].clone());
        match param.logical[axis] {
            "kv_heads" => {
                let times = on_mesh / n;
                range.start / times..range.end.div_ceil(times)
            }
            _ => range.start.min(n)..range.end.min(n),
        }
    };
    (0..part.len()).map(range).collect()
}

/// The array with zeros behind, so that it has the sizes of `part`.
fn pad(array: &HostArray, part: &[Range<usize>], name: &str) -> Result<HostArray, Error> {
    let shape: Vec<usize> = part.iter().map(|range| range.len()).collect();
    let mut padded = HostArray::zeros(array.dtype(), &shape).map_err(|e| Error::Empty(format!("{name}: {e}")))?;
    let axis = (0..shape.len()).find(|&axis| array.shape()[axis] != shape[axis]).unwrap_or(0);
    let inner = array.dtype().size() * shape[axis + 1..].iter().product::<usize>();
    let (from, to) = (array.shape()[axis] * inner, shape[axis] * inner);
    if from > 0 {
        let rows = padded.as_bytes_mut().chunks_exact_mut(to).zip(array.as_bytes().chunks_exact(from));
        rows.for_each(|(to, own)| to[..from].copy_from_slice(own));
    }
    Ok(padded)
}
