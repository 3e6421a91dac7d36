//! A parameter in the graph: floats, or integer codes with scales.

use kernels::packed::{BLOCK, Bits, Format};
use xla::DType;
use xla::graph::Tensor;

use super::Grouped;

/// A parameter as the model reads it.
#[derive(Clone, Debug)]
pub enum Weight {
    /// All axes, in a float type.
    Float(Tensor),
    /// A matrix of integers in blocks, which a processor multiplies with.
    Packed(Packed),
    /// A matrix of integers with all axes, of which floats are made where it is used.
    Grouped(Grouped),
    /// One that `fsdp` splits.
    Split(Split),
}

/// A parameter of which each device has a part, until it is used.
#[derive(Clone, Debug)]
pub struct Split {
    /// What it is.
    pub weight: Box<Weight>,
    /// How each of its tensors lies on the mesh, and how it does where it is whole again.
    pub axes: Vec<[Vec<&'static str>; 2]>,
}

/// A matrix of integer codes with a scale, and maybe a minimum, for each group of contracted terms: [`kernels::packed`].
#[derive(Clone, Debug)]
pub struct Packed {
    /// Bits of a code, terms of a group, and whether groups have minima.
    pub format: Format,
    /// The shape as floats.
    pub shape: Vec<usize>,
    /// Whether the outputs come first, as in the embedding (V, M), which is contracted over M as the head.
    pub transposed: bool,
    /// K, contracted terms.
    pub k: usize,
    /// N, outputs.
    pub n: usize,
    /// Codes, scales and, where there are any, minima, with the experts as a first axis where there are any.
    pub arrays: Vec<Tensor>,
}

impl Weight {
    /// Its arguments of the graph.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Weight::Float(tensor) => vec![tensor],
            Weight::Packed(Packed { arrays, .. }) | Weight::Grouped(Grouped { arrays, .. }) => arrays.iter().collect(),
            Weight::Split(split) => split.weight.tensors(),
        }
    }

    /// It with all that `fsdp` splits on every device: one gather.
    #[track_caller]
    pub fn whole(&self) -> Weight {
        let Weight::Split(Split { weight, axes }) = self else { return self.clone() };
        let mut axes = axes.iter();
        weight.each(|tensor| match axes.next() {
            Some([split, whole]) => tensor.gather(whole, split),
            None => tensor.clone(),
        })
    }

    /// It as it lies on the devices, without a gather.
    pub fn in_parts(&self) -> &Weight {
        match self {
            Weight::Split(split) => &split.weight,
            weight => weight,
        }
    }

    /// The same weight made of other tensors: `next` gives as many as [`Weight::tensors`] has.
    pub fn with(&self, mut next: impl FnMut() -> Tensor) -> Weight {
        self.each(|_| next())
    }

    /// The same weight made of what `f` gives for each of its tensors.
    pub fn each(&self, mut f: impl FnMut(&Tensor) -> Tensor) -> Weight {
        match self {
            Weight::Float(tensor) => Weight::Float(f(tensor)),
            Weight::Packed(packed) => Weight::Packed(packed.each(f)),
            Weight::Grouped(grouped) => Weight::Grouped(grouped.each(f)),
            Weight::Split(Split { weight, axes }) => {
                Weight::Split(Split { weight: Box::new(weight.each(f)), axes: axes.clone() })
            }
        }
    }

    /// The tensors of several weights of one form, each with a new first axis along which they are.
    #[track_caller]
    pub fn stack(weights: &[&Weight]) -> Vec<Tensor> {
        let all: Vec<Vec<&Tensor>> = weights.iter().map(|weight| weight.tensors()).collect();
        let stacked = |i: usize| {
            let each: Vec<Tensor> = all.iter().map(|tensors| tensors[i].expand_dims(0)).collect();
            let stack = each[0].graph().concatenate(&each.iter().collect::<Vec<_>>(), 0);
            match weights[0] {
                Weight::Split(split) => stack.shard([&[""][..], &split.axes[i][0]].concat()),
                _ => stack,
            }
        };
        (0..all[0].len()).map(stacked).collect()
    }

    /// It as integers in blocks, if that is what it is.
    pub fn packed(&self) -> Option<&Packed> {
        match self {
            Weight::Packed(packed) => Some(packed),
            Weight::Float(_) | Weight::Grouped(_) | Weight::Split(_) => None,
        }
    }

    /// Its shape as floats.
    pub fn shape(&self) -> &[usize] {
        match self {
            Weight::Float(tensor) => tensor.shape(),
            Weight::Packed(packed) => &packed.shape,
            Weight::Grouped(grouped) => &grouped.shape,
            Weight::Split(split) => split.weight.shape(),
        }
    }

    /// The type of the numbers that it is multiplied with.
    pub fn dtype(&self) -> DType {
        match self {
            Weight::Float(tensor) => tensor.dtype(),
            Weight::Packed(_) => DType::F32,
            Weight::Grouped(grouped) => grouped.dtype,
            Weight::Split(split) => split.weight.dtype(),
        }
    }

    /// It as floats, with all axes.
    #[track_caller]
    pub fn float(&self) -> Tensor {
        match self {
            Weight::Float(tensor) => tensor.clone(),
            Weight::Packed(packed) => packed.unpack(),
            Weight::Grouped(grouped) => grouped.float(),
            Weight::Split(_) => self.whole().float(),
        }
    }
}

