//! The parameter tree in the graph. The tree itself, with the one list of names, axes and shardings, is declared in
//! [`converter::layout`].

pub use converter::layout::{Attention, DecoderBlock, FeedForward, Llama, Lora, Mlp, Moe, Param};
use xla::DType;
use xla::graph::{ArgAttrs, Graph, Tensor};

mod devices;
mod grouped;
mod weight;

pub use devices::{DeviceArray, Devices};
pub use grouped::Grouped;
pub use weight::{Packed, Split, Weight};

use crate::Error;
use crate::config::ModelConfig;
use crate::sharding::MeshShape;

/// Declares every parameter as an argument of the graph, in tree order, and gives them as the model reads them.
pub fn declare_args(g: &Graph, params: &Llama<Param>, devices: Devices) -> Llama<Weight> {
    weights(g, params, devices, &mut |array| declare(g, array, array.dtype))
}

/// Declares an array of a parameter, in a type that may be another than its own.
pub fn declare(g: &Graph, array: &DeviceArray, dtype: DType) -> Tensor {
    let sharding = (!array.logical.is_empty()).then_some(&array.logical[..]);
    g.arg_with(&array.name, dtype, &array.shape, ArgAttrs { sharding })
}

/// The parameters as the model reads them, of what `tensor` gives for each of their arrays, in tree order: cast to the array's
/// type. What `fsdp` splits is whole again where it is computed with, one gather for each parameter.
pub fn weights(
    g: &Graph,
    params: &Llama<Param>,
    devices: Devices,
    tensor: &mut impl FnMut(&DeviceArray) -> Tensor,
) -> Llama<Weight> {
    let split = g.devices_along("fsdp") > 1;
    let mut weight = |p: &Param| {
        let declared = devices.arrays(p);
        let mut arrays: Vec<Tensor> = declared.iter().map(|array| tensor(array).cast(array.dtype)).collect();
        let weight = match (p.packing, p.contraction(), p.group_axis()) {
            (Some(packing), Some(of), _) if devices.in_blocks() => Weight::Packed(Packed {
                format: packing.format,
                shape: p.shape.clone(),
                transposed: p.axes == "VM",
                k: of.k,
                n: of.n,
                arrays,
            }),
            (Some(packing), _, Some(axis)) => {
                let (shape, group) = (p.shape.clone(), packing.format.group);
                Weight::Grouped(Grouped { shape, axis, group, dtype: devices.dtype, arrays })
            }
            _ => Weight::Float(arrays.remove(0)),
        };
        let gathered = |axis: &&'static str| if *axis == "embed" { "hidden" } else { *axis };
        let axes = |array: &DeviceArray| [array.logical.clone(), array.logical.iter().map(gathered).collect()];
        match split {
            true => Weight::Split(Split { weight: Box::new(weight), axes: declared.iter().map(axes).collect() }),
            false => weight,
        }
    };
    let tree = params.as_ref().map(&mut |p| weight(p));
    Llama { final_norm: tree.final_norm.whole(), ..tree }
}

/// The parameters with the shapes that they have on a mesh: key/value heads repeated where there are more devices, the
/// vocabulary padded to what they divide in parts that are multiples of `whole`.
pub fn on_mesh(params: &Llama<Param>, cfg: &ModelConfig, mesh: MeshShape, whole: usize) -> Llama<Param> {
    let size = |(&n, &logical): (&usize, &&str)| match logical {
        "kv_heads" => mesh.kv_heads(cfg),
        "vocab" => mesh.vocab(cfg, whole),
        _ => n,
    };
    params.clone().map(&mut |p| Param { shape: p.shape.iter().zip(&p.logical).map(size).collect(), ..p })
}

/// The checkpoint library's name of a parameter dtype.
pub(crate) fn host_dtype(dtype: DType) -> Result<converter::DType, Error> {
    match dtype {
        DType::F32 => Ok(converter::DType::F32),
        DType::BF16 => Ok(converter::DType::BF16),
        DType::F16 => Ok(converter::DType::F16),
        other => Err(Error::Option { name: "dtype".into(), what: format!("must be f32, bf16 or f16, found {other}") }),
    }
}
