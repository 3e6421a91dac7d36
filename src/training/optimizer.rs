//! Optimizers: how a parameter moves against its gradient, and what is remembered of earlier ones.

use serde::{Deserialize, Serialize};
use xla::DType::{F32, I32};
use xla::graph::{Aval, Tensor};

/// An optimizer with its numbers; as JSON `{"name": "adamw", "weight_decay": 0.1}`, where what is left out is the default.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Optimizer {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Gradient descent, with momentum or without.
    Sgd(Sgd),
    /// Signs of a momentum.
    Lion(Lion),
}

/// Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim.AdamW`. State: m and v, the
/// running means of gradients and of their squares.
///
/// t = step + 1, m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g²,
/// w ← w − η λ w − η m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamW {
    /// β₁, from 0 to below 1; 0.9 by default.
    pub beta1: f64,
    /// β₂, from 0 to below 1; 0.999 by default.
    pub beta2: f64,
    /// ε, above 0; 1e-8 by default.
    pub epsilon: f64,
    /// λ, at least 0; 0.01 by default.
    pub weight_decay: f64,
}

/// Gradient descent with momentum (Sutskever et al. 2013), as `torch.optim.SGD` without dampening. State: m, the momentum;
/// none where μ is 0.
///
/// g ← g + λ w, m ← μ m + g, w ← w − η m, or with Nesterov's w ← w − η (g + μ m)
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sgd {
    /// μ, from 0 to below 1; 0 by default.
    pub momentum: f64,
    /// Whether the momentum is that of the place it leads to; false by default.
    pub nesterov: bool,
    /// λ, at least 0, a part of the gradient; 0 by default.
    pub weight_decay: f64,
}

/// Evolved sign momentum (Chen et al. 2023, algorithm 2). State: m, the momentum. Its rate is 3 to 10 times smaller than
/// AdamW's, its weight decay as many times larger.
///
/// c = β₁ m + (1 − β₁) g, w ← w − η (sign c + λ w), m ← β₂ m + (1 − β₂) g
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lion {
    /// β₁, from 0 to below 1; 0.9 by default.
    pub beta1: f64,
    /// β₂, from 0 to below 1; 0.99 by default.
    pub beta2: f64,
    /// λ, at least 0; 0 by default.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
    }
}

