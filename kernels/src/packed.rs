//! Packed weights: integer codes of 8 or 4 bits with a scale, and maybe a minimum, for each group of contracted terms.
//!
//! A weight contracts K terms into N outputs. Its codes lie in blocks of 16 outputs, within a block in groups of g
//! terms,
//! so that a group is read as whole vectors whose lanes are outputs: shape (N/16, K/g, g·16) bytes for 8 bits and
//! (N/16, K/g, g·8) for 4, N padded to 16 and K to g. Scales and minima are (N/16, K/g, 16). The value of a weight is
//! `scale · code + min`, or `scale · code` where there are no minima; padding has scale 0.

use half::f16;

use crate::scratch::counts;

/// Outputs of a block.
pub const BLOCK: usize = 16;

/// Bits of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Two codes a byte.
    Four,
    /// A code a byte.
    Eight,
}

/// How a weight is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Bits of a code.
    pub bits: Bits,
    /// Contracted terms that share a scale: 16 or 32.
    pub group: usize,
    /// Whether a group has a minimum that is added to `scale · code`.
    pub mins: bool,
}

impl Format {
    /// The least and the largest code: −8…7 for 4 bits, or 0…15 with minima, and −128…127 for 8 bits.
    pub fn codes(self) -> (i8, i8) {
        match (self.bits, self.mins) {
            (Bits::Eight, _) => (-128, 127),
            (Bits::Four, false) => (-8, 7),
            (Bits::Four, true) => (0, 15),
        }
    }

    /// What is added to a code before it is stored, so that it is not negative.
    pub fn bias(self) -> i32 {
        -i32::from(self.codes().0)
    }

    /// Shape of the codes of a weight that contracts `k` terms into `n` outputs: (N/16, K/g, bytes of a group).
    pub fn q_shape(self, k: usize, n: usize) -> [usize; 3] {
        [n.div_ceil(BLOCK), k.div_ceil(self.group), self.group_bytes()]
    }

    /// Shape of its scales, and of its minima: (N/16, K/g, 16).
    pub fn scales_shape(self, k: usize, n: usize) -> [usize; 3] {
        [n.div_ceil(BLOCK), k.div_ceil(self.group), BLOCK]
    }

    /// Bytes of the codes of 16 outputs in a group.
    pub fn group_bytes(self) -> usize {
        match self.bits {
            Bits::Eight => self.group * BLOCK,
            Bits::Four => self.group * BLOCK / 2,
        }
    }

    /// Where the code of term `k` of output `n` of a weight of `terms` terms stands: byte `term(k).0 + output(n, terms)`, and there
    /// the bits from `term(k).1` on.
    pub fn term(self, k: usize) -> (usize, u32) {
        let (i, half) = (k % self.group, self.group / 2);
        let (byte, bit) = match self.bits {
            Bits::Eight => (i / 4 * 64 + i % 4, 0),
            Bits::Four => (i % half / 4 * 64 + i % 4, if i < half { 0 } else { 4 }),
        };
        (k / self.group * self.group_bytes() + byte, bit)
    }

    /// The part of [`Self::term`]'s sum that an output adds.
    pub fn output(self, n: usize, terms: usize) -> usize {
        n / BLOCK * terms.div_ceil(self.group) * self.group_bytes() + n % BLOCK * 4
    }

    /// Where the scale of group `group` of output `n` of a weight of `terms` terms stands.
    pub fn scale(self, group: usize, n: usize, terms: usize) -> usize {
        (n / BLOCK * terms.div_ceil(self.group) + group) * BLOCK + n % BLOCK
    }

    /// The code in the bits from `bit` on.
    pub fn code(self, byte: u8, bit: u32) -> i8 {
        (i32::from(byte >> bit & self.mask()) - self.bias()) as i8
    }

    fn mask(self) -> u8 {
        match self.bits {
            Bits::Eight => 0xff,
            Bits::Four => 0x0f,
        }
    }

    fn check(self) {
        assert!(matches!(self.group, 16 | 32), "packed weight: group of 16 or 32 required, found {}", self.group);
    }
}

/// Scales or minima, (N/16, K/g, 16).
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    #[allow(missing_docs)]
    F16(&'a [f16]),
    #[allow(missing_docs)]
    F32(&'a [f32]),
}

impl<'a> Scales<'a> {
    fn part(self, i: usize, count: usize) -> Scales<'a> {
        match self {
            Scales::F16(values) => Scales::F16(part(values, i, count)),
            Scales::F32(values) => Scales::F32(part(values, i, count)),
        }
    }
}

