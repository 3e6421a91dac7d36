//! Random bits, the same on every platform.

use super::{Op, OpInfo, op_info, pair};
use crate::DType;
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::tensor::Tensor;

/// A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The hardware's own
/// generator is left out, as it gives other bits on each platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Threefry; the state is two ui64: key and counter.
    ThreeFry,
    /// Philox; the state is two or three ui64.
    Philox,
}

/// Random bits from a state, and the state for the next bits.
#[derive(Clone, Debug)]
pub struct RngBitGenerator {
    /// The generator.
    pub algorithm: Algorithm,
    /// Unsigned element type and shape of the bits.
    pub bits: Aval,
}

op_info!(RngBitGenerator, 1, "rng_bit_generator", "random bits from a state", Zero "bits are not values");

impl Op for RngBitGenerator {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let state = inputs[0];
        let lengths: &[usize] = match self.algorithm {
            Algorithm::ThreeFry => &[2],
            Algorithm::Philox => &[2, 3],
        };
        if state.dtype != DType::U64 || state.rank() != 1 || !lengths.contains(&state.shape[0]) {
            return Err(format!("the state of {:?} is ui64 of length {lengths:?}, found {state}", self.algorithm));
        }
        if !matches!(self.bits.dtype, DType::U8 | DType::U16 | DType::U32 | DType::U64) {
            return Err(format!("bits come as ui8, ui16, ui32 or ui64, not {}", self.bits));
        }
        Ok(vec![state.clone(), self.bits.clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let algorithm = match self.algorithm {
            Algorithm::ThreeFry => "THREE_FRY",
            Algorithm::Philox => "PHILOX",
        };
        format!("stablehlo.rng_bit_generator {}, algorithm = {algorithm} : {}", cx.operands(), cx.signature())
    }

    fn result_count(&self, _inputs: usize) -> usize {
        2
    }
}

impl Tensor {
    /// Random bits of this unsigned type and shape from a state (`self`, two ui64): (state for the next bits, bits). The
    /// same state gives the same bits everywhere.
    #[track_caller]
    pub fn rng_bits(&self, algorithm: Algorithm, dtype: DType, shape: &[usize]) -> (Tensor, Tensor) {
        let op = RngBitGenerator { algorithm, bits: Aval::new(dtype, shape) };
        pair(self.graph.apply(op, &[self]), self)
    }

    /// Random f32 in [0, 1), multiples of 2⁻²⁴, from a state (`self`, two ui64): (state for the next, numbers).
    #[track_caller]
    pub fn rng_uniform(&self, shape: &[usize]) -> (Tensor, Tensor) {
        let (state, bits) = self.rng_bits(Algorithm::ThreeFry, DType::U32, shape);
        // The upper 24 bits are all that an f32 holds exactly.
        let numbers = bits.shift_right_logical(8).cast(DType::F32) * 2f64.powi(-24);
        (state, numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{F32, U32, U64};
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn text() {
        assert_eq!(
            last_line(|g| vec![g.arg("s", U64, &[2]).rng_bits(Algorithm::Philox, U32, &[4]).1]),
            "%rng_bit_generator, %rng_bit_generator_1 = stablehlo.rng_bit_generator %s, algorithm = PHILOX : (tensor<2xui64>) -> (tensor<2xui64>, tensor<4xui32>)"
        );
        let uniform = lines(|g| vec![g.arg("s", U64, &[2]).rng_uniform(&[4]).1]);
        assert!(uniform[0].contains("THREE_FRY"), "{uniform:?}");
        assert!(uniform.iter().any(|line| line.contains("dense<5.9604645e-8>")), "{uniform:?}");
    }

    #[test]
    fn errors() {
        let bits =
            |dtype, n: usize, of| error(|g| vec![g.arg("s", dtype, &[n]).rng_bits(Algorithm::ThreeFry, of, &[4]).1]);
        assert!(bits(U64, 3, U32).contains("the state of ThreeFry is ui64 of length [2], found ui64[3]"));
        assert!(bits(U32, 2, U32).contains("found ui32[2]"));
        assert!(bits(U64, 2, F32).contains("bits come as ui8, ui16, ui32 or ui64, not f32[4]"));
    }
}
