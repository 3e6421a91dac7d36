//! StableHLO text of a module: deterministic, with readable value names and locations.

use std::cell::Cell;
use std::collections::HashMap;

use super::aval::{Aval, join};
use super::module::{Body, Function, Module, Node};
use super::sharding::{Mesh, Sharding};

/// Which partitioner the sharding is written for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Emission {
    /// `sdy.mesh` and `sdy.sharding`.
    #[default]
    Shardy,
    /// `mhlo.sharding` strings and `@Sharding` custom calls, for plugins without Shardy.
    Gspmd,
}

/// The whole module.
pub(crate) fn module(module: &Module, emission: Emission) -> String {
    let mut text = format!("module @{}", symbol(&module.name));
    if let Some(mesh) = &module.mesh {
        text += &format!(" attributes {{mhlo.num_partitions = {} : i32, mhlo.num_replicas = 1 : i32}}", mesh.devices());
    }
    text += " {\n";
    if let (Some(mesh), Emission::Shardy) = (&module.mesh, emission) {
        text += &format!("  {}\n", mesh.shardy());
    }
    let channels = Cell::new(0);
    text += &entry(module, emission, &channels);
    for function in &module.functions {
        text += &private(module, function, emission, &channels);
    }
    text + "}\n"
}

/// The entry function, `@main`.
fn entry(module: &Module, emission: Emission, channels: &Cell<u32>) -> String {
    let mut emitter = Emitter::new(module, emission, channels);
    let ids = emitter.body_args(&module.body);
    let sharding = |sharding: &Option<Sharding>| {
        let mesh = module.mesh.as_ref()?;
        Some(sharding_attr(sharding.as_ref()?, mesh, emission))
    };
    let mut args = Vec::new();
    for (arg, id) in module.args.iter().zip(&ids) {
        let alias = arg.aliased_output.map(|output| format!("tf.aliasing_output = {output} : i32"));
        let attrs = attributes([sharding(&arg.sharding), alias]);
        args.push(format!("{id}: {}{attrs} loc({})", arg.aval.mlir(), quote(&arg.name)));
    }
    let mut results = Vec::new();
    for output in &module.outputs {
        let info = format!("jax.result_info = {}", quote(&output.name));
        let attrs = attributes([Some(info), sharding(&output.sharding)]);
        results.push(format!("{}{attrs}", output.aval.mlir()));
    }
    let body = emitter.block(&module.body, ids, "return");
    format!("  func.func public @main({}) -> ({}) {{\n{body}  }}\n", join(&args, ", "), join(&results, ", "))
}

/// A private function.
fn private(module: &Module, function: &Function, emission: Emission, channels: &Cell<u32>) -> String {
    let mut emitter = Emitter::new(module, emission, channels);
    let ids = emitter.body_args(&function.body);
    let args: Vec<_> = function
        .body
        .args
        .iter()
        .zip(&ids)
        .map(|(&arg, id)| format!("{id}: {}", function.body.aval(arg).mlir()))
        .collect();
    let results: Vec<_> = function.body.results.iter().map(|&id| function.body.aval(id).mlir()).collect();
    let body = emitter.block(&function.body, ids, "return");
    format!(
        "  func.func private @{}({}) -> ({}) {{\n{body}  }}\n",
        function.name,
        join(&args, ", "),
        join(&results, ", ")
    )
}

/// The attribute that lays an argument or result out.
pub(crate) fn sharding_attr(sharding: &Sharding, mesh: &Mesh, emission: Emission) -> String {
    match emission {
        Emission::Shardy => format!("sdy.sharding = #sdy.sharding<@mesh, {}>", sharding.shardy()),
        Emission::Gspmd => format!("mhlo.sharding = \"{}\"", sharding.gspmd(mesh)),
    }
}

/// ` {a, b}`, or nothing.
fn attributes<const N: usize>(attrs: [Option<String>; N]) -> String {
    let attrs: Vec<_> = attrs.into_iter().flatten().collect();
    if attrs.is_empty() { String::new() } else { format!(" {{{}}}", join(&attrs, ", ")) }
}

/// Writes the inside of one function: value names are unique within it.
struct Emitter<'a> {
    mesh: Option<&'a Mesh>,
    kernels: &'a [&'static str],
    emission: Emission,
    /// Channels handed out so far, in the whole module.
    channels: &'a Cell<u32>,
    used: HashMap<String, usize>,
    indent: usize,
}

