//! Reverse-mode differentiation, as nodes added to the graph. The derivative of an op stands with the op ([`Op::vjp`]);
//! here is the walk that strings them together, and what a function keeps from its forward to its backward half.
//!
//! Cotangents are accumulated from the last node to the first (Griewank and Walther 2008, "Evaluating Derivatives",
//! chapter 3). What a derivative reads of the forward pass it asks for by [`Vjp::input`] and [`Vjp::output`], so that only
//! values that are read are kept. A function is cut in two: its forward half gives these values as further results, and
//! [`Save`] says which of them are computed once more instead (Chen et al. 2016, arXiv:1604.06174).

use std::collections::{HashMap, HashSet};
use std::panic::Location;
use std::rc::Rc;

use super::aval::Aval;
use super::graph::Graph;
use super::kernel::Kernel;
use super::module::{Body, Function, Node, Value, ValueId};
use super::ops::constant::{Constant, Iota, Scalar};
use super::ops::convert::Convert;
use super::ops::custom_call::CustomCall;
use super::ops::dot::DotGeneral;
use super::ops::shape::{BroadcastInDim, Reshape};
use super::ops::{Gradient, Op};
use super::tensor::Tensor;
use crate::DType;

/// Which values of a function's forward half its backward half keeps; the others it computes once more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Save {
    /// Every value that a derivative reads, but for copies, casts and constants of others.
    #[default]
    Everything,
    /// Results of dot products, and of kernels that compute some.
    Dots,
    /// Values that [`Tensor::named`] gave one of these names.
    Named(Vec<String>),
    /// The arguments alone.
    Nothing,
}

impl Save {
    /// Whether a result of this node is kept.
    fn keeps(&self, node: &Node, name: Option<&str>) -> bool {
        let op = &*node.op;
        match self {
            Save::Everything => {
                !(op.downcast_ref::<Constant>().is_some()
                    || op.downcast_ref::<Iota>().is_some()
                    || op.downcast_ref::<BroadcastInDim>().is_some()
                    || op.downcast_ref::<Reshape>().is_some()
                    || op.downcast_ref::<Convert>().is_some())
            }
            Save::Dots => {
                op.downcast_ref::<DotGeneral>().is_some()
                    || op.downcast_ref::<CustomCall>().is_some_and(CustomCall::multiplies)
            }
            Save::Named(names) => name.is_some_and(|name| names.iter().any(|wanted| wanted == name)),
            Save::Nothing => false,
        }
    }
}

/// The cotangents of an op's operands, one each; `None` where nothing flows. The error says why there is no derivative.
pub type Cotangents = Result<Vec<Option<Tensor>>, String>;

/// Gives the argument with that number of a body that is being differentiated.
type Args<'a> = dyn FnMut(usize) -> Tensor + 'a;

/// The values of a forward pass, as the reverse pass reads them.
struct Values<'a> {
    /// The forward pass; amended where a node has to give more.
    body: Body,
    /// The forward pass stands in the open body itself.
    open: bool,
    /// Values that are at hand in the open body.
    known: HashMap<ValueId, Tensor>,
    /// The node that computes a value.
    producers: HashMap<ValueId, usize>,
    /// What is kept of a closed body.
    save: &'a Save,
    /// Where the arguments of a closed body come from; each is kept, where there is nothing.
    args: Option<&'a mut Args<'a>>,
    /// The values that were kept, in the order of the arguments added for them.
    saved: Vec<ValueId>,
    /// Whether a value was computed once more.
    recomputed: bool,
}

