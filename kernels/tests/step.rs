//! New keys and values written to a cache, and attention over what a ring holds.

use half::{bf16, f16};
use kernels::attention::{Attend, Kv, KvMut, Place, Sizes, Step, attend, held, step, store};
use kernels::rope::{Angles, rotate};
use kernels::{Isa, Pool, Serial, Threads};
use proptest::prelude::*;

fn number(i: usize) -> f32 {
    ((i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0
}

fn numbers(seed: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| number(seed * 1_000_003 + i)).collect()
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

/// What should stand at (b, g, t) after tokens 0 … S − 1 of slot b were written one after another: the last that went
/// there.
fn written(place: &Place, slot: usize, t: usize, sizes: Sizes) -> Option<usize> {
    let count = place.valid.map_or(sizes.queries, |valid| valid[slot] as usize);
    (0..count).rfind(|&s| {
        let position = place.first[slot] + s as i32;
        position >= 0 && (if place.ring { position as usize % sizes.keys } else { position as usize }) == t
    })
}

/// Queries of a slot, elements of a head and steps are below these.
const QUERIES: usize = if cfg!(miri) { 6 } else { 40 };
const WIDTH: usize = if cfg!(miri) { 12 } else { 70 };
const STEPS: usize = if cfg!(miri) { 3 } else { 6 };

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 256 }, failure_persistence: None, ..Default::default() })]

    #[test]
    fn tokens_go_to_their_places(
        batch in 1usize..4, queries in 1..QUERIES, groups in 1usize..4, width in 1..WIDTH, keys in 1usize..50,
        first in prop::collection::vec(-3i32..60, 3), valid in prop::option::of(prop::collection::vec(0i32..40, 3)), ring in any::<bool>(),
    ) {
        let sizes = Sizes { batch, queries, groups, heads: 1, width, keys };
        let valid: Option<Vec<i32>> = valid.map(|valid| valid[..batch].iter().map(|&n| n.min(queries as i32)).collect());
        let place = Place { first: &first[..batch], valid: valid.as_deref(), ring };
        let new = numbers(1, batch * queries * groups * width);
        let rows = batch * groups * keys;
        for isa in isas() {
            for pool in [&Serial as &dyn Pool, &Threads(2)] {
                let mut f32s = vec![9.0f32; rows * width];
                let mut bf16s = vec![bf16::ONE; rows * width];
                let mut f16s = vec![f16::ONE; rows * width];
                let (mut q, mut scales) = (vec![7i8; rows * width], vec![5.0f32; rows]);
                store(isa, pool, &new, &place, sizes, &mut KvMut::F32(&mut f32s));
                store(isa, pool, &new, &place, sizes, &mut KvMut::Bf16(&mut bf16s));
                store(isa, pool, &new, &place, sizes, &mut KvMut::F16(&mut f16s));
                store(isa, pool, &new, &place, sizes, &mut KvMut::I8 { q: &mut q, scales: &mut scales });
                for (row, &found) in scales.iter().enumerate() {
                    let (slot, g, t) = (row / keys / groups, row / keys % groups, row % keys);
                    let here = row * width..(row + 1) * width;
                    let Some(s) = written(&place, slot, t, sizes) else {
                        prop_assert!(f32s[here.clone()].iter().all(|&x| x == 9.0), "{isa:?} row {row}: nothing to write");
                        prop_assert!(bf16s[here.clone()].iter().all(|&x| x == bf16::ONE));
                        prop_assert!(f16s[here.clone()].iter().all(|&x| x == f16::ONE));
                        prop_assert!(q[here].iter().all(|&x| x == 7) && found == 5.0);
                        continue;
                    };
                    let new = &new[((slot * queries + s) * groups + g) * width..][..width];
                    let scale = new.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
                    prop_assert_eq!(found, scale);
                    for (i, &new) in here.zip(new) {
                        prop_assert_eq!(f32s[i], new);
                        prop_assert_eq!(bf16s[i], bf16::from_f32(new));
                        prop_assert_eq!(f16s[i], f16::from_f32(new));
                        let expected = (new / if scale > 0.0 { scale } else { 1.0 }).round_ties_even();
                        prop_assert_eq!(f32::from(q[i]), expected);
                    }
                }
            }
        }
    }

    /// A ring attends as a cache of all positions does that sees only a window; the text comes in steps of several
    /// lengths.
    #[test]
    fn a_ring_is_a_window(
        batch in 1usize..3, groups in 1usize..3, heads in 1usize..4, half in 1..WIDTH / 3, window in 1usize..20,
        lengths in prop::collection::vec(1usize..12, 1..STEPS),
    ) {
        let width = 2 * half;
        let total: usize = lengths.iter().sum();
        let ring_keys = window + 11;
        for isa in isas() {
            let mut ring = [(); 2].map(|()| vec![0.0f32; batch * groups * ring_keys * width]);
            let mut whole = [(); 2].map(|()| vec![f32::NAN; batch * groups * total * width]);
            let mut first = 0;
            for (i, &queries) in lengths.iter().enumerate() {
                let q = numbers(3 * i, batch * queries * groups * heads * width);
                let [k, v] = [1, 2].map(|j| numbers(3 * i + j, batch * queries * groups * width));
                let [cos, sin] = [f32::cos, f32::sin].map(|f| {
                    let angle = |j: usize| f(((first + j / half % queries) * (j % half + 1)) as f32);
                    (0..batch * queries * half).map(angle).collect::<Vec<f32>>()
                });
                let positions: Vec<i32> = (0..batch * queries).map(|j| (first + j % queries) as i32).collect();
                let firsts = vec![first as i32; batch];
                let arguments = |keys: usize, ring: bool| Step {
                    q: &q,
                    k: &k,
                    v: &v,
                    angles: Some(Angles { cos: &cos, sin: &sin }),
                    scale: 0.3,
                    positions: &positions,
                    place: Place { first: &firsts, valid: None, ring },
                    window: Some(window),
                    softcap: None,
                    sizes: Sizes { batch, queries, groups, heads, width, keys },
                };
                let mut from_ring = vec![f32::NAN; q.len()];
                let [ring_k, ring_v] = &mut ring;
                let (mut ring_k, mut ring_v) = (KvMut::F32(ring_k), KvMut::F32(ring_v));
                step(isa, &Serial, &arguments(ring_keys, true), &mut ring_k, &mut ring_v, &mut from_ring);

                // The parts one by one.
                let sizes = arguments(total, false).sizes;
                let place = arguments(total, false).place;
                let mut turned = vec![0.0; q.len()];
                rotate(isa, &Serial, &q, arguments(total, false).angles, [groups * heads, width], 0.3, &mut turned);
                let mut turned_k = vec![0.0; k.len()];
                rotate(isa, &Serial, &k, arguments(total, false).angles, [groups, width], 1.0, &mut turned_k);
                let [whole_k, whole_v] = &mut whole;
                store(isa, &Serial, &turned_k, &place, sizes, &mut KvMut::F32(whole_k));
                store(isa, &Serial, &v, &place, sizes, &mut KvMut::F32(whole_v));
                let mut expected = vec![f32::NAN; q.len()];
                let problem = Attend {
                    q: &turned,
                    k: Kv::F32(whole_k),
                    v: Kv::F32(whole_v),
                    positions: &positions,
                    key_positions: None,
                    window: Some(window),
                    softcap: None,
                    sizes,
                };
                attend(isa, &Serial, &problem, &mut expected);
                for (found, expected) in from_ring.iter().zip(&expected) {
                    prop_assert!((found - expected).abs() < 2e-6, "{isa:?} step {i}: {found}, not {expected}");
                }
                first += queries;
            }
        }
    }
}

