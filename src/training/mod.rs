//! Training as graphs: what moves the parameters, as functions of tensors that any program may contain, a function or a
//! [`Graph::scan`](xla::graph::Graph::scan) too. Nothing here knows a model, a device or a file.
//!
//! Master weights, gradients and state are f32; a forward in bf16 casts the weights (`w.cast(BF16)`), and its gradients come
//! back in the type of the weights. All but the norm is elementwise, so a state lies on a mesh as its parameter does.
//!
//! ```
//! use xla::DType::{F32, I32};
//! use xla::graph::Graph;
//! use xllama::training::{AdamW, Decay, Optimizer, Schedule, clip_by_global_norm};
//!
//! let optimizer = Optimizer::AdamW(AdamW::default());
//! let schedule = Schedule { peak: 3e-4, warmup: 100, decay: Decay::Cosine { steps: 1000, final_fraction: 0.1 } };
//!
//! let g = Graph::new("step");
//! let w = g.arg("w", F32, &[8, 3]);
//! let state: Vec<_> = optimizer.state(w.shape()).iter().map(|(name, a)| g.arg(name, a.dtype, &a.shape)).collect();
//! let step = g.arg("step", I32, &[]);
//! let x = g.arg("x", F32, &[8, 3]);
//!
//! let loss = (&w - x).square().sum(&[0, 1]);
//! let (gradients, norm) = clip_by_global_norm(&g.grad(&loss, &[&w]), 1.0);
//! let (new, new_state) = optimizer.update(&w, &gradients[0], &state, &schedule.rate(&step), &step, true);
//!
//! g.output_aliased("w", &new, &w);
//! new_state.iter().zip(&state).for_each(|(new, old)| g.output_aliased(&old.name().unwrap(), new, old));
//! g.output_aliased("step", &(&step + 1), &step);
//! g.output("norm", &norm);
//! let module = g.finish()?;
//! # Ok::<(), xla::graph::GraphError>(())
//! ```

mod optimizer;
mod schedule;

pub use optimizer::{AdamW, Lion, Optimizer, Sgd, clip_by_global_norm};
pub use schedule::{Decay, Schedule};
