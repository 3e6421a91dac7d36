//! A part of a parameter: a range of each of its axes, as runs of rows and columns of the matrices that lie on disk.

use std::iter;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

use super::{Checkpoint, Form, Kind, Source, float_type};
use crate::DType;
use crate::array::HostArray;
use crate::error::{Error, Result};
use crate::layout::{Layout, Param};
use crate::shard::FileBytes;

/// What is read of one piece. Runs ascend and do not touch.
pub(super) struct Part {
    pub(super) piece: usize,
    /// Rows of [`Checkpoint::matrix`].
    pub(super) rows: Vec<Range<usize>>,
    /// Columns of it, the same of each row.
    pub(super) columns: Vec<Range<usize>>,
}

impl Checkpoint {
    /// Reads a part of one parameter in per-head layout, converted to `dtype` (rounded to nearest even): `part` has a
    /// range for each axis of `param.shape`, and may be empty. Of a safetensors file only the bytes of the part are read,
    /// of a GGUF file the rows that they stand in, of a packed parameter blocks of 16 rows; for new rows of a grown vocabulary, all whose mean they are.
    ///
    /// # Errors
    /// As [`Checkpoint::read`]; [`Error::Tensor`] for another number of ranges than axes and for a range that leaves its
    /// axis.
    pub fn read_part(&self, param: &Param, dtype: DType, part: &[Range<usize>]) -> Result<HostArray> {
        self.read_ranges(param, dtype, part, &AtomicBool::new(false))
    }

    /// Where a part of a parameter lies in its file, in per-head layout and its own type, to be used without a copy. `None`
    /// where the file has another layout, has the part in several places or only some of it, does not align it to 64
    /// bytes, where the parameter is packed, and where the part is empty.
    ///
    /// # Errors
    /// [`Error::Format`] for a file that has shrunk; [`Error::Tensor`] for a parameter of another model, another number of
    /// ranges than axes, and a range that leaves its axis.
    pub fn place_part(&self, param: &Param, part: &[Range<usize>]) -> Result<Option<FileBytes>> {
        self.check_part(param, part)?;
        let Source::Folder(folder) = &self.source else { return Ok(None) };
        if self.grown(param).is_some() || self.packings.contains_key(&param.name) {
            return Ok(None);
        }
        let (name, shape, first) = match (self.kind, &param.pieces[..]) {
            (Kind::PerHead, _) => (&param.name, &param.shape, 0),
            (_, [piece]) if param.layout == Layout::Same => {
                (&piece.name, &piece.shape, piece.first_row * piece.columns())
            }
            _ => return Ok(None),
        };
        let (shard, stored) =
            folder.get(name).filter(|(_, stored)| stored.shape == *shape).ok_or_else(|| self.unknown(param))?;
        let mut runs = runs(&param.shape, part);
        let (Some(run), None) = (runs.next().filter(|run| !run.is_empty()), runs.next()) else { return Ok(None) };
        let size = float_type(stored.dtype).ok_or_else(|| self.unknown(param))?.size();
        let at = |element: usize| stored.range.start + ((first + element) * size) as u64;
        shard.place(&(at(run.start)..at(run.end)))
    }

    /// Reads a part of one parameter in per-head form.
    pub(super) fn read_ranges(
        &self,
        param: &Param,
        dtype: DType,
        part: &[Range<usize>],
        cancel: &AtomicBool,
    ) -> Result<HostArray> {
        self.check_part(param, part)?;
        let shape: Vec<usize> = part.iter().map(Range::len).collect();
        let mut array = self.memory(param, &shape, dtype)?;
        if array.as_bytes().is_empty() {
            return Ok(array);
        }
        let parts = self.parts(param, part)?;
        let bytes = array.as_bytes().len() / parts.len();
        for (part, slab) in parts.iter().zip(array.as_bytes_mut().chunks_exact_mut(bytes)) {
            self.read_into(param, part, dtype, Form::PerHead, slab, cancel)?;
        }
        Ok(array)
    }

