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

impl dyn Pool + '_ {
    /// [`Pool::run`] for chunks that write through pointers: no chunk runs twice, whatever the pool does.
    ///
    /// # Panics
    /// If the pool runs a chunk twice, or one that is not asked for.
    pub(crate) fn share(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        let taken: Vec<AtomicBool> = (0..chunks).map(|_| AtomicBool::new(false)).collect();
        self.run(chunks, &|chunk| {
            let free = taken.get(chunk).is_some_and(|taken| !taken.swap(true, Ordering::Relaxed));
            assert!(free, "pool: each of {chunks} chunks once required, found {chunk} again");
            f(chunk);
        });
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the last chunk again.
    struct Again;

    impl Pool for Again {
        fn threads(&self) -> usize {
            1
        }

        fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
            (0..chunks).chain([chunks - 1]).for_each(f);
        }
    }

    #[test]
    #[should_panic(expected = "each of 3 chunks once required, found 2 again")]
    fn a_chunk_runs_once() {
        let pool: &dyn Pool = &Again;
        pool.share(3, &|_| ());
    }
}
