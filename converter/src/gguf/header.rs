//! The head of a GGUF file: magic, version, metadata and the table of tensors.
//!
//! Layout (ggml's specification of GGUF versions 2 and 3, little-endian): `GGUF`, version u32, number of tensors u64,
//! number of metadata pairs u64, the pairs, the tensor table, padding to the alignment, tensor data. Nothing is
//! believed before it is checked: a count or length is compared with the bytes that are left before any memory is
//! set aside for it.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::Read;
use std::path::Path;

use super::metadata::{Metadata, Value};
use super::quant::TensorType;
use crate::error::Error;

/// Alignment of tensor data where `general.alignment` is absent.
const DEFAULT_ALIGNMENT: u64 = 32;
/// No real file has a longer string or array; bounds the memory that a hostile sparse file can ask for.
const MAX_STRING: u64 = 1 << 28;
const MAX_ARRAY: u64 = 1 << 24;
/// Arrays of arrays are allowed, but nobody writes them deeper.
const MAX_DEPTH: usize = 4;

/// One row of the tensor table.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo {
    /// Name in the file.
    pub(super) name: String,
    /// Sizes, slowest axis first (the reverse of the file's order).
    pub(super) shape: Vec<usize>,
    pub(super) kind: TensorType,
    /// Position of the data in the file, in bytes.
    pub(super) start: u64,
    /// Bytes of data.
    pub(super) bytes: u64,
}

/// Everything before the tensor data.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

impl Header {
    /// Reads the head of a file of `len` bytes. `path` is for messages only.
    pub(super) fn parse(reader: &mut dyn Read, len: u64, path: &Path) -> Result<Header, Error> {
        let mut reader = Reader { inner: reader, position: 0, len, path };
        reader.magic_and_version()?;
        // A tensor row takes at least 32 bytes (name length, number of axes, one axis, type, offset), a pair 13.
        let tensor_count = reader.count(format_args!("the number of tensors"), 32)?;
        let pair_count = reader.count(format_args!("the number of metadata pairs"), 13)?;

        let mut values = BTreeMap::new();
        for index in 0..pair_count {
            let key = reader.string(format_args!("the key of metadata pair {index}"))?;
            let kind = reader.u32(format_args!("the type of metadata `{key}`"))?;
            let value = reader.value(kind, &key, 0)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(reader.malformed(format!("the metadata key `{key}` occurs twice")));
            }
        }
        let metadata = Metadata { path: path.to_owned(), values };
        let alignment = alignment(&metadata)?;

        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for index in 0..tensor_count {
            let tensor = reader.tensor(index)?;
            if !names.insert(tensor.name.clone()) {
                return Err(reader.malformed(format!("the tensor `{}` occurs twice", tensor.name)));
            }
            tensors.push(tensor);
        }

        let data_start = reader.position.next_multiple_of(alignment);
        place(&mut tensors, data_start, alignment, len, path)?;
        Ok(Header { metadata, tensors })
    }
}

fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.u32(KEY)?.map_or(DEFAULT_ALIGNMENT, u64::from);
    if !alignment.is_power_of_two() {
        return Err(Error::config(&metadata.path, KEY, format!("must be a power of two, found {alignment}")));
    }
    Ok(alignment)
}

/// Turns offsets from `data_start` into positions, and checks alignment, bounds and that no two tensors overlap.
fn place(tensors: &mut [TensorInfo], data_start: u64, alignment: u64, len: u64, path: &Path) -> Result<(), Error> {
    for tensor in tensors.iter_mut() {
        let offset = tensor.start;
        if !offset.is_multiple_of(alignment) {
            let message = format!("starts at offset {offset}, which is not a multiple of the alignment {alignment}");
            return Err(Error::tensor(path, &tensor.name, message));
        }
        let end = data_start.checked_add(offset).and_then(|start| start.checked_add(tensor.bytes));
        if end.is_none_or(|end| end > len) {
            let message = format!(
                "needs {} bytes at offset {offset} of the data, which starts at byte {data_start}; the file has only \
                 {len} bytes: it is truncated, download or copy it again",
                tensor.bytes
            );
            return Err(Error::tensor(path, &tensor.name, message));
        }
        tensor.start = data_start + offset;
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.start);
    for pair in order.windows(2) {
        if pair[0].start + pair[0].bytes > pair[1].start {
            let message = format!(
                "ends at byte {} and `{}` starts at byte {}: they overlap",
                pair[0].start + pair[0].bytes,
                pair[1].name,
                pair[1].start
            );
            return Err(Error::tensor(path, &pair[0].name, message));
        }
    }
    Ok(())
}

/// Reads little-endian values and knows how much of the file is left.
struct Reader<'a> {
    inner: &'a mut dyn Read,
    position: u64,
    len: u64,
    path: &'a Path,
}

