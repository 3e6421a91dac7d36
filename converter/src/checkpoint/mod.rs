//! A checkpoint on disk, in any of the three forms that are read.

mod extended;
mod folder;
mod packed;
mod part;
mod side_files;
mod verify;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::mem;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::array::{HostArray, transpose_rows};
use crate::config::ModelConfig;
use crate::dtype::{Overflow, cast, narrow};
use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use crate::layout::{HfTensor, Layout, Llama, Param, Piece};
use crate::pool;
use crate::shard::{FileBytes, Shard, Stored};
use crate::{DType, Packing};
use extended::{Extended, Grown};
use folder::Folder;
pub use packed::{ArrayBytes, PackedArrays};
pub(crate) use packed::{BlocksMut, PACKED, blocks_at_a_time, metadata};
use part::{Part, segments, total, whole};
use verify::{Found, LM_HEAD, verify};

/// `format` in the metadata of a per-head file.
pub(crate) const FORMAT: (&str, &str) = ("format", "xllama-per-head");

/// `version` in the metadata of a per-head file: of one that has only floats, and of one with packed parameters.
pub(crate) const VERSIONS: [&str; 2] = ["1", "2"];

/// Source bytes that are read, converted and moved at a time.
const PIECE: usize = 1 << 20;

/// Called with the bytes done and the bytes in all, from several threads.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// What a checkpoint is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A folder with `config.json` and `model.safetensors` (or several files and an index).
    HuggingFace,
    /// A folder written by [`convert`](crate::convert).
    PerHead,
    /// A `.gguf` file.
    Gguf,
}

/// The two ways to name and lay out a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    HuggingFace,
    PerHead,
}

impl Form {
    /// The tensors that `params` are in files of this form.
    pub(crate) fn tensors(self, params: &Llama<Param>) -> Vec<HfTensor> {
        let whole = |(i, p): (usize, &Param)| HfTensor {
            name: p.name.clone(),
            shape: p.shape.clone(),
            parts: (0..p.pieces.len()).map(|j| (i, j)).collect(),
        };
        match self {
            Form::HuggingFace => params.hf_tensors(),
            Form::PerHead => params.iter().into_iter().enumerate().map(whole).collect(),
        }
    }

    /// The file name of the weights, without extension.
    pub(crate) fn stem(self) -> &'static str {
        match self {
            Form::HuggingFace => "model",
            Form::PerHead => "params",
        }
    }
}

/// An open checkpoint: its configuration, and parameters that have all been found with the right shapes. Tensors stay
/// on disk until they are read; several threads may read at once.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    kind: Kind,
    config: ModelConfig,
    params: Llama<Param>,
    notes: Vec<String>,
    source: Source,
    /// The parameters that lie packed in a per-head folder, by name.
    packings: HashMap<String, Packing>,
    extended: Option<Extended>,
}

#[derive(Debug)]
enum Source {
    Folder(Folder),
    Gguf(GgufFile),
}

