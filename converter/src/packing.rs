//! How a parameter is stored as integers: codes of 8 or 4 bits, with a scale and maybe a minimum for each group of terms.
//!
//! The arrays are those of [`kernels::packed`]; in a file they are the tensors `NAME.q` (U8), `NAME.scales` and, where there
//! are minima, `NAME.mins`. Experts have one more axis in front.

use std::fmt;

use kernels::packed::{Bits, Format};
use serde_json::{Value, json};

use crate::DType;
use crate::layout::{Contraction, Param};

/// What a model is converted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// A float type for every parameter.
    Float(DType),
    /// Matrices in 8 bits, [`Packing::INT8`]; what is not packed keeps its type.
    Int8,
    /// Matrices in 4 bits, [`Packing::INT4`]; what is not packed keeps its type.
    Int4,
}

impl Precision {
    /// Reads `int8`, `int4`, or what [`DType::parse`] does.
    pub fn parse(name: &str) -> Option<Precision> {
        match name {
            "int8" => Some(Precision::Int8),
            "int4" => Some(Precision::Int4),
            name => DType::parse(name).map(Precision::Float),
        }
    }
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Precision {
        Precision::Float(dtype)
    }
}

/// The type of scales and minima.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleType {
    /// IEEE half precision.
    F16,
    /// IEEE single precision, where half precision would round.
    F32,
}

impl ScaleType {
    /// The same as an element type.
    pub fn dtype(self) -> DType {
        match self {
            ScaleType::F16 => DType::F16,
            ScaleType::F32 => DType::F32,
        }
    }
}

/// How a parameter is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    /// Bits of a code, terms of a group, and whether groups have minima.
    pub format: Format,
    /// The type of scales and minima.
    pub scales: ScaleType,
}

/// One tensor of a file that a packed parameter is a part of.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PackedTensor {
    pub(crate) name: String,
    pub(crate) dtype: safetensors::Dtype,
    pub(crate) shape: Vec<usize>,
}

impl Packing {
    /// What [`Precision::Int8`] is: 8 bits, groups of 32, scales in half precision.
    pub const INT8: Packing = Packing::new(Bits::Eight, 32, ScaleType::F16, false);

    /// What [`Precision::Int4`] is: 4 bits, groups of 32, scales in half precision; the embedding and the head as [`Packing::INT8`].
    pub const INT4: Packing = Packing::new(Bits::Four, 32, ScaleType::F16, false);

    pub(crate) const fn new(bits: Bits, group: usize, scales: ScaleType, mins: bool) -> Packing {
        Packing { format: Format { bits, group, mins }, scales }
    }

    /// What a parameter is packed to in a model of this packing; `None` where it is not contracted. With 4 bits in the head, or in an
    /// embedding that is the head too, a model loses as much as with 4 bits in everything else.
    pub fn of(self, param: &Param) -> Option<Packing> {
        param.contraction()?;
        let head = self == Packing::INT4 && param.axes.contains('V');
        Some(if head { Packing::INT8 } else { self })
    }

