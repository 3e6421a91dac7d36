//! The protocol-buffer wire format, read by hand: fields of one message, one after the other.

use super::error::HloError;

/// Messages inside messages that are read at most; a type that holds itself (a tuple of tuples) could go on for ever.
pub(super) const MAX_DEPTH: usize = 64;

/// The value of one field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Field<'a> {
    /// A varint: integers, flags, enumerations.
    Int(u64),
    /// Eight bytes.
    Fixed64([u8; 8]),
    /// Bytes, text, a message, or packed numbers.
    Bytes(&'a [u8]),
    /// Four bytes.
    Fixed32([u8; 4]),
}

/// Reads one message field by field.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'a> {
    message: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    /// `message` names what is read, for error messages.
    pub(super) fn new(message: &'static str, bytes: &'a [u8]) -> Self {
        Cursor { message, bytes, at: 0 }
    }

    fn damaged(&self, trouble: impl std::fmt::Display) -> HloError {
        HloError::Damaged {
            message: self.message,
            trouble: format!("byte {} of {}: {trouble}", self.at, self.bytes.len()),
        }
    }

    /// An error at this place.
    pub(super) fn wrong(&self, field: u64, wanted: &str, found: Field<'_>) -> HloError {
        let found = match found {
            Field::Int(_) => "a varint",
            Field::Fixed64(_) => "eight bytes",
            Field::Bytes(_) => "a length-delimited value",
            Field::Fixed32(_) => "four bytes",
        };
        self.damaged(format_args!("field {field} must be {wanted}, found {found}"))
    }

    fn varint(&mut self) -> Result<u64, HloError> {
        let mut value = 0u64;
        for shift in (0..).step_by(7) {
            let Some(&byte) = self.bytes.get(self.at) else { return Err(self.damaged("ends within a number")) };
            // The tenth byte has room for one bit.
            if shift == 63 && byte > 1 {
                return Err(self.damaged("a number of more than 64 bits"));
            }
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        Ok(value)
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], HloError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(taken) = usize::try_from(count).ok().and_then(|n| rest.get(..n)) else {
            return Err(self.damaged(format_args!("{count} bytes are announced, {} are left", rest.len())));
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], HloError> {
        let taken = self.take(N as u64)?;
        taken.try_into().map_err(|_| self.damaged("ends within a number"))
    }

    /// The next field's number and value; `None` at the end.
    ///
    /// # Errors
    /// The bytes end within the field, or are no field.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, HloError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Int(self.varint()?),
            1 => Field::Fixed64(self.array()?),
            2 => {
                let count = self.varint()?;
                Field::Bytes(self.take(count)?)
            }
            5 => Field::Fixed32(self.array()?),
            wire => return Err(self.damaged(format_args!("wire type {wire} is not known"))),
        };
        match key >> 3 {
            0 => Err(self.damaged("field number 0")),
            field => Ok(Some((field, value))),
        }
    }

    /// An `int64` (or smaller) field.
    pub(super) fn int(&self, field: u64, value: Field<'_>) -> Result<i64, HloError> {
        match value {
            // The wire carries the two's complement.
            Field::Int(v) => Ok(v as i64),
            other => Err(self.wrong(field, "a number", other)),
        }
    }

    /// The bytes of a text or message field.
    pub(super) fn bytes(&self, field: u64, value: Field<'a>) -> Result<&'a [u8], HloError> {
        match value {
            Field::Bytes(v) => Ok(v),
            other => Err(self.wrong(field, "bytes", other)),
        }
    }

    /// A text field; what is not UTF-8 in it is replaced.
    pub(super) fn text(&self, field: u64, value: Field<'a>) -> Result<String, HloError> {
        Ok(String::from_utf8_lossy(self.bytes(field, value)?).into_owned())
    }

    /// Adds a `repeated int64` field to a list: one number, or packed ones.
    pub(super) fn ints(&self, field: u64, value: Field<'a>, list: &mut Vec<i64>) -> Result<(), HloError> {
        match value {
            Field::Int(v) => list.push(v as i64),
            Field::Bytes(packed) => {
                let mut numbers = Cursor::new(self.message, packed);
                while numbers.at < packed.len() {
                    list.push(numbers.varint()? as i64);
                }
            }
            other => return Err(self.wrong(field, "numbers", other)),
        }
        Ok(())
    }

    /// The error of messages nested deeper than [`MAX_DEPTH`].
    pub(super) fn too_deep(&self) -> HloError {
        self.damaged(format_args!("nested more than {MAX_DEPTH} deep"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(bytes: &[u8]) -> Result<Option<(u64, Field<'_>)>, HloError> {
        Cursor::new("Test", bytes).next()
    }

    fn trouble(bytes: &[u8]) -> String {
        first(bytes).unwrap_err().to_string()
    }

    #[test]
    fn each_wire_type_is_read() {
        assert_eq!(first(&[0x08, 0xac, 0x02]), Ok(Some((1, Field::Int(300)))));
        assert_eq!(first(&[0x12, 2, 7, 9]), Ok(Some((2, Field::Bytes(&[7, 9])))));
        assert_eq!(first(&[0x19, 1, 2, 3, 4, 5, 6, 7, 8]), Ok(Some((3, Field::Fixed64([1, 2, 3, 4, 5, 6, 7, 8])))));
        assert_eq!(first(&[0x25, 1, 2, 3, 4]), Ok(Some((4, Field::Fixed32([1, 2, 3, 4])))));
        assert_eq!(first(&[]), Ok(None));
    }

    #[test]
    fn minus_one_takes_ten_bytes() {
        let mut bytes = vec![0x08];
        bytes.extend([0xff; 9]);
        bytes.push(1);
        let mut cursor = Cursor::new("Test", &bytes);
        let (field, value) = cursor.next().unwrap().unwrap();
        assert_eq!(cursor.int(field, value), Ok(-1));
    }

    #[test]
    fn packed_and_single_numbers_make_one_list() {
        let bytes = [0x08, 5, 0x0a, 3, 6, 0xac, 0x02];
        let (mut cursor, mut list) = (Cursor::new("Test", &bytes), Vec::new());
        while let Some((field, value)) = cursor.next().unwrap() {
            cursor.ints(field, value, &mut list).unwrap();
        }
        assert_eq!(list, [5, 6, 300]);
    }

    #[test]
    fn damage_is_named_with_its_place() {
        assert_eq!(trouble(&[0x08, 0x80]), "damaged HLO program: Test, byte 2 of 2: ends within a number");
        assert_eq!(trouble(&[0x12, 9, 1]), "damaged HLO program: Test, byte 2 of 3: 9 bytes are announced, 1 are left");
        assert!(trouble(&[0x0b]).contains("wire type 3"));
        assert!(trouble(&[0x00, 0]).contains("field number 0"));
        assert!(trouble(&[0x19, 1, 2]).contains("8 bytes are announced, 2 are left"));
        // A varint that does not end, and one byte more than 64 bits need.
        assert!(trouble(&[0xff; 40]).contains("more than 64 bits"));
        assert!(trouble(&[[0x08].as_slice(), &[0x80; 9], &[2]].concat()).contains("more than 64 bits"));
        let huge = [0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        assert!(trouble(&huge).contains("18446744073709551615 bytes are announced"));
    }
}
