//! Contractions written with one letter per axis.

use std::panic::Location;

use super::Platform;
use super::aval::Aval;
use super::tensor::Tensor;
use crate::DType;

/// A parsed "AB,BC->AC".
struct Spec {
    inputs: Vec<Vec<char>>,
    output: Vec<char>,
}

impl Spec {
    /// Splits the text; spaces are ignored.
    fn parse(text: &str, operands: usize) -> Result<Spec, String> {
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let Some((inputs, output)) = text.split_once("->") else {
            return Err("needs `->` and the letters of the result".into());
        };
        let spec = Spec {
            inputs: inputs.split(',').map(|part| part.chars().collect()).collect(),
            output: output.chars().collect(),
        };
        if spec.inputs.len() != operands {
            return Err(format!("names {} operands, but {operands} are given", spec.inputs.len()));
        }
        for part in spec.inputs.iter().chain([&spec.output]) {
            for (i, letter) in part.iter().enumerate() {
                if !letter.is_ascii_alphabetic() {
                    return Err(format!("an axis is one ASCII letter, found {letter:?}"));
                }
                if part[..i].contains(letter) {
                    return Err(format!("axis {letter} stands twice in one tensor"));
                }
            }
        }
        match spec.output.iter().find(|letter| !spec.inputs.iter().any(|input| input.contains(letter))) {
            Some(letter) => Err(format!("axis {letter} of the result is in no operand")),
            None => Ok(spec),
        }
    }

    /// Each operand has an axis per letter, and a letter has one length.
    fn check(&self, operands: &[&Tensor]) -> Result<(), String> {
        const SIDES: [&str; 2] = ["left", "right"];
        for (i, (letters, x)) in self.inputs.iter().zip(operands).enumerate() {
            if letters.len() != x.rank() {
                let which = if operands.len() == 1 { "the operand" } else { &format!("the {} operand", SIDES[i]) };
                let (n, rank) = (letters.len(), x.rank());
                return Err(format!("{which} is {}, of rank {rank}, but has {n} letters", x.aval()));
            }
        }
        if let [left, right] = self.inputs.as_slice() {
            for (l, letter) in left.iter().enumerate() {
                let Some(r) = right.iter().position(|other| other == letter) else { continue };
                let (n, m) = (operands[0].shape()[l], operands[1].shape()[r]);
                if n != m {
                    return Err(format!("axis {letter} is {n} on the left and {m} on the right"));
                }
            }
        }
        Ok(())
    }

    /// The result's shape, as far as the letters give it.
    fn shape(&self, operands: &[&Tensor]) -> Vec<usize> {
        let size = |letter: &char| {
            let axes = self.inputs.iter().zip(operands);
            let mut sizes = axes.filter_map(|(letters, x)| {
                let axis = letters.iter().position(|other| other == letter)?;
                x.shape().get(axis).copied()
            });
            sizes.next().unwrap_or(1)
        };
        self.output.iter().map(size).collect()
    }
}

/// The product of two tensors, summed over the letters that the result leaves out: `einsum("BSM,MHK->BSHK", &x, &w)`.
///
/// A letter is an axis; letters of both operands are paired. Operands of different element types are cast to one first:
/// the float of a float and an integer, else the wider, f32 for f16 and bf16, 8 bits for two of 4. The result has that
/// type.
///
/// Errors: letters that do not fit the ranks or lengths, a letter twice in one tensor, a letter of the result that no
/// operand has.
#[track_caller]
pub fn einsum(spec: &str, left: &Tensor, right: &Tensor) -> Tensor {
    einsum_as(spec, left, right, promote(left.dtype(), right.dtype()))
}

