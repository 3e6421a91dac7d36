//! The host's half of the cache: how much each slot holds, which tokens, and which pages of the pool.

use super::{CacheShape, Pages, SLACK};
use crate::Error;

/// What stands in the slots of a cache. Slots start, grow and are freed independently of each other.
#[derive(Clone, Debug)]
pub struct Slots {
    /// Positions that the smallest ring holds; none if no layer has one.
    ring: Option<usize>,
    slots: Vec<Slot>,
    pool: Option<Pool>,
}

#[derive(Clone, Debug, Default)]
struct Slot {
    /// Positions that count.
    used: usize,
    /// Positions that were written since some were last taken back.
    written: usize,
    /// The ids at the first positions, as far as they are known.
    ids: Vec<u32>,
}

/// Pages and who has them.
#[derive(Clone, Debug)]
struct Pool {
    pages: Pages,
    /// Pages that one slot can have.
    table_len: usize,
    /// How many slots hold each page.
    holders: Vec<u32>,
    /// The pages of each slot, in order.
    tables: Vec<Vec<u32>>,
}

/// A page that has to be copied on the device before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    /// The page that several slots hold.
    pub from: u32,
    /// The one that takes its place in one of them.
    pub to: u32,
}

impl Slots {
    /// Empty slots of a cache whose layers have these `windows`.
    pub fn new(shape: &CacheShape, windows: &[usize]) -> Slots {
        let ring = windows.iter().filter(|window| **window < shape.len).map(|window| window + SLACK).min();
        let pool = shape.pages.map(|pages| Pool {
            pages,
            table_len: shape.table_len(),
            holders: vec![0; pages.count],
            tables: vec![Vec::new(); shape.batch],
        });
        Slots { ring, slots: vec![Slot::default(); shape.batch], pool }
    }

    /// Positions that count in `slot`.
    pub fn used(&self, slot: usize) -> usize {
        self.slots[slot].used
    }

    /// Positions that count in every slot.
    pub fn all_used(&self) -> Vec<usize> {
        self.slots.iter().map(|slot| slot.used).collect()
    }

    /// Notes that `n` more positions of `slot` count.
    pub fn advance(&mut self, slot: usize, n: usize) {
        let slot = &mut self.slots[slot];
        slot.used += n;
        slot.written = slot.written.max(slot.used);
    }

    /// Notes ids that stand in `slot` from position `at` on; [`Slots::prefix`] finds them, unless something before them is
    /// not known.
    pub fn know(&mut self, slot: usize, at: usize, ids: &[u32]) {
        let known = &mut self.slots[slot].ids;
        if known.len() >= at {
            known.truncate(at);
            known.extend(ids);
        }
    }

    /// How many ids of `slot` are known, from its first on.
    pub fn known(&self, slot: usize) -> usize {
        self.slots[slot].ids.len()
    }

    /// How many of the first `len` positions of `slot` can be kept: all of them, or none where a ring has given up what
    /// stood before the last window.
    pub fn keepable(&self, slot: usize, len: usize) -> usize {
        let Slot { used, written, .. } = self.slots[slot];
        let len = len.min(used);
        match self.ring {
            // An idle slot may write at its end, where nothing counts, without our noticing.
            Some(ring) if written >= ring && written - len > SLACK => 0,
            _ => len,
        }
    }

    /// Forgets what comes after the first `len` positions of `slot`, and gives what is kept (see [`Slots::keepable`]).
    pub fn truncate(&mut self, slot: usize, len: usize) -> usize {
        let kept = self.keepable(slot, len);
        let s = &mut self.slots[slot];
        s.used = kept;
        s.ids.truncate(kept);
        if kept == 0 {
            s.written = 0;
        }
        if let Some(pool) = &mut self.pool {
            let pages = kept.div_ceil(pool.pages.size);
            pool.shorten(slot, pages);
        }
        kept
    }

    /// Empties `slot`; its pages are free unless another slot holds them too.
    pub fn free(&mut self, slot: usize) {
        self.truncate(slot, 0);
    }