/// Part `i` of `count` of equal length.
pub(crate) fn part<T>(values: &[T], i: usize, count: usize) -> &[T] {
    let length = values.len() / count;
    &values[i * length..][..length]
}

impl Scales<'_> {
    /// How many there are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        match self {
            Scales::F16(values) => values.len(),
            Scales::F32(values) => values.len(),
        }
    }

    /// The one at `i`.
    pub fn get(&self, i: usize) -> f32 {
        match self {
            Scales::F16(values) => values[i].to_f32(),
            Scales::F32(values) => values[i],
        }
    }
}

/// A packed weight.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Bits of a code.
    pub bits: Bits,
    /// Contracted terms that share a scale: 16 or 32.
    pub group: usize,
    /// Codes: [`Format::q_shape`].
    pub q: &'a [u8],
    /// Scales: [`Format::scales_shape`].
    pub scales: Scales<'a>,
    /// Minima, of the shape and type of the scales.
    pub mins: Option<Scales<'a>>,
}

impl<'a> Packed<'a> {
    pub(crate) fn part(&self, i: usize, count: usize) -> Packed<'a> {
        Packed {
            q: part(self.q, i, count),
            scales: self.scales.part(i, count),
            mins: self.mins.map(|mins| mins.part(i, count)),
            ..*self
        }
    }
}

impl Packed<'_> {
    /// How the weight is packed.
    pub fn format(&self) -> Format {
        Format { bits: self.bits, group: self.group, mins: self.mins.is_some() }
    }

    /// # Panics
    /// If an array has not the length that a weight of `k` terms and `n` outputs has.
    pub fn check(&self, k: usize, n: usize) {
        self.format().check();
        let (q, scales) = (self.format().q_shape(k, n), self.format().scales_shape(k, n));
        let require = |what: &str, shape: [usize; 3], found: usize| {
            assert!(
                counts(found, &shape),
                "packed weight of {k} × {n}: {what} {shape:?} required, found {found} elements"
            );
        };
        require("codes", q, self.q.len());
        require("scales", scales, self.scales.len());
        if let Some(mins) = self.mins {
            require("minima", scales, mins.len());
            let same =
                matches!((self.scales, mins), (Scales::F16(_), Scales::F16(_)) | (Scales::F32(_), Scales::F32(_)));
            assert!(same, "packed weight of {k} × {n}: scales and minima of one type required, found f16 and f32");
        }
    }

    /// The weights of output `n`, as many terms as `out` has.
    ///
    /// # Panics
    /// If there is no such output, or `out` is longer than the padded terms. Takes the arrays to be [`Self::check`]ed.
    pub fn unpack_output(&self, k: usize, n: usize, out: &mut [f32]) {
        let format = self.format();
        let output = format.output(n, k);
        for (g, out) in out.chunks_mut(self.group).enumerate() {
            let at = format.scale(g, n, k);
            let (scale, min) = (self.scales.get(at), self.mins.map(|mins| mins.get(at)));
            for (i, out) in out.iter_mut().enumerate() {
                let (byte, bit) = format.term(g * self.group + i);
                let code = f32::from(format.code(self.q[output + byte], bit));
                *out = min.map_or(scale * code, |min| scale * code + min);
            }
        }
    }

    /// All weights, (N, K).
    ///
    /// # Panics
    /// If an array or `out` has not the length that a weight of `k` terms and `n` outputs has.
    pub fn unpack(&self, k: usize, n: usize, out: &mut [f32]) {
        self.check(k, n);
        assert!(out.len() == n * k, "{n} × {k} values required, found {}", out.len());
        for (n, out) in out.chunks_mut(k.max(1)).enumerate() {
            self.unpack_output(k, n, out);
        }
    }
}