/// [`einsum`] with the element type of the sum and result given: bf16 operands with an f32 result, say.
#[track_caller]
pub fn einsum_as(spec: &str, left: &Tensor, right: &Tensor, dtype: DType) -> Tensor {
    let location = Location::caller();
    let operands = [left, right];
    let graph = left.graph();
    let parsed = match Spec::parse(spec, 2) {
        Ok(parsed) => parsed,
        Err(message) => {
            graph.fail(location, format!("einsum {spec:?}: {message}"));
            return left.clone();
        }
    };
    if let Err(message) = parsed.check(&operands) {
        graph.fail(location, format!("einsum {spec:?}: {message}"));
        return graph.placeholder(Aval::new(dtype, &parsed.shape(&operands)));
    }
    let mut common = promote(left.dtype(), right.dtype());
    if graph.training() && graph.platform() == Platform::Cpu && matches!(common, DType::BF16 | DType::F16) {
        // XLA:CPU multiplies matrices of 16 bits one element after another: a step of training took 12 times as long.
        common = DType::F32;
    }
    let (left, right) = (left.cast(common), right.cast(common));
    let out = &parsed.output;
    // Letters of one operand alone that the result leaves out are summed first.
    let (left, l) = sum_private(&left, &parsed.inputs[0], &parsed.inputs[1], out);
    let (right, r) = sum_private(&right, &parsed.inputs[1], &parsed.inputs[0], out);

    let batch: Vec<char> = out.iter().copied().filter(|c| l.contains(c) && r.contains(c)).collect();
    let contract: Vec<char> = l.iter().copied().filter(|c| r.contains(c) && !out.contains(c)).collect();
    let free = |letters: &[char]| {
        letters.iter().copied().filter(|c| !batch.contains(c) && !contract.contains(c)).collect::<Vec<_>>()
    };
    let (left_free, right_free) = (free(&l), free(&r));
    let position = |letters: &[char], c: &char| letters.iter().position(|other| other == c).unwrap_or_default();
    let pairs = |chars: &[char], l: &[char], r: &[char]| -> Vec<_> {
        chars.iter().map(|c| (position(l, c), position(r, c))).collect()
    };

    // The dot gives batch, left, right; with the operands exchanged it may give the wanted order at once.
    let exchanged = [batch.clone(), right_free.clone(), left_free.clone()].concat();
    if exchanged == *out {
        return right.dot_general(&left, &pairs(&batch, &r, &l), &pairs(&contract, &r, &l), dtype);
    }
    let order = [batch.clone(), left_free, right_free].concat();
    let product = left.dot_general(&right, &pairs(&batch, &l, &r), &pairs(&contract, &l, &r), dtype);
    let permutation: Vec<usize> = out.iter().map(|c| position(&order, c)).collect();
    product.transpose(&permutation)
}

/// One tensor with its axes summed over or reordered: `einsum1("BSM->MB", &x)` sums over S. Errors: as [`einsum`].
#[track_caller]
pub fn einsum1(spec: &str, x: &Tensor) -> Tensor {
    let location = Location::caller();
    let parsed = match Spec::parse(spec, 1).and_then(|parsed| parsed.check(&[x]).map(|()| parsed)) {
        Ok(parsed) => parsed,
        Err(message) => {
            x.graph().fail(location, format!("einsum {spec:?}: {message}"));
            return x.clone();
        }
    };
    let (x, letters) = sum_private(x, &parsed.inputs[0], &[], &parsed.output);
    let position = |c: &char| letters.iter().position(|other| other == c).unwrap_or_default();
    x.transpose(&parsed.output.iter().map(position).collect::<Vec<_>>())
}

/// The operand summed over the letters that stand in neither the other operand nor the result, and its letters then.
#[track_caller]
fn sum_private(x: &Tensor, letters: &[char], other: &[char], out: &[char]) -> (Tensor, Vec<char>) {
    let kept = |c: &char| other.contains(c) || out.contains(c);
    let axes: Vec<isize> = (0..letters.len()).filter(|&i| !kept(&letters[i])).map(|i| i as isize).collect();
    let x = if axes.is_empty() { x.clone() } else { x.sum(&axes) };
    (x, letters.iter().copied().filter(kept).collect())
}

