//! Rounding weights to integer codes with a scale for each group of terms.
//!
//! For a group of weights x the scale d and the codes c are those that make Σ(x − d·c)² small: d is tried so that the
//! weight of largest magnitude falls on several positions near the ends of the range of codes, and for the codes that
//! this gives once more at its least-squares value Σxc / Σcc. A scale is rounded to its stored type before codes are
//! chosen with it. Sixteen outputs are worked on at once, each by itself, so that nothing depends on what stands beside.

use half::f16;
use half::slice::HalfFloatSliceExt;
use kernels::packed::{BLOCK, Bits};

use crate::packing::{Packing, ScaleType};

/// One value for each output of a block.
type Lanes = [f32; BLOCK];

/// The largest group.
const MAX_GROUP: usize = 32;

/// Where the weight of largest magnitude falls: −8 is what Q4_0 has, 7 uses the shorter side. The root of the squared error
/// is 5 % below Q4_0's for normal weights; 24 positions gain 0.03 % more.
const POSITIONS_OF_4: [f32; 14] = [-8.0, -8.9, -8.6, -8.3, -7.7, -7.4, -7.1, -6.8, -6.4, 7.0, 7.7, 7.4, 6.7, 6.3];

/// Likewise for 8 bits: 127 is what Q8_0 has, and either sign leaves the other end to the least-squares scale. Six positions more take
/// 8 % off the root of the squared error of normal weights, and yet cost SmolLM2 0.0017 nats a token of perplexity
/// (docs/performance.md).
const POSITIONS_OF_8: [f32; 2] = [127.0, -127.0];

/// Adding and subtracting this rounds a float32 of magnitude below 2²² to the nearest integer, to even where two are.
const ROUND: f32 = 12_582_912.0;

/// A weight that cannot be packed: not a number, infinite, or too large for the type of scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct NotPackable {
    pub(crate) value: f32,
}

/// Rounds the weights of up to 16 outputs, (outputs, K), to `codes` of the same shape and to `scales`, (outputs, K/g).
/// The packing has no minima.
pub(crate) fn quantize(
    packing: Packing,
    k: usize,
    weights: &[f32],
    codes: &mut [i8],
    scales: &mut [f32],
) -> Result<(), NotPackable> {
    let (group, groups) = (packing.format.group, k.div_ceil(packing.format.group));
    let outputs = weights.len() / k;
    for g in 0..groups {
        let terms = g * group..k.min((g + 1) * group);
        let mut tile = [[0.0; BLOCK]; MAX_GROUP];
        for (lane, row) in weights.chunks_exact(k).enumerate() {
            tile.iter_mut().zip(&row[terms.clone()]).for_each(|(x, &weight)| x[lane] = weight);
        }
        let tile = &tile[..group];
        let d = scale_of(packing, tile)?;
        for lane in 0..outputs {
            scales[lane * groups + g] = d[lane];
        }
        let inverse = d.map(inverse);
        let (low, high) = range(packing);
        for (x, term) in tile.iter().zip(terms) {
            for lane in 0..outputs {
                codes[lane * k + term] = code(x[lane], inverse[lane], low, high) as i8;
            }
        }
    }
    Ok(())
}

/// The scale of each output of a group: of those that were tried, the one with the smallest squared error.
fn scale_of(packing: Packing, tile: &[Lanes]) -> Result<Lanes, NotPackable> {
    let extreme = extremes(tile);
    let (low, high) = range(packing);
    let largest = match packing.scales {
        ScaleType::F16 => f16::MAX.to_f32() * high,
        ScaleType::F32 => f32::MAX,
    };
    if let Some(&value) = extreme.iter().find(|x| x.is_nan() || x.abs() > largest) {
        return Err(NotPackable { value });
    }
    let (mut best, mut least) = ([0.0; BLOCK], [f32::INFINITY; BLOCK]);
    let positions: &[f32] = match packing.format.bits {
        Bits::Four => &POSITIONS_OF_4,
        Bits::Eight => &POSITIONS_OF_8,
    };
    for position in positions {
        let mut d = extreme.map(|x| x / position);
        for _ in 0..2 {
            d = stored(packing.scales, d);
            let (fit, error) = fit(tile, &d, low, high);
            for lane in 0..BLOCK {
                let better = error[lane] < least[lane];
                least[lane] = if better { error[lane] } else { least[lane] };
                best[lane] = if better { d[lane] } else { best[lane] };
            }
            d = fit;
        }
    }
    Ok(best)
}

/// The weight of largest magnitude of each output, with its sign; not a number if one is.
fn extremes(tile: &[Lanes]) -> Lanes {
    let mut extreme = [0.0f32; BLOCK];
    for x in tile {
        for lane in 0..BLOCK {
            let larger = x[lane].abs() > extreme[lane].abs() || x[lane].is_nan();
            extreme[lane] = if larger { x[lane] } else { extreme[lane] };
        }
    }
    extreme
}

/// With codes for the scales `d`: the least-squares scale of these codes, and the squared error of `d` itself.
fn fit(tile: &[Lanes], d: &Lanes, low: f32, high: f32) -> (Lanes, Lanes) {
    let inverse = d.map(inverse);
    let (mut xc, mut cc, mut error) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
    for x in tile {
        for lane in 0..BLOCK {
            let c = code(x[lane], inverse[lane], low, high);
            let difference = x[lane] - d[lane] * c;
            xc[lane] += x[lane] * c;
            cc[lane] += c * c;
            error[lane] += difference * difference;
        }
    }
    let mut fit = [0.0; BLOCK];
    for lane in 0..BLOCK {
        fit[lane] = if cc[lane] > 0.0 { xc[lane] / cc[lane] } else { 0.0 };
    }
    (fit, error)
}

