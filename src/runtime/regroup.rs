//! From the blocks of a packed parameter to arrays with the axes of the floats, part by part.

use std::io;
use std::ops::Range;

use converter::{HostBytes, Packing, Param};
use half::f16;

/// A packed parameter as a checkpoint has it.
pub(super) struct Blocks<'a> {
    param: &'a Param,
    packing: Packing,
    /// What a step along each axis adds to the expert, the term and the output.
    strides: Vec<[usize; 3]>,
    /// K and N.
    sizes: [usize; 2],
}

impl<'a> Blocks<'a> {
    /// `None` where the parameter is not contracted.
    pub(super) fn new(param: &'a Param, packing: Packing) -> Option<Blocks<'a>> {
        let of = param.contraction()?;
        let mut next = [1; 3];
        let mut strides = vec![[0; 3]; param.axes.len()];
        for (axis, letter) in param.axes.char_indices().rev() {
            let kind = match letter {
                'E' if of.experts.is_some() => 0,
                letter if param.contracted_axes().contains(letter) => 1,
                _ => 2,
            };
            strides[axis][kind] = next[kind];
            next[kind] *= param.shape[axis];
        }
        Some(Blocks { param, packing, strides, sizes: [of.k, of.n] })
    }

    /// The codes `source` of `bytes`, one to a byte, at the beginning of an array of `shape` with zeros behind.
    ///
    /// # Errors
    /// Not enough memory.
    pub(super) fn codes(&self, bytes: &[u8], source: &[Range<usize>], shape: &[usize]) -> io::Result<HostBytes> {
        let format = self.packing.format;
        let [terms, outputs] = self.sizes;
        let expert: usize = format.q_shape(terms, outputs).iter().product();
        let at_term: Vec<(usize, u32)> = (0..terms).map(|k| format.term(k)).collect();
        let at_output: Vec<usize> = (0..outputs).map(|n| format.output(n, terms)).collect();
        let mut out = HostBytes::zeros(shape.iter().product())?;
        let codes = out.as_mut();
        walk(&self.strides, source, shape, |to, [e, k, n]| {
            let (byte, bit) = at_term[k];
            codes[to] = format.code(bytes[e * expert + at_output[n] + byte], bit) as u8;
        });
        Ok(out)
    }

    /// The scales, or minima, `source` of `bytes` likewise, widened to float32 where `size` is 4; along the axis of the groups `source`
    /// and `shape` count these.
    ///
    /// # Errors
    /// Not enough memory.
    pub(super) fn scales(
        &self,
        bytes: &[u8],
        size: usize,
        source: &[Range<usize>],
        shape: &[usize],
    ) -> io::Result<HostBytes> {
        let format = self.packing.format;
        let [terms, outputs] = self.sizes;
        let stored = self.packing.scales.dtype().size();
        let expert: usize = format.scales_shape(terms, outputs).iter().product();
        let mut strides = self.strides.clone();
        if let Some(axis) = self.param.group_axis() {
            strides[axis][1] *= format.group;
        }
        let mut out = HostBytes::zeros(shape.iter().product::<usize>() * size)?;
        let scales = out.as_mut();
        walk(&strides, source, shape, |to, [e, k, n]| {
            let from = e * expert + format.scale(k / format.group, n, terms);
            let (own, to) = (&bytes[from * stored..][..stored], &mut scales[to * size..][..size]);
            match own {
                &[a, b] if size > stored => to.copy_from_slice(&f16::from_le_bytes([a, b]).to_f32().to_le_bytes()),
                own => to.copy_from_slice(own),
            }
        });
        Ok(out)
    }
}

/// Calls `f` for every element of `source` with its place in a row-major array of `shape` that begins with them, and with the sum of
/// index times stride over the axes.
fn walk(strides: &[[usize; 3]], source: &[Range<usize>], shape: &[usize], mut f: impl FnMut(usize, [usize; 3])) {
    let plus = |at: [usize; 3], stride: [usize; 3], by: usize| std::array::from_fn(|i| at[i] + stride[i] * by);
    let Some((last, outer)) = source.split_last() else { return };
    let rows: usize = outer.iter().map(|range| range.len()).product();
    for row in 0..rows {
        let (mut rest, mut at, mut to, mut width) = (row, [0; 3], 0, shape[outer.len()]);
        for (axis, range) in outer.iter().enumerate().rev() {
            let index = rest % range.len();
            rest /= range.len();
            at = plus(at, strides[axis], range.start + index);
            to += index * width;
            width *= shape[axis];
        }
        let stride = strides[outer.len()];
        for (i, index) in last.clone().enumerate() {
            f(to + i, plus(at, stride, index));
        }
    }
}

#[cfg(test)]
mod tests {
    use converter::ScaleType;
    use converter::layout::{Layout, Piece};
    use kernels::packed::{Bits, Format, pack_codes, pack_scales};

