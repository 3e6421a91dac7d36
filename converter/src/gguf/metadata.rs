//! The typed key/value pairs at the head of a GGUF file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::error::Error;

/// A metadata value. Integers and floats of all widths are widened, which is exact.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// An unsigned integer.
    Uint(u64),
    /// A signed integer.
    Int(i64),
    /// A floating-point number.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A UTF-8 string.
    String(String),
    /// Values of one type.
    Array(Vec<Value>),
}

impl Value {
    /// The value as an unsigned integer; `None` for negative numbers and other kinds.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::Uint(v) => Some(v),
            Value::Int(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The value as a number; integers count too.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::Float(v) => Some(v),
            Value::Uint(v) => Some(v as f64),
            Value::Int(v) => Some(v as f64),
            _ => None,
        }
    }

    /// The truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(v) = self { Some(*v) } else { None }
    }

    /// The string, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(v) = self { Some(v) } else { None }
    }

    /// The elements, if it is an array.
    pub fn as_array(&self) -> Option<&[Value]> {
        if let Value::Array(v) = self { Some(v) } else { None }
    }
}

/// The metadata of one file, by key.
#[derive(Clone, Debug)]
pub struct Metadata {
    pub(super) path: PathBuf,
    pub(super) values: BTreeMap<String, Value>,
}

impl Metadata {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All pairs in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key` through `read`, `None` where the key is absent.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(typed) => Ok(Some(typed)),
            None => Err(Error::config(&self.path, key, format!("must be {kind}, found {}", describe(value)))),
        }
    }

    /// An unsigned integer.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "an unsigned integer", Value::as_u64)
    }

    /// An integer that fits a token id.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, Error> {
        self.typed(key, "an unsigned 32-bit integer", |v| v.as_u64()?.try_into().ok())
    }

    /// A finite number.
    pub fn f64(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a finite number", |v| v.as_f64().filter(|v| v.is_finite()))
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, Error> {
        self.typed(key, "an array of strings", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }

    /// An array of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, Error> {
        self.typed(key, "an array of numbers", |v| v.as_array()?.iter().map(Value::as_f64).collect())
    }

    /// The error for a key that must be there.
    pub(super) fn missing(&self, key: &str) -> Error {
        Error::config(&self.path, key, "is required and absent")
    }
}

/// A value for a message: short ones whole, long ones by kind and length.
fn describe(value: &Value) -> String {
    match value {
        Value::Uint(v) => v.to_string(),
        Value::Int(v) => v.to_string(),
        Value::Float(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        Value::String(v) if v.chars().count() <= 40 => format!("the string {v:?}"),
        Value::String(v) => format!("a string of {} bytes", v.len()),
        Value::Array(v) => format!("an array of {} elements", v.len()),
    }
}
