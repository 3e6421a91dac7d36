//! Pins the contract of the command line: exit codes, help, what `--json` holds, and that every way to the same logits
//! gives the same logits.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use npyz::WriterBuilder;
use serde_json::json;

use crate::support::{Folder, Tiny, finish, golden, has_keys, keys, plugin, repository, run, xllama};

const COMMANDS: &[&[&str]] = &[
    &["generate"],
    &["chat"],
    &["convert-params"],
    &["export-hf"],
    &["logits"],
    &["perplexity"],
    &["golden"],
    &["golden", "check"],
    &["emit"],
    &["compile"],
    &["plugin"],
    &["plugin", "list"],
    &["plugin", "install"],
    &["plugin", "path"],
    &["devices"],
    &["cache"],
    &["cache", "list"],
    &["cache", "clear"],
    &["bench"],
    &["inspect"],
    &["completions"],
    &["man"],
];

#[test]
fn every_command_has_help_with_an_example() {
    for command in COMMANDS {
        let help = run(command.iter().chain(&["--help"]));
        let text = help.ok();
        let called = format!("xllama {}", command.join(" "));
        let example = text.split_once("Example").expect("an example").1;
        assert!(example.contains(&called), "{called}: {text}");
        assert!(text.contains(&format!("Usage: {called}")), "{text}");
    }
    let listed = run(["--help"]);
    for command in COMMANDS {
        assert!(listed.ok().contains(&format!("\n  {} ", command[0])), "{} is not listed", command[0]);
    }
    assert_eq!(run(["--version"]).ok(), format!("xllama {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn usage_errors_exit_with_2() {
    for args in [
        &["fly"][..],
        &["generate", "--wings"],
        &["generate", "a", "b"],
        &["generate", "--dtype", "f8"],
        &["generate", "--max-tokens"],
        &["convert-params", "only-a-source"],
        &["convert-params", "a", "b", "--dtype", "i8"],
        &["convert-params", "a", "b", "--shard-size", "5 apples"],
        &["convert-params", "a", "b", "--shard-size", "0"],
        &["convert-params", "a", "b", "--shard-size", "99999999999999999999GB"],
        &["logits", "--tokens", "1"],
        &["logits", "--out", "x.npz"],
        &["logits", "--tokens", "1", "--tokens-file", "t.npy", "--out", "x.npz"],
        &["logits", "--tokens", "1", "--out", "x.npz", "--chunk", "0"],
        &["logits", "--tokens", "1", "--out", "x.npz", "--chunk", "2", "--decode"],
        &["bench", "--repeat", "0"],
        &["bench", "--gen-tokens", "0"],
        &["generate", "x", "--threads", "0"],
        &["emit", "--program", "train", "--format", "stablehlo"],
        &["plugin", "install", "quantum"],
        &["plugin", "install", "cpu", "--build", "none-such"],
        &["plugin", "remove", "cpu"],
        &["completions", "tea-shell"],
        &["golden", "bake"],
    ] {
        println!("{args:?}");
        run(args).fails(2, &[]);
    }
    // Without a command there is nothing but the help, on standard error.
    assert_eq!(run::<&str>([]).code, Some(2));
}

#[test]
fn completions_and_manual() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let text = run(["completions", shell]);
        assert!(text.ok().contains("convert-params") && text.ok().contains("top-k"), "{shell}");
    }
    let manual = run(["man"]);
    assert!(manual.ok().starts_with(".ie") && manual.ok().contains(".TH xllama 1"));
    assert!(manual.ok().contains("generate") && manual.ok().contains("temperature"));
}

