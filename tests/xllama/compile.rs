//! Pins compiling for what is not there: what the report holds, that a program which does not fit is a report, that an
//! executable loads where it was compiled for and nowhere else, and the structure of the program that the TPU compiler
//! makes: a change that adds a collective, a loop or a copy of the cache fails here.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use converter::Checkpoint;
use serde_json::Value;
use xla::DType;
use xla::graph::{Emission, Platform};
use xla::wheel::{self, FetchOptions, PluginKind};
use xllama::compile::chips::CHIPS;
use xllama::compile::{ExecutableFile, Job, Step};
use xllama::runtime::{CacheOptions, device, register_kernels};
use xllama::sharding::MeshShape;

use crate::support::{Folder, Tiny, finish, has_keys, keys, plugin, repository, run, xllama};

/// libtpu: the file that `XLA_TEST_LIBTPU` names, else the build of the table, installed when first needed.
fn libtpu() -> &'static str {
    static PLUGIN: OnceLock<String> = OnceLock::new();
    PLUGIN.get_or_init(|| {
        let named = std::env::var_os("XLA_TEST_LIBTPU").map(PathBuf::from);
        let path = named.unwrap_or_else(|| {
            let build = wheel::default_build(PluginKind::Tpu).expect("a TPU build for this machine");
            wheel::install(build, &FetchOptions::default(), &mut |_| ()).expect("libtpu")
        });
        path.to_str().expect("UTF-8").to_string()
    })
}

/// The report of `xllama compile ARGS` through libtpu.
fn tpu(target: &str, args: &[&str]) -> Value {
    run(["compile", "--json", "--device", libtpu(), "--target", target].iter().chain(args)).json()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key}: {value}"))
}

#[test]
fn json_of_compile() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let args = ["compile", "--target", "cpux2", "--model", &model, "--batch", "3", "--max-seq", "256"];
    let report = run(args.iter().chain(&["--json"])).json();
    has_keys(
        &report,
        &["ok", "target", "devices", "compile_s", "per_device", "flops", "bytes_accessed", "collectives"],
    );
    let memory = &report["per_device"];
    has_keys(memory, &["arguments", "outputs", "aliased", "temporaries", "code", "total", "limit", "fits"]);
    assert_eq!((&report["ok"], &report["devices"], &report["mesh"]), (&true.into(), &2.into(), &"model=2".into()));
    // k and v of one layer: 3 slots, one of the two heads, 256 positions of 6 in float32.
    assert_eq!(number(memory, "cache"), 2 * 3 * 256 * 6 * 4);
    assert!(number(memory, "aliased") >= number(memory, "cache"), "{memory}");
    assert!(number(memory, "arguments") >= number(memory, "weights") + number(memory, "cache"));
    assert!(number(&report["collectives"], "all-reduce") >= 2, "{report}");
    // For people, a table.
    let table = run(args);
    for part in ["arguments", "aliased", "total", "2 devices", "3 slots", "all-reduce"] {
        assert!(table.ok().contains(part), "{part}: {}", table.text());
    }
}

#[test]
fn json_of_a_sweep() {
    let folder = Tiny::random().folder();
    let report =
        run(["compile", "--target", "cpux2", "--model", &folder.model(), "--max-seq", "256", "--json", "--sweep"]
            .iter()
            .chain(&["--sweep-batch", "1,2"]))
        .json();
    let rows = report["rows"].as_array().expect("rows");
    let pairs: Vec<(&str, u64)> =
        rows.iter().map(|row| (row["mesh"].as_str().expect("a mesh"), number(row, "batch"))).collect();
    assert_eq!(pairs, [("model=2", 1), ("model=2", 2), ("fsdp=2", 2), ("data=2", 2)]);
    assert_eq!(keys(&rows[0]), keys(&rows[3]));
    // fsdp keeps half of the parameters on a device, data all of them.
    assert!(number(&rows[2], "arguments") < number(&rows[3], "arguments"));
}

