//! GGUF files: weights as float32 in Hugging Face's names, shapes, values and row order, and the configuration and
//! tokenizer files that a Hugging Face folder would have. The architectures are a table, `arch.rs`.
//!
//! Opening reads the head of the file only; weights are read row by row when asked for. The file is never trusted:
//! whatever it claims is checked first, and a wrong claim is an [`Error`] that says which.

mod arch;
mod config;
mod header;
mod metadata;
mod names;
mod quant;
mod rows;
mod source;
mod tokenizer;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::error::Error;
use arch::Architecture;
use config::{Heads, Keys};
use header::{Header, TensorInfo};
use names::Role;
use rows::Form;
use source::Source;

pub use metadata::{Metadata, Value};
pub use quant::TensorType;
pub use rows::RowCodes;

/// The key that names the architecture.
const ARCHITECTURE: &str = "general.architecture";
/// Divisors of rotary frequencies; part of the configuration in Hugging Face's form.
const ROPE_FACTORS: &str = "rope_freqs.weight";
const ROPE_FACTORS_LONG: &str = "rope_factors_long.weight";
const ROPE_FACTORS_SHORT: &str = "rope_factors_short.weight";

/// No real model has more tensors, each expert's counted; bounds the memory that a hostile file can ask for.
const MAX_TENSORS: usize = 1 << 20;

/// An open GGUF file. Shared between threads by reference.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    source: Source,
    metadata: Metadata,
    architecture: &'static Architecture,
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
    /// Those of the tensors [`ROPE_FACTORS`], [`ROPE_FACTORS_LONG`] and [`ROPE_FACTORS_SHORT`] that there are.
    rope_factors: Vec<TensorInfo>,
}

/// One tensor as it would stand in a Hugging Face checkpoint. Of a tensor that has all experts, each expert is one.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    info: TensorInfo,
    hf_name: String,
    form: Form,
}

impl GgufTensor {
    /// Hugging Face's name, e.g. `model.layers.0.self_attn.q_proj.weight`.
    pub fn hf_name(&self) -> &str {
        &self.hf_name
    }

    /// The name in the file, e.g. `blk.0.attn_q.weight`.
    pub fn gguf_name(&self) -> &str {
        &self.info.name
    }

    /// Sizes in Hugging Face's order, slowest axis first.
    pub fn shape(&self) -> &[usize] {
        &self.info.shape
    }

    /// How the values are stored.
    pub fn kind(&self) -> TensorType {
        self.info.kind
    }

    /// Size of the stored data in bytes.
    pub fn bytes(&self) -> u64 {
        self.info.bytes
    }
}

