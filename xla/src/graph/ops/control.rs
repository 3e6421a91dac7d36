//! Functions, loops and branches: ops that hold bodies.

use std::panic::Location;
use std::rc::Rc;

use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::{Aval, join};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::grad::{Cut, Kept, Save};
use crate::graph::graph::Graph;
use crate::graph::module::{Body, Function};
use crate::graph::tensor::Tensor;

/// Types as a message lists them: `(f32[2], i32[])`.
fn shown<'a>(avals: impl IntoIterator<Item = &'a Aval>) -> String {
    format!("({})", join(&avals.into_iter().collect::<Vec<_>>(), ", "))
}

/// An error where `found` is not what `what` needs.
fn agree(what: &str, wanted: &[Aval], found: &[Aval]) -> Result<(), String> {
    if wanted == found { Ok(()) } else { Err(format!("{what} {}, found {}", shown(wanted), shown(found))) }
}

/// A call of a private function of the module.
#[derive(Clone, Debug)]
pub struct Call {
    /// The function.
    pub function: Rc<Function>,
    /// What its derivative keeps of it.
    pub save: Save,
}

op_info!(Call, 0.., "call", "a call of a function of the module");

impl Op for Call {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let body = &self.function.body;
        let found: Vec<Aval> = inputs.iter().map(|&aval| aval.clone()).collect();
        agree(&format!("{} takes", self.function.name), &body.avals(&body.args), &found)?;
        Ok(body.avals(&body.results))
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        format!("func.call @{}({}) : {}", self.function.name, cx.operands(), cx.signature())
    }

    fn result_count(&self, _inputs: usize) -> usize {
        self.function.body.results.len()
    }

    /// A call of the function's backward half, with what its forward half keeps.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let location = Location::caller();
        let wanted = cx.wanted();
        let given = cx.with_cotangents();
        let key = (Rc::as_ptr(&self.function), wanted.clone(), given.clone(), self.save.clone());
        let cut = cx.graph().cut_once(key, || {
            let (name, body) = (&self.function.name, &self.function.body);
            let halves = cx.graph().halves(location, name, body, &wanted, &given, &self.save);
            let own = body.results.len();
            let extra = halves.forward.avals(&halves.forward.results[own..]);
            let forward = cx.graph().add_function(&format!("{name}_forward"), halves.forward);
            let backward = cx.graph().add_function(&format!("{name}_backward"), halves.backward);
            Cut { of: self.function.clone(), forward, extra, backward, kept: halves.kept, reached: halves.reached }
        });
        debug_assert!(Rc::ptr_eq(&cut.of, &self.function));
        // The forward half stands in for the function even where it gives no more: nested functions may.
        cx.amend(Rc::new(Call { function: cut.forward.clone(), save: self.save.clone() }), &cut.extra);
        let cotangents: Vec<Tensor> = given.iter().map(|&i| cx.cotangent(i)).collect();
        let kept: Vec<Tensor> = cut
            .kept
            .iter()
            .map(|kept| match *kept {
                Kept::Arg(i) => cx.input(i),
                Kept::Result(i) => cx.output(i),
            })
            .collect();
        let call = Call { function: cut.backward.clone(), save: Save::Everything };
        let found = cx.graph().apply(call, &cotangents.iter().chain(&kept).collect::<Vec<_>>());
        cx.placed(&cut.reached, found)
    }

    fn regions(&self) -> Vec<&Body> {
        vec![&self.function.body]
    }
}

/// Values that a body renews as long as a condition on them holds.
#[derive(Clone, Debug)]
pub struct While {
    /// From the values to a `pred` scalar.
    pub cond: Body,
    /// From the values to their next ones.
    pub body: Body,
}

op_info!(While, 0.., "while", "values renewed as long as a condition holds",
    Missing "the number of turns of a loop with a condition is not known: write it with scan");