#[test]
fn what_cannot_be_compiled_is_said_at_once() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let compile = |args: &[&str]| run(["compile", "--model", &model].iter().chain(args));
    for target in ["h300", "v5e", "v5e:0x4", "h200x0", "gpu", "banana:2x2"] {
        compile(&["--target", target]).fails(2, &["--target", target, "v5e:2x4", "tpu7x", "b200", "cpu"]);
    }
    compile(&["--target", "none.textproto"]).fails(1, &["none.textproto"]);
    compile(&["--target", "cpux2", "--mesh", "fsdp=4"])
        .fails(2, &["fsdp=4", "4 devices", "2 devices", "model=2", "data=2"]);
    compile(&["--target", "cpu", "--mesh", "model=3"]).fails(2, &["model=3", "4 query heads"]);
    compile(&["--target", "cpu", "--max-seq", "5000"]).fails(2, &["--max-seq", "5000", "4096"]);
    compile(&["--target", "cpu", "--layers", "2"]).fails(2, &["--layers", "1 to 1", "found 2"]);
    compile(&["--target", "cpu", "--program", "fly"]).fails(2, &[]);
    compile(&["--target", "cpu", "--sweep", "--mesh", "model=1"]).fails(2, &[]);
    compile(&["--target", "cpu", "--out", "/none/such/file"]).fails(1, &["/none/such"]);
    run(["compile", "--target", "cpu", "--model", "llama-4-8t"])
        .fails(1, &["llama-4-8t", "llama-3.1-405b", "qwen3-8b"]);
    run(["compile", "--model", "llama-2-7b"]).fails(2, &[]);
}

#[test]
fn an_executable_loads_where_it_was_compiled_for() {
    let folder = Tiny::random().folder();
    let (model, out) = (folder.model(), folder.arg("decode.program"));
    let args =
        ["compile", "--target", "cpu", "--model", &model, "--batch", "2", "--max-seq", "256", "--json", "-o", &out];
    let report = run(args).json();
    assert_eq!(number(&report, "out_bytes"), std::fs::metadata(&out).expect("a file").len());
    assert_eq!(folder.names(), ["decode.program", "model"]);

    let file = ExecutableFile::open(Path::new(&out)).expect("a program");
    assert_eq!((&file.header()["step"], &file.header()["batch"]), (&"decode".into(), &2.into()));
    let checkpoint = Checkpoint::open(Path::new(&model)).expect("a checkpoint");
    let (_, client) = device::open(plugin(), 1).expect("the plugin opens");
    let program = |batch: usize| {
        let job = Job {
            model: "tiny",
            cfg: checkpoint.config(),
            params: checkpoint.params(),
            precision: DType::F32.into(),
            step: Step::Decode,
            batch,
            len: 256,
            cache: CacheOptions::default(),
            mesh: MeshShape::default(),
            partitioner: Emission::Shardy,
            platform: Platform::Cpu,
            kernels: register_kernels(client.plugin()),
        };
        job.prepare().expect("it builds")
    };
    let same = program(2);
    let loaded = file.load(&client, 1, &same.text, &same.options).expect("the same program");
    assert!(loaded.num_outputs().expect("known") > 2);
    let other = program(3);
    let error = file.load(&client, 1, &other.text, &other.options).expect_err("another program").to_string();
    assert!(error.contains("decode.program") && error.contains("batch 2") && error.contains("sha256"), "{error}");
    let (_, two) = device::open(plugin(), 2).expect("two devices");
    let error = file.load(&two, 2, &same.text, &same.options).expect_err("other devices").to_string();
    assert!(error.contains("1 × cpu") && error.contains("2 × cpu"), "{error}");
}

