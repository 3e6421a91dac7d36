//! Rust types that are element types, and the codes PJRT gives element types.

use crate::DType;
use half::{bf16, f16};

/// A Rust type with the memory layout of a [`DType`].
///
/// # Safety
/// The type is plain data without padding, has the size of `DTYPE`, and every bit pattern is a value of it, except
/// that a `Pred` holds only 0 and 1.
pub unsafe trait Element: Copy + Send + Sync + 'static {
    /// The element type.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),* $(,)?) => {
        $(
            // SAFETY: a primitive (or a transparent wrapper of one) of the size of its element type.
            unsafe impl Element for $ty {
                const DTYPE: DType = DType::$dtype;
            }
            const _: () = assert!(size_of::<$ty>() == (match DType::$dtype {
                DType::I16 | DType::U16 | DType::F16 | DType::BF16 => 2,
                DType::I32 | DType::U32 | DType::F32 => 4,
                DType::I64 | DType::U64 | DType::F64 => 8,
                _ => 1,
            }));
        )*
    };
}

elements! {
    bool => Pred, i8 => I8, i16 => I16, i32 => I32, i64 => I64, u8 => U8, u16 => U16, u32 => U32, u64 => U64,
    f16 => F16, bf16 => BF16, f32 => F32, f64 => F64,
}

/// The bytes of a slice of elements.
pub(super) fn bytes_of<T: Element>(data: &[T]) -> &[u8] {
    // SAFETY: elements are plain data without padding, so all their bytes are initialised.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), size_of_val(data)) }
}

/// `PJRT_Buffer_Type` of an element type.
pub(super) fn to_raw(dtype: DType) -> i32 {
    match dtype {
        DType::Pred => 1,
        DType::I8 => 2,
        DType::I16 => 3,
        DType::I32 => 4,
        DType::I64 => 5,
        DType::U8 => 6,
        DType::U16 => 7,
        DType::U32 => 8,
        DType::U64 => 9,
        DType::F16 => 10,
        DType::F32 => 11,
        DType::F64 => 12,
        DType::BF16 => 13,
        DType::F8E5M2 => 16,
        DType::F8E4M3FN => 17,
        DType::I4 => 21,
        DType::U4 => 22,
    }
}

/// The element type of a `PJRT_Buffer_Type`, where it is one of ours.
pub(super) fn from_raw(raw: i32) -> Option<DType> {
    DType::ALL.into_iter().find(|d| to_raw(*d) == raw)
}

/// Bytes of a dense host array; `None` on overflow.
pub(super) fn byte_size(dtype: DType, dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d))
}
