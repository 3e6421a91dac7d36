//! Element types that graphs, buffers and kernels share.

use std::fmt;

/// An element type of StableHLO, by its StableHLO spelling in [`fmt::Display`] (`f32`, `ui8`, `i1`, …).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum DType {
    Pred,
    I4,
    I8,
    I16,
    I32,
    I64,
    U4,
    U8,
    U16,
    U32,
    U64,
    F8E4M3FN,
    F8E5M2,
    F16,
    BF16,
    F32,
    F64,
}

impl DType {
    /// Every element type, in declaration order.
    pub const ALL: [DType; 17] = {
        use DType::*;
        [Pred, I4, I8, I16, I32, I64, U4, U8, U16, U32, U64, F8E4M3FN, F8E5M2, F16, BF16, F32, F64]
    };

    /// Bytes of one element in host memory (4-bit types and `pred` take one byte each).
    pub fn size(self) -> usize {
        match self {
            DType::Pred | DType::I4 | DType::U4 | DType::I8 | DType::U8 | DType::F8E4M3FN | DType::F8E5M2 => 1,
            DType::I16 | DType::U16 | DType::F16 | DType::BF16 => 2,
            DType::I32 | DType::U32 | DType::F32 => 4,
            DType::I64 | DType::U64 | DType::F64 => 8,
        }
    }

    /// Bits of one element as StableHLO counts them.
    pub fn bits(self) -> usize {
        match self {
            DType::Pred => 1,
            DType::I4 | DType::U4 => 4,
            _ => 8 * self.size(),
        }
    }

    /// The name StableHLO uses (`i1`, `i4`, `ui8`, `f8E4M3FN`, `bf16`, …).
    pub fn name(self) -> &'static str {
        match self {
            DType::Pred => "i1",
            DType::I4 => "i4",
            DType::I8 => "i8",
            DType::I16 => "i16",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::U4 => "ui4",
            DType::U8 => "ui8",
            DType::U16 => "ui16",
            DType::U32 => "ui32",
            DType::U64 => "ui64",
            DType::F8E4M3FN => "f8E4M3FN",
            DType::F8E5M2 => "f8E5M2",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F32 => "f32",
            DType::F64 => "f64",
        }
    }

    /// True for the floating-point types.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F8E4M3FN | DType::F8E5M2 | DType::F16 | DType::BF16 | DType::F32 | DType::F64)
    }

    /// True for signed and unsigned integers (not `pred`).
    pub fn is_integer(self) -> bool {
        self.is_signed() || self.is_unsigned()
    }

    /// True for signed integers.
    pub fn is_signed(self) -> bool {
        matches!(self, DType::I4 | DType::I8 | DType::I16 | DType::I32 | DType::I64)
    }

    /// True for unsigned integers.
    pub fn is_unsigned(self) -> bool {
        matches!(self, DType::U4 | DType::U8 | DType::U16 | DType::U32 | DType::U64)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
