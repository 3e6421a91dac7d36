//! Computations written for one device's pieces.

use std::panic::Location;

use super::reduce::Fold;
use super::{Op, OpInfo, op_info};
use crate::graph::aval::{Aval, join, list};
use crate::graph::emit::{Cx, Emission, sharding_attr};
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::graph::Graph;
use crate::graph::module::Body;
use crate::graph::sharding::{Mesh, Sharding, quoted};
use crate::graph::tensor::Tensor;

/// A body that runs on each device with its pieces of the operands, all mesh axes being manual.
#[derive(Clone, Debug)]
pub struct ManualComputation {
    /// The mesh.
    pub mesh: Mesh,
    /// How each operand is cut into pieces.
    pub inputs: Vec<Sharding>,
    /// How each result is made of pieces.
    pub outputs: Vec<Sharding>,
    /// From pieces to pieces.
    pub body: Body,
}

op_info!(ManualComputation, 0.., "manual_computation", "a body that sees one device's pieces");

impl Op for ManualComputation {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        for (i, ((x, sharding), &arg)) in inputs.iter().zip(&self.inputs).zip(&self.body.args).enumerate() {
            let piece = Aval::new(x.dtype, &sharding.local_shape(&self.mesh, &x.shape));
            if piece != *self.body.aval(arg) {
                return Err(format!("operand {i} has pieces {piece}, the body takes {}", self.body.aval(arg)));
            }
        }
        let (results, given) = (self.body.results.len(), self.outputs.len());
        if results != given {
            return Err(format!("the body has {results} results, {given} shardings are given"));
        }
        let mut avals = Vec::new();
        for (i, (&id, sharding)) in self.body.results.iter().zip(&self.outputs).enumerate() {
            let piece = self.body.aval(id);
            if piece.rank() != sharding.dims.len() {
                return Err(format!("result {i} is {piece}, its sharding {sharding} has {} axes", sharding.dims.len()));
            }
            avals.push(Aval::new(piece.dtype, &sharding.global_shape(&self.mesh, &piece.shape)));
        }
        Ok(avals)
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        match cx.emission() {
            Emission::Shardy => self.shardy(cx),
            Emission::Gspmd => self.gspmd(cx),
        }
    }

    fn result_count(&self, _inputs: usize) -> usize {
        self.outputs.len()
    }

    fn regions(&self) -> Vec<&Body> {
        vec![&self.body]
    }

    /// The derivative of the body, again for pieces; the forward values are computed once more, as far as they are read. A
    /// result that several devices have the same of stands for all their copies, so each has a share of its cotangent; an
    /// operand that several devices have the same of has the sum of theirs.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let location = Location::caller();
        let graph = cx.graph().clone();
        let given = cx.with_cotangents();
        let wanted = cx.wanted();
        let cotangents: Vec<Tensor> = given.iter().map(|&i| cx.cotangent(i)).collect();
        let operands: Vec<Tensor> = (0..cx.operand_count()).map(|i| cx.input(i)).collect();
        let pieces = |sharding: &Sharding, whole: &Tensor| {
            (None, Aval::new(whole.dtype(), &sharding.local_shape(&self.mesh, whole.shape())))
        };
        let avals: Vec<(Option<String>, Aval)> = (given.iter().zip(&cotangents))
            .map(|(&i, ct)| pieces(&self.outputs[i], ct))
            .chain(self.inputs.iter().zip(&operands).map(|(sharding, x)| pieces(sharding, x)))
            .collect();
        let body = graph.in_manual(|| {
            graph.trace_avals(location, "manual_computation", &avals, None, |args| {
                let (cotangents, operands) = args.split_at(given.len());
                let share = |(&i, ct): (&usize, &Tensor)| {
                    let same: usize =
                        self.without(&self.outputs[i]).iter().map(|axis| graph.devices_along(axis)).product();
                    if same == 1 { ct.clone() } else { ct * (1.0 / same as f64) }
                };
                let shares: Vec<Tensor> = given.iter().zip(cotangents).map(share).collect();
                let found = graph.pulled_back(&self.body, operands, &given, &shares, &wanted);
                let total = |(&i, ct): (&usize, Tensor)| match self.without(&self.inputs[i]).as_slice() {
                    [] => ct,
                    axes => ct.all_reduce(Fold::Sum, &axes.iter().map(String::as_str).collect::<Vec<_>>()),
                };
                wanted.iter().zip(found).map(total).collect()
            })
        });
        let inputs = given.iter().map(|&i| self.outputs[i].clone()).chain(self.inputs.clone()).collect();
        let outputs = wanted.iter().map(|&i| self.inputs[i].clone()).collect();
        let op = ManualComputation { mesh: self.mesh.clone(), inputs, outputs, body };
        let found = graph.apply(op, &cotangents.iter().chain(&operands).collect::<Vec<_>>());
        cx.placed(&wanted, found)
    }
}

