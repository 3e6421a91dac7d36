//! A checkpoint seen as one with a larger vocabulary and a longer context. What is new is made when it is read.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::part::{Part, total};
use super::{Checkpoint, Rows, rows_at_a_time};
use crate::DType;
use crate::config::ModelConfig;
use crate::dtype::{Overflow, cast};
use crate::error::{Error, Result};
use crate::extend::{Extension, Files, extend_tokenizer};
use crate::layout::{Llama, Param};
use crate::pool;

/// How a checkpoint is larger than what lies on disk.
#[derive(Debug)]
pub(super) struct Extended {
    /// Token ids on disk.
    pub(super) vocab_size: usize,
    /// The ids of added tokens. Where the source has rows for them, these are new as well: no token had them.
    tokens: Range<usize>,
    /// Files beside the weights that differ.
    pub(super) files: Files,
    /// Whether the configuration differs.
    pub(super) config: bool,
}

impl Extended {
    /// Whether the row of this id is none of the source's.
    fn is_new(&self, id: usize) -> bool {
        id >= self.vocab_size || self.tokens.contains(&id)
    }
}

impl Checkpoint {
    /// The same model with a larger vocabulary or a longer context: its configuration, its parameters and the files beside
    /// it are those of the extended model. New rows of the embedding and of the output head are the mean of all rows of the
    /// source, summed in float64 from its own values and rounded once; a head that is tied stays tied. Where rows are new, a packed
    /// embedding or head is one of floats.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a vocabulary that would shrink, one too small for the added tokens, and a
    /// context that cannot be stretched; [`Error::Format`](crate::Error::Format) for tokens that cannot be added.
    pub fn extended(mut self, extension: &Extension) -> Result<Checkpoint> {
        if *extension == Extension::default() {
            return Ok(self);
        }
        let file = if self.path.is_dir() { self.path.join("config.json") } else { self.path.clone() };
        let vocab_size = self.config.vocab_size;
        let (files, tokens) = match &extension.tokens {
            Some(tokens) => {
                let files: Files = self.side_files()?.into_iter().collect();
                extend_tokenizer(tokens, &self.path, &files)?
            }
            None => (Files::new(), 0..0),
        };
        let mut raw = self.config.raw.clone();
        extension.rewrite(&mut raw, vocab_size, &tokens, &file)?;
        let config = raw != self.config.raw;
        self.config = ModelConfig::from_value(&raw, &file)?;

        let grows = self.config.vocab_size > vocab_size || !tokens.is_empty();
        let stored: Vec<_> = self.params.iter().iter().map(|param| (param.dtype, param.packing)).collect();
        let mut stored = stored.into_iter();
        let of_source = |mut param: Param| {
            (param.dtype, param.packing) = stored.next().unwrap_or((param.dtype, None));
            // new rows are means of floats
            param.packing = param.packing.filter(|_| !(grows && param.axes.contains('V')));
            param
        };
        self.params = Llama::declare(&self.config).map(&mut { of_source });
        if grows {
            self.notes.push(format!(
                "the vocabulary has {} ids, {vocab_size} in the source; new rows are the mean of the source's",
                self.config.vocab_size
            ));
        }
        if !tokens.is_empty() {
            self.notes.push(format!("the added tokens have the ids {} to {}", tokens.start, tokens.end - 1));
        }
        self.extended = Some(Extended { vocab_size, tokens, files, config });
        Ok(self)
    }

    /// What is new about a parameter, if anything is.
    pub(super) fn grown(&self, param: &Param) -> Option<&Extended> {
        let grown = |e: &&Extended| e.vocab_size < self.config.vocab_size || !e.tokens.is_empty();
        self.extended.as_ref().filter(|_| param.axes.contains('V')).filter(grown)
    }

