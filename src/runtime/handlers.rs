//! The kernels as XLA's custom calls: each handler reads a frame, and the crate `kernels` computes.

mod attention;
mod experts;
mod gate;
mod linear;
mod matmul;
mod norm;
mod profile;
mod sample;

pub use profile::{KernelCall, kernel_calls};

use kernels::Pool;
use xla::graph::{MATMUL, Platform};
use xla::pjrt::{CallFrame, Client, Error, FfiError, Handler, Plugin, ThreadPool};

use crate::generation::sampling::ARGMAX;
use crate::model::{
    ATTEND, ATTEND_GRADIENT, ATTENTION_STEP, EXPERTS, GATE, GATE_GRADIENT, GATED, LINEAR, RMS_NORM, TAKE_ROWS,
};

/// Those of inference.
const ALL: &[&str] = &[LINEAR, GATED, EXPERTS, TAKE_ROWS, RMS_NORM, ATTEND, ATTENTION_STEP, ARGMAX];

/// Those of a training step: each has a derivative of kernels too. The others' would compute their results once more.
const TRAINING: &[&str] = &[MATMUL, ATTEND, ATTEND_GRADIENT, GATE, GATE_GRADIENT];

/// The kernels of a training step of a model that has these.
pub(super) fn of_training(kernels: &[&str]) -> &'static [&'static str] {
    if kernels.is_empty() { &[] } else { TRAINING }
}

/// Makes the kernels known to a CPU plugin and gives the names of those of inference: none where the plugin does not take handlers.
pub fn register(plugin: &Plugin) -> &'static [&'static str] {
    fn host<H: Handler>(plugin: &Plugin) -> Result<(), Error> {
        plugin.register_handler::<profile::Noted<H>>("Host")
    }
    let handlers = [
        host::<linear::Linear>,
        host::<linear::Gated>,
        host::<experts::Experts>,
        host::<linear::TakeRows>,
        host::<gate::Gate>,
        host::<gate::GateGradient>,
        host::<matmul::Matmul>,
        host::<norm::RmsNorm>,
        host::<attention::Attend>,
        host::<attention::AttendGradient>,
        host::<attention::AttentionStep>,
        host::<sample::Argmax>,
    ];
    match handlers.iter().try_for_each(|register| register(plugin)) {
        Ok(()) => ALL,
        Err(error) => {
            tracing::info!("no kernels: {error}");
            &[]
        }
    }
}

/// The kernels of a client's devices, made known to its plugin: none where they are not `wanted`, or it is no CPU.
pub(super) fn of_client(plugin: &Plugin, client: &Client, wanted: bool) -> &'static [&'static str] {
    if wanted && Platform::named(client.platform_name()) == Platform::Cpu { register(plugin) } else { &[] }
}

/// XLA's threads as kernels use them.
struct XlaPool<'a> {
    pool: ThreadPool<'a>,
    threads: usize,
}

impl<'a> XlaPool<'a> {
    fn new(frame: &CallFrame<'a>) -> XlaPool<'a> {
        let pool = frame.thread_pool();
        XlaPool { pool, threads: pool.num_threads().unwrap_or(1).max(1) }
    }
}

impl Pool for XlaPool<'_> {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        // The caller of the handler turns a panic into an error of the execution.
        self.pool.for_each(chunks, f).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// Number `axis` of an array's sizes.
fn size(dims: &[i64], axis: usize, what: &str) -> Result<usize, FfiError> {
    let size = dims.get(axis).and_then(|&n| usize::try_from(n).ok());
    size.ok_or_else(|| FfiError::invalid(format!("{what}: an axis {axis} required, found {dims:?}")))
}
