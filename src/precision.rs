//! The numbers that a model is run in.

use converter::{Packing, Param};
use xla::DType;

/// The numbers that a model is run in: floats, and integers where weights are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Precision {
    /// The type of parameters that are not packed and of their products.
    pub dtype: DType,
    /// Which matrices are packed.
    pub integers: Integers,
}

/// Which matrices are multiplied as packed integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Integers {
    /// None: what is stored so is widened.
    No,
    /// Those that the checkpoint stores so.
    AsStored,
    /// All that can be, packed like this.
    All(Packing),
}

impl From<DType> for Precision {
    fn from(dtype: DType) -> Precision {
        Precision { dtype, integers: Integers::No }
    }
}

impl Precision {
    /// What a user asked for, or what the checkpoint has; `default` is the float type where neither says it.
    pub fn of(asked: Option<converter::Precision>, default: DType) -> Precision {
        let all = |packing| Precision { dtype: default, integers: Integers::All(packing) };
        match asked {
            None => Precision { dtype: default, integers: Integers::AsStored },
            Some(converter::Precision::Float(dtype)) => float_type(dtype).into(),
            Some(converter::Precision::Int8) => all(Packing::INT8),
            Some(converter::Precision::Int4) => all(Packing::INT4),
        }
    }

    /// `int8`, `int4`, or the float type where nothing is packed that is not stored so.
    pub fn name(&self) -> &'static str {
        match self.integers {
            Integers::All(packing) => packing.name(),
            Integers::No | Integers::AsStored => self.dtype.name(),
        }
    }

    /// How a parameter is packed when it is run, if it is.
    pub fn packing(&self, param: &Param) -> Option<Packing> {
        match self.integers {
            Integers::No => None,
            Integers::AsStored => param.packing,
            Integers::All(packing) => packing.of(param),
        }
    }
}

/// The checkpoint library's element type as the graph has it; it has no float64.
pub(crate) fn float_type(dtype: converter::DType) -> DType {
    match dtype {
        converter::DType::BF16 => DType::BF16,
        converter::DType::F16 => DType::F16,
        converter::DType::F32 | converter::DType::F64 => DType::F32,
    }
}
