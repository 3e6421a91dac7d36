//! Which tensor goes where in which file, decided before the first byte is written.
//!
//! Within a file, tensors whose size is a multiple of 64 bytes come first and the header is padded, so that each of them
//! begins at a multiple of 64; the rest follow, larger alignments first. The format allows no gaps.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};

use crate::array::ALIGNMENT;
use crate::error::{Error, Result};
use crate::shard::LENGTH;

/// One tensor that is to be written.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: safetensors::Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Entry {
    pub(crate) fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// Where one tensor goes: a file, and a place in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub(crate) file: usize,
    pub(crate) offset: u64,
}

/// The files to write.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) files: Vec<PlannedFile>,
    /// One per entry, in their order.
    pub(crate) places: Vec<Place>,
    /// Name and content of the index, if there are several files.
    pub(crate) index: Option<(String, Vec<u8>)>,
}

/// A file's name, its first bytes, and its length.
#[derive(Debug)]
pub(crate) struct PlannedFile {
    pub(crate) name: String,
    head: Vec<u8>,
    len: u64,
}

impl Plan {
    /// Plans files `STEM.safetensors`, or `STEM-00001-of-0000N.safetensors` of at most `shard_size` bytes of tensors
    /// each (one tensor may be larger).
    pub(crate) fn new(entries: &[Entry], stem: &str, metadata: &[(&str, &str)], shard_size: u64) -> Plan {
        let shards = split(entries, shard_size);
        let mut plan = Plan { files: Vec::new(), places: vec![Place::default(); entries.len()], index: None };
        let mut weight_map = BTreeMap::new();
        for (file, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => format!("{stem}.safetensors"),
                n => format!("{stem}-{:05}-of-{n:05}.safetensors", file + 1),
            };
            let mut order = shard.clone();
            order.sort_by_key(|&i| alignment_class(entries[i].bytes()));
            let mut len = 0;
            let mut infos = Vec::new();
            for &i in &order {
                let Entry { name: tensor, dtype, shape } = &entries[i];
                plan.places[i] = Place { file, offset: len };
                let (first, last) = (len, len + entries[i].bytes());
                let data_offsets = (first as usize, last as usize);
                infos.push((tensor.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets }));
                weight_map.insert(tensor.clone(), name.clone());
                len = last;
            }
            let head = head(metadata, infos);
            order.iter().for_each(|&i| plan.places[i].offset += head.len() as u64);
            plan.files.push(PlannedFile { name, len: head.len() as u64 + len, head });
        }
        if shards.len() > 1 {
            let total: u64 = entries.iter().map(Entry::bytes).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            plan.index = Some((format!("{stem}.safetensors.index.json"), format!("{index:#}\n").into_bytes()));
        }
        plan
    }
}

/// Entries of each file, in order, by index.
fn split(entries: &[Entry], shard_size: u64) -> Vec<Vec<usize>> {
    let mut shards = vec![Vec::new()];
    let mut size = 0u64;
    for (i, entry) in entries.iter().enumerate() {
        if size > 0 && size.saturating_add(entry.bytes()) > shard_size {
            shards.push(Vec::new());
            size = 0;
        }
        size += entry.bytes();
        shards.last_mut().expect("there is always one").push(i);
    }
    shards
}

/// Sorts multiples of 64 first, then by the largest power of two that divides the size.
fn alignment_class(bytes: u64) -> Reverse<u32> {
    Reverse(bytes.trailing_zeros().min(ALIGNMENT.trailing_zeros()))
}

/// Length and header, padded with spaces so that the data begins at a multiple of 64.
fn head(metadata: &[(&str, &str)], infos: Vec<(String, TensorInfo)>) -> Vec<u8> {
    let metadata: Map<String, Value> = metadata.iter().map(|&(k, v)| (k.to_string(), json!(v))).collect();
    let tensors = infos.into_iter().map(|(name, info)| (name, json!(info)));
    let header: Map<String, Value> =
        std::iter::once(("__metadata__".to_string(), json!(metadata))).chain(tensors).collect();
    let mut json = Value::Object(header).to_string().into_bytes();
    let len = (LENGTH as usize + json.len()).next_multiple_of(ALIGNMENT) - LENGTH as usize;
    json.resize(len, b' ');
    [&(len as u64).to_le_bytes(), json.as_slice()].concat()
}

/// A file of a plan, being written from several threads.
#[derive(Debug)]
pub(crate) struct ShardWriter {
    path: PathBuf,
    file: File,
}

impl ShardWriter {
    /// Creates the file with its header and its full length.
    pub(crate) fn create(folder: &Path, planned: &PlannedFile) -> Result<ShardWriter> {
        let path = folder.join(&planned.name);
        let file = File::create_new(&path).map_err(Error::io(&path, "creating"))?;
        file.set_len(planned.len)
            .and_then(|()| file.write_all_at(&planned.head, 0))
            .map_err(Error::io(&path, "writing"))?;
        Ok(ShardWriter { path, file })
    }

    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(Error::io(&self.path, "writing"))
    }

    /// Waits until everything is on the disk.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io(&self.path, "writing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(sizes: &[usize]) -> Vec<Entry> {
        let dtype = safetensors::Dtype::F16;
        let entry = |(i, &size): (usize, &usize)| Entry { name: format!("t{i}"), dtype, shape: vec![size] };
        sizes.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn whatever_can_be_aligned_is() {
        let entries = entries(&[3, 64, 5, 32, 16, 96]);
        let plan = Plan::new(&entries, "params", &[("format", "x")], u64::MAX);
        assert_eq!((plan.files.len(), plan.files[0].name.as_str()), (1, "params.safetensors"));
        for (entry, place) in entries.iter().zip(&plan.places) {
            if entry.bytes() % 64 == 0 {
                assert_eq!(place.offset % 64, 0, "{}", entry.name);
            }
        }
        let mut ends: Vec<u64> = entries.iter().zip(&plan.places).map(|(e, p)| p.offset + e.bytes()).collect();
        ends.sort_unstable();
        assert_eq!(ends.last(), Some(&plan.files[0].len));
        assert!(plan.index.is_none());
    }

    #[test]
    fn files_are_split_between_tensors() {
        let entries = entries(&[50, 50, 10, 300, 10]);
        let plan = Plan::new(&entries, "model", &[], 220);
        let files: Vec<usize> = plan.places.iter().map(|place| place.file).collect();
        assert_eq!(files, [0, 0, 0, 1, 2]);
        assert_eq!(plan.files[2].name, "model-00003-of-00003.safetensors");
        let (name, index) = plan.index.expect("several files have an index");
        let index: serde_json::Value = serde_json::from_slice(&index).expect("JSON");
        assert_eq!(name, "model.safetensors.index.json");
        assert_eq!(
            (&index["metadata"]["total_size"], &index["weight_map"]["t3"]),
            (&json!(840), &json!(plan.files[1].name))
        );
    }
}
