//! Plain Rust: eight lanes in an array.

use half::{bf16, f16};

use super::Simd;

/// Plain Rust, for machines without a vector unit known here. `fma` rounds twice.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

const LANES: usize = 8;

#[inline(always)]
fn lanes<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for (i, out) in out.iter_mut().enumerate() {
        *out = f(i);
    }
    out
}

impl Simd for Portable {
    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Dots = Self::I32;
    type Floats = Self;
    const LANES: usize = LANES;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }

    #[inline(always)]
    fn floats(self) -> Self::Floats {
        self
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        [x; LANES]
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        lanes(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        lanes(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        lanes(|i| x[i].round_ties_even())
    }

    #[inline(always)]
    fn exp2i(self, n: Self::F32) -> Self::F32 {
        lanes(|i| f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn reduce_add(self, x: Self::F32) -> f32 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }

    #[inline(always)]
    fn reduce_max(self, x: Self::F32) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> Self::F32 {
        // SAFETY: the caller vouches for LANES elements; an array asks for no more alignment than its elements.
        unsafe { from.cast::<Self::F32>().read() }
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut f32, x: Self::F32) {
        // SAFETY: as in `read`.
        unsafe { to.cast::<Self::F32>().write(x) }
    }

    #[inline(always)]
    unsafe fn read_part(self, from: *const f32, n: usize) -> Self::F32 {
        // SAFETY: the caller vouches for n elements, and no others are read.
        lanes(|i| if i < n { unsafe { *from.add(i) } } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn write_part(self, to: *mut f32, n: usize, x: Self::F32) {
        for (i, x) in x.into_iter().enumerate().take(n) {
            // SAFETY: the caller vouches for n elements.
            unsafe { *to.add(i) = x }
        }
    }

    #[inline(always)]
    unsafe fn read_bf16(self, from: *const bf16) -> Self::F32 {
        // SAFETY: the caller vouches for LANES elements.
        lanes(|i| unsafe { *from.add(i) }.to_f32())
    }

    #[inline(always)]
    unsafe fn read_f16(self, from: *const f16) -> Self::F32 {
        // SAFETY: the caller vouches for LANES elements.
        lanes(|i| unsafe { *from.add(i) }.to_f32())
    }

    #[inline(always)]
    unsafe fn read_i8(self, from: *const i8) -> Self::F32 {
        // SAFETY: the caller vouches for LANES elements.
        lanes(|i| f32::from(unsafe { *from.add(i) }))
    }

    #[inline(always)]
    fn round_bf16(self, x: Self::F32) -> Self::F32 {
        lanes(|i| bf16::from_f32(x[i]).to_f32())
    }

    #[inline(always)]
    fn round_f16(self, x: Self::F32) -> Self::F32 {
        lanes(|i| f16::from_f32(x[i]).to_f32())
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn read_i32(self, from: *const u8) -> Self::I32 {
        // SAFETY: the caller vouches for 4·LANES bytes; no alignment is asked for.
        unsafe { from.cast::<Self::I32>().read_unaligned() }
    }

    #[inline(always)]
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        lanes(|i| a[i] & b[i])
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::I32) -> Self::I32 {
        lanes(|i| (a[i] as u32 >> N) as i32)
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        lanes(|i| a[i] as f32)
    }

    #[inline(always)]
    fn dots<const FOUR: bool>(self, start: Self::I32) -> Self::Dots {
        start
    }

    #[inline(always)]
    fn total<const FOUR: bool>(self, dots: Self::Dots, _start: Self::I32) -> Self::I32 {
        dots
    }

    #[inline(always)]
    fn dot<const FOUR: bool>(self, acc: Self::Dots, w: Self::I32, x: Self::I32) -> Self::Dots {
        lanes(|i| {
            let (w, x) = (w[i].to_le_bytes(), x[i].to_le_bytes());
            acc[i] + (0..4).map(|b| i32::from(w[b]) * i32::from(x[b] as i8)).sum::<i32>()
        })
    }

    #[inline(always)]
    fn zero_below(self, x: Self::F32, limit: Self::F32, y: Self::F32) -> Self::F32 {
        lanes(|i| if x[i] < limit[i] { 0.0 } else { y[i] })
    }
}
