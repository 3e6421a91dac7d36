//! Pins the cache of executables: many writers at once leave whole entries, what was used last stays, and
//! `xllama cache` says and removes what there is.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use xla::DType;
use xla::graph::{Graph, Platform};
use xllama::runtime::exec_cache::{ExecutableCache, Freed, Header, Origin, Store, VARIABLE};
use xllama::runtime::{compile_options, device};

use crate::support::{Folder, Run, Tiny, finish, has_keys, keys, plugin, xllama};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const NO_LIMIT: u64 = u64::MAX;

/// A key that no program has.
fn key(n: usize) -> String {
    format!("{n:064x}")
}

fn header() -> Header {
    Header::of("module @test {\n  func.func public @main(%0: tensor<4xf32>", "cpu")
}

/// Makes the file as old as that.
fn age(path: &Path, age: Duration) {
    File::open(path).expect("there").set_modified(SystemTime::now() - age).expect("settable");
}

fn listed(store: &Store) -> Vec<String> {
    store.list().expect("readable").into_iter().map(|e| e.key).collect()
}

/// The text of a program that multiplies by `factor`.
fn program(name: &str, factor: i64) -> String {
    let g = Graph::new(name);
    let x = g.arg("x", DType::F32, &[4]);
    g.output("y", &(&x * factor));
    g.finish().expect("a graph").stablehlo()
}

/// `xllama bench` of the model with a cache of its own: its JSON says what was compiled and what came out.
fn bench(cache: &Path, model: &str, limit: Option<&str>) -> Command {
    let mut command = xllama();
    command.env("XLLAMA_CACHE", cache).env_remove(VARIABLE).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.args(["bench", "--prompt-tokens", "4", "--gen-tokens", "3", "--repeat", "1", "--json", "--model", model]);
    if let Some(limit) = limit {
        command.env(VARIABLE, limit);
    }
    command
}

fn end(child: Child) -> Run {
    let output = child.wait_with_output().expect("it ends");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    Run { code: output.status.code(), stdout: output.stdout, stderr }
}

/// Several of them at once; all must say the same. The tokens.
fn benches_at_once(cache: &Path, model: &str, limit: Option<&str>) -> Value {
    let children: Vec<Child> = (0..4).map(|_| bench(cache, model, limit).spawn().expect("it starts")).collect();
    let runs: Vec<Run> = children.into_iter().map(end).collect();
    let tokens: Vec<Value> = runs.iter().map(|run| run.json()["first_tokens"].clone()).collect();
    assert!(tokens.iter().all(|t| *t == tokens[0]), "{tokens:?}");
    for run in runs {
        assert!(!run.stderr.contains("WARN"), "{}", run.stderr);
    }
    tokens[0].clone()
}

/// `xllama cache ARGS`.
fn cache(folder: &Path, args: &[&str]) -> Run {
    finish(xllama().env("XLLAMA_CACHE", folder).env_remove(VARIABLE).arg("cache").args(args))
}

#[test]
fn threads_that_want_the_same_programs_at_once() {
    let folder = Folder::new();
    let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
    let options = compile_options(Platform::Cpu);
    let cached = ExecutableCache::new(Some(folder.path("e")), &plugin, &client);
    let texts = [program("double", 2), program("triple", 3)];
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for text in texts.iter().cycle().take(8) {
            scope.spawn(|| {
                start.wait();
                cached.get(&client, text, &options).expect("compiled or loaded")
            });
        }
    });
    assert_eq!(fs::read_dir(folder.path("e")).expect("a folder").count(), 2, "leftovers");
    for text in &texts {
        assert_eq!(cached.get(&client, text, &options).expect("loaded").1, Origin::Cached);
    }
    let store = Store::new(folder.path("e"));
    let headers: Vec<Header> = store.list().expect("readable").into_iter().filter_map(|e| e.header).collect();
    let programs: BTreeSet<&str> = headers.iter().map(|h| h.program.as_str()).collect();
    assert_eq!(programs, BTreeSet::from(["double", "triple"]));
    assert!(headers.iter().all(|h| h.argument == "4xf32" && h.platform == client.platform_name()), "{headers:?}");
}

#[test]
fn loading_counts_as_a_use() {
    let folder = Folder::new();
    let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
    let options = compile_options(Platform::Cpu);
    let cached = ExecutableCache::new(Some(folder.path("e")), &plugin, &client);
    let store = Store::new(folder.path("e"));
    let first = program("first", 2);
    assert_eq!(cached.get(&client, &first, &options).expect("compiled").1, Origin::Compiled);
    let first_key = listed(&store).remove(0);
    cached.get(&client, &program("second", 2), &options).expect("compiled");
    for key in listed(&store) {
        age(&store.path(&key), if key == first_key { 2 * DAY } else { DAY });
    }
    assert_eq!(listed(&store)[1], first_key);
    assert_eq!(cached.get(&client, &first, &options).expect("loaded").1, Origin::Cached);
    assert_eq!(listed(&store)[0], first_key);
}

