//! Rows of a tensor as float32, in Hugging Face's order.

use std::ops::Range;

use super::header::TensorInfo;
use super::quant::Codes;
use super::source::Source;

/// Rows of a quantized tensor as integers with scales: the value of element i of a row is `scale · code`, or
/// `scale · code + minimum`, of its group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowCodes {
    /// (rows, columns).
    pub codes: Vec<i8>,
    /// (rows, groups).
    pub scales: Vec<f32>,
    /// (rows, groups), empty where the type has no minima.
    pub minima: Vec<f32>,
}

/// Bytes of the file held at a time while decoding.
const CHUNK_BYTES: usize = 1 << 18;

/// Writes elements `range` of the flat tensor, in the file's order, to `out`, which has that many elements.
fn read_elements(source: &Source, tensor: &TensorInfo, range: Range<usize>, out: &mut [f32]) -> std::io::Result<()> {
    let (block_len, block_bytes) = (tensor.kind.block_len(), tensor.kind.block_bytes());
    let blocks_at_once = (CHUNK_BYTES / block_bytes).max(1);
    let mut bytes = Vec::new();
    let mut values = Vec::new();
    let (mut at, mut out) = (range.start, out);
    while at < range.end {
        let first = at / block_len;
        let last = range.end.div_ceil(block_len).min(first + blocks_at_once);
        bytes.resize((last - first) * block_bytes, 0);
        source.read_exact_at(&mut bytes, tensor.start + (first * block_bytes) as u64)?;

        let end = range.end.min(last * block_len);
        let (now, later) = out.split_at_mut(end - at);
        if at % block_len == 0 && end % block_len == 0 {
            tensor.kind.dequantize(&bytes, now);
        } else {
            values.resize((last - first) * block_len, 0.0);
            tensor.kind.dequantize(&bytes, &mut values);
            let skip = at - first * block_len;
            now.copy_from_slice(&values[skip..skip + now.len()]);
        }
        (at, out) = (end, later);
    }
    Ok(())
}

/// How the stored values of a tensor become those of Hugging Face's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// They are the same.
    Same,
    /// 1 is subtracted.
    PlusOne,
    /// The rows of each of so many heads are interleaved: row `2·j + p` of a head of K rows is row `p·K/2 + j` in
    /// Hugging Face's order, where the two halves are rotated against each other.
    Interleaved(usize),
}

impl Form {
    /// Which row of the file a row of Hugging Face's tensor is, if the tensor has `rows` of them.
    fn source_row(self, row: usize, rows: usize) -> usize {
        let Form::Interleaved(heads) = self else { return row };
        let head_rows = rows / heads;
        let (head, half, j) = (row / head_rows, row % head_rows / (head_rows / 2), row % (head_rows / 2));
        head * head_rows + 2 * j + half
    }
}

/// Takes `rows` of a quantized `tensor` apart: codes (rows, width), and scales and minima (rows, width / group), where
/// the type has minima.
pub(super) fn read_codes(
    source: &Source,
    tensor: &TensorInfo,
    form: Form,
    rows: Range<usize>,
    out: &mut RowCodes,
) -> std::io::Result<()> {
    let Some(packing) = tensor.kind.packing() else { unreachable!("{} has no codes", tensor.kind.name()) };
    let (block_len, block_bytes) = (tensor.kind.block_len(), tensor.kind.block_bytes());
    let width: usize = tensor.shape[1..].iter().product();
    let groups = block_len / packing.format.group;
    let mut bytes = vec![0; width / block_len * block_bytes];
    let mut block = Codes::new();
    out.codes.clear();
    out.scales.clear();
    out.minima.clear();
    for row in rows {
        let at = form.source_row(row, tensor.shape[0]) * bytes.len();
        source.read_exact_at(&mut bytes, tensor.start + at as u64)?;
        for bytes in bytes.chunks_exact(block_bytes) {
            tensor.kind.take_apart(bytes, &mut block);
            out.codes.extend_from_slice(&block.codes[..block_len]);
            out.scales.extend_from_slice(&block.scales[..groups]);
            if packing.format.mins {
                out.minima.extend_from_slice(&block.minima[..groups]);
            }
        }
    }
    Ok(())
}

/// Writes `rows` of `tensor` to `out`.
pub(super) fn read_rows(
    source: &Source,
    tensor: &TensorInfo,
    form: Form,
    rows: Range<usize>,
    out: &mut [f32],
) -> std::io::Result<()> {
    let width: usize = tensor.shape[1..].iter().product();
    let Form::Interleaved(heads) = form else {
        read_elements(source, tensor, rows.start * width..rows.end * width, out)?;
        if form == Form::PlusOne {
            out.iter_mut().for_each(|value| *value -= 1.0);
        }
        return Ok(());
    };
    let head_rows = tensor.shape[0] / heads;
    let mut head = Vec::new();
    let mut row = rows.start;
    while row < rows.end {
        let first = row / head_rows * head_rows;
        head.resize(head_rows * width, 0.0);
        read_elements(source, tensor, first * width..(first + head_rows) * width, &mut head)?;
        while row < rows.end.min(first + head_rows) {
            let (half, j) = ((row - first) / (head_rows / 2), (row - first) % (head_rows / 2));
            let from = (2 * j + half) * width;
            let to = (row - rows.start) * width;
            out[to..to + width].copy_from_slice(&head[from..from + width]);
            row += 1;
        }
    }
    Ok(())
}
