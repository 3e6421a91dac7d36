//! What parameters are on the devices of a model.

use converter::Packing;
use kernels::packed::Bits;
use xla::DType;
use xla::graph::Platform;

use super::Param;
use crate::precision::float_type;
use crate::sharding::MeshShape;

/// The devices of a model, as they have its parameters.
#[derive(Clone, Copy, Debug)]
pub struct Devices {
    /// The type of parameters that are not packed, and of products.
    pub dtype: DType,
    /// What they are.
    pub platform: Platform,
    /// How many, and along which axes.
    pub mesh: MeshShape,
}

/// An array that is a parameter, or a part of a packed one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceArray {
    /// That of the parameter, with what it is of a packed one behind a dot.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Of the whole.
    pub shape: Vec<usize>,
    /// The logical name of each axis; none for what only one device can have.
    pub logical: Vec<&'static str>,
}

impl Devices {
    /// Whether packed parameters stay in the blocks of [`kernels::packed`], which only one processor can multiply with. Elsewhere the
    /// axes of the codes are those of the floats, so that any of them can be split.
    pub fn in_blocks(&self) -> bool {
        self.mesh.devices() == 1 && self.platform == Platform::Cpu
    }

    /// `packing`, if these devices can have the parameter so: a group lies on one device. Else it is widened; and so is the embedding on
    /// a TPU, which cannot address one row of bytes, and would copy the whole table for a lookup, and again for a head.
    pub fn packing(&self, param: &Param, packing: Packing) -> Option<Packing> {
        let axis = param.group_axis()?;
        // What fsdp splits is whole again before it is used.
        let devices = match param.logical[axis] {
            "heads" | "kv_heads" | "mlp" | "vocab" => self.mesh.model,
            _ => 1,
        };
        let divides = param.shape[axis].is_multiple_of(packing.format.group * devices);
        let looked_up = self.platform == Platform::Tpu && param.axes == "VM";
        (self.in_blocks() || (divides && !looked_up)).then_some(packing)
    }

    /// The type that a parameter has where it is not packed. Vectors, which are used in f32, are kept so on a TPU: each cast would
    /// be a program of its own there, 1,830 cycles, and a norm's weight has one in every layer.
    pub fn float(&self, param: &Param) -> DType {
        let vector = self.platform == Platform::Tpu && param.shape.len() == 1;
        if param.precise || vector { DType::F32 } else { self.dtype }
    }

    /// The arrays that a parameter is: itself, or the codes, scales and, where there are any, minima of a packed one.
    pub fn arrays(&self, param: &Param) -> Vec<DeviceArray> {
        let (Some(packing), Some(of), Some(axis)) = (param.packing, param.contraction(), param.group_axis()) else {
            let (dtype, logical) = (self.float(param), param.logical.clone());
            return vec![DeviceArray { name: param.name.clone(), dtype, shape: param.shape.clone(), logical }];
        };
        let format = packing.format;
        let [codes, scales] = match self.in_blocks() {
            true => [packing.q_shape(of), packing.scales_shape(of)].map(|shape| (shape, Vec::new())),
            false => {
                let codes = joined(param, axis);
                let (mut shape, mut logical) = codes.clone();
                shape[axis] /= format.group;
                if logical[axis] == "embed" && !shape[axis].is_multiple_of(self.mesh.fsdp) {
                    logical[axis] = "hidden";
                }
                [codes, (shape, logical)]
            }
        };
        let code = match (format.bits, format.mins) {
            _ if self.in_blocks() => DType::U8,
            (Bits::Eight, _) => DType::I8,
            (Bits::Four, false) => DType::I4,
            (Bits::Four, true) => DType::U4,
        };
        // A TPU computes with f16 by many steps.
        let scale = if self.platform == Platform::Tpu { DType::F32 } else { float_type(packing.scales.dtype()) };
        let array = |part: &str, dtype, (shape, logical)| DeviceArray {
            name: format!("{}.{part}", param.name),
            dtype,
            shape,
            logical,
        };
        let mins = format.mins.then(|| array("mins", scale, scales.clone()));
        [array("q", code, codes), array("scales", scale, scales)].into_iter().chain(mins).collect()
    }

    /// Bytes that a parameter takes.
    pub fn bytes(&self, param: &Param) -> u64 {
        let bits = |array: &DeviceArray| array.shape.iter().product::<usize>() * array.dtype.bits();
        self.arrays(param).iter().map(|array| bits(array).div_ceil(8) as u64).sum()
    }
}

/// The axes of the arrays of a parameter in groups along `axis`: those behind it are one, which lies as the first of them.
fn joined(param: &Param, axis: usize) -> (Vec<usize>, Vec<&'static str>) {
    let (shape, behind) = param.shape.split_at(axis + 1);
    match behind {
        [] => (shape.to_vec(), param.logical.clone()),
        _ => ([shape, &[behind.iter().product()]].concat(), param.logical[..axis + 2].to_vec()),
    }
}