#[test]
fn processes_that_want_the_same_programs_at_once() {
    let folder = Tiny::random().folder();
    let tokens = benches_at_once(&folder.path("cache"), &folder.model(), None);
    let store = Store::new(folder.path("cache/executables"));
    let entries = store.list().expect("readable");
    assert!(entries.len() >= 2 && entries.iter().all(|e| e.header.is_some()), "{entries:?}");
    assert_eq!(fs::read_dir(store.folder()).expect("a folder").count(), entries.len(), "leftovers");

    let again = finish(&mut bench(&folder.path("cache"), &folder.model(), None)).json();
    assert_eq!((&again["compile_was_cached"], &again["first_tokens"]), (&Value::Bool(true), &tokens));
}

#[test]
fn processes_that_evict_from_each_other() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let tokens = benches_at_once(&folder.path("cache"), &model, Some("1"));
    let alone = finish(&mut bench(&folder.path("other"), &model, None)).json();
    assert_eq!(alone["first_tokens"], tokens);
    // A limit below any program's size keeps the last one stored at most.
    let left = fs::read_dir(folder.path("cache/executables")).expect("a folder").count();
    assert!(left <= 1, "{left} entries");
}

#[test]
fn readers_and_evicting_writers_never_see_a_part_of_an_entry() {
    let folder = Folder::new();
    let store = Store::new(folder.path("e"));
    let body = vec![7; 100_000];
    let seen: usize = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|w| {
                let (store, body) = (&store, &body);
                scope.spawn(move || {
                    (0..25).for_each(|i| store.put(&key((w + i) % 6), &header(), body, 350_000).expect("stored"))
                })
            })
            .collect();
        let mut seen = 0;
        while writers.iter().any(|w| !w.is_finished()) {
            for entry in store.list().expect("readable") {
                assert!(entry.header.is_some() && entry.bytes > 100_000, "{entry:?}");
                seen += 1;
            }
        }
        seen
    });
    assert!(seen > 0);
    assert!((1..=3).contains(&listed(&store).len()), "{:?}", listed(&store));
}

#[test]
fn the_least_recently_used_go_first() {
    let folder = Folder::new();
    let store = Store::new(folder.path("e"));
    let put = |n: usize, bytes: usize, limit: u64| store.put(&key(n), &header(), &vec![0; bytes], limit);
    for n in 0..4 {
        put(n, 10_000, NO_LIMIT).expect("stored");
    }
    for (n, days) in [(0, 2), (1, 4), (2, 1), (3, 3)] {
        age(&store.path(&key(n)), days * DAY);
    }
    // Three and the new one fit.
    put(4, 10_000, 45_000).expect("stored");
    assert_eq!(listed(&store), [4, 2, 0, 3].map(key));
    // Stored again, an entry counts once, as the last used.
    put(3, 10_000, 45_000).expect("stored");
    assert_eq!(listed(&store), [3, 4, 2, 0].map(key));
    // One that exceeds the limit alone is kept until the next, in the place of all others.
    put(5, 50_000, 45_000).expect("stored");
    assert_eq!(listed(&store), [key(5)]);
    put(6, 10_000, 45_000).expect("stored");
    assert_eq!(listed(&store), [key(6)]);
}

#[test]
fn leftovers_go_and_files_of_others_stay() {
    let folder = Folder::new();
    let store = Store::new(folder.path("e"));
    fs::create_dir(store.folder()).expect("new");
    let foreign = format!("{}.v3", key(1));
    for name in [&key(0), ".tmpOld", ".tmpNew", "notes.txt", &foreign] {
        fs::write(store.folder().join(name), "x").expect("writable");
    }
    fs::create_dir(store.path(&key(3))).expect("new");
    age(&store.folder().join(".tmpOld"), 2 * DAY);
    age(&store.folder().join("notes.txt"), 2 * DAY);
    assert_eq!(listed(&store), [key(0)], "an entry of the first version");

    store.put(&key(2), &header(), b"body", NO_LIMIT).expect("stored");
    let names = || -> BTreeSet<String> {
        let entries = fs::read_dir(store.folder()).expect("a folder");
        entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    };
    let kept = [".tmpNew".into(), "notes.txt".into(), foreign, format!("{}.v2", key(3))];
    let entry = format!("{}.v2", key(2));
    assert_eq!(names(), BTreeSet::from_iter(kept.iter().cloned().chain([entry])));
    assert_eq!(store.clear(Duration::ZERO).expect("cleared").removed, 1);
    assert_eq!(names(), BTreeSet::from(kept));
}