/// Codes (N, K), each within [`Format::codes`], into the bytes of a packed weight (all of them are written). A weight
/// can be packed in pieces of 16 outputs.
///
/// # Panics
/// If `codes` or `q` has not the length that `k` and `n` ask for.
pub fn pack_codes(format: Format, k: usize, n: usize, codes: &[i8], q: &mut [u8]) {
    format.check();
    let shape = format.q_shape(k, n);
    assert!(codes.len() == n * k, "{n} × {k} codes required, found {}", codes.len());
    assert!(q.len() == shape.iter().product(), "codes {shape:?} required, found {} bytes", q.len());
    // Padding is the code of 0.
    let zero = format.bias() as u8;
    q.fill(match format.bits {
        Bits::Eight => zero,
        Bits::Four => zero | zero << 4,
    });
    let terms: Vec<(usize, u32)> = (0..k).map(|term| format.term(term)).collect();
    for (n, codes) in codes.chunks(k.max(1)).enumerate() {
        let output = format.output(n, k);
        for (&code, &(byte, bit)) in codes.iter().zip(&terms) {
            let stored = (i32::from(code) + format.bias()) as u8 & format.mask();
            let q = &mut q[output + byte];
            *q = *q & !(format.mask() << bit) | stored << bit;
        }
    }
}

/// Scales or minima (N, K/g) into the order of a packed weight (all of `out` is written, padding with zeros).
///
/// # Panics
/// If `scales` or `out` has not the length that `k` and `n` ask for.
pub fn pack_scales<T: Copy + Default>(format: Format, k: usize, n: usize, scales: &[T], out: &mut [T]) {
    format.check();
    let shape = format.scales_shape(k, n);
    let groups = shape[1];
    assert!(scales.len() == n * groups, "{n} × {groups} scales required, found {}", scales.len());
    assert!(out.len() == shape.iter().product(), "scales {shape:?} required, found {}", out.len());
    out.fill(T::default());
    for (n, scales) in scales.chunks(groups.max(1)).enumerate() {
        for (g, &scale) in scales.iter().enumerate() {
            out[format.scale(g, n, k)] = scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [(Bits, bool); 4] =
        [(Bits::Eight, false), (Bits::Eight, true), (Bits::Four, false), (Bits::Four, true)];

    #[test]
    fn a_byte_stands_where_the_format_says() {
        let eight = Format { bits: Bits::Eight, group: 32, mins: false };
        let mut codes = vec![0; 32 * 16];
        codes[3 * 32 + 9] = 5;
        let mut q = vec![0; 512];
        pack_codes(eight, 32, 16, &codes, &mut q);
        assert_eq!((q[2 * 64 + 3 * 4 + 1], q[0]), (133, 128));

        let four = Format { bits: Bits::Four, group: 32, mins: false };
        codes[3 * 32 + 25] = -3;
        let mut q = vec![0; 256];
        pack_codes(four, 32, 16, &codes, &mut q);
        assert_eq!((q[2 * 64 + 3 * 4 + 1], q[0]), (5 << 4 | 13, 0x88));
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        for (bits, mins) in FORMATS {
            let shapes = [(32, 1, 1), (16, 20, 17), (32, 70, 17), (16, 40, 33), (32, 64, 16)];
            for &(group, k, n) in &shapes[..if cfg!(miri) { 2 } else { shapes.len() }] {
                let format = Format { bits, group, mins };
                let (low, high) = format.codes();
                let span = i32::from(high) - i32::from(low) + 1;
                let codes: Vec<i8> =
                    (0..n * k).map(|i| ((i * 7 % span as usize) as i32 + i32::from(low)) as i8).collect();
                let groups = k.div_ceil(group);
                let scales: Vec<f32> = (0..n * groups).map(|i| 0.25 + i as f32).collect();
                let minima: Vec<f32> = (0..n * groups).map(|i| -3.0 * i as f32).collect();
                let mut q = vec![0; format.q_shape(k, n).iter().product()];
                pack_codes(format, k, n, &codes, &mut q);
                let packed_scales = |values: &[f32]| {
                    let mut out = vec![f32::NAN; format.scales_shape(k, n).iter().product()];
                    pack_scales(format, k, n, values, &mut out);
                    out
                };
                let (s, m) = (packed_scales(&scales), packed_scales(&minima));
                let packed =
                    Packed { bits, group, q: &q, scales: Scales::F32(&s), mins: mins.then_some(Scales::F32(&m)) };
                let mut out = vec![f32::NAN; n * k];
                packed.unpack(k, n, &mut out);
                for (i, (&out, &code)) in out.iter().zip(&codes).enumerate() {
                    let at = i / k * groups + i % k / group;
                    let min = if mins { minima[at] } else { 0.0 };
                    assert_eq!(out, scales[at] * f32::from(code) + min, "{format:?} {k} × {n} at {i}");
                }
            }
        }
    }
}
