//! Pins that a mesh changes nothing but where things lie: logits of the goldens on every kind of mesh, draws that are those of
//! one device, what each device holds, what is refused before anything is read, and which collectives a step may have.

use std::path::{Path, PathBuf};

use serde_json::Value;
use xla::DType;
use xla::graph::Platform;
use xla::hlo::{self, CollectiveKind};
use xllama::generation::SamplingOptions;
use xllama::generation::sampling::SamplerSpec;
use xllama::runtime::{Blueprint, CacheOptions, Engine, LoadOptions, Output, Session, StepSpec, build, device};
use xllama::sharding::MeshShape;

use crate::support::{Tiny, engine_on, golden, plugin, repository, run};

fn mesh(text: &str) -> MeshShape {
    text.parse().expect("a mesh")
}

/// The rows of `golden check` for the cases with `case` in their name.
fn check(case: &str, mesh: &str, more: &[&str]) -> Vec<Value> {
    let dir = repository("golden");
    let dir = dir.to_str().expect("UTF-8");
    let args = ["golden", "check", dir, "--json", "--case", case, "--mesh", mesh];
    let report = run(args.iter().chain(more)).json();
    report["rows"].as_array().expect("rows").clone()
}

/// Each kind of mesh with a model that shows what is hard about it. `golden check` compares with PyTorch and with one device, whole,
/// in chunks, token by token and greedily.
#[test]
fn goldens_hold_on_every_kind_of_mesh() {
    let cases = [
        // 2 key/value heads on 4 and 8 devices, a prime vocabulary, biases
        ("gqa4-llama3-bias", "model=8"),
        // norms over all heads, of which some stand twice
        ("olmo2", "model=4"),
        ("mistral-window7", "model=2"),
        ("llama-dynamic-long", "data=2"),
        ("gqa2", "fsdp=4"),
        ("gemma3-window7", "sequence=2"),
        ("phi3-window", "data=2,model=2"),
        // 8 of 16 experts on a device, then 4, with the shared expert split too
        ("qwen3-moe-16x4", "expert=2,model=2"),
        ("glm4-moe-groups", "expert=4"),
    ];
    for (case, mesh) in cases {
        let rows = check(case, mesh, &[]);
        let checks: Vec<&str> = rows.iter().filter_map(|row| row["check"].as_str()).collect();
        assert!(checks.contains(&"as one device") && checks.contains(&"decode (1)"), "{case}, {mesh}: {checks:?}");
        for row in rows.iter().filter(|row| row["refused"] == false) {
            assert!(row["pass"] == true, "{mesh}: {row}");
        }
    }
}

#[test]
fn the_other_partitioner_and_other_caches_hold_too() {
    for more in [&["--partitioner", "gspmd"][..], &["--cache-page", "16"], &["--cache-dtype", "int8"]] {
        for row in check("mixtral-8x2", "model=2,expert=2", more) {
            assert!(row["pass"] == true, "{more:?}: {row}");
        }
    }
}

/// Slots that a mesh adds, and ids that it adds to a prime vocabulary, leave no trace.
#[test]
fn draws_are_those_of_one_device() {
    let folder = PathBuf::from(golden("gqa2"));
    let sampling = |seed| SamplingOptions {
        temperature: 0.9,
        top_k: 40,
        top_p: 0.95,
        repetition_penalty: 1.1,
        log_probabilities: Some(3),
        seed,
        ..SamplingOptions::default()
    };
    let rows: Vec<SamplingOptions> = (0..3).map(sampling).collect();
    let prompts: Vec<Vec<u32>> =
        (0..3).map(|slot| (0..20 + slot).map(|i| (i * 13 + slot * 5) % 211).collect()).collect();
    let texts = |mesh: MeshShape| {
        let engine = engine_on(&folder, mesh);
        let mut session = Session::new(&engine, 3, 256).expect("a session");
        session.prefill(&prompts, &rows, None).expect("a prefill");
        let mut drawn = Vec::new();
        for _ in 0..30 {
            drawn.push(session.read_tokens().expect("tokens").wait().expect("tokens"));
            session.decode().expect("a step");
        }
        drawn
    };
    let alone = texts(MeshShape::default());
    for axes in ["data=2", "model=4", "data=2,model=2"] {
        for (step, (ours, wanted)) in texts(mesh(axes)).iter().zip(&alone).enumerate() {
            assert_eq!(ours.len(), 3, "{axes}: the fourth slot is the mesh's own");
            for (ours, wanted) in ours.iter().zip(wanted) {
                assert_eq!(ours.id, wanted.id, "{axes}, step {step}");
                let ids = |best: &[(u32, f32)]| best.iter().map(|(id, _)| *id).collect::<Vec<_>>();
                assert_eq!(ids(&ours.best), ids(&wanted.best), "{axes}, step {step}");
            }
        }
    }
}

