//! The graph under construction: arguments, outputs, scopes, functions and the first error.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::panic::Location;
use std::rc::Rc;

use super::aval::Aval;
use super::emit::{symbol, unique};
use super::error::GraphError;
use super::grad::{Cut, HalvesKey, Save};
use super::module::{Arg, Body, Function, Module, Node, Output, Value, ValueId};
use super::ops::dot::Precision;
use super::ops::{Call, Op};
use super::sharding::{Mesh, Rules, Sharding};
use super::tensor::Tensor;
use crate::DType;

/// A graph under construction. A cheap handle: clones build the same graph. Built on one thread.
///
/// Nothing here fails at once: the first mistake is kept with the caller's line and comes back from
/// [`Graph::finish`], and the operations after it work on best-effort tensors.
#[derive(Clone)]
pub struct Graph(Rc<RefCell<State>>);

/// What is being built.
struct State {
    name: String,
    sharding: Option<(Mesh, Rules)>,
    platform: Platform,
    precision: Precision,
    args: Vec<Arg>,
    outputs: Vec<(Output, ValueId)>,
    frames: Vec<Frame>,
    frames_made: u32,
    functions: Vec<Rc<Function>>,
    calls: HashMap<(String, Save, Vec<Aval>), Rc<Function>>,
    halves: HashMap<HalvesKey, Rc<Cut>>,
    symbols: HashMap<String, usize>,
    inline_calls: bool,
    no_manual: bool,
    kernels: Vec<&'static str>,
    manual: bool,
    training: Option<Save>,
    scopes: Vec<String>,
    taps: Vec<(String, u32, ValueId)>,
    error: Option<GraphError>,
}

/// What a graph is to run on: the same values are computed everywhere, in the form that suits the platform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Platform {
    /// A processor.
    #[default]
    Cpu,
    /// A graphics processor.
    Gpu,
    /// A tensor processing unit.
    Tpu,
}

impl Platform {
    /// The platform that a PJRT plugin calls `name`: `cpu`, `tpu`, and `cuda` or `rocm`.
    pub fn named(name: &str) -> Platform {
        match name.to_ascii_lowercase().as_str() {
            "cpu" | "host" => Platform::Cpu,
            "tpu" => Platform::Tpu,
            _ => Platform::Gpu,
        }
    }
}

/// A body that is open: the entry function at the bottom, then what is being traced inside it.
struct Frame {
    id: u32,
    body: Body,
}

/// Attributes of an argument beyond its name and type.
#[derive(Clone, Copy, Debug, Default)]
pub struct ArgAttrs<'a> {
    /// The logical name of each axis ("batch", "heads", …; "" for one that is never split); every device has the whole
    /// argument without it. Without a mesh it has no effect.
    pub sharding: Option<&'a [&'a str]>,
}

/// What [`Graph::replay`] asks about each node, with the node's new inputs: `Some` results to put in its place, or
/// `None` to copy it.
pub type Rewrite<'a> = dyn FnMut(&Node, &[Tensor]) -> Option<Vec<Tensor>> + 'a;

/// Keeps a scope open; dropping it closes the scope.
#[must_use = "the scope closes when this is dropped: bind it to `_scope`"]
pub struct Scope {
    graph: Graph,
    depth: usize,
}

impl Drop for Scope {
    fn drop(&mut self) {
        self.graph.0.borrow_mut().scopes.truncate(self.depth);
    }
}

impl Graph {
    /// An empty graph; `name` becomes the module's name.
    pub fn new(name: &str) -> Graph {
        Graph(Rc::new(RefCell::new(State {
            name: name.to_string(),
            sharding: None,
            platform: Platform::Cpu,
            precision: Precision::Default,
            args: Vec::new(),
            outputs: Vec::new(),
            frames: vec![Frame { id: 0, body: Body::default() }],
            frames_made: 1,
            functions: Vec::new(),
            calls: HashMap::new(),
            halves: HashMap::new(),
            symbols: HashMap::from([("main".to_string(), 0)]),
            inline_calls: false,
            no_manual: false,
            kernels: Vec::new(),
            manual: false,
            training: None,
            scopes: Vec::new(),
            taps: Vec::new(),
            error: None,
        })))
    }

