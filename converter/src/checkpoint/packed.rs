//! Packed parameters: where their arrays lie in a folder, and how they are made where a file does not have them.

use std::collections::{BTreeMap, HashMap};
use std::iter;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

use half::f16;
use kernels::packed::{self, BLOCK, Packed, Scales};
use serde_json::{Map, Value};

use super::folder::Folder;
use super::verify::Found;
use super::{Checkpoint, Form, Source};
use crate::DType;
use crate::array::HostBytes;
use crate::error::{Error, Result};
use crate::gguf::{GgufFile, RowCodes};
use crate::layout::{Contraction, Llama, Param};
use crate::packing::{Packing, ScaleType};
use crate::pool;
use crate::quantize::{NotPackable, quantize};
use crate::shard::FileBytes;

/// The key of a file's metadata that says how parameters are packed: a JSON object with a value for each of them.
pub(crate) const PACKED: &str = "packed";

/// Weights that are held as float32 at a time while they are packed.
const WEIGHTS: usize = 1 << 20;

/// A packed parameter: the arrays of [`kernels::packed`], with the experts in front where there are any.
#[derive(Debug)]
pub struct PackedArrays {
    /// How it is packed.
    pub packing: Packing,
    /// Codes, of [`Packing::q_shape`].
    pub q: ArrayBytes,
    /// Scales, of [`Packing::scales_shape`], little-endian.
    pub scales: ArrayBytes,
    /// Minima, like the scales, where the packing has them.
    pub mins: Option<ArrayBytes>,
}

/// The bytes of an array, beginning at a multiple of 64.
#[derive(Debug)]
pub enum ArrayBytes {
    /// They lie in a file.
    File(FileBytes),
    /// They have been read or made.
    Memory(HostBytes),
}

/// Room for some blocks of 16 outputs.
pub(crate) struct BlocksMut<'a> {
    pub(crate) q: &'a mut [u8],
    pub(crate) scales: &'a mut [u8],
    /// Empty where the packing has no minima.
    pub(crate) mins: &'a mut [u8],
}

impl BlocksMut<'_> {
    /// Room for `blocks` of those that this is room for.
    fn part(&mut self, packing: Packing, k: usize, blocks: Range<usize>) -> BlocksMut<'_> {
        let (q, scales) = (packing.q_bytes(k), packing.scales_bytes(k));
        let mins = if packing.format.mins { scales } else { 0 };
        BlocksMut {
            q: &mut self.q[blocks.start * q..blocks.end * q],
            scales: &mut self.scales[blocks.start * scales..blocks.end * scales],
            mins: &mut self.mins[blocks.start * mins..blocks.end * mins],
        }
    }
}

impl Checkpoint {
    /// The arrays of a parameter packed as `packing` says. Where that is how it is stored (`param.packing`), its values
    /// are the stored ones: of a folder the arrays lie in the file, of a GGUF file they are made of its blocks. Otherwise
    /// its values are rounded, for which the packing must have no minima.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a file that has shrunk; [`Error::Tensor`] for a parameter that is not contracted,
    /// one of another model, minima that are not stored, weights that are not finite or too large for the scales, or one
    /// that there is not enough memory for.
    pub fn packed(&self, param: &Param, packing: Packing) -> Result<PackedArrays> {
        let of = self.contraction(param)?;
        if let (Source::Folder(folder), true) = (&self.source, self.lies_packed(param, packing))
            && let Some(arrays) = self.places(folder, param, packing, of)?
        {
            return Ok(arrays);
        }
        let memory = |shape: Vec<usize>, size: usize| {
            HostBytes::zeros(shape.iter().product::<usize>() * size)
                .map_err(|e| Error::tensor(&self.path, &param.name, format!("no memory for {shape:?} of it: {e}")))
        };
        let size = packing.scales.dtype().size();
        let mut q = memory(packing.q_shape(of), 1)?;
        let mut scales = memory(packing.scales_shape(of), size)?;
        let mut mins = match packing.format.mins {
            true => Some(memory(packing.scales_shape(of), size)?),
            false => None,
        };
        let mut no_mins = [];
        let mut all = BlocksMut {
            q: q.as_mut(),
            scales: scales.as_mut(),
            mins: mins.as_mut().map_or(&mut no_mins, |mins| mins.as_mut()),
        };
        let blocks = of.n.div_ceil(BLOCK);
        let cancel = AtomicBool::new(false);
        for piece in 0..param.pieces.len() {
            let out = all.part(packing, of.k, piece * blocks..(piece + 1) * blocks);
            self.read_blocks(param, packing, piece, 0..blocks, out, &cancel)?;
        }
        Ok(PackedArrays {
            packing,
            q: ArrayBytes::Memory(q),
            scales: ArrayBytes::Memory(scales),
            mins: mins.map(ArrayBytes::Memory),
        })
    }