/// The element type that holds both: the float of a float and an integer, else the wider; f32 for two floats of one
/// width. Two 4-bit types give an 8-bit one, as the CPU has no 4-bit products.
fn promote(left: DType, right: DType) -> DType {
    let wider = if left.bits() >= right.bits() { left } else { right };
    match (left.is_float(), right.is_float()) {
        (true, true) if left != right && left.size() == right.size() => DType::F32,
        (true, false) => left,
        (false, true) => right,
        _ if left == DType::U4 && right == DType::U4 => DType::U8,
        _ if matches!(left, DType::I4 | DType::U4) && matches!(right, DType::I4 | DType::U4) => DType::I8,
        _ => wider,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::*;
    use crate::graph::Graph;
    use crate::graph::testing::{error, lines};

    fn product(spec: &str, left: (DType, &[usize]), right: (DType, &[usize])) -> Vec<String> {
        lines(|g| vec![einsum(spec, &g.arg("x", left.0, left.1), &g.arg("y", right.0, right.1))])
    }

    #[test]
    fn the_dot_alone_where_its_order_is_right() {
        assert_eq!(
            product("BSM,MHK->BSHK", (F32, &[2, 3, 8]), (F32, &[8, 4, 5])),
            [
                "%dot_general = stablehlo.dot_general %x, %y, contracting_dims = [2] x [0] : (tensor<2x3x8xf32>, tensor<8x4x5xf32>) -> tensor<2x3x4x5xf32>"
            ]
        );
        // Attention scores of grouped heads: two batch axes, one of them not in front.
        assert_eq!(
            product("BSGRK,BTGK->BGSRT", (F32, &[2, 3, 4, 6, 8]), (F32, &[2, 7, 4, 8])),
            [
                "%dot_general = stablehlo.dot_general %x, %y, batching_dims = [0, 2] x [0, 2], contracting_dims = [4] x [3] : (tensor<2x3x4x6x8xf32>, tensor<2x7x4x8xf32>) -> tensor<2x4x3x6x7xf32>"
            ]
        );
    }

    #[test]
    fn operands_exchanged_or_the_result_transposed() {
        assert_eq!(
            product("MF,BM->BF", (F32, &[8, 5]), (F32, &[2, 8])),
            [
                "%dot_general = stablehlo.dot_general %y, %x, contracting_dims = [1] x [0] : (tensor<2x8xf32>, tensor<8x5xf32>) -> tensor<2x5xf32>"
            ]
        );
        let text = product("BSM,MHK->BHSK", (F32, &[2, 3, 8]), (F32, &[8, 4, 5]));
        assert_eq!(
            text[1],
            "%transpose = stablehlo.transpose %dot_general, dims = [0, 2, 1, 3] : (tensor<2x3x4x5xf32>) -> tensor<2x4x3x5xf32>"
        );
    }

    #[test]
    fn letters_of_one_operand_are_summed_first() {
        let text = product("AB,CD->AC", (F32, &[2, 3]), (F32, &[4, 5]));
        assert!(text[1].contains("reduce(%x init") && text[3].contains("reduce(%y init"), "{text:?}");
        assert!(text[4].contains("contracting_dims = [] x []"), "{text:?}");
        let one = |spec: &str| lines(|g| vec![einsum1(spec, &g.arg("x", F32, &[2, 3, 4]))]);
        assert!(one("BSM -> BSM").is_empty());
        let text = one("BSM->MB");
        assert!(text[1].contains("across dimensions = [1]") && text[2].contains("dims = [1, 0]"), "{text:?}");
    }

    #[test]
    fn element_types() {
        let result = |left, right| product("A,A->", (left, &[2]), (right, &[2])).pop().unwrap_or_default();
        assert!(result(BF16, BF16).ends_with("(tensor<2xbf16>, tensor<2xbf16>) -> tensor<bf16>"));
        assert!(result(BF16, I4).ends_with("(tensor<2xbf16>, tensor<2xbf16>) -> tensor<bf16>"));
        assert!(result(BF16, F16).ends_with("-> tensor<f32>"));
        assert!(result(F32, BF16).ends_with("-> tensor<f32>"));
        assert!(result(I8, I32).ends_with("-> tensor<i32>"));
        assert!(result(I4, I8).ends_with("-> tensor<i8>"));
        assert!(result(I4, I4).ends_with("(tensor<2xi8>, tensor<2xi8>) -> tensor<i8>"));
        let wide = lines(|g| {
            let x = g.arg("x", BF16, &[2]);
            vec![einsum_as("A,A->", &x, &x, F32)]
        });
        assert!(wide[0].ends_with("(tensor<2xbf16>, tensor<2xbf16>) -> tensor<f32>"), "{wide:?}");
    }

    #[test]
    fn errors() {
        let wrong = |spec: &str| {
            error(|g: &Graph| vec![einsum(spec, &g.arg("x", F32, &[2, 3, 576]), &g.arg("w", F32, &[512, 4, 5]))])
        };
        assert_eq!(wrong("BSM,MHK->BSHK"), r#"einsum "BSM,MHK->BSHK": axis M is 576 on the left and 512 on the right"#);
        assert!(wrong("BS,MHK->BSHK").ends_with("the left operand is f32[2,3,576], of rank 3, but has 2 letters"));
        assert!(wrong("BSM,MHKX->BSHK").ends_with("the right operand is f32[512,4,5], of rank 3, but has 4 letters"));
        assert!(wrong("BSS,MHK->BSHK").ends_with("axis S stands twice in one tensor"));
        assert!(wrong("BSM,MHK->BSHX").ends_with("axis X of the result is in no operand"));
        assert!(wrong("BSM,MHK").ends_with("needs `->` and the letters of the result"));
        assert!(wrong("BSM->BSM").ends_with("names 1 operands, but 2 are given"));
        assert!(wrong("B.M,MHK->BHK").ends_with("an axis is one ASCII letter, found '.'"));
        assert!(error(|g| vec![einsum1("AB->A", &g.arg("x", F32, &[2]))]).contains("the operand is f32[2], of rank 1"));
    }

    #[test]
    fn the_result_after_an_error_has_the_shape_of_the_letters() {
        let g = Graph::new("test");
        let y = einsum("AB,BC->CA", &g.arg("x", F32, &[2, 3]), &g.arg("y", F32, &[4, 5]));
        assert_eq!(y.shape(), [5, 2]);
    }
}
