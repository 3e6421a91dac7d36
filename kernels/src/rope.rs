//! Rotary position embedding (Su et al. 2021), in the half-split form of Hugging Face checkpoints.

use crate::attention::Parts;
use crate::pool::worth;
use crate::simd::Simd;
use crate::{Isa, Pool};

/// Elements of a chunk of work: fewer are not worth another thread.
const CHUNK: usize = worth(1 << 13);

/// cos and sin of the angle of every position, (B, S, D/2) each, D the elements of a head that turn.
#[derive(Clone, Copy, Debug)]
pub struct Angles<'a> {
    /// cos(position · inverse frequency).
    pub cos: &'a [f32],
    /// sin(position · inverse frequency).
    pub sin: &'a [f32],
}

/// scale · (x₁·cos − x₂·sin, x₂·cos + x₁·sin, rest) of each head: `x` and `out` (B, S, H, K), H and K as `heads` and
/// `width` say. Without angles nothing turns.
///
/// # Panics
/// If the lengths are not those of the same number of positions, D is larger than K, or the machine has not got `isa`.
#[allow(clippy::too_many_arguments)]
pub fn rotate(
    isa: Isa,
    pool: &dyn Pool,
    x: &[f32],
    angles: Option<Angles>,
    [heads, width]: [usize; 2],
    scale: f32,
    out: &mut [f32],
) {
    let position = heads.saturating_mul(width);
    assert!(
        x.len() == out.len() && x.len().is_multiple_of(position),
        "rotate: x and out must be positions of {heads} heads of {width} elements, found {} and {}",
        x.len(),
        out.len()
    );
    if x.is_empty() {
        return;
    }
    let count = x.len() / position;
    let Angles { cos, sin } = angles.unwrap_or(Angles { cos: &[], sin: &[] });
    let half = cos.len() / count;
    assert!(
        cos.len() == half * count && sin.len() == cos.len() && 2 * half <= width,
        "rotate: cos and sin must be {count} rows of at most {} elements, found {} and {}",
        width / 2,
        cos.len(),
        sin.len()
    );
    let each = CHUNK.div_ceil(position);
    let out = Parts::new(out);
    let chunk = |chunk: usize| {
        let range = chunk * each..count.min((chunk + 1) * each);
        // SAFETY: every chunk has its own positions.
        let out = unsafe { out.part(range.start * position, range.len() * position) };
        let x = &x[range.start * position..range.end * position];
        dispatch_floats!(isa, |simd| {
            for (i, (x, out)) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
                let at = (range.start + i / heads) * half;
                head(simd, x, &cos[at..at + half], &sin[at..at + half], scale, out);
            }
        });
    };
    match count.div_ceil(each) {
        1 => chunk(0),
        chunks => pool.share(chunks, &chunk),
    }
}

#[inline(always)]
fn head<S: Simd>(simd: S, x: &[f32], cos: &[f32], sin: &[f32], scale: f32, out: &mut [f32]) {
    let half = cos.len();
    let factor = simd.splat(scale);
    let (first, rest) = x.split_at(half);
    let (second, rest) = rest.split_at(half);
    let (to_first, to_rest) = out.split_at_mut(half);
    let (to_second, to_rest) = to_rest.split_at_mut(half);
    for i in (0..half).step_by(S::LANES) {
        let lanes = i..half.min(i + S::LANES);
        let (x1, x2) = (simd.load_part(&first[lanes.clone()]), simd.load_part(&second[lanes.clone()]));
        let (cos, sin) = (simd.load_part(&cos[lanes.clone()]), simd.load_part(&sin[lanes.clone()]));
        let y1 = simd.sub(simd.mul(x1, cos), simd.mul(x2, sin));
        let y2 = simd.fma(x2, cos, simd.mul(x1, sin));
        simd.store_part(&mut to_first[lanes.clone()], simd.mul(y1, factor));
        simd.store_part(&mut to_second[lanes], simd.mul(y2, factor));
    }
    to_rest.iter_mut().zip(rest).for_each(|(to, x)| *to = x * scale);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Serial, Threads};

    /// Positions and halves of heads are below these.
    const POSITIONS: usize = if cfg!(miri) { 5 } else { 90 };
    const HALF: usize = if cfg!(miri) { 12 } else { 70 };

    proptest! {
        #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 256 }, failure_persistence: None, ..Default::default() })]

        #[test]
        fn as_in_f64(positions in 1..POSITIONS, heads in 1usize..10, half in 0..HALF, rest in 0usize..20, scale in 0.1f32..2.0) {
            let width = 2 * half + rest.max(usize::from(half == 0));
            let x: Vec<f32> = (0..positions * heads * width).map(|i| ((i * 7919) % 2017) as f32 / 1008.5 - 1.0).collect();
            let angle = |i: usize| (i as f64 * 0.37) % 6.3;
            let cos: Vec<f32> = (0..positions * half).map(|i| angle(i).cos() as f32).collect();
            let sin: Vec<f32> = (0..positions * half).map(|i| angle(i).sin() as f32).collect();
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                for pool in [&Serial as &dyn Pool, &Threads(2)] {
                    let mut out = vec![f32::NAN; x.len()];
                    let angles = (half > 0).then_some(Angles { cos: &cos, sin: &sin });
                    rotate(isa, pool, &x, angles, [heads, width], scale, &mut out);
                    for (i, &out) in out.iter().enumerate() {
                        let (row, d) = (i / width, i % width);
                        let at = row / heads * half + d % half.max(1);
                        let get = |d: usize| f64::from(x[row * width + d]);
                        let turned = match d {
                            d if d < half => get(d) * f64::from(cos[at]) - get(d + half) * f64::from(sin[at]),
                            d if d < 2 * half => get(d) * f64::from(cos[at]) + get(d - half) * f64::from(sin[at]),
                            d => get(d),
                        };
                        let error = (f64::from(out) - turned * f64::from(scale)).abs();
                        prop_assert!(error < 4e-7, "{isa:?} element {i}: {out}, not {turned} · {scale}");
                    }
                }
            }
        }
    }
}