    /// The mean of all rows of an embedding or head whose rows are ids, in `dtype`: the part's columns of it.
    fn mean_row(&self, param: &Param, part: &Part, dtype: DType, cancel: &AtomicBool) -> Result<Vec<u8>> {
        let (rows, columns) = self.matrix_on_disk(param, part.piece);
        let step = rows_at_a_time(columns, DType::F64).min(rows);
        let width = total(&part.columns) * DType::F64.size();
        let mut reader = Rows::new(self, param, part, DType::F64);
        let mut some = vec![0; step * width];
        let mut sums = vec![0.0; total(&part.columns)];
        for first in (0..rows).step_by(step) {
            pool::check(cancel)?;
            let count = step.min(rows - first);
            let some = &mut some[..count * width];
            reader.read(first, count, some)?;
            for row in some.chunks_exact(width) {
                sums.iter_mut().zip(doubles(row)).for_each(|(sum, x)| *sum += x);
            }
        }
        let means: Vec<u8> = sums.iter().flat_map(|sum| (sum / rows as f64).to_le_bytes()).collect();
        let mut mean = vec![0; sums.len() * dtype.size()];
        round(self, param, &means, &mut mean, dtype)?;
        Ok(mean)
    }
}

/// Reads rows of an embedding or a head that has grown, or the part's columns of them.
pub(super) enum Grown<'a> {
    /// Rows are ids; this is the mean row.
    Rows(&'a Extended, Vec<u8>),
    /// Columns are ids; these are the part's, and this reads the exact values of a row.
    Columns(&'a Extended, &'a [Range<usize>], Rows<'a>),
}

impl<'a> Grown<'a> {
    /// `None` where nothing of the part is new.
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        param: &'a Param,
        part: &'a Part,
        dtype: DType,
        cancel: &AtomicBool,
    ) -> Result<Option<Grown<'a>>> {
        let Some(extended) = checkpoint.grown(param) else { return Ok(None) };
        let transposed = checkpoint.is_transposed(param);
        let ids = if transposed { &part.columns } else { &part.rows };
        if !ids.iter().cloned().flatten().any(|id| extended.is_new(id)) {
            return Ok(None);
        }
        Ok(Some(match transposed {
            true => {
                let all = checkpoint.whole_piece(param, part.piece);
                Grown::Columns(extended, ids, Rows::new(checkpoint, param, &all, DType::F64))
            }
            false => Grown::Rows(extended, checkpoint.mean_row(param, part, dtype, cancel)?),
        }))
    }

    /// `count` rows from `first` on; `stored` reads the source's.
    pub(super) fn read(&mut self, stored: &mut Rows<'_>, first: usize, count: usize, out: &mut [u8]) -> Result<()> {
        let width = out.len() / count;
        match self {
            Grown::Rows(extended, mean) => {
                let old = extended.vocab_size.saturating_sub(first).min(count);
                if old > 0 {
                    stored.read(first, old, &mut out[..old * width])?;
                }
                let new = (first..).zip(out.chunks_exact_mut(width)).filter(|(id, _)| extended.is_new(*id));
                new.for_each(|(_, row)| row.copy_from_slice(mean));
            }
            Grown::Columns(extended, ids, exact) => {
                let (all, old) = (extended.vocab_size, total(&stored.columns));
                let size = stored.dtype.size();
                let (mut values, mut mean) = (vec![0; all * DType::F64.size()], vec![0; size]);
                for (row, out) in (first..).zip(out.chunks_exact_mut(width)) {
                    stored.read(row, 1, &mut out[..old * size])?;
                    exact.read(row, 1, &mut values)?;
                    let exact_mean = doubles(&values).sum::<f64>() / all as f64;
                    round(stored.checkpoint, stored.param, &exact_mean.to_le_bytes(), &mut mean, stored.dtype)?;
                    let ids = ids.iter().cloned().flatten();
                    let new = ids.zip(out.chunks_exact_mut(size)).filter(|(id, _)| extended.is_new(*id));
                    new.for_each(|(_, element)| element.copy_from_slice(&mean));
                }
            }
        }
        Ok(())
    }
}

/// Means in float64 as elements of `dtype`.
fn round(checkpoint: &Checkpoint, param: &Param, means: &[u8], out: &mut [u8], dtype: DType) -> Result<()> {
    cast(means, DType::F64, out, dtype).map_err(|Overflow { value }| {
        let what = format!("the mean {value} of its rows is too large for {}; choose bf16 or f32", dtype.torch_name());
        Error::tensor(&checkpoint.path, &param.name, what)
    })
}

fn doubles(bytes: &[u8]) -> impl Iterator<Item = f64> {
    bytes.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes))
}