    /// Packs blocks of 16 outputs of one piece into `out`, a few at a time.
    pub(crate) fn read_blocks(
        &self,
        param: &Param,
        packing: Packing,
        piece: usize,
        blocks: Range<usize>,
        mut out: BlocksMut<'_>,
        cancel: &AtomicBool,
    ) -> Result<()> {
        let of = self.contraction(param)?;
        let step = blocks_at_a_time(of.k);
        for first in blocks.clone().step_by(step) {
            pool::check(cancel)?;
            let some = first..blocks.end.min(first + step);
            let out = out.part(packing, of.k, some.start - blocks.start..some.end - blocks.start);
            match &self.source {
                Source::Folder(folder) if self.lies_packed(param, packing) => {
                    self.copy_blocks(folder, param, packing, piece, some, out)?;
                }
                Source::Gguf(gguf) if param.packing == Some(packing) => {
                    self.blocks_of_gguf(gguf, param, packing, piece, some, out)?;
                }
                _ => self.round_blocks(param, packing, piece, some, out, cancel)?,
            }
        }
        Ok(())
    }

    /// Bytes of memory that [`Checkpoint::read_blocks`] takes at most beside its result.
    pub(crate) fn memory_to_pack(&self, k: usize) -> u64 {
        // float32 weights, the rows they are converted from, and codes
        (blocks_at_a_time(k) * BLOCK * k * (DType::F32.size() + DType::F64.size() + 1)) as u64
    }

