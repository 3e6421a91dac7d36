//! Functions that bring their own derivative.

use std::panic::Location;
use std::rc::Rc;

use super::control::Call;
use super::{Op, OpInfo, op_info};
use crate::graph::aval::Aval;
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Save, Vjp};
use crate::graph::graph::Graph;
use crate::graph::module::{Body, Function};
use crate::graph::tensor::Tensor;

/// A call of a function whose derivative is given, not found. Added with [`Graph::custom_vjp`].
#[derive(Clone, Debug)]
pub struct CustomVjp {
    /// The call where no gradient is asked for.
    call: Call,
    /// The same function, with what the derivative reads as further results.
    forward: Rc<Function>,
    /// From these further results and the cotangents of the own ones to the cotangents of the arguments in `reached`.
    backward: Rc<Function>,
    /// The arguments that get a cotangent.
    reached: Vec<usize>,
}

op_info!(CustomVjp, 0.., "custom_vjp", "a call of a function that brings its derivative");

/// A call without anything of its own to keep.
fn call(function: &Rc<Function>) -> Call {
    Call { function: function.clone(), save: Save::Everything }
}

impl Op for CustomVjp {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let found = self.backward.body.avals(&self.backward.body.results);
        for (&i, found) in self.reached.iter().zip(&found) {
            match inputs.get(i) {
                Some(&wanted) if wanted == found => {}
                Some(wanted) => return Err(format!("argument {i} is {wanted}, its cotangent {found}")),
                None => return Err(format!("a cotangent for argument {i} of {}", inputs.len())),
            }
        }
        self.call.infer(inputs)
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        self.call.stablehlo(cx)
    }

    fn result_count(&self, inputs: usize) -> usize {
        self.call.result_count(inputs)
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (own, all) = (&self.call.function.body.results, &self.forward.body.results);
        cx.amend(Rc::new(call(&self.forward)), &self.forward.body.avals(&all[own.len()..]));
        let kept = (own.len()..all.len()).map(|i| cx.output(i)).collect::<Vec<_>>();
        let cotangents = (0..own.len()).map(|i| cx.cotangent(i)).collect::<Vec<_>>();
        let found = cx.graph().apply(call(&self.backward), &kept.iter().chain(&cotangents).collect::<Vec<_>>());
        cx.placed(&self.reached, found)
    }

    fn regions(&self) -> Vec<&Body> {
        self.call.regions()
    }
}

impl Graph {
    /// What `forward` computes of the arguments, with the derivative that `backward` gives: for what the gradient of an op after
    /// the other would be inexact, or dear. `forward` gives the results and what `backward` reads of it; that is computed only where
    /// a gradient is asked for. `backward` gets what it reads, then a cotangent for each result, and gives one for each argument:
    /// `None` for one that no gradient flows to. Both are traced once and see only their arguments.
    ///
    /// ```
    /// use xla::DType::F32;
    /// use xla::graph::Graph;
    ///
    /// let g = Graph::new("step");
    /// let x = g.arg("x", F32, &[3]);
    /// // log(1 + eˣ), whose derivative is a logistic function, also where eˣ is infinite.
    /// let forward = |a: &[xla::graph::Tensor]| (vec![(a[0].exp() + 1.0).log()], vec![a[0].clone()]);
    /// let y = g.custom_vjp("softplus", &[&x], forward, |kept, ct| vec![Some(kept[0].logistic() * &ct[0])]).remove(0);
    /// g.output("gradient", &g.grad(&y.sum(&[0]), &[&x])[0]);
    /// assert!(g.finish()?.stablehlo().contains("stablehlo.logistic"));
    /// # Ok::<(), xla::graph::GraphError>(())
    /// ```
    ///
    /// Errors: a cotangent of another type or shape than its argument.
    #[track_caller]
    pub fn custom_vjp(
        &self,
        name: &str,
        args: &[&Tensor],
        forward: impl FnOnce(&[Tensor]) -> (Vec<Tensor>, Vec<Tensor>),
        backward: impl FnOnce(&[Tensor], &[Tensor]) -> Vec<Option<Tensor>>,
    ) -> Vec<Tensor> {
        let location = Location::caller();
        let mut own = 0;
        let whole = self.trace(location, name, args, Some(name), |args| {
            let (mut results, kept) = forward(args);
            own = results.len();
            results.extend(kept);
            results
        });
        let (results, kept) = whole.results.split_at(own);
        let read = kept.iter().chain(results).map(|&id| (None, whole.aval(id).clone())).collect::<Vec<_>>();
        let mut reached = Vec::new();
        let backward = self.trace_avals(location, name, &read, Some(&format!("gradient/{name}")), |read| {
            let (kept, cotangents) = read.split_at(kept.len());
            let found = backward(kept, cotangents);
            reached = (0..found.len()).filter(|&i| found[i].is_some()).collect();
            found.into_iter().flatten().collect()
        });
        let alone = Body { results: results.to_vec(), ..whole.clone() };
        let op = CustomVjp {
            call: call(&self.add_function(name, alone)),
            forward: self.add_function(&format!("{name}_forward"), whole),
            backward: self.add_function(&format!("{name}_backward"), backward),
            reached,
        };
        self.record(location, Rc::new(op), args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{BF16, F32};
    use crate::graph::testing::error;

    /// x², said to have the derivative 3.
    fn odd(x: &Tensor) -> Tensor {
        let forward = |a: &[Tensor]| (vec![a[0].square()], vec![a[0].exp()]);
        x.graph().custom_vjp("odd", &[x], forward, |_, ct| vec![Some(&ct[0] * 3.0)]).remove(0)
    }

    #[test]
    fn only_a_gradient_has_the_given_derivative_and_what_it_reads() {
        let text = |gradient: bool| {
            let g = Graph::new("main");
            let x = g.arg("x", F32, &[]);
            let y = odd(&x);
            let y = if gradient { g.grad(&y, &[&x]).remove(0) } else { y };
            g.output("y", &y);
            g.finish().unwrap().stablehlo()
        };
        let calls = |text: &str, name: &str| text.matches(&format!("call @{name}(")).count();
        let (plain, gradient) = (text(false), text(true));
        assert_eq!([calls(&plain, "odd"), calls(&plain, "odd_forward"), calls(&plain, "odd_backward")], [1, 0, 0]);
        assert_eq!(
            [calls(&gradient, "odd"), calls(&gradient, "odd_forward"), calls(&gradient, "odd_backward")],
            [0, 1, 1]
        );
        assert!(gradient.contains("3.0") && !plain.contains("3.0"), "{plain}{gradient}");
    }

    #[test]
    fn errors() {
        let wrong = |backward: fn(&[Tensor], &[Tensor]) -> Vec<Option<Tensor>>| {
            error(|g| {
                let x = g.arg("x", F32, &[2]);
                g.custom_vjp("f", &[&x], |a| (vec![a[0].square()], vec![]), backward)
            })
        };
        assert_eq!(
            wrong(|_, ct| vec![Some(ct[0].cast(BF16))]),
            "custom_vjp: argument 0 is f32[2], its cotangent bf16[2]"
        );
        assert_eq!(wrong(|_, ct| vec![None, Some(ct[0].clone())]), "custom_vjp: a cotangent for argument 1 of 1");
    }
}
