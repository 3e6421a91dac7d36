//! From one folder to another, streaming: to per-head form and back.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::DType;
use crate::checkpoint::{Checkpoint, FORMAT, Form, Kind, Progress};
use crate::error::{Error, Result};
use crate::extend::Extension;
use crate::layout::{HfTensor, Param};
use crate::pool::{self, Budget};
use crate::staging::Staging;
use crate::writer::{Entry, Plan, ShardWriter};

/// Bytes of tensors in one file of an exported model, unless asked otherwise; what transformers 4 wrote.
const EXPORT_SHARD: u64 = 5_000_000_000;

/// Bytes that are written between two reports of progress.
const SLICE: usize = 16 << 20;

/// Memory for tensors in flight that is always allowed, however small the largest tensor.
const MIN_BUDGET: u64 = 128 << 20;

/// How to write a model.
#[derive(Clone, Debug, Default)]
pub struct ConvertOptions {
    /// Element type of every tensor; without one each keeps its own (bfloat16 from a quantized GGUF file).
    pub dtype: Option<DType>,
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
/// `params.safetensors`, `config.json` (unchanged unless the element type is or the model is extended), and the files beside it.
///
/// Memory stays below three times the largest tensor and 200 MB, whatever the size of the model. `progress` is called
/// from several threads. `dst` must not exist or be an empty folder, and appears only when it is whole.
///
/// # Errors
/// Those of [`Checkpoint::open`], [`Checkpoint::extended`] and [`Checkpoint::read`]; [`Error::Destination`] where `dst` cannot be used;
/// [`Error::Cancelled`] soon after `cancel` is set. Nothing is then left behind.
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
/// [`convert`] made of float tensors in their own type, the result has the original's tensors bit for bit.
///
/// # Errors
/// As [`convert`].
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
    let checkpoint = Checkpoint::open(src)?.extended(&options.extension)?;
    let staging = Staging::new(src, dst)?;

    let params = checkpoint.params().iter();
    let tensors = form.tensors(checkpoint.params());
    let entry = |tensor: &HfTensor| Entry {
        name: tensor.name.clone(),
        dtype: options.dtype.filter(|_| !params[tensor.parts[0].0].precise).unwrap_or(params[tensor.parts[0].0].dtype),
        shape: tensor.shape.clone(),
    };
    let entries: Vec<Entry> = tensors.iter().map(entry).collect();
    let (metadata, shard_size): (&[_], _) = match form {
        Form::PerHead => (&FORMAT, u64::MAX),
        Form::HuggingFace => (&[("format", "pt")], EXPORT_SHARD),
    };
    let plan = Plan::new(&entries, form.stem(), metadata, options.shard_size.unwrap_or(shard_size));

    staging.write("config.json", &config_json(&checkpoint, &entries, options.dtype)?)?;
    for (name, content) in checkpoint.side_files()? {
        staging.write(&name, &content)?;
    }
    if let Some((name, content)) = &plan.index {
        staging.write(name, content)?;
    }

    let writers: Vec<ShardWriter> =
        plan.files.iter().map(|file| ShardWriter::create(staging.path(), file)).collect::<Result<_>>()?;
    let jobs = jobs(&tensors, &entries, &params);
    let total = entries.iter().map(Entry::bytes).sum();
    let largest = jobs.iter().map(|job| job.bytes).max().unwrap_or(0);
    let budget = Budget::new(MIN_BUDGET.max(2 * largest));
    let done = AtomicU64::new(0);
    progress(0, total);
    pool::for_each(options.threads, jobs.len(), cancel, |i| {
        let Job { tensor, param, piece, offset, .. } = jobs[i];
        let (param, dtype, place) = (params[param], entries[tensor].dtype, plan.places[tensor]);
        let _loan = budget.take(checkpoint.memory_to_read(param, piece, dtype));
        let array = checkpoint.read_piece(param, piece, dtype, form, cancel)?;
        let mut offset = place.offset + offset;
        for slice in array.as_bytes().chunks(SLICE) {
            pool::check(cancel)?;
            writers[place.file].write_at(slice, offset)?;
            offset += slice.len() as u64;
            progress(done.fetch_add(slice.len() as u64, Ordering::Relaxed) + slice.len() as u64, total);
        }
        Ok(())
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

/// One piece of a parameter on its way to its tensor.
#[derive(Clone, Copy)]
struct Job {
    tensor: usize,
    param: usize,
    piece: usize,
    /// Where in the tensor it goes, in bytes.
    offset: u64,
    bytes: u64,
}

/// Every piece of every tensor, in order.
fn jobs(tensors: &[HfTensor], entries: &[Entry], params: &[&Param]) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (tensor, HfTensor { parts, .. }) in tensors.iter().enumerate() {
        let mut offset = 0;
        for &(param, piece) in parts {
            let bytes = (params[param].pieces[piece].elements() * entries[tensor].dtype.size()) as u64;
            jobs.push(Job { tensor, param, piece, offset, bytes });
            offset += bytes;
        }
    }
    jobs
}

/// The source's `config.json`, byte for byte unless the model is extended or the element type of the weights is no longer
/// what it says.
fn config_json(checkpoint: &Checkpoint, entries: &[Entry], asked: Option<DType>) -> Result<Vec<u8>> {
    let from_gguf = checkpoint.kind() == Kind::Gguf;
    let written = asked.or_else(|| from_gguf.then(|| entries[0].dtype));
    let named = checkpoint.config().dtype;
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