/// By the plugin's own figures: the bytes of a device's buffers are those that its sharding gives it.
#[test]
fn a_device_holds_its_part_and_no_more() {
    let folder = PathBuf::from(golden("gqa4-llama3-bias"));
    let bytes = |axes: &str| -> Vec<usize> {
        let engine = engine_on(&folder, mesh(axes));
        let devices = mesh(axes).devices();
        let size = |device: usize| {
            let shards = engine.params().iter().map(|array| &array.shards()[device]);
            shards.map(|shard| shard.on_device_size().expect("a size")).sum()
        };
        (0..devices).map(size).collect()
    };
    let whole = bytes("model=1")[0];
    // Norms and output biases are whole on each device; all else of this model has M in it, or heads, or F.
    let (m, layers) = (64, 2);
    let norms = 4 * (layers * 2 + 1) * m;
    // V is 223: 224 where two or four devices share it.
    let padding = 4 * 2 * m;
    let biases = 4 * layers * (2 * m + (8 + 2 * 2) * 16 + 2 * 104);
    let matrices = whole - norms - biases;
    assert_eq!(bytes("data=2"), [whole; 2]);
    let split = bytes("model=2");
    let own = norms + 4 * layers * 2 * m + (matrices + padding + biases - 4 * layers * 2 * m) / 2;
    assert_eq!(split, [own; 2]);
    // fsdp splits M wherever it stands in a matrix
    let gathered = bytes("fsdp=4");
    assert!(gathered.iter().all(|&own| own < whole / 3), "{gathered:?} of {whole}");
}

/// One text, several samples and beams: what the command prints does not depend on slots that the mesh adds.
#[test]
fn texts_are_those_of_one_device() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    for more in [&[][..], &["--samples", "3", "--temperature", "0.8"], &["--beams", "3"]] {
        let texts = |mesh: &str| {
            let args = ["generate", "ab", "--model", &model, "--max-tokens", "12", "--json", "--mesh", mesh];
            let mut found = run(args.iter().chain(more)).json();
            found.as_object_mut().expect("an object").remove("timing");
            found
        };
        let (alone, split) = (texts("model=1"), texts("data=2,model=2"));
        assert_eq!(alone["tokens"], split["tokens"], "{more:?}");
        assert_eq!(alone["text"], split["text"], "{more:?}");
    }
}

#[test]
fn what_does_not_divide_is_refused_before_anything_is_read() {
    let model = golden("llama1");
    let logits = |mesh: &str, model: &str| {
        run(["logits", "--model", model, "--tokens", "1,2,3", "--out", "none.npz", "--mesh", mesh])
    };
    logits("model=2", &model).fails(2, &["--mesh", "model=2", "3 query heads", "2 devices", "1"]);
    logits("expert=2", &model).fails(2, &["expert=2", "no experts"]);
    logits("fsdp=5", &model).fails(2, &["fsdp=5", "48", "5 devices", "1, 2, 3, 4, 6"]);
    logits("expert=3", &golden("mixtral-5x3")).fails(2, &["5 experts", "3 devices", "1 or 5"]);
    for (text, part) in
        [("model", "AXIS=N"), ("model=0", "at least 1"), ("heads=2", "data, fsdp"), ("data=2,data=2", "twice")]
    {
        logits(text, &model).fails(2, &[part]);
    }
    let paged = ["generate", "a", "--model", &golden("gqa2"), "--mesh", "data=2", "--cache-page", "16"];
    assert_ne!(run(paged).code, Some(0));
    assert!(!Path::new("none.npz").exists());
}

/// What a CPU program of a step does between devices: two sums a layer and the embedding's, and nothing as long as the vocabulary.
#[test]
fn sampling_gathers_no_vocabulary() {
    let folder = golden("gqa2");
    let checkpoint = converter::Checkpoint::open(Path::new(&folder)).expect("a checkpoint");
    let (cfg, params, mesh) = (checkpoint.config(), checkpoint.params(), mesh("model=2"));
    let model = Blueprint::new(cfg, params, DType::F32, mesh, Platform::Cpu).expect("it divides");
    let (_, client) = device::open(plugin(), 2).expect("the plugin opens");
    let cache = model.cache_shape(&CacheOptions::default(), 2, 256);
    let random = SamplerSpec { random: true, typical: true, penalties: true, bias: true, log_probabilities: Some(40) };
    for sampler in [SamplerSpec::default(), random] {
        let spec = StepSpec { tokens: 1, cache, read_len: 256, output: Output::Token(sampler) };
        let text = build(&spec, &model).expect("it builds").stablehlo();
        let program = client.compile(&text, &model.compile_options()).expect("it compiles");
        let program = program.optimized_program().expect("a program");
        let module = hlo::Module::parse(&program.format, &program.bytes).expect("a module");
        let collectives = module.collectives();
        let row = 4 * model.vocab() as u64;
        for gather in collectives.iter().filter(|c| c.kind != CollectiveKind::AllReduce) {
            assert!(gather.bytes < row, "{gather:?}");
        }
        let hidden = 4 * 2 * cfg.d_model as u64;
        let sums = collectives.iter().filter(|c| c.kind == CollectiveKind::AllReduce && c.bytes >= hidden);
        assert_eq!(sums.count(), 2 * cfg.n_layers + 1, "{collectives:?}");
    }
}

/// Both without kernels, which a mesh has none of: their sums are rounded otherwise than XLA's.
#[test]
fn a_whole_batch_of_one_text_is_each_text() {
    let folder = PathBuf::from(golden("qwen3"));
    let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
    let checkpoint = converter::Checkpoint::open(&folder).expect("a checkpoint");
    let options = LoadOptions { kernels: false, ..LoadOptions::new(DType::F32, None) };
    let alone = Engine::load(plugin, client, &checkpoint, options, &|_, _| ()).expect("it loads");
    let split = engine_on(&folder, mesh("data=2"));
    let tokens: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % 97).collect();
    let one = xllama::runtime::chunked_logits(&alone, &tokens, 16).expect("logits");
    let other = xllama::runtime::chunked_logits(&split, &tokens, 16).expect("logits");
    assert_eq!(one.len(), 40 * 97);
    let worst = one.iter().zip(&other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-6, "{worst}");
}