    /// Places the graph on a mesh of devices, with the table from logical to mesh axes. Call it before the first
    /// argument (an error otherwise).
    #[track_caller]
    pub fn set_mesh(&self, mesh: Mesh, rules: Rules) {
        if !self.0.borrow().args.is_empty() {
            self.fail(Location::caller(), "set_mesh comes after the first argument: call it before".into());
        }
        self.0.borrow_mut().sharding = Some((mesh, rules));
    }

    /// Says what the graph is to run on; [`Platform::Cpu`] at first. Code that builds asks [`Graph::platform`] where forms of
    /// the same computation differ in speed.
    pub fn set_platform(&self, platform: Platform) {
        self.0.borrow_mut().platform = platform;
    }

    /// What the graph is to run on.
    pub fn platform(&self) -> Platform {
        self.0.borrow().platform
    }

    /// Says that what is built will be differentiated, and what functions called from now on keep for that. Code that builds asks
    /// [`Graph::training`] where the fastest form has no derivative.
    pub fn set_training(&self, save: Save) {
        self.0.borrow_mut().training = Some(save);
    }

    /// Whether what is built will be differentiated.
    pub fn training(&self) -> bool {
        self.0.borrow().training.is_some()
    }

    /// Number of devices along a mesh axis; 1 where there is no mesh or no such axis.
    pub fn devices_along(&self, axis: &str) -> usize {
        self.mesh().and_then(|mesh| mesh.size(axis)).unwrap_or(1)
    }

    /// Inside a manual computation the mesh axes that split a logical axis (major first); none where the body has the whole,
    /// because there is no mesh, no rule, or no manual computation.
    pub fn piece_axes(&self, logical: &str) -> Vec<String> {
        if self.0.borrow().manual { self.mesh_axes(logical) } else { Vec::new() }
    }

    /// The mesh axes that split a logical axis (major first); none without a mesh or a rule.
    pub fn mesh_axes(&self, logical: &str) -> Vec<String> {
        let Some((mesh, rules)) = self.sharding() else { return Vec::new() };
        let axes = rules.mesh_axes(logical).unwrap_or_default();
        axes.iter().filter(|axis| mesh.size(axis).is_some()).cloned().collect()
    }

    /// With `true`, the bodies of manual computations stand in line and have the whole of everything: for a partitioner that
    /// does not do well with them.
    pub fn without_manual(&self, without: bool) {
        self.0.borrow_mut().no_manual = without;
    }

    pub(crate) fn has_manual(&self) -> bool {
        !self.0.borrow().no_manual
    }

