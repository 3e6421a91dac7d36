//! From a checkpoint to the devices: each gets its part of every parameter, and only what is needed is read.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use converter::{ArrayBytes, Checkpoint, HostArray, PackedArrays, Packing};
use xla::graph::Sharding;
use xla::pjrt::{HostData, MappedBytes};

use super::engine::CacheOptions;
use super::placement::{Array, Placement};
use super::program::Blueprint;
use super::regroup::Blocks;
use crate::Error;
use crate::params::{DeviceArray, Param, host_dtype};

/// The place of a parameter in tree order, and its arrays.
type Uploaded = (usize, Vec<Array>);

/// Puts every parameter but adapters, which no checkpoint has, on the devices, in tree order. Parts that lie in a file as they are needed are handed over in
/// place; others are read and converted by `threads` threads. `progress` gets bytes done and bytes in all.
pub fn upload(
    checkpoint: &Checkpoint,
    model: &Blueprint,
    placement: &Placement,
    threads: usize,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Vec<Array>, Error> {
    let stored = checkpoint.params().iter();
    let params: Vec<&Param> = model.params.iter().into_iter().filter(|param| !param.is_adapter()).collect();
    let bytes = |p: &Param| model.devices().bytes(p);
    let total = params.iter().map(|p| bytes(p)).sum();
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let one = |i: usize| -> Result<Vec<Array>, Error> {
        let arrays = match params[i].packing {
            Some(packing) => upload_packed(checkpoint, stored[i], params[i], packing, model, placement)?,
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

/// Puts the arrays of a packed parameter, which the checkpoint has as `stored`, on the devices: in place where one device takes them as
/// the file has them, else each device's part in the order of the floats' axes.
fn upload_packed(
    checkpoint: &Checkpoint,
    stored: &Param,
    param: &Param,
    packing: Packing,
    model: &Blueprint,
    placement: &Placement,
) -> Result<Vec<Array>, Error> {
    let PackedArrays { q, scales, mins, .. } = checkpoint.packed(stored, packing)?;
    let data = |bytes: ArrayBytes| -> Result<HostData<'static>, Error> {
        Ok(HostData::Shared(match bytes {
            ArrayBytes::File(bytes) => Arc::new(MappedBytes::new(&bytes.file, bytes.range)?),
            ArrayBytes::Memory(bytes) => Arc::new(bytes),
        }))
    };
    let packed = [Some(q), Some(scales), mins].into_iter().flatten().map(data).collect::<Result<Vec<_>, _>>()?;
    let devices = model.devices();
    let blocks = Blocks::new(stored, packing).filter(|_| !devices.in_blocks());
    let upload = |(i, (bytes, array)): (usize, (&HostData<'static>, DeviceArray))| {
        let sharding = sharding(model, &array.logical, &array.shape);
        placement.upload(array.dtype, &array.shape, sharding.as_ref(), |part| {
            let Some(blocks) = &blocks else { return Ok(bytes.clone()) };
            let part = with_all_axes(part, param);
            let source = source(stored, param, &part);
            let shape: Vec<usize> = part.iter().map(|range| range.len()).collect();
            let own = match i {
                0 => blocks.codes(bytes.bytes(), &source, &shape),
                _ => blocks.scales(bytes.bytes(), array.dtype.size(), &source, &shape),
            };
            Ok(HostData::Shared(Arc::new(own.map_err(|e| no_memory(&param.name, e))?)))
        })
    };
    packed.iter().zip(devices.arrays(param)).enumerate().map(upload).collect()
}

/// The part of a parameter that is a part of an array in which its last axes are one; of these only the first is split.
fn with_all_axes(part: &[Range<usize>], param: &Param) -> Vec<Range<usize>> {
    let Some((joined, before)) = part.split_last().filter(|_| part.len() < param.shape.len()) else {
        return part.to_vec();
    };
    let inner = &param.shape[part.len()..];
    let width: usize = inner.iter().product();
    let first = joined.start / width..joined.end / width;
    before.iter().cloned().chain([first]).chain(inner.iter().map(|&n| 0..n)).collect()
}

/// Puts a parameter, which the checkpoint has as `stored`, on the devices as `param`.
fn upload_one(
    checkpoint: &Checkpoint,
    stored: &Param,
    param: &Param,
    model: &Blueprint,
    placement: &Placement,
) -> Result<Array, Error> {
    let dtype = model.devices().float(param);
    let host = host_dtype(dtype)?;
    let sharding = sharding(model, &param.logical, &param.shape);
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

/// How a parameter, or an array of one, lies on the mesh: the same in every program.
fn sharding(model: &Blueprint, logical: &[&str], shape: &[usize]) -> Option<Sharding> {
    model.sharding(&model.cache_shape(&CacheOptions::default(), 1, 1), logical, shape)
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
            // Only it is padded; along others a part may count groups.
            "vocab" => range.start.min(n)..range.end.min(n),
            _ => range,
        }
    };
    (0..part.len()).map(range).collect()
}

fn no_memory(name: &str, error: std::io::Error) -> Error {
    Error::Empty(format!("{name}: {error}"))
}

/// The array with zeros behind, so that it has the sizes of `part`.
fn pad(array: &HostArray, part: &[Range<usize>], name: &str) -> Result<HostArray, Error> {
    let shape: Vec<usize> = part.iter().map(|range| range.len()).collect();
    let mut padded = HostArray::zeros(array.dtype(), &shape).map_err(|e| no_memory(name, e))?;
    let axis = (0..shape.len()).find(|&axis| array.shape()[axis] != shape[axis]).unwrap_or(0);
    let inner = array.dtype().size() * shape[axis + 1..].iter().product::<usize>();
    let (from, to) = (array.shape()[axis] * inner, shape[axis] * inner);
    if from > 0 {
        let rows = padded.as_bytes_mut().chunks_exact_mut(to).zip(array.as_bytes().chunks_exact(from));
        rows.for_each(|(to, own)| to[..from].copy_from_slice(own));
    }
    Ok(padded)
}
