//! Operations that the host program may bring a kernel for. Their StableHLO form is their definition: it stands in the graph
//! where there is no kernel, and tests hold the kernel to it.

use std::panic::Location;
use std::rc::Rc;

use super::aval::Aval;
use super::graph::Graph;
use super::ops::custom_call::{Attr, CustomCall};
use super::tensor::Tensor;

/// A call of a kernel: the name that its handler is registered under, and what the handler reads beside its operands.
#[derive(Clone, Debug)]
pub struct Kernel {
    name: &'static str,
    attrs: Vec<(String, Attr)>,
    aliases: Vec<(usize, usize)>,
    gradient: Option<&'static str>,
}

impl Kernel {
    /// A call of `name` without attributes.
    pub fn new(name: &'static str) -> Kernel {
        Kernel { name, attrs: Vec::new(), aliases: Vec::new(), gradient: None }
    }

    /// Adds an attribute.
    pub fn attr(mut self, name: &str, value: Attr) -> Kernel {
        self.attrs.push((name.to_string(), value));
        self
    }

    /// With exactly these attributes.
    pub(crate) fn with_attrs(self, attrs: Vec<(String, Attr)>) -> Kernel {
        Kernel { attrs, ..self }
    }

    /// Lets `result` take over the buffer of `operand`, so the handler updates it in place.
    pub fn alias(mut self, result: usize, operand: usize) -> Kernel {
        self.aliases.push((result, operand));
        self
    }

    /// Names the kernel of the derivative. It is given the operands, then the cotangents of the results, and the same attributes; its
    /// results are the cotangents of the float operands in f32. Where it is not known, the derivative is that of the definition.
    pub fn gradient(mut self, name: &'static str) -> Kernel {
        self.gradient = Some(name);
        self
    }
}

impl Graph {
    /// What `definition` computes of `inputs`: by the kernel where the plugin knows it, else by the definition, in line.
    /// The definition sees only its arguments.
    #[track_caller]
    pub fn kernel(
        &self,
        kernel: Kernel,
        inputs: &[&Tensor],
        definition: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Vec<Tensor> {
        if !self.has_kernel(kernel.name) {
            return definition(&inputs.iter().map(|&input| input.clone()).collect::<Vec<_>>());
        }
        let location = Location::caller();
        // Traced for the types of its results, for its errors, and for the derivative.
        let body = self.trace(location, kernel.name, inputs, None, definition);
        let results: Vec<Aval> = body.results.iter().map(|&id| body.aval(id).clone()).collect();
        let Kernel { name, attrs, aliases, gradient } = kernel;
        let call =
            CustomCall { attrs, aliases, gradient, definition: Some(Rc::new(body)), ..CustomCall::new(name, results) };
        self.record(location, Rc::new(call), inputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::F32;
    use crate::graph::testing::error;

    fn double(g: &Graph, x: &Tensor) -> Tensor {
        let kernel = Kernel::new("test.double").attr("by", Attr::I64(2));
        g.kernel(kernel, &[x], |args| vec![&args[0] * 2.0]).remove(0)
    }

    fn text(kernels: &[&'static str]) -> String {
        let g = Graph::new("main");
        g.set_kernels(kernels);
        let x = g.arg("x", F32, &[3]);
        g.output("y", &double(&g, &x));
        g.finish().unwrap().stablehlo()
    }

    #[test]
    fn a_kernel_where_it_is_known_else_its_definition() {
        assert!(text(&[]).contains("stablehlo.multiply"));
        let text = text(&["test.other", "test.double"]);
        assert!(text.contains("stablehlo.custom_call @test.double") || text.contains("@\"test.double\""), "{text}");
        assert!(text.contains("\"by\" = 2 : i64") && !text.contains("stablehlo.multiply"), "{text}");
    }

    #[test]
    fn a_definition_is_checked_where_a_kernel_stands_too() {
        let message = error(|g| {
            g.set_kernels(&["test.add"]);
            let (x, y) = (g.arg("x", F32, &[3]), g.arg("y", F32, &[4]));
            g.kernel(Kernel::new("test.add"), &[&x, &y], |args| vec![&args[0] + &args[1]])
        });
        assert!(message.contains("add"), "{message}");
        let message = error(|g| {
            g.set_kernels(&["test.add"]);
            let (x, y) = (g.arg("x", F32, &[3]), g.arg("y", F32, &[3]));
            g.kernel(Kernel::new("test.add"), &[&x], |args| vec![&args[0] + &y])
        });
        assert!(message.contains("from outside"), "{message}");
    }
}