    use super::*;

    /// Of each format, parts that begin and end inside of axes, with zeros behind one.
    #[test]
    fn parts_have_the_values_of_blocks() {
        for (bits, mins) in [(Bits::Eight, false), (Bits::Four, false), (Bits::Four, true)] {
            let packing = Packing { format: Format { bits, group: 16, mins }, scales: ScaleType::F32 };
            check(packing, "(HK)M->MHK", [32, 3, 5], [16..32, 1..3, 0..5], 2, |[m, h, k]| [0, m, h * 5 + k]);
            check(packing, "M(HK)->HKM", [3, 16, 7], [1..2, 0..16, 3..7], 1, |[h, k, m]| [0, h * 16 + k, m]);
            check(packing, "E:FM->MF", [2, 48, 19], [1..2, 16..48, 1..18], 1, |[e, m, f]| [e, m, f]);
        }
    }

    /// `place`: expert, term and output at an index.
    fn check(
        packing: Packing,
        pattern: &'static str,
        shape: [usize; 3],
        source: [Range<usize>; 3],
        more: usize,
        place: fn([usize; 3]) -> [usize; 3],
    ) {
        let last = place(shape.map(|n| n - 1)).map(|n| n + 1);
        let [experts, k, n] = last;
        let piece = Piece { name: String::new(), shape: vec![n, k], first_row: 0, rows: n };
        let axes = pattern.split_once("->").expect("an arrow").1;
        let param = Param {
            name: "w".into(),
            pieces: vec![piece; experts],
            pattern,
            axes: if pattern.starts_with("E:") { format!("E{axes}") } else { axes.into() },
            shape: shape.to_vec(),
            logical: vec![""; 3],
            layout: Layout::Transposed,
            precise: false,
            dtype: converter::DType::F32,
            packing: Some(packing),
        };

        let format = packing.format;
        let (low, high) = format.codes();
        let code = |at: [usize; 3]| (at[0] * 5 + at[1] * 7 + at[2] * 3) as i32 % (i32::from(high - low.max(-100)) + 1);
        let code = |at: [usize; 3]| (code(at) + i32::from(low.max(-100))) as i8;
        let scale = |[e, k, n]: [usize; 3]| (e * 1000 + k / 16 * 100 + n) as f32 + 0.5;
        let (mut q, mut scales) = (Vec::new(), Vec::new());
        for e in 0..experts {
            let codes: Vec<i8> = (0..n * k).map(|i| code([e, i % k, i / k])).collect();
            let own: Vec<f32> = (0..n * k / 16).map(|i| scale([e, i % (k / 16) * 16, i / (k / 16)])).collect();
            let mut packed = vec![0; format.q_shape(k, n).iter().product()];
            pack_codes(format, k, n, &codes, &mut packed);
            q.extend(packed);
            let mut packed = vec![0.0; format.scales_shape(k, n).iter().product()];
            pack_scales(format, k, n, &own, &mut packed);
            scales.extend(packed.iter().flat_map(|x| x.to_le_bytes()));
        }

        // The last axis has zeros behind.
        let blocks = Blocks::new(&param, packing).expect("a matrix");
        let mut wide = [0, 1, 2].map(|axis| source[axis].len());
        wide[2] += more;
        let codes = blocks.codes(&q, &source, &wide).expect("memory");
        let group = param.group_axis().expect("a matrix");
        let (mut groups, mut grouped) = (source.clone(), wide);
        groups[group] = source[group].start / 16..source[group].end / 16;
        grouped[group] /= 16;
        let scales = blocks.scales(&scales, 4, &groups, &grouped).expect("memory");
        let scales: Vec<f32> = scales.as_ref().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        for (i, &found) in codes.as_ref().iter().enumerate() {
            let index = [i / wide[2] / wide[1], i / wide[2] % wide[1], i % wide[2]];
            let padding = index[2] >= source[2].len();
            let at = place([0, 1, 2].map(|axis| source[axis].start + index[axis]));
            assert_eq!(found as i8, if padding { 0 } else { code(at) }, "{pattern} {packing} {index:?}");
            let mut of = index;
            of[group] /= 16;
            let found = scales[(of[0] * grouped[1] + of[1]) * grouped[2] + of[2]];
            assert_eq!(found, if padding { 0.0 } else { scale(at) }, "{pattern} {packing} {index:?}");
        }
    }
}