impl<'a> Values<'a> {
    fn new(body: Body, open: bool, save: &'a Save, args: Option<&'a mut Args<'a>>) -> Values<'a> {
        let outputs = |(at, node): (usize, &Node)| node.outputs.iter().map(|&id| (id, at)).collect::<Vec<_>>();
        let producers = body.nodes.iter().enumerate().flat_map(outputs).collect();
        Values { body, open, known: HashMap::new(), producers, save, args, saved: Vec::new(), recomputed: false }
    }

    /// A value of the forward pass in the open body: at hand, kept, or computed once more.
    fn get(&mut self, graph: &Graph, id: ValueId) -> Tensor {
        if let Some(tensor) = self.known.get(&id) {
            return tensor.clone();
        }
        if self.open {
            return graph.value(id);
        }
        let Some(&at) = self.producers.get(&id) else {
            let argument = self.body.args.iter().position(|&arg| arg == id);
            let tensor = match (&mut self.args, argument) {
                (Some(args), Some(i)) => args(i),
                _ => self.keep(graph, id),
            };
            self.known.insert(id, tensor.clone());
            return tensor;
        };
        let node = self.body.nodes[at].clone();
        if self.args.is_none() && self.save.keeps(&node, self.body.values[id.index()].name.as_deref()) {
            let tensor = self.keep(graph, id);
            self.known.insert(id, tensor.clone());
            return tensor;
        }
        // Constants and copies cost nothing to have twice.
        self.recomputed |= Save::Everything.keeps(&node, None);
        let inputs: Vec<Tensor> = node.inputs.iter().map(|&input| self.get(graph, input)).collect();
        let results = graph.record(node.location, node.op.clone(), &inputs.iter().collect::<Vec<_>>());
        self.known.extend(node.outputs.iter().copied().zip(results));
        self.known.get(&id).cloned().unwrap_or_else(|| graph.placeholder(self.body.aval(id).clone()))
    }

    /// A new argument of the open body for a value of the forward pass.
    fn keep(&mut self, graph: &Graph, id: ValueId) -> Tensor {
        self.saved.push(id);
        let Value { aval, name } = &self.body.values[id.index()];
        graph.further_arg((**aval).clone(), name.as_deref())
    }

    /// Puts another op in a node's place, which gives more results after those that there are; their ids.
    fn amend(&mut self, graph: &Graph, at: usize, op: Rc<dyn Op>, extra: &[Aval]) -> Vec<ValueId> {
        let ids = match self.open {
            true => graph.amend(at, op.clone(), extra),
            false => extra.iter().map(|aval| self.body.add(aval.clone())).collect(),
        };
        if self.open {
            let known = self.body.values.len();
            self.body.values.extend(graph.values_from(known));
        }
        let node = &mut self.body.nodes[at];
        node.op = op;
        node.outputs.extend(&ids);
        self.producers.extend(ids.iter().map(|&id| (id, at)));
        ids
    }
}

/// What the derivative of a node is computed from.
pub struct Vjp<'a, 'v> {
    graph: &'a Graph,
    values: &'a mut Values<'v>,
    at: usize,
    node: Node,
    wants: Vec<bool>,
    cotangents: Vec<Option<Tensor>>,
}

impl Vjp<'_, '_> {
    /// The graph, with the body open that the derivative is written into.
    pub fn graph(&self) -> &Graph {
        self.graph
    }

    /// Whether the gradient of something depends on this operand's cotangent.
    pub fn wants(&self, i: usize) -> bool {
        self.wants[i]
    }

    /// Number of operands.
    pub fn operand_count(&self) -> usize {
        self.wants.len()
    }

    /// The value of an operand.
    pub fn input(&mut self, i: usize) -> Tensor {
        self.values.get(self.graph, self.node.inputs[i])
    }

    /// The value of a result.
    pub fn output(&mut self, i: usize) -> Tensor {
        self.values.get(self.graph, self.node.outputs[i])
    }

    /// Element type and shape of an operand.
    pub fn input_aval(&self, i: usize) -> Aval {
        self.values.body.aval(self.node.inputs[i]).clone()
    }

    /// Element type and shape of a result.
    pub fn output_aval(&self, i: usize) -> Aval {
        self.values.body.aval(self.node.outputs[i]).clone()
    }

    /// The cotangent of the only result, or of the first.
    pub fn ct(&self) -> Tensor {
        self.cotangent(0)
    }

    /// The cotangent of a result; zeros where none came.
    pub fn cotangent(&self, i: usize) -> Tensor {
        self.cotangents[i].clone().unwrap_or_else(|| zeros(self.graph, &self.output_aval(i)))
    }

    /// The results that have a cotangent.
    pub fn with_cotangents(&self) -> Vec<usize> {
        (0..self.cotangents.len()).filter(|&i| self.cotangents[i].is_some()).collect()
    }

