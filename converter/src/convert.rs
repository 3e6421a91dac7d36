//! From one folder to another, streaming: to per-head form and back.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use kernels::packed::BLOCK;
use serde_json::{Value, json};

use crate::checkpoint::{BlocksMut, Checkpoint, FORMAT, Form, Kind, PACKED, Progress, VERSIONS};
use crate::checkpoint::{blocks_at_a_time, metadata};
use crate::error::{Error, Result};
use crate::extend::Extension;
use crate::layout::{Contraction, Param};
use crate::packing::{PackedTensor, Packing, Precision};
use crate::pool::{self, Budget};
use crate::staging::Staging;
use crate::writer::{Entry, Place, Plan, ShardWriter};
use crate::{DType, HostArray};

/// Bytes of tensors in one file of an exported model, unless asked otherwise; what transformers 4 wrote.
const EXPORT_SHARD: u64 = 5_000_000_000;

/// Bytes that are written between two reports of progress.
const SLICE: usize = 16 << 20;

/// Memory for tensors in flight that is always allowed, however small the largest tensor.
const MIN_BUDGET: u64 = 128 << 20;

/// How to write a model.
#[derive(Clone, Debug, Default)]
pub struct ConvertOptions {
    /// What every parameter becomes. Without one each keeps its own type, and a packed one its codes and scales, those of a
    /// quantized GGUF file too; [`export_hf`] then writes such a model in the float type of its configuration.
    pub dtype: Option<Precision>,
    /// Bytes of tensors in one file. Without a value [`convert`] writes one file, [`export_hf`] files of 5 GB.
    pub shard_size: Option<u64>,
    /// Threads that read, convert and write; 0 for one per core, up to 8.
    pub threads: usize,
    /// How the model is to be larger than the source.
    pub extension: Extension,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Report {
    /// Number of tensors.
    pub tensors: usize,
    /// Bytes of tensors.
    pub bytes: u64,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Number of tokens that were added to the tokenizer.
    pub added_tokens: usize,
    /// Wall-clock time, opening included.
    pub seconds: f64,
    /// What was passed over in the source, in sentences.
    pub notes: Vec<String>,
}

/// Writes the checkpoint `src` (a Hugging Face folder, a GGUF file, or a per-head folder) as the per-head folder `dst`:
/// `params.safetensors`, `config.json` (unchanged unless the float type is or the model is extended), and the files beside it.
///
/// Memory stays below three times the largest tensor and 200 MB, whatever the size of the model. `progress` is called
/// from several threads. `dst` must not exist or be an empty folder, and appears only when it is whole.
///
/// # Errors
/// Those of [`Checkpoint::open`], [`Checkpoint::extended`] and [`Checkpoint::read`]; [`Error::Destination`] where `dst` cannot be used;
/// [`Error::Cancelled`] soon after `cancel` is set; for [`Precision::Int8`] and [`Precision::Int4`] a weight that is not
/// finite. Nothing is then left behind.
pub fn convert(
    src: &Path,
    dst: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
    cancel: &AtomicBool,
) -> Result<Report> {
    write(src, dst, Form::PerHead, options, progress, cancel)
}

/// Writes the checkpoint `src`, of any kind, as a Hugging Face folder that transformers loads. From a folder that
/// [`convert`] made of float tensors in their own type, the result has the original's tensors bit for bit. Packed parameters
/// become floats.
///
/// # Errors
/// As [`convert`]; [`Error::Destination`] for a precision that is no float type.
pub fn export_hf(
    src: &Path,
    dst: &Path,
    options: &ConvertOptions,
    progress: Progress<'_>,
    cancel: &AtomicBool,
) -> Result<Report> {
    write(src, dst, Form::HuggingFace, options, progress, cancel)
}

fn write(
    src: &Path,
    dst: &Path,
    form: Form,
    options: &ConvertOptions,
    progress: Progress<'_>,
    cancel: &AtomicBool,
) -> Result<Report> {
    let start = Instant::now();
    let float = match options.dtype {
        Some(Precision::Int8 | Precision::Int4) if form == Form::HuggingFace => {
            let what = "a Hugging Face folder has float parameters; choose f32, bf16 or f16, or write it with convert";
            return Err(Error::Destination { path: dst.to_path_buf(), what: what.into() });
        }
        Some(Precision::Float(dtype)) => Some(dtype),
        Some(Precision::Int8 | Precision::Int4) | None => None,
    };
    let checkpoint = Checkpoint::open(src)?.extended(&options.extension)?;
    let staging = Staging::new(src, dst)?;

    let float = float.or(if form == Form::HuggingFace { checkpoint.float_type() } else { None });
    let Outputs { entries, jobs, packed } = Outputs::new(&checkpoint, form, options.dtype, float);
    let params = checkpoint.params().iter();
    let packed_metadata = metadata(packed.iter().map(|&(i, packing)| (params[i], packing)));
    let (metadata, shard_size): (&[_], _) = match form {
        Form::PerHead if packed.is_empty() => (&[FORMAT, ("version", VERSIONS[0])], u64::MAX),
        Form::PerHead => (&[FORMAT, ("version", VERSIONS[1]), (PACKED, &packed_metadata)], u64::MAX),
        Form::HuggingFace => (&[("format", "pt")], EXPORT_SHARD),
    };
    let plan = Plan::new(&entries, form.stem(), metadata, options.shard_size.unwrap_or(shard_size));

    staging.write("config.json", &config_json(&checkpoint, float, !packed.is_empty())?)?;
    for (name, content) in checkpoint.side_files()? {
        staging.write(&name, &content)?;
    }
    if let Some((name, content)) = &plan.index {
        staging.write(name, content)?;
    }

    let writers: Vec<ShardWriter> =
        plan.files.iter().map(|file| ShardWriter::create(staging.path(), file)).collect::<Result<_>>()?;
    let total = entries.iter().map(Entry::bytes).sum();
    let largest = jobs.iter().map(|job| job.bytes).max().unwrap_or(0);
    let budget = Budget::new(MIN_BUDGET.max(2 * largest));
    let done = AtomicU64::new(0);
    let put = |bytes: &[u8], Place { file, mut offset }: Place| {
        for slice in bytes.chunks(SLICE) {
            pool::check(cancel)?;
            writers[file].write_at(slice, offset)?;
            offset += slice.len() as u64;
            progress(done.fetch_add(slice.len() as u64, Ordering::Relaxed) + slice.len() as u64, total);
        }
        Ok(())
    };
    progress(0, total);
    pool::for_each(options.threads, jobs.len(), cancel, |i| {
        let job = &jobs[i];
        let (param, place) = (params[job.param], |entry: usize, at: usize| Place {
            offset: plan.places[entry].offset + at as u64,
            ..plan.places[entry]
        });
        match &job.what {
            What::Floats { dtype, offset } => {
                let _loan = budget.take(checkpoint.memory_to_read(param, job.piece, *dtype));
                let array: HostArray = checkpoint.read_piece(param, job.piece, *dtype, form, cancel)?;
                put(array.as_bytes(), place(job.entry, *offset))
            }
            What::Blocks { packing, of, blocks } => {
                let _loan = budget.take(job.bytes + checkpoint.memory_to_pack(of.k));
                let (q_bytes, scales_bytes) = (packing.q_bytes(of.k), packing.scales_bytes(of.k));
                let mut q = vec![0; blocks.len() * q_bytes];
                let mut scales = vec![0; blocks.len() * scales_bytes];
                let mut mins = vec![0; if packing.format.mins { scales.len() } else { 0 }];
                let room = BlocksMut { q: &mut q, scales: &mut scales, mins: &mut mins };
                checkpoint.read_blocks(param, *packing, job.piece, blocks.clone(), room, cancel)?;
                let first = job.piece * of.n.div_ceil(BLOCK) + blocks.start;
                put(&q, place(job.entry, first * q_bytes))?;
                put(&scales, place(job.entry + 1, first * scales_bytes))?;
                if mins.is_empty() { Ok(()) } else { put(&mins, place(job.entry + 2, first * scales_bytes)) }
            }
        }
    })?;
    pool::for_each(options.threads, writers.len(), cancel, |i| writers[i].sync())?;
    staging.finish()?;
    let notes = checkpoint.notes().to_vec();
    Ok(Report {
        tensors: entries.len(),
        bytes: total,
        vocab_size: checkpoint.config().vocab_size,
        added_tokens: options.extension.tokens.as_ref().map_or(0, |tokens| tokens.tokens().len()),
        seconds: start.elapsed().as_secs_f64(),
        notes,
    })
}

/// What is written: tensors, and the work that fills them.
struct Outputs {
    entries: Vec<Entry>,
    jobs: Vec<Job>,
    /// The parameters that are packed, by index.
    packed: Vec<(usize, Packing)>,
}

/// Some of a parameter on its way to its tensor, or to those of a packed one.
struct Job {
    /// The tensor, or the first of them.
    entry: usize,
    param: usize,
    piece: usize,
    /// How many are written.
    bytes: u64,
    what: What,
}

enum What {
    /// A whole piece, to `offset` bytes within the tensor.
    Floats { dtype: DType, offset: usize },
    /// Blocks of 16 outputs of a piece.
    Blocks { packing: Packing, of: Contraction, blocks: Range<usize> },
}

impl Outputs {
    /// Every tensor, and every part of one, in order.
    fn new(checkpoint: &Checkpoint, form: Form, asked: Option<Precision>, float: Option<DType>) -> Outputs {
        let params = checkpoint.params().iter();
        let mut this = Outputs { entries: Vec::new(), jobs: Vec::new(), packed: Vec::new() };
        for tensor in form.tensors(checkpoint.params()) {
            let first = tensor.parts[0].0;
            let param = params[first];
            let packing = match asked {
                Some(Precision::Int8) => Packing::INT8.of(param),
                Some(Precision::Int4) => Packing::INT4.of(param),
                Some(Precision::Float(_)) => None,
                None => param.packing.filter(|_| form == Form::PerHead),
            };
            if let (Some(packing), Some(of)) = (packing, param.contraction()) {
                this.packed(first, param, packing, of);
                continue;
            }
            let dtype = float.filter(|_| !param.precise).unwrap_or(param.dtype);
            let mut offset = 0;
            for &(param, piece) in &tensor.parts {
                let bytes = params[param].pieces[piece].elements() * dtype.size();
                let what = What::Floats { dtype, offset };
                this.jobs.push(Job { entry: this.entries.len(), param, piece, bytes: bytes as u64, what });
                offset += bytes;
            }
            this.entries.push(Entry { name: tensor.name, dtype: dtype.into(), shape: tensor.shape });
        }
        this
    }

