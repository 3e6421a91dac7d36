//! Hashing and unpacking of an archive that may be hostile.

use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::error::io;
use super::{Job, Stage, WheelError};

const CHUNK: usize = 1 << 20;

/// What no honest wheel exceeds; a plugin unpacks to 0.5 GB and the largest CUDA library to 1 GB.
pub(super) struct Limits {
    pub(super) entries: usize,
    /// Sum of the unpacked sizes.
    pub(super) bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { entries: 100_000, bytes: 8 << 30 }
    }
}

/// sha256 in lower-case hexadecimal, and size in bytes, of a file.
pub(super) fn sha256(path: &Path, job: &mut Job<'_>) -> Result<(String, u64), WheelError> {
    let mut file = File::open(path).map_err(io("opening", path))?;
    let total = file.metadata().map_err(io("reading", path))?.len();
    let (mut hash, mut done) = (Sha256::new(), 0);
    let mut chunk = vec![0; CHUNK];
    loop {
        let n = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(io("reading", path)(error)),
        };
        hash.update(&chunk[..n]);
        done += n as u64;
        job.tick(Stage::Checking, done, Some(total))?;
    }
    Ok((hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(), done))
}

/// A name of an archive's entry as a path that stays below the folder it is unpacked to; `None` for an absolute
/// name, one with `.`, `..` or empty parts, and one that another system would read in another way.
pub(super) fn safe_path(name: &str) -> Option<PathBuf> {
    let name = name.strip_suffix('/').unwrap_or(name);
    if name.contains(['\\', ':', '\0']) || name.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return None;
    }
    let path = PathBuf::from(name);
    path.components().all(|part| matches!(part, Component::Normal(_))).then_some(path)
}

/// Unpacks every entry of `archive` into the empty folder `into`; nothing is ever written outside of it.
pub(super) fn unpack(archive: &Path, into: &Path, limits: &Limits, job: &mut Job<'_>) -> Result<(), WheelError> {
    let file_name = archive.file_name().unwrap_or_default().to_string_lossy();
    let refuse = |reason: String| WheelError::Archive { file: file_name.to_string(), reason };
    let file = File::open(archive).map_err(io("opening", archive))?;
    let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|e| refuse(e.to_string()))?;
    if zip.len() > limits.entries {
        return Err(refuse(format!("{} entries, at most {} are accepted", zip.len(), limits.entries)));
    }

    // First look at all, then write: a refused archive leaves nothing behind.
    let (mut total, mut paths) = (0u64, Vec::with_capacity(zip.len()));
    for index in 0..zip.len() {
        let entry = zip.by_index(index).map_err(|e| refuse(format!("entry {index}: {e}")))?;
        let name = String::from_utf8_lossy(entry.name_raw()).into_owned();
        if !entry.is_dir() && !is_regular(entry.unix_mode()) {
            return Err(refuse(format!("entry {name:?} is a link or a special file")));
        }
        let path = std::str::from_utf8(entry.name_raw()).ok().and_then(safe_path);
        paths.push(path.ok_or_else(|| refuse(format!("entry {name:?} would land outside of its folder")))?);
        total = total.saturating_add(entry.size());
    }
    if total > limits.bytes {
        return Err(refuse(format!("{total} bytes when unpacked, at most {} are accepted", limits.bytes)));
    }

    let (mut done, mut chunk) = (0u64, Vec::with_capacity(CHUNK));
    for (index, path) in paths.iter().enumerate() {
        let mut entry = zip.by_index(index).map_err(|e| refuse(format!("entry {index}: {e}")))?;
        let path = into.join(path);
        if entry.is_dir() {
            fs::create_dir_all(&path).map_err(io("creating", &path))?;
            continue;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io("creating", parent))?;
        }
        let mut out = match create(&path, entry.unix_mode()) {
            Ok(out) => out,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(refuse(format!("two entries are called {:?}", String::from_utf8_lossy(entry.name_raw()))));
            }
            Err(error) => return Err(io("creating", &path)(error)),
        };
        let (size, mut written) = (entry.size(), 0u64);
        loop {
            chunk.clear();
            let read = entry.by_ref().take(CHUNK as u64).read_to_end(&mut chunk);
            let n = read.map_err(|error| refuse(format!("entry {}: {error}", super::show(&paths[index]))))? as u64;
            written += n;
            if written > size || (n == 0 && written < size) {
                let name = super::show(&paths[index]);
                return Err(refuse(format!("entry {name} has {written} bytes, its header says {size}")));
            }
            if n == 0 {
                break;
            }
            out.write_all(&chunk).map_err(io("writing", &path))?;
            done += n;
            job.tick(Stage::Unpacking, done, Some(total))?;
        }
        out.sync_all().map_err(io("writing", &path))?;
    }
    Ok(())
}

/// Whether an entry's mode is that of an ordinary file; archives made elsewhere have no file type at all.
fn is_regular(mode: Option<u32>) -> bool {
    mode.is_none_or(|mode| matches!(mode & 0o170_000, 0 | 0o100_000))
}

