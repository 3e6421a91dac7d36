//! Any bytes as a GGUF file: refused with an error, or every tensor that it lists can be read.
#![no_main]

use std::path::Path;

use converter::gguf::{GgufFile, RowCodes};
use libfuzzer_sys::fuzz_target;

/// Rows of a tensor that are read at most, and the longest row: enough for every block type.
const ROWS: usize = 4;
const COLUMNS: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = GgufFile::from_bytes(data.to_vec(), Path::new("model.gguf")) else { return };
    let _ = file.hf_config();
    for tensor in file.tensors() {
        let shape = tensor.shape();
        let (rows, columns) = (shape[0].min(ROWS), shape[1..].iter().product::<usize>());
        if columns <= COLUMNS {
            let mut out = vec![0.0; rows * columns];
            let _ = file.read_rows(tensor.hf_name(), 0..rows, &mut out);
            let _ = file.read_codes(tensor.hf_name(), 0..rows, &mut RowCodes::default());
        }
    }
});