impl Reader<'_> {
    fn malformed(&self, message: impl Into<String>) -> Error {
        Error::format(self.path, message)
    }

    fn remaining(&self) -> u64 {
        self.len - self.position
    }

    fn fill(&mut self, out: &mut [u8], what: fmt::Arguments<'_>) -> Result<(), Error> {
        let wanted = out.len() as u64;
        if wanted > self.remaining() {
            return Err(self.malformed(format!(
                "{what} needs {wanted} bytes at byte {}, the file ends at byte {}",
                self.position, self.len
            )));
        }
        self.inner.read_exact(out).map_err(Error::io(self.path, "reading"))?;
        self.position += wanted;
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: fmt::Arguments<'_>) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        self.fill(&mut out, what)?;
        Ok(out)
    }

    fn u32(&mut self, what: fmt::Arguments<'_>) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: fmt::Arguments<'_>) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things that take at least `bytes_each` bytes in the rest of the file.
    fn count(&mut self, what: fmt::Arguments<'_>, bytes_each: u64) -> Result<u64, Error> {
        let count = self.u64(what)?;
        if count > self.remaining() / bytes_each {
            return Err(self.malformed(format!(
                "{what} is {count}, which needs at least {bytes_each} bytes each; {} bytes are left",
                self.remaining()
            )));
        }
        Ok(count)
    }

    fn string(&mut self, what: fmt::Arguments<'_>) -> Result<String, Error> {
        let len = self.count(format_args!("the length of {what}"), 1)?;
        if len > MAX_STRING {
            return Err(self.malformed(format!("{what} has {len} bytes; at most {MAX_STRING} are accepted")));
        }
        let start = self.position;
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes)
            .map_err(|error| self.malformed(format!("{what} at byte {start} is not UTF-8: {}", error.utf8_error())))
    }

    fn magic_and_version(&mut self) -> Result<(), Error> {
        let magic: [u8; 4] = self.array(format_args!("the magic number"))?;
        if &magic != b"GGUF" {
            let found = magic.escape_ascii();
            return Err(
                self.malformed(format!("not a GGUF file: it must start with the bytes \"GGUF\", found \"{found}\""))
            );
        }
        let version = self.u32(format_args!("the version"))?;
        match version {
            2 | 3 => Ok(()),
            // The version of a big-endian file has its one non-zero byte at the other end.
            _ if version & 0xffff == 0 && version != 0 => {
                Err(self.malformed("a big-endian GGUF file; only little-endian ones can be read"))
            }
            _ => Err(self.malformed(format!(
                "GGUF version {version}; versions 2 and 3 can be read: convert or download it again"
            ))),
        }
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value, Error> {
        let what = format_args!("the value of metadata `{key}`");
        Ok(match kind {
            0 => Value::Uint(u8::from_le_bytes(self.array(what)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.array(what)?).into()),
            2 => Value::Uint(u16::from_le_bytes(self.array(what)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(what)?).into()),
            4 => Value::Uint(u32::from_le_bytes(self.array(what)?).into()),
            5 => Value::Int(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => match self.array(what)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.malformed(format!("{what} must be 0 or 1 (a boolean), found {other}"))),
            },
            8 => Value::String(self.string(what)?),
            9 => {
                if depth == MAX_DEPTH {
                    return Err(self.malformed(format!("{what} nests arrays deeper than {MAX_DEPTH}")));
                }
                let kind = self.u32(what)?;
                let bytes_each = [1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8].get(kind as usize).copied().unwrap_or(1);
                let count = self.count(format_args!("the length of metadata `{key}`"), bytes_each)?;
                if count > MAX_ARRAY {
                    return Err(
                        self.malformed(format!("{what} has {count} elements; at most {MAX_ARRAY} are accepted"))
                    );
                }
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, key, depth + 1)?);
                }
                Value::Array(values)
            }
            10 => Value::Uint(self.u64(what)?),
            11 => Value::Int(i64::from_le_bytes(self.array(what)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(self.malformed(format!("metadata `{key}` has the unknown value type {kind}"))),
        })
    }

    /// One row of the tensor table; `start` is still the offset from the start of the data.
    fn tensor(&mut self, index: u64) -> Result<TensorInfo, Error> {
        let name = self.string(format_args!("the name of tensor {index}"))?;
        let error = |message: String| Error::tensor(self.path, &name, message);
        let axes = self.u32(format_args!("the number of axes of tensor `{name}`"))?;
        if !(1..=4).contains(&axes) {
            return Err(error(format!("has {axes} axes; 1 to 4 are possible")));
        }
        let mut shape = Vec::new();
        for _ in 0..axes {
            shape.push(self.u64(format_args!("the shape of tensor `{name}`"))?);
        }
        let code = self.u32(format_args!("the type of tensor `{name}`"))?;
        let offset = self.u64(format_args!("the offset of tensor `{name}`"))?;
        let error = |message: String| Error::tensor(self.path, &name, message);
        let kind = TensorType::from_code(code).map_err(error)?;

        let block_len = kind.block_len() as u64;
        let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size));
        let bytes = elements.and_then(|n| (n / block_len).checked_mul(kind.block_bytes() as u64));
        let (Some(1..), Some(bytes)) = (elements, bytes) else {
            return Err(error(format!("has the impossible shape {shape:?}")));
        };
        if !shape[0].is_multiple_of(block_len) {
            return Err(error(format!(
                "has rows of {} elements; its type {} needs a multiple of {block_len}",
                shape[0],
                kind.name()
            )));
        }
        let shape: Option<Vec<usize>> = shape.iter().rev().map(|&size| size.try_into().ok()).collect();
        let shape = shape.ok_or_else(|| error("is too large for this machine".to_owned()))?;
        Ok(TensorInfo { name, shape, kind, start: offset, bytes })
    }
}
