//! The block formats of GGUF tensors, and their values as float32.
//!
//! A quantized tensor is a sequence of blocks along its fastest axis; each block has its own scales. The layouts are
//! those of ggml; the arithmetic is float32 in the order of operations of the `gguf` Python package, so that the
//! values are the same to the last bit. Symbols in the formulas: `d` scale, `m` minimum, `q` the stored integer.
//!
//! Every format is groups of integer codes with a scale, and some with a minimum: a value is `scale · code` or
//! `scale · code + minimum`. A block is taken apart into these ([`Codes`]) and its values follow from them.

use half::{bf16, f16};
use kernels::packed::Bits;

use crate::packing::{Packing, ScaleType};

/// Elements in a block of the K-quants.
const QK_K: usize = 256;

/// An element type of a GGUF tensor that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorType {
    /// 32-bit floating point.
    F32,
    /// 16-bit floating point.
    F16,
    /// bfloat16.
    Bf16,
    /// 4 bits, blocks of 32: `d·(q − 8)`.
    Q4_0,
    /// 4 bits, blocks of 32: `d·q + m`.
    Q4_1,
    /// 5 bits, blocks of 32: `d·(q − 16)`.
    Q5_0,
    /// 5 bits, blocks of 32: `d·q + m`.
    Q5_1,
    /// 8 bits, blocks of 32: `d·q`.
    Q8_0,
    /// 2 bits, 16 groups of 16 with 4-bit scales and minima.
    Q2K,
    /// 3 bits, 16 groups of 16 with 6-bit scales.
    Q3K,
    /// 4 bits, 8 groups of 32 with 6-bit scales and minima.
    Q4K,
    /// 5 bits, 8 groups of 32 with 6-bit scales and minima.
    Q5K,
    /// 6 bits, 16 groups of 16 with 8-bit scales.
    Q6K,
}

/// One row per readable type: type, code in the file, ggml's name, elements in a block, bytes in a block.
const READABLE: [(TensorType, u32, &str, usize, usize); 13] = [
    (TensorType::F32, 0, "F32", 1, 4),
    (TensorType::F16, 1, "F16", 1, 2),
    (TensorType::Bf16, 30, "BF16", 1, 2),
    (TensorType::Q4_0, 2, "Q4_0", 32, 18),
    (TensorType::Q4_1, 3, "Q4_1", 32, 20),
    (TensorType::Q5_0, 6, "Q5_0", 32, 22),
    (TensorType::Q5_1, 7, "Q5_1", 32, 24),
    (TensorType::Q8_0, 8, "Q8_0", 32, 34),
    (TensorType::Q2K, 10, "Q2_K", QK_K, 84),
    (TensorType::Q3K, 11, "Q3_K", QK_K, 110),
    (TensorType::Q4K, 12, "Q4_K", QK_K, 144),
    (TensorType::Q5K, 13, "Q5_K", QK_K, 176),
    (TensorType::Q6K, 14, "Q6_K", QK_K, 210),
];

/// Names of the types that exist in GGUF files and cannot be read here, for the error message.
const UNREADABLE: [(u32, &str); 20] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
];

impl TensorType {
    /// The type with this code in a file, or the reason why there is none, to stand after the tensor's name.
    pub(super) fn from_code(code: u32) -> Result<Self, String> {
        if let Some(row) = READABLE.iter().find(|row| row.1 == code) {
            return Ok(row.0);
        }
        let name = UNREADABLE.iter().find(|row| row.0 == code).map_or("unknown to this reader", |row| row.1);
        let supported: Vec<&str> = READABLE.iter().map(|row| row.2).collect();
        Err(format!("has type {code} ({name}); the types that can be read are {}", supported.join(", ")))
    }