impl Op for While {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let values: Vec<Aval> = inputs.iter().map(|&aval| aval.clone()).collect();
        agree("the condition takes", &self.cond.avals(&self.cond.args), &values)?;
        agree("the body takes", &self.body.avals(&self.body.args), &values)?;
        let flag = [Aval::new(DType::Pred, &[])];
        agree("the condition must give", &flag, &self.cond.avals(&self.cond.results))?;
        agree("the body must give the types of the values", &values, &self.body.avals(&self.body.results))?;
        Ok(values)
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let cond = cx.region(&self.cond, "stablehlo.return");
        let body = cx.region(&self.body, "stablehlo.return");
        format!("\"stablehlo.while\"({}) ({cond}, {body}) : {}", cx.operands(), cx.signature())
    }

    fn result_count(&self, inputs: usize) -> usize {
        inputs
    }

    fn regions(&self) -> Vec<&Body> {
        vec![&self.cond, &self.body]
    }
}

/// One of several branches, chosen by the first operand: a `pred` chooses the first of two where true, an i32 chooses
/// by number (the last one, where there is no such number). The other operands go to the branch.
#[derive(Clone, Debug)]
pub struct Case {
    /// The branches: same arguments, same types of results.
    pub branches: Vec<Body>,
}

op_info!(Case, 1.., "case", "one of several branches");

impl Op for Case {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let (index, n) = (inputs[0], self.branches.len());
        let fits = match index.dtype {
            DType::Pred => n == 2,
            DType::I32 => n > 0,
            _ => false,
        };
        if !fits || index.rank() != 0 {
            return Err(format!(
                "a i1[] chooses between two branches, an i32[] among one or more; found {index} for {n}"
            ));
        }
        let values: Vec<Aval> = inputs[1..].iter().map(|&aval| aval.clone()).collect();
        let results = self.branches[0].avals(&self.branches[0].results);
        for (i, branch) in self.branches.iter().enumerate() {
            agree(&format!("branch {i} takes"), &branch.avals(&branch.args), &values)?;
            let found = branch.avals(&branch.results);
            agree(&format!("branch {i} must give the same as branch 0:"), &results, &found)?;
        }
        Ok(results)
    }

    /// StableHLO's branches have no arguments and read the values around them: the operands' names stand in.
    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let spelling = if cx.input(0).dtype == DType::Pred { "if" } else { "case" };
        let args: Vec<String> = (1..cx.operand_count()).map(|i| cx.operand(i).to_string()).collect();
        let branches: Vec<String> =
            self.branches.iter().map(|branch| cx.region_reading(branch, &args, "stablehlo.return")).collect();
        let (index, kind) = (cx.operand(0), cx.input(0).mlir());
        format!("\"stablehlo.{spelling}\"({index}) ({}) : ({kind}) -> {}", join(&branches, ", "), cx.result_types())
    }

    fn result_count(&self, _inputs: usize) -> usize {
        self.branches.first().map_or(0, |branch| branch.results.len())
    }

    /// The derivatives of the branches as branches. Each computes its forward values once more, as far as it reads them.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let location = Location::caller();
        let graph = cx.graph().clone();
        let given = cx.with_cotangents();
        let wanted = cx.wanted();
        let cotangents: Vec<Tensor> = given.iter().map(|&i| cx.cotangent(i)).collect();
        let operands: Vec<Tensor> = (1..cx.operand_count()).map(|i| cx.input(i)).collect();
        let inputs: Vec<&Tensor> = cotangents.iter().chain(&operands).collect();
        let wrt: Vec<usize> = wanted.iter().map(|i| i - 1).collect();
        let derivative = |branch: &Body| {
            graph.trace(location, "case", &inputs, None, |args| {
                let (cotangents, operands) = args.split_at(given.len());
                graph.pulled_back(branch, operands, &given, cotangents, &wrt)
            })
        };
        let branches = self.branches.iter().map(derivative).collect();
        let index = cx.input(0);
        let inputs: Vec<&Tensor> = std::iter::once(&index).chain(inputs).collect();
        let found = graph.apply(Case { branches }, &inputs);
        cx.placed(&wanted, found)
    }

    fn regions(&self) -> Vec<&Body> {
        self.branches.iter().collect()
    }
}

