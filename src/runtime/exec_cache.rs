//! Compiled executables on disk: `<cache>/executables/<key>`, where the key is a hash of everything that decides the
//! machine code. An entry that does not check out is recompiled, never trusted; a cache that cannot be written is no error.

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use sha2::{Digest, Sha256};
use xla::pjrt::{Client, CompileOptions, LoadedExecutable, Plugin};

use crate::Error;

const MAGIC: &[u8; 16] = b"xllama-exec-v1\n\0";

/// The cache of one plugin and machine.
#[derive(Clone, Debug)]
pub struct ExecutableCache {
    folder: Option<PathBuf>,
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
        ExecutableCache { folder, platform }
    }

    /// The executable of `text`, from the cache or compiled (and then stored).
    pub fn get(
        &self,
        client: &Client,
        text: &str,
        options: &CompileOptions,
    ) -> Result<(LoadedExecutable, Origin), Error> {
        let path = self.folder.as_ref().map(|f| f.join(self.key(text, options)));
        if let Some(executable) = path.as_ref().and_then(|p| self.load(client, p)) {
            return Ok((executable, Origin::Cached));
        }
        let executable = client.compile(text, options)?;
        if let Some(path) = path
            && let Err(why) = store(&path, &executable)
        {
            tracing::warn!("executable not cached in {}: {why}", path.display());
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

    fn load(&self, client: &Client, path: &PathBuf) -> Option<LoadedExecutable> {
        let bytes = fs::read(path).ok()?;
        let body = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(32));
        let reason = match body {
            Some((sum, body)) if Sha256::digest(body).as_slice() == sum => match client.deserialize(body) {
                Ok(executable) => return Some(executable),
                Err(why) => why.to_string(),
            },
            _ => "damaged".to_string(),
        };
        tracing::warn!("cached executable {} is not used ({reason}); compiling again", path.display());
        None
    }
}

fn store(path: &PathBuf, executable: &LoadedExecutable) -> Result<(), Box<dyn std::error::Error>> {
    let folder = path.parent().ok_or("no parent folder")?;
    fs::create_dir_all(folder)?;
    let body = executable.serialize()?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(MAGIC)?;
    file.write_all(&Sha256::digest(&body))?;
    file.write_all(&body)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
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
