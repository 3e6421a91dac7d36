//! Calls of code that the plugin or the host program brings.

use std::rc::Rc;

use super::dot::DotGeneral;
use super::{Op, OpInfo, op_info};
use crate::graph::Kernel;
use crate::graph::aval::{Aval, join, list};
use crate::graph::emit::{Cx, quote};
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::module::Body;

/// An attribute that a handler reads by name.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Attr {
    Bool(bool),
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
    Str(String),
    I32s(Vec<i32>),
    I64s(Vec<i64>),
    F32s(Vec<f32>),
    F64s(Vec<f64>),
    Dict(Vec<(String, Attr)>),
}

impl Attr {
    /// The attribute in MLIR, with its type.
    fn mlir(&self) -> String {
        let array = |kind: &str, items: Vec<String>| match items.as_slice() {
            [] => format!("array<{kind}>"),
            items => format!("array<{kind}: {}>", join(items, ", ")),
        };
        match self {
            Attr::Bool(value) => value.to_string(),
            Attr::I32(value) => format!("{value} : i32"),
            Attr::I64(value) => format!("{value} : i64"),
            Attr::F32(value) => format!("{} : f32", f32_text(*value)),
            Attr::F64(value) => format!("{} : f64", f64_text(*value)),
            Attr::Str(value) => quote(value),
            Attr::I32s(values) => array("i32", values.iter().map(i32::to_string).collect()),
            Attr::I64s(values) => array("i64", values.iter().map(i64::to_string).collect()),
            Attr::F32s(values) => array("f32", values.iter().map(|&value| f32_text(value)).collect()),
            Attr::F64s(values) => array("f64", values.iter().map(|&value| f64_text(value)).collect()),
            Attr::Dict(entries) => dictionary(entries),
        }
    }
}

/// A float by its bits where it is not finite, in exponent form otherwise.
fn f32_text(value: f32) -> String {
    if value.is_finite() { exponent_form(format!("{value:e}")) } else { format!("0x{:08X}", value.to_bits()) }
}

/// As [`f32_text`].
fn f64_text(value: f64) -> String {
    if value.is_finite() { exponent_form(format!("{value:e}")) } else { format!("0x{:016X}", value.to_bits()) }
}

/// MLIR wants a point before the exponent.
fn exponent_form(text: String) -> String {
    match text.split_once('e') {
        Some((digits, exponent)) if !digits.contains('.') => format!("{digits}.0e{exponent}"),
        _ => text,
    }
}

/// `{a = 1 : i64, b = "x"}`.
fn dictionary(entries: &[(String, Attr)]) -> String {
    let entries: Vec<_> = entries.iter().map(|(name, value)| format!("{} = {}", quote(name), value.mlir())).collect();
    format!("{{{}}}", join(&entries, ", "))
}

/// A call of a handler registered with the plugin (XLA FFI, `api_version = 4`). Built with [`CustomCall::new`] and the
/// methods after it, added with `Graph::apply`.
#[derive(Clone, Debug)]
pub struct CustomCall {
    /// The name that the handler is registered under.
    pub target: String,
    /// Element types and shapes of the results.
    pub results: Vec<Aval>,
    /// What the handler reads by name.
    pub attrs: Vec<(String, Attr)>,
    /// Whether the call must stay even where its results are not used.
    pub has_side_effect: bool,
    /// (result, operand) pairs that share one buffer.
    pub aliases: Vec<(usize, usize)>,
    /// Layouts; `None` is row by row, as the compiler gives a handler by default.
    pub layouts: Option<Layouts>,
    /// What the call computes, in other ops, where that is known: its derivative is that of these.
    pub definition: Option<Rc<Body>>,
    /// The kernel of its derivative: [`Kernel::gradient`].
    pub gradient: Option<&'static str>,
}

/// For each operand and each result of a [`CustomCall`] its axes from the fastest to the slowest.
#[derive(Clone, Debug)]
pub struct Layouts {
    /// One layout per operand.
    pub operands: Vec<Vec<usize>>,
    /// One layout per result.
    pub results: Vec<Vec<usize>>,
}

op_info!(CustomCall, 0.., "custom_call", "a call of a handler registered with the plugin");

impl CustomCall {
    /// A call of `target` with results of these types.
    pub fn new(target: &str, results: Vec<Aval>) -> CustomCall {
        let (attrs, aliases) = (Vec::new(), Vec::new());
        let (target, layouts, definition, gradient) = (target.to_string(), None, None, None);
        CustomCall { target, results, attrs, has_side_effect: false, aliases, layouts, definition, gradient }
    }

    /// Whether dot products are in its definition.
    pub(crate) fn multiplies(&self) -> bool {
        let nodes = self.definition.iter().flat_map(|body| &body.nodes);
        nodes.into_iter().any(|node| node.op.downcast_ref::<DotGeneral>().is_some())
    }

    /// Adds an attribute.
    pub fn attr(mut self, name: &str, value: Attr) -> CustomCall {
        self.attrs.push((name.to_string(), value));
        self
    }

    /// Keeps the call even where its results are not used.
    pub fn with_side_effect(mut self) -> CustomCall {
        self.has_side_effect = true;
        self
    }

    /// Lets `result` take over the buffer of `operand`, so the handler updates it in place.
    pub fn alias(mut self, result: usize, operand: usize) -> CustomCall {
        self.aliases.push((result, operand));
        self
    }

    /// Gives each operand and each result a layout: its axes from the fastest to the slowest.
    pub fn with_layouts(mut self, operands: Vec<Vec<usize>>, results: Vec<Vec<usize>>) -> CustomCall {
        self.layouts = Some(Layouts { operands, results });
        self
    }
}