/// The operands as they are; the compiler moves nothing across.
#[derive(Clone, Debug)]
pub struct OptimizationBarrier;

op_info!(OptimizationBarrier, 1.., "optimization_barrier", "values that the compiler moves nothing across");

impl Op for OptimizationBarrier {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        Ok(inputs.iter().map(|&aval| aval.clone()).collect())
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let types: Vec<String> = (0..cx.operand_count()).map(|i| cx.output_type(i)).collect();
        format!("stablehlo.optimization_barrier {} : {}", cx.operands(), join(&types, ", "))
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        cx.each(|cx, i| cx.cotangent(i))
    }

    fn result_count(&self, inputs: usize) -> usize {
        inputs
    }
}

/// What builds one branch of [`Graph::case`].
pub type Branch<'a> = dyn Fn(&[Tensor]) -> Vec<Tensor> + 'a;

impl Graph {
    /// Renews `init` by `body` as long as `cond` gives true. Both are traced once, on arguments of the types of `init`,
    /// and see nothing else. Errors: a condition that is not a `pred` scalar, or a body that changes a type or shape.
    #[track_caller]
    pub fn while_loop(
        &self,
        init: &[&Tensor],
        cond: impl FnOnce(&[Tensor]) -> Tensor,
        body: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Vec<Tensor> {
        let location = Location::caller();
        let cond = self.trace(location, "while", init, None, |values| vec![cond(values)]);
        let body = self.trace(location, "while", init, None, body);
        self.apply(While { cond, body }, init)
    }

    /// `yes` of the inputs where `pred` (a scalar) is true, `no` of them where it is not; only one is run. Both are
    /// traced once and see only their arguments. Errors: branches whose results differ in type or shape.
    #[track_caller]
    pub fn cond(
        &self,
        pred: &Tensor,
        inputs: &[&Tensor],
        yes: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
        no: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Vec<Tensor> {
        let location = Location::caller();
        let yes = self.trace(location, "case", inputs, None, yes);
        let no = self.trace(location, "case", inputs, None, no);
        let inputs: Vec<&Tensor> = std::iter::once(pred).chain(inputs.iter().copied()).collect();
        self.apply(Case { branches: vec![yes, no] }, &inputs)
    }

    /// The branch with number `index` (an i32 scalar) of the inputs; the last one, where there is no such number.
    /// Errors: no branches, or branches whose results differ in type or shape.
    #[track_caller]
    pub fn case(&self, index: &Tensor, inputs: &[&Tensor], branches: &[&Branch<'_>]) -> Vec<Tensor> {
        let location = Location::caller();
        let branches = branches.iter().map(|branch| self.trace(location, "case", inputs, None, branch)).collect();
        let inputs: Vec<&Tensor> = std::iter::once(index).chain(inputs.iter().copied()).collect();
        self.apply(Case { branches }, &inputs)
    }

    /// The tensors as they are, which the compiler may not fuse or move anything across.
    #[track_caller]
    pub fn optimization_barrier(&self, values: &[&Tensor]) -> Vec<Tensor> {
        self.apply(OptimizationBarrier, values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{BF16, F32, I8, I32, Pred};
    use crate::graph::testing::{error, last_line, lines};

    #[test]
    fn loops() {
        let text = lines(|g| {
            let (n, x) = (g.arg("n", I32, &[]), g.arg("x", F32, &[2]));
            g.while_loop(&[&n, &x], |v| v[0].gt(0), |v| vec![&v[0] - 1, v[1].tanh()])
        });
        assert_eq!(
            text,
            [
                "%while, %while_1 = \"stablehlo.while\"(%n, %x) ({",
                "^bb0(%n_1: tensor<i32>, %x_1: tensor<2xf32>):",
                "%constant = stablehlo.constant dense<0> : tensor<i32>",
                "%compare = stablehlo.compare GT, %n_1, %constant, SIGNED : (tensor<i32>, tensor<i32>) -> tensor<i1>",
                "stablehlo.return %compare : tensor<i1>",
                "}, {",
                "^bb0(%n_2: tensor<i32>, %x_2: tensor<2xf32>):",
                "%constant_1 = stablehlo.constant dense<1> : tensor<i32>",
                "%subtract = stablehlo.subtract %n_2, %constant_1 : tensor<i32>",
                "%tanh = stablehlo.tanh %x_2 : tensor<2xf32>",
                "stablehlo.return %subtract, %tanh : tensor<i32>, tensor<2xf32>",
                "}) : (tensor<i32>, tensor<2xf32>) -> (tensor<i32>, tensor<2xf32>)",
            ]
        );
    }

    #[test]
    fn branches() {
        let text = lines(|g| {
            let (p, x) = (g.arg("p", Pred, &[]), g.arg("x", F32, &[2]));
            g.cond(&p, &[&x], |a| vec![a[0].exp()], |a| vec![a[0].clone()])
        });
        assert_eq!(
            text,
            [
                "%case = \"stablehlo.if\"(%p) ({",
                "%exponential = stablehlo.exponential %x : tensor<2xf32>",
                "stablehlo.return %exponential : tensor<2xf32>",
                "}, {",
                "stablehlo.return %x : tensor<2xf32>",
                "}) : (tensor<i1>) -> tensor<2xf32>",
            ]
        );
        let text = lines(|g| {
            let (i, x) = (g.arg("i", I32, &[]), g.arg("x", F32, &[2]));
            g.case(&i, &[&x], &[&|a: &[Tensor]| vec![-&a[0]], &|a: &[Tensor]| vec![a[0].abs()]])
        });
        assert_eq!(text[0], "%case = \"stablehlo.case\"(%i) ({");
    }

    #[test]
    fn barrier() {
        assert_eq!(
            last_line(|g| g.optimization_barrier(&[&g.arg("x", F32, &[2]), &g.arg("y", I8, &[])])),
            "%optimization_barrier, %optimization_barrier_1 = stablehlo.optimization_barrier %x, %y : tensor<2xf32>, tensor<i8>"
        );
    }

    #[test]
    fn errors() {
        let x = |g: &Graph| g.arg("x", F32, &[2]);
        assert_eq!(
            error(|g| g.while_loop(&[&x(g)], |v| v[0].gt(0.0), |v| v.to_vec())),
            "while: the condition must give (i1[]), found (i1[2])"
        );
        assert_eq!(
            error(|g| g.while_loop(&[&x(g)], |_| g.scalar(true, Pred), |v| vec![v[0].cast(BF16)])),
            "while: the body must give the types of the values (f32[2]), found (bf16[2])"
        );
        assert_eq!(
            error(|g| g.cond(&g.arg("p", Pred, &[]), &[&x(g)], |a| a.to_vec(), |_| vec![])),
            "case: branch 1 must give the same as branch 0: (f32[2]), found ()"
        );
        assert!(error(|g| g.case(&g.arg("i", F32, &[]), &[], &[&|_: &[Tensor]| vec![]])).contains("found f32[] for 1"));
        assert!(error(|g| g.case(&g.arg("i", I32, &[]), &[], &[])).contains("found i32[] for 0"));
        let outside = error(|g| {
            let x = x(g);
            g.while_loop(&[&x], |_| g.scalar(true, Pred), |v| vec![&v[0] + &x])
        });
        assert!(outside.starts_with("add: a tensor from outside is used in a function, loop or branch"), "{outside}");
        assert!(outside.ends_with("(x)"), "{outside}");
    }
}
