//! Named values: create options going in, attributes and cost properties coming out.

use super::sys;
use std::collections::BTreeMap;

/// A value of a create option, an attribute or a cost property.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text.
    Str(String),
    /// An integer.
    Int(i64),
    /// Several integers.
    IntList(Vec<i64>),
    /// A number.
    Float(f32),
    /// A flag.
    Bool(bool),
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Value::Str(v.to_owned())
    }
}

impl From<String> for Value {
    fn from(v: String) -> Self {
        Value::Str(v)
    }
}

impl From<i64> for Value {
    fn from(v: i64) -> Self {
        Value::Int(v)
    }
}

impl From<Vec<i64>> for Value {
    fn from(v: Vec<i64>) -> Self {
        Value::IntList(v)
    }
}

impl From<f32> for Value {
    fn from(v: f32) -> Self {
        Value::Float(v)
    }
}

impl From<bool> for Value {
    fn from(v: bool) -> Self {
        Value::Bool(v)
    }
}

impl Value {
    /// The value as a number, where it is one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Int(v) => Some(*v as f64),
            Value::Float(v) => Some(f64::from(*v)),
            _ => None,
        }
    }
}

/// The C form of options; it points into them.
pub(super) fn to_raw(options: &[(&str, Value)]) -> Vec<sys::NamedValue> {
    options
        .iter()
        .map(|(name, value)| {
            let (kind, payload, value_size) = match value {
                Value::Str(s) => (sys::NAMED_STRING, sys::NamedPayload { string: s.as_ptr() }, s.len()),
                Value::Int(v) => (sys::NAMED_INT, sys::NamedPayload { int: *v }, 1),
                Value::IntList(v) => (sys::NAMED_INT_LIST, sys::NamedPayload { int_list: v.as_ptr() }, v.len()),
                Value::Float(v) => (sys::NAMED_FLOAT, sys::NamedPayload { float: *v }, 1),
                Value::Bool(v) => (sys::NAMED_BOOL, sys::NamedPayload { boolean: *v }, 1),
            };
            sys::NamedValue {
                struct_size: size_of::<sys::NamedValue>(),
                extension_start: std::ptr::null_mut(),
                name: name.as_ptr(),
                name_size: name.len(),
                kind,
                payload,
                value_size,
            }
        })
        .collect()
}

/// A copy of an array of named values; kinds that are not known are left out.
///
/// # Safety
/// `values` points to `count` initialised named values (or `count` is 0).
pub(super) unsafe fn from_raw(values: *const sys::NamedValue, count: usize) -> BTreeMap<String, Value> {
    // SAFETY: the caller's promise.
    let values = unsafe { slice(values, count) };
    let copy = |v: &sys::NamedValue| {
        // SAFETY: `kind` says which member of the union is set, and pointers cover `value_size` elements.
        let value = unsafe {
            match v.kind {
                sys::NAMED_STRING => Value::Str(text(v.payload.string, v.value_size)),
                sys::NAMED_INT => Value::Int(v.payload.int),
                sys::NAMED_INT_LIST => Value::IntList(slice(v.payload.int_list, v.value_size).to_vec()),
                sys::NAMED_FLOAT => Value::Float(v.payload.float),
                sys::NAMED_BOOL => Value::Bool(v.payload.boolean),
                _ => return None,
            }
        };
        // SAFETY: `name` covers `name_size` bytes.
        Some((unsafe { text(v.name, v.name_size) }, value))
    };
    values.iter().filter_map(copy).collect()
}

/// A slice from C, where null or 0 elements is empty.
///
/// # Safety
/// A non-null `data` points to `count` initialised elements that outlive the result.
pub(super) unsafe fn slice<'a, T>(data: *const T, count: usize) -> &'a [T] {
    if data.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, count) }
}

/// A copy of text from C; bytes that are not UTF-8 are replaced.
///
/// # Safety
/// As for [`slice`].
pub(super) unsafe fn text(data: *const u8, count: usize) -> String {
    // SAFETY: the caller's promise.
    String::from_utf8_lossy(unsafe { slice(data, count) }).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_values_survive_the_c_form() {
        let options = [
            ("count", Value::from(3i64)),
            ("name", Value::from("v5e")),
            ("list", Value::from(vec![1, 2, 3])),
            ("half", Value::from(0.5f32)),
            ("flag", Value::from(true)),
        ];
        let raw = to_raw(&options);
        // SAFETY: `raw` was just made from options that are still alive.
        let back = unsafe { from_raw(raw.as_ptr(), raw.len()) };
        assert_eq!(back.len(), 5);
        for (name, value) in options {
            assert_eq!(back[name], value);
        }
    }
}