    /// The slot that begins with most of `ids`, and how many it holds of them; among equals `preferred`.
    pub fn prefix(&self, ids: &[u32], preferred: usize) -> Option<(usize, usize)> {
        let shared = |slot: &Slot| slot.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let best = self.slots.iter().enumerate().map(|(i, slot)| (i, self.keepable(i, shared(slot))));
        best.filter(|(_, n)| *n > 0).max_by_key(|(i, n)| (*n, *i == preferred))
    }

    /// Slot i becomes a copy of slot `parents[i]`, as beam search needs it. Pages are shared; whatever else there is has
    /// to be copied on the device.
    pub fn reorder(&mut self, parents: &[usize]) {
        self.slots = parents.iter().map(|&parent| self.slots[parent].clone()).collect();
        if let Some(pool) = &mut self.pool {
            let tables: Vec<Vec<u32>> = parents.iter().map(|&parent| pool.tables[parent].clone()).collect();
            tables.iter().flatten().for_each(|&page| pool.holders[page as usize] += 1);
            pool.tables.iter().flatten().for_each(|&page| pool.holders[page as usize] -= 1);
            pool.tables = tables;
        }
    }

    /// Gives every slot pages for its first `lens[slot]` positions, of which those from the ones that it uses on can be
    /// written: a page that is shared is replaced by a copy, which the caller makes on the device.
    ///
    /// # Errors
    /// [`Error::Context`] if the pool has too few pages; nothing is changed then.
    pub fn reserve(&mut self, lens: &[usize]) -> Result<Vec<PageCopy>, Error> {
        let Some(pool) = &mut self.pool else { return Ok(Vec::new()) };
        let before = pool.clone();
        let mut copies = Vec::new();
        for (slot, (&len, Slot { used, .. })) in lens.iter().zip(&self.slots).enumerate() {
            if len <= *used {
                continue;
            }
            let done =
                pool.grow(slot, len.div_ceil(pool.pages.size)).and_then(|()| pool.own(slot, used / pool.pages.size));
            match done {
                Some(copied) => copies.extend(copied),
                None => {
                    let Pages { size, count } = before.pages;
                    let needed = lens.iter().map(|len| len.next_multiple_of(size)).sum();
                    let limit = count * size;
                    *pool = before;
                    return Err(Error::Context {
                        what: "the slots' tokens".into(),
                        needed,
                        limit,
                        reason: "the pages in the pool of the cache".into(),
                        advice: "free a slot, or make the cache with more pages".into(),
                    });
                }
            }
        }
        Ok(copies)
    }

    /// The pages of each slot, (B, N) row-major; a place without page names one past the last.
    pub fn table(&self) -> Option<Vec<i32>> {
        let pool = self.pool.as_ref()?;
        let row = |table: &Vec<u32>| {
            let mut row: Vec<i32> = table.iter().map(|&page| page as i32).collect();
            row.resize(pool.table_len, pool.pages.count as i32);
            row
        };
        Some(pool.tables.iter().flat_map(row).collect())
    }

    /// Pages that no slot holds; none without a pool.
    pub fn free_pages(&self) -> Option<usize> {
        Some(self.pool.as_ref()?.holders.iter().filter(|n| **n == 0).count())
    }
}

impl Pool {
    fn take(&mut self) -> Option<u32> {
        let page = self.holders.iter().position(|n| *n == 0)?;
        self.holders[page] = 1;
        Some(page as u32)
    }

    fn grow(&mut self, slot: usize, pages: usize) -> Option<()> {
        while self.tables[slot].len() < pages.min(self.table_len) {
            let page = self.take()?;
            self.tables[slot].push(page);
        }
        Some(())
    }

    fn shorten(&mut self, slot: usize, pages: usize) {
        while self.tables[slot].len() > pages {
            let page = self.tables[slot].pop().expect("longer than asked for");
            self.holders[page as usize] -= 1;
        }
    }

