//! Constants of one element.

use super::error::HloError;
use super::wire::{Cursor, Field};
use half::{bf16, f16};

/// The value of a constant that is one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scalar {
    /// A truth value.
    Bool(bool),
    /// An integer; those above the range of `i64` are `None` in [`Instruction::scalar`](super::Instruction::scalar).
    Int(i64),
    /// A floating-point number.
    Float(f64),
}

/// The value of a `LiteralProto` of one element; `None` for element types that are not read here.
pub(super) fn scalar(bytes: &[u8]) -> Result<Option<Scalar>, HloError> {
    let (mut cursor, mut scalar) = (Cursor::new("LiteralProto", bytes), None);
    while let Some((field, value)) = cursor.next()? {
        let found = match (field, value) {
            (2, value) => first(&cursor, field, value)?.map(|v| Scalar::Bool(v != 0)),
            // 32-bit integers come sign-extended, or not where they are unsigned.
            (4..=6, value) => first(&cursor, field, value)?.map(Scalar::Int),
            (7, value) => first(&cursor, field, value)?.filter(|v| *v >= 0).map(Scalar::Int),
            (8, Field::Fixed32(v)) => Some(Scalar::Float(f32::from_le_bytes(v).into())),
            (9, Field::Fixed64(v)) => Some(Scalar::Float(f64::from_le_bytes(v))),
            (3 | 8 | 9 | 11 | 13 | 15 | 16 | 17, Field::Bytes(v)) => raw(field, v),
            _ => None,
        };
        scalar = scalar.or(found);
    }
    Ok(scalar)
}

fn first(cursor: &Cursor<'_>, field: u64, value: Field<'_>) -> Result<Option<i64>, HloError> {
    let mut numbers = Vec::new();
    cursor.ints(field, value, &mut numbers)?;
    Ok(numbers.first().copied())
}

/// An element as it lies in memory, little-endian.
fn raw(field: u64, bytes: &[u8]) -> Option<Scalar> {
    Some(match (field, bytes) {
        (3, [a]) => Scalar::Int((*a).into()),
        (15, [a]) => Scalar::Int(i64::from(*a as i8)),
        (16, [a, b]) => Scalar::Int(u16::from_le_bytes([*a, *b]).into()),
        (17, [a, b]) => Scalar::Int(i16::from_le_bytes([*a, *b]).into()),
        (11, [a, b]) => Scalar::Float(f16::from_le_bytes([*a, *b]).into()),
        (13, [a, b]) => Scalar::Float(bf16::from_le_bytes([*a, *b]).into()),
        (8, [a, b, c, d]) => Scalar::Float(f32::from_le_bytes([*a, *b, *c, *d]).into()),
        (9, bytes) => Scalar::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
        _ => return None,
    })
}
