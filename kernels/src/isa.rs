//! Instruction sets that kernels are written for, and how a kernel is run on one of them.

use std::sync::OnceLock;

/// An instruction set of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// NEON of 64-bit Arm.
    Neon,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// Every instruction set, the fastest first.
    pub const ALL: [Isa; 5] = [Isa::Avx512Vnni, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// The fastest instruction set of this machine.
    pub fn detected() -> Isa {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(|| Isa::ALL.into_iter().find(|isa| isa.available()).unwrap_or(Isa::Portable))
    }

    /// Whether this machine has it.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => crate::simd::Avx512::<true>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => crate::simd::Avx512::<false>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => crate::simd::Avx2::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => crate::simd::Neon::detect().is_some(),
            Isa::Portable => true,
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    #[cold]
    pub(crate) fn absent(self) -> ! {
        panic!("kernels: instruction set {self:?} required, but this machine has not got it; use Isa::detected()")
    }
}

/// `dispatch!(isa, |simd| expression)`: the expression, compiled for and run with the token of `isa`. Functions that it
/// calls must be `#[inline(always)]` to be compiled for that instruction set.
///
/// # Panics
/// If the machine has not got `isa`.
macro_rules! dispatch {
    ($isa:expr, |$simd:ident| $body:expr) => {{
        use $crate::simd::Simd as _;
        let isa: $crate::Isa = $isa;
        match isa {
            #[cfg(target_arch = "x86_64")]
            $crate::Isa::Avx512Vnni => {
                let $simd = $crate::simd::Avx512::<true>::detect().unwrap_or_else(|| isa.absent());
                $simd.vectorize(
                    #[inline(always)]
                    || $body,
                )
            }
            isa => dispatch_floats!(isa, |$simd| $body),
        }
    }};
}

/// [`dispatch!`] for what multiplies no bytes: there AVX-512 with VNNI is AVX-512, and the code is there once.
macro_rules! dispatch_floats {
    ($isa:expr, |$simd:ident| $body:expr) => {{
        use $crate::simd::Simd as _;
        let isa: $crate::Isa = $isa;
        match isa {
            #[cfg(target_arch = "x86_64")]
            $crate::Isa::Avx512Vnni | $crate::Isa::Avx512 => {
                let $simd = $crate::simd::Avx512::<false>::detect().unwrap_or_else(|| isa.absent());
                $simd.vectorize(
                    #[inline(always)]
                    || $body,
                )
            }
            #[cfg(target_arch = "x86_64")]
            $crate::Isa::Avx2 => {
                let $simd = $crate::simd::Avx2::detect().unwrap_or_else(|| isa.absent());
                $simd.vectorize(
                    #[inline(always)]
                    || $body,
                )
            }
            #[cfg(target_arch = "aarch64")]
            $crate::Isa::Neon => {
                let $simd = $crate::simd::Neon::detect().unwrap_or_else(|| isa.absent());
                $simd.vectorize(
                    #[inline(always)]
                    || $body,
                )
            }
            $crate::Isa::Portable => {
                let $simd = $crate::simd::Portable;
                $simd.vectorize(
                    #[inline(always)]
                    || $body,
                )
            }
            #[allow(unreachable_patterns)]
            _ => isa.absent(),
        }
    }};
}
