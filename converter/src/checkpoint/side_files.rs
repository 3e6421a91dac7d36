//! What lies beside the weights: tokenizer, chat template, generation defaults, licence.

use std::fs;
use std::io::ErrorKind;

use super::{Checkpoint, Source};
use crate::error::{Error, Result};

/// Files that travel with a model, `config.json` apart.
const NAMES: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "README.md",
];

/// A folder of further chat templates, all of which travel.
const TEMPLATES: &str = "additional_chat_templates";

impl Checkpoint {
    /// The files beside the weights, name and content: those of the folder, or those that a GGUF file's metadata
    /// stands for (`tokenizer.json`, `tokenizer_config.json`, …), with added tokens in them. `config.json` is not among them.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read; for a GGUF file, metadata that makes no tokenizer.
    pub fn side_files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = self.files_of_source()?;
        for (name, content) in self.extended.iter().flat_map(|extended| &extended.files) {
            match files.iter_mut().find(|(found, _)| found == name) {
                Some((_, old)) => old.clone_from(content),
                None => files.push((name.clone(), content.clone())),
            }
        }
        Ok(files)
    }

    fn files_of_source(&self) -> Result<Vec<(String, Vec<u8>)>> {
        match &self.source {
            Source::Gguf(gguf) => gguf.tokenizer_files(),
            Source::Folder(_) => {
                let mut names: Vec<String> = NAMES.iter().map(ToString::to_string).collect();
                let templates = self.path.join(TEMPLATES);
                if templates.is_dir() {
                    for entry in fs::read_dir(&templates).map_err(Error::io(&templates, "listing"))? {
                        let entry = entry.map_err(Error::io(&templates, "listing"))?;
                        if let Some(name) = entry.file_name().to_str().filter(|name| name.ends_with(".jinja")) {
                            names.push(format!("{TEMPLATES}/{name}"));
                        }
                    }
                }
                names.sort_unstable();
                let read = |name: String| Ok(self.side_file(&name)?.map(|content| (name, content)));
                names.into_iter().filter_map(|name| read(name).transpose()).collect()
            }
        }
    }

    /// One of [`Checkpoint::side_files`] by name, or `None` if there is none.
    ///
    /// # Errors
    /// The same.
    pub fn side_file(&self, name: &str) -> Result<Option<Vec<u8>>> {
        if let Some(content) = self.extended.as_ref().and_then(|extended| extended.files.get(name)) {
            return Ok(Some(content.clone()));
        }
        match &self.source {
            Source::Gguf(gguf) => {
                Ok(gguf.tokenizer_files()?.into_iter().find(|(found, _)| found == name).map(|(_, content)| content))
            }
            Source::Folder(_) => {
                let path = self.path.join(name);
                match fs::read(&path) {
                    Ok(content) => Ok(Some(content)),
                    Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(Error::io(&path, "reading")(e)),
                }
            }
        }
    }
}