    /// Makes the pages of `slot` from number `first` on its own.
    fn own(&mut self, slot: usize, first: usize) -> Option<Vec<PageCopy>> {
        let mut copies = Vec::new();
        for i in first..self.tables[slot].len() {
            let from = self.tables[slot][i];
            if self.holders[from as usize] > 1 {
                let to = self.take()?;
                self.holders[from as usize] -= 1;
                self.tables[slot][i] = to;
                copies.push(PageCopy { from, to });
            }
        }
        Some(copies)
    }
}

#[cfg(test)]
mod tests {
    use xla::DType;

    use super::*;

    fn slots(pages: Option<Pages>, windows: &[usize]) -> Slots {
        Slots::new(&CacheShape { batch: 3, len: 256, dtype: DType::F32, pages, platform: Default::default() }, windows)
    }

    #[test]
    fn a_ring_gives_back_a_few_positions_only() {
        let mut s = slots(None, &[64]);
        s.advance(0, 95);
        assert_eq!(s.keepable(0, 10), 10, "nothing was overwritten yet");
        s.advance(0, 1);
        assert_eq!(s.keepable(0, 10), 0, "position 0 may be");
        s.advance(0, 10);
        assert_eq!((s.keepable(0, 106), s.keepable(0, 74), s.keepable(0, 73)), (106, 74, 0));
        assert_eq!(s.truncate(0, 80), 80);
        s.advance(0, 4);
        assert_eq!(s.keepable(0, 73), 0, "what was taken back counts as written");
        assert_eq!((s.truncate(0, 3), s.used(0)), (0, 0));
        let mut wide = slots(None, &[256]);
        wide.advance(1, 256);
        assert_eq!(wide.keepable(1, 1), 1, "a window as long as the cache has no ring");
    }

    #[test]
    fn a_known_prefix_is_found() {
        let mut s = slots(None, &[]);
        s.advance(0, 3);
        s.know(0, 0, &[1, 2, 3]);
        s.advance(2, 4);
        s.know(2, 0, &[1, 2, 4]);
        s.know(2, 3, &[5, 6]);
        s.know(2, 9, &[7]);
        assert_eq!(s.prefix(&[1, 2, 4, 9], 0), Some((2, 3)));
        assert_eq!((s.prefix(&[1, 2, 9], 0), s.prefix(&[1, 2, 9], 2)), (Some((0, 2)), Some((2, 2))));
        assert_eq!(s.prefix(&[1, 2, 4, 5, 6], 0), Some((2, 4)), "the fifth is not in the cache");
        assert_eq!(s.prefix(&[7], 0), None);
        s.free(2);
        assert_eq!(s.prefix(&[1, 2, 4, 9], 1), Some((0, 2)));
    }

    #[test]
    fn pages_are_shared_until_they_are_written() {
        let mut s = slots(Some(Pages { size: 16, count: 6 }), &[]);
        assert_eq!(s.reserve(&[40, 0, 0]).expect("enough"), []);
        s.advance(0, 40);
        assert_eq!(s.free_pages(), Some(3));
        s.reorder(&[0, 0, 2]);
        assert_eq!((s.used(1), s.free_pages()), (40, Some(3)));
        // Slot 0 writes position 40, in the page that both hold.
        assert_eq!(s.reserve(&[41, 40, 0]).expect("enough"), [PageCopy { from: 2, to: 3 }]);
        let table = s.table().expect("paged");
        assert_eq!((&table[..4], &table[16..20]), (&[0, 1, 3, 6][..], &[0, 1, 2, 6][..]));
        s.advance(0, 1);
        s.free(1);
        assert_eq!(s.free_pages(), Some(3));
        let message = s.reserve(&[97, 0, 0]).expect_err("seven pages of 16, where there are six").to_string();
        assert!(message.contains("112") && message.contains("96"), "{message}");
        assert_eq!(s.free_pages(), Some(3), "a refusal changes nothing");
        assert_eq!(s.truncate(0, 16), 16);
        assert_eq!(s.free_pages(), Some(5));
    }
}