impl Packed {
    /// The same with the arrays that `f` makes of these, maybe of fewer experts.
    fn each(&self, f: impl FnMut(&Tensor) -> Tensor) -> Packed {
        let arrays: Vec<Tensor> = self.arrays.iter().map(f).collect();
        let experts = |arrays: &[Tensor]| arrays[0].rank() - 3;
        let shape = [&arrays[0].shape()[..experts(&arrays)], &self.shape[experts(&self.arrays)..]].concat();
        Packed { arrays, shape, ..self.clone() }
    }

    /// The values, f32, in the shape of the floats.
    #[track_caller]
    pub fn unpack(&self) -> Tensor {
        let Packed { k, n, .. } = *self;
        let experts = &self.shape[..self.arrays[0].rank() - 3];
        if let &[experts] = experts {
            let all: Vec<Tensor> = (0..experts).map(|e| self.expert(e).unpack().expand_dims(0)).collect();
            return all[0].graph().concatenate(&all.iter().collect::<Vec<_>>(), 0);
        }
        let [codes, scales, mins @ ..] = &self.arrays[..] else { unreachable!("codes and scales") };
        let values = codes_of(self.format, codes).cast(DType::F32);
        // (K/g, N/16·16) to (K/g, g, N/16·16)
        let wide = |x: &Tensor| by_group(x).broadcast(values.shape(), &[0, 2]);
        let values = match mins {
            [mins] => &values * wide(scales) + wide(mins),
            _ => &values * wide(scales),
        };
        let [groups, g, outputs] = [0, 1, 2].map(|axis| values.dim(axis));
        let values = values.reshape(&[groups * g, outputs]).narrow(0, 0, k).narrow(1, 0, n);
        let values = if self.transposed { values.transpose(&[1, 0]) } else { values };
        values.reshape(&self.shape)
    }

    /// One of several experts' matrices.
    #[track_caller]
    pub fn expert(&self, e: usize) -> Packed {
        self.each(|x| x.narrow(0, e, 1).reshape(&x.shape()[1..]))
    }

    /// x (rows, K) f32 times the weight, (rows, N) f32, with x rounded to 8 bits: in each group of terms of a row
    /// q = round(127·x / max|x|), and y = Σ over groups of scale · (max|x| / 127) · Σ q·code, plus min · (max|x| / 127) · Σ q.
    #[track_caller]
    pub fn product(&self, x: &Tensor) -> Tensor {
        let [codes, scales, mins @ ..] = &self.arrays[..] else { unreachable!("codes and scales") };
        let codes = codes_of(self.format, codes).cast(DType::F32);
        let [groups, terms, _] = [0, 1, 2].map(|axis| codes.dim(axis));
        let rows = x.dim(0);
        let padding = (groups * terms - self.k) as i64;
        let x = x.pad(0.0, &[0, 0], &[0, padding], &[0, 0]).reshape(&[rows, groups, terms]);
        let step = x.abs().max_keep(&[2]) / 127.0;
        let divisor = step.gt(0.0).select(&step, 1.0);
        let q = (&x / divisor.broadcast_to(x.shape())).round();
        // Sums of up to 32 products of 8-bit integers are exact in f32.
        let dots = xla::graph::einsum_as("RGT,GTN->GRN", &q, &codes, DType::F32);
        let step = step.transpose(&[1, 0, 2]);
        let wide = |x: &Tensor| by_group(x).broadcast(dots.shape(), &[0, 2]);
        let mut y = &dots * wide(scales);
        if let [mins] = mins {
            let sums = q.sum_keep(&[2]).transpose(&[1, 0, 2]);
            y = y + wide(mins) * sums.broadcast_to(dots.shape());
        }
        (y * step.broadcast_to(dots.shape())).sum(&[0]).narrow(1, 0, self.n)
    }
}

/// Codes (N/16, K/g, bytes) as (K/g, g, N/16·16), i32.
#[track_caller]
fn codes_of(format: Format, packed: &Tensor) -> Tensor {
    let g = packed.graph();
    let (blocks, groups) = (packed.dim(0), packed.dim(1));
    let quads = packed.dim(2) / (4 * BLOCK);
    let bytes = packed.reshape(&[blocks, groups, quads, BLOCK, 4]).cast(DType::I32);
    let codes = match format.bits {
        Bits::Eight => bytes,
        Bits::Four => g.concatenate(&[&(&bytes % 16i64), &(&bytes / 16i64)], 2),
    };
    let codes = codes - i64::from(format.bias());
    codes.transpose(&[1, 2, 4, 0, 3]).reshape(&[groups, format.group, blocks * BLOCK])
}

/// Scales or minima (N/16, K/g, 16) as (K/g, N/16·16), f32.
#[track_caller]
fn by_group(scales: &Tensor) -> Tensor {
    let (blocks, groups) = (scales.dim(0), scales.dim(1));
    scales.cast(DType::F32).transpose(&[1, 0, 2]).reshape(&[groups, blocks * BLOCK])
}
