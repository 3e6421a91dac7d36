//! What the processes of one program tell each other while and after their clients are made: the key-value callbacks
//! of `PJRT_Client_Create`, backed by a Rust trait.

use super::error::Code;
use super::ffi::panic_text;
use super::sys;
use super::value::slice;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// A store that all processes of a program see. Keys and values are bytes, zeros among them.
///
/// Two plugins, or two runs, that use one server must not see each other's keys: an implementation puts its own prefix
/// before them.
pub trait KeyValueStore: Send + Sync {
    /// The key's value, as soon as some process has put it.
    ///
    /// # Errors
    /// [`Code::DeadlineExceeded`] where nobody has within `timeout`, [`Code::Unavailable`] where the store is not
    /// there.
    fn get(&self, key: &[u8], timeout: Duration) -> Result<Vec<u8>, KeyValueError>;

    /// The key's value, if it is there now.
    ///
    /// # Errors
    /// The store is not there.
    fn try_get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KeyValueError>;

    /// Gives the key a value; one that it had is replaced.
    ///
    /// # Errors
    /// The store is not there, or takes no such value.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<(), KeyValueError>;
}

/// Why a store did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct KeyValueError {
    /// The status code that the plugin gets.
    pub code: Code,
    /// What was asked, of which store, what it answered and what to do; the plugin's error ends in it.
    pub message: String,
}

impl KeyValueError {
    /// An error with a code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        KeyValueError { code, message: message.into() }
    }
}

/// A store in a place that does not move, whose address goes to the plugin as `user_arg`.
pub(super) struct Callbacks(Box<Shared>);

struct Shared {
    store: Arc<dyn KeyValueStore>,
}

impl Callbacks {
    pub(super) fn new(store: Arc<dyn KeyValueStore>) -> Self {
        Callbacks(Box::new(Shared { store }))
    }

    /// Fills the callbacks of `args`. This object must live as long as the client that is made from them.
    pub(super) fn give_to(&self, args: &mut sys::ClientCreate) {
        let user_arg = std::ptr::from_ref::<Shared>(&self.0).cast_mut().cast::<c_void>();
        args.kv_get_callback = Some(get);
        args.kv_get_user_arg = user_arg;
        args.kv_try_get_callback = Some(try_get);
        args.kv_try_get_user_arg = user_arg;
        args.kv_put_callback = Some(put);
        args.kv_put_user_arg = user_arg;
    }
}

/// What the plugin calls to wait for a key.
unsafe extern "C" fn get(args: *mut sys::KeyValueGet) -> *mut sys::RawError {
    // SAFETY: the plugin passes a struct of its own that is valid during the call. Its `struct_size` is not looked at:
    // XLA does not set it.
    let args = unsafe { &mut *args };
    // A time that is too long for the field, such as XLA's endless one, comes as a negative number: weeks, then.
    let timeout = Duration::from_millis(u64::from(u32::try_from(args.timeout_ms).unwrap_or(i32::MAX as u32)));
    // SAFETY: `key` covers `key_size` bytes during the call, and `user_arg` is what `give_to` set.
    let (key, shared) = unsafe { (slice(args.key, args.key_size), shared(args.user_arg)) };
    match guard(|| shared.store.get(key, timeout)) {
        Ok(value) => {
            (args.value, args.value_size) = lend(&value);
            args.value_deleter = Some(delete);
            std::ptr::null_mut()
        }
        // SAFETY: the plugin set `callback_error`.
        Err(e) => unsafe { raise(args.callback_error, &e) },
    }
}

/// What the plugin calls to look for a key.
unsafe extern "C" fn try_get(args: *mut sys::KeyValueTryGet) -> *mut sys::RawError {
    // SAFETY: as in `get`.
    let args = unsafe { &mut *args };
    // SAFETY: as in `get`.
    let (key, shared) = unsafe { (slice(args.key, args.key_size), shared(args.user_arg)) };
    let absent = || KeyValueError::new(Code::NotFound, format!("no key {:?}", String::from_utf8_lossy(key)));
    match guard(|| shared.store.try_get(key)).and_then(|value| value.ok_or_else(absent)) {
        Ok(value) => {
            (args.value, args.value_size) = lend(&value);
            args.value_deleter = Some(delete);
            std::ptr::null_mut()
        }
        // SAFETY: as in `get`.
        Err(e) => unsafe { raise(args.callback_error, &e) },
    }
}

