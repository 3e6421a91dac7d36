//! The finished graph: functions of nodes, as plain data that can be walked and replayed.

use std::collections::BTreeSet;
use std::panic::Location;
use std::rc::Rc;

use super::aval::Aval;
use super::emit::{self, Emission};
use super::ops::Op;
use super::sharding::{Mesh, Sharding};

/// Index of a value within its [`Body`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub(crate) u32);

impl ValueId {
    /// The position in [`Body::values`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One tensor of a body: an argument or a result of a node.
#[derive(Clone, Debug)]
pub struct Value {
    /// Element type and shape.
    pub aval: Rc<Aval>,
    /// The readable name, where one was given.
    pub name: Option<String>,
}

/// One operation.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is computed; `downcast_ref` gives the attributes.
    pub op: Rc<dyn Op>,
    /// Operands, in order.
    pub inputs: Vec<ValueId>,
    /// Results, in order.
    pub outputs: Vec<ValueId>,
    /// The scopes that were open, joined with `/`.
    pub scope: Rc<str>,
    /// The caller's code that asked for it.
    pub location: &'static Location<'static>,
}

/// A list of nodes with arguments and results: the inside of a function, a loop or a branch. Closed: a node reads
/// only values of its own body.
#[derive(Clone, Debug, Default)]
pub struct Body {
    /// Every value, by [`ValueId`].
    pub values: Vec<Value>,
    /// The arguments, in order.
    pub args: Vec<ValueId>,
    /// The nodes, each after those that it reads.
    pub nodes: Vec<Node>,
    /// The results, in order.
    pub results: Vec<ValueId>,
}

impl Body {
    /// A new value, which something has to compute.
    pub(crate) fn add(&mut self, aval: Aval) -> ValueId {
        self.add_shared(Rc::new(aval))
    }

    /// [`Body::add`] for a type that a handle shares.
    pub(crate) fn add_shared(&mut self, aval: Rc<Aval>) -> ValueId {
        let id = ValueId(self.values.len() as u32);
        self.values.push(Value { aval, name: None });
        id
    }

    /// Element type and shape of a value of this body.
    pub fn aval(&self, id: ValueId) -> &Aval {
        &self.values[id.index()].aval
    }

    /// The names of its ops, those inside of functions, loops and branches included.
    pub fn op_names(&self) -> BTreeSet<&'static str> {
        let inside = |node: &Node| node.op.regions().into_iter().flat_map(Body::op_names).collect::<Vec<_>>();
        self.nodes.iter().flat_map(|node| inside(node).into_iter().chain([node.op.info().name])).collect()
    }

    /// Element types and shapes of these values.
    pub(crate) fn avals(&self, ids: &[ValueId]) -> Vec<Aval> {
        ids.iter().map(|&id| self.aval(id).clone()).collect()
    }
}

/// A private function of the module, called with `func.call`.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its symbol, unique in the module: the name given to `Graph::call`, with a number where that is taken.
    pub name: String,
    /// Its inside.
    pub body: Body,
}

/// An argument of the module.
#[derive(Clone, Debug)]
pub struct Arg {
    /// Its name, unique among the arguments.
    pub name: String,
    /// Element type and shape (of the whole array, over all devices).
    pub aval: Aval,
    /// How it is laid out over the mesh; `None` where there is none.
    pub sharding: Option<Sharding>,
    /// The output that takes its memory over: the argument is donated.
    pub aliased_output: Option<usize>,
}

/// A result of the module.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its name, unique among the outputs.
    pub name: String,
    /// Element type and shape (of the whole array, over all devices).
    pub aval: Aval,
    /// How it is laid out over the mesh; `None` where there is none.
    pub sharding: Option<Sharding>,
}

/// A finished graph.
#[derive(Clone, Debug)]
pub struct Module {
    pub(crate) name: String,
    pub(crate) mesh: Option<Mesh>,
    pub(crate) args: Vec<Arg>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) body: Body,
    pub(crate) functions: Vec<Rc<Function>>,
    /// What `Graph::set_kernels` said.
    pub(crate) kernels: Vec<&'static str>,
}

impl Module {
    /// The name given to `Graph::new`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device mesh, where one was set.
    pub fn mesh(&self) -> Option<&Mesh> {
        self.mesh.as_ref()
    }

    /// The arguments in call order.
    pub fn args(&self) -> &[Arg] {
        &self.args
    }

    /// The outputs in result order.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// The inside of the entry function.
    pub fn body(&self) -> &Body {
        &self.body
    }

    /// The private functions, callees before callers.
    pub fn functions(&self) -> &[Rc<Function>] {
        &self.functions
    }

    /// The nodes of the entry function, in order. Those of functions and regions are reached through
    /// [`Module::functions`] and [`Op::regions`].
    pub fn nodes(&self) -> &[Node] {
        &self.body.nodes
    }

    /// The StableHLO text, sharding written for Shardy. The same graph always gives the same text.
    pub fn stablehlo(&self) -> String {
        self.stablehlo_with(Emission::Shardy)
    }

    /// The StableHLO text with sharding written for the given partitioner.
    pub fn stablehlo_with(&self, emission: Emission) -> String {
        emit::module(self, emission)
    }
}