/// Programs from files give what compiling here gives, on one device and on a mesh, and nothing is compiled in their place.
#[test]
fn generate_runs_programs_from_files() {
    let source = Tiny::random().folder();
    let model = source.model();
    for (target, mesh) in [("cpu", "model=1"), ("cpux2", "model=2")] {
        let folder = Folder::new();
        let file = |name: &str, more: &[&str]| {
            let out = folder.arg(name);
            let args =
                ["compile", "--target", target, "--mesh", mesh, "--model", &model, "--max-seq", "128", "-o", &out];
            run(args.iter().chain(more)).ok();
            out
        };
        let decode = file("decode", &[]);
        let prefill = file("prefill", &["--program", "prefill", "--prompt-tokens", "24"]);
        let usual = ["generate", "", "--model", &model, "--mesh", mesh, "--max-tokens", "30", "--json"];
        let wanted = run(usual).json();
        // A folder for executables of its own: what is compiled lands there.
        let cache = folder.path("cache");
        let given = finish(xllama().env("XLLAMA_CACHE", &cache).args(usual).args([
            "--executable",
            &decode,
            "--executable",
            &prefill,
        ]));
        assert_eq!(given.json()["tokens"], wanted["tokens"], "{mesh}");
        let compiled = std::fs::read_dir(cache.join("executables")).map_or(0, |entries| entries.count());
        assert_eq!(compiled, 1, "{mesh}: only the program that makes the cache is compiled");

        let other = if mesh == "model=1" { "model=2" } else { "model=1" };
        let args = ["generate", "", "--model", &model, "--mesh", other, "--executable", &decode];
        run(args).fails(1, &["decode", "compile it for what is there"]);
        run(usual.iter().chain(&["--executable", &decode, "--temperature", "0.5"])).fails(2, &["--temperature 0"]);
    }
    run(["generate", "", "--model", &model, "--executable", &model]).fails(1, &[&model]);
    let json = model.clone() + "/config.json";
    run(["generate", "", "--model", &model, "--executable", &json]).fails(1, &["not a program of xllama"]);
}

