//! Parameters in host memory.

use std::io;

use half::{bf16, f16};
use memmap2::MmapMut;
use ndarray::{ArrayD, IxDyn};

use crate::DType;

/// Alignment of every array, in memory and in the files that are written: that of a cache line, which PJRT's CPU
/// plugins need to take host memory in place.
pub(crate) const ALIGNMENT: usize = 64;

/// Bytes whose memory begins at a multiple of 64: pages of their own, zeroed when first touched, and returned to the
/// system at once when dropped, which a heap shared by many threads does not do.
#[derive(Debug)]
pub struct HostBytes(MmapMut);

impl HostBytes {
    /// So many zeros.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn zeros(len: usize) -> io::Result<HostBytes> {
        MmapMut::map_anon(len).map(HostBytes)
    }
}

impl AsRef<[u8]> for HostBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for HostBytes {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// A dense row-major array whose memory begins at a multiple of 64 bytes.
#[derive(Debug)]
pub struct HostArray {
    dtype: DType,
    shape: Vec<usize>,
    bytes: HostBytes,
}

impl HostArray {
    /// An array of zeros.
    ///
    /// # Errors
    /// Not enough memory.
    pub fn zeros(dtype: DType, shape: &[usize]) -> io::Result<HostArray> {
        let len = shape.iter().product::<usize>() * dtype.size();
        Ok(HostArray { dtype, shape: shape.to_vec(), bytes: HostBytes::zeros(len)? })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, little-endian, row-major.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// The same, to be written to.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        self.bytes.as_mut()
    }

    /// A copy in float32 (float64 values are rounded).
    pub fn to_f32(&self) -> ArrayD<f32> {
        let bytes = self.as_bytes();
        let values = match self.dtype {
            DType::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            DType::BF16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            DType::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            DType::F64 => bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b) as f32).collect(),
        };
        ArrayD::from_shape_vec(IxDyn(&self.shape), values).expect("as many elements as the shape has")
    }
}

impl AsRef<[u8]> for HostArray {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// Copies rows `first..` of a (rows, columns) matrix to their place in its transpose, `dst`, which has `rows` columns.
/// `src` holds whole rows; elements are `size` bytes.
pub(crate) fn transpose_rows(src: &[u8], columns: usize, first: usize, dst: &mut [u8], rows: usize, size: usize) {
    match size {
        2 => transpose::<2>(src, columns, first, dst, rows),
        4 => transpose::<4>(src, columns, first, dst, rows),
        8 => transpose::<8>(src, columns, first, dst, rows),
        other => unreachable!("no float type has {other} bytes"),
    }
}

/// In tiles that pass through a buffer on the stack, so that both sides move whole cache lines whatever the strides.
fn transpose<const N: usize>(src: &[u8], columns: usize, first: usize, dst: &mut [u8], rows: usize) {
    const TILE: usize = 32;
    let (src, dst) = (src.as_chunks::<N>().0, dst.as_chunks_mut::<N>().0);
    let here = src.len() / columns;
    let mut tile = [[[0; N]; TILE]; TILE];
    for r0 in (0..here).step_by(TILE) {
        let height = TILE.min(here - r0);
        for c0 in (0..columns).step_by(TILE) {
            let width = TILE.min(columns - c0);
            for (r, line) in tile[..height].iter_mut().enumerate() {
                line[..width].copy_from_slice(&src[(r0 + r) * columns + c0..][..width]);
            }
            for c in 0..width {
                let line = &mut dst[(c0 + c) * rows + first + r0..][..height];
                line.iter_mut().zip(&tile).for_each(|(out, row)| *out = row[c]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    #[test]
    fn memory_is_aligned() {
        for n in [1, 3, 1000] {
            let array = HostArray::zeros(DType::F16, &[n, 3]).expect("enough memory");
            assert_eq!((array.as_bytes().as_ptr() as usize % ALIGNMENT, array.as_bytes().len()), (0, n * 6));
        }
    }

    #[test]
    fn transposing_in_pieces_is_transposing() {
        for (rows, columns, piece) in [(1, 1, 1), (70, 33, 70), (70, 33, 7), (5, 130, 2), (64, 64, 32)] {
            let matrix = Array2::from_shape_fn((rows, columns), |(r, c)| (r * columns + c) as u32);
            let src: Vec<u8> = matrix.iter().flat_map(|x| x.to_le_bytes()).collect();
            let mut dst = vec![0; src.len()];
            for first in (0..rows).step_by(piece) {
                let last = rows.min(first + piece);
                transpose_rows(&src[first * columns * 4..last * columns * 4], columns, first, &mut dst, rows, 4);
            }
            let expected: Vec<u8> = matrix.t().iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(dst, expected, "{rows} x {columns} in pieces of {piece}");
        }
    }
}
