//! Runs the program as a user does, and makes small checkpoints whose answers are known.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use converter::{Checkpoint, Llama, ModelConfig};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;
use xla::wheel::{self, FetchOptions};
use xllama::runtime::{Engine, LoadOptions, Session, device};
use xllama::sharding::MeshShape;

/// What a run of the program left behind.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

/// The program with the user's own cache: for the default model.
pub(crate) fn xllama_with_own_cache() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xllama"));
    command.stdin(Stdio::null()).env_remove("XLLAMA_LOG");
    command
}

/// The program with a cache of the tests and a plugin that is there already.
pub(crate) fn xllama() -> Command {
    let mut command = xllama_with_own_cache();
    command.env("XLLAMA_CACHE", test_cache()).env("XLLAMA_DEVICE", plugin());
    command
}

/// Runs `xllama ARGS`.
pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    finish(xllama().args(args))
}

/// Runs a prepared command to its end.
pub(crate) fn finish(command: &mut Command) -> Run {
    let output = command.output().expect("the program starts");
    let stderr = String::from_utf8(output.stderr).expect("standard error is UTF-8");
    Run { code: output.status.code(), stdout: output.stdout, stderr }
}

impl Run {
    /// Standard output of a run that must have succeeded.
    #[track_caller]
    pub(crate) fn ok(&self) -> &str {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        assert!(!self.stderr.lines().any(|l| l.starts_with("error:")), "{}", self.stderr);
        self.text()
    }

    /// Standard output, which must be whole characters.
    #[track_caller]
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("standard output is UTF-8")
    }

    /// The one JSON object that a successful run printed.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let text = self.ok();
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("one JSON object, {e}: {text}"));
        assert!(value.is_object(), "{text}");
        value
    }

    /// A clear failure: this exit code, one `error:` line with all of `parts`, nothing on standard output, no panic.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, parts: &[&str]) {
        let errors: Vec<&str> = self.stderr.lines().filter(|l| l.starts_with("error:")).collect();
        assert_eq!((self.code, errors.len()), (Some(code), 1), "{:?}\n{}", self.text(), self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        assert!(self.stdout.is_empty(), "{:?}", self.text());
        for part in parts {
            assert!(errors[0].contains(part), "{part:?} is not in {:?}", errors[0]);
        }
    }
}

/// The keys of an object, sorted.
#[track_caller]
pub(crate) fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// Asserts that the object has all of these keys.
#[track_caller]
pub(crate) fn has_keys(value: &Value, wanted: &[&str]) {
    let found = keys(value);
    assert!(wanted.iter().all(|k| found.contains(k)), "wanted {wanted:?}, found {found:?}");
}

/// The plugin of these tests: `XLLAMA_DEVICE` if it is a path, else the default CPU build, installed when first needed.
pub(crate) fn plugin() -> &'static Path {
    static PLUGIN: OnceLock<PathBuf> = OnceLock::new();
    PLUGIN.get_or_init(|| {
        let asked = std::env::var_os("XLLAMA_DEVICE").map(PathBuf::from).filter(|p| p.is_file());
        asked.unwrap_or_else(|| {
            let build = wheel::default_build(wheel::PluginKind::Cpu).expect("a CPU build for this machine");
            wheel::install(build, &FetchOptions::default(), &mut |_| ()).expect("the CPU plugin")
        })
    })
}

/// A cache folder that tests share, below the build folder.
pub(crate) fn test_cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache")
}

/// A file of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// An array of `golden/blocks.npz`, which holds what PyTorch's single blocks give: values and shape.
pub(crate) fn block(name: &str) -> (Vec<f32>, Vec<usize>) {
    let mut npz = npyz::npz::NpzArchive::open(repository("golden/blocks.npz")).expect("an archive");
    let array = npz.by_name(name).expect("readable").unwrap_or_else(|| panic!("no {name}"));
    let shape = array.shape().iter().map(|&n| n as usize).collect();
    let values = match array.dtype().descr().trim_matches('\'') {
        "<f8" => array.into_vec::<f64>().expect("f64").into_iter().map(|v| v as f32).collect(),
        "<f4" => array.into_vec().expect("f32"),
        "<i4" => array.into_vec::<i32>().expect("i32").into_iter().map(|v| v as f32).collect(),
        "<i8" => array.into_vec::<i64>().expect("i64").into_iter().map(|v| v as f32).collect(),
        other => panic!("{name}: {other}"),
    };
    (values, shape)
}

