//! AVX-512: sixteen lanes.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

/// AVX-512 F, BW, DQ and VL, and VNNI where the parameter says so.
#[derive(Clone, Copy, Debug)]
pub struct Avx512<const VNNI: bool>(());

impl<const VNNI: bool> Avx512<VNNI> {
    /// The token, where the machine has these instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        let base = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        (base && (!VNNI || is_x86_feature_detected!("avx512vnni"))).then_some(Self(()))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn run_vnni<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Lanes below n.
#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type F32 = __m512;
    type I32 = __m512i;
    /// With VNNI the first is all. Else of the lower and of the upper four bits of w, 16 bits for each two bytes: 15 · 128 · 2,
    /// eight times, is below 2¹⁵.
    type Dots = [__m512i; 2];
    type Floats = Avx512<false>;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        // SAFETY: the token says that the instructions exist.
        unsafe { if VNNI { run_vnni(f) } else { run(f) } }
    }

    #[inline(always)]
    fn floats(self) -> Self::Floats {
        Avx512(())
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }

    #[inline(always)]
    fn exp2i(self, n: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
                _mm512_cvtps_epi32(n),
                _mm512_set1_epi32(127),
            )))
        }
    }

    #[inline(always)]
    fn reduce_add(self, x: Self::F32) -> f32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_reduce_add_ps(x) }
    }

    #[inline(always)]
    fn reduce_max(self, x: Self::F32) -> f32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_reduce_max_ps(x) }
    }

    #[inline(always)]
    unsafe fn read(self, from: *const f32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn write(self, to: *mut f32, x: Self::F32) {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    unsafe fn read_part(self, from: *const f32, n: usize) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_maskz_loadu_ps(mask(n), from) }
    }

    #[inline(always)]
    unsafe fn write_part(self, to: *mut f32, n: usize, x: Self::F32) {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_mask_storeu_ps(to, mask(n), x) }
    }

    #[inline(always)]
    unsafe fn read_bf16(self, from: *const bf16) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }

    #[inline(always)]
    unsafe fn read_f16(self, from: *const f16) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn read_i8(self, from: *const i8) -> Self::F32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    fn round_bf16(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            // Half of the last place that is kept, less where that is even; what is not a number must not become another.
            let bits = _mm512_castps_si512(x);
            let even = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
            let kept = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(!0xffff)));
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), kept, x)
        }
    }

    #[inline(always)]
    fn round_f16(self, x: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)) }
    }

    #[inline(always)]
    fn reduce_add4(self, [a, b, c, d]: [Self::F32; 4]) -> [f32; 4] {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            // Within each 128 bits: two of a and two of b, then one of each.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
            let all = _mm512_add_ps(low, high);
            let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
            let quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), quarter);
            sums
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    unsafe fn read_i32(self, from: *const u8) -> Self::I32 {
        // SAFETY: the token says that the instructions exist, the caller that the memory does.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self, a: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_srli_epi32::<N>(a) }
    }

    #[inline(always)]
    fn to_f32(self, a: Self::I32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn dots<const FOUR: bool>(self, start: Self::I32) -> Self::Dots {
        // SAFETY: the token says that the instructions exist.
        unsafe { [if VNNI { start } else { _mm512_setzero_si512() }, _mm512_setzero_si512()] }
    }

    #[inline(always)]
    fn dot<const FOUR: bool>(self, [low, high]: Self::Dots, w: Self::I32, x: Self::I32) -> Self::Dots {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            if VNNI {
                return [_mm512_dpbusd_epi32(low, w, x), high];
            }
            if FOUR {
                return [_mm512_add_epi16(low, _mm512_maddubs_epi16(w, x)), high];
            }
            let mask = _mm512_set1_epi8(15);
            let (lower, upper) = (_mm512_and_si512(w, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask));
            [
                _mm512_add_epi16(low, _mm512_maddubs_epi16(lower, x)),
                _mm512_add_epi16(high, _mm512_maddubs_epi16(upper, x)),
            ]
        }
    }

    #[inline(always)]
    fn total<const FOUR: bool>(self, [low, high]: Self::Dots, start: Self::I32) -> Self::I32 {
        // SAFETY: the token says that the instructions exist.
        unsafe {
            if VNNI {
                return low;
            }
            let total = _mm512_add_epi32(start, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
            if FOUR { total } else { _mm512_add_epi32(total, _mm512_madd_epi16(high, _mm512_set1_epi16(16))) }
        }
    }

    #[inline(always)]
    fn zero_below(self, x: Self::F32, limit: Self::F32, y: Self::F32) -> Self::F32 {
        // SAFETY: the token says that the instructions exist.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, limit), y, _mm512_setzero_ps()) }
    }
}
