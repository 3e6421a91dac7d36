//! Something that will have happened: the end of a copy or of an execution.

use super::client::Client;
use super::error::Error;
use super::plugin::Plugin;
use super::sys::{self, Arguments};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The end of asynchronous work. Dropping it does not wait.
pub struct Event {
    // Dropped before the client, which it may need.
    raw: Owned,
    _client: Client,
}

/// The event object itself.
struct Owned {
    plugin: Plugin,
    raw: *mut sys::RawEvent,
}

// SAFETY: PJRT events may be polled, awaited and destroyed from any thread.
unsafe impl Send for Owned {}
// SAFETY: as above; `&Owned` only polls and awaits.
unsafe impl Sync for Owned {}

/// What [`Event::on_ready`] runs.
type Callback = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// What the C callback gets: the event stays alive until it has run. The client is left out on purpose: the callback
/// may run on one of the client's own threads, where destroying the client would wait for itself.
struct Watch {
    event: Owned,
    callback: Callback,
}

impl Event {
    /// Takes over an event of the plugin; `None` for null, which some plugins return where nothing is pending.
    pub(super) fn from_raw(client: &Client, raw: *mut sys::RawEvent) -> Option<Event> {
        (!raw.is_null()).then(|| Event { raw: Owned { plugin: *client.plugin(), raw }, _client: client.clone() })
    }

    /// Waits until the work is done.
    ///
    /// # Errors
    /// The work failed; the message is the plugin's.
    pub fn wait(&self) -> Result<(), Error> {
        let mut args = sys::EventAwait::new();
        args.event = self.raw.raw;
        self.raw.plugin.call(&mut args)
    }

    /// True once the work is done or has failed.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn is_ready(&self) -> Result<bool, Error> {
        let mut args = sys::EventIsReady::new();
        args.event = self.raw.raw;
        self.raw.plugin.call(&mut args)?;
        Ok(args.is_ready)
    }

    /// Runs `callback` with the outcome once the work is done: at once on this thread, or later on one of the
    /// plugin's. It should be short, must not wait for the device and must not own the last handle of a client. A
    /// panic in it is swallowed.
    ///
    /// # Errors
    /// The plugin cannot watch events. The callback will not run and is leaked.
    pub fn on_ready(self, callback: impl FnOnce(Result<(), Error>) + Send + 'static) -> Result<(), Error> {
        let Event { raw: event, _client } = self;
        let (plugin, raw) = (event.plugin, event.raw);
        let watch = Box::into_raw(Box::new(Watch { event, callback: Box::new(callback) }));
        let mut args = sys::EventOnReady::new();
        args.event = raw;
        args.callback = Some(run_watch);
        args.user_arg = watch.cast::<c_void>();
        // On failure the box is leaked on purpose: whoever refused may still hold the pointer, and what the callback
        // owns (host memory that a device may be reading) must not be freed too early.
        plugin.call(&mut args)
    }
}

/// Called by the plugin, once per [`Event::on_ready`]. Never unwinds.
unsafe extern "C" fn run_watch(error: *mut sys::RawError, user: *mut c_void) {
    // A panic of the callback, or of a destructor of what it owns, ends here: the caller is C++.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: `user` is the box that `on_ready` made, and the plugin calls back once.
        let watch = unsafe { Box::from_raw(user.cast::<Watch>()) };
        let Watch { event, callback } = *watch;
        let outcome = event.plugin.error(error, "finish asynchronous work");
        callback(outcome);
    }));
}

impl Drop for Owned {
    fn drop(&mut self) {
        let mut args = sys::EventDestroy::new();
        args.event = self.raw;
        // There is nobody to tell; the object is gone either way.
        let _ = self.plugin.call(&mut args);
    }
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").field("ready", &self.is_ready().ok()).finish()
    }
}