/// Where there is no TPU, libtpu says so at once; it is not left to look for one.
#[test]
fn libtpu_runs_nothing_where_there_is_no_tpu() {
    let (folder, started) = (Tiny::random().folder(), Instant::now());
    run(["generate", "", "--model", &folder.model(), "--device", libtpu()])
        .fails(1, &["no TPU", "compile --target", "XLA_ON_TPU_VM=1"]);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

#[test]
fn the_figures_in_the_documentation_are_those_of_the_program() {
    let text = std::fs::read_to_string(repository("docs/compile.md")).expect("readable");
    for chip in CHIPS {
        let cells = text.lines().map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
        let is_row = |row: &Vec<&str>| row.len() == 8 && row[1].split(',').next() == Some(chip.name);
        let row = cells.into_iter().find(is_row).unwrap_or_else(|| panic!("{} is not in the table", chip.name));
        let (amount, unit) = row[2].split_once(' ').expect("an amount of memory");
        let unit = if unit == "GiB" { (1u64 << 30) as f64 } else { 1e9 };
        let cell = |at: usize, scale: f64| row[at].parse::<f64>().ok().map(|n| n * scale);
        assert_eq!(amount.parse::<f64>().ok().map(|n| n * unit), Some(chip.hbm_bytes as f64), "{}", chip.name);
        assert_eq!(cell(3, 1e9), Some(chip.hbm_bandwidth), "{}", chip.name);
        assert_eq!(cell(4, 1e12), Some(chip.peak.bf16), "{}", chip.name);
        assert_eq!(cell(5, 1e9), chip.clock, "{}", chip.name);
        assert_eq!(cell(6, 1e9), Some(chip.links), "{}", chip.name);
    }
}

#[test]
fn decode_of_llama_2_on_tpu_has_the_structure_that_it_should() {
    let layers = 2;
    let report = tpu(
        "v5e:2x4",
        &["--model", "llama-2-7b", "--layers", "2", "--batch", "8", "--max-seq", "2048", "--costs", "9"],
    );
    let memory = &report["per_device"];
    assert_eq!((&report["ok"], &report["devices"], &report["mesh"]), (&true.into(), &8.into(), &"model=8".into()));
    // k and v of two layers: 8 slots, 4 of 32 heads, 2048 positions of 128 in bf16.
    let cache = layers * 2 * 8 * 4 * 2048 * 128 * 2;
    assert_eq!(number(memory, "cache"), cache);
    assert!(number(memory, "aliased") >= cache, "the cache is not donated: {memory}");
    let arguments = (number(memory, "weights") + cache) as f64;
    assert!((number(memory, "arguments") as f64 / arguments - 1.0).abs() < 0.02, "{memory}");
    assert!(number(memory, "temporaries") <= 64_000_000, "{memory}");
    assert_eq!(number(&report, "loops"), 0, "a loop: {report}");
    assert_eq!(number(&report, "copied_bytes"), 0, "a copy inside the memory: {report}");
    // Two sums a layer, and what the embedding and the choice of a token need; nothing as large as a weight is gathered.
    let sums = number(&report["collectives"], "all-reduce");
    assert!((2 * layers..=2 * layers + 2).contains(&sums), "{}", report["largest_collectives"]);
    let gathered = report["collective_bytes"]["all-gather"].as_u64().unwrap_or(0);
    assert!(gathered < 1 << 20, "{}", report["collective_bytes"]);
    assert!(number(&report, "cycles") > 0 && report["estimate"]["tok_s"].as_f64() > Some(0.0), "{report}");
}

/// The embedding, which is the head too, is the largest of all: a step looks up rows of its parts, and sums partial logits.
#[test]
fn a_step_under_fsdp_gathers_layers_and_no_table() {
    let size =
        ["--model", "llama-3.2-1b", "--layers", "1", "--mesh", "fsdp=4", "--target", "cpux4", "--max-seq", "128"];
    let (m, vocab) = (2048, 128_256);
    let layer = 2 * m * m + 2 * m * 512 + 3 * m * 8192;
    for program in ["decode", "prefill"] {
        let report =
            run(["compile", "--program", program, "--prompt-tokens", "64", "--json"].iter().chain(&size)).json();
        let bytes = &report["collective_bytes"];
        let gathered = number(bytes, "all-gather");
        assert!(gathered >= 4 * layer && gathered < 4 * layer * 101 / 100, "{program}: {layer}: {bytes}");
        assert!(
            number(bytes, "all-reduce") >= 4 * vocab && number(bytes, "all-reduce") < 5 * vocab,
            "{program}: {bytes}"
        );
    }
}

/// A device has its part of parameters and state, gathers parameters layer by layer, and gradients are summed to parts at once: no
/// sum of a whole gradient. Of large products libtpu makes rings, so that the sums go on beside the multiplication.
#[test]
fn training_under_fsdp_has_no_whole_gradient() {
    let size = ["--model", "llama-2-7b", "--layers", "2", "--prompt-tokens", "128", "--mesh", "fsdp=8"];
    let report = tpu("v5e:2x4", &[&size[..], &["--program", "train", "--save", "nothing"]].concat());
    let memory = &report["per_device"];
    let parameters = 2 * (4 * 4096 * 4096 + 3 * 4096 * 11_008 + 2 * 4096) + 2 * 32_000 * 4096 + 4096;
    assert_eq!((&report["ok"], number(memory, "weights")), (&true.into(), 4 * parameters / 8), "{memory}");
    assert_eq!(number(memory, "state"), 8 * parameters / 8, "{memory}");
    assert!(number(memory, "aliased") >= 12 * parameters / 8, "parameters and state are not donated: {memory}");
    let bytes = &report["collective_bytes"];
    let of = |kind: &str| bytes[kind].as_u64().unwrap_or(0);
    assert!(of("all-reduce") < 1 << 20, "{bytes}");
    // bf16: what each layer has and the two tables, gathered forwards, and the layers' backwards.
    assert!(of("all-gather") >= 2 * parameters, "{bytes}");
    // Of the embedding devices exchange the rows that were looked up.
    let summed = parameters - 32_000 * 4096;
    assert!(of("reduce-scatter") + of("collective-permute") >= 2 * summed / 8, "{bytes}");
    assert!(report["utilization"].as_f64().is_some_and(|part| part > 0.0 && part < 1.0), "{report}");
}

#[test]
fn a_training_step_is_no_program_to_write() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("train.program");
    let train = ["compile", "--target", "cpu", "--model", "llama-2-7b", "--layers", "1", "--program", "train"];
    let with = |more: &[&str]| run(train.iter().chain(more));
    with(&["-o", out.to_str().expect("UTF-8")]).fails(2, &["--out", "a training step is none"]);
    with(&["--batch", "3", "--microbatches", "2"]).fails(2, &["--microbatches", "3 texts", "as many parts"]);
}

