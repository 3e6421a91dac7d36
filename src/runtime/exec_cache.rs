//! Compiled executables on disk, under a key that is a hash of everything that decides the machine code. An entry that
//! does not check out is recompiled, never trusted; a cache that cannot be written is no error.

mod entry;
mod limit;
mod store;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use sha2::{Digest, Sha256};
use xla::pjrt::{Client, CompileOptions, LoadedExecutable, Plugin};

use crate::Error;

pub use entry::Header;
pub use limit::{VARIABLE, limit};
pub use store::{Entry, Freed, Store};

/// The cache of one plugin and machine.
#[derive(Clone, Debug)]
pub struct ExecutableCache {
    store: Option<Store>,
    platform: Vec<u8>,
}

/// How an executable was had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Loaded from the cache.
    Cached,
    /// Compiled now.
    Compiled,
}

impl ExecutableCache {
    /// The cache below `folder` (none: always compile) for executables of `plugin` on `client`'s devices.
    pub fn new(folder: Option<PathBuf>, plugin: &Plugin, client: &Client) -> ExecutableCache {
        let mut platform = Vec::new();
        let (major, minor) = plugin.api_version();
        let file = fs::metadata(plugin.path()).ok();
        let modified = file.as_ref().and_then(|m| m.modified().ok());
        let kinds: Vec<String> = client.devices().iter().map(|d| d.kind().to_string()).collect();
        let parts = [
            env!("CARGO_PKG_VERSION").to_string(),
            client.platform_name().to_string(),
            client.platform_version().to_string(),
            format!("{major}.{minor}"),
            format!("{} {:?} {modified:?}", plugin.path().display(), file.map(|m| m.len())),
            kinds.join(","),
            cpu_features(),
            std::env::var("XLA_FLAGS").unwrap_or_default(),
        ];
        for part in parts {
            platform.extend(part.as_bytes());
            platform.push(0);
        }
        ExecutableCache { store: folder.map(Store::new), platform }
    }

    /// The executable of `text`, from the cache or compiled (and then stored).
    ///
    /// # Errors
    /// The plugin does not compile it, or [`VARIABLE`] is no limit.
    pub fn get(
        &self,
        client: &Client,
        text: &str,
        options: &CompileOptions,
    ) -> Result<(LoadedExecutable, Origin), Error> {
        let Some(store) = &self.store else { return Ok((client.compile(text, options)?, Origin::Compiled)) };
        let limit = limit()?;
        let key = self.key(text, options);
        if let Some(executable) = load(client, store, &key) {
            return Ok((executable, Origin::Cached));
        }
        let executable = client.compile(text, options)?;
        let header = Header::of(text, client.platform_name());
        if limit > 0
            && let Err(why) = put(store, &key, &header, &executable, limit)
        {
            tracing::warn!("executable not cached in {}: {why}", store.path(&key).display());
        }
        Ok((executable, Origin::Compiled))
    }

    fn key(&self, text: &str, options: &CompileOptions) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.platform);
        hash.update(format!("{options:?}"));
        hash.update([0]);
        hash.update(text);
        hex(&hash.finalize())
    }
}

fn load(client: &Client, store: &Store, key: &str) -> Option<LoadedExecutable> {
    let path = store.path(key);
    let started = Instant::now();
    let bytes = fs::read(&path).ok()?;
    let read = started.elapsed();
    let body = entry::body(&bytes);
    let checked = started.elapsed();
    let reason = match body.map(|body| client.deserialize(body)) {
        Some(Ok(executable)) => {
            let loaded = started.elapsed();
            tracing::debug!(
                "{}: {} bytes read in {read:?}, checked in {:?}, loaded by the plugin in {:?}",
                path.display(),
                bytes.len(),
                checked - read,
                loaded - checked
            );
            // Where this cannot be noted, the entry is evicted the sooner: no harm.
            let _ = store.touch(key);
            return Some(executable);
        }
        Some(Err(why)) => why.to_string(),
        None => "damaged".to_string(),
    };
    tracing::warn!("cached executable {} is not used ({reason}); compiling again", path.display());
    None
}

fn put(
    store: &Store,
    key: &str,
    header: &Header,
    executable: &LoadedExecutable,
    limit: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    Ok(store.put(key, header, &executable.serialize()?, limit)?)
}

/// The processor's name and feature flags: machine code for one set must not be loaded where another is found.
fn cpu_features() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let wanted = |line: &&str| ["model name", "flags", "Features", "CPU part"].iter().any(|k| line.starts_with(k));
    let mut lines: Vec<&str> = info.lines().filter(wanted).collect();
    lines.sort_unstable();
    lines.dedup();
    format!("{} {}", std::env::consts::ARCH, lines.join("\n"))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