    /// Writes rows of one piece that lies packed in the folder to `out`, (rows, K).
    pub(super) fn unpack_rows(
        &self,
        folder: &Folder,
        param: &Param,
        piece: usize,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<()> {
        let packing = *self.packings.get(&param.name).ok_or_else(|| self.unknown(param))?;
        let of = self.contraction(param)?;
        let blocks = rows.start / BLOCK..rows.end.div_ceil(BLOCK);
        let scales_bytes = blocks.len() * packing.scales_bytes(of.k);
        let mut q = vec![0; blocks.len() * packing.q_bytes(of.k)];
        let mut scales = vec![0; scales_bytes];
        let mut mins = vec![0; if packing.format.mins { scales_bytes } else { 0 }];
        let room = BlocksMut { q: &mut q, scales: &mut scales, mins: &mut mins };
        self.copy_blocks(folder, param, packing, piece, blocks.clone(), room)?;
        let (scales, mins) = (Floats::read(packing.scales, &scales), Floats::read(packing.scales, &mins));
        let packed = Packed {
            bits: packing.format.bits,
            group: packing.format.group,
            q: &q,
            scales: scales.as_scales(),
            mins: packing.format.mins.then(|| mins.as_scales()),
        };
        let first = rows.start - blocks.start * BLOCK;
        for (row, out) in out.chunks_exact_mut(of.k).enumerate() {
            packed.unpack_output(of.k, first + row, out);
        }
        Ok(())
    }

    /// Whether the folder has the parameter packed in this way, all of it.
    fn lies_packed(&self, param: &Param, packing: Packing) -> bool {
        param.packing == Some(packing) && self.packings.get(&param.name) == Some(&packing)
    }

    fn contraction(&self, param: &Param) -> Result<Contraction> {
        let what = "is not contracted in a product, so it cannot be packed";
        param.contraction().ok_or_else(|| Error::tensor(&self.path, &param.name, what))
    }

    /// The arrays where they lie in the folder; `None` unless every one begins at a multiple of 64.
    fn places(
        &self,
        folder: &Folder,
        param: &Param,
        packing: Packing,
        of: Contraction,
    ) -> Result<Option<PackedArrays>> {
        let mut places = Vec::new();
        for tensor in packing.tensors(param, of) {
            let (shard, stored) = folder.get(&tensor.name).ok_or_else(|| self.unknown(param))?;
            match shard.place(&stored.range)? {
                Some(place) => places.push(ArrayBytes::File(place)),
                None => return Ok(None),
            }
        }
        let mut places = places.into_iter();
        let (Some(q), Some(scales)) = (places.next(), places.next()) else { return Ok(None) };
        Ok(Some(PackedArrays { packing, q, scales, mins: places.next() }))
    }

    /// Reads blocks as they lie in the folder.
    fn copy_blocks(
        &self,
        folder: &Folder,
        param: &Param,
        packing: Packing,
        piece: usize,
        blocks: Range<usize>,
        out: BlocksMut<'_>,
    ) -> Result<()> {
        let of = self.contraction(param)?;
        let first = piece * self.matrix_on_disk(param, piece).0.div_ceil(BLOCK) + blocks.start;
        for (tensor, out) in packing.tensors(param, of).iter().zip([out.q, out.scales, out.mins]) {
            let (shard, stored) = folder.get(&tensor.name).ok_or_else(|| self.unknown(param))?;
            let bytes = out.len() / blocks.len();
            shard.read_at(out, stored.range.start + (first * bytes) as u64)?;
        }
        Ok(())
    }

    /// Moves the codes and scales of a GGUF file's blocks to where the packing has them.
    fn blocks_of_gguf(
        &self,
        gguf: &GgufFile,
        param: &Param,
        packing: Packing,
        piece: usize,
        blocks: Range<usize>,
        mut out: BlocksMut<'_>,
    ) -> Result<()> {
        let of = self.contraction(param)?;
        let first_row = param.pieces[piece].first_row;
        let mut rows = RowCodes::default();
        for block in blocks.clone() {
            let (from, to) = (block * BLOCK, of.n.min((block + 1) * BLOCK));
            gguf.read_codes(&param.pieces[piece].name, first_row + from..first_row + to, &mut rows)?;
            let out = out.part(packing, of.k, block - blocks.start..block - blocks.start + 1);
            packed::pack_codes(packing.format, of.k, to - from, &rows.codes, out.q);
            store_scales(packing, of.k, to - from, &rows.scales, out.scales);
            if packing.format.mins {
                store_scales(packing, of.k, to - from, &rows.minima, out.mins);
            }
        }
        Ok(())
    }

    /// Reads blocks as floats and rounds them.
    fn round_blocks(
        &self,
        param: &Param,
        packing: Packing,
        piece: usize,
        blocks: Range<usize>,
        mut out: BlocksMut<'_>,
        cancel: &AtomicBool,
    ) -> Result<()> {
        let bad = |what: String| Error::tensor(&self.path, &param.name, what);
        if packing.format.mins {
            return Err(bad(format!("cannot be rounded to {packing}: only without minima")));
        }
        let of = self.contraction(param)?;
        let outputs = blocks.start * BLOCK..of.n.min(blocks.end * BLOCK);
        let mut weights = vec![0; outputs.len() * of.k * DType::F32.size()];
        let mut part = self.whole_piece(param, piece);
        *(if self.is_transposed(param) { &mut part.columns } else { &mut part.rows }) = iter::once(outputs).collect();
        self.read_into(param, &part, DType::F32, Form::HuggingFace, &mut weights, cancel)?;

        let groups = of.k.div_ceil(packing.format.group);
        let (mut codes, mut scales) = (vec![0; BLOCK * of.k], vec![0.0; BLOCK * groups]);
        for (block, weights) in weights.chunks(BLOCK * of.k * DType::F32.size()).enumerate() {
            let weights: Vec<f32> = weights.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            let n = weights.len() / of.k;
            let (codes, scales) = (&mut codes[..n * of.k], &mut scales[..n * groups]);
            quantize(packing, of.k, &weights, codes, scales).map_err(|NotPackable { value }| {
                bad(format!("the value {value} cannot be rounded to {}; choose bf16 or f32", packing.name()))
            })?;
            let out = out.part(packing, of.k, block..block + 1);
            packed::pack_codes(packing.format, of.k, n, codes, out.q);
            store_scales(packing, of.k, n, scales, out.scales);
        }
        Ok(())
    }
}

/// Blocks of 16 outputs that are packed at a time.
pub(crate) fn blocks_at_a_time(k: usize) -> usize {
    (WEIGHTS / (BLOCK * k)).max(1)
}

/// Scales or minima (outputs, K/g), which their type holds exactly, in the order of a packed weight, little-endian.
fn store_scales(packing: Packing, k: usize, n: usize, scales: &[f32], out: &mut [u8]) {
    let mut ordered = vec![0.0; out.len() / packing.scales.dtype().size()];
    packed::pack_scales(packing.format, k, n, scales, &mut ordered);
    match packing.scales {
        ScaleType::F16 => {
            let halves = ordered.iter().map(|&x| f16::from_f32(x).to_le_bytes());
            out.as_chunks_mut().0.iter_mut().zip(halves).for_each(|(out, bytes)| *out = bytes);
        }
        ScaleType::F32 => {
            out.as_chunks_mut().0.iter_mut().zip(&ordered).for_each(|(out, x)| *out = x.to_le_bytes());
        }
    }
}

/// Scales or minima in memory.
enum Floats {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Floats {
    /// Those of little-endian bytes.
    fn read(kind: ScaleType, bytes: &[u8]) -> Floats {
        match kind {
            ScaleType::F16 => Floats::F16(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b)).collect()),
            ScaleType::F32 => Floats::F32(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
        }
    }