    /// For each operand `rule` of its number, where its cotangent is wanted.
    pub fn each(&mut self, mut rule: impl FnMut(&mut Self, usize) -> Tensor) -> Cotangents {
        Ok((0..self.wants.len()).map(|i| self.wants[i].then(|| rule(self, i))).collect())
    }

    /// The operands whose cotangent is wanted.
    pub(crate) fn wanted(&self) -> Vec<usize> {
        (0..self.wants.len()).filter(|&i| self.wants[i]).collect()
    }

    /// Nothing for any operand.
    pub(crate) fn nothing(&self) -> Vec<Option<Tensor>> {
        vec![None; self.wants.len()]
    }

    /// These cotangents for the operands of these numbers, nothing for the others.
    pub(crate) fn placed(&self, operands: &[usize], cotangents: impl IntoIterator<Item = Tensor>) -> Cotangents {
        let mut results = self.nothing();
        operands.iter().zip(cotangents).for_each(|(&i, ct)| results[i] = Some(ct));
        Ok(results)
    }

    /// Puts another op in this one's place, which gives further results after its own; their numbers follow on.
    pub(crate) fn amend(&mut self, op: Rc<dyn Op>, extra: &[Aval]) {
        let ids = self.values.amend(self.graph, self.at, op.clone(), extra);
        self.node.op = op;
        self.node.outputs.extend(ids);
    }

    /// The cotangents of the wanted operands, where this op computes what `body` does of them: the forward values are
    /// computed once more, as far as they are read.
    pub(crate) fn through(&mut self, body: &Body) -> Cotangents {
        let (given, wanted) = (self.with_cotangents(), self.wanted());
        let cotangents: Vec<Tensor> = given.iter().map(|&i| self.cotangent(i)).collect();
        let graph = self.graph;
        let found = pulled(graph, body, &mut |i| self.input(i), &given, &cotangents, &wanted);
        let mut results = self.nothing();
        wanted.iter().zip(found).for_each(|(&i, ct)| results[i] = ct);
        Ok(results)
    }

