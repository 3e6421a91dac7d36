//! The converter from outside: whole folders in, whole folders out.

mod conversion;
mod extend;
mod gguf;
mod layout;
mod packed;
mod parts;
mod round_trip;
mod strictness;
mod support;
