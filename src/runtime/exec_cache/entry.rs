//! One file of the cache: what it is, and the executable.
//!
//! ```text
//! 16 bytes  "xllama-exec-v2\n\0"
//! 32 bytes  sha256 of everything after it
//!  4 bytes  n, little-endian
//!  n bytes  the header as JSON
//! the rest  the executable as its plugin serialized it
//! ```

use std::io::{self, Read, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const MAGIC: &[u8; 16] = b"xllama-exec-v2\n\0";

/// A header is a few names; a longer one is damage.
const MAX_HEADER: u32 = 1 << 16;

/// What an entry is, for those who list them; what decides whether it may be used is the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Name of the program: `prefill`, `decode`, …
    pub program: String,
    /// Shape and type of its first argument as MLIR writes them, `49152x576xf32`: the embedding, for a step of a model.
    pub argument: String,
    /// The plugin's name for its platform: `cpu`, `cuda`, `tpu`.
    pub platform: String,
    /// When it was compiled, in seconds since 1970.
    pub created: u64,
}

impl Header {
    /// Of the module `text` (StableHLO), compiled now for `platform`.
    pub fn of(text: &str, platform: &str) -> Header {
        let after = |mark: &str, ends: [char; 2]| {
            let rest = text.split_once(mark).map_or("", |(_, rest)| rest);
            rest.split(ends).next().unwrap_or_default().to_string()
        };
        Header {
            program: after("module @", [' ', '\n']),
            argument: after("tensor<", ['>', '\n']),
            platform: platform.to_string(),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        }
    }

    /// When it was compiled; none where that is no time, in a damaged entry.
    pub fn created(&self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_secs(self.created))
    }
}

/// Writes an entry.
pub(super) fn write(out: &mut impl Write, header: &Header, body: &[u8]) -> io::Result<()> {
    let mut head = vec![0; 4];
    serde_json::to_writer(&mut head, header)?;
    let len = (head.len() - 4) as u32;
    head[..4].copy_from_slice(&len.to_le_bytes());
    let sum = Sha256::new().chain_update(&head).chain_update(body).finalize();
    [&MAGIC[..], &sum, &head, body].into_iter().try_for_each(|part| out.write_all(part))
}

/// The executable in an entry, if the entry is whole.
pub(super) fn body(bytes: &[u8]) -> Option<&[u8]> {
    let (sum, content) = bytes.strip_prefix(MAGIC)?.split_at_checked(32)?;
    let (len, rest) = content.split_first_chunk()?;
    let (_, body) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    (Sha256::digest(content).as_slice() == sum).then_some(body)
}

/// The header of an entry, without reading the executable or checking the sum.
pub(super) fn header(mut file: impl Read) -> Option<Header> {
    let mut fixed = [0; 52];
    file.read_exact(&mut fixed).ok()?;
    let len = u32::from_le_bytes(*fixed.last_chunk()?);
    if !fixed.starts_with(MAGIC) || len > MAX_HEADER {
        return None;
    }
    let mut text = vec![0; len as usize];
    file.read_exact(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(body: &[u8]) -> (Header, Vec<u8>) {
        let text = "module @decode attributes {x} {\n  func.func public @main(%0: tensor<4x2xf32> loc(\"a\"))\n";
        let header = Header::of(text, "cpu");
        let mut bytes = Vec::new();
        write(&mut bytes, &header, body).unwrap();
        (header, bytes)
    }

    #[test]
    fn what_is_written_is_read() {
        let (header, bytes) = written(b"machine code");
        assert_eq!((&*header.program, &*header.argument, &*header.platform), ("decode", "4x2xf32", "cpu"));
        assert_eq!(body(&bytes), Some(&b"machine code"[..]));
        assert_eq!(super::header(&bytes[..]), Some(header));
    }

    #[test]
    fn no_part_of_an_entry_can_change_or_be_missing() {
        let (_, bytes) = written(b"machine code");
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(body(&damaged), None, "byte {at} changed");
            assert_eq!(body(&bytes[..at]), None, "cut to {at} bytes");
        }
        assert_eq!(body(&[&bytes[..], b"x"].concat()), None, "one byte more");
    }

    #[test]
    fn a_damaged_header_is_none() {
        let (_, bytes) = written(b"");
        for len in 0..bytes.len() {
            assert_eq!(super::header(&bytes[..len]), None, "cut to {len} bytes");
        }
        let mut long = bytes.clone();
        long[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!((super::header(&long[..]), body(&long)), (None, None));
        let (header, _) = written(b"");
        assert_eq!(Header { created: u64::MAX, ..header }.created(), None);
    }
}
