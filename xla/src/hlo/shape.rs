//! Types of an optimized program's values: arrays with their layout, and tuples.

use super::error::HloError;
use super::wire::{Cursor, Field, MAX_DEPTH};
use crate::DType;
use std::fmt;

/// An element type, by its number in `xla_data.proto`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element(u64);

/// `PrimitiveType`: number, name in HLO text, bits of one element where nothing else is said.
const ELEMENTS: [(u64, &str, u64); 30] = [
    (1, "pred", 8),
    (2, "s8", 8),
    (3, "s16", 16),
    (4, "s32", 32),
    (5, "s64", 64),
    (6, "u8", 8),
    (7, "u16", 16),
    (8, "u32", 32),
    (9, "u64", 64),
    (10, "f16", 16),
    (11, "f32", 32),
    (12, "f64", 64),
    (15, "c64", 64),
    (16, "bf16", 16),
    (18, "c128", 128),
    (19, "f8e5m2", 8),
    (20, "f8e4m3fn", 8),
    (21, "s4", 8),
    (22, "u4", 8),
    (23, "f8e4m3b11fnuz", 8),
    (24, "f8e5m2fnuz", 8),
    (25, "f8e4m3fnuz", 8),
    (26, "s2", 8),
    (27, "u2", 8),
    (28, "f8e4m3", 8),
    (29, "f8e3m4", 8),
    (30, "s1", 8),
    (31, "u1", 8),
    (32, "f4e2m1fn", 8),
    (33, "f8e8m0fnu", 8),
];

impl Element {
    fn row(self) -> Option<&'static (u64, &'static str, u64)> {
        ELEMENTS.iter().find(|(number, ..)| *number == self.0)
    }

    /// The name that HLO text uses (`pred`, `s32`, `bf16`, …); `opaque` for what is not known here.
    pub fn name(self) -> &'static str {
        self.row().map_or("opaque", |(_, name, _)| name)
    }

    /// The same type among those that graphs use here.
    pub fn dtype(self) -> Option<DType> {
        Some(match self.0 {
            1 => DType::Pred,
            2 => DType::I8,
            3 => DType::I16,
            4 => DType::I32,
            5 => DType::I64,
            6 => DType::U8,
            7 => DType::U16,
            8 => DType::U32,
            9 => DType::U64,
            10 => DType::F16,
            11 => DType::F32,
            12 => DType::F64,
            16 => DType::BF16,
            19 => DType::F8E5M2,
            20 => DType::F8E4M3FN,
            21 => DType::I4,
            22 => DType::U4,
            _ => return None,
        })
    }
}

/// An array: element type, axes, and how it lies in memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ArrayShape {
    /// Its element type.
    pub element: Element,
    /// Its axes, major to minor as the program counts them.
    pub dims: Vec<u64>,
    /// The axes in the order of memory, fastest first; empty where the program does not say.
    pub minor_to_major: Vec<u64>,
    /// The memory that holds it: 0 is the device's main memory; on TPU 1 is the chip's vector memory.
    pub memory_space: u64,
    /// Bits of one element in memory.
    pub element_bits: u64,
}

impl ArrayShape {
    /// Its number of elements.
    pub fn elements(&self) -> u64 {
        // A zero anywhere makes it empty, whatever the others are.
        if self.dims.contains(&0) { 0 } else { self.dims.iter().fold(1, |n, d| n.saturating_mul(*d)) }
    }

    /// Its size in bytes without the padding of tiled layouts.
    pub fn bytes(&self) -> u64 {
        self.elements().saturating_mul(self.element_bits).div_ceil(8)
    }
}

/// The type of a value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Shape {
    /// An array.
    Array(ArrayShape),
    /// Several values.
    Tuple(Vec<Shape>),
    /// A token or something opaque: no data.
    #[default]
    Opaque,
}

const TUPLE: u64 = 13;
const OPAQUE: u64 = 14;
const TOKEN: u64 = 17;
/// An array that is known by its place: its type is the one element of `tuple_shapes`.
const BUFFER: u64 = 34;

impl Shape {
    /// Bytes of all its arrays, without the padding of tiled layouts.
    pub fn bytes(&self) -> u64 {
        match self {
            Shape::Array(array) => array.bytes(),
            Shape::Tuple(parts) => parts.iter().fold(0, |n, part| n.saturating_add(part.bytes())),
            Shape::Opaque => 0,
        }
    }

    /// The array, where it is one.
    pub fn array(&self) -> Option<&ArrayShape> {
        match self {
            Shape::Array(array) => Some(array),
            _ => None,
        }
    }

    /// The values of a tuple; nothing for others.
    pub fn parts(&self) -> &[Shape] {
        match self {
            Shape::Tuple(parts) => parts,
            _ => &[],
        }
    }

