//! Arrays over the devices of a mesh: one buffer for each device of this process.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use xla::DType;
use xla::graph::{Mesh, Sharding};
use xla::pjrt::{Buffer, Client, CompileOptions, Device, Element, HostData, HostRead, LoadedExecutable};

use crate::Error;
use crate::sharding::MeshShape;

/// The devices that programs run on.
pub struct Placement {
    client: Client,
    mesh: Option<Mesh>,
    /// Ids of all devices in the order of the mesh.
    ids: Vec<i64>,
    /// Those of this process, with their places in the mesh.
    local: Vec<(usize, Device)>,
}

/// An array on the devices of a mesh, whole on each or split.
pub struct Array {
    /// One for each device of this process.
    shards: Vec<Buffer>,
    layout: Arc<ArrayLayout>,
}

/// What an array is, and how it lies on the devices of this process.
#[derive(Clone, Debug)]
pub struct ArrayLayout {
    /// Of the whole.
    dims: Vec<usize>,
    /// Which part of it each device has; none where all have the whole.
    parts: Option<Vec<Vec<Range<usize>>>>,
}

impl Placement {
    /// The first devices of `client` as a mesh.
    ///
    /// # Errors
    /// [`Error::Option`] if there are fewer than the mesh has, or none of them is this process's.
    pub fn new(client: Client, mesh: MeshShape) -> Result<Placement, Error> {
        let wanted = mesh.devices();
        let mut devices = client.devices();
        devices.sort_by_key(Device::id);
        let here = devices.len();
        devices.truncate(wanted);
        let ids = devices.iter().map(|d| i64::from(d.id())).collect();
        let local: Vec<_> = devices.into_iter().enumerate().filter(|(_, d)| d.is_addressable()).collect();
        if here < wanted || local.is_empty() {
            let what = format!("{mesh}: needs {wanted} devices, the plugin has {here} ({})", client.platform_name());
            return Err(Error::Option { name: "mesh".into(), what });
        }
        Ok(Placement { client, mesh: mesh.mesh(), ids, local })
    }

    /// The client of all devices.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// `options` for programs on these devices.
    pub fn assign(&self, options: CompileOptions) -> CompileOptions {
        let device_assignment = self.mesh.is_some().then(|| vec![self.ids.clone()]);
        CompileOptions { device_assignment, ..options }
    }

    /// The part of an array that each device of this process has.
    pub fn parts(&self, sharding: Option<&Sharding>, dims: &[usize]) -> Vec<Vec<Range<usize>>> {
        let part = |place: usize| match (sharding, &self.mesh) {
            (Some(sharding), Some(mesh)) => sharding.part(mesh, dims, place),
            _ => dims.iter().map(|&n| 0..n).collect(),
        };
        self.local.iter().map(|(place, _)| part(*place)).collect()
    }

    /// Puts an array on the devices: `read` gives each different part once.
    pub fn upload(
        &self,
        dtype: DType,
        dims: &[usize],
        sharding: Option<&Sharding>,
        mut read: impl FnMut(&[Range<usize>]) -> Result<HostData<'static>, Error>,
    ) -> Result<Array, Error> {
        let parts = self.parts(sharding, dims);
        let mut known: HashMap<&[Range<usize>], HostData<'static>> = HashMap::new();
        let mut shards = Vec::with_capacity(parts.len());
        for (part, (_, device)) in parts.iter().zip(&self.local) {
            let data = match known.get(&part[..]) {
                Some(data) => data.clone(),
                None => known.entry(part).or_insert(read(part)?).clone(),
            };
            let shape: Vec<usize> = part.iter().map(|range| range.len()).collect();
            shards.push(self.client.upload(data, dtype, &shape, Some(device))?);
        }
        Ok(Array { shards, layout: self.layout(dims, sharding) })
    }

    /// Puts the same values on every device.
    pub fn replicate<T: Element>(&self, data: &[T], dims: &[usize]) -> Result<Array, Error> {
        let upload = |(_, device): &(usize, Device)| self.client.upload_slice(data, dims, Some(device));
        let shards = self.local.iter().map(upload).collect::<Result<_, _>>()?;
        Ok(Array { shards, layout: self.layout(dims, None) })
    }

    /// Puts each device's part of these values on it.
    pub fn split<T: Element>(&self, data: &[T], dims: &[usize], sharding: Option<&Sharding>) -> Result<Array, Error> {
        let shards = self.parts(sharding, dims).into_iter().zip(&self.local).map(|(part, (_, device))| {
            let mut own = Vec::with_capacity(part.iter().map(|range| range.len()).product());
            runs(&part, dims, |from, len| own.extend_from_slice(&data[from..from + len]));
            let shape: Vec<usize> = part.iter().map(|range| range.len()).collect();
            self.client.upload_slice(&own, &shape, Some(device))
        });
        let shards = shards.collect::<Result<_, _>>()?;
        Ok(Array { shards, layout: self.layout(dims, sharding) })
    }

