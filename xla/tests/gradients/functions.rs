//! What gradients keep and compute once more, what they leave alone, and what they refuse.

use xla::DType::{BF16, F32, F64, I32};
use xla::graph::{Graph, Module, Save, Tensor, einsum, ops::Op};

use super::rows::WITHOUT;
use super::{Array, Program, distance, noise};

/// Three layers of one function, whose halves keep what `save` says; the gradients of the input and the weight.
fn layers(save: Option<Save>) -> Module {
    let g = Graph::new("layers");
    let (x, w) = (g.arg("x", F64, &[4, 8]), g.arg("w", F64, &[8, 8]));
    let layer = |a: &[Tensor]| {
        let h = einsum("AB,BC->AC", &a[0], &a[1]).named("product");
        vec![h.tanh().named("tanh") * &h + &a[0]]
    };
    let mut h = x.clone();
    for _ in 0..3 {
        h = match &save {
            Some(save) => g.checkpoint("layer", save.clone(), &[&h, &w], layer).remove(0),
            None => layer(&[h, w.clone()]).remove(0),
        };
    }
    let gradients = g.grad(&h.square().sum(&[0, 1]), &[&x, &w]);
    g.output("dx", &gradients[0]);
    g.output("dw", &gradients[1]);
    g.finish().unwrap()
}

/// Names of the ops of the function that does the backward half.
fn backward(module: &Module) -> Vec<&'static str> {
    let function = module.functions().iter().find(|f| f.name.ends_with("backward")).expect("a backward half");
    function.body.nodes.iter().map(|node| node.op.info().name).collect()
}

#[test]
fn what_is_saved_changes_no_number_and_is_not_computed_again() {
    let inputs = [(1u64, [4usize, 8]), (2, [8, 8])].map(|(seed, shape)| Array {
        shape: shape.to_vec(),
        values: noise(seed, shape[0] * shape[1]).iter().map(|x| x - 0.5).collect(),
    });
    let wanted = Program::new(&layers(None)).run(&inputs);
    let count = |module: &Module, name: &str| backward(module).iter().filter(|op| **op == name).count();
    for (save, dots, tanhs, barriers) in [
        (Save::Everything, 2, 0, 0),
        (Save::Dots, 2, 1, 1),
        (Save::Named(vec!["product".into(), "tanh".into()]), 2, 0, 0),
        (Save::Named(vec!["tanh".into()]), 3, 0, 1),
        (Save::Nothing, 3, 1, 1),
    ] {
        let module = layers(Some(save.clone()));
        let found = [count(&module, "dot_general"), count(&module, "tanh"), count(&module, "optimization_barrier")];
        assert_eq!(found, [dots, tanhs, barriers], "{save:?}: {:?}", backward(&module));
        // Three layers, one function: its two halves are all that is left of it.
        assert_eq!(module.functions().len(), 2, "{save:?}");
        for (found, wanted) in Program::new(&module).run(&inputs).iter().zip(&wanted) {
            let off = distance(found, wanted);
            assert!(off < 1e-14, "{save:?}: {off:.1e}");
        }
    }
}

#[test]
fn a_loop_over_layers_gives_the_gradients_of_layers_in_line() {
    let looped = |save: Save| {
        let g = Graph::new("looped");
        let (x, w) = (g.arg("x", F64, &[4, 8]), g.arg("w", F64, &[3, 8, 8]));
        let (carry, _) = g.scan_saving("layers", 3, (&[], &[&x], &[&w]), &save, |_, h, w| {
            let p = einsum("AB,BC->AC", &h[0], &w[0]);
            (vec![p.tanh() * &p + &h[0]], vec![])
        });
        let gradients = g.grad(&carry[0].square().sum(&[0, 1]), &[&x, &w]);
        g.output("dx", &gradients[0]);
        g.output("dw", &gradients[1].sum(&[0]));
        g.finish().unwrap()
    };
    let x = Array { shape: vec![4, 8], values: noise(1, 32).iter().map(|x| x - 0.5).collect() };
    let w = Array { shape: vec![8, 8], values: noise(2, 64).iter().map(|x| x - 0.5).collect() };
    let stacked = Array { shape: vec![3, 8, 8], values: [&w.values[..]; 3].concat() };
    let wanted = Program::new(&layers(None)).run(&[x.clone(), w]);
    for save in [Save::Everything, Save::Dots, Save::Nothing] {
        let found = Program::new(&looped(save.clone())).run(&[x.clone(), stacked.clone()]);
        for (found, wanted) in found.iter().zip(&wanted) {
            let off = distance(found, wanted);
            assert!(off < 1e-14, "{save:?}: {off:.1e}");
        }
    }
}

