//! Memory that is cut into parts: for the arrays of one call, and for the chunks of its work.

use std::marker::PhantomData;

/// f32s of a cache line.
pub const LINE: usize = 16;

/// Cuts `len` f32s, rounded up to whole cache lines, off the front of `rest`.
pub fn cut<'a>(rest: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let whole = std::mem::take(rest);
    let (front, back) = whole.split_at_mut(len.next_multiple_of(LINE));
    *rest = back;
    front
}

/// A slice of which every chunk of a call writes its own part.
#[derive(Clone, Copy)]
pub struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives out parts of a slice of `T` only where the caller vouches that nobody else has them.
unsafe impl<T: Send> Send for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Parts<'a, T> {
        Parts { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Elements `first … first + len − 1`.
    ///
    /// # Safety
    /// While they are held nobody else may hold any of them.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, first: usize, len: usize) -> &mut [T] {
        assert!(first <= self.len && len <= self.len - first);
        // SAFETY: they lie inside the slice, and the caller vouches that they are nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }

    /// Elements `first … first + len − 1`, to read.
    ///
    /// # Safety
    /// While they are held nobody may write any of them.
    #[inline(always)]
    pub unsafe fn read(&self, first: usize, len: usize) -> &[T] {
        assert!(first <= self.len && len <= self.len - first);
        // SAFETY: they lie inside the slice, and the caller vouches that nobody writes them.
        unsafe { std::slice::from_raw_parts(self.start.add(first), len) }
    }
}