/// The integer next to `x / d` within the range of codes, `inverse` being 1 / d.
#[inline(always)]
fn code(x: f32, inverse: f32, low: f32, high: f32) -> f32 {
    // neither is NaN, and comparisons become one instruction each
    let c = x * inverse;
    let c = if c < low { low } else { c };
    let c = if c > high { high } else { c };
    c + ROUND - ROUND
}

/// 1 / d; 0 where the scale is 0 and so all codes are.
fn inverse(d: f32) -> f32 {
    let inverse = 1.0 / d;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The values that scales have once they are stored.
fn stored(scales: ScaleType, d: Lanes) -> Lanes {
    match scales {
        ScaleType::F32 => d,
        ScaleType::F16 => {
            let (mut halves, mut d) = ([f16::ZERO; BLOCK], d);
            halves.convert_from_f32_slice(&d);
            halves.convert_to_f32_slice(&mut d);
            d
        }
    }
}

fn range(packing: Packing) -> (f32, f32) {
    let (low, high) = packing.format.codes();
    (f32::from(low), f32::from(high))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Squared error of what [`quantize`] gives.
    fn error(packing: Packing, k: usize, weights: &[f32]) -> f64 {
        let groups = k.div_ceil(packing.format.group);
        let (mut codes, mut scales) = (vec![0; weights.len()], vec![0.0; weights.len() / k * groups]);
        quantize(packing, k, weights, &mut codes, &mut scales).expect("finite");
        let (low, high) = packing.format.codes();
        assert!(codes.iter().all(|c| (low..=high).contains(c)));
        assert!(scales.iter().all(|&d| stored(packing.scales, [d; BLOCK])[0] == d));
        let value = |i: usize| scales[i / k * groups + i % k / packing.format.group] * f32::from(codes[i]);
        weights.iter().enumerate().map(|(i, x)| f64::from(x - value(i)).powi(2)).sum()
    }

    /// Squared error of the plain rule, d = extreme / position in half precision.
    fn plain(packing: Packing, k: usize, weights: &[f32], position: f32) -> f64 {
        let of_group = |group: &[f32]| {
            let extreme = group.iter().copied().fold(0.0f32, |a, x| if x.abs() > a.abs() { x } else { a });
            let d = stored(ScaleType::F16, [extreme / position; BLOCK])[0];
            let (low, high) = range(packing);
            group.iter().map(|&x| f64::from(x - d * code(x, inverse(d), low, high)).powi(2)).sum::<f64>()
        };
        weights.chunks(k).flat_map(|row| row.chunks(packing.format.group)).map(of_group).sum()
    }

    proptest! {
        #[test]
        fn never_worse_than_the_plain_rule(
            k in 1..80usize,
            outputs in 1..=BLOCK,
            scale in prop::sample::select(vec![1e-6f32, 1e-3, 0.02, 1.0, 1e4]),
            values in prop::collection::vec(-1.0f32..1.0, 80 * BLOCK),
        ) {
            let weights: Vec<f32> = values[..k * outputs].iter().map(|x| x * x * x * scale).collect();
            let slack = 1e-6 * weights.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
            for (packing, position) in [(Packing::INT8, 127.0), (Packing::INT4, -8.0)] {
                prop_assert!(error(packing, k, &weights) <= plain(packing, k, &weights, position) + slack);
            }
        }
    }

    #[test]
    fn what_codes_hold_exactly_is_kept() {
        for packing in [Packing::INT8, Packing::INT4] {
            let (low, high) = packing.format.codes();
            // Of 8 bits the largest weight has 127 or −127; −128 is left to what least squares make of another scale.
            let low = if packing == Packing::INT8 { -high } else { low };
            let span = i32::from(high) - i32::from(low) + 1;
            // each group of 32 begins with the least code
            let code = |i: i32| i32::from(low) + i % 32 * 5 % span;
            let weights: Vec<f32> = (0..3 * 64).map(|i| code(i) as f32 * 0.125).collect();
            assert_eq!(error(packing, 64, &weights), 0.0, "{packing}");
            assert_eq!(error(packing, 70, &[0.0; 140]), 0.0, "{packing}");
        }
    }

    #[test]
    fn outputs_do_not_depend_on_their_neighbours() {
        let weights: Vec<f32> = (0..40 * 16).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.003).collect();
        let mut whole = (vec![0; 640], vec![0.0; 32]);
        quantize(Packing::INT4, 40, &weights, &mut whole.0, &mut whole.1).expect("finite");
        for n in 0..16 {
            let mut one = (vec![0; 40], vec![0.0; 2]);
            quantize(Packing::INT4, 40, &weights[n * 40..][..40], &mut one.0, &mut one.1).expect("finite");
            assert_eq!((&one.0[..], &one.1[..]), (&whole.0[n * 40..][..40], &whole.1[n * 2..][..2]));
        }
    }

    #[test]
    fn what_has_no_scale_is_refused() {
        let refused = |value: f32, packing| {
            quantize(packing, 2, &[1.0, value], &mut [0; 2], &mut [0.0]).expect_err("must be refused").value
        };
        assert!(refused(f32::NAN, Packing::INT8).is_nan());
        assert_eq!(refused(f32::NEG_INFINITY, Packing::INT4), f32::NEG_INFINITY);
        assert_eq!((refused(5e5, Packing::INT4), refused(-9e6, Packing::INT8)), (5e5, -9e6));
    }
}
