//! Programs of several processes: a TPU pod, GPUs in several machines. Every process runs the same command and is told
//! which one it is; PJRT joins their devices into one mesh.
//!
//! - [`Process`]: this one's index and how many there are, from flags or from what started them.
//! - [`EtcdStore`]: what the processes tell each other, on an etcd server. A GPU plugin needs it; TPUs know each other.
//! - [`client()`]: a client that knows the devices of all processes.
//! - [`gather()`]: one value from each process, and with it a barrier.
//!
//! Each process uploads only what its own devices hold ([`xla::pjrt::Device::is_addressable`]), and process 0 alone
//! ([`Process::is_leader`]) prints.

mod client;
mod environment;
mod error;
mod etcd;
mod etcd_store;
mod gather;
mod lease;
mod poll;
mod process;
mod rendezvous;

pub use client::client;
pub use environment::{Environment, job_id};
pub use error::Error;
pub use etcd_store::{EtcdStore, JoinOptions};
pub use gather::gather;
pub use process::Process;