impl Default for Lion {
    fn default() -> Self {
        Lion { beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

impl Optimizer {
    /// Its name in messages and scopes.
    fn name(&self) -> &'static str {
        match self {
            Optimizer::AdamW(_) => "adamw",
            Optimizer::Sgd(_) => "sgd",
            Optimizer::Lion(_) => "lion",
        }
    }

    /// The names of the arrays that it keeps of each parameter.
    fn arrays(&self) -> &'static [&'static str] {
        match self {
            Optimizer::AdamW(_) => &["m", "v"],
            Optimizer::Sgd(sgd) if sgd.momentum == 0.0 => &[],
            Optimizer::Sgd(_) | Optimizer::Lion(_) => &["m"],
        }
    }

    /// The arrays that it keeps of a parameter of this shape: names and types, in the order of [`Optimizer::update`]. Each
    /// is f32 and of the parameter's shape, so it can lie on a mesh as the parameter does, and is zero before the first step.
    pub fn state(&self, shape: &[usize]) -> Vec<(&'static str, Aval)> {
        self.arrays().iter().map(|&name| (name, Aval::new(F32, shape))).collect()
    }

    /// One step of one parameter: the new parameter and the new state.
    ///
    /// `parameter` is f32, the master weight; `gradient` has its shape and any float type; `state` is what
    /// [`Optimizer::state`] declares; `rate` is the learning rate η, an f32 scalar; `step` is the number of steps before this
    /// one, an i32 scalar that all parameters share (the caller adds 1 after each); `decay` says whether this parameter's
    /// weights decay (norms and biases usually do not). All is computed in f32.
    ///
    /// Errors, from `Graph::finish`: arguments of other shapes or types, a number of the optimizer outside its range.
    #[track_caller]
    pub fn update(
        &self,
        parameter: &Tensor,
        gradient: &Tensor,
        state: &[Tensor],
        rate: &Tensor,
        step: &Tensor,
        decay: bool,
    ) -> (Tensor, Vec<Tensor>) {
        let g = parameter.graph();
        let _scope = g.scope(self.name());
        let checked =
            self.check_numbers().and_then(|()| self.check_arguments(parameter, gradient, state, [rate, step]));
        if let Err(message) = checked {
            g.reject(&message);
            return (parameter.clone(), state.to_vec());
        }
        let gradient = gradient.cast(F32);
        match self {
            Optimizer::AdamW(adamw) => adamw.update(parameter, &gradient, state, rate, step, decay),
            Optimizer::Sgd(sgd) => sgd.update(parameter, gradient, state, rate, decay),
            Optimizer::Lion(lion) => lion.update(parameter, &gradient, &state[0], rate, decay),
        }
    }

    fn check_numbers(&self) -> Result<(), String> {
        let below_one = |name, x: f64| ((0.0..1.0).contains(&x), name, x, "at least 0 and below 1");
        let not_negative = |x: f64| (x >= 0.0 && x.is_finite(), "weight_decay", x, "at least 0");
        let numbers = match self {
            Optimizer::AdamW(AdamW { beta1, beta2, epsilon, weight_decay }) => vec![
                below_one("beta1", *beta1),
                below_one("beta2", *beta2),
                (*epsilon > 0.0 && epsilon.is_finite(), "epsilon", *epsilon, "above 0"),
                not_negative(*weight_decay),
            ],
            Optimizer::Sgd(Sgd { momentum, nesterov, weight_decay }) => vec![
                below_one("momentum", *momentum),
                (!nesterov || *momentum > 0.0, "momentum", *momentum, "above 0 with nesterov"),
                not_negative(*weight_decay),
            ],
            Optimizer::Lion(Lion { beta1, beta2, weight_decay }) => {
                vec![below_one("beta1", *beta1), below_one("beta2", *beta2), not_negative(*weight_decay)]
            }
        };
        match numbers.into_iter().find(|(holds, ..)| !holds) {
            Some((_, name, found, wanted)) => Err(format!("{}: {name} must be {wanted}, found {found}", self.name())),
            None => Ok(()),
        }
    }

    fn check_arguments(
        &self,
        parameter: &Tensor,
        gradient: &Tensor,
        state: &[Tensor],
        [rate, step]: [&Tensor; 2],
    ) -> Result<(), String> {
        let name = self.name();
        if parameter.dtype() != F32 {
            return Err(format!("{name}: the parameter must be f32, found {}: keep a master weight", parameter.aval()));
        }
        if gradient.shape() != parameter.shape() || !gradient.dtype().is_float() {
            let (wanted, found) = (parameter.shape(), gradient.aval());
            return Err(format!(
                "{name}: the gradient must be of floats in the parameter's shape {wanted:?}, found {found}"
            ));
        }
        let wanted = self.arrays();
        if state.len() != wanted.len() {
            return Err(format!(
                "{name}: the state must be the {} arrays {wanted:?}, found {}",
                wanted.len(),
                state.len()
            ));
        }
        if let Some((array, found)) = wanted.iter().zip(state).find(|(_, array)| array.aval() != parameter.aval()) {
            return Err(format!(
                "{name}: state {array} must be {} as the parameter, found {}",
                parameter.aval(),
                found.aval()
            ));
        }
        for (what, found, dtype) in [("rate", rate, F32), ("step", step, I32)] {
            let wanted = Aval::new(dtype, &[]);
            if *found.aval() != wanted {
                return Err(format!("{name}: the {what} must be the scalar {wanted}, found {}", found.aval()));
            }
        }
        Ok(())
    }
}

impl AdamW {
    #[track_caller]
    fn update(
        &self,
        w: &Tensor,
        g: &Tensor,
        state: &[Tensor],
        rate: &Tensor,
        step: &Tensor,
        decay: bool,
    ) -> (Tensor, Vec<Tensor>) {
        let (m, v) = (toward(&state[0], g, self.beta1), &state[1] * self.beta2 + g.square() * (1.0 - self.beta2));
        let t = (step + 1).cast(F32);
        let size = rate / one_minus_power(self.beta1, &t);
        let scale = one_minus_power(self.beta2, &t).sqrt();
        let root = v.sqrt() / scale.broadcast_to(w.shape()) + self.epsilon;
        let w = decayed(w, rate, self.weight_decay, decay) - &m / root * size.broadcast_to(w.shape());
        (w, vec![m, v])
    }
}

impl Sgd {
    #[track_caller]
    fn update(&self, w: &Tensor, g: Tensor, state: &[Tensor], rate: &Tensor, decay: bool) -> (Tensor, Vec<Tensor>) {
        let g = if decay && self.weight_decay != 0.0 { g + w * self.weight_decay } else { g };
        let m: Vec<Tensor> = state.iter().map(|m| m * self.momentum + &g).collect();
        let direction = match &m[..] {
            [] => g,
            [m, ..] if self.nesterov => g + m * self.momentum,
            [m, ..] => m.clone(),
        };
        (w - direction * rate.broadcast_to(w.shape()), m)
    }
}

impl Lion {
    #[track_caller]
    fn update(&self, w: &Tensor, g: &Tensor, m: &Tensor, rate: &Tensor, decay: bool) -> (Tensor, Vec<Tensor>) {
        let direction = (m * self.beta1 + g * (1.0 - self.beta1)).sign();
        let w = decayed(w, rate, self.weight_decay, decay) - direction * rate.broadcast_to(w.shape());
        (w, vec![toward(m, g, self.beta2)])
    }
}

/// β m + (1 − β) g.
#[track_caller]
fn toward(m: &Tensor, g: &Tensor, beta: f64) -> Tensor {
    m + (g - m) * (1.0 - beta)
}

/// 1 − βᵗ, t at least 1. As −expm1(t ln β): in f32, 1 − 0.999 is wrong from the fifth digit on.
#[track_caller]
fn one_minus_power(beta: f64, t: &Tensor) -> Tensor {
    if beta == 0.0 { t.graph().scalar(1.0, F32) } else { -(t * beta.ln()).expm1() }
}

/// w − η λ w, where weights decay.
#[track_caller]
fn decayed(w: &Tensor, rate: &Tensor, weight_decay: f64, decay: bool) -> Tensor {
    if !decay || weight_decay == 0.0 {
        return w.clone();
    }
    w * (1.0 - rate * weight_decay).broadcast_to(w.shape())
}

/// The gradients scaled so that their common norm √(Σ g²) is at most `max` (Pascanu et al. 2013, algorithm 1), by the factor
/// min(1, max / (norm + 1e-6)) as `torch.nn.utils.clip_grad_norm_` has it; and the norm before, an f32 scalar.
///
/// The gradients are floats of any shapes, at least one of them (it panics on none); those returned are f32. `max` is above
/// 0; with `f64::INFINITY` only the norm is of use. Gradients whose norm is not finite are of no use either.
///
/// Errors, from `Graph::finish`: a gradient that is not of floats, a `max` that is not above 0.
#[track_caller]
pub fn clip_by_global_norm(gradients: &[Tensor], max: f64) -> (Vec<Tensor>, Tensor) {
    let g = gradients.first().expect("at least one gradient").graph();
    let _scope = g.scope("clip");
    if max.is_nan() || max <= 0.0 {
        g.reject(&format!("clip_by_global_norm: the largest norm must be above 0, found {max}"));
    }
    if let Some(found) = gradients.iter().find(|gradient| !gradient.dtype().is_float()) {
        g.reject(&format!("clip_by_global_norm: a gradient must be of floats, found {}", found.aval()));
    }
    let gradients: Vec<Tensor> = gradients.iter().map(|gradient| gradient.cast(F32)).collect();
    let mut total = g.scalar(0.0, F32);
    for gradient in &gradients {
        let axes: Vec<isize> = (0..gradient.rank() as isize).collect();
        total = total + gradient.square().sum(&axes);
    }
    let norm = total.sqrt();
    let factor = (max / (&norm + 1e-6)).minimum(1.0);
    let scaled = gradients.iter().map(|gradient| gradient * factor.broadcast_to(gradient.shape()));
    (scaled.collect(), norm)
}

#[cfg(test)]
mod tests {
    use xla::DType::{self, BF16, F32, I32};
    use xla::graph::Graph;