impl GgufFile {
    /// Opens `path` and reads its head.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a file that is not GGUF of version 2 or 3, is big-endian, truncated or
    /// inconsistent; [`Error::Config`] for an unknown architecture; [`Error::Tensor`] for a tensor that the architecture
    /// does not have, of a type that cannot be read, or placed outside the file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io(path, "opening"))?;
        let len = file.metadata().map_err(Error::io(path, "opening"))?.len();
        let header = Header::parse(&mut BufReader::with_capacity(1 << 16, &file), len, path)?;
        Self::new(header, Source::File(file), path)
    }

    /// The same for a file that is in memory; `path` is for messages only.
    ///
    /// # Errors
    /// As [`GgufFile::open`].
    pub fn from_bytes(bytes: Vec<u8>, path: &Path) -> Result<Self, Error> {
        let mut reader: &[u8] = &bytes;
        let header = Header::parse(&mut reader as &mut dyn Read, bytes.len() as u64, path)?;
        Self::new(header, Source::Bytes(bytes), path)
    }

    fn new(header: Header, source: Source, path: &Path) -> Result<Self, Error> {
        let Header { metadata, tensors } = header;
        let name = metadata.str(ARCHITECTURE)?.ok_or_else(|| metadata.missing(ARCHITECTURE))?;
        let architecture = Architecture::find(name).map_err(|what| Error::config(path, ARCHITECTURE, what))?;
        if let Some(parts @ 2..) = metadata.u64("split.count")? {
            let message = format!("is {parts}: this is one part of a split model; merge the parts into one file first");
            return Err(Error::config(path, "split.count", message));
        }

        let keys = Keys { metadata: &metadata, architecture };
        let (heads, layers) = (Heads::read(&keys)?, keys.layers()?);
        let mut found = Vec::new();
        let mut rope_factors = Vec::new();
        for info in tensors {
            if [ROPE_FACTORS, ROPE_FACTORS_LONG, ROPE_FACTORS_SHORT].contains(&info.name.as_str()) {
                rope_factors.push(info);
            } else if !names::block(&info.name).is_some_and(|(layer, _)| layers.drafting().contains(&layer)) {
                add(&mut found, info, architecture, heads).map_err(|(name, what)| Error::tensor(path, name, what))?;
            }
        }
        let by_name = found.iter().enumerate().map(|(index, tensor)| (tensor.hf_name.clone(), index)).collect();
        Ok(Self { path: path.to_owned(), source, metadata, architecture, tensors: found, by_name, rope_factors })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors in the file's order, without those that are part of the configuration.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The tensor with this Hugging Face name.
    pub fn tensor(&self, hf_name: &str) -> Option<&GgufTensor> {
        self.by_name.get(hf_name).map(|&index| &self.tensors[index])
    }

    /// Whether any tensor is stored in a quantized type.
    pub fn is_quantized(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.kind().is_quantized())
    }

    /// Writes rows (indices of the first axis; single elements of a vector) of a tensor to `out` as float32, as Hugging
    /// Face has them: where the architecture interleaves query and key rows they are moved to split halves, and where
    /// it stores norms with 1 added that is subtracted.
    ///
    /// Float types are widened exactly; quantized values are those of the `gguf` Python package bit for bit. Memory
    /// beyond `out` is bounded by one head of one projection, or 256 KiB of file.
    ///
    /// # Errors
    /// [`Error::Tensor`] for an unknown name, rows out of range, or an `out` of another length than the rows have;
    /// [`Error::Io`] where the file cannot be read any more.
    pub fn read_rows(&self, hf_name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        let tensor = self.tensor_with(hf_name, &rows)?;
        let expected = rows.len() * tensor.shape()[1..].iter().product::<usize>();
        if out.len() != expected {
            let what = format!("{} rows have {expected} elements, the destination has {}", rows.len(), out.len());
            return Err(Error::tensor(&self.path, hf_name, what));
        }
        rows::read_rows(&self.source, &tensor.info, tensor.form, rows, out).map_err(Error::io(&self.path, "reading"))
    }

    /// Takes rows of a quantized tensor apart into codes, scales and minima, as [`TensorType::packing`] says they are packed,
    /// with the rows in the order of [`GgufFile::read_rows`]. Their values are those of `read_rows` bit for bit.
    ///
    /// # Errors
    /// [`Error::Tensor`] for an unknown name, rows out of range, or a tensor of a float type or of one axis; [`Error::Io`] where the file
    /// cannot be read any more.
    pub fn read_codes(&self, hf_name: &str, rows: Range<usize>, out: &mut RowCodes) -> Result<(), Error> {
        let tensor = self.tensor_with(hf_name, &rows)?;
        let (kind, columns) = (tensor.kind(), tensor.shape()[1..].iter().product::<usize>());
        if !kind.is_quantized() || !columns.is_multiple_of(kind.block_len()) {
            let what = format!("rows of {columns} elements of type {} are not blocks of codes", kind.name());
            return Err(Error::tensor(&self.path, hf_name, what));
        }
        rows::read_codes(&self.source, &tensor.info, tensor.form, rows, out).map_err(Error::io(&self.path, "reading"))
    }

    /// The tensor of this name, which has these rows.
    fn tensor_with(&self, hf_name: &str, rows: &Range<usize>) -> Result<&GgufTensor, Error> {
        let bad = |what: String| Error::tensor(&self.path, hf_name, what);
        let tensor = self.tensor(hf_name).ok_or_else(|| bad("there is no such tensor in the file".into()))?;
        let found = tensor.shape()[0];
        if rows.start > rows.end || rows.end > found {
            return Err(bad(format!("rows {}..{} were asked for, it has {found}", rows.start, rows.end)));
        }
        Ok(tensor)
    }

    /// `config.json` of the model, as transformers (4 and 5) would write it.
    ///
    /// # Errors
    /// [`Error::Config`] for metadata that is missing, contradictory, or changes the result in a way that is not
    /// supported.
    pub fn hf_config(&self) -> Result<Json, Error> {
        config::hf_config(self)
    }

    /// The tokenizer's files as a Hugging Face folder has them, name and content: `tokenizer.json`,
    /// `tokenizer_config.json` (with the chat template), `special_tokens_map.json`, `generation_config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] for a tokenizer that is missing, contradictory or of an unknown kind.
    pub fn tokenizer_files(&self) -> Result<Vec<(String, Vec<u8>)>, Error> {
        tokenizer::tokenizer_files(self.keys())
    }

    /// The metadata under the architecture's name.
    fn keys(&self) -> Keys<'_> {
        Keys { metadata: &self.metadata, architecture: self.architecture }
    }

    /// The values of one of the tensors that belong to the configuration.
    fn rope_factors(&self, name: &str) -> Result<Option<Vec<f32>>, Error> {
        let Some(info) = self.rope_factors.iter().find(|info| info.name == name) else { return Ok(None) };
        let mut values = vec![0.0; info.shape.iter().product()];
        rows::read_rows(&self.source, info, Form::Same, 0..info.shape[0], &mut values)
            .map_err(Error::io(&self.path, "reading"))?;
        Ok(Some(values))
    }
}