impl ManualComputation {
    /// The mesh axes, of more than one device, along which all devices have the same piece.
    fn without(&self, sharding: &Sharding) -> Vec<String> {
        let used = |name: &String| sharding.dims.iter().flatten().any(|axis| axis == name);
        let axes = self.mesh.axes().iter().filter(|(name, size)| *size > 1 && !used(name));
        axes.map(|(name, _)| name.clone()).collect()
    }

    fn shardy(&self, cx: &mut Cx<'_, '_>) -> String {
        let shardings = |all: &[Sharding]| {
            list(&all.iter().map(|sharding| format!("<@mesh, {}>", sharding.shardy())).collect::<Vec<_>>())
        };
        let names: Vec<String> = self.mesh.axes().iter().map(|(name, _)| name.clone()).collect();
        let args = cx.args(&self.body);
        let typed: Vec<String> = args
            .iter()
            .zip(&self.body.args)
            .map(|(name, &id)| format!("{name}: {}", self.body.aval(id).mlir()))
            .collect();
        let region = cx.region_reading(&self.body, &args, "sdy.return");
        format!(
            "sdy.manual_computation({}) in_shardings={} out_shardings={} manual_axes={{{}}} ({}) {region} : {}",
            cx.operands(),
            shardings(&self.inputs),
            shardings(&self.outputs),
            join(&quoted(&names), ", "),
            join(&typed, ", "),
            cx.signature()
        )
    }

    /// GSPMD has no region: the operands are cut by custom calls, the body stands in line, and the results are
    /// joined by custom calls.
    fn gspmd(&self, cx: &mut Cx<'_, '_>) -> String {
        let call = |name: &str, x: &str, attr: &str, from: &Aval, to: &Aval| {
            format!("stablehlo.custom_call @{name}({x}) {{{attr}}} : ({}) -> {}", from.mlir(), to.mlir())
        };
        let manual = "mhlo.sharding = \"{manual}\"";
        let mut pieces = Vec::new();
        for (i, (sharding, &id)) in self.inputs.iter().zip(&self.body.args).enumerate() {
            let whole = cx.input(i).clone();
            let (laid, piece) = (cx.fresh("laid_out"), cx.fresh("piece"));
            let attr = sharding_attr(sharding, &self.mesh, Emission::Gspmd);
            cx.before(&format!("{laid} = {}", call("Sharding", cx.operand(i), &attr, &whole, &whole)));
            cx.before(&format!(
                "{piece} = {}",
                call("SPMDFullToShardShape", &laid, manual, &whole, self.body.aval(id))
            ));
            pieces.push(piece);
        }
        let results = cx.inline(&self.body, &pieces);
        for (i, (sharding, &id)) in self.outputs.iter().zip(&self.body.results).enumerate() {
            let (piece, whole) = (self.body.aval(id), cx.output(i).clone());
            let laid = cx.fresh("laid_out");
            let attr = sharding_attr(sharding, &self.mesh, Emission::Gspmd);
            cx.before(&format!("{laid} = {}", call("Sharding", &results[i], manual, piece, piece)));
            let joined = call("SPMDShardToFullShape", &laid, &attr, piece, &whole);
            cx.before(&format!("{} = {joined}", cx.result(i)));
        }
        String::new()
    }
}

