//! Ctrl-C: long work that can stop cleanly asks for a flag; everything else ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Handles SIGINT, SIGTERM and SIGHUP for the process.
pub struct Interrupt {
    flag: Arc<AtomicBool>,
    waited_for: Arc<AtomicBool>,
}

/// While it lives, the first signal only raises the flag.
pub struct Guard<'a>(&'a Interrupt);

impl Interrupt {
    /// Installs the handler.
    pub fn install() -> anyhow::Result<Interrupt> {
        let interrupt = Interrupt { flag: Arc::default(), waited_for: Arc::default() };
        let (flag, waited_for) = (interrupt.flag.clone(), interrupt.waited_for.clone());
        ctrlc::set_handler(move || {
            let again = flag.swap(true, Ordering::SeqCst);
            if again || !waited_for.load(Ordering::SeqCst) {
                eprintln!("error: interrupted");
                // Other threads may be inside of a plugin: destroying its globals under them aborts the process.
                xla::pjrt::exit_at_once(1);
            }
        })?;
        Ok(interrupt)
    }

    /// From now on the flag is watched, until the guard is dropped.
    pub fn watch(&self) -> Guard<'_> {
        self.waited_for.store(true, Ordering::SeqCst);
        Guard(self)
    }

    /// The flag, for libraries that take one to keep.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.flag.clone()
    }
}

impl Guard<'_> {
    /// The flag that a signal raises.
    pub fn flag(&self) -> &AtomicBool {
        &self.0.flag
    }

    /// Lowers the flag: the signal has been answered.
    pub fn reset(&self) {
        self.0.flag.store(false, Ordering::SeqCst);
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.waited_for.store(false, Ordering::SeqCst);
    }
}
