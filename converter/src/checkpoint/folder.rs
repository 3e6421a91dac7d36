//! The safetensors files of a folder: one file, or those that an index names.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::path::{Component, Path};

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::shard::{Shard, Stored};

/// All tensors of a folder.
#[derive(Debug)]
pub(crate) struct Folder {
    pub(crate) shards: Vec<Shard>,
    /// File and place in it of each tensor, by name.
    places: HashMap<String, (usize, usize)>,
}

/// `….safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Folder {
    /// Whether the folder has `STEM.safetensors` or its index.
    pub(crate) fn has(folder: &Path, stem: &str) -> bool {
        folder.join(format!("{stem}.safetensors")).exists()
            || folder.join(format!("{stem}.safetensors.index.json")).exists()
    }

    /// Opens `STEM.safetensors`, or if there is none, all files that `STEM.safetensors.index.json` names.
    pub(crate) fn open(folder: &Path, stem: &str) -> Result<Folder> {
        let single = folder.join(format!("{stem}.safetensors"));
        if single.exists() {
            return Folder::of_shards(vec![Shard::open(&single)?]);
        }
        let path = folder.join(format!("{stem}.safetensors.index.json"));
        let text = fs::read(&path).map_err(Error::io(&path, "reading"))?;
        let index: Index =
            serde_json::from_slice(&text).map_err(|e| Error::format(&path, format!("not a valid index: {e}")))?;
        let mut names: Vec<&str> = index.weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        if let Some(name) = names.iter().find(|name| !is_plain_name(name)) {
            let what = format!("weight_map names the file {name:?}; expected the name of a file in the same folder");
            return Err(Error::format(&path, what));
        }
        let absent: Vec<&str> = names.iter().copied().filter(|name| !folder.join(name).exists()).collect();
        if let Some(first) = absent.first() {
            let what = format!("{} of {} files that it names are missing, first {first}", absent.len(), names.len());
            return Err(Error::format(&path, what));
        }
        let shards = names.iter().map(|name| Shard::open(&folder.join(name))).collect::<Result<_>>()?;
        let this = Folder::of_shards(shards)?;
        for (tensor, file) in &index.weight_map {
            let found = this.places.get(tensor).map(|&(shard, _)| names[shard]);
            if found != Some(file) {
                let found = found.map_or("in none of the files".to_string(), |other| format!("in {other}"));
                return Err(Error::format(
                    &path,
                    format!("weight_map says that {tensor} is in {file}, but it is {found}"),
                ));
            }
        }
        Ok(this)
    }

    fn of_shards(shards: Vec<Shard>) -> Result<Folder> {
        let mut places: HashMap<String, (usize, usize)> = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for (j, stored) in shard.tensors.iter().enumerate() {
                if let Some((first, _)) = places.insert(stored.name.clone(), (i, j)) {
                    let what = format!("the tensor is in {} too", shards[first].path.display());
                    return Err(Error::tensor(&shard.path, &stored.name, what));
                }
            }
        }
        Ok(Folder { shards, places })
    }

    /// The tensor of this name and the file that holds it.
    pub(crate) fn get(&self, name: &str) -> Option<(&Shard, &Stored)> {
        self.places.get(name).map(|&(shard, tensor)| (&self.shards[shard], &self.shards[shard].tensors[tensor]))
    }

    /// All tensors with the files that hold them.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&Shard, &Stored)> {
        self.shards.iter().flat_map(|shard| shard.tensors.iter().map(move |stored| (shard, stored)))
    }
}

/// Whether `name` is a file's name and nothing more: no folder, nothing that leads elsewhere.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == OsStr::new(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_stays_in_its_folder() {
        assert!(is_plain_name("model-00001-of-00002.safetensors"));
        for name in ["../model.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a/", "./a"] {
            assert!(!is_plain_name(name), "{name}");
        }
    }
}