/// What the plugin calls to put a key.
unsafe extern "C" fn put(args: *mut sys::KeyValuePut) -> *mut sys::RawError {
    // SAFETY: as in `get`.
    let args = unsafe { &mut *args };
    // SAFETY: as in `get`; `value` covers `value_size` bytes during the call.
    let (key, value, shared) =
        unsafe { (slice(args.key, args.key_size), slice(args.value, args.value_size), shared(args.user_arg)) };
    match guard(|| shared.store.put(key, value)) {
        Ok(()) => std::ptr::null_mut(),
        // SAFETY: as in `get`.
        Err(e) => unsafe { raise(args.callback_error, &e) },
    }
}

/// # Safety
/// `user_arg` is what [`Callbacks::give_to`] set, and that object lives.
unsafe fn shared<'a>(user_arg: *mut c_void) -> &'a Shared {
    // SAFETY: the caller's promise.
    unsafe { &*user_arg.cast::<Shared>() }
}

/// Runs the store's code: a panic in it is an error, and does not unwind into the plugin.
fn guard<T>(work: impl FnOnce() -> Result<T, KeyValueError>) -> Result<T, KeyValueError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        Err(KeyValueError::new(Code::Internal, format!("the key-value store panicked: {}", panic_text(&*panic))))
    })
}

/// A copy of a value in memory that [`delete`] frees; null and 0 where there is none to be had.
fn lend(value: &[u8]) -> (*mut u8, usize) {
    // SAFETY: any size may be asked for. The deleter learns no size, so the memory is that of C; and not null where
    // the value is empty, so that nobody takes it for a missing one.
    let copy = unsafe { libc::malloc(value.len().max(1)) }.cast::<u8>();
    if copy.is_null() {
        return (copy, 0);
    }
    // SAFETY: `copy` has room for the value and is new.
    unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), copy, value.len()) };
    (copy, value.len())
}

/// Frees what [`lend`] made.
unsafe extern "C" fn delete(value: *mut u8) {
    // SAFETY: the plugin hands back, once, what it was lent.
    unsafe { libc::free(value.cast()) };
}