/// The checkpoint of a golden case.
pub(crate) fn golden(case: &str) -> String {
    repository(&format!("golden/{case}/model")).to_str().expect("UTF-8").to_string()
}

/// Opens a checkpoint in this process, in f32.
pub(crate) fn engine(folder: &Path) -> Engine {
    engine_on(folder, MeshShape::default())
}

/// The same on a mesh of CPU devices.
pub(crate) fn engine_on(folder: &Path, mesh: MeshShape) -> Engine {
    let (plugin, client) = device::open(plugin(), mesh.devices()).expect("the plugin opens");
    let checkpoint = Checkpoint::open(folder).expect("a checkpoint");
    let cache = Some(test_cache().join("executables"));
    let options = LoadOptions { mesh, ..LoadOptions::new(xla::DType::F32, cache) };
    Engine::load(plugin, client, &checkpoint, options, &|_, _| ()).expect("it loads")
}

/// The logits of a prompt and two single tokens of one slot; then of three slots with prompts of different lengths.
pub(crate) fn logits(engine: &Engine) -> Vec<f32> {
    let vocab = engine.config().vocab_size;
    let ids = |n: usize, salt: usize| (0..n).map(|i| ((i * 31 + i * i * salt) % vocab) as u32).collect::<Vec<_>>();
    let mut all = Vec::new();
    for (slots, steps) in [(1, &[(40, 48), (1, 1), (1, 1)][..]), (3, &[(20, 24), (1, 1)])] {
        let mut session = Session::new(engine, slots, 96).expect("a session");
        for &(n, padded) in steps {
            let rows: Vec<Vec<u32>> = (0..slots).map(|slot| ids(n - slot.min(n - 1), slot + padded + 1)).collect();
            all.extend(session.logits(&rows, padded).expect("logits"));
        }
    }
    all
}

/// A Llama of one small layer in memory, float32.
#[derive(Clone)]
pub(crate) struct Tiny {
    pub(crate) config: Value,
    /// Shape and values by Hugging Face name.
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// A tokenizer from tests/data/chat/tokenizers.
    pub(crate) tokenizer: Option<&'static str>,
}

/// Vocabulary of the tokenizer `byte_level`: three special ids, 256 bytes in GPT-2's order, merges.
pub(crate) const VOCAB: usize = 319;

/// The id of a byte in the tokenizer `byte_level`.
pub(crate) fn byte_id(byte: u8) -> u32 {
    let printable = |b: &u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let order = (0..=255).filter(printable).chain((0..=255).filter(|b| !printable(b)));
    3 + order.zip(0..).find(|(b, _)| *b == byte).expect("all bytes are there").1
}

