//! Float types that weights are stored in.

use half::{bf16, f16};

use crate::simd::Simd;

/// A float that is widened to f32 when read.
pub(crate) trait Element: Copy + Default + Into<f32> + Send + Sync + 'static {
    /// # Safety
    /// `from` must be valid for reads of LANES elements.
    unsafe fn read<S: Simd>(simd: S, from: *const Self) -> S::F32;

    /// The first `n` lanes (at most LANES), zeros behind.
    ///
    /// # Safety
    /// `from` must be valid for reads of `n` elements.
    #[inline(always)]
    unsafe fn read_part<S: Simd>(simd: S, from: *const Self, n: usize) -> S::F32 {
        let mut lanes = [Self::default(); 16];
        // SAFETY: the caller vouches for n elements; no vector has more lanes than the array.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n.min(S::LANES));
            Self::read(simd, lanes.as_ptr())
        }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn read<S: Simd>(simd: S, from: *const Self) -> S::F32 {
        // SAFETY: the caller vouches for as many elements as are read.
        unsafe { simd.read(from) }
    }

    #[inline(always)]
    unsafe fn read_part<S: Simd>(simd: S, from: *const Self, n: usize) -> S::F32 {
        // SAFETY: the caller vouches for as many elements as are read.
        unsafe { simd.read_part(from, n.min(S::LANES)) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn read<S: Simd>(simd: S, from: *const Self) -> S::F32 {
        // SAFETY: the caller vouches for as many elements as are read.
        unsafe { simd.read_bf16(from) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn read<S: Simd>(simd: S, from: *const Self) -> S::F32 {
        // SAFETY: the caller vouches for as many elements as are read.
        unsafe { simd.read_f16(from) }
    }
}

/// `elements!(values, |w| expression)`: the expression with the slice, whatever it holds.
macro_rules! elements {
    ($values:expr, |$w:ident| $body:expr) => {
        match $values {
            $crate::linear::Values::F32($w) => $body,
            $crate::linear::Values::Bf16($w) => $body,
            $crate::linear::Values::F16($w) => $body,
        }
    };
}
pub(crate) use elements;
