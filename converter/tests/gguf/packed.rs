//! Pins that a quantized tensor packed has the values of the tensor, bit for bit, whatever its type.

use std::fs;

use converter::gguf::{GgufFile, RowCodes, TensorType};
use converter::{ArrayBytes, Checkpoint, PackedArrays, Param, ScaleType};
use half::f16;
use kernels::packed::{Packed, Scales};

use super::builder::{Builder, V};
use super::data;
use super::values::{bits, npz, read};

const QUANTIZED: [(TensorType, u32); 10] = [
    (TensorType::Q4_0, 2),
    (TensorType::Q4_1, 3),
    (TensorType::Q5_0, 6),
    (TensorType::Q5_1, 7),
    (TensorType::Q8_0, 8),
    (TensorType::Q2K, 10),
    (TensorType::Q3K, 11),
    (TensorType::Q4K, 12),
    (TensorType::Q5K, 13),
    (TensorType::Q6K, 14),
];

/// A model of one block, whose matrices are of one type: grouped heads of 32, 33 token ids.
fn model(kind: TensorType, code: u32) -> Builder {
    let blocks: Vec<u8> = read(&mut npz("gguf_vectors.npz"), &format!("{}/blocks", kind.name()));
    let mut taken = 0;
    let mut matrix = |builder: Builder, name: &str, shape: [u64; 2]| {
        let bytes = (shape[0] * shape[1]) as usize / kind.block_len() * kind.block_bytes();
        // each tensor begins with another block
        let bytes: Vec<u8> = blocks.iter().copied().cycle().skip(taken * kind.block_bytes()).take(bytes).collect();
        taken += 1;
        builder.tensor(name, &shape, code, &bytes)
    };
    let sizes = [
        ("embedding_length", 256),
        ("feed_forward_length", 512),
        ("attention.key_length", 32),
        ("attention.head_count", 16),
        ("attention.head_count_kv", 4),
        ("vocab_size", 33),
    ];
    let sized = |builder: Builder, (key, size): (&str, u32)| builder.with(&format!("llama.{key}"), V::U32(size));
    let mut builder = sizes.into_iter().fold(Builder::llama(), sized);
    for norm in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"] {
        builder = builder.counted(&format!("{norm}.weight"), &[256]);
    }
    for (name, shape) in [
        ("token_embd", [33, 256]),
        ("blk.0.attn_q", [512, 256]),
        ("blk.0.attn_k", [128, 256]),
        ("blk.0.attn_v", [128, 256]),
        ("blk.0.attn_output", [256, 512]),
        ("blk.0.ffn_gate", [512, 256]),
        ("blk.0.ffn_up", [512, 256]),
        ("blk.0.ffn_down", [256, 512]),
    ] {
        builder = matrix(builder, &format!("{name}.weight"), shape);
    }
    builder
}

/// The values of packed arrays, (N, K).
fn unpack(arrays: &PackedArrays, param: &Param) -> Vec<f32> {
    let of = param.contraction().expect("a matrix");
    let bytes = |array: &ArrayBytes| match array {
        ArrayBytes::Memory(bytes) => bytes.as_ref().to_vec(),
        ArrayBytes::File(place) => {
            unreachable!("{place:?} is of no GGUF file")
        }
    };
    let (q, scales) = (bytes(&arrays.q), bytes(&arrays.scales));
    let mins = arrays.mins.as_ref().map(bytes).unwrap_or_default();
    let halves = |bytes: &[u8]| -> Vec<f16> { bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect() };
    let singles = |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect() };
    let (half, single) = ((halves(&scales), halves(&mins)), (singles(&scales), singles(&mins)));
    let (scales, mins) = match arrays.packing.scales {
        ScaleType::F16 => (Scales::F16(&half.0), Scales::F16(&half.1)),
        ScaleType::F32 => (Scales::F32(&single.0), Scales::F32(&single.1)),
    };
    let format = arrays.packing.format;
    let mins = format.mins.then_some(mins);
    let mut values = vec![f32::NAN; of.n * of.k];
    Packed { bits: format.bits, group: format.group, q: &q, scales, mins }.unpack(of.k, of.n, &mut values);
    values
}

#[test]
fn every_type_keeps_every_bit() {
    let root = tempfile::tempdir().unwrap();
    for (kind, code) in QUANTIZED {
        let path = root.path().join(format!("{}.gguf", kind.name()));
        fs::write(&path, model(kind, code).bytes()).unwrap();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let mut packed = 0;
        for param in checkpoint.params().iter() {
            let Some(packing) = param.packing else { continue };
            assert_eq!(Some(packing), kind.packing());
            let of = param.contraction().unwrap();
            let mut expected = vec![0.0; of.n * of.k];
            file.read_rows(&param.pieces[0].name, 0..of.n, &mut expected).unwrap();
            let found = unpack(&checkpoint.packed(param, packing).unwrap(), param);
            assert_eq!(bits(&found), bits(&expected), "{} {}", kind.name(), param.name);
            packed += 1;
        }
        assert_eq!(packed, 8, "{}", kind.name());
    }
}

/// Several types in one file, one of them float.
#[test]
fn a_mixed_model_keeps_every_bit() {
    let checkpoint = Checkpoint::open(&data("tiny.gguf")).unwrap();
    let file = GgufFile::open(&data("tiny.gguf")).unwrap();
    let mut kinds = std::collections::HashSet::new();
    for param in checkpoint.params().iter() {
        let Some(packing) = param.packing else { continue };
        let piece = &param.pieces[0];
        let mut expected = vec![0.0; piece.elements()];
        file.read_rows(&piece.name, 0..piece.rows, &mut expected).unwrap();
        let found = unpack(&checkpoint.packed(param, packing).unwrap(), param);
        assert_eq!(bits(&found), bits(&expected), "{}", param.name);
        kinds.insert(packing);
    }
    assert!(kinds.len() > 3, "{kinds:?}");
}

#[test]
fn wrong_requests_for_codes_are_refused() {
    let file = model(TensorType::Q8_0, 8).open().unwrap();
    let refused = |name: &str, rows| file.read_codes(name, rows, &mut RowCodes::default()).unwrap_err().to_string();
    assert!(refused("model.nothing", 0..1).contains("no such tensor"));
    assert!(refused("model.embed_tokens.weight", 30..34).contains("rows 30..34 were asked for, it has 33"));
    assert!(refused("model.norm.weight", 0..1).contains("rows of 1 elements of type F32 are not blocks of codes"));
}