#[test]
fn json_of_plugins_and_devices() {
    let list = run(["plugin", "list", "--json"]).json();
    let rows = list["plugins"].as_array().expect("rows");
    assert!(rows.len() >= 3);
    rows.iter().for_each(|row| has_keys(row, &["kind", "name", "version", "api_version", "default", "path"]));
    let cpu = run(["plugin", "list", "cpu", "--json"]).json();
    assert!(cpu["plugins"].as_array().expect("rows").iter().all(|row| row["kind"] == "cpu"));

    let devices = run(["devices", "--json"]).json();
    has_keys(&devices, &["plugin", "api_version", "platform", "devices"]);
    has_keys(&devices["devices"][0], &["id", "kind", "bytes_in_use", "bytes_limit"]);
    assert_eq!(devices["plugin"].as_str().map(Path::new), Some(plugin()));

    // The cache of these tests has no plugin of its own: installing there is not needed to say so.
    let folder = Folder::new();
    let path = finish(xllama().env("XLLAMA_CACHE", folder.path("empty")).args(["plugin", "path", "cpu"]));
    path.fails(1, &["the cpu plugin is not installed; run `xllama plugin install cpu`"]);
    run(["plugin", "list"]).ok();
    run(["devices"]).ok();
}

#[test]
fn json_of_generate() {
    let folder = Tiny::says("once, Mr", 2).folder();
    let done = run(["generate", "", "--json", "--model", &folder.model()]).json();
    assert_eq!(keys(&done), ["finish_reason", "prompt_tokens", "text", "timing", "tokens"]);
    has_keys(
        &done["timing"],
        &["load_s", "compile_s", "prefill_tok_s", "decode_tok_s", "time_to_first_token_s", "total_s"],
    );
    assert!(done["timing"].as_object().expect("an object").values().all(|t| t.as_f64().is_some_and(|t| t >= 0.0)));
    assert_eq!(done["tokens"].as_array().map(Vec::len), Some(9));
    assert_eq!(done["finish_reason"], "stop");

    // Without --json the text alone is on standard output; --quiet leaves standard error empty.
    let quiet = run(["generate", "", "--quiet", "--model", &folder.model()]);
    assert_eq!((quiet.ok(), quiet.stderr.as_str()), ("once, Mr\n", ""));
    let loud = run(["generate", "", "--model", &folder.model()]);
    assert!(loud.ok() == "once, Mr\n" && loud.stderr.contains("tok/s"), "{}", loud.stderr);
}

#[test]
fn json_of_chat_is_one_object_a_line() {
    let folder = Tiny::random().folder();
    let template = json!({ "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" });
    std::fs::write(folder.path("model/tokenizer_config.json"), template.to_string()).expect("writable");
    std::fs::write(folder.path("lines"), "hello\nand now?\n\nnot read\n").expect("writable");
    let mut command = xllama();
    command.stdin(File::open(folder.path("lines")).expect("there"));
    let talk = finish(command.args(["chat", "--json", "--max-tokens", "5", "--model", &folder.model()]));
    let answers: Vec<serde_json::Value> = talk.ok().lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    assert_eq!(answers.len(), 2);
    answers.iter().for_each(|a| has_keys(a, &["text", "tokens", "prompt_tokens", "finish_reason"]));

    // The first answer is what generate says to the same prompt.
    let chat = ["generate", "hello", "--chat", "--json", "--max-tokens", "5", "--model", &folder.model()];
    let alone = run(chat).json();
    assert_eq!((&alone["tokens"], &alone["prompt_tokens"]), (&answers[0]["tokens"], &answers[0]["prompt_tokens"]));

    // A model without a template says so.
    let folder = Tiny::random().folder();
    run(["generate", "hello", "--chat", "--model", &folder.model()]).fails(1, &["chat template"]);
}

