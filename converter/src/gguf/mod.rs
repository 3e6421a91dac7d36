//! GGUF files of the architecture `llama`: weights as float32 in Hugging Face's names, shapes and row order, and the
//! configuration and tokenizer files that a Hugging Face folder would have.
//!
//! Opening reads the head of the file only; weights are read row by row when asked for. The file is never trusted:
//! whatever it claims is checked first, and a wrong claim is an [`Error`] that says which.

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
use header::{Header, TensorInfo};
use names::Rotary;
use source::Source;

pub use metadata::{Metadata, Value};
pub use quant::TensorType;

/// The architecture that can be read, as `general.architecture` spells it.
const ARCHITECTURE: &str = "llama";
/// Rotary frequency divisors; part of the configuration in Hugging Face's form.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// An open GGUF file. Shared between threads by reference.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    source: Source,
    metadata: Metadata,
    tensors: Vec<GgufTensor>,
    by_name: HashMap<String, usize>,
    /// The tensor [`ROPE_FACTORS`], if there is one.
    rope_factors: Option<TensorInfo>,
}

/// One tensor as it would stand in a Hugging Face checkpoint.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    info: TensorInfo,
    hf_name: String,
    heads: Option<usize>,
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
    /// inconsistent; [`Error::Config`] for another architecture; [`Error::Tensor`] for a tensor that the architecture
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
        let architecture =
            metadata.str("general.architecture")?.ok_or_else(|| metadata.missing("general.architecture"))?;
        if architecture != ARCHITECTURE {
            let message = format!("must be `{ARCHITECTURE}`, the one supported architecture, found `{architecture}`");
            return Err(Error::config(path, "general.architecture", message));
        }
        if let Some(parts @ 2..) = metadata.u64("split.count")? {
            let message = format!("is {parts}: this is one part of a split model; merge the parts into one file first");
            return Err(Error::config(path, "split.count", message));
        }

        let heads = config::Heads::read(&metadata)?;
        let mut this = Self {
            path: path.to_owned(),
            source,
            metadata,
            tensors: vec![],
            by_name: HashMap::new(),
            rope_factors: None,
        };
        for info in tensors {
            if info.name == ROPE_FACTORS {
                this.rope_factors = Some(info);
                continue;
            }
            let Some(hf) = names::hf_name(&info.name) else {
                let message =
                    format!("is not a tensor of the architecture `{ARCHITECTURE}`; its shape is {:?}", info.shape);
                return Err(Error::tensor(path, info.name, message));
            };
            let heads = hf.rotary.map(|rotary| match rotary {
                Rotary::Query => heads.query,
                Rotary::Key => heads.key_value,
            });
            if let Some(heads) = heads.filter(|heads| !info.shape[0].is_multiple_of(2 * heads)) {
                let message = format!("has {} rows, which {heads} heads of an even size cannot share", info.shape[0]);
                return Err(Error::tensor(path, info.name, message));
            }
            this.by_name.insert(hf.name.clone(), this.tensors.len());
            this.tensors.push(GgufTensor { info, hf_name: hf.name, heads });
        }
        Ok(this)
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

    /// Writes rows (indices of the first axis; single elements of a vector) of a tensor to `out` as float32, in
    /// Hugging Face's order: query and key rows are moved from GGUF's interleaved rotary order to split halves.
    ///
    /// Float types are widened exactly; quantized values are those of the `gguf` Python package bit for bit. Memory
    /// beyond `out` is bounded by one head of one projection, or 256 KiB of file.
    ///
    /// # Errors
    /// [`Error::Tensor`] for an unknown name, rows out of range, or an `out` of another length than the rows have;
    /// [`Error::Io`] where the file cannot be read any more.
    pub fn read_rows(&self, hf_name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        let tensor = self
            .tensor(hf_name)
            .ok_or_else(|| Error::tensor(&self.path, hf_name, "there is no such tensor in the file"))?;
        let shape = tensor.shape();
        if rows.start > rows.end || rows.end > shape[0] {
            let what = format!("rows {}..{} were asked for, it has {}", rows.start, rows.end, shape[0]);
            return Err(Error::tensor(&self.path, hf_name, what));
        }
        let expected = rows.len() * shape[1..].iter().product::<usize>();
        if out.len() != expected {
            let what = format!("{} rows have {expected} elements, the destination has {}", rows.len(), out.len());
            return Err(Error::tensor(&self.path, hf_name, what));
        }
        rows::read_rows(&self.source, &tensor.info, tensor.heads, rows, out).map_err(Error::io(&self.path, "reading"))
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
        tokenizer::tokenizer_files(&self.metadata)
    }

    /// The values of [`ROPE_FACTORS`].
    fn rope_factors(&self) -> Result<Option<Vec<f32>>, Error> {
        let Some(info) = &self.rope_factors else { return Ok(None) };
        let mut values = vec![0.0; info.shape.iter().product()];
        rows::read_rows(&self.source, info, None, 0..info.shape[0], &mut values)
            .map_err(Error::io(&self.path, "reading"))?;
        Ok(Some(values))
    }
}
