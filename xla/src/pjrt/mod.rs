//! The PJRT C API: open a plugin, compile StableHLO text, move bytes, run. Knows no graph and no model.
//!
//! A [`Plugin`] is a shared library that exports `GetPjrtApi`. It makes a [`Client`] (its [`Device`]s, its memory),
//! which compiles text into a [`LoadedExecutable`] and holds arrays as [`Buffer`]s:
//!
//! ```no_run
//! use xla::pjrt::{CompileOptions, Plugin, Value};
//!
//! let plugin = Plugin::load("pjrt_c_api_cpu_plugin.so")?;
//! let client = plugin.client(&[("cpu_device_count", Value::from(1i64))])?;
//! let program = "func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
//!     %y = stablehlo.add %x, %x : tensor<2xf32>
//!     return %y : tensor<2xf32>
//! }";
//! let double = client.compile(program, &CompileOptions::default())?;
//! let x = client.upload_slice(&[1f32, 2.0], &[2], None)?;
//! let y = double.execute(&[&x])?;
//! assert_eq!(y[0].to_vec::<f32>()?, [2.0, 4.0]);
//! # Ok::<(), xla::pjrt::Error>(())
//! ```
//!
//! # Lifetimes
//! Every object keeps what it needs alive: buffers, executables and events hold their client, a client holds its
//! plugin, and a plugin is never closed. Dropping an object destroys its PJRT counterpart.
//!
//! # Threads
//! PJRT requires plugins to accept concurrent calls on a client, its executables, buffers and events; that is what
//! the `Send` and `Sync` implementations below rest on. Execution and copies are asynchronous: an error that occurs
//! later comes back from [`Buffer::to_host`], [`Event::wait`] or the next execution that uses the buffer.
//!
//! # ABI
//! The layouts follow `pjrt_c_api.h` at version 0.117. A plugin refuses an argument struct that is smaller than the
//! one it was built with and accepts a larger one, so every struct ends in a few reserved zero words.

mod buffer;
mod client;
mod crew;
mod device;
mod element;
mod error;
mod event;
mod executable;
mod exit;
mod ffi;
mod ffi_pool;
mod ffi_sys;
mod key_value;
mod library;
mod mapped;
mod memory_store;
mod options;
mod plugin;
mod sys;
mod topology;
mod value;

pub use buffer::{Buffer, HostData, HostRead};
pub use client::Client;
pub use device::{Device, DeviceDescription, Memory, MemoryStats};
pub use element::Element;
pub use error::{Code, Error};
pub use event::Event;
pub use executable::{CompiledMemoryStats, Executable, ExecuteOptions, LoadedExecutable, OptimizedProgram, Shape};
pub use exit::exit_at_once;
pub use ffi::{Array, Attribute, Attributes, CallFrame, FfiElement, FfiError, FromAttribute, Handler};
pub use ffi_pool::ThreadPool;
pub use key_value::{KeyValueError, KeyValueStore};
pub use mapped::MappedBytes;
pub use memory_store::MemoryStore;
pub use options::{CompileOptions, OptionOverride};
pub use plugin::{API_VERSION, Plugin, set_cpu_threads};
pub use topology::{Topology, on_tpu_vm, set_tpu_compile_environment};
pub use value::Value;
