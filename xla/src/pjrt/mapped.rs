//! Bytes of a file as host memory, without a copy: what zero-copy uploads of a checkpoint hand to a device.

use std::fs::File;
use std::ops::Range;

use memmap2::{Mmap, MmapOptions};

use super::Error;

/// A read-only view of a range of a file, for [`HostData::Shared`](super::HostData::Shared).
///
/// The file must not be truncated while the view lives: the system ends a process that reads past the end of a file
/// (SIGBUS). Files that appear by rename and are never changed in place, as converted checkpoints are, cannot do that.
#[derive(Debug)]
pub struct MappedBytes(Mmap);

impl MappedBytes {
    /// Maps bytes `range` of `file`. An offset that is a multiple of 64 gives an address that is one.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the system refuses the mapping.
    pub fn new(file: &File, range: Range<u64>) -> Result<MappedBytes, Error> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| {
            Error::Invalid(format!("a file range of {range:?} bytes does not fit this machine's memory"))
        })?;
        // SAFETY: the mapping is read-only, and nothing in this process writes to the file. Another process that
        // changes it in place changes what is read, and one that truncates it ends this process; neither makes the
        // memory of this process invalid, as the type's documentation says.
        let map = unsafe { MmapOptions::new().offset(range.start).len(len).map(file) };
        map.map(MappedBytes).map_err(|e| Error::Invalid(format!("mapping {range:?} of a file: {e}")))
    }
}

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_view_holds_the_range_and_its_alignment() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&bytes).unwrap();
        let view = MappedBytes::new(&file, 4160..9000).unwrap();
        assert_eq!(view.as_ref(), &bytes[4160..9000]);
        assert!(view.as_ref().as_ptr().addr().is_multiple_of(64));
    }
}
