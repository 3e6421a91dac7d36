//! Activations, and act(gate) ⊙ up of a feed-forward (Shazeer 2020) with its derivative.

use crate::attention::Parts;
use crate::pool::worth;
use crate::simd::Simd;
use crate::{Isa, Pool};

/// Elements of a chunk of work: fewer are not worth another thread.
const CHUNK: usize = worth(1 << 14);

/// What a gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + e⁻ˣ).
    Silu,
    /// x/2 · (1 + erf(x/√2)).
    Gelu,
    /// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
    GeluTanh,
    /// max(x, 0).
    Relu,
}

impl Activation {
    const NAMES: [(&'static str, Activation); 4] = [
        ("silu", Activation::Silu),
        ("gelu", Activation::Gelu),
        ("gelu_tanh", Activation::GeluTanh),
        ("relu", Activation::Relu),
    ];

    /// What a call of a kernel says for it.
    pub fn name(self) -> &'static str {
        Activation::NAMES[self as usize].0
    }

    /// The one with that name.
    pub fn named(name: &str) -> Option<Activation> {
        Activation::NAMES.iter().find(|(known, _)| *known == name).map(|&(_, activation)| activation)
    }

    /// Its value.
    #[inline(always)]
    pub(crate) fn of<S: Simd>(self, simd: S, x: S::F32) -> S::F32 {
        self.with_slope(simd, x)[0]
    }

    /// Its value and its derivative; of a corner the mean of both sides.
    #[inline(always)]
    fn with_slope<S: Simd>(self, simd: S, x: S::F32) -> [S::F32; 2] {
        let one = simd.splat(1.0);
        match self {
            Activation::Relu => {
                let half = simd.splat(0.5);
                let above = simd.zero_below(x, simd.splat(f32::MIN_POSITIVE), half);
                [simd.max(simd.zero(), x), simd.add(above, simd.zero_below(x, simd.zero(), half))]
            }
            Activation::Silu => by_sigmoid(simd, x, x, one),
            // (1 + tanh u) / 2 = 1 / (1 + e⁻²ᵘ).
            Activation::GeluTanh => {
                let squared = simd.mul(x, x);
                let u = simd.fma(simd.mul(simd.splat(0.044_715), squared), x, x);
                let inner = simd.fma(simd.splat(3.0 * 0.044_715), squared, one);
                let twice = simd.splat(1.595_769);
                by_sigmoid(simd, x, simd.mul(twice, u), simd.mul(twice, inner))
            }
            // erfc z for z ≥ 0 to 1.5·10⁻⁷ (Abramowitz and Stegun 1964, 7.1.26); Φ(−|x|) = erfc(|x|/√2) / 2.
            Activation::Gelu => {
                let size = simd.max(x, simd.sub(simd.zero(), x));
                let z = simd.mul(size, simd.splat(std::f32::consts::FRAC_1_SQRT_2));
                let t = simd.div(one, simd.fma(simd.splat(0.327_591_1), z, one));
                let mut p = simd.splat(1.061_405_4);
                for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
                    p = simd.fma(p, t, simd.splat(c));
                }
                let bell = simd.exp(simd.sub(simd.zero(), simd.mul(z, z)));
                let tail = simd.mul(simd.mul(simd.mul(p, t), bell), simd.splat(0.5));
                let value = simd.sub(simd.max(simd.zero(), x), simd.mul(size, tail));
                // Φ(x) is 1 − the tail above 0, the tail below.
                let above = simd.zero_below(x, simd.zero(), simd.sub(one, simd.add(tail, tail)));
                let density = simd.mul(bell, simd.splat(0.398_942_3));
                [value, simd.fma(x, density, simd.add(tail, above))]
            }
        }
    }
}

/// x / (1 + e⁻ᶻ) and its derivative by x, for a z whose derivative is `inner`.
#[inline(always)]
fn by_sigmoid<S: Simd>(simd: S, x: S::F32, z: S::F32, inner: S::F32) -> [S::F32; 2] {
    let one = simd.splat(1.0);
    let s = simd.div(one, simd.add(one, simd.exp(simd.sub(simd.zero(), z))));
    let y = simd.mul(x, s);
    [y, simd.fma(simd.mul(y, simd.sub(one, s)), inner, s)]
}

/// act(gate) ⊙ up, element by element.
///
/// # Panics
/// If the slices are not of one length, or the machine has not got `isa`.
pub fn gate(isa: Isa, pool: &dyn Pool, activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let lengths = [gate.len(), up.len(), out.len()];
    assert!(lengths == [gate.len(); 3], "gate: gate, up and out of one length required, found {lengths:?}");
    let out = Parts::new(out);
    share(pool, gate.len(), &|first, len| {
        // SAFETY: every chunk has its own elements.
        let out = unsafe { out.part(first, len) };
        let (gate, up) = (&gate[first..first + len], &up[first..first + len]);
        dispatch_floats!(isa, |simd| values(simd, activation, gate, up, out));
    });
}

