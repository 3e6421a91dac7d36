//! Folders that are either whole or absent, with any number of processes at work and any of them killed.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::io;
use super::{Job, Stage, WheelError};

/// Written last inside a folder; its text says what the folder was made from.
pub(super) const STAMP: &str = ".complete";

/// How often a waiting process looks again.
pub(super) const POLL: Duration = Duration::from_millis(100);

/// Whether `folder` was completed from what `stamp` says and still holds `member`.
pub(super) fn is_complete(folder: &Path, stamp: &str, member: &str) -> bool {
    fs::read_to_string(folder.join(STAMP)).is_ok_and(|text| text.trim_end() == stamp) && folder.join(member).is_file()
}

/// Makes `<wheels>/<name>`: `fill(content, scratch)` puts the files into the empty folder `content` and may use
/// the folder `scratch` beside it; `content` then takes the final name in one step.
pub(super) fn publish(
    wheels: &Path,
    name: &str,
    stamp: &str,
    member: &str,
    job: &mut Job<'_>,
    fill: impl FnOnce(&Path, &Path, &mut Job<'_>) -> Result<(), WheelError>,
) -> Result<PathBuf, WheelError> {
    let folder = wheels.join(name);
    if is_complete(&folder, stamp, member) {
        return Ok(folder);
    }
    fs::create_dir_all(wheels).map_err(io("creating", wheels))?;
    let lock = lock(&wheels.join(format!(".{name}.lock")), job)?;
    if is_complete(&folder, stamp, member) {
        return Ok(folder);
    }
    let prefix = format!("{name}.partial-");
    if lock.is_some() {
        remove_leftovers(wheels, &prefix)?;
    }
    let staging =
        tempfile::Builder::new().prefix(&prefix).tempdir_in(wheels).map_err(io("creating a folder in", wheels))?;
    let [content, scratch] = ["content", "scratch"].map(|name| staging.path().join(name));
    for path in [&content, &scratch] {
        fs::create_dir(path).map_err(io("creating", path))?;
    }
    fill(&content, &scratch, job)?;

    // Everything is on the disk before the stamp is, and the stamp before the name.
    sync_folders(&content)?;
    let stamp_path = content.join(STAMP);
    fs::write(&stamp_path, format!("{stamp}\n")).map_err(io("writing", &stamp_path))?;
    for path in [&stamp_path, &content] {
        sync(path)?;
    }
    remove(&folder)?;
    match fs::rename(&content, &folder) {
        Ok(()) => sync(wheels)?,
        // Only where the file system has no locks: another process was faster.
        Err(_) if is_complete(&folder, stamp, member) => {}
        Err(error) => return Err(io("renaming the new folder to", &folder)(error)),
    }
    Ok(folder)
}

/// Takes the lock file, waiting for another process. `None` where the file system has no locks: the final rename
/// alone then decides between two processes.
fn lock(path: &Path, job: &mut Job<'_>) -> Result<Option<File>, WheelError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(io("opening the lock file", path))?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => {
                job.tick(Stage::Waiting, 0, None)?;
                std::thread::sleep(POLL);
            }
            Err(TryLockError::Error(error)) => {
                tracing::warn!("cannot lock {}: {error}; going on without", path.display());
                return Ok(None);
            }
        }
    }
}

/// Removes what interrupted runs left behind. The caller holds the lock, so nobody is at work there; a pip that
/// outlived its parent may still write, hence the second look.
fn remove_leftovers(wheels: &Path, prefix: &str) -> Result<(), WheelError> {
    for entry in fs::read_dir(wheels).map_err(io("reading", wheels))? {
        let entry = entry.map_err(io("reading", wheels))?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            let path = entry.path();
            fs::remove_dir_all(&path).or_else(|_| fs::remove_dir_all(&path)).map_err(io("removing", &path))?;
        }
    }
    Ok(())
}

/// Removes a folder under a final name: one of another pin or that lost files, or one that is not needed any more. The
/// stamp goes first, so that being killed here leaves nothing that looks whole.
pub(super) fn remove(folder: &Path) -> Result<(), WheelError> {
    if fs::symlink_metadata(folder).is_err() {
        return Ok(());
    }
    let _ = fs::remove_file(folder.join(STAMP));
    fs::remove_dir_all(folder).map_err(io("removing", folder))
}

/// Flushes the names in `folder` and below to the disk.
fn sync_folders(folder: &Path) -> Result<(), WheelError> {
    for entry in fs::read_dir(folder).map_err(io("reading", folder))? {
        let entry = entry.map_err(io("reading", folder))?;
        if entry.file_type().map_err(io("reading", folder))?.is_dir() {
            sync_folders(&entry.path())?;
        }
    }
    sync(folder)
}

fn sync(path: &Path) -> Result<(), WheelError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io("flushing to the disk", path))
}