    /// The same by a kernel, as [`Kernel::gradient`](super::Kernel::gradient) has it.
    pub(crate) fn by_kernel(&mut self, kernel: Kernel, body: &Body) -> Cotangents {
        let avals: Vec<Aval> = (0..self.operand_count()).map(|i| self.input_aval(i)).collect();
        let floats: Vec<usize> = (0..avals.len()).filter(|&i| avals[i].dtype.is_float()).collect();
        let all: Vec<usize> = (0..self.cotangents.len()).collect();
        let operands = (0..avals.len()).map(|i| self.input(i)).collect::<Vec<_>>();
        let cotangents = all.iter().map(|&i| self.cotangent(i)).collect::<Vec<_>>();
        let inputs: Vec<&Tensor> = operands.iter().chain(&cotangents).collect();
        let found = self.graph.kernel(kernel, &inputs, |args| {
            let cotangents = &args[args.len() - all.len()..];
            let found = pulled(self.graph, body, &mut |i| args[i].clone(), &all, cotangents, &floats);
            let of = |(&i, ct): (&usize, Option<Tensor>)| {
                ct.unwrap_or_else(|| zeros(self.graph, &avals[i])).cast(DType::F32)
            };
            floats.iter().zip(found).map(of).collect()
        });
        let cotangents = floats.iter().zip(found).map(|(&i, ct)| ct.cast(avals[i].dtype));
        self.placed(&floats, cotangents)
    }
}

/// Zeros of that type and shape.
pub(crate) fn zeros(graph: &Graph, aval: &Aval) -> Tensor {
    let zero = if aval.dtype == DType::Pred { Scalar::Bool(false) } else { Scalar::Int(0) };
    graph.full(zero, aval.dtype, &aval.shape)
}

/// The cotangents of `wrt`, given those of some values; what they are computed from is added to the open body. `None` where
/// nothing flows.
fn reverse(
    graph: &Graph,
    values: &mut Values<'_>,
    seeds: Vec<(ValueId, Tensor)>,
    wrt: &[ValueId],
) -> Vec<Option<Tensor>> {
    let mut active: HashSet<ValueId> = wrt.iter().copied().collect();
    for node in &values.body.nodes {
        if !matches!(node.op.info().gradient, Gradient::Zero(_)) && node.inputs.iter().any(|id| active.contains(id)) {
            active.extend(node.outputs.iter().filter(|id| values.body.aval(**id).dtype.is_float()));
        }
    }
    let mut cotangents: HashMap<ValueId, Tensor> = HashMap::new();
    let add = |cotangents: &mut HashMap<ValueId, Tensor>, id: ValueId, ct: Tensor| {
        let sum = match cotangents.remove(&id) {
            Some(sum) => sum + ct,
            None => ct,
        };
        cotangents.insert(id, sum);
    };
    for (id, ct) in seeds {
        add(&mut cotangents, id, ct);
    }
    for at in (0..values.body.nodes.len()).rev() {
        let node = values.body.nodes[at].clone();
        let wants: Vec<bool> = node.inputs.iter().map(|id| active.contains(id)).collect();
        let found: Vec<Option<Tensor>> = node.outputs.iter().map(|id| cotangents.get(id).cloned()).collect();
        if !wants.contains(&true) || found.iter().all(Option::is_none) {
            continue;
        }
        let mut cx =
            Vjp { graph, values: &mut *values, at, node: node.clone(), wants: wants.clone(), cotangents: found };
        let name = node.op.info().name;
        let results = match graph.in_scope(&gradient_scope(&node.scope), || node.op.vjp(&mut cx)) {
            Ok(results) => results,
            Err(why) => {
                graph.fail(node.location, format!("gradient of {name}: {why}"));
                continue;
            }
        };
        for (i, ct) in results.into_iter().enumerate().filter(|(i, _)| wants.get(*i) == Some(&true)) {
            let Some(ct) = ct else { continue };
            let wanted = values.body.aval(node.inputs[i]);
            if ct.aval() != wanted {
                let message = format!("gradient of {name}: operand {i} is {wanted}, its cotangent {}", ct.aval());
                graph.fail(node.location, message);
                continue;
            }
            add(&mut cotangents, node.inputs[i], ct);
        }
    }
    wrt.iter().map(|id| cotangents.get(id).cloned()).collect()
}

/// The cotangents of the arguments `wanted` of a body, given those of its results `given`: forward values are computed once
/// more from the arguments, as far as they are read. `None` where nothing flows.
fn pulled(
    graph: &Graph,
    body: &Body,
    args: &mut Args<'_>,
    given: &[usize],
    cotangents: &[Tensor],
    wanted: &[usize],
) -> Vec<Option<Tensor>> {
    let seeds = given.iter().map(|&i| body.results[i]).zip(cotangents.iter().cloned()).collect();
    let wrt: Vec<ValueId> = wanted.iter().map(|&i| body.args[i]).collect();
    let mut values = Values::new(body.clone(), false, &Save::Nothing, Some(args));
    reverse(graph, &mut values, seeds, &wrt)
}

/// Where the derivative of a node stands: `gradient/` and the node's own scopes.
fn gradient_scope(scope: &str) -> String {
    match scope.strip_prefix("gradient") {
        Some(_) => scope.to_string(),
        None if scope.is_empty() => "gradient".to_string(),
        None => format!("gradient/{scope}"),
    }
}

/// Where the backward half of a function reads a value of the forward half.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kept {
    /// An argument of the function.
    Arg(usize),
    /// One of its results, those after its own included.
    Result(usize),
}

/// A body cut in two.
#[derive(Clone, Debug)]
pub(crate) struct Halves {
    /// The body, with the values that are kept as further results.
    pub(crate) forward: Body,
    /// From the cotangents of the results that have one, then what is kept, to the cotangents of the arguments that get one.
    pub(crate) backward: Body,
    /// What the backward half reads, in its order.
    pub(crate) kept: Vec<Kept>,
    /// The arguments that get a cotangent.
    pub(crate) reached: Vec<usize>,
}

/// A function cut in two, both halves functions of the module.
#[derive(Debug)]
pub(crate) struct Cut {
    /// The function that was cut: held, so that its address stays its own.
    pub(crate) of: Rc<Function>,
    /// Itself, where nothing more than it gives is kept.
    pub(crate) forward: Rc<Function>,
    /// Element types and shapes of the results that `forward` has more.
    pub(crate) extra: Vec<Aval>,
    /// As [`Halves::backward`].
    pub(crate) backward: Rc<Function>,
    /// As [`Halves::kept`].
    pub(crate) kept: Vec<Kept>,
    /// As [`Halves::reached`].
    pub(crate) reached: Vec<usize>,
}