/// The plugin's own error object.
///
/// # Safety
/// `callback_error` points to a function of the plugin.
unsafe fn raise(callback_error: *const sys::CallbackError, error: &KeyValueError) -> *mut sys::RawError {
    // SAFETY: the caller's promise; the plugin copies the message during the call.
    unsafe { (*callback_error)(error.code as i32, error.message.as_ptr(), error.message.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pjrt::MemoryStore;
    use crate::pjrt::sys::Arguments;

    /// A plugin's end of the callbacks: calls them as XLA does, its struct's head unset.
    struct Caller(sys::ClientCreate);

    /// An error object of this plugin.
    type Raised = (i32, String);

    unsafe extern "C" fn make_error(code: i32, message: *const u8, size: usize) -> *mut sys::RawError {
        // SAFETY: the callback passes a message of this size.
        let message = unsafe { crate::pjrt::value::text(message, size) };
        Box::into_raw(Box::new((code, message))).cast()
    }

    const MAKE_ERROR: sys::CallbackError = make_error;

    fn take(error: *mut sys::RawError) -> Result<(), Raised> {
        // SAFETY: not null, so it comes from `make_error`, which boxed it.
        if error.is_null() { Ok(()) } else { Err(*unsafe { Box::from_raw(error.cast::<Raised>()) }) }
    }

    /// Copies a value and gives it back, as a plugin must.
    fn copy(value: *mut u8, size: usize, deleter: Option<sys::ValueDeleter>) -> Vec<u8> {
        assert!(!value.is_null());
        // SAFETY: the callback said so.
        let copy = unsafe { slice(value, size) }.to_vec();
        // SAFETY: the value is handed back once.
        unsafe { deleter.expect("a value comes with its deleter")(value) };
        copy
    }

    impl Caller {
        fn new(callbacks: &Callbacks) -> Self {
            let mut args = sys::ClientCreate::new();
            callbacks.give_to(&mut args);
            Caller(args)
        }

        fn get(&self, key: &[u8], timeout_ms: i32) -> Result<Vec<u8>, Raised> {
            let mut args = sys::KeyValueGet {
                struct_size: 0,
                extension_start: std::ptr::null_mut(),
                key: key.as_ptr(),
                key_size: key.len(),
                timeout_ms,
                callback_error: &MAKE_ERROR,
                user_arg: self.0.kv_get_user_arg,
                value: std::ptr::null_mut(),
                value_size: 0,
                value_deleter: None,
            };
            // SAFETY: the struct is filled as the header says.
            take(unsafe { self.0.kv_get_callback.unwrap()(&mut args) })?;
            Ok(copy(args.value, args.value_size, args.value_deleter))
        }

        fn try_get(&self, key: &[u8]) -> Result<Vec<u8>, Raised> {
            let mut args = sys::KeyValueTryGet {
                struct_size: 0,
                extension_start: std::ptr::null_mut(),
                key: key.as_ptr(),
                key_size: key.len(),
                callback_error: &MAKE_ERROR,
                user_arg: self.0.kv_try_get_user_arg,
                value: std::ptr::null_mut(),
                value_size: 0,
                value_deleter: None,
            };
            // SAFETY: as above.
            take(unsafe { self.0.kv_try_get_callback.unwrap()(&mut args) })?;
            Ok(copy(args.value, args.value_size, args.value_deleter))
        }

        fn put(&self, key: &[u8], value: &[u8]) -> Result<(), Raised> {
            let mut args = sys::KeyValuePut {
                struct_size: 0,
                extension_start: std::ptr::null_mut(),
                key: key.as_ptr(),
                key_size: key.len(),
                value: value.as_ptr(),
                value_size: value.len(),
                callback_error: &MAKE_ERROR,
                user_arg: self.0.kv_put_user_arg,
            };
            // SAFETY: as above.
            take(unsafe { self.0.kv_put_callback.unwrap()(&mut args) })
        }
    }

    // SAFETY: the callbacks may be called from any thread, and nothing else of the struct is used.
    unsafe impl Sync for Caller {}

    #[test]
    fn values_go_through_whole() {
        let callbacks = Callbacks::new(Arc::new(MemoryStore::default()));
        let caller = Caller::new(&callbacks);
        for value in [&b"one\0two\0"[..], b"", &[0xff; 100_000]] {
            caller.put(b"a\0key", value).unwrap();
            assert_eq!(caller.try_get(b"a\0key").unwrap(), value);
            assert_eq!(caller.get(b"a\0key", 0).unwrap(), value);
        }
        assert_eq!(caller.try_get(b"a").unwrap_err(), (Code::NotFound as i32, "no key \"a\"".into()));
    }

    #[test]
    fn get_waits_for_another_thread_and_not_for_ever() {
        let callbacks = Callbacks::new(Arc::new(MemoryStore::default()));
        let caller = Caller::new(&callbacks);
        for (key, timeout) in [(b"late", 60_000), (b"long", -1)] {
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| caller.get(key, timeout));
                std::thread::sleep(Duration::from_millis(20));
                caller.put(key, b"here").unwrap();
                assert_eq!(waiting.join().unwrap().unwrap(), b"here");
            });
        }
        for timeout in [30, 0] {
            let (code, message) = caller.get(b"never", timeout).unwrap_err();
            assert_eq!(code, Code::DeadlineExceeded as i32);
            assert!(message.contains("\"never\""), "{message}");
        }
    }

    /// Fails as it is told by the key.
    struct Bad;

    impl KeyValueStore for Bad {
        fn get(&self, key: &[u8], _: Duration) -> Result<Vec<u8>, KeyValueError> {
            self.put(key, b"").map(|()| Vec::new())
        }

        fn try_get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, KeyValueError> {
            self.put(key, b"").map(|()| None)
        }

        fn put(&self, key: &[u8], _: &[u8]) -> Result<(), KeyValueError> {
            assert!(key != b"panic", "the store broke");
            Err(KeyValueError::new(Code::Unavailable, "no server"))
        }
    }

    #[test]
    fn an_error_and_a_panic_of_the_store_come_back_as_the_plugins_error() {
        let callbacks = Callbacks::new(Arc::new(Bad));
        let caller = Caller::new(&callbacks);
        let unavailable = (Code::Unavailable as i32, "no server".to_owned());
        assert_eq!(caller.get(b"x", 1).unwrap_err(), unavailable);
        assert_eq!(caller.try_get(b"x").unwrap_err(), unavailable);
        assert_eq!(caller.put(b"x", b"").unwrap_err(), unavailable);
        let panicked = (Code::Internal as i32, "the key-value store panicked: the store broke".to_owned());
        assert_eq!(caller.get(b"panic", 1).unwrap_err(), panicked);
        assert_eq!(caller.try_get(b"panic").unwrap_err(), panicked);
        assert_eq!(caller.put(b"panic", b"").unwrap_err(), panicked);
    }
}
