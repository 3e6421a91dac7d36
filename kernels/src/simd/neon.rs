//! NEON: four lanes.

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::Simd;

/// NEON of 64-bit Arm.
#[derive(Clone, Copy, Debug)]
pub struct Neon(());

impl Neon {
    /// The token, where the machine has these instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

#[target_feature(enable = "neon")]
fn run<R>(f: impl FnOnce() -> R) -> R {
    f()
}

impl Simd for Neon {
    type F32 = float32x4_t;
    type I32 = int32x4_t;
    type Dots = Self::I32;
    type Floats = Self;
    const LANES: usize = 4;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the token says that the instructions exist.
        unsafe { run(f) }
    }

    #[inline(always)]
    fn floats(self) -> Self::Floats {
        self
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vdivq_f32(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }

    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vrndnq_f32(x) }
    }

    #[inline(always)]
    fn exp2i(self, n: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)))) }
    }

    #[inline(always)]
    fn reduce_add(self, x: Self::F32) -> f32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vaddvq_f32(x) }
    }

    #[inline(always)]
    fn reduce_max(self, x: Self::F32) -> f32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vmaxvq_f32(x) }
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut f32, x: Self::F32) {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { vst1q_f32(to, x) }
    }

    #[inline(always)]
    unsafe fn read_part(self, from: *const f32, n: usize) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe {
            let mut lanes = [0.0; 4];
            std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n.min(4));
            vld1q_f32(lanes.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn write_part(self, to: *mut f32, n: usize, x: Self::F32) {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe {
            let mut lanes = [0.0; 4];
            vst1q_f32(lanes.as_mut_ptr(), x);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n.min(4))
        }
    }

    #[inline(always)]
    unsafe fn read_bf16(self, from: *const bf16) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn read_f16(self, from: *const f16) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe {
            let lanes = from.cast::<[f16; 4]>().read_unaligned().map(f16::to_f32);
            vld1q_f32(lanes.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn read_i8(self, from: *const i8) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe {
            let lanes = from.cast::<[i8; 4]>().read_unaligned().map(f32::from);
            vld1q_f32(lanes.as_ptr())
        }
    }

    #[inline(always)]
    fn round_bf16(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            // Half of the last place that is kept, less where that is even; what is not a number must not become another.
            let bits = vreinterpretq_u32_f32(x);
            let even = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), even);
            let kept = vreinterpretq_f32_u32(vandq_u32(up, vdupq_n_u32(!0xffff)));
            vbslq_f32(vceqq_f32(x, x), kept, x)
        }
    }

    #[inline(always)]
    fn round_f16(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, and the array has four lanes.
        unsafe {
            let mut lanes = [0.0; 4];
            vst1q_f32(lanes.as_mut_ptr(), x);
            let rounded = lanes.map(|x| f16::from_f32(x).to_f32());
            vld1q_f32(rounded.as_ptr())
        }
    }

    #[inline(always)]
    fn reduce_add4(self, [a, b, c, d]: [Self::F32; 4]) -> [f32; 4] {
        // SAFETY: the token says that the instructions exist, and the array has four lanes.
        unsafe {
            let mut sums = [0.0; 4];
            vst1q_f32(sums.as_mut_ptr(), vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
            sums
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vdupq_n_s32(x) }
    }

    #[inline(always)]
    unsafe fn read_i32(self, from: *const u8) -> Self::I32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { vreinterpretq_s32_u8(vld1q_u8(from)) }
    }

    #[inline(always)]
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vandq_s32(a, b) }
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-(N as i32)))) }
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vcvtq_f32_s32(a) }
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
        // SAFETY: the token says that the instructions exist.
        unsafe {
            // Each byte as 16 bits: products of four bytes lie in one vector of 32 bits, summed by neighbours twice.
            let (w, x) = (vreinterpretq_u8_s32(w), vreinterpretq_s8_s32(x));
            let w = [vmovl_u8(vget_low_u8(w)), vmovl_high_u8(w)].map(|w| vreinterpretq_s16_u16(w));
            let x = [vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x)];
            let sums = [0, 1]
                .map(|i| vpaddq_s32(vmull_s16(vget_low_s16(w[i]), vget_low_s16(x[i])), vmull_high_s16(w[i], x[i])));
            vaddq_s32(acc, vpaddq_s32(sums[0], sums[1]))
        }
    }

    #[inline(always)]
    fn zero_below(self, x: Self::F32, limit: Self::F32, y: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { vbslq_f32(vcltq_f32(x, limit), vdupq_n_f32(0.0), y) }
    }
}
