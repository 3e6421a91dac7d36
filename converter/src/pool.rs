//! Work on a few threads, in order, with one error and a budget of memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;

use crate::error::{Error, Result};

/// Calls `work` with 0, 1, … `jobs` - 1 on `threads` threads (0: one per core, up to 8). After the first error, or once `cancel`
/// is set, no further job begins.
///
/// # Errors
/// The first error of `work`; [`Error::Cancelled`] if `cancel` was set.
pub(crate) fn for_each(
    threads: usize,
    jobs: usize,
    cancel: &AtomicBool,
    work: impl Fn(usize) -> Result<()> + Sync,
) -> Result<()> {
    let threads = match threads {
        // more would only wait for the disk, each with memory of its own
        0 => thread::available_parallelism().map_or(1, usize::from).min(8),
        threads => threads,
    };
    let (next, stop, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
    let worker = || {
        while !stop.load(Ordering::Relaxed) {
            let job = next.fetch_add(1, Ordering::Relaxed);
            if job >= jobs {
                break;
            }
            if let Err(error) = check(cancel).and_then(|()| work(job)) {
                stop.store(true, Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(jobs) {
            scope.spawn(worker);
        }
        worker();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// [`Error::Cancelled`] once `cancel` is set.
pub(crate) fn check(cancel: &AtomicBool) -> Result<()> {
    if cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
}

/// An amount of memory that several threads share.
pub(crate) struct Budget {
    limit: u64,
    used: Mutex<u64>,
    returned: Condvar,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Budget {
        Budget { limit, used: Mutex::new(0), returned: Condvar::new() }
    }

    /// Waits until `bytes` are free (or nothing at all is in use) and takes them until the loan is dropped.
    pub(crate) fn take(&self, bytes: u64) -> Loan<'_> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |used: &mut u64| *used > 0 && *used + bytes > self.limit;
        let mut used = self.returned.wait_while(used, full).unwrap_or_else(PoisonError::into_inner);
        *used += bytes;
        Loan { budget: self, bytes }
    }
}

/// Memory taken from a [`Budget`].
pub(crate) struct Loan<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        *self.budget.used.lock().unwrap_or_else(PoisonError::into_inner) -= self.bytes;
        self.budget.returned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_once_and_the_first_error_stops() {
        let done: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
        let cancel = AtomicBool::new(false);
        for_each(4, 100, &cancel, |i| {
            done[i].fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .expect("no job fails");
        assert!(done.iter().all(|n| n.load(Ordering::Relaxed) == 1));

        let begun = AtomicUsize::new(0);
        let result = for_each(1, 100, &cancel, |i| {
            begun.fetch_add(1, Ordering::Relaxed);
            if i == 3 { Err(Error::format("x".as_ref(), "broken")) } else { Ok(()) }
        });
        assert_eq!(result.expect_err("job 3 fails").to_string(), "x: broken");
        assert_eq!(begun.load(Ordering::Relaxed), 4);

        cancel.store(true, Ordering::Relaxed);
        assert!(matches!(for_each(2, 100, &cancel, |_| Ok(())), Err(Error::Cancelled)));
    }

    #[test]
    fn a_budget_is_kept_except_for_what_is_larger_alone() {
        let (budget, used, most) = (Budget::new(10), AtomicUsize::new(0), AtomicUsize::new(0));
        for_each(8, 200, &AtomicBool::new(false), |i| {
            let bytes = if i == 50 { 30 } else { 1 + i % 6 };
            let _loan = budget.take(bytes as u64);
            let now = used.fetch_add(bytes, Ordering::SeqCst) + bytes;
            if bytes == 30 {
                assert_eq!(now, 30);
            } else {
                most.fetch_max(now, Ordering::SeqCst);
            }
            thread::yield_now();
            used.fetch_sub(bytes, Ordering::SeqCst);
            Ok(())
        })
        .expect("no job fails");
        assert!(most.into_inner() <= 10);
    }
}