#[test]
fn json_of_conversion_inspect_and_bench() {
    let folder = Tiny::random().folder();
    let report = run(["convert-params", &folder.model(), &folder.arg("out"), "--json"]).json();
    has_keys(&report, &["tensors", "bytes", "seconds", "peak_rss_bytes"]);
    let parameters = 2 * 319 * 20 + 20 * (24 + 12 + 12 + 24) + 3 * 20 * 10 + 3 * 20;
    assert_eq!((report["tensors"].as_u64(), report["bytes"].as_u64()), (Some(12), Some(4 * parameters)));
    assert!(report["peak_rss_bytes"].as_u64().is_some_and(|b| b > 1 << 20));

    for model in ["model", "out"] {
        let shown = run(["inspect", "--json", "--model", &folder.arg(model)]).json();
        has_keys(&shown, &["config", "parameters", "total_parameters", "total_bytes"]);
        assert_eq!(shown["total_parameters"], parameters);
        assert_eq!(shown["config"]["vocab_size"], 319);
        let q = shown["parameters"].as_array().expect("rows").iter().find(|p| p["name"] == "layers.0.attention.q_proj");
        let q = q.expect("a query projection");
        has_keys(q, &["name", "axes", "shape", "dtype", "sharding", "bytes"]);
        assert_eq!((&q["axes"], &q["shape"], &q["bytes"]), (&json!("MHK"), &json!([20, 4, 6]), &json!(1920)));
    }
    assert!(run(["inspect", "--model", &folder.model()]).ok().contains("layers.0.attention.q_proj"));

    let packed = run(["convert-params", &folder.model(), &folder.arg("int4"), "--dtype", "int4", "--json"]).json();
    assert_eq!(packed["tensors"], 2 * 9 + 3, "codes and scales of every matrix, and the norms");
    let shown = run(["inspect", "--json", "--model", &folder.arg("int4")]).json();
    assert_eq!((&shown["total_parameters"], &shown["total_bytes"]), (&json!(parameters), &packed["bytes"]));
    let q = shown["parameters"].as_array().expect("rows").iter().find(|p| p["name"] == "layers.0.attention.q_proj");
    let q = q.expect("a query projection");
    let packing = json!({"bits": 4, "group": 32, "scales": "F16", "mins": false});
    // 24 outputs of 20 terms: two blocks of one group of 256 bytes and 16 scales
    assert_eq!((&q["dtype"], &q["packing"], &q["bytes"]), (&json!("int4"), &packing, &json!(576)));
    let text = run(["inspect", "--model", &folder.arg("int4")]);
    assert!(text.ok().contains("int4, groups of 32, F16 scales"));
    run(["export-hf", &folder.arg("int4"), &folder.arg("x"), "--dtype", "int4"])
        .fails(2, &["must be f32, bf16 or f16"]);

    let bench =
        ["bench", "--json", "--prompt-tokens", "8", "--gen-tokens", "4", "--repeat", "3", "--model", &folder.model()];
    let bench = run(bench).json();
    has_keys(
        &bench,
        &[
            "prefill_tok_s",
            "decode_tok_s",
            "load_s",
            "compile_s",
            "compile_cached_s",
            "weights_bytes",
            "decode_bandwidth_gb_s",
        ],
    );
    for rate in ["prefill_tok_s", "decode_tok_s"] {
        let number = |key: &str| bench[rate][key].as_f64().expect("a number");
        assert!(0.0 < number("min") && number("min") <= number("median") && number("median") <= number("max"));
    }
    assert_eq!(bench["weights_bytes"], 4 * parameters);
}

#[test]
fn json_of_golden_check() {
    let dir = repository("golden");
    let dir = dir.to_str().expect("UTF-8");
    let checked = run(["golden", "check", dir, "--case", "gqa2", "--json"]).json();
    assert_eq!((&checked["ok"], &checked["failed"]), (&json!(true), &json!(0)));
    let rows = checked["rows"].as_array().expect("rows");
    rows.iter().for_each(|r| has_keys(r, &["case", "max_abs_error", "mean_kl", "max_kl", "top1", "tolerance", "pass"]));
    run(["golden", "check", dir, "--case", "no such case"]).fails(1, &["no case to check", "no such case"]);
    run(["golden", "check", "/nowhere"]).fails(1, &["/nowhere"]);
    let folder = Folder::new();
    std::fs::write(folder.path("manifest.json"), r#"{"format": "xllama-golden", "version": 2}"#).expect("written");
    run(["golden", "check", &folder.arg("")]).fails(1, &["version 3", "version 2", "make_golden.py"]);
}

#[test]
fn emit_writes_a_program() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    for program in ["prefill", "decode"] {
        let emit = ["emit", "--program", program, "--format", "stablehlo", "--model", &model];
        let text = run(emit);
        assert!(text.ok().contains("func.func public @main"), "{}", text.ok());
        assert!(text.ok().contains("stablehlo.dot_general") && text.ok().contains("tf.aliasing_output"));
        let file = run([&emit[..], &["-o", &folder.arg(program), "--json"]].concat()).json();
        has_keys(&file, &["out", "bytes"]);
        assert_eq!(std::fs::read_to_string(folder.path(program)).expect("there"), text.ok());
    }
    let hlo = run(["emit", "--program", "decode", "--format", "hlo", "--model", &model]);
    assert!(hlo.ok().starts_with("HloModule"), "{}", hlo.ok());
}