    fn row(self) -> &'static (TensorType, u32, &'static str, usize, usize) {
        READABLE.iter().find(|row| row.0 == self).expect("every type has a row in the table")
    }

    /// ggml's name of the type, e.g. `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Elements in one block; 1 for the floating-point types.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Whether values are stored as small integers with scales.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// How codes, scales and minima of the type are packed so that no value changes: in the fewest bits that hold the codes.
    /// `None` for the float types.
    pub fn packing(self) -> Option<Packing> {
        let (bits, group, scales, mins) = match self {
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 => return None,
            TensorType::Q4_0 => (Bits::Four, 32, ScaleType::F16, false),
            TensorType::Q4_1 => (Bits::Four, 32, ScaleType::F16, true),
            TensorType::Q5_0 | TensorType::Q8_0 => (Bits::Eight, 32, ScaleType::F16, false),
            TensorType::Q5_1 => (Bits::Eight, 32, ScaleType::F16, true),
            // a K-quant's scale is a product, of more digits than half precision has
            TensorType::Q2K => (Bits::Four, 16, ScaleType::F32, true),
            TensorType::Q3K => (Bits::Four, 16, ScaleType::F32, false),
            TensorType::Q4K => (Bits::Four, 32, ScaleType::F32, true),
            TensorType::Q5K => (Bits::Eight, 32, ScaleType::F32, true),
            TensorType::Q6K => (Bits::Eight, 16, ScaleType::F32, false),
        };
        Some(Packing::new(bits, group, scales, mins))
    }

    /// Writes the values of `blocks` to `out`.
    ///
    /// `blocks` holds whole blocks and `out` has exactly their number of elements; what is beyond the shorter of the
    /// two stays untouched.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let Some(packing) = self.packing() else {
            let decode: fn(&[u8]) -> f32 = match self {
                TensorType::F16 => |b| f16_at(b, 0),
                TensorType::Bf16 => |b| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
                _ => |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            };
            return out.iter_mut().zip(blocks.chunks_exact(self.block_bytes())).for_each(|(y, b)| *y = decode(b));
        };
        let mut codes = Codes::new();
        for (block, values) in blocks.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_len())) {
            self.take_apart(block, &mut codes);
            let group = packing.format.group;
            for (g, (values, codes_of)) in values.chunks_mut(group).zip(codes.codes.chunks(group)).enumerate() {
                let (scale, minimum) = (codes.scales[g], codes.minima[g]);
                match packing.format.mins {
                    true => values.iter_mut().zip(codes_of).for_each(|(y, &c)| *y = scale * f32::from(c) + minimum),
                    false => values.iter_mut().zip(codes_of).for_each(|(y, &c)| *y = scale * f32::from(c)),
                }
            }
        }
    }

    /// Takes one block of a quantized type apart.
    pub(super) fn take_apart(self, block: &[u8], out: &mut Codes) {
        match self {
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 => unreachable!("{} has no codes", self.name()),
            TensorType::Q4_0 => q4_0(block, out),
            TensorType::Q4_1 => q4_1(block, out),
            TensorType::Q5_0 => q5_0(block, out),
            TensorType::Q5_1 => q5_1(block, out),
            TensorType::Q8_0 => q8_0(block, out),
            TensorType::Q2K => q2_k(block, out),
            TensorType::Q3K => q3_k(block, out),
            TensorType::Q4K => q4_k(block, out),
            TensorType::Q5K => q5_k(block, out),
            TensorType::Q6K => q6_k(block, out),
        }
    }
}

/// One block taken apart, as many of each as its type has.
pub(super) struct Codes {
    pub(super) codes: [i8; QK_K],
    /// One for each group.
    pub(super) scales: [f32; QK_K / 16],
    /// The same, what is added; left alone by types that have none.
    pub(super) minima: [f32; QK_K / 16],
}

impl Codes {
    pub(super) fn new() -> Codes {
        Codes { codes: [0; QK_K], scales: [0.0; QK_K / 16], minima: [0.0; QK_K / 16] }
    }
}

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Blocks of 32 keep elements 0‥16 in the low and 16‥32 in the high halves of their bytes.
fn nibble(qs: &[u8], i: usize) -> i8 {
    (if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }) as i8
}

/// d:f16, qs:16
fn q4_0(b: &[u8], out: &mut Codes) {
    out.scales[0] = f16_at(b, 0);
    out.codes[..32].iter_mut().enumerate().for_each(|(i, c)| *c = nibble(&b[2..], i) - 8);
}

/// d:f16, m:f16, qs:16
fn q4_1(b: &[u8], out: &mut Codes) {
    (out.scales[0], out.minima[0]) = (f16_at(b, 0), f16_at(b, 2));
    out.codes[..32].iter_mut().enumerate().for_each(|(i, c)| *c = nibble(&b[4..], i));
}

/// The fifth bits of a block of 32 are one little-endian 32-bit word.
fn five_bits(qh: &[u8], qs: &[u8], i: usize) -> i8 {
    let high = (u32::from_le_bytes([qh[0], qh[1], qh[2], qh[3]]) >> i & 1) as i8;
    nibble(qs, i) | high << 4
}

/// d:f16, qh:4, qs:16
fn q5_0(b: &[u8], out: &mut Codes) {
    out.scales[0] = f16_at(b, 0);
    out.codes[..32].iter_mut().enumerate().for_each(|(i, c)| *c = five_bits(&b[2..6], &b[6..], i) - 16);
}

