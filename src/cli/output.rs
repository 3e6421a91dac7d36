//! Files that a command writes: beside, then renamed, so that a half-written one never has the final name.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use xllama::Error;

/// A file that will be written. Making one early finds out early that it cannot be.
pub struct Output {
    temporary: tempfile::NamedTempFile,
    path: PathBuf,
}

impl Output {
    /// Prepares to write `path`.
    pub fn new(path: &Path) -> Result<Output, Error> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = tempfile::NamedTempFile::new_in(folder).map_err(Error::io("writing into", folder))?;
        Ok(Output { temporary, path: path.into() })
    }

    /// Writes the whole content under the final name.
    pub fn write(self, bytes: &[u8]) -> Result<(), Error> {
        let Output { mut temporary, path } = self;
        temporary.write_all(bytes).map_err(Error::io("writing", &path))?;
        temporary.as_file().sync_all().map_err(Error::io("writing", &path))?;
        temporary.persist(&path).map_err(|e| Error::Io { action: "writing", path: path.clone(), source: e.error })?;
        // A temporary file is private; a result is not.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(Error::io("writing", &path))?;
        }
        Ok(())
    }
}
