//! Values that did not come from a checkpoint, such as trained ones, as one.

use std::path::Path;

use crate::checkpoint::{Checkpoint, FORMAT, Form, VERSIONS};
use crate::convert::config_json;
use crate::error::Error;
use crate::layout::Param;
use crate::staging::Staging;
use crate::writer::{Entry, Plan, ShardWriter};
use crate::{DType, HostArray};

/// Writes the per-head folder `dst` with f32 values in place of those of `checkpoint`: `values` gives them for each parameter in
/// declaration order, row-major in its shape here. Configuration, tokenizer and templates are the checkpoint's. `dst` must not
/// exist or be an empty folder, and appears only when it is whole.
///
/// # Errors
/// The first of `values`; [`Error::Destination`] where `dst` cannot be used; [`Error::Tensor`] for another number of values than
/// the parameter has.
pub fn save<E: From<Error>>(
    checkpoint: &Checkpoint,
    dst: &Path,
    mut values: impl FnMut(&Param) -> Result<Vec<f32>, E>,
) -> Result<(), E> {
    let staging = Staging::new(checkpoint.path(), dst)?;
    let params = checkpoint.params().iter();
    let dtype = safetensors::Dtype::F32;
    let entry = |param: &&Param| Entry { name: param.name.clone(), dtype, shape: param.shape.clone() };
    let entries: Vec<Entry> = params.iter().map(entry).collect();
    let plan = Plan::new(&entries, Form::PerHead.stem(), &[FORMAT, ("version", VERSIONS[0])], u64::MAX);
    staging.write("config.json", &config_json(checkpoint, Some(DType::F32), false)?)?;
    for (name, content) in checkpoint.side_files()? {
        staging.write(&name, &content)?;
    }
    let writers: Vec<ShardWriter> =
        plan.files.iter().map(|file| ShardWriter::create(staging.path(), file)).collect::<Result<_, _>>()?;
    for (param, place) in params.iter().zip(&plan.places) {
        let values = values(param)?;
        if values.len() != param.elements() {
            let what = format!("has shape {:?}, found {} values", param.shape, values.len());
            return Err(Error::tensor(dst, param.name.clone(), what).into());
        }
        let mut array = HostArray::zeros(DType::F32, &param.shape).map_err(Error::io(dst, "writing"))?;
        let bytes = array.as_bytes_mut().chunks_exact_mut(4);
        bytes.zip(&values).for_each(|(bytes, value)| bytes.copy_from_slice(&value.to_le_bytes()));
        writers[place.file].write_at(array.as_bytes(), place.offset)?;
    }
    for writer in &writers {
        writer.sync()?;
    }
    Ok(staging.finish()?)
}