impl<'a> Emitter<'a> {
    fn new(module: &'a Module, emission: Emission, channels: &'a Cell<u32>) -> Emitter<'a> {
        let (mesh, kernels) = (module.mesh.as_ref(), module.kernels.as_slice());
        Emitter { mesh, kernels, emission, channels, used: HashMap::new(), indent: 2 }
    }

    /// A value name that is not in use in this function.
    fn fresh(&mut self, name: &str) -> String {
        format!("%{}", unique(&mut self.used, &symbol(name)))
    }

    /// Names for the arguments of a body.
    fn body_args(&mut self, body: &Body) -> Vec<String> {
        let names = body.args.iter().map(|id| body.values[id.index()].name.as_deref().unwrap_or("arg"));
        names.map(|name| self.fresh(name)).collect()
    }

    /// The nodes of a body, one a line, and the line that returns its results.
    fn block(&mut self, body: &Body, args: Vec<String>, terminator: &str) -> String {
        let mut text = String::new();
        let results = self.nodes(body, args, &mut text);
        let values = join(&results, ", ");
        let types: Vec<_> = body.results.iter().map(|&id| body.aval(id).mlir()).collect();
        let pad = self.pad();
        if results.is_empty() {
            return text + &format!("{pad}{terminator}\n");
        }
        text + &format!("{pad}{terminator} {values} : {}\n", join(&types, ", "))
    }

    /// Writes the nodes of a body and gives the names of its results.
    fn nodes(&mut self, body: &Body, args: Vec<String>, text: &mut String) -> Vec<String> {
        let mut names: Vec<String> = vec![String::new(); body.values.len()];
        for (id, name) in body.args.iter().zip(args) {
            names[id.index()] = name;
        }
        for node in &body.nodes {
            self.node(body, node, &mut names, text);
        }
        body.results.iter().map(|id| names[id.index()].clone()).collect()
    }

    fn node(&mut self, body: &Body, node: &Node, names: &mut [String], text: &mut String) {
        if let Some(i) = node.op.passes() {
            names[node.outputs[0].index()] = names[node.inputs[i].index()].clone();
            return;
        }
        let operands = node.inputs.iter().map(|id| names[id.index()].clone()).collect();
        let mut given = None;
        for id in &node.outputs {
            let name = body.values[id.index()].name.as_deref();
            given = given.or(name);
            names[id.index()] = self.fresh(name.unwrap_or(node.op.info().name));
        }
        let results: Vec<String> = node.outputs.iter().map(|id| names[id.index()].clone()).collect();
        let mut cx = Cx {
            operands,
            results: results.clone(),
            inputs: node.inputs.iter().map(|&id| body.aval(id)).collect(),
            outputs: node.outputs.iter().map(|&id| body.aval(id)).collect(),
            prologue: String::new(),
            emitter: self,
        };
        let op = node.op.stablehlo(&mut cx);
        *text += &cx.prologue;
        if op.is_empty() {
            return;
        }
        let name = given.unwrap_or(node.op.info().name);
        let path = if node.scope.is_empty() { name.to_string() } else { format!("{}/{name}", node.scope) };
        let left = if results.is_empty() { String::new() } else { format!("{} = ", join(&results, ", ")) };
        *text += &format!("{}{left}{op} loc({})\n", self.pad(), quote(&path));
    }
}

/// What an op sees when it writes its text: the names and types of its operands and results.
pub struct Cx<'a, 'm> {
    operands: Vec<String>,
    results: Vec<String>,
    inputs: Vec<&'a Aval>,
    outputs: Vec<&'a Aval>,
    prologue: String,
    emitter: &'a mut Emitter<'m>,
}

impl Emitter<'_> {
    fn pad(&self) -> String {
        "  ".repeat(self.indent)
    }
}

impl Cx<'_, '_> {
    /// Name of an operand, with its `%`.
    pub fn operand(&self, i: usize) -> &str {
        &self.operands[i]
    }

    /// All operand names, `%a, %b`.
    pub fn operands(&self) -> String {
        join(&self.operands, ", ")
    }

    /// Names of the operands from `start` on.
    pub fn operands_from(&self, start: usize) -> String {
        join(&self.operands[start..], ", ")
    }

    /// Name of a result, for an op that writes its own lines with [`Cx::before`] (and then gives an empty text).
    pub fn result(&self, i: usize) -> &str {
        &self.results[i]
    }