    /// `int8` or `int4`.
    pub fn name(self) -> &'static str {
        match self.format.bits {
            Bits::Eight => "int8",
            Bits::Four => "int4",
        }
    }

    /// Shape of the codes, in bytes: (N/16, K/g, bytes of a group), with the experts before it where there are any.
    pub fn q_shape(self, of: Contraction) -> Vec<usize> {
        of.experts.into_iter().chain(self.format.q_shape(of.k, of.n)).collect()
    }

    /// Shape of the scales and of the minima: (N/16, K/g, 16), with the experts before it where there are any.
    pub fn scales_shape(self, of: Contraction) -> Vec<usize> {
        of.experts.into_iter().chain(self.format.scales_shape(of.k, of.n)).collect()
    }

    /// Bytes of codes of 16 outputs.
    pub(crate) fn q_bytes(self, k: usize) -> usize {
        self.format.q_shape(k, 1).iter().product()
    }

    /// Bytes of scales of 16 outputs.
    pub(crate) fn scales_bytes(self, k: usize) -> usize {
        self.format.scales_shape(k, 1).iter().product::<usize>() * self.scales.dtype().size()
    }

    /// The tensors that a parameter packed like this is, the codes first.
    pub(crate) fn tensors(self, param: &Param, of: Contraction) -> Vec<PackedTensor> {
        let scales = self.scales.dtype().into();
        let tensor = |part, dtype, shape| PackedTensor { name: format!("{}.{part}", param.name), dtype, shape };
        let mut tensors = vec![
            tensor("q", safetensors::Dtype::U8, self.q_shape(of)),
            tensor("scales", scales, self.scales_shape(of)),
        ];
        if self.format.mins {
            tensors.push(tensor("mins", scales, self.scales_shape(of)));
        }
        tensors
    }

    /// As the metadata of a file has it: `{"bits": 4, "group": 32, "scales": "F16", "mins": false}`.
    pub fn to_json(self) -> Value {
        let bits = match self.format.bits {
            Bits::Eight => 8,
            Bits::Four => 4,
        };
        let Format { group, mins, .. } = self.format;
        json!({"bits": bits, "group": group, "scales": self.scales.dtype().name(), "mins": mins})
    }

    /// The reverse; the error says which value is not one that can be read.
    pub(crate) fn from_json(value: &Value) -> Result<Packing, String> {
        let keys = value.as_object().ok_or_else(|| format!("expected an object, found {value}"))?;
        if let Some(key) = keys.keys().find(|key| !["bits", "group", "scales", "mins"].contains(&key.as_str())) {
            return Err(format!("unknown key {key:?}; expected bits, group, scales and mins"));
        }
        let one_of = |key: &str, expected: &str| {
            let found = value.get(key).map_or("nothing".to_string(), Value::to_string);
            format!("{key}: expected {expected}, found {found}")
        };
        let bits = match value["bits"].as_u64() {
            Some(8) => Bits::Eight,
            Some(4) => Bits::Four,
            _ => return Err(one_of("bits", "8 or 4")),
        };
        let group = match value["group"].as_u64() {
            Some(32) => 32,
            Some(16) => 16,
            _ => return Err(one_of("group", "32 or 16")),
        };
        let scales = match value["scales"].as_str() {
            Some("F16") => ScaleType::F16,
            Some("F32") => ScaleType::F32,
            _ => return Err(one_of("scales", "\"F16\" or \"F32\"")),
        };
        let mins = value["mins"].as_bool().ok_or_else(|| one_of("mins", "true or false"))?;
        Ok(Packing::new(bits, group, scales, mins))
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mins = if self.format.mins { " and minima" } else { "" };
        let Packing { format, scales } = self;
        write!(f, "{}, groups of {}, {} scales{mins}", self.name(), format.group, scales.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_and_back() {
        for bits in [Bits::Eight, Bits::Four] {
            for (group, scales, mins) in [(32, ScaleType::F16, false), (16, ScaleType::F32, true)] {
                let packing = Packing::new(bits, group, scales, mins);
                assert_eq!(Packing::from_json(&packing.to_json()), Ok(packing));
            }
        }
        let error = |key: &str, value: Value| {
            let mut json = Packing::INT8.to_json();
            json[key] = value;
            Packing::from_json(&json).expect_err("must be refused")
        };
        assert_eq!(error("bits", json!(3)), "bits: expected 8 or 4, found 3");
        assert_eq!(error("group", json!(64)), "group: expected 32 or 16, found 64");
        assert_eq!(error("scales", json!("BF16")), "scales: expected \"F16\" or \"F32\", found \"BF16\"");
        assert_eq!(error("mins", Value::Null), "mins: expected true or false, found null");
        assert_eq!(error("zeros", json!(1)), "unknown key \"zeros\"; expected bits, group, scales and mins");
        assert_eq!(Packing::from_json(&json!(8)), Err("expected an object, found 8".into()));
    }

    #[test]
    fn names_and_shapes_of_tensors() {
        assert_eq!(Packing::INT4.to_string(), "int4, groups of 32, F16 scales");
        let packing = Packing::new(Bits::Four, 16, ScaleType::F32, true);
        let of = Contraction { experts: Some(3), k: 20, n: 33 };
        assert_eq!((packing.q_shape(of), packing.scales_shape(of)), (vec![3, 3, 2, 128], vec![3, 3, 2, 16]));
        assert_eq!((packing.q_bytes(20), packing.scales_bytes(20)), (256, 128));
    }
}