    /// How an array with this sharding lies on the devices of this process.
    pub fn layout(&self, dims: &[usize], sharding: Option<&Sharding>) -> Arc<ArrayLayout> {
        let split = sharding.filter(|s| s.dims.iter().any(|axes| !axes.is_empty()));
        let parts = split.map(|sharding| self.parts(Some(sharding), dims));
        Arc::new(ArrayLayout { dims: dims.to_vec(), parts })
    }

    /// Runs a program whose results lie as `results` say.
    pub fn execute(
        &self,
        executable: &LoadedExecutable,
        args: &[&Array],
        results: &[Arc<ArrayLayout>],
    ) -> Result<Vec<Array>, Error> {
        let outputs: Vec<Vec<Buffer>> = match self.mesh {
            None => vec![executable.execute(&args.iter().map(|array| &array.shards[0]).collect::<Vec<_>>())?],
            Some(_) => {
                let of_device = |i: usize| args.iter().map(|array| &array.shards[i]).collect();
                let lists: Vec<Vec<&Buffer>> = (0..self.local.len()).map(of_device).collect();
                executable.execute_sharded(&lists)?
            }
        };
        let mut outputs: Vec<_> = outputs.into_iter().map(Vec::into_iter).collect();
        let one = |layout: &Arc<ArrayLayout>| {
            let shards: Vec<Buffer> = outputs.iter_mut().filter_map(Iterator::next).collect();
            Array { shards, layout: layout.clone() }
        };
        Ok(results.iter().map(one).collect())
    }
}

impl Array {
    /// Its pieces, one for each device of this process.
    pub fn shards(&self) -> &[Buffer] {
        &self.shards
    }

    /// The whole on the host, row-major.
    ///
    /// # Errors
    /// The plugin's, another element type, or a part that only another process has.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>, Error> {
        let ArrayLayout { dims, parts, .. } = &*self.layout;
        let Some(parts) = parts else { return Ok(self.shards[0].to_vec()?) };
        let mut known: Vec<&[Range<usize>]> = Vec::new();
        let mut whole: Vec<T> = Vec::new();
        for (part, shard) in parts.iter().zip(&self.shards) {
            if known.contains(&&part[..]) {
                continue;
            }
            known.push(part);
            let own = shard.to_vec::<T>()?;
            let Some(&filler) = own.first() else { continue };
            whole.resize(dims.iter().product(), filler);
            let mut at = 0;
            runs(part, dims, |from, len| {
                whole[from..from + len].copy_from_slice(&own[at..at + len]);
                at += len;
            });
        }
        let here: usize = known.iter().map(|part| part.iter().map(|range| range.len()).product::<usize>()).sum();
        match here == whole.len() {
            true => Ok(whole),
            false => Err(Error::Empty("a part of the result is on another process's devices: ask for it there".into())),
        }
    }

    /// Starts reading an array that every device has whole.
    pub fn read(&self) -> Result<HostRead, Error> {
        debug_assert!(self.layout.parts.is_none(), "only whole arrays are read asynchronously");
        Ok(self.shards[0].to_host_async()?)
    }
}

/// Calls `f` with start and length of every run of adjacent elements of `part` in a row-major array of `dims`.
fn runs(part: &[Range<usize>], dims: &[usize], mut f: impl FnMut(usize, usize)) {
    // The axes that are whole at the end belong to one run, with the one before them.
    let whole = part.iter().zip(dims).rev().take_while(|(range, n)| range.len() == **n).count();
    let cut = dims.len().saturating_sub(whole + 1);
    let inner: usize = dims[cut..].iter().skip(1).product();
    let (start, len) = match part.get(cut) {
        Some(range) => (range.start * inner, range.len() * inner),
        None => (0, 1),
    };
    let outer = &part[..cut];
    let strides: Vec<usize> = (0..cut).map(|axis| dims[axis + 1..].iter().product()).collect();
    let rows: usize = outer.iter().map(|range| range.len()).product();
    for row in 0..rows {
        let mut rest = row;
        let mut from = start;
        for (range, stride) in outer.iter().zip(&strides).rev() {
            from += (range.start + rest % range.len()) * stride;
            rest /= range.len();
        }
        f(from, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_runs_of_elements() {
        let found = |part: &[Range<usize>], dims: &[usize]| {
            let mut found = Vec::new();
            runs(part, dims, |from, len| found.push((from, len)));
            found
        };
        assert_eq!(found(&[0..2, 0..3], &[2, 3]), [(0, 6)]);
        assert_eq!(found(&[1..2, 0..3], &[2, 3]), [(3, 3)]);
        assert_eq!(found(&[0..2, 1..3], &[2, 3]), [(1, 2), (4, 2)]);
        assert_eq!(found(&[1..3, 0..1, 2..4], &[3, 2, 4]), [(10, 2), (18, 2)]);
        assert_eq!(found(&[1..3, 0..2, 0..4], &[3, 2, 4]), [(8, 16)]);
        assert_eq!(found(&[], &[]), [(0, 1)]);
    }
}
