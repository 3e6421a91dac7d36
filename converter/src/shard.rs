//! One safetensors file: 8 bytes of header length, a JSON header, and the tensors' bytes without gaps.
//!
//! Nothing in the header is believed before it is checked: lengths against the file, offsets against each other, sizes
//! against shapes and types (the format's rules are at <https://github.com/huggingface/safetensors#format>).

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::array::ALIGNMENT;
use crate::error::{Error, Result};

/// The longest header that is read; the same limit as the safetensors library's.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes of the header's length.
pub(crate) const LENGTH: u64 = 8;

/// An open safetensors file whose header has been checked.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    /// `__metadata__` of the header.
    pub(crate) metadata: HashMap<String, String>,
    /// Name, type, shape, and place in the file, in the order of the places.
    pub(crate) tensors: Vec<Stored>,
    file: Arc<File>,
    /// Bytes that [`Shard::read_at`] has been asked for.
    #[cfg(test)]
    pub(crate) read: std::sync::atomic::AtomicU64,
}

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) dtype: safetensors::Dtype,
    pub(crate) shape: Vec<usize>,
    /// Bytes of the file.
    pub(crate) range: Range<u64>,
}

impl Shard {
    pub(crate) fn open(path: &Path) -> Result<Shard> {
        let file = File::open(path).map_err(Error::io(path, "opening"))?;
        let status = file.metadata().map_err(Error::io(path, "opening"))?;
        if !status.is_file() {
            return Err(Error::format(path, "not a regular file"));
        }
        let (metadata, tensors) = read_header(&file, status.len(), path)?;
        Ok(Shard {
            path: path.to_path_buf(),
            metadata,
            tensors,
            file: Arc::new(file),
            #[cfg(test)]
            read: Default::default(),
        })
    }

    /// Fills `buffer` from `offset` of the file.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        #[cfg(test)]
        self.read.fetch_add(buffer.len() as u64, std::sync::atomic::Ordering::Relaxed);
        self.file.read_exact_at(buffer, offset).map_err(Error::io(&self.path, "reading"))
    }

    /// Bytes of the file that can be used in place; `None` where they do not begin at a multiple of 64.
    pub(crate) fn place(&self, range: &Range<u64>) -> Result<Option<FileBytes>> {
        if !range.start.is_multiple_of(ALIGNMENT as u64) {
            return Ok(None);
        }
        let len = self.file.metadata().map_err(Error::io(&self.path, "reading"))?.len();
        if len < range.end {
            return Err(Error::format(&self.path, "the file has become shorter since it was opened"));
        }
        Ok(Some(FileBytes { file: self.file.clone(), range: range.clone() }))
    }
}

/// Bytes of an open file, at a multiple of 64: for whoever can use them where they lie.
#[derive(Clone, Debug)]
pub struct FileBytes {
    /// The file, open for reading.
    pub file: Arc<File>,
    /// Where in the file.
    pub range: Range<u64>,
}

/// Reads and checks the header of a file of `len` bytes.
fn read_header(file: &File, len: u64, path: &Path) -> Result<(HashMap<String, String>, Vec<Stored>)> {
    let bad = |what: String| Error::format(path, what);
    if len < LENGTH {
        return Err(bad(format!("not a safetensors file: {len} bytes, and the header's length alone takes {LENGTH}")));
    }
    let mut length = [0; LENGTH as usize];
    file.read_exact_at(&mut length, 0).map_err(Error::io(path, "reading"))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(bad(format!(
            "not a safetensors file: it announces a header of {length} bytes, more than {MAX_HEADER}"
        )));
    }
    if length > len - LENGTH {
        return Err(bad(format!(
            "truncated: the header has {length} bytes, but only {} follow its length",
            len - LENGTH
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, LENGTH).map_err(Error::io(path, "reading"))?;
    let header = std::str::from_utf8(&header)
        .map_err(|e| bad(format!("not a safetensors file: the header is not UTF-8 at byte {}", e.valid_up_to())))?;
    let header: Header = serde_json::from_str(header).map_err(|e| bad(format!("the header is not valid: {e}")))?;
    check(header, LENGTH + length, len, path)
}

/// Checks the tensors against each other and against the file: data from `start` to `len`.
fn check(header: Header, start: u64, len: u64, path: &Path) -> Result<(HashMap<String, String>, Vec<Stored>)> {
    let bad = |what: String| Error::format(path, what);
    let mut tensors = header.tensors;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut seen = std::collections::HashSet::new();
    if let Some((name, _)) = tensors.iter().find(|(name, _)| !seen.insert(name.as_str())) {
        return Err(bad(format!("tensor {name} is described twice")));
    }

    let available = len - start;
    let mut end = 0;
    let mut stored = Vec::with_capacity(tensors.len());
    for (name, TensorInfo { dtype, shape, data_offsets: (first, last) }) in tensors {
        let (first, last) = (first as u64, last as u64);
        let bits = shape.iter().try_fold(dtype.bitsize() as u64, |n, &size| n.checked_mul(size as u64));
        if last < first || bits != (last - first).checked_mul(8) {
            let what = format!("tensor {name}: {dtype:?} {shape:?} does not fill bytes {first} to {last} exactly");
            return Err(bad(what));
        }
        if last > available {
            let what = format!("truncated: tensor {name} ends at byte {last} of the data, which has {available}");
            return Err(bad(what));
        }
        if first != end {
            let what = if first < end { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(bad(format!("tensor {name} at bytes {first} to {last} {what}, which ends at {end}")));
        }
        end = last;
        stored.push(Stored { name, dtype, shape, range: start + first..start + last });
    }
    if end != available {
        return Err(bad(format!("the tensors end at byte {end} of the data, which has {available}")));
    }
    Ok((header.metadata, stored))
}

/// The header as it is written, with repeated names kept apart.
struct Header {
    metadata: HashMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: HashMap::new(), tensors: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests;
