//! Pins that of a file only the bytes of a part are read, in as few runs as there can be.

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use proptest::sample::Index;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::*;
use crate::config::ModelConfig;
use crate::layout::Llama;

/// Writes a model in float32 whose projections are fused or whose feed-forward is a mixture.
fn write_model(folder: &Path, model_type: &str) {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 33, "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 28, "num_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8, "tie_word_embeddings": false,
        "pad_token_id": 0,
    });
    let keys = config.as_object_mut().expect("an object");
    keys.retain(|key, _| model_type == "qwen2_moe" || !(key.contains("expert") || key.contains("moe")));
    let cfg = ModelConfig::from_value(&config, folder).expect("a valid configuration");
    let tensors = Llama::declare(&cfg).hf_tensors();
    let data = vec![0; tensors.iter().map(|t| t.shape.iter().product::<usize>() * 4).max().expect("there are some")];
    let views = tensors.iter().map(|t| {
        let bytes = &data[..t.shape.iter().product::<usize>() * 4];
        (&t.name, TensorView::new(safetensors::Dtype::F32, t.shape.clone(), bytes).expect("consistent"))
    });
    fs::create_dir(folder).expect("new");
    fs::write(folder.join("config.json"), config.to_string()).expect("writable");
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).expect("valid")).expect("writable");
}

/// Bytes of weights that have been read since the files were opened.
fn bytes_read(checkpoint: &Checkpoint) -> u64 {
    let Source::Folder(folder) = &checkpoint.source else { panic!("a folder was opened") };
    folder.shards.iter().map(|shard| shard.read.load(Ordering::Relaxed)).sum()
}

/// A range of each axis, ends chosen by `ends`.
fn ranges(sizes: &[usize], ends: &[[Index; 2]]) -> Vec<Range<usize>> {
    let range = |(&size, ends): (&usize, &[Index; 2])| {
        let [a, b] = ends.map(|end| end.index(size + 1));
        a.min(b)..a.max(b)
    };
    sizes.iter().zip(ends).map(range).collect()
}

#[test]
fn only_the_bytes_of_the_part_are_read() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let mut checkpoints = Vec::new();
    for model_type in ["phi3", "qwen2_moe"] {
        let [model, per_head] =
            ["hugging-face", "per-head"].map(|form| root.path().join(format!("{model_type}-{form}")));
        write_model(&model, model_type);
        crate::convert(&model, &per_head, &Default::default(), &|_, _| {}, &Default::default()).expect("valid");
        checkpoints.extend([model, per_head].map(|folder| Checkpoint::open(&folder).expect("valid")));
    }
    let dtype = prop::sample::select(vec![DType::BF16, DType::F32]);
    proptest!(ProptestConfig::with_cases(32), |(ends in any::<[[Index; 2]; 3]>(), dtype in dtype)| {
        for checkpoint in &checkpoints {
            for param in checkpoint.params().iter() {
                let part = ranges(&param.shape, &ends);
                let before = bytes_read(checkpoint);
                let array = checkpoint.read_part(param, dtype, &part).expect("readable");
                let elements: usize = part.iter().map(Range::len).product();
                prop_assert_eq!(array.as_bytes().len(), elements * dtype.size());
                let read = bytes_read(checkpoint) - before;
                prop_assert_eq!(read, (elements * DType::F32.size()) as u64, "{} {:?}", param.name, part);
            }
        }
    });
}

proptest! {
    #[test]
    fn runs_are_the_elements_of_a_part_and_do_not_touch(
        sizes in prop::collection::vec(1usize..6, 0..4),
        ends in any::<[[Index; 2]; 3]>(),
    ) {
        let part = ranges(&sizes, &ends);
        let runs: Vec<Range<usize>> = runs(&sizes, &part).collect();
        let inside = |&flat: &usize| {
            let mut rest = flat;
            sizes.iter().zip(&part).rev().all(|(&size, range)| {
                let i = rest % size;
                rest /= size;
                range.contains(&i)
            })
        };
        let expected: Vec<usize> = (0..sizes.iter().product()).filter(inside).collect();
        prop_assert_eq!(runs.iter().cloned().flatten().collect::<Vec<_>>(), &expected[..]);
        prop_assert!(expected.is_empty() || runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", runs);
    }
}
