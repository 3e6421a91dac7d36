//! `xllama logits`.

use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use npyz::WriterBuilder;
use serde_json::json;
use xllama::Error;
use xllama::runtime::chunked_logits;

use super::Context;
use super::generate::context_len;
use super::model_args::ModelArgs;
use super::output::Output;

/// Write the logits of every position of a list of tokens.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama logits --tokens 1,2,3 --out logits.npz")]
#[command(group(clap::ArgGroup::new("input").required(true)))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, separated by commas.
    #[arg(long, group = "input", value_delimiter = ',', allow_negative_numbers = true)]
    tokens: Vec<i64>,
    /// Token ids in a NumPy file of integers, one dimension.
    #[arg(long, group = "input", value_name = "F.npy")]
    tokens_file: Option<PathBuf>,
    /// The NumPy archive to write: `logits`, float32, (T, V).
    #[arg(long, value_name = "F.npz")]
    out: PathBuf,
    /// Feed one token at a time through the cache.
    #[arg(long, conflicts_with = "chunk")]
    decode: bool,
    /// Prefill in chunks of N tokens.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunk: Option<u32>,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let tokens = match &self.tokens_file {
            Some(path) => read_tokens(path)?,
            None => self.tokens.clone(),
        };
        if tokens.is_empty() {
            return Err(Error::Empty("the list of tokens is empty".into()).into());
        }
        let plugin = self.model.device.plugin_path(context)?;
        let checkpoint = self.model.model.open(context)?;
        let vocab = checkpoint.config().vocab_size;
        let place = self.tokens_file.as_ref().map_or("--tokens".into(), |p| p.display().to_string());
        let check = |id: &i64| match u32::try_from(*id) {
            Ok(valid) if (valid as usize) < vocab => Ok(valid),
            _ => Err(Error::TokenId { id: *id, vocab, place: place.clone() }),
        };
        let ids = tokens.iter().map(check).collect::<Result<Vec<u32>, Error>>()?;
        context_len(&checkpoint, ids.len(), 0, None)?;
        let out = Output::new(&self.out)?;

        let loaded = self.model.load_checkpoint(context, plugin, checkpoint)?;
        // Whole chunks of a common size let one program serve lists of many lengths.
        let chunk = match (self.decode, self.chunk) {
            (true, _) => 1,
            (false, Some(chunk)) => (chunk as usize).min(ids.len()),
            (false, None) => ids.len().next_multiple_of(32).min(512),
        };
        let logits = chunked_logits(&loaded.engine, &ids, chunk)?;
        out.write(&npz(&logits, vocab)?)?;
        let shape = [ids.len(), vocab];
        let seconds = context.started.elapsed().as_secs_f64();
        context.print(&json!({ "out": self.out, "shape": shape, "chunk": chunk, "seconds": seconds }), || {
            println!("{}: logits ({}, {vocab}) float32", self.out.display(), ids.len());
        });
        Ok(ExitCode::SUCCESS)
    }
}

/// Integers of a one-dimensional .npy file.
pub fn read_tokens(path: &Path) -> Result<Vec<i64>, Error> {
    let wrong = |what: String| Error::Golden { path: path.into(), what };
    let file = File::open(path).map_err(Error::io("reading", path))?;
    let npy = npyz::NpyFile::new(BufReader::new(file)).map_err(|e| wrong(format!("not a NumPy file: {e}")))?;
    if npy.shape().len() != 1 {
        return Err(wrong(format!("expected one dimension, found shape {:?}", npy.shape())));
    }
    let dtype = npy.dtype();
    let damaged = |e: std::io::Error| wrong(format!("damaged: {e}"));
    match dtype.descr().trim_matches('\'') {
        "<i4" => Ok(npy.into_vec::<i32>().map_err(damaged)?.into_iter().map(i64::from).collect()),
        "<i8" => npy.into_vec::<i64>().map_err(damaged),
        other => Err(wrong(format!("expected 32- or 64-bit integers, found '{other}'"))),
    }
}

/// A NumPy archive with `logits` (T, V).
fn npz(logits: &[f32], vocab: usize) -> anyhow::Result<Vec<u8>> {
    // Made in memory: the writer's last part is written when it is dropped, where an error would be lost.
    let mut bytes = Cursor::new(Vec::new());
    let mut npz = npyz::npz::NpzWriter::new(&mut bytes);
    let shape = [(logits.len() / vocab) as u64, vocab as u64];
    let mut array = npz.array("logits", Default::default())?.default_dtype().shape(&shape).begin_nd()?;
    array.extend(logits)?;
    array.finish()?;
    drop(npz);
    Ok(bytes.into_inner())
}