    /// Reads a `ShapeProto` that lies `depth` shapes deep.
    pub(super) fn read(bytes: &[u8], depth: usize) -> Result<Shape, HloError> {
        let mut cursor = Cursor::new("ShapeProto", bytes);
        if depth > MAX_DEPTH {
            return Err(cursor.too_deep());
        }
        let (mut element, mut dims, mut parts, mut layout) = (0, Vec::new(), Vec::new(), Layout::default());
        while let Some((field, value)) = cursor.next()? {
            match field {
                2 => element = cursor.int(field, value)? as u64,
                3 => cursor.ints(field, value, &mut dims)?,
                4 => parts.push(Shape::read(cursor.bytes(field, value)?, depth + 1)?),
                5 => layout = Layout::read(cursor.bytes(field, value)?)?,
                _ => {}
            }
        }
        Ok(match element {
            TUPLE => Shape::Tuple(parts),
            BUFFER => parts.pop().unwrap_or(Shape::Opaque),
            OPAQUE | TOKEN => Shape::Opaque,
            _ => {
                let element = Element(element);
                let usual = element.row().map_or(0, |(.., bits)| *bits);
                Shape::Array(ArrayShape {
                    element,
                    // Sizes below zero stand for axes whose size is not known: they count as nothing.
                    dims: dims.into_iter().map(|d| u64::try_from(d).unwrap_or(0)).collect(),
                    minor_to_major: layout.minor_to_major,
                    memory_space: layout.memory_space,
                    element_bits: if layout.element_bits == 0 { usual } else { layout.element_bits },
                })
            }
        })
    }
}

/// What is read of a `LayoutProto`.
#[derive(Default)]
struct Layout {
    minor_to_major: Vec<u64>,
    element_bits: u64,
    memory_space: u64,
}

impl Layout {
    fn read(bytes: &[u8]) -> Result<Layout, HloError> {
        let mut cursor = Cursor::new("LayoutProto", bytes);
        let (mut layout, mut order) = (Layout::default(), Vec::new());
        while let Some((field, value)) = cursor.next()? {
            match (field, value) {
                (1, value) => cursor.ints(field, value, &mut order)?,
                (7, Field::Int(bits)) => layout.element_bits = bits,
                (8, Field::Int(space)) => layout.memory_space = space,
                _ => {}
            }
        }
        layout.minor_to_major = order.into_iter().map(|axis| axis as u64).collect();
        Ok(layout)
    }
}

impl fmt::Display for Shape {
    /// As HLO text writes it, the layout only where it says something: `bf16[8,1024]{0,1:S(1)}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: &[u64]| items.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        match self {
            Shape::Opaque => f.write_str("opaque[]"),
            Shape::Tuple(parts) => {
                f.write_str("(")?;
                for (i, part) in parts.iter().enumerate() {
                    write!(f, "{}{part}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str(")")
            }
            Shape::Array(array) => {
                write!(f, "{}[{}]", array.element.name(), list(&array.dims))?;
                let usual = array.minor_to_major.iter().rev().copied().eq(0..array.minor_to_major.len() as u64);
                match (usual, array.memory_space) {
                    (true, 0) => Ok(()),
                    (false, 0) => write!(f, "{{{}}}", list(&array.minor_to_major)),
                    (true, space) => write!(f, "{{:S({space})}}"),
                    (false, space) => write!(f, "{{{}:S({space})}}", list(&array.minor_to_major)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::*;
    use super::*;

    fn read(message: Message) -> Shape {
        Shape::read(&message.0, 0).unwrap()
    }

    #[test]
    fn shapes_are_shown_as_hlo_text() {
        assert_eq!(read(array(BF16, &[8, 128])).to_string(), "bf16[8,128]");
        assert_eq!(read(array_in(BF16, &[8, 128], 1)).to_string(), "bf16[8,128]{:S(1)}");
        let turned = message().int(2, F32).packed(3, &[2, 3]).message(5, message().packed(1, &[0, 1]).int(8, 1));
        assert_eq!(read(turned).to_string(), "f32[2,3]{0,1:S(1)}");
        assert_eq!(read(tuple(&[array(S32, &[]), message().int(2, 17)])).to_string(), "(s32[], opaque[])");
    }

    #[test]
    fn bytes_follow_the_layout() {
        // Four-bit integers take a byte each, or half of one where the layout says so.
        let packed = message().int(2, 21).packed(3, &[7]).message(5, message().int(7, 4));
        assert_eq!((read(array(21, &[7])).bytes(), read(packed).bytes()), (7, 4));
        assert_eq!(read(tuple(&[array(F32, &[3]), array(BF16, &[3])])).bytes(), 18);
        // An array behind a buffer type, a token, and a type that is not known.
        assert_eq!(read(message().int(2, 34).message(4, array(F32, &[3]))).bytes(), 12);
        assert_eq!(read(message().int(2, 17)), Shape::Opaque);
        assert_eq!((read(array(99, &[3])).bytes(), read(array(99, &[3])).to_string().as_str()), (0, "opaque[3]"));
    }

    #[test]
    fn every_dtype_has_its_element() {
        let found: Vec<_> = ELEMENTS.iter().filter_map(|(number, ..)| Element(*number).dtype()).collect();
        assert_eq!(found.len(), DType::ALL.len());
        for (number, name, bits) in ELEMENTS {
            if let Some(dtype) = Element(number).dtype() {
                assert_eq!(dtype.size() as u64 * 8, bits, "{name}");
            }
        }
    }
}