/// Creates a new file, executable where the archive says so (the CUDA set holds programs that its plugin runs).
fn create(path: &Path, mode: Option<u32>) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(if mode.is_some_and(|mode| mode & 0o111 != 0) { 0o777 } else { 0o666 });
    }
    #[cfg(not(unix))]
    let _ = mode;
    options.open(path)
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Seek};

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    /// An archive in memory, made by `build`.
    fn archive(build: impl FnOnce(&mut ZipWriter<Cursor<Vec<u8>>>)) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        build(&mut zip);
        zip.finish().unwrap().into_inner()
    }

    fn add(zip: &mut ZipWriter<impl Write + Seek>, name: &str, data: &[u8]) {
        zip.start_file(name, SimpleFileOptions::default()).unwrap();
        zip.write_all(data).unwrap();
    }

    /// Unpacks `bytes`; returns the folder that was unpacked to, its parent and the outcome.
    fn unpacked(bytes: &[u8], limits: &Limits) -> (tempfile::TempDir, PathBuf, Result<(), WheelError>) {
        let root = tempfile::tempdir().unwrap();
        let (file, into) = (root.path().join("a.whl"), root.path().join("into"));
        fs::write(&file, bytes).unwrap();
        fs::create_dir(&into).unwrap();
        let mut job = Job { what: "a.whl", part: 1, parts: 1, cancel: None, report: &mut |_| {} };
        let outcome = unpack(&file, &into, limits, &mut job);
        (root, into, outcome)
    }

    fn refusal(bytes: &[u8], limits: &Limits) -> String {
        let (root, _, outcome) = unpacked(bytes, limits);
        let message = outcome.expect_err("must be refused").to_string();
        assert!(message.starts_with("a.whl is not a wheel that can be unpacked: "), "{message}");
        let beside: Vec<_> = fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(beside.len(), 2, "something was written outside: {beside:?}");
        message
    }

    /// `bytes` with every occurrence of one name replaced by another of the same length: archives that a writer
    /// would not make.
    fn renamed(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let places: Vec<_> = (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
        assert_eq!(places.len(), 2, "once in the local header, once in the directory");
        for place in places {
            bytes[place..place + to.len()].copy_from_slice(to);
        }
        bytes
    }

    #[test]
    fn files_folders_and_modes_arrive() {
        let bytes = archive(|zip| {
            zip.add_directory("pkg/empty/", SimpleFileOptions::default()).unwrap();
            add(zip, "pkg/data.bin", &[7; 3_000_000]);
            zip.start_file("pkg/bin/tool", SimpleFileOptions::default().unix_permissions(0o744)).unwrap();
            zip.write_all(b"#!").unwrap();
        });
        let (_root, into, outcome) = unpacked(&bytes, &Limits::default());
        outcome.unwrap();
        assert!(into.join("pkg/empty").is_dir());
        assert_eq!(fs::read(into.join("pkg/data.bin")).unwrap(), vec![7; 3_000_000]);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |name| fs::metadata(into.join(name)).unwrap().permissions().mode();
            assert_ne!(mode("pkg/bin/tool") & 0o100, 0);
            assert_eq!(mode("pkg/data.bin") & 0o111, 0);
        }
    }

    #[test]
    fn entries_that_would_leave_the_folder_are_refused() {
        for name in ["../evil", "/abs/ev", "a/../../", "a//evil", "./evil/", "c:/evil", "a\\..\\ev"] {
            let placeholder = "x".repeat(name.len());
            let bytes = renamed(archive(|zip| add(zip, &placeholder, b"")), placeholder.as_bytes(), name.as_bytes());
            let message = refusal(&bytes, &Limits::default());
            assert!(message.contains("outside of its folder"), "{name}: {message}");
        }
    }

    #[test]
    fn links_are_refused() {
        let bytes = archive(|zip| {
            zip.add_symlink("link", "/etc", SimpleFileOptions::default()).unwrap();
            add(zip, "link/passwd", b"x");
        });
        let message = refusal(&bytes, &Limits::default());
        assert!(message.contains("\"link\" is a link or a special file"), "{message}");
    }

    #[test]
    fn absurd_sizes_and_counts_are_refused_before_anything_is_written() {
        let bytes = archive(|zip| {
            add(zip, "a", &[0; 600]);
            add(zip, "b", &[0; 600]);
        });
        let message = refusal(&bytes, &Limits { entries: 10, bytes: 1000 });
        assert!(message.contains("1200 bytes when unpacked, at most 1000"), "{message}");
        let message = refusal(&bytes, &Limits { entries: 1, bytes: 10_000 });
        assert!(message.contains("2 entries, at most 1"), "{message}");
    }

    #[test]
    fn a_name_is_written_once() {
        let twice = archive(|zip| {
            add(zip, "first", b"1");
            add(zip, "other", b"2");
        });
        let (_root, into, outcome) = unpacked(&renamed(twice, b"other", b"first"), &Limits::default());
        outcome.unwrap();
        assert_eq!(fs::read(into.join("first")).unwrap(), b"2", "the last of equal names counts, as everywhere");

        let clash = archive(|zip| {
            zip.add_directory("a/", SimpleFileOptions::default()).unwrap();
            add(zip, "a", b"x");
        });
        let message = refusal(&clash, &Limits::default());
        assert!(message.contains("two entries are called \"a\""), "{message}");
    }

    #[test]
    fn damaged_archives_are_refused() {
        let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        let mut bytes = archive(|zip| {
            zip.start_file("a", stored).unwrap();
            zip.write_all(b"some bytes to damage").unwrap();
        });
        let place = bytes.windows(4).position(|w| w == b"some").unwrap();
        bytes[place] ^= 1;
        assert!(refusal(&bytes, &Limits::default()).contains("entry a: "));
        assert!(refusal(&bytes[..bytes.len() / 2], &Limits::default()).contains("a.whl"));
        assert!(refusal(b"<html>not found</html>", &Limits::default()).contains("a.whl"));
    }

    #[test]
    fn every_truncation_ends_in_an_error_or_the_whole_content() {
        let bytes = archive(|zip| add(zip, "a", b"0123456789"));
        for length in 0..bytes.len() {
            let (_root, _into, outcome) = unpacked(&bytes[..length], &Limits::default());
            assert!(outcome.is_err(), "{length} of {} bytes were accepted", bytes.len());
        }
    }
}