    use super::*;

    /// What is wrong with an update of these types; `rest` are gradient, state, rate and step.
    fn problem(optimizer: Optimizer, parameter: (DType, &[usize]), rest: &[(DType, &[usize])]) -> String {
        let g = Graph::new("wrong");
        let w = g.arg("w", parameter.0, parameter.1);
        let rest: Vec<Tensor> =
            rest.iter().enumerate().map(|(i, (dtype, shape))| g.arg(&format!("{i}"), *dtype, shape)).collect();
        let [gradient, state @ .., rate, step] = &rest[..] else { panic!("too few") };
        let line = line!() + 1;
        let (new, _) = optimizer.update(&w, gradient, state, rate, step, true);
        g.output("w", &new);
        match g.finish() {
            Ok(_) => String::new(),
            Err(error) => {
                assert_eq!((error.location.file(), error.location.line()), (file!(), line), "{error}");
                error.message
            }
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        const MATRIX: (DType, &[usize]) = (F32, &[2, 3]);
        const TURNED: (DType, &[usize]) = (F32, &[3, 2]);
        const NONE: &[usize] = &[];
        let adamw = Optimizer::AdamW(AdamW::default());
        let (lion, sgd) = (Optimizer::Lion(Lion::default()), Optimizer::Sgd(Sgd::default()));
        let (rate, step) = ((F32, NONE), (I32, NONE));

        assert_eq!(problem(adamw, MATRIX, &[MATRIX, MATRIX, MATRIX, rate, step]), "");
        assert_eq!(problem(adamw, MATRIX, &[(BF16, &[2, 3]), MATRIX, MATRIX, rate, step]), "");
        assert_eq!(problem(sgd, rate, &[rate, rate, step]), "");
        assert_eq!(
            problem(adamw, (BF16, &[2, 3]), &[MATRIX, MATRIX, MATRIX, rate, step]),
            "adamw: the parameter must be f32, found bf16[2,3]: keep a master weight"
        );
        assert_eq!(
            problem(adamw, MATRIX, &[TURNED, MATRIX, MATRIX, rate, step]),
            "adamw: the gradient must be of floats in the parameter's shape [2, 3], found f32[3,2]"
        );
        assert_eq!(
            problem(lion, MATRIX, &[(I32, &[2, 3]), MATRIX, rate, step]),
            "lion: the gradient must be of floats in the parameter's shape [2, 3], found i32[2,3]"
        );
        assert_eq!(
            problem(adamw, MATRIX, &[MATRIX, MATRIX, rate, step]),
            "adamw: the state must be the 2 arrays [\"m\", \"v\"], found 1"
        );
        assert_eq!(
            problem(adamw, MATRIX, &[MATRIX, MATRIX, TURNED, rate, step]),
            "adamw: state v must be f32[2,3] as the parameter, found f32[3,2]"
        );
        assert_eq!(
            problem(lion, MATRIX, &[MATRIX, MATRIX, (F32, &[3]), step]),
            "lion: the rate must be the scalar f32[], found f32[3]"
        );
        assert_eq!(problem(sgd, MATRIX, &[MATRIX, rate, rate]), "sgd: the step must be the scalar i32[], found f32[]");
    }

    #[test]
    fn numbers_outside_their_range_are_named() {
        let of = |optimizer: Optimizer| {
            let state = vec![(F32, &[][..]); optimizer.arrays().len()];
            let all = [&[(F32, &[][..])], &state[..], &[(F32, &[]), (I32, &[])]].concat();
            problem(optimizer, (F32, &[]), &all)
        };
        let adamw = AdamW::default();
        assert_eq!(
            of(Optimizer::AdamW(AdamW { beta2: 1.0, ..adamw })),
            "adamw: beta2 must be at least 0 and below 1, found 1"
        );
        assert_eq!(of(Optimizer::AdamW(AdamW { epsilon: 0.0, ..adamw })), "adamw: epsilon must be above 0, found 0");
        assert_eq!(
            of(Optimizer::Lion(Lion { weight_decay: f64::NAN, ..Lion::default() })),
            "lion: weight_decay must be at least 0, found NaN"
        );
        assert_eq!(
            of(Optimizer::Sgd(Sgd { nesterov: true, ..Sgd::default() })),
            "sgd: momentum must be above 0 with nesterov, found 0"
        );
        assert_eq!(of(Optimizer::AdamW(AdamW { beta1: 0.0, beta2: 0.0, ..adamw })), "");
    }

    #[test]
    fn a_clip_needs_a_norm_and_floats() {
        let problem = |dtype, max| {
            let g = Graph::new("wrong");
            let (gradients, norm) = clip_by_global_norm(&[g.arg("g", dtype, &[2])], max);
            g.output("g", &gradients[0]);
            g.output("norm", &norm);
            g.finish().map_or_else(|e| e.message, |_| String::new())
        };
        assert_eq!(problem(F32, f64::INFINITY), "");
        assert_eq!(problem(F32, 0.0), "clip_by_global_norm: the largest norm must be above 0, found 0");
        assert_eq!(problem(F32, f64::NAN), "clip_by_global_norm: the largest norm must be above 0, found NaN");
        assert_eq!(problem(I32, 1.0), "clip_by_global_norm: a gradient must be of floats, found i32[2]");
    }

    #[test]
    fn as_json() {
        let read = |text: &str| serde_json::from_str::<Optimizer>(text).map_err(|e| e.to_string());
        let wanted = Optimizer::AdamW(AdamW { weight_decay: 0.1, ..AdamW::default() });
        assert_eq!(read(r#"{"name": "adamw", "weight_decay": 0.1}"#), Ok(wanted));
        assert_eq!(read(&serde_json::to_string(&wanted).unwrap()), Ok(wanted));
        assert!(read(r#"{"name": "lion", "epsilon": 1}"#).unwrap_err().contains("unknown field `epsilon`"));
    }
}