/// d:f16, m:f16, qh:4, qs:16
fn q5_1(b: &[u8], out: &mut Codes) {
    (out.scales[0], out.minima[0]) = (f16_at(b, 0), f16_at(b, 2));
    out.codes[..32].iter_mut().enumerate().for_each(|(i, c)| *c = five_bits(&b[4..8], &b[8..], i));
}

/// d:f16, qs:32 signed
fn q8_0(b: &[u8], out: &mut Codes) {
    out.scales[0] = f16_at(b, 0);
    out.codes[..32].iter_mut().zip(&b[2..]).for_each(|(c, &q)| *c = q as i8);
}

/// Element `i` of 256 two-bit values: 32 bytes hold four runs of 32 elements, one run per bit pair.
fn two_bits(qs: &[u8], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3
}

/// scales:16 (low half scale, high half minimum), qs:64, d:f16, dmin:f16
fn q2_k(b: &[u8], out: &mut Codes) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
    for (group, both) in scales.iter().enumerate() {
        out.scales[group] = d * f32::from(both & 15);
        out.minima[group] = -(dmin * f32::from(both >> 4));
    }
    out.codes.iter_mut().enumerate().for_each(|(i, c)| *c = two_bits(qs, i) as i8);
}

/// hmask:32, qs:64, scales:12, d:f16. The third bit is stored inverted: a clear mask bit subtracts 4.
fn q3_k(b: &[u8], out: &mut Codes) {
    let (hmask, qs, scales, d) = (&b[..32], &b[32..96], &b[96..108], f16_at(b, 108));
    for (group, scale) in out.scales.iter_mut().enumerate() {
        let low = scales[group % 8] >> (group / 8 * 4) & 15;
        let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        *scale = d * (f32::from(low | high << 4) - 32.0);
    }
    for (i, c) in out.codes.iter_mut().enumerate() {
        let offset = if hmask[i % 32] >> (i / 32) & 1 == 1 { 0 } else { 4 };
        *c = two_bits(qs, i) as i8 - offset;
    }
}

/// The eight 6-bit scales and minima of Q4_K and Q5_K in 12 bytes: groups 0‥4 lie in the low six bits of bytes 0‥4
/// (scales) and 4‥8 (minima); groups 4‥8 have four bits in bytes 8‥12 and their top two above the former.
fn scale_and_minimum(s: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (s[group] & 63, s[group + 4] & 63)
    } else {
        (s[group + 4] & 15 | s[group - 4] >> 2 & 48, s[group + 4] >> 4 | s[group] >> 2 & 48)
    };
    (f32::from(scale), f32::from(minimum))
}

/// The scales and minima of Q4_K and Q5_K: d:f16, dmin:f16, scales:12.
fn scales_and_minima(b: &[u8], out: &mut Codes) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for group in 0..8 {
        let (scale, minimum) = scale_and_minimum(&b[4..16], group);
        (out.scales[group], out.minima[group]) = (d * scale, -(dmin * minimum));
    }
}

/// d:f16, dmin:f16, scales:12, qs:128. 32 bytes hold two groups: the low halves, then the high ones.
fn q4_k(b: &[u8], out: &mut Codes) {
    scales_and_minima(b, out);
    for (group, codes) in out.codes.chunks_exact_mut(32).enumerate() {
        let qs = &b[16 + group / 2 * 32..];
        codes.iter_mut().zip(qs).for_each(|(c, &q)| *c = (q >> (group % 2 * 4) & 15) as i8);
    }
}

/// d:f16, dmin:f16, scales:12, qh:32, qs:128. Bit `g` of `qh[i]` is the fifth bit of element `i` of group `g`.
fn q5_k(b: &[u8], out: &mut Codes) {
    scales_and_minima(b, out);
    let (qh, qs) = (&b[16..48], &b[48..176]);
    for (group, codes) in out.codes.chunks_exact_mut(32).enumerate() {
        for ((c, &q), &high) in codes.iter_mut().zip(&qs[group / 2 * 32..]).zip(qh) {
            *c = (q >> (group % 2 * 4) & 15 | (high >> group & 1) << 4) as i8;
        }
    }
}

/// ql:128, qh:64, scales:16 signed, d:f16. Halves of 128 elements use 64 bytes of `ql` and 32 of `qh` each.
fn q6_k(b: &[u8], out: &mut Codes) {
    let (ql, qh, scales, d) = (&b[..128], &b[128..192], &b[192..208], f16_at(b, 208));
    out.scales.iter_mut().zip(scales).for_each(|(scale, &s)| *scale = d * f32::from(s as i8));
    for (i, c) in out.codes.iter_mut().enumerate() {
        let low = ql[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
        *c = (low | two_bits(qh, i) << 4) as i8 - 32;
    }
}
