//! AVX2 with FMA and F16C: eight lanes.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The token, where the machine has these instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        let all =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        all.then_some(Self(()))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn run<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// All bits of the lanes below n.
#[inline(always)]
fn mask(n: usize) -> __m256i {
    // SAFETY: called by methods of the token alone, which says that the instructions exist.
    unsafe { _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)) }
}

impl Simd for Avx2 {
    type F32 = __m256;
    type I32 = __m256i;
    /// Of four bits, 16 bits for each two bytes: 15 · 128 · 2, eight times, is below 2¹⁵; else 32 bits.
    type Dots = __m256i;
    type Floats = Self;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const WIDE: bool = true;

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
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }

    #[inline(always)]
    fn exp2i(self, n: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                _mm256_cvtps_epi32(n),
                _mm256_set1_epi32(127),
            )))
        }
    }

    #[inline(always)]
    fn reduce_add(self, x: Self::F32) -> f32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    fn reduce_max(self, x: Self::F32) -> f32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut f32, x: Self::F32) {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm256_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn read_part(self, from: *const f32, n: usize) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { if n >= 8 { _mm256_loadu_ps(from) } else { _mm256_maskload_ps(from, mask(n)) } }
    }

    #[inline(always)]
    unsafe fn write_part(self, to: *mut f32, n: usize, x: Self::F32) {
        // Some processors take ten times as long for a masked store, whatever the mask.
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { if n >= 8 { _mm256_storeu_ps(to, x) } else { _mm256_maskstore_ps(to, mask(n), x) } }
    }

    #[inline(always)]
    unsafe fn read_bf16(self, from: *const bf16) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn read_f16(self, from: *const f16) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn read_i8(self, from: *const i8) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }

    #[inline(always)]
    fn round_bf16(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            // Half of the last place that is kept, less where that is even; what is not a number must not become another.
            let bits = _mm256_castps_si256(x);
            let even = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
            let kept = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(!0xffff)));
            _mm256_blendv_ps(kept, x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
        }
    }

    #[inline(always)]
    fn round_f16(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }

    #[inline(always)]
    fn reduce_add4(self, [a, b, c, d]: [Self::F32; 4]) -> [f32; 4] {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            let all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps::<1>(all));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), sum);
            sums
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn read_i32(self, from: *const u8) -> Self::I32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_and_si256(a, b) }
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)) }
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn widen(self, w: Self::I32, odd: bool) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { if odd { _mm256_srli_epi16::<8>(w) } else { _mm256_and_si256(w, _mm256_set1_epi16(255)) } }
    }

    #[inline(always)]
    fn dots<const FOUR: bool>(self, start: Self::I32) -> Self::Dots {
        // SAFETY: the token says that the instructions exist.
        unsafe { if FOUR { _mm256_setzero_si256() } else { start } }
    }

    #[inline(always)]
    fn dot<const FOUR: bool>(self, dots: Self::Dots, w: Self::I32, x: Self::I32) -> Self::Dots {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            match FOUR {
                true => _mm256_add_epi16(dots, _mm256_maddubs_epi16(w, x)),
                false => _mm256_add_epi32(dots, _mm256_madd_epi16(w, x)),
            }
        }
    }

    #[inline(always)]
    fn total<const FOUR: bool>(self, dots: Self::Dots, start: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { if FOUR { _mm256_add_epi32(start, _mm256_madd_epi16(dots, _mm256_set1_epi16(1))) } else { dots } }
    }

    #[inline(always)]
    fn zero_below(self, x: Self::F32, limit: Self::F32, y: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, limit), y) }
    }
}
