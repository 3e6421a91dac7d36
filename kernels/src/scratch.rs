//! Memory that a thread uses again from call to call, and pointers that chunks share.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A cache line: buffers start at one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Types of which every bit pattern is a value.
///
/// # Safety
/// That must be so, and the alignment at most 64.
pub(crate) unsafe trait Plain: Copy + 'static {}

// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for i8 {}

/// `len` elements with any values, taken from this thread's free buffers and given back when dropped.
pub(crate) struct Scratch<T: Plain> {
    lines: Vec<Line>,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Plain> Scratch<T> {
    pub(crate) fn new(len: usize) -> Scratch<T> {
        let mut lines = FREE.try_with(|free| free.borrow_mut().pop()).ok().flatten().unwrap_or_default();
        let bytes = len.checked_mul(size_of::<T>()).expect("no more bytes than a usize counts");
        let needed = bytes.div_ceil(64);
        if lines.len() < needed {
            lines.resize(needed, Line([0; 64]));
        }
        Scratch { lines, len, elements: PhantomData }
    }
}

impl<T: Plain> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the lines are initialised, aligned and hold `len` elements (`new` counts the bytes without wrapping), of
        // which any bits are values.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

impl<T: Plain> Drop for Scratch<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // A thread that ends has no free list any more: the buffer is freed then.
        let _ = FREE.try_with(|free| free.borrow_mut().push(lines));
    }
}

/// Whether `len` is the product of `sizes`, which is refused where a usize cannot count it: a product that wrapped could
/// be the length of a slice that is too short.
pub(crate) fn counts(len: usize, sizes: &[usize]) -> bool {
    sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size)) == Some(len)
}

/// A pointer that several threads write through, each to elements of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: to hand a pointer on is harmless; whoever dereferences it vouches that no two threads touch one element.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as for Send.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(slice: &mut [T]) -> Shared<T> {
        Shared(slice.as_mut_ptr())
    }

    #[inline(always)]
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}