/// What a [`Cut`] is made of: the function's address, the arguments wanted, the results with a cotangent, what is saved.
pub(crate) type HalvesKey = (*const Function, Vec<usize>, Vec<usize>, Save);

impl Graph {
    /// Cuts a body in two: `wanted` are the arguments whose cotangents are asked for, `given` the results that have one.
    pub(crate) fn halves(
        &self,
        location: &'static Location<'static>,
        name: &str,
        body: &Body,
        wanted: &[usize],
        given: &[usize],
        save: &Save,
    ) -> Halves {
        let avals: Vec<_> = given.iter().map(|&i| (None, body.aval(body.results[i]).clone())).collect();
        let mut values = Values::new(body.clone(), false, save, None);
        let mut reached = Vec::new();
        let mut backward = self.trace_avals(location, name, &avals, Some("gradient"), |cotangents| {
            let seeds = given.iter().map(|&i| body.results[i]).zip(cotangents.iter().cloned()).collect();
            let wrt: Vec<ValueId> = wanted.iter().map(|&i| body.args[i]).collect();
            let found = reverse(self, &mut values, seeds, &wrt);
            reached.extend(wanted.iter().zip(&found).filter(|(_, ct)| ct.is_some()).map(|(&i, _)| i));
            found.into_iter().flatten().collect()
        });
        if values.recomputed {
            // Else common subexpressions of the halves would become one, and be kept after all.
            let inner = backward;
            let args = inner.args.iter().map(|id| &inner.values[id.index()]);
            let args: Vec<_> = args.map(|value| (value.name.clone(), (*value.aval).clone())).collect();
            backward = self.trace_avals(location, name, &args, Some("gradient"), |args| {
                let held = self.optimization_barrier(&args.iter().collect::<Vec<_>>());
                self.replay(&inner, &held, &mut |_, _| None)
            });
        }
        let Values { body: mut forward, saved, .. } = values;
        let kept = saved.iter().map(|id| match forward.args.iter().position(|arg| arg == id) {
            Some(i) => Kept::Arg(i),
            None => Kept::Result(forward.results.iter().position(|result| result == id).unwrap_or_else(|| {
                forward.results.push(*id);
                forward.results.len() - 1
            })),
        });
        let kept = kept.collect();
        Halves { forward, backward, kept, reached }
    }

    /// [`pulled`] of a body whose arguments are given; zeros where nothing flows.
    pub(crate) fn pulled_back(
        &self,
        body: &Body,
        args: &[Tensor],
        given: &[usize],
        cotangents: &[Tensor],
        wanted: &[usize],
    ) -> Vec<Tensor> {
        let found = pulled(self, body, &mut |i| args[i].clone(), given, cotangents, wanted);
        let or_zeros = |(ct, &i): (Option<Tensor>, &usize)| ct.unwrap_or_else(|| zeros(self, args[i].aval()));
        found.into_iter().zip(wanted).map(or_zeros).collect()
    }

    /// The gradients of a scalar with respect to tensors of the same body: ∂`loss`/∂w for each w, of w's type and shape. A w
    /// that the loss does not depend on gets zeros.
    ///
    /// ```
    /// use xla::DType::F32;
    /// use xla::graph::{Graph, einsum};
    ///
    /// let g = Graph::new("step");
    /// let (x, w) = (g.arg("x", F32, &[4, 8]), g.arg("w", F32, &[8, 3]));
    /// let loss = einsum("BM,MF->BF", &x, &w).tanh().square().sum(&[0, 1]);
    /// let gradient = g.grad(&loss, &[&w]).remove(0);
    /// g.output("w", &(&w - gradient * 0.1));
    /// assert!(g.finish()?.stablehlo().contains("gradient/dot_general"));
    /// # Ok::<(), xla::graph::GraphError>(())
    /// ```
    ///
    /// Errors: a loss that is not a float scalar, an integer w, an op on the way that has no derivative, tensors of different
    /// bodies.
    #[track_caller]
    pub fn grad(&self, loss: &Tensor, wrt: &[&Tensor]) -> Vec<Tensor> {
        if loss.rank() != 0 || !loss.dtype().is_float() {
            let message = format!("grad: the loss must be a float scalar, found {}: sum it, or use vjp", loss.aval());
            self.fail(Location::caller(), message);
            return wrt.iter().map(|&w| w.clone()).collect();
        }
        let one = self.scalar(1i64, loss.dtype());
        self.vjp(&[(loss, &one)], wrt)
    }

