//! The types that a cache holds, as lanes of f32.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::step::quantize;
use crate::simd::Simd;

/// More lanes than any vector has.
const MAX_LANES: usize = 16;

/// Keys or values, (B, G, T, K), and what rows of int8 are multiplied with, (B, G, T).
#[derive(Clone, Copy)]
pub struct Array<'a, E> {
    pub data: &'a [E],
    pub scales: Option<&'a [f32]>,
}

/// A type that a cache holds.
pub trait Element: Copy + Default + Send + Sync + 'static {
    /// LANES elements.
    ///
    /// # Safety
    /// `from` must be valid for reads of LANES elements.
    unsafe fn read<S: Simd>(simd: S, from: *const Self) -> S::F32;

    /// The first `n` lanes (at most LANES), zeros behind.
    ///
    /// # Safety
    /// `from` must be valid for reads of `n` elements.
    #[inline(always)]
    unsafe fn read_part<S: Simd>(simd: S, from: *const Self, n: usize) -> S::F32 {
        let mut lanes = [Self::default(); MAX_LANES];
        // SAFETY: the caller vouches for n elements, which are at most as many as there are lanes.
        unsafe {
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n);
            Self::read(simd, lanes.as_ptr())
        }
    }

    /// The nearest values of the type that queries and weights have in products with this one.
    fn round<S: Simd>(simd: S, x: S::F32) -> S::F32;

    /// Elements of a row of the cache, and its scale where the type has one.
    fn store<S: Simd>(simd: S, from: &[f32], to: &mut [Self], scale: &mut [f32]);

    /// The same elements, where they are f32.
    fn as_f32(x: &[Self]) -> Option<&[f32]>;
}

/// `rows` of `width` elements as f32, each `stride` after the other (a multiple of LANES, not below `width`), zeros
/// between.
#[inline(always)]
pub fn widen<S: Simd, E: Element>(simd: S, from: &[E], width: usize, to: &mut [f32], stride: usize) {
    for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(stride)) {
        let mut at = 0;
        while at + S::LANES <= width {
            // SAFETY: the row has LANES elements from here on.
            simd.store(&mut to[at..], unsafe { E::read(simd, from.as_ptr().add(at)) });
            at += S::LANES;
        }
        if at < width {
            // SAFETY: so many elements of the row are left.
            simd.store(&mut to[at..], unsafe { E::read_part(simd, from.as_ptr().add(at), width - at) });
        }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn read<S: Simd>(simd: S, from: *const f32) -> S::F32 {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { simd.read(from) }
    }

    #[inline(always)]
    fn round<S: Simd>(_: S, x: S::F32) -> S::F32 {
        x
    }

    #[inline(always)]
    fn store<S: Simd>(_: S, from: &[f32], to: &mut [f32], _: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn as_f32(x: &[f32]) -> Option<&[f32]> {
        Some(x)
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn read<S: Simd>(simd: S, from: *const bf16) -> S::F32 {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { simd.read_bf16(from) }
    }

    #[inline(always)]
    fn round<S: Simd>(simd: S, x: S::F32) -> S::F32 {
        simd.round_bf16(x)
    }

    #[inline(always)]
    fn store<S: Simd>(simd: S, from: &[f32], to: &mut [bf16], _: &mut [f32]) {
        let mut lanes = [0.0; MAX_LANES];
        for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
            simd.store(&mut lanes, simd.round_bf16(simd.load_part(from)));
            // Rounded already: the lower half is zeros.
            to.iter_mut().zip(lanes).for_each(|(to, x)| *to = bf16::from_bits((x.to_bits() >> 16) as u16));
        }
    }

    #[inline(always)]
    fn as_f32(_: &[bf16]) -> Option<&[f32]> {
        None
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn read<S: Simd>(simd: S, from: *const f16) -> S::F32 {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { simd.read_f16(from) }
    }

    #[inline(always)]
    fn round<S: Simd>(simd: S, x: S::F32) -> S::F32 {
        simd.round_f16(x)
    }

    #[inline(always)]
    fn store<S: Simd>(_: S, from: &[f32], to: &mut [f16], _: &mut [f32]) {
        to.convert_from_f32_slice(from);
    }

    #[inline(always)]
    fn as_f32(_: &[f16]) -> Option<&[f32]> {
        None
    }
}

impl Element for i8 {
    #[inline(always)]
    unsafe fn read<S: Simd>(simd: S, from: *const i8) -> S::F32 {
        // SAFETY: the caller vouches for LANES elements.
        unsafe { simd.read_i8(from) }
    }

    #[inline(always)]
    fn round<S: Simd>(_: S, x: S::F32) -> S::F32 {
        x
    }

    #[inline(always)]
    fn store<S: Simd>(simd: S, from: &[f32], to: &mut [i8], scale: &mut [f32]) {
        quantize(simd, from, to, &mut scale[0]);
    }

    #[inline(always)]
    fn as_f32(_: &[i8]) -> Option<&[f32]> {
        None
    }
}