/// What gate and up change of a function, given what [`gate`]'s result changes of it, `cotangent`.
///
/// # Panics
/// As [`gate`].
#[allow(clippy::too_many_arguments)]
pub fn gate_gradient(
    isa: Isa,
    pool: &dyn Pool,
    activation: Activation,
    gate: &[f32],
    up: &[f32],
    cotangent: &[f32],
    of_gate: &mut [f32],
    of_up: &mut [f32],
) {
    let lengths = [gate.len(), up.len(), cotangent.len(), of_gate.len(), of_up.len()];
    assert!(lengths == [gate.len(); 5], "gate_gradient: slices of one length required, found {lengths:?}");
    let (of_gate, of_up) = (Parts::new(of_gate), Parts::new(of_up));
    share(pool, gate.len(), &|first, len| {
        // SAFETY: every chunk has its own elements.
        let (of_gate, of_up) = unsafe { (of_gate.part(first, len), of_up.part(first, len)) };
        let [gate, up, cotangent] = [gate, up, cotangent].map(|x| &x[first..first + len]);
        dispatch_floats!(isa, |simd| slopes(simd, activation, [gate, up, cotangent], of_gate, of_up));
    });
}

/// Runs `chunk` on the first element and the length of each part of `len` elements.
fn share(pool: &dyn Pool, len: usize, chunk: &(dyn Fn(usize, usize) + Sync)) {
    let part = |i: usize| chunk(i * CHUNK, CHUNK.min(len - i * CHUNK));
    match len.div_ceil(CHUNK) {
        0 => {}
        1 => part(0),
        chunks => pool.share(chunks, &part),
    }
}

#[inline(always)]
fn values<S: Simd>(simd: S, activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    let all = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(out.chunks_mut(S::LANES));
    for ((gate, up), out) in all {
        simd.store_part(out, simd.mul(activation.of(simd, simd.load_part(gate)), simd.load_part(up)));
    }
}

#[inline(always)]
fn slopes<S: Simd>(
    simd: S,
    activation: Activation,
    [gate, up, cotangent]: [&[f32]; 3],
    of_gate: &mut [f32],
    of_up: &mut [f32],
) {
    let inputs = gate.chunks(S::LANES).zip(up.chunks(S::LANES)).zip(cotangent.chunks(S::LANES));
    let outputs = of_gate.chunks_mut(S::LANES).zip(of_up.chunks_mut(S::LANES));
    for (((gate, up), ct), (of_gate, of_up)) in inputs.zip(outputs) {
        let ct = simd.load_part(ct);
        let [value, slope] = activation.with_slope(simd, simd.load_part(gate));
        simd.store_part(of_gate, simd.mul(simd.mul(ct, simd.load_part(up)), slope));
        simd.store_part(of_up, simd.mul(ct, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Serial, Threads};

    const ALL: [Activation; 4] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu];

    /// Φ(x), by Simpson's rule on the density from 0.
    fn normal(x: f64) -> f64 {
        let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let step = x / 400.0;
        let inner: f64 = (1..400).map(|i| density(f64::from(i) * step) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        0.5 + (density(0.0) + inner + density(x)) * step / 3.0
    }

    fn value(activation: Activation, x: f64) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => x * normal(x),
            Activation::GeluTanh => {
                x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
            Activation::Relu => x.max(0.0),
        }
    }

    #[test]
    fn slopes_are_quotients_of_differences() {
        // Not a whole number of vectors, and of chunks.
        let len = if cfg!(miri) { 150 } else { 40_037 };
        let number = |i: usize, by: usize| (i * by % 1999) as f32 / 100.0 - 9.995;
        let gates: Vec<f32> = (0..len).map(|i| number(i, 7)).collect();
        let (ups, cts): (Vec<f32>, Vec<f32>) = (0..len).map(|i| (number(i, 13), number(i, 31))).unzip();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for (activation, pool) in ALL.into_iter().flat_map(|a| [(a, &Serial as &dyn Pool), (a, &Threads(2))]) {
                let [mut out, mut of_gate, mut of_up] = [(); 3].map(|()| vec![f32::NAN; len]);
                gate(isa, pool, activation, &gates, &ups, &mut out);
                gate_gradient(isa, pool, activation, &gates, &ups, &cts, &mut of_gate, &mut of_up);
                for i in (0..len).step_by(if cfg!(miri) { 9 } else { 1 }) {
                    let [x, up, ct] = [gates[i], ups[i], cts[i]].map(f64::from);
                    let y = value(activation, x);
                    let slope = (value(activation, x + 1e-4) - value(activation, x - 1e-4)) / 2e-4;
                    let wanted = [(out[i], y * up, up), (of_up[i], ct * y, ct), (of_gate[i], ct * up * slope, ct * up)];
                    for (found, wanted, scale) in wanted {
                        let off = (f64::from(found) - wanted).abs();
                        assert!(
                            off <= 2e-6 * scale.abs() * (1.0 + x.abs()),
                            "{isa:?} {activation:?} {x}: {found}, not {wanted}"
                        );
                    }
                }
            }
        }
    }

    /// As the definition in the graph has it, which is that of a maximum.
    #[test]
    fn a_corner_has_the_mean_of_its_sides() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            let [mut of_gate, mut of_up] = [[f32::NAN; 3]; 2];
            let x = [0.0, -0.0, f32::MIN_POSITIVE];
            gate_gradient(isa, &Serial, Activation::Relu, &x, &[1.0; 3], &[1.0; 3], &mut of_gate, &mut of_up);
            assert_eq!(of_gate, [0.5, 0.5, 1.0], "{isa:?}");
        }
    }

    #[test]
    #[should_panic(expected = "of one length")]
    fn other_lengths_are_refused() {
        gate(Isa::Portable, &Serial, Activation::Silu, &[1.0; 3], &[1.0; 2], &mut [0.0; 3]);
    }
}
