//! Where the bytes of a GGUF file come from.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A file on disk or bytes in memory; both can be read from several threads at once.
#[derive(Debug)]
pub(super) enum Source {
    File(File),
    Bytes(Vec<u8>),
}

impl Source {
    /// Fills `out` from position `at`.
    pub(super) fn read_exact_at(&self, out: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Source::File(file) => file.read_exact_at(out, at),
            Source::Bytes(bytes) => {
                let start = usize::try_from(at).ok().filter(|&start| start <= bytes.len());
                let found = start.and_then(|start| bytes[start..].get(..out.len()));
                out.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
        }
    }
}