impl Graph {
    /// Runs `body` on each device with its pieces of the inputs: each is given with the logical names of its axes,
    /// and so is each result. The body sees only its arguments and talks to other devices through collectives;
    /// [`Tensor::shard`] has no effect in it. A result that is not split along a mesh axis must be the same on all
    /// devices of that axis. Without a mesh, or after
    /// [`Graph::without_manual`], there is one piece, and the body stands in line. Errors: those of
    /// [`Rules::resolve`](crate::graph::Rules::resolve).
    #[track_caller]
    pub fn manual_computation(
        &self,
        inputs: &[(&Tensor, &[&str])],
        outputs: &[&[&str]],
        body: impl FnOnce(&[Tensor]) -> Vec<Tensor>,
    ) -> Vec<Tensor> {
        let location = Location::caller();
        let Some((mesh, rules)) = self.sharding().filter(|_| self.has_manual()) else {
            return body(&inputs.iter().map(|(x, _)| (*x).clone()).collect::<Vec<_>>());
        };
        let cut = inputs.iter().map(|(x, logical)| rules.resolve(&mesh, logical, x.shape()));
        let joined = outputs.iter().map(|logical| rules.axes(&mesh, logical));
        let (cut, joined) = match (cut.collect::<Result<Vec<_>, _>>(), joined.collect::<Result<Vec<_>, _>>()) {
            (Ok(cut), Ok(joined)) => (cut, joined),
            (Err(error), _) | (_, Err(error)) => {
                self.fail(location, format!("manual_computation: {error}"));
                return inputs.iter().map(|(x, _)| (*x).clone()).take(outputs.len()).collect();
            }
        };
        let pieces: Vec<_> = inputs
            .iter()
            .zip(&cut)
            .map(|((x, _), sharding)| (x.name(), Aval::new(x.dtype(), &sharding.local_shape(&mesh, x.shape()))))
            .collect();
        let body = self.in_manual(|| self.trace_avals(location, "manual_computation", &pieces, None, body));
        let tensors: Vec<&Tensor> = inputs.iter().map(|(x, _)| *x).collect();
        self.apply(ManualComputation { mesh, inputs: cut, outputs: joined, body }, &tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::F32;
    use crate::graph::Rules;
    use crate::graph::testing::error;

    fn doubled(emission: Emission) -> String {
        let g = Graph::new("test");
        g.set_mesh(Mesh::new([("data", 2), ("model", 4)]).unwrap(), Rules::new(&[("batch", &["data"])]));
        let x = g.arg("x", F32, &[8, 3]);
        let y = g.manual_computation(&[(&x, &["batch", ""])], &[&["batch", ""]], |a| {
            // Inside, a tensor is one device's piece: a constraint says nothing.
            vec![(&a[0] + &a[0]).shard(["batch", ""])]
        });
        assert_eq!(y[0].shape(), [8, 3]);
        g.output("y", &y[0]);
        let text = g.finish().unwrap().stablehlo_with(emission);
        text.lines()
            .skip_while(|line| !line.contains("func.func"))
            .skip(1)
            .map(|line| line.trim().to_string() + "\n")
            .collect()
    }

    #[test]
    fn shardy() {
        assert_eq!(
            doubled(Emission::Shardy),
            "%manual_computation = sdy.manual_computation(%x) in_shardings=[<@mesh, [{\"data\"}, {}]>] out_shardings=[<@mesh, [{\"data\"}, {}]>] manual_axes={\"data\", \"model\"} (%x_1: tensor<4x3xf32>) {\n%add = stablehlo.add %x_1, %x_1 : tensor<4x3xf32> loc(\"add\")\nsdy.return %add : tensor<4x3xf32>\n} : (tensor<8x3xf32>) -> tensor<8x3xf32> loc(\"manual_computation\")\nreturn %manual_computation : tensor<8x3xf32>\n}\n}\n"
        );
    }

    #[test]
    fn gspmd() {
        let text = doubled(Emission::Gspmd);
        let tiles = "{devices=[2,1,4]<=[8] last_tile_dim_replicate}";
        assert_eq!(
            text.lines().take(5).collect::<Vec<_>>(),
            [
                &format!(
                    "%laid_out = stablehlo.custom_call @Sharding(%x) {{mhlo.sharding = \"{tiles}\"}} : (tensor<8x3xf32>) -> tensor<8x3xf32>"
                ),
                "%piece = stablehlo.custom_call @SPMDFullToShardShape(%laid_out) {mhlo.sharding = \"{manual}\"} : (tensor<8x3xf32>) -> tensor<4x3xf32>",
                "%add = stablehlo.add %piece, %piece : tensor<4x3xf32> loc(\"add\")",
                "%laid_out_1 = stablehlo.custom_call @Sharding(%add) {mhlo.sharding = \"{manual}\"} : (tensor<4x3xf32>) -> tensor<4x3xf32>",
                &format!(
                    "%manual_computation = stablehlo.custom_call @SPMDShardToFullShape(%laid_out_1) {{mhlo.sharding = \"{tiles}\"}} : (tensor<4x3xf32>) -> tensor<8x3xf32>"
                ),
            ]
        );
    }

    #[test]
    fn without_a_mesh_the_body_stands_in_line() {
        let double = |g: &Graph| {
            let x = g.arg("x", F32, &[3]);
            g.manual_computation(&[(&x, &["batch"])], &[&["batch"]], |a| vec![(&a[0] + &a[0]).shard(["batch"])])
        };
        assert_eq!(crate::graph::testing::lines(double), ["%add = stablehlo.add %x, %x : tensor<3xf32>"]);
    }

    #[test]
    fn errors() {
        let manual = |input: &[&str], output: &[&[&str]]| {
            error(|g| {
                g.set_mesh(Mesh::new([("data", 2)]).unwrap(), Rules::new(&[("batch", &["data"])]));
                g.manual_computation(&[(&g.arg("x", F32, &[3]), input)], output, |a| a.to_vec())
            })
        };
        assert!(manual(&["batch"], &[&["batch"]]).contains("of length 3 cannot be split over 2 devices"));
        assert!(manual(&[""], &[&["", ""]]).contains("result 0 is f32[3], its sharding [{}, {}] has 2 axes"));
        assert!(manual(&[""], &[&[""], &[""]]).contains("the body has 1 results, 2 shardings are given"));
    }
}
