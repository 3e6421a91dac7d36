//! Where a tensor lies on the mesh.

use std::panic::Location;

use super::{Op, OpInfo, op_info};
use crate::graph::aval::Aval;
use crate::graph::emit::{Cx, Emission, sharding_attr};
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::sharding::Sharding;
use crate::graph::tensor::Tensor;

/// A value with its layout over the mesh given.
#[derive(Clone, Debug)]
pub struct ShardingConstraint {
    /// The layout.
    pub sharding: Sharding,
    /// That of its cotangent, where it is another.
    pub cotangent: Option<Sharding>,
}

op_info!(ShardingConstraint, 1, "sharding_constraint", "a value laid out over the mesh");

impl Op for ShardingConstraint {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        if self.sharding.dims.len() != inputs[0].rank() {
            return Err(format!("{} axes are laid out, but it is {}", self.sharding.dims.len(), inputs[0]));
        }
        Ok(vec![inputs[0].clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let (x, result) = (cx.operand(0), cx.output_type(0));
        match (cx.emission(), cx.mesh()) {
            (Emission::Gspmd, Some(mesh)) => format!(
                "stablehlo.custom_call @Sharding({x}) {{{}}} : {}",
                sharding_attr(&self.sharding, mesh, Emission::Gspmd),
                cx.signature()
            ),
            _ => format!("sdy.sharding_constraint {x} <@mesh, {}> : {result}", self.sharding.shardy()),
        }
    }

    /// The cotangent lies where the value does, if nothing else is said.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let ct = cx.ct();
        let sharding = self.cotangent.clone().unwrap_or_else(|| self.sharding.clone());
        let cotangent = self.cotangent.is_some().then(|| self.sharding.clone());
        Ok(vec![Some(ct.graph.apply1(ShardingConstraint { sharding, cotangent }, &[&ct]))])
    }
}

impl Tensor {
    /// This tensor laid out over the mesh by the logical names of its axes ("" is not split); without a mesh, `self`.
    /// Errors: those of [`Rules::resolve`](crate::graph::Rules::resolve).
    #[track_caller]
    pub fn shard<'a>(&self, logical: impl AsRef<[&'a str]>) -> Tensor {
        match self.graph.resolve(Location::caller(), "shard", logical.as_ref(), self.shape()) {
            Some(sharding) => self.graph.apply1(ShardingConstraint { sharding, cotangent: None }, &[self]),
            None => self.clone(),
        }
    }

    /// [`Tensor::shard`] of a value that lay on the mesh as `before` says, where its cotangent lies again: what is gathered here is
    /// summed there by a reduce-scatter, and is whole nowhere.
    #[track_caller]
    pub fn gather<'a>(&self, logical: impl AsRef<[&'a str]>, before: impl AsRef<[&'a str]>) -> Tensor {
        let resolve = |logical: &[&str]| self.graph.resolve(Location::caller(), "gather", logical, self.shape());
        match (resolve(logical.as_ref()), resolve(before.as_ref())) {
            (Some(sharding), cotangent) => self.graph.apply1(ShardingConstraint { sharding, cotangent }, &[self]),
            (None, _) => self.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::F32;
    use crate::graph::testing::{error, lines};
    use crate::graph::{Graph, Mesh, Rules};

    fn sharded(emission: Emission) -> String {
        let g = Graph::new("test");
        g.set_mesh(
            Mesh::new([("data", 2), ("model", 4)]).unwrap(),
            Rules::new(&[("batch", &["data"]), ("mlp", &["model"])]),
        );
        g.output("y", &g.arg("x", F32, &[4, 8]).shard(["batch", "mlp"]));
        g.finish().unwrap().stablehlo_with(emission)
    }

    #[test]
    fn text() {
        assert!(sharded(Emission::Shardy).contains(
            "%sharding_constraint = sdy.sharding_constraint %x <@mesh, [{\"data\"}, {\"model\"}]> : tensor<4x8xf32>"
        ));
        let gspmd = sharded(Emission::Gspmd);
        assert!(gspmd.contains(
            "%sharding_constraint = stablehlo.custom_call @Sharding(%x) {mhlo.sharding = \"{devices=[2,4]<=[8]}\"} : (tensor<4x8xf32>) -> tensor<4x8xf32>"
        ));
        assert!(!gspmd.contains("sdy."), "{gspmd}");
    }

    #[test]
    fn no_mesh_no_constraint() {
        assert!(lines(|g| vec![g.arg("x", F32, &[4]).shard(["anything"])]).is_empty());
    }

    #[test]
    fn errors() {
        let message = error(|g| {
            g.set_mesh(Mesh::new([("model", 4)]).unwrap(), Rules::new(&[("kv_heads", &["model"])]));
            vec![g.arg("x", F32, &[6]).shard(["kv_heads"])]
        });
        assert!(
            message.starts_with("\"shard\": axis \"kv_heads\" of length 6 cannot be split over 4 devices"),
            "{message}"
        );
    }
}
