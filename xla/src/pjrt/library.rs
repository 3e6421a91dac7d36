//! Opening a shared library, with a reason a user can act on where that fails.

use super::error::Error;
use super::sys::Api;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW, Symbol};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Opens `path` and returns what its `GetPjrtApi` gives. The library is never closed.
///
/// # Errors
/// A missing or unreadable file, a file that is no shared library of this machine, one whose own dependencies are
/// missing, or one without a usable `GetPjrtApi`.
pub(super) fn open(path: &Path) -> Result<*const Api, Error> {
    check_file(path).map_err(|reason| Error::Open { path: path.to_owned(), reason })?;
    // SAFETY: opening a library runs its initialisers. That the user names a library that is sane to run is the
    // premise of a plugin; the checks above only sort out files that are none.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }
        .map_err(|e| Error::Open { path: path.to_owned(), reason: loader_message(&e) })?;
    let not_a_plugin = |reason: &str| Error::NotAPlugin { path: path.to_owned(), reason: reason.to_owned() };
    // SAFETY: every PJRT plugin exports this symbol with this type.
    let get_api: Symbol<unsafe extern "C" fn() -> *const Api> =
        unsafe { library.get(b"GetPjrtApi\0") }.map_err(|_| not_a_plugin("it exports no function GetPjrtApi"))?;
    // SAFETY: the function takes nothing and returns a pointer to a static table.
    let api = unsafe { get_api() };
    // The table and every callback that the plugin hands out point into the library, so it stays open for good.
    std::mem::forget(library);
    if api.is_null() {
        return Err(not_a_plugin("its GetPjrtApi returned null"));
    }
    // SAFETY: not null, so it points to a table that begins with its own size.
    let size = unsafe { (*api).struct_size };
    if size < size_of::<Api>() {
        return Err(not_a_plugin(&format!("its function table has only {size} bytes")));
    }
    Ok(api)
}

/// The message of the dynamic loader without the library's own prefix.
fn loader_message(error: &libloading::Error) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    source.unwrap_or_else(|| error.to_string())
}

/// What is wrong with the file, read from its first bytes, before the loader is asked.
fn check_file(path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
        _ => e.to_string(),
    })?;
    if metadata.is_dir() {
        return Err("it is a folder; give the .so file inside it".to_owned());
    }
    let mut head = [0u8; 20];
    let found = File::open(path).and_then(|mut f| f.read(&mut head)).map_err(|e| e.to_string())?;
    if found < head.len() || !head.starts_with(b"\x7fELF") {
        return Err("it is not a shared library (no ELF header)".to_owned());
    }
    let (class, machine) = (head[4], u16::from_le_bytes([head[18], head[19]]));
    let here = this_machine();
    if class != 2 || here.is_some_and(|(code, _)| code != machine) {
        let there = match (class, machine) {
            (_, 62) => "x86_64".to_owned(),
            (_, 183) => "aarch64".to_owned(),
            (1, code) => format!("a 32-bit machine (ELF machine {code})"),
            (_, code) => format!("ELF machine {code}"),
        };
        let here = here.map_or(std::env::consts::ARCH, |(_, name)| name);
        return Err(format!("it is built for {there} and this machine is {here}; install the build for {here}"));
    }
    Ok(())
}

/// The ELF code and name of the machine this program is built for, where known.
fn this_machine() -> Option<(u16, &'static str)> {
    match std::env::consts::ARCH {
        "x86_64" => Some((62, "x86_64")),
        "aarch64" => Some((183, "aarch64")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(name: &str, content: &[u8]) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        open(&path).unwrap_err().to_string()
    }

    /// The first bytes of an ELF file for a machine.
    fn elf(class: u8, machine: u16) -> Vec<u8> {
        let mut bytes = b"\x7fELF".to_vec();
        bytes.extend([class, 1, 1, 0]);
        bytes.resize(16, 0);
        bytes.extend(3u16.to_le_bytes());
        bytes.extend(machine.to_le_bytes());
        bytes.resize(64, 0);
        bytes
    }

    #[test]
    fn what_is_no_plugin_is_said_plainly() {
        let missing = open(Path::new("/no/such/plugin.so")).unwrap_err().to_string();
        assert_eq!(missing, "cannot open the PJRT plugin /no/such/plugin.so: there is no such file");
        assert!(open(Path::new("/")).unwrap_err().to_string().contains("it is a folder"));
        for content in [&b""[..], b"#!/bin/sh\necho a script of some length\n"] {
            let text = reason("plugin.so", content);
            assert!(text.ends_with("it is not a shared library (no ELF header)"), "{text}");
        }
        let other = if cfg!(target_arch = "x86_64") { ("aarch64", 183) } else { ("x86_64", 62) };
        let text = reason("plugin.so", &elf(2, other.1));
        assert!(text.contains(&format!("it is built for {} and this machine is", other.0)), "{text}");
        let text = reason("plugin.so", &elf(1, 3));
        assert!(text.contains("a 32-bit machine"), "{text}");
        // The right machine, but nothing behind the header: the loader's own words.
        let here = if cfg!(target_arch = "x86_64") { 62 } else { 183 };
        assert!(reason("plugin.so", &elf(2, here)).starts_with("cannot open the PJRT plugin"));
    }

    #[test]
    fn a_library_that_is_no_plugin() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc = maps.lines().filter_map(|l| l.split_whitespace().nth(5)).find(|p| p.contains("libc.so")).unwrap();
        let error = open(Path::new(libc)).unwrap_err();
        assert!(matches!(error, Error::NotAPlugin { .. }));
        assert!(error.to_string().ends_with("is not a PJRT plugin: it exports no function GetPjrtApi"), "{error}");
    }
}
