//! Which keys a query sees.

use std::ops::Range;

use crate::simd::Simd;

/// Where queries and keys stand.
#[derive(Clone, Copy)]
pub struct Visible<'a> {
    /// (B, S).
    pub positions: &'a [i32],
    /// (B, T); key t at position t if `None`.
    pub key_positions: Option<&'a [i32]>,
    pub window: Option<usize>,
    /// S.
    pub queries: usize,
    /// T.
    pub keys: usize,
}

/// The position of a key that no query sees, in [`Visible::key_offsets`].
const NOWHERE: f32 = f32::MAX;

/// What a score that must not count is: so low that its weight is 0.
pub const HIDDEN: f32 = f32::MIN;

/// Below every score, but far above [`HIDDEN`]: the highest score before there is any.
pub const LOWEST: f32 = f32::MIN / 2.0;

impl Visible<'_> {
    /// Positions of some queries of a slot.
    pub fn of(&self, slot: usize, queries: Range<usize>) -> &[i32] {
        &self.positions[slot * self.queries..][queries]
    }

    /// The first and the last position that the queries at `positions` may see at all.
    fn span(&self, positions: &[i32]) -> [i64; 2] {
        let [lowest, highest] = ends(positions);
        let first = self.window.map_or(0, |window| lowest.saturating_sub_unsigned(window as u64).saturating_add(1));
        [first.max(0), highest]
    }

    /// The keys of a slot from the first to the last that one of the queries at `positions` sees.
    pub fn range(&self, slot: usize, positions: &[i32]) -> Range<usize> {
        let [first, last] = self.span(positions);
        match self.key_positions {
            None => {
                let end = usize::try_from(last + 1).map_or(0, |end| end.min(self.keys));
                (first as usize).min(end)..end
            }
            Some(all) => {
                let all = &all[slot * self.keys..][..self.keys];
                let seen = |&position: &i32| (first..=last).contains(&position.into());
                match all.iter().position(seen) {
                    Some(start) => start..all.iter().rposition(seen).map_or(start, |last| last + 1),
                    None => 0..0,
                }
            }
        }
    }

    /// Whether each of the queries at `positions` sees every one of these keys.
    pub fn all(&self, slot: usize, positions: &[i32], keys: Range<usize>) -> bool {
        let [lowest, highest] = ends(positions);
        let first = self.window.map_or(0, |window| highest.saturating_sub_unsigned(window as u64).saturating_add(1));
        let seen = first.max(0)..=lowest;
        match self.key_positions {
            None => keys.is_empty() || (seen.contains(&(keys.start as i64)) && seen.contains(&(keys.end as i64 - 1))),
            Some(all) => all[slot * self.keys..][keys].iter().all(|&position| seen.contains(&position.into())),
        }
    }

    /// Where keys stand, seen from `base`, for [`Visible::penalty`].
    #[inline(always)]
    pub fn key_offsets(&self, slot: usize, keys: Range<usize>, base: i32, out: &mut [f32]) {
        match self.key_positions {
            None => out.iter_mut().zip(keys).for_each(|(out, t)| *out = (t as i64 - i64::from(base)) as f32),
            Some(all) => {
                for (out, &position) in out.iter_mut().zip(&all[slot * self.keys..][keys]) {
                    *out = if position < 0 { NOWHERE } else { (i64::from(position) - i64::from(base)) as f32 };
                }
            }
        }
    }

    /// 0 where a query at `query` sees a key at `key`, and at most [`HIDDEN`] where not; both as offsets from one base.
    /// f32 holds the differences that decide exactly.
    #[inline(always)]
    pub fn penalty<S: Simd>(&self, simd: S, query: S::F32, key: S::F32) -> S::F32 {
        let hidden = simd.splat(HIDDEN);
        let later = simd.zero_below(simd.sub(key, query), simd.splat(0.5), hidden);
        match self.window {
            None => later,
            Some(window) => {
                let age = simd.sub(query, key);
                let older = simd.zero_below(age, simd.splat(window as f32), hidden);
                simd.add(later, older)
            }
        }
    }
}

/// The lowest and the highest.
fn ends(positions: &[i32]) -> [i64; 2] {
    let lowest = positions.iter().min().map_or(0, |&position| position.into());
    [lowest, positions.iter().max().map_or(-1, |&position| position.into())]
}