#[test]
fn unused_inputs_give_zeros_and_frozen_ones_cost_nothing() {
    let g = Graph::new("test");
    let (x, w, unused) = (g.arg("x", F32, &[2, 3]), g.arg("w", F32, &[3, 3]), g.arg("u", F32, &[5]));
    let y = g.call("layer", &[&x, &w], |a| vec![einsum("AB,BC->AC", &a[0], &a[1]).tanh()]).remove(0);
    let gradients = g.grad(&y.sum(&[0, 1]), &[&x, &unused]);
    g.output("dx", &gradients[0]);
    g.output("du", &gradients[1]);
    let module = g.finish().unwrap();
    assert_eq!(backward(&module).iter().filter(|op| **op == "dot_general").count(), 1, "w is frozen");
    let text = module.stablehlo();
    assert!(text.contains("dense<0.0> : tensor<5xf32>"), "{text}");
}

#[test]
fn gradients_of_gradients() {
    let g = Graph::new("test");
    let x = g.arg("x", F64, &[3]);
    let y = g.call("cube", &[&x], |a| vec![&a[0] * &a[0] * &a[0]]).remove(0).sum(&[0]);
    let first = g.grad(&y, &[&x]).remove(0);
    let second = g.grad(&first.sum(&[0]), &[&x]).remove(0);
    g.output("second", &second);
    let found = Program::new(&g.finish().unwrap()).run(&[Array { shape: vec![3], values: vec![1.0, -2.0, 0.5] }]);
    assert_eq!(found[0], [6.0, -12.0, 3.0]);
}

#[test]
fn sums_of_bf16_are_kept_in_f32() {
    let g = Graph::new("test");
    let x = g.arg("x", BF16, &[8]);
    let y = (x.broadcast(&[1000, 8], &[1]) * 1.0).cast(F32).sum(&[0, 1]);
    g.output("dx", &g.grad(&y, &[&x])[0]);
    let text = g.finish().unwrap().stablehlo();
    let reduce = text.lines().rfind(|line| line.contains("reduce(")).unwrap();
    assert!(reduce.contains("tensor<1000x8xf32>"), "{reduce}");
}

#[test]
fn what_has_no_derivative_says_so() {
    for (op, wanted, build) in WITHOUT {
        let g = Graph::new("test");
        let x = g.arg("x", F64, &[2, 3]);
        let y = build(&g, &x);
        g.output("dx", &g.grad(&y.sum(&[0, 1]), &[&x])[0]);
        let message = g.finish().expect_err("no derivative").message;
        assert!(message.starts_with(&format!("gradient of {op}: ")) && message.contains(wanted), "{message}");
    }
}

#[test]
fn errors() {
    let error = |build: fn(&Graph, &Tensor) -> Tensor| {
        let g = Graph::new("test");
        let x = g.arg("x", F32, &[2]);
        g.output("y", &build(&g, &x));
        g.finish().expect_err("the graph is wrong").message
    };
    assert_eq!(
        error(|g, x| g.grad(x, &[x]).remove(0)),
        "grad: the loss must be a float scalar, found f32[2]: sum it, or use vjp"
    );
    assert_eq!(
        error(|g, x| g.vjp(&[(x, &g.scalar(1.0, F32))], &[x]).remove(0)),
        "vjp: the cotangent of f32[2] must be of that type, found f32[]"
    );
    assert_eq!(
        error(|g, x| g.grad(&x.sum(&[0]), &[&x.cast(I32)]).remove(0)),
        "vjp: i32[2] has no gradient, only floats have"
    );
    assert_eq!(
        error(|g, x| g.scan("s", 3, &[], &[x], &[x], |_, h, _| (h.to_vec(), vec![])).0.remove(0)),
        "scan: the first axis of f32[2] must be the 3 turns"
    );
    assert_eq!(
        error(|g, x| g.scan("s", 3, &[], &[x], &[], |_, h, _| (vec![h[0].sum(&[0])], vec![])).0.remove(0)),
        "scan: carried value 0 begins as f32[2], a turn gives f32[]"
    );
}

/// An op whose derivative has a wrong shape.
#[derive(Clone, Debug)]
struct Wrong;

impl Op for Wrong {
    fn info(&self) -> &'static xla::graph::ops::OpInfo {
        &xla::graph::ops::unary::Exp::INFO
    }

    fn infer(&self, inputs: &[&xla::graph::Aval]) -> Result<Vec<xla::graph::Aval>, String> {
        Ok(vec![inputs[0].clone()])
    }

    fn stablehlo(&self, _cx: &mut xla::graph::Cx<'_, '_>) -> String {
        unreachable!("the graph is never written")
    }

    fn vjp(&self, cx: &mut xla::graph::Vjp<'_, '_>) -> xla::graph::Cotangents {
        Ok(vec![Some(cx.ct().sum(&[0]))])
    }
}

#[test]
fn a_cotangent_of_a_wrong_shape_is_caught_at_its_op() {
    let g = Graph::new("test");
    let x = g.arg("x", F32, &[2]);
    let y = g.apply1(Wrong, &[&x]);
    let line = line!() - 1;
    g.output("dx", &g.grad(&y.sum(&[0]), &[&x])[0]);
    let error = g.finish().expect_err("the derivative is wrong");
    assert_eq!(error.message, "gradient of exponential: operand 0 is f32[2], its cotangent f32[]");
    assert_eq!((error.location.file(), error.location.line()), (file!(), line));
}