/// `logits` of a .npz: its shape and values.
fn read_logits(path: &Path) -> (Vec<u64>, Vec<f32>) {
    let mut npz = npyz::npz::NpzArchive::open(path).expect("an archive");
    assert_eq!(npz.array_names().collect::<Vec<_>>(), ["logits"]);
    let array = npz.by_name("logits").expect("readable").expect("there");
    assert_eq!(array.dtype().descr(), "'<f4'");
    (array.shape().to_vec(), array.into_vec().expect("float32"))
}

#[test]
fn every_way_to_the_same_logits() {
    let folder = Folder::new();
    let ids: Vec<i32> = (0..45).map(|i| (i * 37 + 11) % 173).collect();
    let list = ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    let npy = |name: &str, write: &dyn Fn(File)| {
        write(File::create(folder.path(name)).expect("writable"));
        folder.arg(name)
    };
    let n = [ids.len() as u64];
    let i32s = npy("i32.npy", &|file| {
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(&n).writer(file).begin_nd().expect("NumPy");
        writer.extend(ids.iter().copied()).expect("writable");
        writer.finish().expect("writable");
    });
    let i64s = npy("i64.npy", &|file| {
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(&n).writer(file).begin_nd().expect("NumPy");
        writer.extend(ids.iter().map(|i| i64::from(*i))).expect("writable");
        writer.finish().expect("writable");
    });
    assert_eq!(
        npyz::NpyFile::new(BufReader::new(File::open(&i32s).expect("there"))).expect("NumPy").dtype().descr(),
        "'<i4'"
    );

    let model = golden("gqa4-llama3-bias");
    let out = folder.path("x.npz");
    let logits = |args: &[&str]| {
        let common = ["logits", "--json", "--model", &model, "--out", &folder.arg("x.npz")];
        let said = run([&common[..], args].concat()).json();
        let (shape, values) = read_logits(&out);
        assert_eq!(said["shape"], json!(shape));
        assert_eq!(shape[0], n[0]);
        values
    };
    let whole = logits(&["--tokens", &list]);
    assert!(whole.iter().all(|x| x.is_finite()));
    assert_eq!(logits(&["--tokens-file", &i32s]), whole);
    assert_eq!(logits(&["--tokens-file", &i64s]), whole);
    let far = |other: &[f32]| whole.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    for args in [
        &["--decode"][..],
        &["--chunk", "1"],
        &["--chunk", "9"],
        &["--chunk", "16"],
        &["--chunk", "44"],
        &["--chunk", "1000"],
    ] {
        let other = logits(&[&["--tokens", &list], args].concat());
        assert!(other.len() == whole.len() && far(&other) <= 1e-4, "{args:?}: {}", far(&other));
    }
    let bf16 = far(&logits(&["--tokens", &list, "--dtype", "bf16"]));
    assert!((1e-4..1.0).contains(&bf16), "bf16 is another computation, but not another model: {bf16}");
}

/// As XLA says it to the kernels that it calls.
#[test]
fn a_cpu_computes_with_the_threads_it_is_given() {
    let model = Tiny::random().folder();
    let threads = |more: &[&str]| {
        let args = ["bench", "--model", &model.model(), "--device", "cpu", "--prompt-tokens", "8", "--gen-tokens", "4"];
        let args = args.into_iter().chain(["--repeat", "1", "--profile", "--json"]).chain(more.iter().copied());
        run(args.collect::<Vec<_>>()).json()["profile"]["threads"].as_u64()
    };
    let here = std::thread::available_parallelism().expect("a number").get() as u64;
    assert_eq!(threads(&[]), Some(here));
    assert_eq!(threads(&["--threads", "1"]), Some(1));
    assert_eq!(threads(&["--threads", "3"]), Some(3));
}
