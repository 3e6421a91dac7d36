use std::path::Path;

use converter::gguf::GgufFile;
use proptest::prelude::*;

use super::builder::{Builder, Row, V};
use super::data;

fn error(bytes: Vec<u8>) -> String {
    match GgufFile::from_bytes(bytes, Path::new("model.gguf")) {
        Ok(_) => panic!("the file must be refused"),
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with("model.gguf: "), "{error}");
            error
        }
    }
}

fn one_tensor() -> Builder {
    Builder::llama().f32("output_norm.weight", &[32], (0..32).map(|i| i as f32))
}

#[test]
fn versions_2_and_3_are_read() {
    for version in [2, 3] {
        assert_eq!(Builder { version, ..one_tensor() }.open().unwrap().tensors().len(), 1);
    }
}

#[test]
fn a_wrong_start_is_named() {
    for (bytes, message) in [
        (vec![], "the magic number needs 4 bytes at byte 0, the file ends at byte 0"),
        (b"GG".to_vec(), "the file ends at byte 2"),
        (
            Builder { magic: *b"ggml", ..one_tensor() }.bytes(),
            "not a GGUF file: it must start with the bytes \"GGUF\", found \"ggml\"",
        ),
        (Builder { version: 3u32.swap_bytes(), ..one_tensor() }.bytes(), "a big-endian GGUF file"),
        (Builder { version: 1, ..one_tensor() }.bytes(), "GGUF version 1; versions 2 and 3 can be read"),
        (Builder { version: 4, ..one_tensor() }.bytes(), "GGUF version 4"),
        (Builder { version: 0, ..one_tensor() }.bytes(), "GGUF version 0"),
    ] {
        let error = error(bytes);
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    let huge_string = |len: u64| V::Raw(8, len.to_le_bytes().to_vec());
    let huge_array = |kind: u32, len: u64| V::Raw(9, [&kind.to_le_bytes()[..], &len.to_le_bytes()[..]].concat());
    let base = one_tensor();
    for (builder, message) in [
        (Builder { tensor_count: Some(1 << 60), ..base.clone() }, "the number of tensors is 1152921504606846976"),
        (Builder { pair_count: Some(u64::MAX), ..base.clone() }, "the number of metadata pairs is"),
        (
            base.clone().with("k", huge_string(1 << 63)),
            "the length of the value of metadata `k` is 9223372036854775808",
        ),
        (base.clone().with("k", huge_string(u64::MAX)), "the length of the value of metadata `k`"),
        (base.clone().with("k", huge_array(4, 1 << 62)), "the length of metadata `k`"),
        (base.clone().with("k", huge_array(8, u64::MAX)), "the length of metadata `k`"),
        (base.clone().with("k", huge_array(9, 1 << 40)), "the length of metadata `k`"),
    ] {
        let error = error(builder.bytes());
        assert!(error.contains(message) && error.contains("are left"), "{error}");
    }
}

#[test]
fn bad_metadata_is_refused() {
    // Arrays of one array each, ten deep, the last one empty.
    let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()[..]].concat().repeat(10);
    let base = one_tensor();
    let mut not_utf8 = base.clone();
    not_utf8.pairs.push((b"general.\xff".to_vec(), V::U32(1)));
    let mut twice = base.clone();
    twice.pairs.push((b"llama.block_count".to_vec(), V::U32(1)));
    for (builder, message) in [
        (base.clone().with("k", V::Raw(9, nested)), "metadata `k` nests arrays deeper than 4"),
        (base.clone().with("k", V::Raw(13, vec![])), "metadata `k` has the unknown value type 13"),
        (
            base.clone().with("k", V::Raw(9, [&99u32.to_le_bytes()[..], &1u64.to_le_bytes()[..]].concat())),
            "unknown value type 99",
        ),
        (base.clone().with("k", V::Raw(7, vec![2])), "must be 0 or 1 (a boolean), found 2"),
        (base.clone().with("k", V::Raw(8, [&2u64.to_le_bytes()[..], b"\xc3("].concat())), "is not UTF-8"),
        (not_utf8, "the key of metadata pair 10 at byte"),
        (twice, "the metadata key `llama.block_count` occurs twice"),
        (base.clone().with("general.alignment", V::U32(0)), "general.alignment: must be a power of two, found 0"),
        (base.clone().with("general.alignment", V::U32(24)), "must be a power of two, found 24"),
        (base.with("general.alignment", V::Str("32")), "general.alignment: must be an unsigned 32-bit integer"),
    ] {
        let error = error(builder.bytes());
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn another_alignment_is_honoured() {
    let mut builder = Builder { alignment: 64, ..Builder::llama() }.with("general.alignment", V::U32(64));
    builder = builder.f32("output_norm.weight", &[2], [1.0, 2.0].into_iter()).f32(
        "blk.0.ffn_norm.weight",
        &[2],
        [3.0, 4.0].into_iter(),
    );
    let mut found = [0.0; 2];
    builder.open().unwrap().read_rows("model.layers.0.post_attention_layernorm.weight", 0..2, &mut found).unwrap();
    assert_eq!(found, [3.0, 4.0]);
}

#[test]
fn bad_tensors_are_refused_by_name() {
    let row = |change: &dyn Fn(&mut Row)| {
        let mut builder = one_tensor();
        change(&mut builder.rows[0]);
        builder
    };
    let two = || one_tensor().f32("blk.0.ffn_norm.weight", &[32], (0..32).map(|i| i as f32));
    let mut same_name = two();
    same_name.rows[1].name = "output_norm.weight".to_owned();
    let mut overlapping = two();
    overlapping.rows[1].offset = 96;
    let mut outside = two();
    outside.rows[1].offset = 160;
    for (builder, message) in [
        (row(&|r| r.dims = vec![]), "has 0 axes; 1 to 4 are possible"),
        (row(&|r| r.dims = vec![1; 5]), "has 5 axes"),
        (row(&|r| r.dims = vec![1 << 63, 4]), "has the impossible shape [9223372036854775808, 4]"),
        (row(&|r| r.dims = vec![u64::MAX; 4]), "has the impossible shape"),
        (row(&|r| r.dims = vec![1 << 62]), "has the impossible shape [4611686018427387904]"),
        (row(&|r| r.dims = vec![32, 0]), "has the impossible shape [32, 0]"),
        (row(&|r| r.dims = vec![1 << 61]), "needs 9223372036854775808 bytes at offset 0"),
        (row(&|r| r.offset = 4), "starts at offset 4, which is not a multiple of the alignment 32"),
        (row(&|r| r.offset = 32), "the file has only"),
        (row(&|r| r.offset = u64::MAX - 31), "the file has only"),
        (row(&|r| r.kind = 8), "output_norm.weight"),
        (row(&|r| (r.kind, r.dims) = (12, vec![32])), "has rows of 32 elements; its type Q4_K needs a multiple of 256"),
        (row(&|r| r.kind = 16), "has type 16 (IQ2_XXS); the types that can be read are F32, F16, BF16, Q4_0,"),
        (row(&|r| r.kind = 39), "has type 39 (MXFP4)"),
        (row(&|r| r.kind = 4), "has type 4 (unknown to this reader)"),
        (row(&|r| r.kind = u32::MAX), "(unknown to this reader)"),
        (same_name, "the tensor `output_norm.weight` occurs twice"),
        (overlapping, "ends at byte"),
        (outside, "it is truncated"),
    ] {
        if builder.rows[0].kind == 8 {
            // 32 elements of Q8_0 fit where 32 float32 were: a legal file.
            assert!(builder.open().is_ok());
            continue;
        }
        let error = error(builder.bytes());
        assert!(
            error.contains(message) && error.contains("output_norm.weight") | error.contains("ffn_norm"),
            "{error}"
        );
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = one_tensor().bytes();
    for len in 0..bytes.len() {
        error(bytes[..len].to_vec());
    }
}

#[test]
fn a_file_that_shrinks_after_it_was_opened_is_an_error() {
    let path = std::env::temp_dir().join(format!("converter-shrinks-{}.gguf", std::process::id()));
    std::fs::write(&path, one_tensor().bytes()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    std::fs::write(&path, b"").unwrap();
    let found = file.read_rows("model.norm.weight", 0..32, &mut [0.0; 32]);
    std::fs::remove_file(&path).unwrap();
    assert!(found.unwrap_err().to_string().starts_with("reading "));
}

#[test]
fn what_is_not_a_file_is_an_error() {
    for path in [Path::new("/nonexistent.gguf"), Path::new("/")] {
        assert!(GgufFile::open(path).is_err());
    }
}

/// Uses everything that a file offers; only panics count.
fn use_all(bytes: Vec<u8>) {
    let Ok(file) = GgufFile::from_bytes(bytes, Path::new("model.gguf")) else { return };
    let _ = file.hf_config();
    let _ = file.tokenizer_files();
    for tensor in file.tensors() {
        let rows = tensor.shape()[0].min(9);
        let width: usize = tensor.shape()[1..].iter().product();
        let _ = file.read_rows(tensor.hf_name(), 0..rows, &mut vec![0.0; rows * width]);
    }
}

/// The model fixture without its vocabulary's bulk, so that changes hit structure often.
fn small_model() -> Vec<u8> {
    let tokens: Vec<String> = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a"].map(str::to_owned).to_vec();
    Builder::llama()
        .with("tokenizer.ggml.model", V::Str("llama"))
        .with("tokenizer.ggml.tokens", V::Strs(tokens))
        .with("tokenizer.ggml.scores", V::F32s(vec![0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -1.0, -2.0]))
        .with("tokenizer.ggml.token_type", V::I32s(vec![2, 3, 3, 1, 1, 1, 1, 1]))
        .with("tokenizer.ggml.bos_token_id", V::U32(1))
        .with("llama.rope.freq_base", V::F32(500_000.0))
        .f32("blk.0.attn_q.weight", &[64, 2], (0..128).map(|i| i as f32))
        .f32("rope_freqs.weight", &[8], [1.0, 1.0, 1.0, 1.0, 2.0, 8.0, 8.0, 8.0].into_iter())
        .bytes()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = small_model();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        use_all(bytes);
    }

    #[test]
    fn extreme_numbers_never_panic(at in any::<prop::sample::Index>(), value in prop::sample::select(vec![0, 1, 0x7fff_ffff, u32::MAX])) {
        let mut bytes = small_model();
        let at = at.index(bytes.len() - 4);
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        use_all(bytes);
    }

    #[test]
    fn random_bytes_after_the_start_never_panic(rest in prop::collection::vec(any::<u8>(), 0..200)) {
        use_all([b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".as_slice(), &rest].concat());
    }
}

#[test]
fn the_model_fixture_cut_in_its_head_or_data_is_refused() {
    let bytes = std::fs::read(data("tiny.gguf")).unwrap();
    for len in (0..bytes.len()).step_by(97) {
        error(bytes[..len].to_vec());
    }
}