#[test]
fn an_eviction_that_somebody_else_holds_up_is_left_to_the_next() {
    let folder = Folder::new();
    let store = Store::new(folder.path("e"));
    store.put(&key(0), &header(), &[0; 1000], NO_LIMIT).expect("stored");
    let held = File::open(store.folder()).expect("there");
    held.lock().expect("free");
    store.put(&key(1), &header(), &[0; 1000], 1).expect("stored, without waiting for ever");
    assert_eq!(listed(&store), [1, 0].map(key));
    drop(held);
    store.put(&key(2), &header(), &[0; 1000], 1).expect("stored");
    assert_eq!(listed(&store), [key(2)]);
}

#[test]
fn clearing_what_was_not_used_for_long() {
    let folder = Folder::new();
    let store = Store::new(folder.path("e"));
    assert_eq!(store.clear(Duration::ZERO).expect("an empty cache"), Freed::default());
    (0..3).for_each(|n| store.put(&key(n), &header(), &[0; 1000], NO_LIMIT).expect("stored"));
    age(&store.path(&key(0)), 9 * DAY);
    age(&store.path(&key(1)), 3 * DAY);
    let bytes = fs::metadata(store.path(&key(0))).expect("there").len();
    assert_eq!(store.clear(5 * DAY).expect("cleared"), Freed { removed: 1, bytes });
    assert_eq!(listed(&store), [2, 1].map(key));
    assert_eq!(store.clear(Duration::ZERO).expect("cleared"), Freed { removed: 2, bytes: 2 * bytes });
}

#[test]
fn the_command_lists_and_clears() {
    let folder = Tiny::random().folder();
    let home = folder.path("cache");
    let empty = cache(&home, &["list", "--json"]).json();
    assert_eq!((empty["bytes"].as_u64(), empty["entries"].as_array().map(Vec::len)), (Some(0), Some(0)));
    assert!(!home.exists(), "looking makes no folder");

    finish(&mut bench(&home, &folder.model(), None)).ok();
    let list = cache(&home, &["list", "--json"]).json();
    assert_eq!(keys(&list), ["bytes", "entries", "folder", "limit"]);
    assert_eq!(list["limit"], 4u64 << 30);
    assert_eq!(list["folder"].as_str().map(Path::new), Some(&*home.join("executables")));
    let entries = list["entries"].as_array().expect("rows");
    let mut bytes = 0;
    for entry in entries {
        has_keys(entry, &["key", "program", "platform", "bytes", "created", "used"]);
        let key = entry["key"].as_str().expect("text");
        let file = fs::metadata(home.join(format!("executables/{key}.v2"))).expect("a file of that key");
        assert_eq!(entry["bytes"], file.len());
        bytes += file.len();
        let (created, used) = (entry["created"].as_str().expect("a time"), entry["used"].as_str().expect("a time"));
        assert!(created <= used && used.starts_with("20") && used.ends_with('Z'), "{created} {used}");
    }
    assert_eq!(list["bytes"], bytes);
    let programs: BTreeSet<&str> = entries.iter().filter_map(|e| e["program"].as_str()).collect();
    assert!(programs.is_superset(&BTreeSet::from(["decode", "prefill"])), "{programs:?}");

    let table = cache(&home, &["list"]);
    let lines: Vec<&str> = table.ok().lines().collect();
    assert_eq!(lines.len(), entries.len() + 3);
    let column = lines[0].find("key").expect("a column");
    for (line, entry) in lines[2..].iter().zip(entries) {
        assert_eq!(line.get(column..), entry["key"].as_str().map(|key| &key[..12]), "{line}");
    }

    let none = cache(&home, &["clear", "--older-than", "1", "--json"]).json();
    assert_eq!((none["removed"].as_u64(), none["bytes"].as_u64()), (Some(0), Some(0)));
    let freed = cache(&home, &["clear", "--json"]).json();
    assert_eq!((freed["removed"].as_u64(), freed["bytes"].as_u64()), (Some(entries.len() as u64), Some(bytes)));
    assert_eq!(fs::read_dir(home.join("executables")).expect("a folder").count(), 0);
    assert!(cache(&home, &["clear"]).ok().starts_with("removed 0 compiled programs"));
}

#[test]
fn the_limit_is_a_variable() {
    let folder = Tiny::random().folder();
    let home = folder.path("cache");
    finish(&mut bench(&home, &folder.model(), Some("0"))).ok();
    assert!(!home.join("executables").exists(), "nothing is stored");
    for (text, bytes) in [("0", 0), ("1000", 1000), ("512MiB", 512 << 20), ("2GiB", 2u64 << 30)] {
        let list = finish(xllama().env("XLLAMA_CACHE", &home).env(VARIABLE, text).args(["cache", "list", "--json"]));
        assert_eq!(list.json()["limit"], bytes, "{text}");
    }
    for text in ["", "much", "-1", "4 GiB", "1e9"] {
        let parts = [VARIABLE, "512MiB", &format!("{text:?}")];
        finish(xllama().env(VARIABLE, text).args(["cache", "list"])).fails(1, &parts);
        finish(&mut bench(&home, &folder.model(), Some(text))).fails(1, &parts);
    }
}