/// A layout must be an order of the axes.
fn check_layouts<'a>(
    what: &str,
    layouts: &[Vec<usize>],
    avals: impl ExactSizeIterator<Item = &'a Aval>,
) -> Result<(), String> {
    if layouts.len() != avals.len() {
        return Err(format!("{} layouts for {} {what}s", layouts.len(), avals.len()));
    }
    for (i, (layout, aval)) in layouts.iter().zip(avals).enumerate() {
        let mut sorted = layout.clone();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..aval.rank()) {
            return Err(format!("layout {layout:?} of {what} {i} is not an order of the axes of {aval}"));
        }
    }
    Ok(())
}

/// `[dense<[1, 0]> : tensor<2xindex>]`.
fn layouts_attr(layouts: &[Vec<usize>]) -> String {
    let one = |layout: &Vec<usize>| match layout.as_slice() {
        [] => "dense<> : tensor<0xindex>".to_string(),
        axes => format!("dense<{}> : tensor<{}xindex>", list(axes), axes.len()),
    };
    list(&layouts.iter().map(one).collect::<Vec<_>>())
}

impl Op for CustomCall {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        for &(result, operand) in &self.aliases {
            let (Some(to), Some(&from)) = (self.results.get(result), inputs.get(operand)) else {
                return Err(format!(
                    "{}: alias of result {result} and operand {operand}: there is no such one",
                    self.target
                ));
            };
            if to != from {
                return Err(format!(
                    "{}: result {result} is {to}, operand {operand} is {from}: they share a buffer",
                    self.target
                ));
            }
        }
        if let Some(Layouts { operands, results }) = &self.layouts {
            check_layouts("operand", operands, inputs.iter().copied())?;
            check_layouts("result", results, self.results.iter())?;
        }
        Ok(self.results.clone())
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let mut attrs =
            vec!["api_version = 4 : i32".to_string(), format!("backend_config = {}", dictionary(&self.attrs))];
        if self.has_side_effect {
            attrs.push("has_side_effect = true".into());
        }
        if let Some(Layouts { operands, results }) = &self.layouts {
            attrs.push(format!("operand_layouts = {}", layouts_attr(operands)));
            attrs.push(format!("result_layouts = {}", layouts_attr(results)));
        }
        if !self.aliases.is_empty() {
            let alias = |&(result, operand): &(usize, usize)| {
                let result = if self.results.len() == 1 { String::new() } else { result.to_string() };
                format!(
                    "#stablehlo.output_operand_alias<output_tuple_indices = [{result}], \
                     operand_index = {operand}, operand_tuple_indices = []>"
                )
            };
            attrs.push(format!(
                "output_operand_aliases = {}",
                list(&self.aliases.iter().map(alias).collect::<Vec<_>>())
            ));
        }
        let (target, attrs) = (quote(&self.target), join(&attrs, ", "));
        format!("stablehlo.custom_call @{target}({}) {{{attrs}}} : {}", cx.operands(), cx.signature())
    }

    fn result_count(&self, _inputs: usize) -> usize {
        self.results.len()
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        match (self.definition.clone(), self.gradient) {
            (Some(body), Some(gradient)) if cx.graph().has_kernel(gradient) => {
                cx.by_kernel(Kernel::new(gradient).with_attrs(self.attrs.clone()), &body)
            }
            (Some(body), _) => cx.through(&body),
            (None, _) => Err(format!("what the handler {:?} computes is not known here", self.target)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::{F32, I32};
    use crate::graph::testing::{error, last_line};

    #[test]
    fn text() {
        let text = last_line(|g| {
            let x = g.arg("x", F32, &[2, 3]);
            let call = CustomCall::new("my.kernel", vec![x.aval().clone(), Aval::new(I32, &[])])
                .attr("n", Attr::I64(3))
                .attr("eps", Attr::F32(1e-5))
                .attr("name", Attr::Str("a\"b".into()))
                .attr("sizes", Attr::I64s(vec![1, 2]))
                .attr("more", Attr::Dict(vec![("on".into(), Attr::Bool(true))]))
                .alias(0, 0)
                .with_layouts(vec![vec![0, 1]], vec![vec![0, 1], vec![]])
                .with_side_effect();
            g.apply(call, &[&x])
        });
        assert_eq!(
            text,
            "%custom_call, %custom_call_1 = stablehlo.custom_call @\"my.kernel\"(%x) {api_version = 4 : i32, backend_config = {\"n\" = 3 : i64, \"eps\" = 1.0e-5 : f32, \"name\" = \"a\\\"b\", \"sizes\" = array<i64: 1, 2>, \"more\" = {\"on\" = true}}, has_side_effect = true, operand_layouts = [dense<[0, 1]> : tensor<2xindex>], result_layouts = [dense<[0, 1]> : tensor<2xindex>, dense<> : tensor<0xindex>], output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [0], operand_index = 0, operand_tuple_indices = []>]} : (tensor<2x3xf32>) -> (tensor<2x3xf32>, tensor<i32>)"
        );
    }

    #[test]
    fn errors() {
        let call = |call: CustomCall| error(|g| g.apply(call, &[&g.arg("x", F32, &[2, 3])]));
        let one = || CustomCall::new("f", vec![Aval::new(F32, &[3])]);
        assert_eq!(
            call(one().alias(0, 0)),
            "custom_call: f: result 0 is f32[3], operand 0 is f32[2,3]: they share a buffer"
        );
        assert!(call(one().alias(1, 0)).contains("there is no such one"));
        assert!(
            call(one().with_layouts(vec![vec![0]], vec![vec![0]])).contains("not an order of the axes of f32[2,3]")
        );
        assert!(call(one().with_layouts(vec![], vec![vec![0]])).contains("0 layouts for 1 operands"));
    }
}