    /// All of one piece.
    pub(super) fn whole_piece(&self, param: &Param, piece: usize) -> Part {
        let (rows, columns) = self.matrix(param, piece);
        Part { piece, rows: iter::once(0..rows).collect(), columns: iter::once(0..columns).collect() }
    }

    /// The parts of pieces that a part of a parameter is made of, in order.
    fn parts(&self, param: &Param, part: &[Range<usize>]) -> Result<Vec<Part>> {
        let (pieces, sizes, part) = match param.pattern.starts_with("E:") {
            true => (part[0].clone(), &param.shape[1..], &part[1..]),
            false => (0..1, &param.shape[..], part),
        };
        let first = param.pieces.first().ok_or_else(|| self.unknown(param))?;
        // the axes of the rows that Hugging Face's form has, then those of the columns, or the other way round
        let leading = if param.layout == Layout::Same { first.rows } else { first.columns() };
        let axes = (0..=sizes.len()).find(|&n| sizes[..n].iter().product::<usize>() == leading);
        let axes = axes.ok_or_else(|| self.unknown(param))?;
        let mut rows: Vec<_> = runs(&sizes[..axes], &part[..axes]).collect();
        let mut columns: Vec<_> = runs(&sizes[axes..], &part[axes..]).collect();
        if param.layout == Layout::Transposed && !self.is_transposed(param) {
            (rows, columns) = (columns, rows);
        }
        Ok(pieces.map(|piece| Part { piece, rows: rows.clone(), columns: columns.clone() }).collect())
    }

    /// Fails unless there is a range for each axis and within it.
    fn check_part(&self, param: &Param, part: &[Range<usize>]) -> Result<()> {
        let bad = |what: String| Err(Error::tensor(&self.path, &param.name, what));
        if part.len() != param.shape.len() {
            let (axes, n) = (&param.axes, param.shape.len());
            return bad(format!("a part needs a range for each of its {n} axes ({axes}), found {}", part.len()));
        }
        for ((axis, &size), range) in param.axes.chars().zip(&param.shape).zip(part) {
            if range.start > range.end || range.end > size {
                return bad(format!("axis {axis}: expected a range within 0..{size}, found {range:?}"));
            }
        }
        Ok(())
    }
}

/// The range of every axis that is all of it.
pub(super) fn whole(param: &Param) -> Vec<Range<usize>> {
    param.shape.iter().map(|&size| 0..size).collect()
}

/// Where the elements of a part lie in a row-major array: as few runs as there can be, ascending.
fn runs<'a>(sizes: &'a [usize], part: &'a [Range<usize>]) -> Box<dyn Iterator<Item = Range<usize>> + 'a> {
    let mut runs: Box<dyn Iterator<Item = Range<usize>> + 'a> = Box::new(iter::once(0..1));
    for (&size, range) in sizes.iter().zip(part) {
        runs = match range.len() == size {
            true => Box::new(runs.map(move |run| run.start * size..run.end * size)),
            false => Box::new(runs.flatten().map(move |i| i * size + range.start..i * size + range.end)),
        };
    }
    runs
}

/// Where the elements of some rows and columns lie in a row-major matrix of `width` columns: one run where the columns
/// are all of them.
pub(super) fn segments(
    rows: Range<usize>,
    columns: &[Range<usize>],
    width: usize,
) -> Box<dyn Iterator<Item = Range<usize>> + '_> {
    if total(columns) == width {
        return Box::new(iter::once(rows.start * width..rows.end * width));
    }
    Box::new(rows.flat_map(move |row| columns.iter().map(move |run| row * width + run.start..row * width + run.end)))
}

/// How many there are in all runs.
pub(super) fn total(runs: &[Range<usize>]) -> usize {
    runs.iter().map(Range::len).sum()
}

#[cfg(test)]
mod tests;