impl Checkpoint {
    /// Opens a Hugging Face folder, a per-head folder, or a GGUF file, reading headers only.
    ///
    /// # Errors
    /// Whatever is wrong with the path, its configuration, its files, or its tensors: every tensor must be a parameter
    /// and every parameter a tensor of the expected shape. Passed over are only `rotary_emb.inv_freq`, and an output
    /// head that equals the embedding where the two are tied; [`Checkpoint::notes`] then says so.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let status = fs::metadata(path).map_err(Error::io(path, "opening"))?;
        if !status.is_dir() {
            return Checkpoint::open_gguf(path);
        }
        let (kind, form) = match Folder::has(path, Form::PerHead.stem()) {
            true => (Kind::PerHead, Form::PerHead),
            false => (Kind::HuggingFace, Form::HuggingFace),
        };
        if kind == Kind::HuggingFace {
            check_is_hugging_face(path)?;
        }
        let config_path = path.join("config.json");
        let text = fs::read(&config_path).map_err(Error::io(&config_path, "reading"))?;
        let text = String::from_utf8(text).map_err(|_| Error::format(&config_path, "not UTF-8 text"))?;
        let config = ModelConfig::from_json(&text, &config_path)?;
        let folder = Folder::open(path, form.stem())?;
        let declared = Llama::declare(&config);
        let mut packings = HashMap::new();
        if kind == Kind::PerHead {
            folder.shards.iter().try_for_each(check_format)?;
            packings = packed::packings(&folder, &declared)?;
        }
        let float = config.dtype.unwrap_or(DType::BF16);
        let mut found: BTreeMap<&str, Found<'_>> = folder
            .tensors()
            .map(|(shard, stored)| {
                let dtype = float_type(stored.dtype).ok_or_else(|| format!("{:?}", stored.dtype));
                (stored.name.as_str(), Found { file: &shard.path, shape: &stored.shape, dtype, packing: None })
            })
            .collect();
        packed::stand_in(&mut found, &packings, &declared, float);
        let (params, notes) = verify(&config, &declared, found, form, path)?;
        check_tied_head(&folder, &config)?;
        let (path, source) = (path.to_path_buf(), Source::Folder(folder));
        Ok(Checkpoint { path, kind, config, params, notes, source, packings, extended: None })
    }

    fn open_gguf(path: &Path) -> Result<Checkpoint> {
        let mut magic = Vec::new();
        let file = File::open(path).map_err(Error::io(path, "opening"))?;
        file.take(4).read_to_end(&mut magic).map_err(Error::io(path, "reading"))?;
        if magic != b"GGUF" {
            let what = "expected a folder with config.json and model.safetensors, or a GGUF file; for a safetensors file, give its folder";
            return Err(Error::format(path, what));
        }
        let file = GgufFile::open(path)?;
        let config = ModelConfig::from_value(&file.hf_config()?, path)?;
        let found: BTreeMap<&str, Found<'_>> = file
            .tensors()
            .iter()
            .map(|tensor| {
                let kind = tensor.kind();
                let own = if kind.is_quantized() { Some(DType::BF16) } else { DType::parse(kind.name()) };
                let dtype = own.ok_or_else(|| kind.name().to_string());
                (tensor.hf_name(), Found { file: path, shape: tensor.shape(), dtype, packing: kind.packing() })
            })
            .collect();
        let (params, notes) = verify(&config, &Llama::declare(&config), found, Form::HuggingFace, path)?;
        let (path, source) = (path.to_path_buf(), Source::Gguf(file));
        let packings = HashMap::new();
        Ok(Checkpoint { path, kind: Kind::Gguf, config, params, notes, source, packings, extended: None })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is on disk.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its parameters. Their type is the stored tensor's own; a packed parameter has that of the configuration, and a
    /// quantized tensor of a GGUF file bfloat16.
    pub fn params(&self) -> &Llama<Param> {
        &self.params
    }

    /// A sentence for each kind of tensor that was passed over.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The float type of the whole model, where it has one: of one with packed parameters, that of its configuration.
    pub(crate) fn float_type(&self) -> Option<DType> {
        let packed = self.params.iter().iter().any(|param| param.packing.is_some());
        packed.then_some(self.config.dtype.unwrap_or(DType::BF16))
    }

    /// Whether the configuration is another than that on disk.
    pub(crate) fn is_reconfigured(&self) -> bool {
        self.extended.as_ref().is_some_and(|extended| extended.config)
    }

    pub(crate) fn form(&self) -> Form {
        if self.kind == Kind::PerHead { Form::PerHead } else { Form::HuggingFace }
    }

    /// Reads one parameter in per-head layout, converted to `dtype` (rounded to nearest even).
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Tensor`] for a parameter of another model, a value too large for `dtype`, or one that there
    /// is not enough memory for.
    pub fn read(&self, param: &Param, dtype: DType) -> Result<HostArray> {
        self.read_part(param, dtype, &whole(param))
    }

    /// Reads all parameters on `threads` threads (0: one per core, up to 8), each in `dtype` or, without one, in its own.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; [`Error::Cancelled`] once `cancel` is set.
    pub fn read_all(
        &self,
        dtype: Option<DType>,
        threads: usize,
        progress: Progress<'_>,
        cancel: &AtomicBool,
    ) -> Result<Llama<HostArray>> {
        let params = self.params.iter();
        let target = |param: &Param| dtype.unwrap_or(param.dtype);
        let total = params.iter().map(|p| (p.elements() * target(p).size()) as u64).sum();
        let done = AtomicU64::new(0);
        let slots: Vec<OnceLock<HostArray>> = params.iter().map(|_| OnceLock::new()).collect();
        pool::for_each(threads, params.len(), cancel, |i| {
            let array = self.read_ranges(params[i], target(params[i]), &whole(params[i]), cancel)?;
            let bytes = array.as_bytes().len() as u64;
            progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total);
            slots[i].set(array).expect("each job runs once");
            Ok(())
        })?;
        let arrays = slots.into_iter().map(|slot| slot.into_inner().expect("every job ran"));
        Ok(self.params.from_leaves(arrays).expect("one array per parameter"))
    }

    /// Where a parameter lies in its file, in per-head layout and its own type, to be used without a copy. `None` where
    /// the file has another layout, does not align the tensor to 64 bytes, or has only a part of it.
    ///
    /// # Errors
    /// [`Error::Format`] for a file that has shrunk; [`Error::Tensor`] for a parameter of another model.
    pub fn place(&self, param: &Param) -> Result<Option<FileBytes>> {
        self.place_part(param, &whole(param))
    }

    /// Reads one piece of a parameter in either form.
    pub(crate) fn read_piece(
        &self,
        param: &Param,
        piece: usize,
        dtype: DType,
        form: Form,
        cancel: &AtomicBool,
    ) -> Result<HostArray> {
        let mut array = self.memory(param, &[param.pieces[piece].elements()], dtype)?;
        self.read_into(param, &self.whole_piece(param, piece), dtype, form, array.as_bytes_mut(), cancel)?;
        Ok(array)
    }

    fn memory(&self, param: &Param, shape: &[usize], dtype: DType) -> Result<HostArray> {
        HostArray::zeros(dtype, shape)
            .map_err(|e| Error::tensor(&self.path, &param.name, format!("no memory for {shape:?} of {dtype}: {e}")))
    }

    /// Reads a part of one piece, a few rows at a time, so that memory beyond the result stays small.
    fn read_into(
        &self,
        param: &Param,
        part: &Part,
        dtype: DType,
        form: Form,
        out: &mut [u8],
        cancel: &AtomicBool,
    ) -> Result<()> {
        let transposed = param.layout == Layout::Transposed && (form == Form::PerHead) != self.is_transposed(param);
        let (rows, columns) = (total(&part.rows), total(&part.columns));
        // as many as if the columns were whole: those of a GGUF file are, until they have been decoded
        let step = rows_at_a_time(self.matrix(param, part.piece).1, dtype);
        let width = columns * dtype.size();
        let mut reader = Rows::new(self, param, part, dtype);
        let mut grown = Grown::new(self, param, part, dtype, cancel)?;
        let mut read = |first, count, out: &mut [u8]| match &mut grown {
            Some(grown) => grown.read(&mut reader, first, count, out),
            None => reader.read(first, count, out),
        };
        let mut some = vec![0; if transposed { step.min(rows) * width } else { 0 }];
        let mut done = 0;
        for run in &part.rows {
            for first in run.clone().step_by(step) {
                pool::check(cancel)?;
                let count = step.min(run.end - first);
                if transposed {
                    let some = &mut some[..count * width];
                    read(first, count, some)?;
                    transpose_rows(some, columns, done, out, rows, dtype.size());
                } else {
                    read(first, count, &mut out[done * width..(done + count) * width])?;
                }
                done += count;
            }
        }
        Ok(())
    }

    /// Bytes of memory that [`Checkpoint::read_piece`] takes at most, the result included.
    pub(crate) fn memory_to_read(&self, param: &Param, piece: usize, dtype: DType) -> u64 {
        let (rows, columns) = self.matrix(param, piece);
        let some = rows_at_a_time(columns, dtype).min(rows) * columns;
        // some rows in their place's type, and before that as they are stored
        (rows * columns * dtype.size() + some * (dtype.size() + DType::F64.size())) as u64
    }

    /// A piece as the matrix that is stored, all of it: (rows, columns).
    fn matrix(&self, param: &Param, piece: usize) -> (usize, usize) {
        let Piece { rows, .. } = param.pieces[piece];
        let columns = param.pieces[piece].columns();
        if self.is_transposed(param) { (columns, rows) } else { (rows, columns) }
    }

    /// The part of [`Checkpoint::matrix`] that lies on disk: all of it, unless the vocabulary has grown.
    fn matrix_on_disk(&self, param: &Param, piece: usize) -> (usize, usize) {
        let (rows, columns) = self.matrix(param, piece);
        match self.grown(param) {
            None => (rows, columns),
            Some(extended) if self.is_transposed(param) => (rows, extended.vocab_size),
            Some(extended) => (extended.vocab_size, columns),
        }
    }

    /// Whether a parameter lies on disk as (columns, rows) of what Hugging Face's form has. Packed it does not: its blocks
    /// are outputs, which are rows there.
    fn is_transposed(&self, param: &Param) -> bool {
        self.kind == Kind::PerHead && param.layout == Layout::Transposed && !self.packings.contains_key(&param.name)
    }

    fn unknown(&self, param: &Param) -> Error {
        Error::tensor(&self.path, &param.name, "not a parameter of this checkpoint")
    }
}

/// Reads rows of one piece, or some columns of them, as elements of `dtype`.
struct Rows<'a> {
    checkpoint: &'a Checkpoint,
    param: &'a Param,
    piece: usize,
    /// The columns that are read, of those on disk.
    columns: Vec<Range<usize>>,
    dtype: DType,
    /// Stored bytes of rows that are converted.
    scratch: Vec<u8>,
    /// Dequantized values of rows.
    floats: Vec<f32>,
}

impl<'a> Rows<'a> {
    /// Reads the part's columns.
    fn new(checkpoint: &'a Checkpoint, param: &'a Param, part: &Part, dtype: DType) -> Rows<'a> {
        let (_, on_disk) = checkpoint.matrix_on_disk(param, part.piece);
        let columns = part.columns.iter().map(|run| run.start.min(on_disk)..run.end.min(on_disk));
        let columns = columns.filter(|run| !run.is_empty()).collect();
        Rows { checkpoint, param, piece: part.piece, columns, dtype, scratch: Vec::new(), floats: Vec::new() }
    }

    fn read(&mut self, first: usize, count: usize, out: &mut [u8]) -> Result<()> {
        let checkpoint = self.checkpoint;
        let piece = &self.param.pieces[self.piece];
        let (rows, columns) = checkpoint.matrix_on_disk(self.param, self.piece);
        // a per-head tensor holds the pieces one after another
        let (name, first) = match checkpoint.form() {
            Form::HuggingFace => (piece.name.as_str(), piece.first_row + first),
            Form::PerHead => (self.param.name.as_str(), self.piece * rows + first),
        };
        let (file, narrowed) = match &checkpoint.source {
            Source::Folder(folder) if checkpoint.packings.contains_key(name) => {
                self.floats.resize(count * columns, 0.0);
                let within = first - self.piece * rows;
                checkpoint.unpack_rows(folder, self.param, self.piece, within..within + count, &mut self.floats)?;
                (checkpoint.path(), self.keep_columns(count, columns, out))
            }
            Source::Folder(folder) => {
                let elements = count * total(&self.columns);
                let (shard, Stored { dtype, range, .. }) =
                    folder.get(name).ok_or_else(|| checkpoint.unknown(self.param))?;
                let from = float_type(*dtype).ok_or_else(|| checkpoint.unknown(self.param))?;
                self.scratch.resize(if from == self.dtype { 0 } else { elements * from.size() }, 0);
                let mut bytes = if from == self.dtype { &mut *out } else { &mut self.scratch };
                for segment in segments(first..first + count, &self.columns, columns) {
                    let (now, later) = mem::take(&mut bytes).split_at_mut(segment.len() * from.size());
                    shard.read_at(now, range.start + (segment.start * from.size()) as u64)?;
                    bytes = later;
                }
                if from == self.dtype {
                    return Ok(());
                }
                (shard.path.as_path(), cast(&self.scratch, from, out, self.dtype))
            }
            Source::Gguf(gguf) => {
                self.floats.resize(count * columns, 0.0);
                gguf.read_rows(name, first..first + count, &mut self.floats)?;
                (gguf.path(), self.keep_columns(count, columns, out))
            }
        };
        narrowed.map_err(|Overflow { value }| {
            let what = format!("the value {value} is too large for {}; choose bf16 or f32", self.dtype.torch_name());
            Error::tensor(file, name, what)
        })
    }

    /// Converts the columns that are read of `count` whole rows of `width` values.
    fn keep_columns(&mut self, count: usize, width: usize, out: &mut [u8]) -> Result<(), Overflow> {
        let mut kept = 0;
        for segment in segments(0..count, &self.columns, width) {
            let len = segment.len();
            if kept < segment.start {
                self.floats.copy_within(segment, kept);
            }
            kept += len;
        }
        narrow(&self.floats[..kept], out, self.dtype)
    }
}

/// Rows of a piece: a multiple of the transpose's tile, so that it writes whole cache lines.
fn rows_at_a_time(columns: usize, dtype: DType) -> usize {
    (PIECE / (columns * dtype.size())).next_multiple_of(32).max(32)
}

/// The float type of a safetensors type, if it is one of ours.
fn float_type(dtype: safetensors::Dtype) -> Option<DType> {
    match dtype {
        safetensors::Dtype::F16 => Some(DType::F16),
        safetensors::Dtype::BF16 => Some(DType::BF16),
        safetensors::Dtype::F32 => Some(DType::F32),
        safetensors::Dtype::F64 => Some(DType::F64),
        _ => None,
    }
}

/// Refuses a per-head file of another format or version.
fn check_format(shard: &Shard) -> Result<()> {
    let found = |key: &str| shard.metadata.get(key).map(String::as_str);
    let told = |key: &str| found(key).map_or("nothing".to_string(), |x| format!("{x:?}"));
    let (key, format) = FORMAT;
    let what = if found(key) != Some(format) {
        format!("{key} {format:?} in the metadata of a per-head file, found {}", told(key))
    } else if !found("version").is_some_and(|version| VERSIONS.contains(&version)) {
        format!("version \"1\" or \"2\" in the metadata of a per-head file, found {}", told("version"))
    } else {
        return Ok(());
    };
    Err(Error::format(&shard.path, format!("expected {what}; convert the model again")))
}

/// Refuses folders that are something else, with what to do about it.
fn check_is_hugging_face(path: &Path) -> Result<()> {
    let has = |name: &str| path.join(name).exists();
    let what = if has("adapter_config.json") {
        "an adapter (adapter_config.json), not a whole model; merge it into its base model first"
    } else if Folder::has(path, Form::HuggingFace.stem()) {
        return Ok(());
    } else if has("pytorch_model.bin") || has("pytorch_model.bin.index.json") {
        "has only pytorch_model.bin; save the model as safetensors first (transformers: save_pretrained)"
    } else if has("consolidated.00.pth") {
        "has weights in Meta's own form; convert them to a Hugging Face folder with safetensors first"
    } else {
        "expected model.safetensors, model.safetensors.index.json or params.safetensors in this folder, found none of them"
    };
    Err(Error::format(path, what))
}

/// A head that is stored although it is tied must be the embedding, or the configuration is wrong.
fn check_tied_head(folder: &Folder, config: &ModelConfig) -> Result<()> {
    let (true, Some((head_file, head))) = (config.tie_word_embeddings, folder.get(LM_HEAD)) else { return Ok(()) };
    let Some((file, embedding)) = folder.get("model.embed_tokens.weight") else { return Ok(()) };
    let differs = || {
        let what = "tie_word_embeddings is true, but it differs from model.embed_tokens.weight; if the head is meant to be used, set tie_word_embeddings to false in config.json";
        Err(Error::tensor(&head_file.path, LM_HEAD, what))
    };
    if head.dtype != embedding.dtype {
        return differs();
    }
    let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
    let len = head.range.end - head.range.start;
    for offset in (0..len).step_by(PIECE) {
        let count = (len - offset).min(PIECE as u64) as usize;
        head_file.read_at(&mut a[..count], head.range.start + offset)?;
        file.read_at(&mut b[..count], embedding.range.start + offset)?;
        if a[..count] != b[..count] {
            return differs();
        }
    }
    Ok(())
}