    fn packed(&mut self, index: usize, param: &Param, packing: Packing, of: Contraction) {
        self.packed.push((index, packing));
        let times = if packing.format.mins { 2 } else { 1 };
        let bytes_each = packing.q_bytes(of.k) + times * packing.scales_bytes(of.k);
        let (all, step) = (of.n.div_ceil(BLOCK), blocks_at_a_time(of.k));
        for piece in 0..param.pieces.len() {
            for first in (0..all).step_by(step) {
                let blocks = first..all.min(first + step);
                let bytes = (blocks.len() * bytes_each) as u64;
                let what = What::Blocks { packing, of, blocks };
                self.jobs.push(Job { entry: self.entries.len(), param: index, piece, bytes, what });
            }
        }
        let entries = packing.tensors(param, of).into_iter();
        self.entries.extend(entries.map(|PackedTensor { name, dtype, shape }| Entry { name, dtype, shape }));
    }
}

/// The source's `config.json`, byte for byte unless the model is extended or the element type of the weights is no longer
/// what it says.
pub(crate) fn config_json(checkpoint: &Checkpoint, written: Option<DType>, packed: bool) -> Result<Vec<u8>> {
    let from_gguf = checkpoint.kind() == Kind::Gguf;
    let named = checkpoint.config().dtype;
    // packed parameters have no other place that says what they are as floats
    let own = || checkpoint.float_type().unwrap_or(checkpoint.params().embedding.dtype);
    let written = written.or_else(|| (from_gguf || packed && named.is_none()).then(own));
    if !from_gguf && !checkpoint.is_reconfigured() && written.is_none_or(|dtype| named == Some(dtype)) {
        let path = checkpoint.path().join("config.json");
        return fs::read(&path).map_err(Error::io(&path, "reading"));
    }
    let mut config = checkpoint.config().raw.clone();
    if let (Some(written), Value::Object(keys)) = (written, &mut config) {
        let old_spelling = keys.contains_key("torch_dtype") || !keys.contains_key("dtype");
        let new_spelling = keys.contains_key("dtype") || !keys.contains_key("torch_dtype");
        for (key, wanted) in [("dtype", new_spelling), ("torch_dtype", old_spelling)] {
            if wanted {
                keys.insert(key.into(), json!(written.torch_name()));
            }
        }
    }
    Ok(format!("{config:#}\n").into_bytes())
}
