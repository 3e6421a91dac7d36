//! Writes GGUF files, well-formed and otherwise.

use std::path::Path;

use converter::Error;
use converter::gguf::GgufFile;

/// A metadata value with its type in the file.
#[derive(Clone, Debug)]
pub(crate) enum V {
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(&'static str),
    U32s(Vec<u32>),
    Bools(Vec<bool>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Strs(Vec<String>),
    /// Type code and bytes as they are.
    Raw(u32, Vec<u8>),
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text].concat()
}

fn array(kind: u32, len: usize, body: Vec<u8>) -> (u32, Vec<u8>) {
    (9, [&kind.to_le_bytes()[..], &(len as u64).to_le_bytes()[..], &body].concat())
}

impl V {
    fn encode(self) -> (u32, Vec<u8>) {
        match self {
            V::U32(v) => (4, v.to_le_bytes().to_vec()),
            V::I32(v) => (5, v.to_le_bytes().to_vec()),
            V::F32(v) => (6, v.to_le_bytes().to_vec()),
            V::Bool(v) => (7, vec![v.into()]),
            V::Str(v) => (8, string(v.as_bytes())),
            V::Bools(v) => array(7, v.len(), v.iter().map(|&v| v.into()).collect()),
            V::U32s(v) => array(4, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect()),
            V::I32s(v) => array(5, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect()),
            V::F32s(v) => array(6, v.len(), v.iter().flat_map(|v| v.to_le_bytes()).collect()),
            V::Strs(v) => array(8, v.len(), v.iter().flat_map(|v| string(v.as_bytes())).collect()),
            V::Raw(kind, bytes) => (kind, bytes),
        }
    }
}

/// One row of the tensor table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// In the file's order, fastest axis first.
    pub(crate) dims: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) offset: u64,
}

/// A file under construction; every field may be set to nonsense.
#[derive(Clone, Debug)]
pub(crate) struct Builder {
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
    pub(crate) tensor_count: Option<u64>,
    pub(crate) pair_count: Option<u64>,
    pub(crate) pairs: Vec<(Vec<u8>, V)>,
    pub(crate) rows: Vec<Row>,
    pub(crate) data: Vec<u8>,
    pub(crate) alignment: usize,
}

impl Builder {
    /// A Llama with 4 query heads, 2 key/value heads of size 16, hidden 32; no tensors.
    pub(crate) fn llama() -> Self {
        Self::of("llama").with("llama.vocab_size", V::U32(300))
    }

    /// The same sizes, of any architecture.
    pub(crate) fn of(architecture: &'static str) -> Self {
        let this = Self {
            magic: *b"GGUF",
            version: 3,
            tensor_count: None,
            pair_count: None,
            pairs: vec![],
            rows: vec![],
            data: vec![],
            alignment: 32,
        };
        let sizes = [
            ("block_count", V::U32(1)),
            ("context_length", V::U32(128)),
            ("embedding_length", V::U32(32)),
            ("feed_forward_length", V::U32(64)),
            ("attention.head_count", V::U32(4)),
            ("attention.head_count_kv", V::U32(2)),
            ("attention.key_length", V::U32(16)),
            ("attention.layer_norm_rms_epsilon", V::F32(1e-5)),
        ];
        let this = this.with("general.architecture", V::Str(architecture));
        sizes.into_iter().fold(this, |this, (key, value)| this.with(&format!("{architecture}.{key}"), value))
    }

    /// Sets a key, in place of an earlier value.
    pub(crate) fn with(mut self, key: &str, value: V) -> Self {
        self.pairs.retain(|(k, _)| k != key.as_bytes());
        self.pairs.push((key.into(), value));
        self
    }

    pub(crate) fn without(mut self, key: &str) -> Self {
        self.pairs.retain(|(k, _)| k != key.as_bytes());
        self
    }

    /// Adds a float32 tensor; `shape` slowest axis first.
    pub(crate) fn f32(self, name: &str, shape: &[u64], values: impl Iterator<Item = f32>) -> Self {
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        assert_eq!(bytes.len() as u64, 4 * shape.iter().product::<u64>());
        self.tensor(name, shape, 0, &bytes)
    }

    /// Adds a tensor of any type, by its code.
    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment), 0);
        let dims = shape.iter().rev().copied().collect();
        self.rows.push(Row { name: name.to_owned(), dims, kind, offset: self.data.len() as u64 });
        self.data.extend(bytes);
        self
    }

    /// A float32 tensor with the values 0, 1, 2, ….
    pub(crate) fn counted(self, name: &str, shape: &[u64]) -> Self {
        let elements: u64 = shape.iter().product();
        self.f32(name, shape, (0..elements).map(|i| i as f32))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.tensor_count.unwrap_or(self.rows.len() as u64).to_le_bytes());
        out.extend(self.pair_count.unwrap_or(self.pairs.len() as u64).to_le_bytes());
        for (key, value) in &self.pairs {
            let (kind, bytes) = value.clone().encode();
            out.extend(string(key));
            out.extend(kind.to_le_bytes());
            out.extend(bytes);
        }
        for row in &self.rows {
            out.extend(string(row.name.as_bytes()));
            out.extend((row.dims.len() as u32).to_le_bytes());
            out.extend(row.dims.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(row.kind.to_le_bytes());
            out.extend(row.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment.max(1)), 0);
        out.extend(&self.data);
        out
    }

    pub(crate) fn open(&self) -> Result<GgufFile, Error> {
        GgufFile::from_bytes(self.bytes(), Path::new("model.gguf"))
    }
}