    /// The loss that `build` makes of the parameters, and its gradient for each: [`Graph::grad`] in the form of a function.
    #[track_caller]
    pub fn value_and_grad(
        &self,
        parameters: &[&Tensor],
        build: impl FnOnce(&[&Tensor]) -> Tensor,
    ) -> (Tensor, Vec<Tensor>) {
        let loss = build(parameters);
        let gradients = self.grad(&loss, parameters);
        (loss, gradients)
    }

    /// The product of cotangents and the Jacobian (reverse mode): Σ ctᵀ ∂output/∂w for each w, given (output, ct) pairs of one
    /// type and shape. Errors: as [`Graph::grad`].
    #[track_caller]
    pub fn vjp(&self, outputs: &[(&Tensor, &Tensor)], wrt: &[&Tensor]) -> Vec<Tensor> {
        let location = Location::caller();
        for (output, ct) in outputs {
            if output.aval() != ct.aval() {
                let message =
                    format!("vjp: the cotangent of {} must be of that type, found {}", output.aval(), ct.aval());
                self.fail(location, message);
                return wrt.iter().map(|&w| w.clone()).collect();
            }
        }
        if let Some(w) = wrt.iter().find(|w| !w.dtype().is_float()) {
            self.fail(location, format!("vjp: {} has no gradient, only floats have", w.aval()));
            return wrt.iter().map(|&w| w.clone()).collect();
        }
        let here = |tensor: &Tensor| self.adopt(location, "vjp", tensor);
        let seeds = outputs.iter().map(|(output, ct)| (here(output), (*ct).clone())).collect();
        let ids: Vec<ValueId> = wrt.iter().map(|w| here(w)).collect();
        let mut values = Values::new(self.open_body(), true, &Save::Everything, None);
        let found = reverse(self, &mut values, seeds, &ids);
        let zeros = |w: &Tensor| zeros(self, w.aval());
        found.into_iter().zip(wrt).map(|(ct, w)| ct.unwrap_or_else(|| zeros(w))).collect()
    }

    /// The product of the Jacobian and tangents (forward mode): for each output Σ ∂output/∂w · tangent, given (w, tangent)
    /// pairs. It is the gradient of [`Graph::vjp`], which is linear in its cotangents: what only that product needs is left
    /// to the compiler to drop. Errors: as [`Graph::grad`].
    #[track_caller]
    pub fn jvp(&self, outputs: &[&Tensor], tangents: &[(&Tensor, &Tensor)]) -> Vec<Tensor> {
        // Any values do, as nothing depends on them; the barrier keeps them from being seen as zeros on the way.
        let blank: Vec<Tensor> = outputs.iter().map(|output| zeros(self, output.aval())).collect();
        let cotangents = self.optimization_barrier(&blank.iter().collect::<Vec<_>>());
        let pairs: Vec<_> = outputs.iter().copied().zip(&cotangents).collect();
        let pulled = self.vjp(&pairs, &tangents.iter().map(|(w, _)| *w).collect::<Vec<_>>());
        let pairs: Vec<_> = pulled.iter().zip(tangents).map(|(ct, (_, tangent))| (ct, *tangent)).collect();
        self.vjp(&pairs, &cotangents.iter().collect::<Vec<_>>())
    }

    /// [`Graph::call`] of a function that keeps only what `save` says for its derivative and computes the rest once more.
    /// Without a derivative it is a call.
    #[track_caller]
    pub fn checkpoint(
        &self,
        name: &str,
        save: Save,
        args: &[&Tensor],
        build: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Vec<Tensor> {
        self.call_function(Location::caller(), name, save, args, build)
    }
}

impl Tensor {
    /// This tensor, through which no gradient flows.
    #[track_caller]
    pub fn stop_gradient(&self) -> Tensor {
        self.graph.apply1(super::ops::convert::StopGradient, &[self])
    }
}
