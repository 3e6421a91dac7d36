//! What is known of a tensor before it runs: its element type and shape.

use std::fmt;

use crate::DType;

/// An abstract value: element type and shape. [`fmt::Display`] is for people: `f32[2,576]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Aval {
    /// The element type.
    pub dtype: DType,
    /// Length of each axis, in elements; empty for a scalar.
    pub shape: Vec<usize>,
}

impl Aval {
    /// An abstract value of this element type and shape.
    pub fn new(dtype: DType, shape: &[usize]) -> Aval {
        Aval { dtype, shape: shape.to_vec() }
    }

    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements (1 for a scalar).
    pub fn elements(&self) -> usize {
        self.shape.iter().fold(1, |product, &n| product.saturating_mul(n))
    }

    /// The type as StableHLO spells it: `tensor<2x576xf32>`.
    pub fn mlir(&self) -> String {
        let mut text = String::from("tensor<");
        for n in &self.shape {
            text += &format!("{n}x");
        }
        text + self.dtype.name() + ">"
    }
}

impl fmt::Display for Aval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.dtype, join(&self.shape, ","))
    }
}

/// `items` in their display form, with `separator` between them.
pub(crate) fn join<T: fmt::Display>(items: &[T], separator: &str) -> String {
    items.iter().map(|item| item.to_string()).collect::<Vec<_>>().join(separator)
}

/// `[1, 2, 3]`, as both messages and StableHLO attributes write a list.
pub(crate) fn list<T: fmt::Display>(items: &[T]) -> String {
    format!("[{}]", join(items, ", "))
}

/// `array<i64: 1, 2, 3>`, the dense array attribute.
pub(crate) fn array_attr<T: fmt::Display>(items: &[T]) -> String {
    if items.is_empty() { "array<i64>".into() } else { format!("array<i64: {}>", join(items, ", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spells_types() {
        let x = Aval::new(DType::BF16, &[2, 576]);
        assert_eq!(x.to_string(), "bf16[2,576]");
        assert_eq!(x.mlir(), "tensor<2x576xbf16>");
        assert_eq!(Aval::new(DType::Pred, &[]).mlir(), "tensor<i1>");
        assert_eq!(x.elements(), 1152);
    }
}
