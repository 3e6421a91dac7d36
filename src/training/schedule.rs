//! Learning rates as functions of the step.

use std::f64::consts::FRAC_PI_2;

use serde::{Deserialize, Serialize};
use xla::DType::{F32, I32};
use xla::graph::{Aval, Tensor};

/// A learning rate that rises linearly from 0 at step 0 to `peak` at step `warmup`, and then goes as `decay` says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The largest rate, at least 0.
    pub peak: f64,
    /// Steps until the rate is there; 0 begins with it.
    #[serde(default)]
    pub warmup: u32,
    /// What follows.
    pub decay: Decay,
}

/// How a rate goes down after the warm-up. `steps` counts all steps, those of the warm-up too; at step `steps` the rate is
/// `final_fraction` of the peak, exactly, and it stays there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Decay {
    /// It does not.
    Constant,
    /// In a straight line.
    Linear {
        /// The step of the final rate.
        steps: u32,
        /// The final rate as a part of the peak, at least 0.
        final_fraction: f64,
    },
    /// As half a wave of the cosine (Loshchilov and Hutter 2017, eq. 5).
    Cosine {
        /// The step of the final rate.
        steps: u32,
        /// The final rate as a part of the peak, at least 0.
        final_fraction: f64,
    },
    /// It stays at the peak and goes down over the last steps: warm-up, stable, decay (MiniCPM, Hu et al. 2024), here in a
    /// straight line.
    Wsd {
        /// The step of the final rate.
        steps: u32,
        /// How many of the steps, the last ones, go down.
        decay_steps: u32,
        /// The final rate as a part of the peak, at least 0.
        final_fraction: f64,
    },
}

impl Schedule {
    /// The rate of a step, an f32 scalar. `step`, an i32 scalar, is 0 for the first.
    ///
    /// Errors, from `Graph::finish`: a step of another type or shape, a warm-up and a decay that take more than all steps, a
    /// number outside its range.
    #[track_caller]
    pub fn rate(&self, step: &Tensor) -> Tensor {
        let g = step.graph();
        let _scope = g.scope("schedule");
        if let Err(message) = self.check(step.aval()) {
            g.reject(&message);
            return g.scalar(0.0, F32);
        }
        // Counts are whole numbers and a count over itself is 1, so that both ends are exact.
        let part = |count: Tensor, of: u32| count.clamp(0, i64::from(of)).cast(F32) / f64::from(of);
        let left = |steps: u32, length: u32| part(i64::from(steps) - step, length.max(1));
        let (high, final_fraction) = match self.decay {
            Decay::Constant => (None, 1.0),
            Decay::Linear { steps, final_fraction } => (Some(left(steps, steps - self.warmup)), final_fraction),
            // (1 + cos π p) / 2 = sin² (π / 2 (1 − p)), which is accurate down to the end.
            Decay::Cosine { steps, final_fraction } => {
                (Some((left(steps, steps - self.warmup) * FRAC_PI_2).sin().square()), final_fraction)
            }
            Decay::Wsd { steps, decay_steps, final_fraction } => (Some(left(steps, decay_steps)), final_fraction),
        };
        let rate = match high {
            Some(high) => &high * self.peak + (1.0 - &high) * (self.peak * final_fraction),
            None => g.scalar(self.peak, F32),
        };
        if self.warmup == 0 { rate } else { rate * part(step.clone(), self.warmup) }
    }

    fn check(&self, step: &Aval) -> Result<(), String> {
        let wanted = Aval::new(I32, &[]);
        if *step != wanted {
            return Err(format!("schedule: the step must be the scalar {wanted}, found {step}"));
        }
        let (steps, down, final_fraction) = match self.decay {
            Decay::Constant => (self.warmup, 0, 1.0),
            Decay::Linear { steps, final_fraction } | Decay::Cosine { steps, final_fraction } => {
                (steps, 0, final_fraction)
            }
            Decay::Wsd { steps, decay_steps, final_fraction } => (steps, decay_steps, final_fraction),
        };
        for (what, found) in [("peak", self.peak), ("final_fraction", final_fraction)] {
            if !(found >= 0.0 && found.is_finite()) {
                return Err(format!("schedule: {what} must be at least 0, found {found}"));
            }
        }
        if i32::try_from(steps).is_err() {
            return Err(format!("schedule: steps must be at most {}, found {steps}", i32::MAX));
        }
        if u64::from(self.warmup) + u64::from(down) > u64::from(steps) {
            let decay = if down == 0 { String::new() } else { format!(" and decay_steps {down}") };
            let warmup = self.warmup;
            return Err(format!("schedule: warmup {warmup}{decay} must fit into the {steps} steps"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use xla::graph::Graph;

    use super::*;

    fn problem(schedule: Schedule, step: Aval) -> String {
        let g = Graph::new("wrong");
        let step = g.arg("step", step.dtype, &step.shape);
        g.output("rate", &schedule.rate(&step));
        g.finish().map_or_else(|e| e.message, |_| String::new())
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let step = || Aval::new(I32, &[]);
        let cosine = Decay::Cosine { steps: 10, final_fraction: 0.1 };
        let fits = Schedule { peak: 1e-3, warmup: 10, decay: cosine };
        assert_eq!(problem(fits, step()), "");
        assert_eq!(problem(fits, Aval::new(F32, &[])), "schedule: the step must be the scalar i32[], found f32[]");
        assert_eq!(problem(fits, Aval::new(I32, &[1])), "schedule: the step must be the scalar i32[], found i32[1]");
        assert_eq!(problem(Schedule { warmup: 11, ..fits }, step()), "schedule: warmup 11 must fit into the 10 steps");
        let wsd = Decay::Wsd { steps: 10, decay_steps: 4, final_fraction: 0.0 };
        assert_eq!(
            problem(Schedule { warmup: 7, decay: wsd, ..fits }, step()),
            "schedule: warmup 7 and decay_steps 4 must fit into the 10 steps"
        );
        assert_eq!(
            problem(Schedule { peak: f64::INFINITY, ..fits }, step()),
            "schedule: peak must be at least 0, found inf"
        );
        let linear = Decay::Linear { steps: 10, final_fraction: -0.5 };
        assert_eq!(
            problem(Schedule { decay: linear, ..fits }, step()),
            "schedule: final_fraction must be at least 0, found -0.5"
        );
        let long = Decay::Linear { steps: u32::MAX, final_fraction: 0.0 };
        assert_eq!(
            problem(Schedule { decay: long, ..fits }, step()),
            "schedule: steps must be at most 2147483647, found 4294967295"
        );
    }

    #[test]
    fn as_json() {
        let text = r#"{"peak": 0.001, "decay": {"kind": "wsd", "steps": 9, "decay_steps": 2, "final_fraction": 0}}"#;
        let decay = Decay::Wsd { steps: 9, decay_steps: 2, final_fraction: 0.0 };
        let wanted = Schedule { peak: 0.001, warmup: 0, decay };
        let found: Schedule = serde_json::from_str(text).unwrap();
        assert_eq!(found, wanted);
        let text = serde_json::to_string(&wanted).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), wanted);
    }
}
