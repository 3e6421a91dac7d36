//! Lanes of f32 and i32: one trait, a token type for each instruction set.
//!
//! A token exists only where its instructions do, so that its methods are safe to call; those that take a pointer leave
//! to the caller only that the memory is there.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use portable::Portable;

/// Asks for the cache line at `at`, which need not be valid.
#[inline(always)]
pub fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is part of every x86-64 and does not fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// A vector unit. Methods are meant to be called within [`Simd::vectorize`], where they become single instructions.
#[allow(missing_docs)]
pub trait Simd: Copy + Send + Sync + 'static {
    /// [`Self::LANES`] f32.
    type F32: Copy;
    /// [`Self::LANES`] i32.
    type I32: Copy;
    /// Sums of products of bytes, for each lane.
    type Dots: Copy;
    /// The token of the same set without its product of bytes: code that does without is compiled once for both.
    type Floats: Simd;
    /// Lanes of a vector.
    const LANES: usize;
    /// Vector registers of the machine: how large a tile of accumulators may be.
    const REGISTERS: usize;

    /// Runs `f` compiled for this instruction set: `f`, and all that it calls, must be `#[inline(always)]`.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;

    /// See [`Simd::Floats`].
    fn floats(self) -> Self::Floats;

    fn splat(self, x: f32) -> Self::F32;
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn div(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a·b + c.
    fn fma(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger of a and b, lane by lane; b where one is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The smaller of a and b, lane by lane; b where one is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// To the nearest integer, halves to the even one.
    fn round(self, x: Self::F32) -> Self::F32;
    /// 2ⁿ for integers n in −126…127.
    fn exp2i(self, n: Self::F32) -> Self::F32;
    fn reduce_add(self, x: Self::F32) -> f32;
    /// The largest lane; lanes must not be NaN.
    fn reduce_max(self, x: Self::F32) -> f32;

    /// # Safety
    /// `from` must be valid for reads of LANES elements.
    unsafe fn read(self, from: *const f32) -> Self::F32;
    /// # Safety
    /// `to` must be valid for writes of LANES elements.
    unsafe fn write(self, to: *mut f32, x: Self::F32);
    /// The first `n` lanes (at most LANES), zeros behind.
    ///
    /// # Safety
    /// `from` must be valid for reads of `n` elements.
    unsafe fn read_part(self, from: *const f32, n: usize) -> Self::F32;
    /// The first `n` lanes (at most LANES).
    ///
    /// # Safety
    /// `to` must be valid for writes of `n` elements.
    unsafe fn write_part(self, to: *mut f32, n: usize, x: Self::F32);
    /// # Safety
    /// `from` must be valid for reads of LANES elements.
    unsafe fn read_bf16(self, from: *const bf16) -> Self::F32;
    /// # Safety
    /// `from` must be valid for reads of LANES elements.
    unsafe fn read_f16(self, from: *const f16) -> Self::F32;
    /// # Safety
    /// `from` must be valid for reads of LANES elements.
    unsafe fn read_i8(self, from: *const i8) -> Self::F32;
    /// The nearest values of bf16.
    fn round_bf16(self, x: Self::F32) -> Self::F32;
    /// The nearest values of f16.
    fn round_f16(self, x: Self::F32) -> Self::F32;
    /// The sum of the lanes of each.
    #[inline(always)]
    fn reduce_add4(self, [a, b, c, d]: [Self::F32; 4]) -> [f32; 4] {
        [self.reduce_add(a), self.reduce_add(b), self.reduce_add(c), self.reduce_add(d)]
    }

    fn splat_i32(self, x: i32) -> Self::I32;
    /// Four bytes a lane.
    ///
    /// # Safety
    /// `from` must be valid for reads of 4·LANES bytes.
    unsafe fn read_i32(self, from: *const u8) -> Self::I32;
    fn and(self, a: Self::I32, b: Self::I32) -> Self::I32;
    /// Logical shift of each lane.
    fn shift_right<const N: u32>(self, a: Self::I32) -> Self::I32;
    fn to_f32(self, a: Self::I32) -> Self::F32;
    /// Whether bytes of w that are not `FOUR` are multiplied as 16 bits, for want of a product of bytes whose sum fits.
    const WIDE: bool = false;
    /// Of each lane the bytes 0 and 2, or 1 and 3 if `odd`, as 16 bits each.
    #[inline(always)]
    fn widen(self, w: Self::I32, odd: bool) -> Self::I32 {
        self.and(if odd { self.shift_right::<8>(w) } else { w }, self.splat_i32(0x00ff_00ff))
    }
    /// Sums that begin with `start`; [`Simd::total`] is given the same.
    fn dots<const FOUR: bool>(self, start: Self::I32) -> Self::Dots;
    /// dots + Σ w·x over the four bytes of each lane, w unsigned, at most 15 where `FOUR`, and x signed. At most
    /// eight times. If [`Simd::WIDE`] and not `FOUR`, over the two 16-bit words of each lane, at most sixteen times.
    fn dot<const FOUR: bool>(self, dots: Self::Dots, w: Self::I32, x: Self::I32) -> Self::Dots;
    /// What the dots come to.
    fn total<const FOUR: bool>(self, dots: Self::Dots, start: Self::I32) -> Self::I32;

    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }

    /// The first LANES elements.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::F32 {
        assert!(from.len() >= Self::LANES);
        // SAFETY: as many elements as that are there.
        unsafe { self.read(from.as_ptr()) }
    }

    /// Into the first LANES elements.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    fn store(self, to: &mut [f32], x: Self::F32) {
        assert!(to.len() >= Self::LANES);
        // SAFETY: as many elements as that are there.
        unsafe { self.write(to.as_mut_ptr(), x) }
    }

    /// All elements of a slice of at most LANES, zeros behind.
    #[inline(always)]
    fn load_part(self, from: &[f32]) -> Self::F32 {
        // SAFETY: no more than the slice has.
        unsafe { self.read_part(from.as_ptr(), from.len().min(Self::LANES)) }
    }

    /// As many lanes as the slice has elements, at most LANES.
    #[inline(always)]
    fn store_part(self, to: &mut [f32], x: Self::F32) {
        // SAFETY: no more than the slice has.
        unsafe { self.write_part(to.as_mut_ptr(), to.len().min(Self::LANES), x) }
    }

    /// eˣ to 2 ulp; 0 below −87.3, NaN for NaN.
    #[inline(always)]
    fn exp(self, x: Self::F32) -> Self::F32 {
        // x = n·ln 2 + r with |r| ≤ ln 2 / 2; ln 2 in two parts, the first with few bits so that n·part is exact.
        let lower = self.splat(-87.336_55);
        let clamped = self.min(self.splat(88.722_83), self.max(lower, x));
        let n = self.round(self.mul(clamped, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), clamped);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        // eʳ by its Taylor polynomial of degree 7: the next term is below 2⁻²⁷ of the sum.
        let mut p = self.splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        // 2ⁿ in two factors: n reaches 128, one more than an exponent holds.
        let half = self.round(self.mul(n, self.splat(0.5)));
        let y = self.mul(self.mul(p, self.exp2i(half)), self.exp2i(self.sub(n, half)));
        self.zero_below(x, lower, y)
    }

    /// y, but 0 in lanes where x < limit.
    fn zero_below(self, x: Self::F32, limit: Self::F32, y: Self::F32) -> Self::F32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    /// acc + 8 Σ w·x.
    #[inline(always)]
    fn dots<S: Simd, const FOUR: bool>(simd: S, acc: S::I32, w: S::I32, x: &[i32]) -> S::F32 {
        let mut dots = simd.dots::<FOUR>(acc);
        let wide = |odd: usize| -> [i32; 16] {
            let word = |x: i32, b: usize| i32::from(x.to_le_bytes()[b] as i8);
            std::array::from_fn(|i| x.get(i).map_or(0, |&x| word(x, odd) & 0xffff | word(x, odd + 2) << 16))
        };
        // SAFETY: there are LANES elements each.
        let [x, even, odd] = unsafe { [x, &wide(0), &wide(1)].map(|x| simd.read_i32(x.as_ptr().cast())) };
        for _ in 0..8 {
            dots = if S::WIDE && !FOUR {
                let even = simd.dot::<FOUR>(dots, simd.widen(w, false), even);
                simd.dot::<FOUR>(even, simd.widen(w, true), odd)
            } else {
                simd.dot::<FOUR>(dots, w, x)
            };
        }
        simd.to_f32(simd.total::<FOUR>(dots, acc))
    }

    /// What the operations give on lanes of `a` and `b`, one after the other.
    #[inline(always)]
    fn operations<S: Simd>(simd: S, a: &[f32], b: &[f32], words: &[[i32; 16]; 3]) -> Vec<Vec<f32>> {
        let mut out = vec![Vec::new(); 14];
        for i in (0..16).step_by(S::LANES) {
            let (x, y) = (simd.load(&a[i..]), simd.load(&b[i..]));
            let halves: Vec<half::f16> = a[i..].iter().map(|&x| half::f16::from_f32(x)).collect();
            let bf16s: Vec<half::bf16> = a[i..].iter().map(|&x| half::bf16::from_f32(x)).collect();
            // SAFETY: there are LANES elements from i on.
            let (h, bf, [w, _, acc]) = unsafe {
                let words = words.each_ref().map(|words| simd.read_i32(words[i..].as_ptr().cast()));
                (simd.read_f16(halves.as_ptr()), simd.read_bf16(bf16s.as_ptr()), words)
            };
            let s = &words[1][i..];
            let integers = simd.to_f32(simd.shift_right::<4>(simd.and(w, simd.splat_i32(0x00f0_f0f0))));
            let values = [
                simd.add(x, y),
                simd.sub(x, y),
                simd.mul(x, y),
                simd.div(x, y),
                simd.max(x, y),
                simd.min(x, y),
                simd.round(x),
                simd.exp2i(simd.round(y)),
                h,
                bf,
                dots::<S, false>(simd, acc, w, s),
                dots::<S, true>(simd, acc, simd.and(w, simd.splat_i32(0x0f0f_0f0f)), s),
                integers,
                simd.zero_below(x, y, simd.splat(2.0)),
            ];
            for (out, value) in out.iter_mut().zip(values) {
                let mut lanes = vec![0.0; S::LANES];
                simd.store(&mut lanes, value);
                out.extend(lanes);
            }
        }
        out
    }

    /// A closure or an array's `map` that is not inlined into [`Simd::vectorize`] makes every vector operation a call, a
    /// hundred times as slow, and nothing else tells. What is called is a symbol of this program, which has all kernels.
    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64", not(miri)))]
    fn every_vector_operation_is_inlined() {
        use object::{Object, ObjectSymbol};
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let file = object::File::parse(&program[..]).unwrap();
        let names: Vec<&str> = file.symbols().filter_map(|symbol| symbol.name().ok()).collect();
        assert!(names.iter().any(|name| name.contains("kernels") && name.contains("linear")), "no symbols to look at");
        let called: Vec<_> =
            names.iter().filter(|name| ["_mm256_", "_mm512_"].iter().any(|part| name.contains(part))).collect();
        assert!(called.is_empty(), "not inlined: {called:#?}");
    }

    #[test]
    fn every_instruction_set_computes_the_same() {
        let a: Vec<f32> = (0..16).map(|i| (i as f32 - 7.5) * 1.37).collect();
        let b: Vec<f32> = (0..16).map(|i| 8.0 - (i * 5 % 16) as f32 * 1.5).collect();
        let bytes = |by: u32| std::array::from_fn(|i| ((i as u32 + 1).wrapping_mul(by)) as i32);
        // All bytes of the last lane as large as they go.
        let mut words: [[i32; 16]; 3] = [bytes(0x9e37_79b9), bytes(0x85eb_ca6b), bytes(1000)];
        (words[0][15], words[1][15]) = (-1, 0x8080_8080_u32 as i32);
        let expected = operations(Portable, &a, &b, &words);
        assert_eq!(expected[10][15], 16000.0 - 8.0 * 4.0 * 255.0 * 128.0);
        assert_eq!(expected[7][0], 256.0);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            assert_eq!(dispatch!(isa, |simd| operations(simd, &a, &b, &words)), expected, "{isa:?}");
        }
    }

    #[inline(always)]
    fn parts<S: Simd>(simd: S) {
        for n in 0..=S::LANES {
            let from: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            let x = simd.load_part(&from);
            let total = (n * (n + 1) / 2) as f32;
            assert_eq!(simd.reduce_add(x), total);
            assert_eq!(simd.reduce_max(x), n as f32);
            assert_eq!(simd.reduce_max(simd.sub(simd.fma(x, x, x), simd.splat(1000.0))), (n * n + n) as f32 - 1000.0);
            let mut to = vec![-1.0; n + 1];
            simd.store_part(&mut to[..n], x);
            assert_eq!((&to[..n], to[n]), (&from[..], -1.0));
        }
    }

    #[test]
    fn a_part_of_a_vector_is_read_and_written_alone() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            dispatch!(isa, |simd| parts(simd));
        }
    }

    #[inline(always)]
    fn exps<S: Simd>(simd: S, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        for (x, out) in x.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
            simd.store_part(out, simd.exp(simd.load_part(x)));
        }
        out
    }

    #[test]
    fn the_exponential_is_right_to_2_ulp() {
        let step = if cfg!(miri) { 199 } else { 1 };
        let x: Vec<f32> = (0..20_000).step_by(step).map(|i| -87.3 + i as f32 * 0.0088).collect();
        let special = [f32::NEG_INFINITY, -88.0, 0.0, f32::NAN];
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (x, y) in x.iter().zip(dispatch!(isa, |simd| exps(simd, &x))) {
                let expected = f64::from(*x).exp();
                assert!((f64::from(y) / expected - 1.0).abs() < 2.4e-7, "{isa:?}: e^{x} = {expected}, found {y}");
            }
            let y = dispatch!(isa, |simd| exps(simd, &special));
            assert_eq!(y[..3], [0.0, 0.0, 1.0], "{isa:?}");
            assert!(y[3].is_nan(), "{isa:?}");
        }
    }
}
