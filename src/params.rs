//! The parameter tree in the graph. The tree itself, with the one list of names, axes and shardings, is declared in
//! [`converter::layout`].

use converter::ScaleType;
pub use converter::layout::{Attention, DecoderBlock, FeedForward, Llama, Mlp, Moe, Param};
use xla::DType;
use xla::graph::{ArgAttrs, Graph, Platform};

mod weight;

pub use weight::{Packed, Weight};

use crate::Error;
use crate::config::ModelConfig;
use crate::sharding::MeshShape;

/// Declares every parameter as an argument of the graph, in tree order, and gives them as the model reads them: what
/// `fsdp` splits is whole again, one gather for each parameter of each layer.
pub fn declare_args(g: &Graph, params: &Llama<Param>, dtype: DType) -> Llama<Weight> {
    let arg = |p: &Param| {
        if let (Some(packing), Some(of)) = (p.packing, p.contraction()) {
            let arrays = device_arrays(p, dtype, g.platform()).into_iter();
            return Weight::Packed(Packed {
                format: packing.format,
                shape: p.shape.clone(),
                transposed: p.axes == "VM",
                k: of.k,
                n: of.n,
                arrays: arrays.map(|(name, dtype, shape)| g.arg(&name, dtype, &shape)).collect(),
            });
        }
        let whole = g.arg_with(
            &p.name,
            device_dtype(p, dtype, g.platform()),
            &p.shape,
            ArgAttrs { sharding: Some(&p.logical) },
        );
        Weight::Float(match g.devices_along("fsdp") {
            1 => whole,
            _ => {
                let gathered = |axis: &&'static str| if *axis == "embed" { "hidden" } else { *axis };
                whole.shard(p.logical.iter().map(gathered).collect::<Vec<_>>())
            }
        })
    };
    params.as_ref().map(&mut |p| arg(p))
}

/// The parameters with the shapes that they have on a mesh: key/value heads repeated where there are more devices, the
/// vocabulary padded to what they divide.
pub fn on_mesh(params: &Llama<Param>, cfg: &ModelConfig, mesh: MeshShape) -> Llama<Param> {
    let size = |(&n, &logical): (&usize, &&str)| match logical {
        "kv_heads" => mesh.kv_heads(cfg),
        "vocab" => mesh.vocab(cfg),
        _ => n,
    };
    params.clone().map(&mut |p| Param { shape: p.shape.iter().zip(&p.logical).map(size).collect(), ..p })
}

/// The type that a parameter has on the device where the model runs in `dtype`. Vectors, which are used in f32, are kept so on a
/// TPU: each cast would be a program of its own there, 1,830 cycles, and a norm's weight has one in every layer.
pub fn device_dtype(param: &Param, dtype: DType, platform: Platform) -> DType {
    let vector = platform == Platform::Tpu && param.shape.len() == 1;
    if param.precise || vector { DType::F32 } else { dtype }
}

/// Bytes that a parameter takes on the device.
pub fn device_bytes(param: &Param, dtype: DType, platform: Platform) -> u64 {
    match param.packing {
        Some(_) => param.stored_bytes(),
        None => (param.elements() * device_dtype(param, dtype, platform).size()) as u64,
    }
}

/// The arrays that a parameter is on the device: name, element type and shape of each.
pub fn device_arrays(param: &Param, dtype: DType, platform: Platform) -> Vec<(String, DType, Vec<usize>)> {
    let (Some(packing), Some(of)) = (param.packing, param.contraction()) else {
        return vec![(param.name.clone(), device_dtype(param, dtype, platform), param.shape.clone())];
    };
    let scales = match packing.scales {
        ScaleType::F16 => DType::F16,
        ScaleType::F32 => DType::F32,
    };
    let mut arrays = vec![("q", DType::U8, packing.q_shape(of)), ("scales", scales, packing.scales_shape(of))];
    arrays.extend(packing.format.mins.then(|| ("mins", scales, packing.scales_shape(of))));
    arrays.into_iter().map(|(part, dtype, shape)| (format!("{}.{part}", param.name), dtype, shape)).collect()
}

/// The checkpoint library's name of a parameter dtype.
pub fn host_dtype(dtype: DType) -> Result<converter::DType, Error> {
    match dtype {
        DType::F32 => Ok(converter::DType::F32),
        DType::BF16 => Ok(converter::DType::BF16),
        DType::F16 => Ok(converter::DType::F16),
        other => Err(Error::Option { name: "dtype".into(), what: format!("must be f32, bf16 or f16, found {other}") }),
    }
}
