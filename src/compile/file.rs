//! A compiled program in a file, with what must be the same where it is loaded.
//!
//! ```text
//! 16 bytes   magic
//! 8 bytes    length of the header, little-endian
//! header     JSON: format, plugin, devices, program, and for people the model and the step
//! 32 bytes   sha256 of header and body
//! body       the plugin's own form of the executable
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use xla::pjrt::{Client, CompileOptions, DeviceDescription, LoadedExecutable, Plugin, Value as Attribute};

use super::job::{Job, Prepared};
use super::target::{Compiled, Machine};
use crate::Error;
use crate::runtime::{Engine, StepSpec, build, hex};

const MAGIC: &[u8; 16] = b"xllama-program\n\0";

/// Of this layout, and of the programs that are in it.
const FORMAT: u64 = 1;

/// A header longer than this is none.
const MAX_HEADER: u64 = 1 << 20;

/// Everything that decides whether an executable may run: text to compare, and to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The build of the plugin.
    pub plugin: String,
    /// The devices: `8 × TPU v5 lite, 2x4x1`.
    pub devices: String,
    /// sha256 of the StableHLO text and the compile options that all targets share.
    pub program: String,
}

/// An executable in memory, as its file has it.
#[derive(Clone, Debug)]
pub struct ExecutableFile {
    path: PathBuf,
    header: Value,
    identity: Identity,
    body: Vec<u8>,
}

impl Identity {
    /// Of a program for these devices of a plugin.
    pub fn new(plugin: &Plugin, platform_version: &str, devices: &[DeviceDescription], program: String) -> Identity {
        Identity { plugin: build_of(plugin, platform_version), devices: devices_of(devices), program }
    }

    /// Of a program that is to run on the first `devices` devices of `client`.
    pub fn of_client(client: &Client, devices: usize, program: String) -> Identity {
        let mut all: Vec<DeviceDescription> = client.devices().iter().map(|d| d.description().clone()).collect();
        all.sort_by_key(|d| d.id);
        all.truncate(devices);
        Identity::new(client.plugin(), client.platform_version(), &all, program)
    }
}

/// sha256 of a program: its text and the options that all targets share. Devices may be assigned later.
pub fn program_hash(stablehlo: &str, options: &CompileOptions) -> String {
    let options = CompileOptions { device_assignment: None, ..options.clone() };
    let mut hash = Sha256::new();
    hash.update(format!("{options:?}"));
    hash.update([0]);
    hash.update(stablehlo);
    hex(&hash.finalize())
}

/// The build of a plugin. A topology and a client word their platform's version differently; the line that names the build
/// is in both where there is one, and the rest is the plugin's own.
fn build_of(plugin: &Plugin, platform_version: &str) -> String {
    let (major, minor) = plugin.api_version();
    let bytes = fs::metadata(plugin.path()).map_or(0, |m| m.len());
    let built = platform_version.lines().find(|line| line.starts_with("Built on"));
    let attributes = plugin.attributes().iter().map(|(name, value)| match value {
        Attribute::Int(n) => format!(", {name} {n}"),
        Attribute::IntList(list) => format!(", {name} {list:?}"),
        Attribute::Str(text) => format!(", {name} {text}"),
        other => format!(", {name} {other:?}"),
    });
    let attributes: String = attributes.collect();
    let built = built.map_or(String::new(), |line| format!(", {line}"));
    format!("PJRT {major}.{minor}, {bytes} bytes{attributes}{built}")
}

/// Kind, number and, where they have places in a grid, its shape.
fn devices_of(devices: &[DeviceDescription]) -> String {
    let kind = devices.first().map_or("nothing", |d| &d.kind);
    let coords = devices.iter().map(|d| match d.attributes.get("coords") {
        Some(Attribute::IntList(place)) => place.clone(),
        _ => Vec::new(),
    });
    let grid = coords.fold(Vec::new(), |mut grid: Vec<i64>, place| {
        grid.resize(place.len().max(grid.len()), 1);
        grid.iter_mut().zip(&place).for_each(|(n, at)| *n = (*n).max(at + 1));
        grid
    });
    // On GPUs every device has place 0 of its own.
    let shape = match grid.iter().product::<i64>() {
        0 | 1 => String::new(),
        _ => format!(", {}", grid.iter().map(i64::to_string).collect::<Vec<_>>().join("x")),
    };
    format!("{} × {kind}{shape}", devices.len())
}

