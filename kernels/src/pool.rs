//! Threads that share the chunks of a kernel's work.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// So much work, but less under Miri, which is too slow for as much as several threads would share.
pub(crate) const fn worth(work: usize) -> usize {
    if cfg!(miri) { work >> 7 } else { work }
}

/// Threads that run chunks of work.
pub trait Pool: Sync {
    /// How many threads take chunks, the caller's included: at least 1.
    fn threads(&self) -> usize;

    /// Calls `f` once with each of `0..chunks`, from any thread and in any order; returns when all calls have returned.
    fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync));
}

/// The caller's thread alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Pool for Serial {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        (0..chunks).for_each(f);
    }
}

/// Threads started for each call and joined at its end: for tests and measurements of large work.
#[derive(Clone, Copy, Debug)]
pub struct Threads(pub usize);

impl Pool for Threads {
    fn threads(&self) -> usize {
        self.0.max(1)
    }

    fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        let next = AtomicUsize::new(0);
        let take = || {
            while let Some(chunk) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&chunk| chunk < chunks) {
                f(chunk);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads().min(chunks) {
                scope.spawn(take);
            }
            take();
        });
    }
}