/// What the codes stand for never lies in memory: floats are made of them inside of the products.
#[test]
fn integers_stay_integers_on_a_tpu() {
    for dtype in ["int8", "int4"] {
        let model = ["--model", "llama-3.1-8b", "--layers", "2", "--batch", "8", "--max-seq", "2048", "--dtype", dtype];
        let report = tpu("v6e:1x1", &model);
        let memory = &report["per_device"];
        // Of each a code, and a scale of 4 bytes for 32; the head in 8 bits, the embedding in bf16.
        let (layers, head) = (2.0 * 218_103_808.0, 128_256.0 * 4096.0);
        let weights = layers * (if dtype == "int8" { 1.0 } else { 0.5 } + 0.125) + head * 1.125 + head * 2.0;
        assert!((number(memory, "weights") as f64 / weights - 1.0).abs() < 0.01, "{weights}: {memory}");
        assert!(number(memory, "temporaries") <= 64_000_000, "{memory}");
        assert_eq!(number(&report, "copied_bytes"), 0, "a copy inside the memory: {report}");
        // No more than 1.5 times what it takes to read everything, at 1640 GB/s and 1.75 GHz.
        let floor = number(memory, "arguments") as f64 / 1640.0 * 1.75;
        assert!((number(&report, "cycles") as f64) < 1.5 * floor, "{floor}: {}", report["cycles"]);
    }
}

#[test]
fn what_does_not_fit_a_tpu_is_a_report() {
    let report = tpu("v5e:1x1", &["--model", "llama-2-7b", "--layers", "8", "--batch", "64", "--max-seq", "4096"]);
    let memory = &report["per_device"];
    assert_eq!((&report["ok"], &memory["fits"]), (&false.into(), &false.into()), "{report}");
    assert!(number(memory, "total") > number(memory, "limit"), "{memory}");
    assert!(memory["margin"].as_i64() < Some(0) && report["shortage"].as_str().is_some(), "{report}");
    assert_eq!(report["estimate"], Value::Null);
}

#[test]
fn a_slice_of_many_hosts_is_described_and_one_that_libtpu_does_not_know_is_refused() {
    let report =
        tpu("v5e:4x4", &["--model", "llama-2-7b", "--layers", "1", "--max-seq", "256", "--mesh", "data=2,model=8"]);
    assert_eq!((number(&report, "devices"), number(&report, "hosts")), (16, 4));
    assert_eq!(report["ok"], true);
    let unknown = run(["compile", "--target", "v9z:2x2", "--model", "llama-2-7b", "--device", libtpu()]);
    unknown.fails(2, &["v9z", "this libtpu knows", "v5e", "v6e"]);
    let small =
        run(["compile", "--target", "v5e:2x4", "--mesh", "model=4", "--model", "llama-2-7b", "--device", libtpu()]);
    small.fails(2, &["4 devices", "8 devices", "model=8", "data=2,model=4"]);
}