    /// An operand's element type and shape.
    pub fn input(&self, i: usize) -> &Aval {
        self.inputs[i]
    }

    /// A result's element type and shape.
    pub fn output(&self, i: usize) -> &Aval {
        self.outputs[i]
    }

    /// A result's type.
    pub fn output_type(&self, i: usize) -> String {
        self.outputs[i].mlir()
    }

    /// `(operand types) -> result types`.
    pub fn signature(&self) -> String {
        let inputs: Vec<_> = self.inputs.iter().map(|aval| aval.mlir()).collect();
        format!("({}) -> {}", join(&inputs, ", "), self.result_types())
    }

    /// The result types: one alone, several in parentheses.
    pub fn result_types(&self) -> String {
        let outputs: Vec<_> = self.outputs.iter().map(|aval| aval.mlir()).collect();
        if outputs.len() == 1 { join(&outputs, ", ") } else { format!("({})", join(&outputs, ", ")) }
    }

    /// A fresh value name, for text inside a region of the op.
    pub fn fresh(&mut self, name: &str) -> String {
        self.emitter.fresh(name)
    }

    /// Value names for the arguments of a body.
    pub fn args(&mut self, body: &Body) -> Vec<String> {
        self.emitter.body_args(body)
    }

    /// The region of a body, braces and block arguments included, that ends in the given return op.
    pub fn region(&mut self, body: &Body, terminator: &str) -> String {
        let args = self.args(body);
        let typed = body.args.iter().zip(&args).map(|(&arg, name)| format!("{name}: {}", body.aval(arg).mlir()));
        let head = format!("{}^bb0({}):\n", self.pad(), join(&typed.collect::<Vec<_>>(), ", "));
        self.braces(&head, body, &args, terminator)
    }

    /// The region of a body without block arguments, which reads these values in their place.
    pub fn region_reading(&mut self, body: &Body, args: &[String], terminator: &str) -> String {
        self.braces("", body, args, terminator)
    }

    fn braces(&mut self, head: &str, body: &Body, args: &[String], terminator: &str) -> String {
        let pad = self.pad();
        self.emitter.indent += 1;
        let block = self.emitter.block(body, args.to_vec(), terminator);
        self.emitter.indent -= 1;
        format!("{{\n{head}{block}{pad}}}")
    }

    /// Writes the nodes of a body before the op, reading these values in place of its arguments, and gives
    /// the names of its results.
    pub fn inline(&mut self, body: &Body, args: &[String]) -> Vec<String> {
        self.emitter.nodes(body, args.to_vec(), &mut self.prologue)
    }

    /// A channel number that no other collective of the module has.
    pub fn channel(&mut self) -> u32 {
        self.emitter.channels.set(self.emitter.channels.get() + 1);
        self.emitter.channels.get()
    }

    /// A line to be written before the op.
    pub fn before(&mut self, line: &str) {
        let pad = self.emitter.pad();
        self.prologue += &format!("{pad}{line}\n");
    }

    /// Number of operands.
    pub fn operand_count(&self) -> usize {
        self.inputs.len()
    }

    /// The spaces that a line of this op begins with.
    pub fn pad(&self) -> String {
        self.emitter.pad()
    }

    /// The mesh, where one was set.
    pub fn mesh(&self) -> Option<&Mesh> {
        self.emitter.mesh
    }

    /// True where the plugin knows this kernel.
    pub fn has_kernel(&self, name: &str) -> bool {
        self.emitter.kernels.contains(&name)
    }

    /// The partitioner that the text is for.
    pub fn emission(&self) -> Emission {
        self.emitter.emission
    }
}

/// A legal MLIR identifier that reads like `name`.
pub(crate) fn symbol(name: &str) -> String {
    let mut text: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '_' }).collect();
    if text.is_empty() || text.starts_with(|c: char| c.is_ascii_digit()) {
        text.insert(0, '_');
    }
    text
}

/// `name`, or `name_1`, `name_2`, … where it is in use; `used` counts the uses of each name.
pub(crate) fn unique(used: &mut HashMap<String, usize>, name: &str) -> String {
    let mut text = name.to_string();
    while used.contains_key(&text) {
        let count = used.entry(name.to_string()).or_insert(0);
        *count += 1;
        text = format!("{name}_{count}");
    }
    used.insert(text.clone(), 0);
    text
}

/// A string literal of MLIR.
pub(crate) fn quote(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_ascii_control() => quoted += &format!("\\{:02X}", c as u32),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}