    fn as_scales(&self) -> Scales<'_> {
        match self {
            Floats::F16(values) => Scales::F16(values),
            Floats::F32(values) => Scales::F32(values),
        }
    }
}

/// The metadata of a file of parameters of which some are packed.
pub(crate) fn metadata<'a>(packed: impl Iterator<Item = (&'a Param, Packing)>) -> String {
    Value::Object(packed.map(|(param, packing)| (param.name.clone(), packing.to_json())).collect()).to_string()
}

/// How the parameters of a folder are packed, by name: what the metadata of its files says, checked against the tensors.
pub(super) fn packings(folder: &Folder, declared: &Llama<Param>) -> Result<HashMap<String, Packing>> {
    let mut packings: HashMap<String, Packing> = HashMap::new();
    let params: HashMap<&str, &Param> = declared.iter().into_iter().map(|param| (param.name.as_str(), param)).collect();
    for shard in &folder.shards {
        let Some(text) = shard.metadata.get(PACKED) else { continue };
        let bad = |what: String| Error::format(&shard.path, format!("{PACKED} in the metadata: {what}"));
        let values: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| bad(format!("expected a JSON object, found {text:?}: {e}")))?;
        for (name, value) in values {
            let packing = Packing::from_json(&value).map_err(|what| bad(format!("{name}: {what}")))?;
            let Some((param, of)) = params.get(name.as_str()).and_then(|p| Some((*p, p.contraction()?))) else {
                return Err(bad(format!("{name} is not a matrix of this model that can be packed")));
            };
            match packings.insert(name.clone(), packing) {
                None => check_arrays(folder, param, packing, of)?,
                Some(other) if other == packing => {}
                Some(other) => return Err(bad(format!("{name} is {packing}; another file says {other}"))),
            }
        }
    }
    Ok(packings)
}

/// Fails unless the folder has the arrays of a packed parameter.
fn check_arrays(folder: &Folder, param: &Param, packing: Packing, of: Contraction) -> Result<()> {
    for tensor in packing.tensors(param, of) {
        let (name, expected) = (&tensor.name, (tensor.dtype, &tensor.shape));
        let why = format!("since {} is packed ({packing}; {} outputs of {} terms)", param.name, of.n, of.k);
        let Some((shard, stored)) = folder.get(name) else {
            let path = &folder.shards[0].path;
            return Err(Error::tensor(path, name, format!("missing; expected {expected:?} {why}")));
        };
        if (stored.dtype, &stored.shape) != expected {
            let found = (stored.dtype, &stored.shape);
            return Err(Error::tensor(&shard.path, name, format!("expected {expected:?} {why}, found {found:?}")));
        }
    }
    Ok(())
}

/// Puts each packed parameter in the place of its arrays, which have been checked.
pub(super) fn stand_in<'a>(
    found: &mut BTreeMap<&'a str, Found<'a>>,
    packings: &HashMap<String, Packing>,
    declared: &'a Llama<Param>,
    float: DType,
) {
    for param in declared.iter() {
        let (Some(&packing), Some(of)) = (packings.get(&param.name), param.contraction()) else { continue };
        let arrays: Vec<_> =
            packing.tensors(param, of).iter().filter_map(|tensor| found.remove(tensor.name.as_str())).collect();
        if let Some(Found { file, .. }) = arrays.into_iter().next() {
            let packing = Some(packing);
            found.insert(&param.name, Found { file, shape: &param.shape, dtype: Ok(float), packing });
        }
    }
}