#[test]
fn a_ring_holds_the_last_positions() {
    let mut out = [0; 8];
    held([5, 1].into_iter(), 4, &mut out);
    assert_eq!(out, [4, 5, 2, 3, 0, 1, -2, -1]);
    let mut out = [0; 3];
    held([i32::MIN].into_iter(), 3, &mut out);
    assert_eq!(out, [i32::MIN; 3]);
}

/// What a rotation of nothing and a scale do to queries, and that new keys are seen at once.
#[test]
fn without_angles() {
    for isa in isas() {
        let mut out = [0.0; 2];
        let arguments = Step {
            q: &[1.0, 2.0],
            k: &[3.0, 4.0],
            v: &[5.0, 6.0],
            angles: None,
            scale: 0.5,
            positions: &[1],
            place: Place { first: &[1], valid: None, ring: false },
            window: Some(1),
            softcap: None,
            sizes: Sizes { batch: 1, queries: 1, groups: 1, heads: 1, width: 2, keys: 2 },
        };
        let (mut k, mut v) = ([f32::NAN; 4], [f32::NAN; 4]);
        step(isa, &Serial, &arguments, &mut KvMut::F32(&mut k), &mut KvMut::F32(&mut v), &mut out);
        assert_eq!((&k[2..], &v[2..], out), (&[3.0, 4.0][..], &[5.0, 6.0][..], [5.0, 6.0]));
    }
}
