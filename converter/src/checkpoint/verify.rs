//! Every tensor against every parameter: names, shapes, types.

use std::collections::BTreeMap;
use std::path::Path;

use super::Form;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::layout::{HfTensor, Llama, Param};
use crate::{DType, Packing};

/// What a checkpoint holds under one name.
pub(super) struct Found<'a> {
    pub(super) file: &'a Path,
    pub(super) shape: &'a [usize],
    /// The type that its parameter gets, or the name of a type that is not supported.
    pub(super) dtype: Result<DType, String>,
    /// How it is packed, if it is; parameters that are not contracted are then read as floats.
    pub(super) packing: Option<Packing>,
}

/// The declared parameters with the types they are stored in, and a sentence for each kind of tensor passed over.
///
/// # Errors
/// [`Error::Mismatch`] for parameters without tensor and tensors without parameter, [`Error::Tensor`] for the first
/// tensor of the wrong shape or type.
pub(super) fn verify(
    cfg: &ModelConfig,
    declared: &Llama<Param>,
    mut found: BTreeMap<&str, Found<'_>>,
    form: Form,
    path: &Path,
) -> Result<(Llama<Param>, Vec<String>)> {
    let mut missing = Vec::new();
    let mut wrong: Vec<Error> = Vec::new();
    let mut params = declared.clone().into_leaves();
    for HfTensor { name, shape, parts } in form.tensors(declared) {
        match found.remove(name.as_str()) {
            None => missing.push(format!("{name} {shape:?}")),
            Some(Found { file, shape: there, .. }) if there != shape => {
                let mut sizes: Vec<String> = parts.iter().map(|&(i, _)| params[i].arithmetic(cfg)).collect();
                sizes.dedup();
                let sizes = sizes.join("; ");
                let what = format!("expected shape {shape:?} from config.json ({sizes}), found {there:?}");
                wrong.push(Error::tensor(file, &name, what));
            }
            Some(Found { file, dtype: Err(name_there), .. }) => {
                let what = format!("its type {name_there} is not supported; supported: F16, BF16, F32, F64");
                wrong.push(Error::tensor(file, &name, what));
            }
            Some(Found { dtype: Ok(dtype), packing, .. }) => parts.iter().for_each(|&(i, _)| {
                params[i].dtype = dtype;
                params[i].packing = packing.filter(|_| params[i].contraction().is_some());
            }),
        }
    }
    let params = declared.from_leaves(params).expect("as many as were declared");

    let mut notes = Vec::new();
    let all = found.len();
    found.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
    if found.len() < all {
        notes.push(format!(
            "{} rotary_emb.inv_freq tensors are not used: they follow from config.json",
            all - found.len()
        ));
    }
    let all = found.len();
    // What predicts further tokens stands as blocks after the last.
    let next = format!("model.layers.{}.", cfg.n_layers);
    found.retain(|name, _| !(cfg.predicts_further() && name.starts_with(&next)));
    if found.len() < all {
        notes.push(format!("{} tensors of {next}* are not used: they predict further tokens", all - found.len()));
    }
    if cfg.tie_word_embeddings
        && form == Form::HuggingFace
        && let Some(head) = found.remove(LM_HEAD)
    {
        let expected = &params.embedding.pieces[0].shape;
        if head.shape != expected {
            let what = format!(
                "tie_word_embeddings is true, so it must have the embedding's shape {expected:?}, found {:?}",
                head.shape
            );
            return Err(Error::tensor(head.file, LM_HEAD, what));
        }
        notes.push(format!("{LM_HEAD} is not used: tie_word_embeddings is true, and it equals the embedding"));
    }

    let unexpected: Vec<String> = found.into_iter().map(|(name, found)| format!("{name} {:?}", found.shape)).collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(Error::Mismatch { path: path.to_path_buf(), missing, unexpected });
    }
    match wrong.into_iter().next() {
        Some(error) => Err(error),
        None => Ok((params, notes)),
    }
}

/// The output head's name in a Hugging Face checkpoint.
pub(super) const LM_HEAD: &str = "lm_head.weight";