impl Tiny {
    /// Norms of ones, zeros elsewhere: attention and MLP add nothing, so the logits are a function of the last token.
    fn zeros(vocab: usize, hidden: usize) -> Tiny {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "intermediate_size": 10, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false, "bos_token_id": 1,
            "eos_token_id": 2, "rope_theta": 10000.0, "torch_dtype": "float32",
        });
        Tiny::zeros_of(config)
    }

    fn zeros_of(config: Value) -> Tiny {
        let cfg = ModelConfig::from_value(&config, Path::new("config.json")).expect("a valid configuration");
        let params = Llama::declare(&cfg).hf_tensors().into_iter().map(|tensor| {
            let value = if tensor.name.contains("norm") { 1.0 } else { 0.0 };
            let values = vec![value; tensor.shape.iter().product()];
            (tensor.name, (tensor.shape, values))
        });
        Tiny { config, tensors: params.collect(), tokenizer: None }
    }

    /// Every weight at random: what it says means nothing, but depends on all of the text.
    pub(crate) fn random() -> Tiny {
        Tiny { tokenizer: Some("byte_level"), ..Tiny::zeros(VOCAB, 20) }.randomized()
    }

    /// The same of another shape: a Llama with these keys of its config.json changed.
    pub(crate) fn random_of(changes: Value) -> Tiny {
        let mut config = Tiny::zeros(8, 8).config;
        config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        Tiny::zeros_of(config).randomized()
    }

    fn randomized(mut self) -> Tiny {
        let mut state = 1u64;
        for (name, (_, values)) in &mut self.tensors {
            for value in values.iter_mut().filter(|_| !name.contains("norm")) {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                *value = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            }
        }
        self
    }

    /// After the first token it says the bytes of `text`, each of which may stand there once, and then the id `then`
    /// (2 ends the text; the id of the first byte begins again). Other ids are less likely by 12 nats.
    pub(crate) fn says(text: &str, then: u32) -> Tiny {
        let mut tiny = Tiny { tokenizer: Some("byte_level"), ..Tiny::zeros(VOCAB, VOCAB) };
        let ids: Vec<usize> =
            [1].into_iter().chain(text.bytes().map(|b| byte_id(b) as usize)).chain([then as usize]).collect();
        for id in 0..VOCAB {
            tiny.set("model.embed_tokens.weight", id, id, 1.0);
        }
        for pair in ids.windows(2) {
            tiny.set("lm_head.weight", pair[1], pair[0], 12.0 / (VOCAB as f32).sqrt());
        }
        tiny
    }

    /// Always these logits, one per id.
    pub(crate) fn constant(logits: &[f32]) -> Tiny {
        let mut tiny = Tiny::zeros(logits.len(), 8);
        for (id, logit) in logits.iter().enumerate() {
            for axis in 0..8 {
                tiny.set("model.embed_tokens.weight", id, axis, 1.0);
                tiny.set("lm_head.weight", id, axis, logit / 8.0);
            }
        }
        tiny
    }

    fn set(&mut self, name: &str, row: usize, column: usize, value: f32) {
        let (shape, values) = self.tensors.get_mut(name).expect("a parameter");
        values[row * shape[1] + column] = value;
    }

    /// The same with one key of config.json changed.
    pub(crate) fn with(mut self, key: &str, value: Value) -> Tiny {
        self.config[key] = value;
        self
    }

    /// Writes it as a Hugging Face folder.
    pub(crate) fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).expect("a new folder");
        fs::write(folder.join("config.json"), format!("{:#}", self.config)).expect("writable");
        fs::write(folder.join("model.safetensors"), self.safetensors()).expect("writable");
        if let Some(name) = self.tokenizer {
            let from = repository(&format!("tests/data/chat/tokenizers/{name}.json"));
            fs::copy(from, folder.join("tokenizer.json")).expect("writable");
        }
    }

    /// The bytes of `model.safetensors`.
    pub(crate) fn safetensors(&self) -> Vec<u8> {
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let data: Vec<(&String, &Vec<usize>, Vec<u8>)> =
            self.tensors.iter().map(|(name, (shape, values))| (name, shape, bytes(values))).collect();
        let views = data.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("consistent"))
        });
        safetensors::serialize(views, None).expect("a valid file")
    }

    /// A folder of its own with the model in it.
    pub(crate) fn folder(&self) -> Folder {
        let folder = Folder::new();
        self.write(&folder.path("model"));
        folder
    }
}

/// A temporary folder.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary folder"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// As text, for arguments.
    pub(crate) fn arg(&self, name: &str) -> String {
        self.path(name).to_str().expect("UTF-8").to_string()
    }

    /// The model that [`Tiny::folder`] wrote.
    pub(crate) fn model(&self) -> String {
        self.arg("model")
    }

    /// What lies in it, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("a folder");
        let mut names: Vec<String> =
            entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Type, shape and bytes of every tensor in the safetensors files of a folder, through the safetensors library.
pub(crate) fn read_tensors(folder: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = fs::read(&path).expect("readable");
            for (name, view) in SafeTensors::deserialize(&bytes).expect("a valid file").tensors() {
                let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(tensors.insert(name, tensor).is_none(), "a tensor twice");
            }
        }
    }
    tensors
}

/// Sends a signal (`INT`, `KILL`) to a process that these tests started.
pub(crate) fn signal(child: &Child, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", child.id())]).status();
    assert!(status.expect("a shell").success());
}

/// Waits until `ready`, at most a minute.
#[track_caller]
pub(crate) fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let started = Instant::now();
    while !ready() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}
