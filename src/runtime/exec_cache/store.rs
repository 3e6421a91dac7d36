//! The folder of entries, with any number of processes that read, write and evict at once, and any of them killed.
//!
//! ```text
//! <cache>/executables/<key>.v2     an entry, put there whole by a rename; its modification time is its last use
//! <cache>/executables/.tmp*        an entry that is being written, or what a killed writer left
//! <cache>/executables/<key>        an entry of the first version, which is not read any more
//! ```
//!
//! Readers take no lock: an entry is whole or absent. Evictions take turns with a lock on the folder itself, which the
//! system frees when the process dies. Files with other names are left alone.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::entry::{self, Header};
use crate::Error;

const SUFFIX: &str = ".v2";
const TEMPORARY: &str = ".tmp";

/// A temporary file of this age has no writer any more.
const ABANDONED: Duration = Duration::from_secs(24 * 60 * 60);

/// How long to wait for another eviction, and how often to look.
const PATIENCE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(10);

/// The folder that holds the entries.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

/// An entry as [`Store::list`] finds it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Hash of what decides the machine code, in hexadecimal.
    pub key: String,
    /// What it says of itself; none if that is not readable: damaged, or of an earlier version.
    pub header: Option<Header>,
    /// Size of the file.
    pub bytes: u64,
    /// When it was last loaded, or stored if never.
    pub used: SystemTime,
}

/// What [`Store::clear`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Files.
    pub removed: usize,
    /// Their sizes added up.
    pub bytes: u64,
}

/// What the name of a file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Current,
    FirstVersion,
    Temporary,
}

struct Found {
    name: String,
    kind: Kind,
    bytes: u64,
    used: SystemTime,
}

impl Store {
    /// The entries in `folder`, which is made when the first is stored.
    pub fn new(folder: PathBuf) -> Store {
        Store { folder }
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The file of `key`.
    pub fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}{SUFFIX}"))
    }

    /// Notes that `key` was used now, for [`Store::put`] to evict others first.
    pub(super) fn touch(&self, key: &str) -> io::Result<()> {
        File::open(self.path(key))?.set_modified(SystemTime::now())
    }

    /// Stores an entry, then evicts the least recently used others until all together are at most `limit` bytes.
    ///
    /// # Errors
    /// The folder cannot be made or written. There is no partial entry then.
    pub fn put(&self, key: &str, header: &Header, body: &[u8], limit: u64) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let mut file = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(&self.folder)?;
        entry::write(&mut file, header, body)?;
        // Times set by the system are coarser than those that `touch` sets, and would mix up their order.
        file.as_file().set_modified(SystemTime::now())?;
        file.as_file().sync_all()?;
        file.persist(self.path(key))?;
        if let Err(why) = self.evict(key, limit) {
            tracing::warn!("executables in {} not kept to {limit} bytes: {why}", self.folder.display());
        }
        Ok(())
    }

    /// All entries, the last used first.
    ///
    /// # Errors
    /// The folder cannot be read; one that does not exist is empty.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let mut found = self.scan().map_err(Error::io("reading", &self.folder))?;
        found.retain(|f| f.kind != Kind::Temporary);
        found.sort_by(|a, b| b.used.cmp(&a.used).then_with(|| a.name.cmp(&b.name)));
        let entry = |Found { name, bytes, used, .. }: Found| {
            let header = match File::open(self.folder.join(&name)) {
                Err(error) if error.kind() == ErrorKind::NotFound => return None,
                file => file.ok().and_then(entry::header),
            };
            Some(Entry { key: name.trim_end_matches(SUFFIX).to_string(), header, bytes, used })
        };
        Ok(found.into_iter().filter_map(entry).collect())
    }

    /// Removes the entries that were not used for `unused`, and what killed writers left.
    ///
    /// # Errors
    /// The folder cannot be read, or a file not be removed.
    pub fn clear(&self, unused: Duration) -> Result<Freed, Error> {
        let mut freed = Freed::default();
        for found in self.scan().map_err(Error::io("reading", &self.folder))? {
            let enough = if found.kind == Kind::Temporary { ABANDONED } else { unused };
            if found.age() >= enough
                && self.remove(&found).map_err(Error::io("removing", self.folder.join(&found.name)))?
            {
                freed.removed += 1;
                freed.bytes += found.bytes;
            }
        }
        Ok(freed)
    }

    fn evict(&self, kept: &str, limit: u64) -> io::Result<()> {
        let folder = File::open(&self.folder)?;
        if !lock(&folder) {
            return Ok(());
        }
        let mut entries = Vec::new();
        for found in self.scan()? {
            match found.kind {
                Kind::Current => entries.push(found),
                Kind::FirstVersion => drop(self.remove(&found)?),
                Kind::Temporary if found.age() >= ABANDONED => drop(self.remove(&found)?),
                Kind::Temporary => {}
            }
        }
        let mut bytes: u64 = entries.iter().map(|e| e.bytes).sum();
        entries.retain(|e| e.name.strip_suffix(SUFFIX) != Some(kept));
        entries.sort_by_key(|e| e.used);
        for entry in entries {
            if bytes <= limit {
                break;
            }
            self.remove(&entry)?;
            bytes -= entry.bytes;
        }
        Ok(())
    }

    /// False if it was gone already.
    fn remove(&self, found: &Found) -> io::Result<bool> {
        match fs::remove_file(self.folder.join(&found.name)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            done => done.map(|()| true),
        }
    }

    /// The files that are the cache's own by their name.
    fn scan(&self) -> io::Result<Vec<Found>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let Some(kind) = kind(&name) else { continue };
            match entry.metadata() {
                Ok(file) if file.is_file() => {
                    found.push(Found { name, kind, bytes: file.len(), used: file.modified()? });
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

impl Found {
    /// How long it was not used; nothing if its time is in the future.
    fn age(&self) -> Duration {
        self.used.elapsed().unwrap_or_default()
    }
}

fn kind(name: &str) -> Option<Kind> {
    let is_key = |text: &str| text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match name.strip_suffix(SUFFIX) {
        Some(key) => is_key(key).then_some(Kind::Current),
        None if is_key(name) => Some(Kind::FirstVersion),
        None => name.starts_with(TEMPORARY).then_some(Kind::Temporary),
    }
}

/// Takes the lock. False if somebody else holds on to it: that one evicts, or the next one to store does. True also
/// where the file system has no locks: two that evict at once remove too much at worst.
fn lock(folder: &File) -> bool {
    let started = Instant::now();
    loop {
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) if started.elapsed() < PATIENCE => std::thread::sleep(POLL),
            Err(TryLockError::WouldBlock) => return false,
            Ok(()) | Err(TryLockError::Error(_)) => return true,
        }
    }
}
