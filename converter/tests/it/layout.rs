//! Pins the per-head layout element by element against its definition, computed with ndarray.

use converter::layout::FeedForward;
use converter::{Checkpoint, DType};
use ndarray::{ArrayD, Axis, IxDyn};
use std::os::unix::fs::FileExt;

use crate::support::{Model, convert};

/// The Hugging Face tensor with its axes split as `shape`, in float32.
fn original(model: &Model, name: &str, shape: &[usize]) -> ArrayD<f32> {
    let values = model.tensors[name].2.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    ArrayD::from_shape_vec(IxDyn(shape), values).expect("the right size")
}

#[test]
fn every_parameter_is_where_the_definition_puts_it() {
    let model = Model::small();
    let root = model.folder();
    convert(&root, "model", "per-head", &Default::default()).expect("a valid model");
    let (v, m, h, g, k, f) = (33, 20, 6, 2, 8, 28);
    for folder in ["model", "per-head"] {
        let checkpoint = Checkpoint::open(&root.path().join(folder)).expect("a valid model");
        let all =
            checkpoint.read_all(None, 2, &|_, _| {}, &Default::default()).expect("readable").map(&mut |a| a.to_f32());
        let layer = &all.layers[1];
        let there = |name: &str, shape: &[usize], order: &[usize]| {
            original(&model, &format!("model.layers.1.{name}"), shape).permuted_axes(IxDyn(order))
        };
        let attention = &layer.attention;
        assert_eq!(attention.q_proj, there("self_attn.q_proj.weight", &[h, k, m], &[2, 0, 1]));
        assert_eq!(attention.k_proj, there("self_attn.k_proj.weight", &[g, k, m], &[2, 0, 1]));
        assert_eq!(attention.v_proj, there("self_attn.v_proj.weight", &[g, k, m], &[2, 0, 1]));
        assert_eq!(attention.out_proj, there("self_attn.o_proj.weight", &[m, h, k], &[1, 2, 0]));
        assert_eq!(attention.q_bias, Some(there("self_attn.q_proj.bias", &[h, k], &[0, 1])));
        assert_eq!(attention.k_bias, Some(there("self_attn.k_proj.bias", &[g, k], &[0, 1])));
        assert_eq!(attention.v_bias, Some(there("self_attn.v_proj.bias", &[g, k], &[0, 1])));
        assert_eq!(attention.out_bias, Some(there("self_attn.o_proj.bias", &[m], &[0])));
        let FeedForward::Dense(mlp) = &layer.feed_forward else { panic!("Llama has no experts") };
        assert_eq!(mlp.gate_proj, there("mlp.gate_proj.weight", &[f, m], &[1, 0]));
        assert_eq!(mlp.up_proj, there("mlp.up_proj.weight", &[f, m], &[1, 0]));
        assert_eq!(mlp.down_proj, there("mlp.down_proj.weight", &[m, f], &[1, 0]));
        assert_eq!(mlp.down_bias, Some(there("mlp.down_proj.bias", &[m], &[0])));
        assert_eq!(layer.input_norm, Some(there("input_layernorm.weight", &[m], &[0])));
        assert_eq!(layer.post_attn_norm, Some(there("post_attention_layernorm.weight", &[m], &[0])));
        assert_eq!(all.embedding, original(&model, "model.embed_tokens.weight", &[v, m]));
        assert_eq!(all.final_norm, original(&model, "model.norm.weight", &[m]));
        assert_eq!(all.lm_head, Some(original(&model, "lm_head.weight", &[v, m]).reversed_axes()));
    }
}

#[test]
fn grouped_queries_are_kv_major() {
    // Hugging Face repeats each key/value head R times in a row: rows of query heads 3, 4, 5 belong to key/value head 1
    let mut model = Model::small();
    let (m, k) = (20, 8);
    let rows: Vec<u8> = (0..6 * k).flat_map(|row| vec![(row / k / 3) as f32; m]).flat_map(f32::to_le_bytes).collect();
    model.tensors.get_mut("model.layers.0.self_attn.q_proj.weight").expect("there").2 = rows;
    let root = model.folder();
    let checkpoint = Checkpoint::open(&root.path().join("model")).expect("a valid model");
    let q = checkpoint.read(&checkpoint.params().layers[0].attention.q_proj, DType::F32).expect("readable").to_f32();
    let r = checkpoint.config().queries_per_kv_head();
    for head in 0..6 {
        assert!(q.index_axis(Axis(1), head).iter().all(|&x| x == (head / r) as f32));
    }
}

#[test]
fn arrays_and_views_are_aligned_and_equal() {
    let model = Model::random(Model::small().config, DType::BF16);
    let root = model.folder();
    convert(&root, "model", "per-head", &Default::default()).expect("a valid model");
    let per_head = Checkpoint::open(&root.path().join("per-head")).expect("written whole");
    let mut views = 0;
    for param in per_head.params().iter() {
        let array = per_head.read(param, DType::BF16).expect("readable");
        assert_eq!((array.as_bytes().as_ptr() as usize % 64, array.shape()), (0, &param.shape[..]));
        if let Some(place) = per_head.place(param).expect("whole") {
            let mut bytes = vec![0; (place.range.end - place.range.start) as usize];
            place.file.read_exact_at(&mut bytes, place.range.start).expect("readable");
            assert_eq!((place.range.start % 64, &bytes[..]), (0, array.as_bytes()), "{}", param.name);
            views += 1;
        }
    }
    assert!(views >= 2 * 4, "at least the attention projections are multiples of 64 bytes");

    let other = Model::tied().folder();
    let other = Checkpoint::open(&other.path().join("model")).expect("a valid model");
    let head = per_head.params().lm_head.as_ref().expect("not tied");
    assert!(
        other
            .read(head, DType::F32)
            .expect_err("it has none")
            .to_string()
            .contains("not a parameter of this checkpoint")
    );
}
