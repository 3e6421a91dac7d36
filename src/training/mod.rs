//! What makes a model learn, as graphs: the loss, gradients, and the step of an optimizer. It knows no files and no devices.

mod loss;
mod step;

pub use loss::{IGNORED, Loss, LossOptions, Targets};
pub use step::{GradientSpec, build_gradients};
