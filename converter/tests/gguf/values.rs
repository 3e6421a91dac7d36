use std::io::{BufReader, Read};

use converter::gguf::{GgufFile, TensorType};
use npyz::npz::NpzArchive;

use super::builder::Builder;
use super::data;

pub(crate) fn npz(name: &str) -> NpzArchive<BufReader<std::fs::File>> {
    NpzArchive::open(data(name)).unwrap()
}

pub(crate) fn read<T: npyz::Deserialize>(archive: &mut NpzArchive<BufReader<std::fs::File>>, name: &str) -> Vec<T> {
    archive.by_name(name).unwrap().unwrap_or_else(|| panic!("{name} is not in the archive")).into_vec().unwrap()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}

#[test]
fn every_type_has_the_values_of_the_python_package() {
    let mut archive = npz("gguf_vectors.npz");
    for kind in [
        TensorType::F32,
        TensorType::F16,
        TensorType::Bf16,
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q8_0,
        TensorType::Q2K,
        TensorType::Q3K,
        TensorType::Q4K,
        TensorType::Q5K,
        TensorType::Q6K,
    ] {
        let blocks: Vec<u8> = read(&mut archive, &format!("{}/blocks", kind.name()));
        let expected: Vec<f32> = read(&mut archive, &format!("{}/values", kind.name()));
        assert_eq!(blocks.len() / kind.block_bytes() * kind.block_len(), expected.len(), "{}", kind.name());
        assert!(expected.len() >= 256);
        let mut found = vec![0.0; expected.len()];
        kind.dequantize(&blocks, &mut found);
        assert_eq!(bits(&found), bits(&expected), "{}", kind.name());
    }
}

/// Grouped heads, head size not hidden / heads, biases, an output head, and a type of each family.
#[test]
fn a_whole_model_reads_as_hugging_face_has_it() {
    let file = GgufFile::open(&data("tiny.gguf")).unwrap();
    let mut archive = npz("tiny.npz");
    assert!(file.is_quantized());
    let names: Vec<&str> = file.tensors().iter().map(|tensor| tensor.hf_name()).collect();
    let stored: Vec<String> = archive.array_names().filter(|name| *name != "about").map(str::to_owned).collect();
    assert_eq!(names.len(), stored.len());
    for name in &stored {
        let tensor = file.tensor(name).unwrap_or_else(|| panic!("{name} is missing"));
        let expected: Vec<f32> = read(&mut archive, name);
        let rows = tensor.shape()[0].min(64);
        assert_eq!(expected.len(), rows * tensor.shape()[1..].iter().product::<usize>(), "{name}");
        let mut found = vec![0.0; expected.len()];
        file.read_rows(name, 0..rows, &mut found).unwrap();
        assert_eq!(bits(&found), bits(&expected), "{name}");
    }
    assert_eq!(file.tensor("model.layers.0.self_attn.q_proj.weight").unwrap().shape(), [64, 32]);
    assert_eq!(file.tensor("model.layers.0.self_attn.o_proj.weight").unwrap().shape(), [32, 64]);
    assert_eq!(file.tensor("model.layers.0.self_attn.k_proj.weight").unwrap().kind().name(), "BF16");
}

#[test]
fn any_range_of_rows_is_that_part_of_the_whole() {
    let file = GgufFile::open(&data("tiny.gguf")).unwrap();
    for tensor in file.tensors() {
        let rows = tensor.shape()[0];
        let width: usize = tensor.shape()[1..].iter().product();
        let mut whole = vec![0.0; rows * width];
        file.read_rows(tensor.hf_name(), 0..rows, &mut whole).unwrap();
        // 7 divides neither a head nor a block.
        for start in (0..rows).step_by(7) {
            let end = rows.min(start + 7);
            let mut part = vec![0.0; (end - start) * width];
            file.read_rows(tensor.hf_name(), start..end, &mut part).unwrap();
            assert_eq!(bits(&part), bits(&whole[start * width..end * width]), "{} {start}", tensor.hf_name());
        }
        file.read_rows(tensor.hf_name(), rows..rows, &mut []).unwrap();
    }
}

/// Row r of the file has the value r: two heads of 8 rows, where row 2j + p belongs at p·4 + j.
#[test]
fn interleaved_rows_of_each_head_become_halves() {
    let file = Builder::llama()
        .with("llama.attention.key_length", super::builder::V::U32(8))
        .f32("blk.0.attn_k.weight", &[16, 2], (0..32).map(|i| (i / 2) as f32))
        .open()
        .unwrap();
    let mut found = [0.0; 32];
    file.read_rows("model.layers.0.self_attn.k_proj.weight", 0..16, &mut found).unwrap();
    let rows: Vec<f32> = found.chunks(2).map(|row| row[0]).collect();
    assert_eq!(rows, [0., 2., 4., 6., 1., 3., 5., 7., 8., 10., 12., 14., 9., 11., 13., 15.]);
}

/// More rows than one read holds (256 KiB), from several threads at once.
#[test]
fn large_tensors_are_read_in_pieces_by_many_threads() {
    let file = Builder::llama().f32("token_embd.weight", &[3000, 32], (0..96_000).map(|i| i as f32)).open().unwrap();
    std::thread::scope(|scope| {
        for start in [0, 1, 500, 999] {
            let file = &file;
            scope.spawn(move || {
                let mut found = vec![0.0; 2001 * 32];
                file.read_rows("model.embed_tokens.weight", start..start + 2001, &mut found).unwrap();
                assert!(found.iter().enumerate().all(|(i, &v)| v == (start * 32 + i) as f32));
            });
        }
    });
}

#[test]
fn wrong_requests_are_refused() {
    let file = Builder::llama().f32("output_norm.weight", &[32], (0..32).map(|i| i as f32)).open().unwrap();
    let refused = |name: &str, rows: std::ops::Range<usize>, len: usize| {
        file.read_rows(name, rows, &mut vec![0.0; len]).unwrap_err().to_string()
    };
    assert!(refused("model.nothing", 0..1, 1).contains("no such tensor"));
    assert!(refused("model.norm.weight", 30..33, 3).contains("rows 30..33 were asked for, it has 32"));
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = refused("model.norm.weight", 3..1, 0);
    assert!(reversed.contains("rows 3..1"), "{reversed}");
    assert!(refused("model.norm.weight", 0..4, 5).contains("4 rows have 4 elements, the destination has 5"));
}

#[test]
fn the_fixtures_say_what_made_them() {
    let mut about = String::new();
    read::<u8>(&mut npz("gguf_vectors.npz"), "about").as_slice().read_to_string(&mut about).unwrap();
    assert!(about.contains("\"gguf\": \"0.19.0\""), "{about}");
}
