//! When kernels ran, while somebody wants to know.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use xla::pjrt::{CallFrame, FfiError, Handler};

/// One call of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct KernelCall {
    /// The kernel.
    pub name: &'static str,
    /// Threads that it had.
    pub threads: usize,
    /// When it began.
    pub start: Instant,
    /// When it had done.
    pub end: Instant,
}

static WANTED: AtomicBool = AtomicBool::new(false);
static CALLS: Mutex<Vec<KernelCall>> = Mutex::new(Vec::new());

/// Runs `f` and gives the calls of kernels meanwhile, of the whole process, in order of their ends.
pub fn kernel_calls<T>(f: impl FnOnce() -> T) -> (T, Vec<KernelCall>) {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner).clear();
    WANTED.store(true, Ordering::Relaxed);
    let result = f();
    WANTED.store(false, Ordering::Relaxed);
    (result, std::mem::take(&mut *CALLS.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// A handler whose calls are noted.
pub(super) struct Noted<H>(PhantomData<H>);

impl<H: Handler> Handler for Noted<H> {
    const NAME: &'static str = H::NAME;

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        if !WANTED.load(Ordering::Relaxed) {
            return H::call(frame);
        }
        let start = Instant::now();
        let result = H::call(frame);
        let threads = frame.thread_pool().num_threads().unwrap_or(1);
        let call = KernelCall { name: H::NAME, threads, start, end: Instant::now() };
        CALLS.lock().unwrap_or_else(PoisonError::into_inner).push(call);
        result
    }
}
