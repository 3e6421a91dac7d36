//! Threads that work on the chunks of one call after another. XLA lends them; waking one takes some ten microseconds, as long
//! as a whole call of a kernel, so those that have come stay a little and look out for the next call.

use super::ffi::panic_text;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a helper looks out for the next call: longer than the gaps between the calls of one program, and short enough
/// that XLA's own work, for which it may be wanted, does not wait long.
const LINGER: Duration = Duration::from_micros(40);

/// A task for a thread of the pool.
pub(super) type Help = Box<dyn FnOnce() + Send>;

/// The process's crew. A helper works for whichever call was posted last, of whatever program; a call whose helpers are
/// elsewhere does its chunks by itself.
static CREW: Crew = Crew { posted: AtomicU64::new(0), job: Mutex::new(None), here: AtomicUsize::new(0) };

struct Crew {
    /// Calls posted so far.
    posted: AtomicU64,
    /// The one that was posted last.
    job: Mutex<Option<Arc<Job>>>,
    /// Helpers that have been sent for and have not left.
    here: AtomicUsize,
}

/// Runs `f` for each chunk, on this thread and on up to `helpers` others, which `send` calls. Errors: the text of a panic.
pub(super) fn for_each(
    chunks: usize,
    f: &(dyn Fn(usize) + Sync),
    helpers: usize,
    send: &dyn Fn(Help) -> bool,
) -> Result<(), String> {
    let f: *const (dyn Fn(usize) + Sync + '_) = f;
    // SAFETY: only the lifetime changes, which a pointer does not promise anything about; see `Job`.
    let f: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(f) };
    let job = Arc::new(Job {
        f,
        chunks,
        next: AtomicUsize::new(0),
        done: AtomicUsize::new(0),
        panicked: AtomicBool::new(false),
        panic: Mutex::new(None),
        caller: thread::current(),
    });
    if helpers > 0 {
        CREW.post(&job, helpers, send);
    }
    job.work();
    job.wait();
    if !job.panicked.load(Ordering::Acquire) {
        return Ok(());
    }
    Err(job.panic.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default())
}

impl Crew {
    fn post(&'static self, job: &Arc<Job>, helpers: usize, send: &dyn Fn(Help) -> bool) {
        *self.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(job.clone());
        // Release: a helper that sees the number finds this job, or a later one.
        let number = self.posted.fetch_add(1, Ordering::Release) + 1;
        while self.here.load(Ordering::Relaxed) < helpers {
            self.here.fetch_add(1, Ordering::Relaxed);
            let job = job.clone();
            if !send(Box::new(move || self.help(job, number))) {
                self.here.fetch_sub(1, Ordering::Relaxed);
                return;
            }
        }
    }

    /// A helper's stay.
    fn help(&self, mut job: Arc<Job>, mut seen: u64) {
        loop {
            job.work();
            match self.next(&mut seen) {
                Some(next) => job = next,
                None => break,
            }
        }
        self.here.fetch_sub(1, Ordering::Relaxed);
    }

    /// The next call, if one comes in time.
    fn next(&self, seen: &mut u64) -> Option<Arc<Job>> {
        let mut leaves: Option<Instant> = None;
        loop {
            for _ in 0..32 {
                let posted = self.posted.load(Ordering::Acquire);
                if posted != *seen {
                    *seen = posted;
                    return self.job.lock().unwrap_or_else(PoisonError::into_inner).clone();
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now >= *leaves.get_or_insert(now + LINGER) {
                return None;
            }
        }
    }
}

/// The chunks of one call. Helpers that come late find no chunk left and touch nothing else.
struct Job {
    /// Lives until all chunks are done, on the stack of the caller, who waits for that.
    f: *const (dyn Fn(usize) + Sync),
    chunks: usize,
    next: AtomicUsize,
    done: AtomicUsize,
    panicked: AtomicBool,
    panic: Mutex<Option<String>>,
    caller: Thread,
}

// SAFETY: what `f` points to may be used by several threads at once (`Sync`), and is used only for chunks that the
// caller waits for; all else in it is `Send` and `Sync`.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Job {
    /// Takes chunks until none is left.
    fn work(&self) {
        // A glance first: a crew that comes late again and again must not make the counter overflow.
        while self.next.load(Ordering::Relaxed) < self.chunks {
            let chunk = self.next.fetch_add(1, Ordering::Relaxed);
            if chunk >= self.chunks {
                return;
            }
            // SAFETY: this chunk is not done, so the caller still waits and `f` is alive.
            let f = unsafe { &*self.f };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| f(chunk))) {
                let text = panic_text(&*panic).to_owned();
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
                self.panicked.store(true, Ordering::Release);
            }
            // Release: what the chunk wrote is visible to whoever sees the count.
            if self.done.fetch_add(1, Ordering::AcqRel) + 1 == self.chunks {
                self.caller.unpark();
            }
        }
    }

    /// Waits for the chunks that other threads have taken; each of them is running.
    fn wait(&self) {
        let mut spins = 0u32;
        while self.done.load(Ordering::Acquire) < self.chunks {
            if spins < 2000 {
                spins += 1;
                std::hint::spin_loop();
            } else {
                thread::park_timeout(Duration::from_micros(200));
            }
        }
    }
}
