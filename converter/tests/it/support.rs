//! Makes small Hugging Face folders with known contents.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use converter::{ConvertOptions, DType, Error, Llama, ModelConfig, Report};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Type, shape and bytes.
pub(crate) type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// A Hugging Face checkpoint in memory.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Model {
    /// Grouped heads (R = 3), head_dim that is not hidden / heads, all biases, an output head of its own.
    pub(crate) fn small() -> Model {
        Model::random(
            json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 33, "hidden_size": 20,
                "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
                "intermediate_size": 28, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
                "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false, "bos_token_id": 1,
                "eos_token_id": 2, "rope_theta": 10000.0, "torch_dtype": "float32",
            }),
            DType::F32,
        )
    }

    /// The same without biases and with a tied head.
    pub(crate) fn tied() -> Model {
        let mut config = Model::small().config;
        for (key, value) in [("attention_bias", false), ("mlp_bias", false), ("tie_word_embeddings", true)] {
            config[key] = json!(value);
        }
        Model::random(config, DType::F32)
    }

    /// All tensors that `config` asks for, with bytes from a fixed sequence.
    pub(crate) fn random(config: Value, dtype: DType) -> Model {
        let cfg = ModelConfig::from_value(&config, Path::new("config.json")).expect("a valid configuration");
        let mut state = 1u64;
        let mut tensors = BTreeMap::new();
        for tensor in Llama::declare(&cfg).hf_tensors() {
            let bytes = (0..tensor.shape.iter().product::<usize>()).flat_map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                encode(((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3.0, dtype)
            });
            tensors.insert(tensor.name, (stored(dtype), tensor.shape, bytes.collect()));
        }
        Model { config, tensors }
    }

    /// Writes the folder into a temporary one, under the name `model`.
    pub(crate) fn folder(&self) -> TempDir {
        let root = tempfile::tempdir().expect("a temporary folder");
        let folder = root.path().join("model");
        fs::create_dir(&folder).expect("new");
        fs::write(folder.join("config.json"), self.config.to_string()).expect("writable");
        write_tensors(&folder.join("model.safetensors"), &self.tensors);
        root
    }
}

/// Writes a safetensors file through the safetensors library.
pub(crate) fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let view = |t: &'_ Tensor| {
        TensorView::new(t.0, t.1.clone(), Box::leak(t.2.clone().into_boxed_slice())).expect("consistent")
    };
    let views = tensors.iter().map(|(name, tensor)| (name.clone(), view(tensor)));
    let bytes = safetensors::serialize(views, None).expect("a valid file");
    fs::write(path, bytes).expect("writable");
}

/// All tensors of the safetensors files of a folder, read through the safetensors library.
pub(crate) fn read_tensors(folder: &Path) -> BTreeMap<String, Tensor> {
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

/// The names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

pub(crate) fn convert(root: &TempDir, from: &str, to: &str, options: &ConvertOptions) -> Result<Report, Error> {
    converter::convert(&root.path().join(from), &root.path().join(to), options, &|_, _| {}, &AtomicBool::new(false))
}

pub(crate) fn export(root: &TempDir, from: &str, to: &str, options: &ConvertOptions) -> Result<Report, Error> {
    converter::export_hf(&root.path().join(from), &root.path().join(to), options, &|_, _| {}, &AtomicBool::new(false))
}

pub(crate) fn encode(x: f32, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::F64 => f64::from(x).to_le_bytes().to_vec(),
    }
}

pub(crate) fn stored(dtype: DType) -> Dtype {
    match dtype {
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
    }
}
