//! A folder that appears under its final name only when it is whole.
//!
//! It is written as `NAME.partial-PID-…` beside its destination and renamed at the end. Dropping it removes it; what a
//! killed process left is removed by the next one that writes to the same destination.

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::{io, process};

use tempfile::TempDir;

use crate::error::{Error, Result};

/// A folder on its way to a final name.
#[derive(Debug)]
pub(crate) struct Staging {
    folder: TempDir,
    destination: PathBuf,
    /// The folder that holds both.
    parent: PathBuf,
}

impl Staging {
    /// Begins a folder that is to become `destination`, which must not exist or be an empty folder. `source` must not
    /// lie inside of it.
    pub(crate) fn new(source: &Path, destination: &Path) -> Result<Staging> {
        let refuse = |what: &str| Err(Error::Destination { path: destination.to_path_buf(), what: what.into() });
        let destination_now = match fs::canonicalize(destination) {
            Ok(existing) => {
                let source = fs::canonicalize(source).map_err(Error::io(source, "opening"))?;
                if source.starts_with(&existing) {
                    return refuse("is the source or holds it; choose another destination");
                }
                if !existing.is_dir() {
                    return refuse("exists and is not a folder; choose another destination");
                }
                if fs::read_dir(&existing).map_err(Error::io(&existing, "listing"))?.next().is_some() {
                    return refuse("exists and is not empty; remove it or choose another destination");
                }
                existing
            }
            Err(e) if e.kind() == ErrorKind::NotFound && !destination.is_symlink() => destination.to_path_buf(),
            Err(e) => return Err(Error::io(destination, "opening")(e)),
        };
        let (Some(parent), Some(name)) = (destination_now.parent(), destination_now.file_name()) else {
            return refuse("is not the name of a new folder");
        };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        fs::create_dir_all(parent).map_err(Error::io(parent, "creating"))?;
        let device = |path: &Path| fs::metadata(path).map(|status| status.dev());
        if let (Ok(above), Ok(here)) = (device(parent), device(&destination_now))
            && above != here
        {
            return refuse("is a mount point, which cannot be replaced; give the name of a new folder inside of it");
        }

        let mut prefix = name.to_os_string();
        prefix.push(".partial-");
        remove_leftovers(parent, &prefix.to_string_lossy());
        prefix.push(format!("{}-", process::id()));
        let folder = tempfile::Builder::new()
            .prefix(&prefix)
            .permissions(Permissions::from_mode(0o777)) // less the process' umask, as for any folder
            .tempdir_in(parent)
            .map_err(Error::io(parent, "creating a folder in"))?;
        Ok(Staging { folder, parent: parent.to_path_buf(), destination: destination_now })
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes one small file, making folders above it.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.path().join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io(folder, "creating"))?;
        }
        let mut file = File::create_new(&path).map_err(Error::io(&path, "creating"))?;
        file.write_all(content).and_then(|()| file.sync_all()).map_err(Error::io(&path, "writing"))
    }

    /// Gives the folder its final name.
    pub(crate) fn finish(self) -> Result<()> {
        sync(self.path()).map_err(Error::io(self.path(), "writing"))?;
        // onto an empty folder this replaces it; onto anything else that came in the meantime it fails
        fs::rename(self.path(), &self.destination)
            .map_err(Error::io(&self.destination, "renaming the finished folder to"))?;
        let _ = self.folder.keep(); // nothing is left under the old name to remove
        sync(&self.parent).map_err(Error::io(&self.parent, "writing"))
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes folders of this prefix whose process is gone. What cannot be removed is left: it harms nothing.
fn remove_leftovers(parent: &Path, prefix: &str) {
    if !Path::new("/proc/self").exists() {
        return; // no way to tell whose process is gone
    }
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(|rest| rest.split('-').next());
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            tracing::info!("removing {}, left by an interrupted run", entry.path().display());
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(result: Result<Staging>) -> String {
        result.expect_err("must be refused").to_string()
    }

    #[test]
    fn a_folder_appears_whole_or_not_at_all() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let (source, out) = (root.path().join("source"), root.path().join("a/b/out"));
        fs::create_dir(&source).expect("new");
        let staging = Staging::new(&source, &out).expect("a new name");
        staging.write("templates/x", b"x").expect("writable");
        assert!(!out.exists());
        drop(staging);
        assert_eq!(fs::read_dir(root.path().join("a/b")).expect("the parent").count(), 0);

        for _ in 0..2 {
            let staging = Staging::new(&source, &out).expect("a new name, then an empty folder");
            staging.write("x", b"x").expect("writable");
            staging.finish().expect("renamed");
            assert_eq!(fs::read(out.join("x")).expect("there"), b"x");
            fs::remove_file(out.join("x")).expect("there");
        }
    }

    #[test]
    fn destinations_that_would_harm_are_refused() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let source = root.path().join("source");
        fs::create_dir(&source).expect("new");
        fs::write(source.join("file"), "x").expect("new");
        assert!(message(Staging::new(&source, &source)).contains("is the source or holds it"));
        assert!(message(Staging::new(&source, root.path())).contains("is the source or holds it"));
        assert!(message(Staging::new(&source, &source.join("../source/."))).contains("is the source or holds it"));
        assert!(message(Staging::new(&source, &source.join("file"))).contains("not a folder"));
        let full = root.path().join("full");
        fs::create_dir_all(full.join("x")).expect("new");
        assert!(message(Staging::new(&source, &full)).contains("not empty; remove it or choose another"));
        assert!(message(Staging::new(&source, Path::new("new/.."))).contains("not the name of a new folder"));
    }

    #[test]
    fn leftovers_of_dead_processes_are_removed() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let name = |pid: u32| root.path().join(format!("out.partial-{pid}-abc"));
        let (dead, alive, other) = (name(u32::MAX), name(process::id()), root.path().join("out.partial-mine"));
        for folder in [&dead, &alive, &other] {
            fs::create_dir_all(folder.join("x")).expect("new");
        }
        Staging::new(root.path(), &root.path().join("out")).expect("a new name");
        assert_eq!((dead.exists(), alive.exists(), other.exists()), (false, true, true));
    }
}
