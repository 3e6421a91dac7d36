//! The end of a process while a plugin is at work.

/// Ends the process without running the destructors of loaded libraries. A plugin's threads may be at work, and where
/// [`std::process::exit`] destroys the globals that they use, the process ends with a signal instead of `code`.
pub fn exit_at_once(code: i32) -> ! {
    // SAFETY: `_exit` takes any number, touches no memory of this process and does not return.
    unsafe { libc::_exit(code) }
}