impl ExecutableFile {
    /// The file of a program that was compiled for a machine.
    ///
    /// # Errors
    /// [`Error::Pjrt`] if the plugin cannot serialize it.
    pub fn new(
        path: &Path,
        job: &Job<'_>,
        prepared: &Prepared,
        machine: &Machine,
        compiled: &Compiled,
    ) -> Result<ExecutableFile, Error> {
        let program = program_hash(&prepared.text, &prepared.options);
        let identity = Identity::new(machine.plugin(), &machine.version, machine.described(), program);
        let cache = &prepared.cache;
        let header = json!({
            "format": FORMAT,
            "xllama": env!("CARGO_PKG_VERSION"),
            "plugin": identity.plugin,
            "devices": identity.devices,
            "program": identity.program,
            "platform": machine.platform,
            "target": machine.target().to_string(),
            "model": job.model,
            "config": job.cfg.raw,
            "step": job.step.name(),
            "tokens": job.step.tokens(),
            "batch": cache.batch,
            "max_seq": cache.len,
            "mesh": job.mesh.to_string(),
            "dtype": job.precision.name(),
            "cache_dtype": cache.dtype.name(),
        });
        Ok(ExecutableFile { path: path.to_path_buf(), header, identity, body: compiled.serialize()? })
    }

    /// Reads a file whole and checks that it is what was written.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Executable`] for anything that [`ExecutableFile::encode`] did not make.
    pub fn open(path: &Path) -> Result<ExecutableFile, Error> {
        let bytes = fs::read(path).map_err(Error::io("reading", path))?;
        ExecutableFile::decode(path, &bytes).map_err(|what| Error::Executable { path: path.to_path_buf(), what })
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let header = self.header.to_string();
        let mut bytes = MAGIC.to_vec();
        bytes.extend((header.len() as u64).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(checksum(header.as_bytes(), &self.body));
        bytes.extend(&self.body);
        bytes
    }

    fn decode(path: &Path, bytes: &[u8]) -> Result<ExecutableFile, String> {
        let other = "not a program of xllama: it does not begin as one that `xllama compile -o` writes";
        let rest = bytes.strip_prefix(MAGIC).ok_or(other)?;
        let short = || format!("cut off: {} bytes are fewer than it says; compile it again", bytes.len());
        let (length, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER {
            return Err(format!("damaged: its header would have {length} bytes; compile it again"));
        }
        let (header, rest) = rest.split_at_checked(length as usize).ok_or_else(short)?;
        let (sum, body) = rest.split_at_checked(32).ok_or_else(short)?;
        if checksum(header, body) != sum {
            return Err("damaged: its sha256 is another one than it says; compile it again".into());
        }
        let header: Value = serde_json::from_slice(header).map_err(|e| format!("its header is not JSON: {e}"))?;
        match header["format"].as_u64() {
            Some(FORMAT) => {}
            found => {
                let found = found.map_or("none".into(), |n| n.to_string());
                return Err(format!("format {FORMAT} is what this version reads, found {found}; compile it again"));
            }
        }
        let text = |key: &str| header[key].as_str().map(String::from).ok_or(format!("its header has no {key}"));
        let identity = Identity { plugin: text("plugin")?, devices: text("devices")?, program: text("program")? };
        Ok(ExecutableFile { path: path.to_path_buf(), header, identity, body: body.to_vec() })
    }

    /// What its header says: `model`, `target`, `step`, `batch`, `max_seq`, `mesh`, …
    pub fn header(&self) -> &Value {
        &self.header
    }

    /// Refuses to run it where plugin, devices or program are others than it was compiled for.
    ///
    /// # Errors
    /// [`Error::Executable`] that names both sides of the first difference.
    pub fn check(&self, here: &Identity) -> Result<(), Error> {
        let own = &self.identity;
        let refuse = |what: String| Err(Error::Executable { path: self.path.clone(), what });
        if own.plugin != here.plugin {
            let what = "the plugins must be the same build; compile it with the one that runs it";
            return refuse(format!("compiled by plugin ({}), to be run by ({}): {what}", own.plugin, here.plugin));
        }
        if own.devices != here.devices {
            let what = "compile it for what is there, or run it there";
            return refuse(format!(
                "compiled for {} ({}), here are {}: {what}",
                own.devices, self.header["target"], here.devices
            ));
        }
        if own.program != here.program {
            let [model, step, batch, len, mesh, dtype] =
                ["model", "step", "batch", "max_seq", "mesh", "dtype"].map(|key| &self.header[key]);
            return refuse(format!(
                "another program: it is {model} {step}, batch {batch}, {len} positions, mesh {mesh}, {dtype} (sha256 {}…), wanted \
                 is one with sha256 {}…; give the same options to both commands",
                prefix(&own.program),
                prefix(&here.program)
            ));
        }
        Ok(())
    }

    /// Positions of the cache that its program runs on.
    ///
    /// # Errors
    /// [`Error::Executable`] if its header does not say.
    pub fn max_seq(&self) -> Result<usize, Error> {
        self.number("max_seq")
    }

    fn number(&self, key: &str) -> Result<usize, Error> {
        let number = self.header[key].as_u64().and_then(|n| usize::try_from(n).ok());
        let what = || format!("its header has no number {key}; compile it again");
        number.ok_or_else(|| Error::Executable { path: self.path.clone(), what: what() })
    }

    /// Loads it into an engine, which then runs it in place of the step that it would compile, and gives that step.
    ///
    /// # Errors
    /// Those of [`ExecutableFile::load`].
    pub fn adopt(&self, engine: &Engine) -> Result<StepSpec, Error> {
        let model = engine.model();
        let (tokens, len, batch) = (self.number("tokens")?, self.number("max_seq")?, self.number("batch")?);
        let cache = model.cache_shape(&engine.cache_options(), batch, len);
        let spec = StepSpec::alone(tokens, cache, model);
        let module = build(&spec, model)?;
        let client = engine.placement().client();
        let devices = model.mesh.devices();
        let executable = self.load(client, devices, &model.stablehlo(&module), &model.compile_options())?;
        engine.adopt(spec, &module, executable);
        Ok(spec)
    }

    /// Loads it onto the first `devices` devices of `client` as the program of this text and these options.
    ///
    /// # Errors
    /// Those of [`ExecutableFile::check`], and [`Error::Pjrt`] if the plugin does not take it.
    pub fn load(
        &self,
        client: &Client,
        devices: usize,
        stablehlo: &str,
        options: &CompileOptions,
    ) -> Result<LoadedExecutable, Error> {
        self.check(&Identity::of_client(client, devices, program_hash(stablehlo, options)))?;
        Ok(client.deserialize(&self.body)?)
    }
}

fn checksum(header: &[u8], body: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update((header.len() as u64).to_le_bytes());
    hash.update(header);
    hash.update(body);
    hash.finalize().into()
}

fn prefix(hash: &str) -> String {
    hash.chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn sample(path: &Path) -> ExecutableFile {
        let identity = Identity {
            plugin: "PJRT 0.117".into(),
            devices: "8 × TPU v5 lite, 2x4x1".into(),
            program: "ab".repeat(32),
        };
        let header = json!({
            "format": FORMAT, "plugin": identity.plugin, "devices": identity.devices, "program": identity.program,
            "target": "v5e:2x4", "model": "llama-2-7b", "step": "decode", "batch": 8, "max_seq": 2048, "mesh": "model=8",
            "dtype": "bf16",
        });
        ExecutableFile { path: path.to_path_buf(), header, identity, body: (0..=255).collect() }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("decode.bin");
        let file = sample(&path);
        fs::write(&path, file.encode()).expect("written");
        let read = ExecutableFile::open(&path).expect("read");
        assert_eq!((read.header(), &read.identity, &read.body), (&file.header, &file.identity, &file.body));
        read.check(&file.identity).expect("the same");
    }

    #[test]
    fn hostile_files_are_refused() {
        let path = Path::new("p.bin");
        let whole = sample(path).encode();
        for end in 0..whole.len() {
            let error = ExecutableFile::decode(path, &whole[..end]).expect_err("a part");
            assert!(
                error.contains("not a program") || error.contains("cut off") || error.contains("sha256"),
                "{end}: {error}"
            );
        }
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(ExecutableFile::decode(path, &bytes).is_err(), "byte {at}");
        }
        let with = |header: &str| {
            let mut bytes = MAGIC.to_vec();
            bytes.extend((header.len() as u64).to_le_bytes());
            bytes.extend(header.as_bytes());
            bytes.extend(checksum(header.as_bytes(), &[]));
            ExecutableFile::decode(path, &bytes).expect_err(header)
        };
        assert!(with("{").contains("not JSON"));
        assert!(with("[1]").contains("found none"));
        assert!(with(r#"{"format": 2}"#).contains("found 2"));
        assert!(with(r#"{"format": 1}"#).contains("no plugin"));
        let mut long = MAGIC.to_vec();
        long.extend(u64::MAX.to_le_bytes());
        assert!(ExecutableFile::decode(path, &long).expect_err("a length").contains("18446744073709551615"));
    }

    #[test]
    fn another_place_is_refused_with_both_sides() {
        let file = sample(Path::new("p.bin"));
        let here = file.identity.clone();
        for (other, parts) in [
            (Identity { plugin: "PJRT 0.116".into(), ..here.clone() }, ["PJRT 0.117", "PJRT 0.116"]),
            (
                Identity { devices: "4 × TPU v5 lite, 2x2x1".into(), ..here.clone() },
                ["8 × TPU v5 lite", "4 × TPU v5 lite"],
            ),
            (Identity { program: "cd".repeat(32), ..here.clone() }, ["abababab", "cdcdcdcd"]),
        ] {
            let error = file.check(&other).expect_err("another place").to_string();
            assert!(error.starts_with("p.bin: ") && parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn devices_are_named_by_kind_number_and_grid() {
        let device = |id: i32, place: &[i64]| DeviceDescription {
            id,
            process_index: 0,
            kind: "TPU v5 lite".into(),
            text: String::new(),
            attributes: BTreeMap::from([("coords".to_string(), Attribute::IntList(place.to_vec()))]),
        };
        let grid: Vec<_> = (0..8).map(|i| device(i, &[i64::from(i) % 2, i64::from(i) / 2, 0])).collect();
        assert_eq!(devices_of(&grid), "8 × TPU v5 lite, 2x4x1");
        assert_eq!(devices_of(&grid[..1]), "1 × TPU v5 lite");
        let cpu = DeviceDescription { attributes: BTreeMap::new(), kind: "cpu".into(), ..device(0, &[]) };
        assert_eq!(devices_of(&[cpu.clone(), cpu]), "2 × cpu");
        assert_eq!(devices_of(&[]), "0 × nothing");
    }

    #[test]
    fn the_hash_is_of_text_and_options_but_not_of_places() {
        let options = CompileOptions::sharded(4);
        let placed = CompileOptions { device_assignment: Some(vec![vec![3, 2, 1, 0]]), ..options.clone() };
        assert_eq!(program_hash("m", &options), program_hash("m", &placed));
        assert_ne!(program_hash("m", &options), program_hash("n", &options));
        assert_ne!(program_hash("m", &options), program_hash("m", &CompileOptions::sharded(2)));
    }
}
