//! XLA's threads from a handler's side.

use super::crew;
use super::error::Code;
use super::ffi::FfiError;
use super::ffi_sys as sys;
use std::ffi::{CStr, c_void};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// XLA's threads, during a call. They are shared by all devices, and there may be one only: nothing here waits for a
/// task that has not begun.
#[derive(Clone, Copy)]
pub struct ThreadPool<'a> {
    api: *const sys::FfiApi,
    context: *mut sys::RawContext,
    _frame: PhantomData<&'a sys::RawFrame>,
}

// SAFETY: XLA's pool may be asked and fed from any thread while the call lasts, which `'a` says.
unsafe impl Send for ThreadPool<'_> {}
// SAFETY: as above.
unsafe impl Sync for ThreadPool<'_> {}

/// A boxed task.
type Task = Box<dyn FnOnce() + Send>;

impl<'a> ThreadPool<'a> {
    /// The pool behind a frame.
    pub(super) fn new(frame: &'a sys::RawFrame) -> Self {
        ThreadPool { api: frame.api, context: frame.context, _frame: PhantomData }
    }

    /// Number of threads in the pool.
    ///
    /// # Errors
    /// There is no pool.
    pub fn num_threads(&self) -> Result<usize, FfiError> {
        let mut num_threads = 0i64;
        let mut args = sys::PoolNumThreads {
            struct_size: size_of::<sys::PoolNumThreads>(),
            extension_start: std::ptr::null_mut(),
            context: self.context,
            num_threads: &mut num_threads,
        };
        // SAFETY: the table and the context are valid during the call.
        let error = unsafe { (*self.api).pool_num_threads.map(|f| f(&mut args)) };
        self.check(error)?;
        Ok(usize::try_from(num_threads).unwrap_or(0))
    }

    /// Queues a task. It may run after the handler has returned, on any thread, or on this one at once. **Do not wait
    /// for it**: with one thread it never begins while the handler runs.
    ///
    /// # Errors
    /// There is no pool; the task will not run.
    pub fn schedule(&self, task: impl FnOnce() + Send + 'static) -> Result<(), FfiError> {
        let data = Box::into_raw(Box::new(Box::new(task) as Task));
        let mut args = sys::PoolSchedule {
            struct_size: size_of::<sys::PoolSchedule>(),
            extension_start: std::ptr::null_mut(),
            context: self.context,
            task: run_task,
            data: data.cast::<c_void>(),
        };
        // SAFETY: the table and the context are valid during the call.
        let error = unsafe { (*self.api).pool_schedule.map(|f| f(&mut args)) };
        self.check(error).inspect_err(|_| {
            // SAFETY: the pool refused the task, so the box is still ours alone.
            drop(unsafe { Box::from_raw(data) });
        })
    }

    /// Runs `f(0)`, …, `f(chunks - 1)`, each once, on this thread and on as many of the pool's as come in time, and
    /// returns when all are done. Chunks are handed out one by one, so a slow thread delays at most its own.
    ///
    /// Threads that have helped stay for some microseconds for the next call: waking them takes longer than most calls do.
    ///
    /// # Errors
    /// A chunk panicked.
    pub fn for_each(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) -> Result<(), FfiError> {
        let helpers = if chunks < 2 { 0 } else { self.num_threads().unwrap_or(1).min(chunks).saturating_sub(1) };
        // A pool that refuses leaves the work to this thread.
        let outcome = crew::for_each(chunks, f, helpers, &|task| self.schedule(task).is_ok());
        outcome.map_err(|panic| FfiError::new(Code::Internal, format!("a chunk panicked: {panic}")))
    }

    /// Turns what the pool answered into a result; `None` is a table without the function.
    fn check(&self, answer: Option<*mut sys::RawFfiError>) -> Result<(), FfiError> {
        let Some(error) = answer else {
            return Err(FfiError::new(Code::Unimplemented, "XLA's FFI has no thread pool here"));
        };
        if error.is_null() {
            return Ok(());
        }
        let mut message = sys::ErrorGetMessage {
            struct_size: size_of::<sys::ErrorGetMessage>(),
            extension_start: std::ptr::null_mut(),
            error,
            message: std::ptr::null(),
        };
        let mut destroy = sys::ErrorDestroy {
            struct_size: size_of::<sys::ErrorDestroy>(),
            extension_start: std::ptr::null_mut(),
            error,
        };
        // SAFETY: the table is valid during the call, the error is alive until it is destroyed here, and its message
        // is text that ends in a zero byte.
        let text = unsafe {
            (*self.api).error_get_message.inspect(|f| f(&mut message));
            let text = (!message.message.is_null()).then(|| CStr::from_ptr(message.message).to_string_lossy().into());
            (*self.api).error_destroy.inspect(|f| f(&mut destroy));
            text
        };
        Err(FfiError::new(Code::Internal, text.unwrap_or_else(|| "the thread pool failed".to_owned())))
    }
}

/// Called by the pool, once per task. Never unwinds.
unsafe extern "C" fn run_task(data: *mut c_void) {
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: `data` is the box that `schedule` made, and the pool runs a task once.
        let task = unsafe { Box::from_raw(data.cast::<Task>()) };
        task();
    }));
}