/// Adds what the tensor is in a Hugging Face checkpoint to `found`: itself, or its experts. The error is the tensor's
/// name and what is wrong with it.
fn add(
    found: &mut Vec<GgufTensor>,
    info: TensorInfo,
    architecture: &Architecture,
    heads: Heads,
) -> Result<(), (String, String)> {
    let Some(hf) = architecture.hf_name(&info.name) else {
        let what =
            format!("is not a tensor of the architecture `{}`; its shape is {:?}", architecture.name, info.shape);
        return Err((info.name, what));
    };
    let (mut shape, mut form) = (info.shape.clone(), Form::Same);
    match hf.role {
        Role::Norm if architecture.norms_plus_one => form = Form::PlusOne,
        Role::Query if architecture.interleaved => form = Form::Interleaved(heads.query),
        Role::Key if architecture.interleaved => form = Form::Interleaved(heads.key_value),
        Role::Row if shape.len() == 1 => shape.insert(0, 1),
        Role::Experts if shape.len() != 3 => {
            let what = format!("has the shape {shape:?}; experts are stacked in three axes");
            return Err((info.name, what));
        }
        _ => {}
    }
    if let Form::Interleaved(heads) = form
        && !shape[0].is_multiple_of(2 * heads)
    {
        let what = format!("has {} rows, which {heads} heads of an even size cannot share", shape[0]);
        return Err((info.name, what));
    }
    let experts = if hf.role == Role::Experts { shape.remove(0) } else { 1 };
    if experts > MAX_TENSORS - found.len() {
        let what = format!("is one tensor too many; a file may have {MAX_TENSORS}, each expert's counted");
        return Err((info.name, what));
    }
    // Blocks lie within rows, so an expert has whole bytes.
    let bytes = info.bytes / experts as u64;
    for expert in 0..experts {
        let start = info.start + expert as u64 * bytes;
        let info = TensorInfo { name: info.name.clone(), shape: shape.clone(), kind: info.kind, start, bytes };
        found.push(GgufTensor { info, hf_name: hf.name.replace("{}", &expert.to_string()), form });
    }
    Ok(())
}