    /// Says which kernels the plugin knows; none at first.
    pub fn set_kernels(&self, names: &[&'static str]) {
        self.0.borrow_mut().kernels = names.to_vec();
    }

    /// True where calls of `name` go to a kernel.
    pub fn has_kernel(&self, name: &str) -> bool {
        self.0.borrow().kernels.contains(&name)
    }

    /// The mesh in use.
    pub fn mesh(&self) -> Option<Mesh> {
        self.sharding().map(|(mesh, _)| mesh)
    }

    pub(crate) fn sharding(&self) -> Option<(Mesh, Rules)> {
        self.0.borrow().sharding.clone()
    }

    /// Runs `build` with tensors taken for one device's pieces.
    pub(crate) fn in_manual<T>(&self, build: impl FnOnce() -> T) -> T {
        let outer = std::mem::replace(&mut self.0.borrow_mut().manual, true);
        let result = build();
        self.0.borrow_mut().manual = outer;
        result
    }

    /// The precision that dots made from now on ask of the hardware; [`Precision::Default`] at first.
    pub fn set_precision(&self, precision: Precision) {
        self.0.borrow_mut().precision = precision;
    }

    pub(crate) fn precision(&self) -> Precision {
        self.0.borrow().precision
    }

    /// Adds an argument. Arguments are passed in the order of these calls. Errors: a name used before, or a call inside
    /// a function, loop or branch.
    #[track_caller]
    pub fn arg(&self, name: &str, dtype: DType, shape: &[usize]) -> Tensor {
        self.arg_with(name, dtype, shape, ArgAttrs::default())
    }

    /// Adds an argument with attributes. Errors: those of [`Graph::arg`] and [`Rules::resolve`].
    #[track_caller]
    pub fn arg_with(&self, name: &str, dtype: DType, shape: &[usize], attrs: ArgAttrs<'_>) -> Tensor {
        let location = Location::caller();
        let aval = Aval::new(dtype, shape);
        if self.0.borrow().frames.len() > 1 {
            self.fail(
                location,
                format!("argument {name:?} is added inside a function, loop or branch: add it outside"),
            );
            return self.placeholder(aval);
        }
        if self.0.borrow().args.iter().any(|arg| arg.name == name) {
            self.fail(location, format!("argument {name:?} is added twice: names are unique"));
        }
        let sharding = match attrs.sharding {
            Some(logical) => self.resolve(location, name, logical, shape),
            None => self.whole(shape),
        };
        let tensor = self.placeholder(aval.clone());
        let mut state = self.0.borrow_mut();
        state.args.push(Arg { name: name.to_string(), aval, sharding, aliased_output: None });
        let body = &mut state.frame().body;
        body.args.push(tensor.id);
        body.values[tensor.id.index()].name = Some(name.to_string());
        drop(state);
        tensor
    }

    /// The layout of what every device has whole, if there is a mesh.
    fn whole(&self, shape: &[usize]) -> Option<Sharding> {
        self.sharding().map(|_| Sharding { dims: vec![Vec::new(); shape.len()] })
    }

    /// Resolves logical axes on the mesh in use, if there is one and a tensor is more than one device's piece.
    pub(crate) fn resolve(
        &self,
        location: &'static Location<'static>,
        what: &str,
        logical: &[&str],
        shape: &[usize],
    ) -> Option<Sharding> {
        let (mesh, rules) = self.sharding().filter(|_| !self.0.borrow().manual)?;
        let resolved = rules.resolve(&mesh, logical, shape);
        resolved.map_err(|error| self.fail(location, format!("{what:?}: {error}"))).ok()
    }

    /// Adds an output, whole on every device. Outputs come back in the order of these calls. Errors: a name used before.
    #[track_caller]
    pub fn output(&self, name: &str, value: &Tensor) {
        self.add_output(Location::caller(), name, value, self.whole(value.shape()));
    }

    /// Adds an output that is laid out over the mesh as these logical axes say. Errors: those of [`Graph::output`] and
    /// [`Rules::resolve`].
    #[track_caller]
    pub fn output_sharded(&self, name: &str, value: &Tensor, logical: &[&str]) {
        let location = Location::caller();
        let sharding = self.resolve(location, name, logical, value.shape());
        self.add_output(location, name, value, sharding);
    }

    /// Adds an output that takes over the memory (and the sharding) of argument `arg`, which is thereby donated.
    ///
    /// Errors: `arg` is not an argument, is of another type or shape, or is donated already.
    #[track_caller]
    pub fn output_aliased(&self, name: &str, value: &Tensor, arg: &Tensor) {
        let location = Location::caller();
        let mut state = self.0.borrow_mut();
        let index = state.outputs.len();
        let position = state.frames[0].body.args.iter().position(|&id| arg.frame == 0 && id == arg.id);
        let arg = position.and_then(|i| state.args.get_mut(i));
        let (sharding, problem) = match arg {
            None => {
                (None, Some("the second tensor is not an argument of the graph, so it has no memory to give".into()))
            }
            Some(arg) if arg.aval != *value.aval => {
                (None, Some(format!("{} cannot take over argument {:?}, which is {}", value.aval, arg.name, arg.aval)))
            }
            Some(arg) if arg.aliased_output.is_some() => {
                (None, Some(format!("argument {:?} is donated to another output already", arg.name)))
            }
            Some(arg) => {
                arg.aliased_output = Some(index);
                (arg.sharding.clone(), None)
            }
        };
        drop(state);
        if let Some(problem) = problem {
            self.fail(location, format!("output {name:?}: {problem}"));
        }
        self.add_output(location, name, value, sharding);
    }

    fn add_output(&self, location: &'static Location<'static>, name: &str, value: &Tensor, sharding: Option<Sharding>) {
        if self.0.borrow().frames.len() > 1 {
            return self
                .fail(location, format!("output {name:?} is added inside a function, loop or branch: return it"));
        }
        if self.0.borrow().outputs.iter().any(|(output, _)| output.name == name) {
            self.fail(location, format!("output {name:?} is added twice: names are unique"));
        }
        let id = self.adopt(location, &format!("output {name:?}"), value);
        let output = Output { name: name.to_string(), aval: (*value.aval).clone(), sharding };
        self.0.borrow_mut().outputs.push((output, id));
    }

    /// Opens a scope: until the guard is dropped, what is built is located under `name` (which may hold `/`).
    pub fn scope(&self, name: &str) -> Scope {
        let mut state = self.0.borrow_mut();
        let depth = state.scopes.len();
        state.scopes.push(name.to_string());
        Scope { graph: self.clone(), depth }
    }

    /// The values that [`Tensor::named`] was called on, in that order, as (scope/name, tensor): what a comparison of
    /// activations reads. Those inside functions, loops and branches are left out, as nothing outside can read them.
    pub fn taps(&self) -> Vec<(String, Tensor)> {
        let state = self.0.borrow();
        let taps = state.taps.iter().filter(|(_, frame, _)| *frame == 0);
        taps.map(|(name, _, id)| {
            let aval = state.frames[0].body.values[id.index()].aval.clone();
            (name.clone(), Tensor { graph: self.clone(), frame: 0, id: *id, aval })
        })
        .collect()
    }

    /// With `true`, [`Graph::call`] runs its closure in place each time instead of making a function: taps inside
    /// then work.
    pub fn inline_calls(&self, inline: bool) {
        self.0.borrow_mut().inline_calls = inline;
    }

    /// Calls a function of the module. `build` runs once per `name` and argument types; later calls reuse the function,
    /// so the same name must always come with the same computation. It sees only its arguments: a tensor from
    /// outside is an error.
    #[track_caller]
    pub fn call(&self, name: &str, args: &[&Tensor], build: impl FnOnce(&[Tensor]) -> Vec<Tensor>) -> Vec<Tensor> {
        let location = Location::caller();
        if self.0.borrow().inline_calls {
            return build(&args.iter().map(|&arg| arg.clone()).collect::<Vec<_>>());
        }
        let save = self.0.borrow().training.clone().unwrap_or_default();
        self.call_function(location, name, save, args, build)
    }

    /// [`Graph::call`] that is not put in line, with what its derivative keeps.
    pub(crate) fn call_function(
        &self,
        location: &'static Location<'static>,
        name: &str,
        save: Save,
        args: &[&Tensor],
        build: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Vec<Tensor> {
        let avals = args.iter().map(|arg| (*arg.aval).clone()).collect::<Vec<_>>();
        let key = (name.to_string(), save.clone(), avals);
        let known = self.0.borrow().calls.get(&key).cloned();
        let function = known.unwrap_or_else(|| {
            let body = self.trace(location, name, args, Some(name), build);
            let function = self.add_function(name, body);
            self.0.borrow_mut().calls.insert(key, function.clone());
            function
        });
        self.record(location, Rc::new(Call { function, save }), args)
    }

    /// A function of the module; the name is made unique.
    pub(crate) fn add_function(&self, name: &str, body: Body) -> Rc<Function> {
        let mut state = self.0.borrow_mut();
        let name = unique(&mut state.symbols, &symbol(name));
        let function = Rc::new(Function { name, body });
        state.functions.push(function.clone());
        function
    }

    /// The halves that `make` gives, made once for each key.
    pub(crate) fn cut_once(&self, key: HalvesKey, make: impl FnOnce() -> Cut) -> Rc<Cut> {
        let known = self.0.borrow().halves.get(&key).cloned();
        known.unwrap_or_else(|| {
            let cut = Rc::new(make());
            self.0.borrow_mut().halves.insert(key, cut.clone());
            cut
        })
    }

    /// Runs `build` on fresh arguments in a body of its own, and gives that body. `scope` replaces the open scopes.
    pub(crate) fn trace(
        &self,
        location: &'static Location<'static>,
        what: &str,
        args: &[&Tensor],
        scope: Option<&str>,
        build: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Body {
        let avals: Vec<_> = args.iter().map(|arg| (arg.name(), (*arg.aval).clone())).collect();
        self.trace_avals(location, what, &avals, scope, build)
    }

    /// [`Graph::trace`] with the arguments given by name and type.
    pub(crate) fn trace_avals(
        &self,
        location: &'static Location<'static>,
        what: &str,
        args: &[(Option<String>, Aval)],
        scope: Option<&str>,
        build: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Body {
        let outer_scopes = {
            let mut state = self.0.borrow_mut();
            let id = state.frames_made;
            state.frames_made += 1;
            state.frames.push(Frame { id, body: Body::default() });
            scope.map(|name| std::mem::replace(&mut state.scopes, vec![name.to_string()]))
        };
        let mut tensors = Vec::new();
        for (name, aval) in args {
            let tensor = self.placeholder(aval.clone());
            let mut state = self.0.borrow_mut();
            let body = &mut state.frame().body;
            body.args.push(tensor.id);
            // The last part of the caller's name: a function serves many layers, so "layers.0" would mislead.
            body.values[tensor.id.index()].name =
                name.as_ref().and_then(|name| name.rsplit(['/', '.']).next()).map(str::to_string);
            drop(state);
            tensors.push(tensor);
        }
        let results = build(&tensors);
        let results = results.iter().map(|tensor| self.adopt(location, what, tensor)).collect();
        let mut state = self.0.borrow_mut();
        if let Some(scopes) = outer_scopes {
            state.scopes = scopes;
        }
        let mut body = state.frames.pop().map(|frame| frame.body).unwrap_or_default();
        body.results = results;
        body
    }

    /// Adds an operation to the body that is open and gives its results: how every method of [`Tensor`] ends, and how
    /// a rewrite adds nodes.
    #[track_caller]
    pub fn apply(&self, op: impl Op, inputs: &[&Tensor]) -> Vec<Tensor> {
        self.record(Location::caller(), Rc::new(op), inputs)
    }

    /// Adds an operation with one result.
    #[track_caller]
    pub fn apply1(&self, op: impl Op, inputs: &[&Tensor]) -> Tensor {
        let results = self.record(Location::caller(), Rc::new(op), inputs);
        results.into_iter().next().unwrap_or_else(|| self.placeholder(Aval::new(DType::F32, &[])))
    }

    pub(crate) fn record(
        &self,
        location: &'static Location<'static>,
        op: Rc<dyn Op>,
        inputs: &[&Tensor],
    ) -> Vec<Tensor> {
        let name = op.info().name;
        debug_assert!(super::ops::ALL.iter().any(|info| info.name == name), "{name} is missing in ops::ALL");
        let ids: Vec<_> = inputs.iter().map(|tensor| self.adopt(location, name, tensor)).collect();
        let avals: Vec<&Aval> = inputs.iter().map(|tensor| &*tensor.aval).collect();
        let (least, most) = op.info().operands;
        let inferred = match avals.len() {
            n if n < least => Err(format!("needs at least {least} operands, found {n}")),
            n if n > most => Err(format!("needs at most {most} operands, found {n}")),
            _ => op.infer(&avals),
        };
        let outputs = match inferred {
            Ok(outputs) => outputs,
            Err(message) => {
                self.fail(location, format!("{name}: {message}"));
                let guess = avals.first().map_or(Aval::new(DType::F32, &[]), |&aval| aval.clone());
                return (0..op.result_count(avals.len())).map(|_| self.placeholder(guess.clone())).collect();
            }
        };
        let tensors: Vec<Tensor> = outputs.into_iter().map(|aval| self.placeholder(aval)).collect();
        let outputs = tensors.iter().map(|tensor| tensor.id).collect();
        let mut state = self.0.borrow_mut();
        let scope = state.scope_path().into();
        state.frame().body.nodes.push(Node { op, inputs: ids, outputs, scope, location });
        tensors
    }

    /// A value of the open body that no node computes: an argument, or what stands in after an error.
    pub(crate) fn placeholder(&self, aval: Aval) -> Tensor {
        let aval = Rc::new(aval);
        let mut state = self.0.borrow_mut();
        let frame = state.frame();
        let id = frame.body.add_shared(aval.clone());
        let frame = frame.id;
        drop(state);
        Tensor { graph: self.clone(), frame, id, aval }
    }

    /// The body that is open, as it is by now.
    pub(crate) fn open_body(&self) -> Body {
        self.0.borrow_mut().frame().body.clone()
    }

    /// A value of the open body.
    pub(crate) fn value(&self, id: ValueId) -> Tensor {
        let mut state = self.0.borrow_mut();
        let frame = state.frame();
        let (aval, frame) = (frame.body.values[id.index()].aval.clone(), frame.id);
        drop(state);
        Tensor { graph: self.clone(), frame, id, aval }
    }

    /// The values of the open body from this number on.
    pub(crate) fn values_from(&self, first: usize) -> Vec<Value> {
        self.0.borrow_mut().frame().body.values[first..].to_vec()
    }

    /// One more argument of the open body, which is that of a function.
    pub(crate) fn further_arg(&self, aval: Aval, name: Option<&str>) -> Tensor {
        let tensor = self.placeholder(aval);
        let mut state = self.0.borrow_mut();
        let body = &mut state.frame().body;
        body.args.push(tensor.id);
        body.values[tensor.id.index()].name = name.map(str::to_string);
        drop(state);
        tensor
    }

    /// Puts another op in the place of a node of the open body, which gives `extra` results after those that there are.
    pub(crate) fn amend(&self, at: usize, op: Rc<dyn Op>, extra: &[Aval]) -> Vec<ValueId> {
        let mut state = self.0.borrow_mut();
        let body = &mut state.frame().body;
        let ids: Vec<ValueId> = extra.iter().map(|aval| body.add(aval.clone())).collect();
        let node = &mut body.nodes[at];
        node.op = op;
        node.outputs.extend(&ids);
        ids
    }

    /// Runs `build` with `path` in place of the open scopes.
    pub(crate) fn in_scope<T>(&self, path: &str, build: impl FnOnce() -> T) -> T {
        let outer = std::mem::replace(&mut self.0.borrow_mut().scopes, vec![path.to_string()]);
        let result = build();
        self.0.borrow_mut().scopes = outer;
        result
    }

    /// The id of a tensor in the open body; a tensor of another body or graph is an error.
    pub(crate) fn adopt(&self, location: &'static Location<'static>, what: &str, tensor: &Tensor) -> ValueId {
        let problem = if !Rc::ptr_eq(&self.0, &tensor.graph.0) {
            "a tensor of another graph is used: build everything in one graph"
        } else if self.0.borrow_mut().frame().id != tensor.frame {
            "a tensor from outside is used in a function, loop or branch (or one from inside is used outside): \
             these are closed, pass it as an argument and return it as a result"
        } else {
            return tensor.id;
        };
        let name = tensor.name().map(|name| format!(" ({name})")).unwrap_or_default();
        self.fail(location, format!("{what}: {problem}{name}"));
        self.placeholder((*tensor.aval).clone()).id
    }

    /// Keeps the first error.
    pub(crate) fn fail(&self, location: &'static Location<'static>, message: String) {
        let mut state = self.0.borrow_mut();
        if state.error.is_none() {
            let scope = state.scope_path();
            state.error = Some(GraphError { location, scope, message });
        }
    }

    /// Records a mistake of the caller's, as the operations do: for functions whose arguments obey rules that no operation has.
    #[track_caller]
    pub fn reject(&self, message: &str) {
        self.fail(Location::caller(), message.to_string());
    }

    pub(crate) fn set_name(&self, tensor: &Tensor, name: &str) {
        let mut state = self.0.borrow_mut();
        let scope = state.scope_path();
        let path = if scope.is_empty() { name.to_string() } else { format!("{scope}/{name}") };
        state.taps.push((path, tensor.frame, tensor.id));
        if let Some(frame) = state.frames.iter_mut().find(|frame| frame.id == tensor.frame) {
            frame.body.values[tensor.id.index()].name = Some(name.to_string());
        }
    }

    pub(crate) fn name_of(&self, tensor: &Tensor) -> Option<String> {
        let state = self.0.borrow();
        let frame = state.frames.iter().find(|frame| frame.id == tensor.frame)?;
        frame.body.values.get(tensor.id.index())?.name.clone()
    }

    /// Copies the nodes of a body into the one that is open, with `args` in place of its arguments, and gives its
    /// results. `rewrite` sees each node with its new inputs and may give other results in its place: how a pass over
    /// a finished graph is written. Regions and functions inside are kept as they are.
    #[track_caller]
    pub fn replay(&self, body: &Body, args: &[Tensor], rewrite: &mut Rewrite<'_>) -> Vec<Tensor> {
        let location = Location::caller();
        if args.len() != body.args.len() {
            let message = format!("replay: the body has {} arguments, {} are given", body.args.len(), args.len());
            self.fail(location, message);
            return body.results.iter().map(|&id| self.placeholder(body.aval(id).clone())).collect();
        }
        let mut map: HashMap<ValueId, Tensor> = body.args.iter().copied().zip(args.iter().cloned()).collect();
        for node in &body.nodes {
            let inputs: Vec<Tensor> = node.inputs.iter().map(|id| map[id].clone()).collect();
            let results = rewrite(node, &inputs).unwrap_or_else(|| {
                let inputs: Vec<&Tensor> = inputs.iter().collect();
                let results = self.in_scope(&node.scope, || self.record(node.location, node.op.clone(), &inputs));
                for (result, id) in results.iter().zip(&node.outputs) {
                    if let Some(name) = &body.values[id.index()].name {
                        self.0.borrow_mut().frame().body.values[result.id.index()].name = Some(name.clone());
                    }
                }
                results
            });
            if results.len() != node.outputs.len() {
                let found = results.len();
                let message = format!("replay: {found} results for a node with {}", node.outputs.len());
                self.fail(node.location, message);
            }
            for (i, &id) in node.outputs.iter().enumerate() {
                let result = results.get(i).cloned();
                map.insert(id, result.unwrap_or_else(|| self.placeholder(body.aval(id).clone())));
            }
        }
        body.results.iter().map(|id| map[id].clone()).collect()
    }

    /// The finished module.
    ///
    /// Errors: the first mistake that was made, or a graph without outputs.
    #[track_caller]
    pub fn finish(&self) -> Result<Module, GraphError> {
        let location = Location::caller();
        if self.0.borrow().outputs.is_empty() {
            self.fail(location, "the graph has no outputs: add one with `output`".into());
        }
        let state = self.0.borrow();
        if let Some(error) = &state.error {
            return Err(error.clone());
        }
        let mut body = state.frames[0].body.clone();
        body.results = state.outputs.iter().map(|(_, id)| *id).collect();
        Ok(Module {
            name: state.name.clone(),
            kernels: state.kernels.clone(),
            mesh: state.sharding.as_ref().map(|(mesh, _)| mesh.clone()),
            args: state.args.clone(),
            outputs: state.outputs.iter().map(|(output, _)| output.clone()).collect(),
            body,
            functions: used(&state.frames[0].body, &state.functions),
        })
    }
}

/// The functions that a body calls, directly or not, in their order. Others are left over where a function was cut in two.
fn used(body: &Body, functions: &[Rc<Function>]) -> Vec<Rc<Function>> {
    fn visit(body: &Body, found: &mut HashSet<*const Body>) {
        for region in body.nodes.iter().flat_map(|node| node.op.regions()) {
            if found.insert(region) {
                visit(region, found);
            }
        }
    }
    let mut found = HashSet::new();
    visit(body, &mut found);
    functions.iter().filter(|function| found.contains(&(&raw const function.body))).cloned().collect()
}

impl State {
    /// The innermost open body.
    fn frame(&mut self) -> &mut Frame {
        self.frames.last_mut().expect("the entry function stays open")
    }

    fn scope_path(&self) -> String {
        self.scopes.iter().filter(|name| !name.is_empty()).map(String::as_str).collect::<Vec<_>>().join("/")
    }
}
