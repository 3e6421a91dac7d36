//! The block formats of GGUF tensors, and their values as float32.
//!
//! A quantized tensor is a sequence of blocks along its fastest axis; each block has its own scales. The layouts are
//! those of ggml; the arithmetic is float32 in the order of operations of the `gguf` Python package, so that the
//! values are the same to the last bit. Symbols in the formulas: `d` scale, `m` minimum, `q` the stored integer.

use half::{bf16, f16};

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

    /// Writes the values of `blocks` to `out`.
    ///
    /// `blocks` holds whole blocks and `out` has exactly their number of elements; what is beyond the shorter of the
    /// two stays untouched.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let decode: fn(&[u8], &mut [f32]) = match self {
            TensorType::F32 => |b, y| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            TensorType::F16 => |b, y| y[0] = f16_at(b, 0),
            TensorType::Bf16 => |b, y| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            TensorType::Q4_0 => q4_0,
            TensorType::Q4_1 => q4_1,
            TensorType::Q5_0 => q5_0,
            TensorType::Q5_1 => q5_1,
            TensorType::Q8_0 => q8_0,
            TensorType::Q2K => q2_k,
            TensorType::Q3K => q3_k,
            TensorType::Q4K => q4_k,
            TensorType::Q5K => q5_k,
            TensorType::Q6K => q6_k,
        };
        for (block, values) in blocks.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_len())) {
            decode(block, values);
        }
    }
}

fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Blocks of 32 keep elements 0‥16 in the low and 16‥32 in the high halves of their bytes.
fn nibble(qs: &[u8], i: usize) -> u8 {
    if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 }
}

/// d:f16, qs:16
fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * (f32::from(nibble(&b[2..], i)) - 8.0);
    }
}

/// d:f16, m:f16, qs:16
fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * f32::from(nibble(&b[4..], i)) + m;
    }
}

/// The fifth bits of a block of 32 are one little-endian 32-bit word.
fn five_bits(qh: &[u8], qs: &[u8], i: usize) -> f32 {
    let high = (u32::from_le_bytes([qh[0], qh[1], qh[2], qh[3]]) >> i & 1) as u8;
    f32::from(nibble(qs, i) | high << 4)
}

/// d:f16, qh:4, qs:16
fn q5_0(b: &[u8], y: &mut [f32]) {
    let d = f16_at(b, 0);
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * (five_bits(&b[2..6], &b[6..], i) - 16.0);
    }
}

/// d:f16, m:f16, qh:4, qs:16
fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * five_bits(&b[4..8], &b[8..], i) + m;
    }
}

/// d:f16, qs:32 signed
fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = f16_at(b, 0);
    for (y, &q) in y.iter_mut().zip(&b[2..]) {
        *y = f32::from(q as i8) * d;
    }
}

/// Element `i` of 256 two-bit values: 32 bytes hold four runs of 32 elements, one run per bit pair.
fn two_bits(qs: &[u8], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3
}

/// scales:16 (low half scale, high half minimum), qs:64, d:f16, dmin:f16
fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, qs) = (&b[..16], &b[16..80]);
    let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] & 15);
        let minimum = dmin * f32::from(scales[group] >> 4);
        for (i, y) in y.iter_mut().enumerate() {
            *y = scale * f32::from(two_bits(qs, group * 16 + i)) - minimum;
        }
    }
}

/// hmask:32, qs:64, scales:12, d:f16. The third bit is stored inverted: a clear mask bit subtracts 4.
fn q3_k(b: &[u8], y: &mut [f32]) {
    let (hmask, qs, scales, d) = (&b[..32], &b[32..96], &b[96..108], f16_at(b, 108));
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let low = scales[group % 8] >> (group / 8 * 4) & 15;
        let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        let scale = d * (f32::from(low | high << 4) - 32.0);
        for (i, y) in y.iter_mut().enumerate() {
            let i = group * 16 + i;
            let offset = if hmask[i % 32] >> (i / 32) & 1 == 1 { 0.0 } else { 4.0 };
            *y = scale * (f32::from(two_bits(qs, i)) - offset);
        }
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

/// d:f16, dmin:f16, scales:12, qs:128. 32 bytes hold two groups: the low halves, then the high ones.
fn q4_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin, scales, qs) = (f16_at(b, 0), f16_at(b, 2), &b[4..16], &b[16..144]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(scales, group);
        let (scale, minimum) = (d * scale, dmin * minimum);
        for (y, &q) in y.iter_mut().zip(&qs[group / 2 * 32..]) {
            *y = scale * f32::from(q >> (group % 2 * 4) & 15) - minimum;
        }
    }
}

/// d:f16, dmin:f16, scales:12, qh:32, qs:128. Bit `g` of `qh[i]` is the fifth bit of element `i` of group `g`.
fn q5_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin, scales, qh, qs) = (f16_at(b, 0), f16_at(b, 2), &b[4..16], &b[16..48], &b[48..176]);
    for (group, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(scales, group);
        let (scale, minimum) = (d * scale, dmin * minimum);
        for ((y, &q), &high) in y.iter_mut().zip(&qs[group / 2 * 32..]).zip(qh) {
            let q = q >> (group % 2 * 4) & 15 | (high >> group & 1) << 4;
            *y = scale * f32::from(q) - minimum;
        }
    }
}

/// ql:128, qh:64, scales:16 signed, d:f16. Halves of 128 elements use 64 bytes of `ql` and 32 of `qh` each.
fn q6_k(b: &[u8], y: &mut [f32]) {
    let (ql, qh, scales, d) = (&b[..128], &b[128..192], &b[192..208], f16_at(b, 208));
    for (group, y) in y.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] as i8);
        for (i, y) in y.iter_mut().enumerate() {
            let i = group * 16 + i;
            let low = ql[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
            *y = scale * (f32::from(low | two_bits(qh, i) << 4) - 32.0);
        }
    }
}
