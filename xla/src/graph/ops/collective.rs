//! Communication between devices, inside a manual computation.

use std::panic::Location;

use super::reduce::Fold;
use super::scatter::combiner;
use super::{Op, OpInfo, op_info};
use crate::DType;
use crate::graph::aval::{Aval, join, list};
use crate::graph::emit::Cx;
use crate::graph::grad::{Cotangents, Vjp};
use crate::graph::graph::Graph;
use crate::graph::tensor::Tensor;

/// Devices that work together: each group on its own, members in order.
pub type Groups = Vec<Vec<usize>>;

/// The attributes that every collective carries. A channel handle and global device numbers are not optional:
/// without them the TPU compiler aborts the process and CPU plugins fail when the program runs.
fn group_attrs(cx: &mut Cx<'_, '_>, groups: &Groups) -> String {
    let rows: Vec<String> = groups.iter().map(|group| list(group)).collect();
    let (n, m) = (groups.len(), groups.first().map_or(0, Vec::len));
    format!("{}, replica_groups = dense<{}> : tensor<{n}x{m}xi64>", channel_attr(cx), list(&rows))
}

/// A channel of its own for each collective of the module.
fn channel_attr(cx: &mut Cx<'_, '_>) -> String {
    format!("channel_handle = #stablehlo.channel_handle<handle = {}, type = 1>", cx.channel())
}

/// Number of devices in a group. Errors: no devices, or groups that differ in size.
fn group_size(groups: &Groups) -> Result<usize, String> {
    match groups.first().map_or(0, Vec::len) {
        n if n > 0 && groups.iter().all(|group| group.len() == n) => Ok(n),
        _ => Err(format!("groups of devices must have one size, at least 1; found {groups:?}")),
    }
}

/// An axis that exists.
fn check_axis(x: &Aval, axis: usize) -> Result<usize, String> {
    x.shape.get(axis).copied().ok_or_else(|| format!("axis {axis} of {x}, which has rank {}", x.rank()))
}

/// An axis cut into as many pieces as there are devices.
fn split(x: &Aval, axis: usize, devices: usize) -> Result<usize, String> {
    let n = check_axis(x, axis)?;
    if n % devices != 0 {
        return Err(format!("axis {axis} of {x} has length {n}, which {devices} devices do not divide"));
    }
    Ok(n / devices)
}

/// The devices' tensors folded element by element; each device of a group gets the result.
#[derive(Clone, Debug)]
pub struct AllReduce {
    /// What folds two elements.
    pub fold: Fold,
    /// The devices that work together.
    pub groups: Groups,
}

op_info!(AllReduce, 1, "all_reduce", "tensors of a group of devices folded");

impl Op for AllReduce {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        self.fold.class().check(inputs[0])?;
        group_size(&self.groups)?;
        Ok(vec![inputs[0].clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let attrs = format!("{}, use_global_device_ids", group_attrs(cx, &self.groups));
        let region = combiner(cx, Some(self.fold));
        format!("\"stablehlo.all_reduce\"({}) <{{{attrs}}}> ({region}) : {}", cx.operands(), cx.signature())
    }

    /// A device's tensor is in the sum of every device of its group.
    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        only_sums(self.fold)?;
        let ct = cx.ct();
        Ok(vec![Some(ct.graph.apply1(self.clone(), &[&ct]))])
    }
}

/// The devices' tensors one after the other along an axis; each device of a group gets all.
#[derive(Clone, Debug)]
pub struct AllGather {
    /// The axis that grows.
    pub axis: usize,
    /// The devices that work together.
    pub groups: Groups,
}

op_info!(AllGather, 1, "all_gather", "tensors of a group of devices one after the other");

impl Op for AllGather {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let mut result = inputs[0].clone();
        result.shape[self.axis] = check_axis(inputs[0], self.axis)? * group_size(&self.groups)?;
        Ok(vec![result])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let groups = group_attrs(cx, &self.groups);
        let attrs = format!("all_gather_dim = {} : i64, {groups}, use_global_device_ids", self.axis);
        format!("\"stablehlo.all_gather\"({}) <{{{attrs}}}> : {}", cx.operands(), cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let op = ReduceScatter { fold: Fold::Sum, axis: self.axis, groups: self.groups.clone() };
        Ok(vec![Some(cx.graph().apply1(op, &[&cx.ct()]))])
    }
}

/// The devices' tensors folded element by element; each device of a group gets its piece of an axis.
#[derive(Clone, Debug)]
pub struct ReduceScatter {
    /// What folds two elements.
    pub fold: Fold,
    /// The axis that is cut.
    pub axis: usize,
    /// The devices that work together.
    pub groups: Groups,
}

op_info!(ReduceScatter, 1, "reduce_scatter", "tensors of a group of devices folded, each device getting a piece");

impl Op for ReduceScatter {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        self.fold.class().check(inputs[0])?;
        let mut result = inputs[0].clone();
        let piece = split(inputs[0], self.axis, group_size(&self.groups)?)?;
        result.shape[self.axis] = piece;
        Ok(vec![result])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let groups = group_attrs(cx, &self.groups);
        let attrs = format!("{groups}, scatter_dimension = {} : i64, use_global_device_ids", self.axis);
        let region = combiner(cx, Some(self.fold));
        format!("\"stablehlo.reduce_scatter\"({}) <{{{attrs}}}> ({region}) : {}", cx.operands(), cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        only_sums(self.fold)?;
        let op = AllGather { axis: self.axis, groups: self.groups.clone() };
        Ok(vec![Some(cx.graph().apply1(op, &[&cx.ct()]))])
    }
}

/// Each device cuts its tensor along one axis, sends a piece to each device of its group, and joins what it gets along
/// another.
#[derive(Clone, Debug)]
pub struct AllToAll {
    /// The axis that is cut.
    pub split_axis: usize,
    /// The axis that is joined.
    pub concat_axis: usize,
    /// The devices that work together.
    pub groups: Groups,
}

op_info!(AllToAll, 1, "all_to_all", "pieces exchanged within a group of devices");

impl Op for AllToAll {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        let devices = group_size(&self.groups)?;
        let mut result = inputs[0].clone();
        check_axis(inputs[0], self.concat_axis)?;
        result.shape[self.split_axis] = split(inputs[0], self.split_axis, devices)?;
        result.shape[self.concat_axis] *= devices;
        Ok(vec![result])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let groups = group_attrs(cx, &self.groups);
        let (split, concat, count) = (self.split_axis, self.concat_axis, self.groups.first().map_or(1, Vec::len));
        let attrs = format!(
            "{groups}, concat_dimension = {concat} : i64, split_count = {count} : i64, split_dimension = {split} : i64"
        );
        format!("\"stablehlo.all_to_all\"({}) <{{{attrs}}}> : {}", cx.operands(), cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let (split_axis, concat_axis) = (self.concat_axis, self.split_axis);
        let op = AllToAll { split_axis, concat_axis, groups: self.groups.clone() };
        Ok(vec![Some(cx.graph().apply1(op, &[&cx.ct()]))])
    }
}

/// Each device's tensor sent to another; zeros on a device that gets none.
#[derive(Clone, Debug)]
pub struct CollectivePermute {
    /// (from, to) pairs of devices.
    pub pairs: Vec<(usize, usize)>,
}

op_info!(CollectivePermute, 1, "collective_permute", "each device's tensor sent to another");

impl Op for CollectivePermute {
    fn info(&self) -> &'static OpInfo {
        &Self::INFO
    }

    fn infer(&self, inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
        for (i, &(from, to)) in self.pairs.iter().enumerate() {
            if self.pairs[..i].iter().any(|pair| pair.0 == from || pair.1 == to) {
                return Err(format!("pair ({from}, {to}): a device sends once and receives once at most"));
            }
        }
        if self.pairs.is_empty() {
            return Err("needs at least one pair of devices".into());
        }
        Ok(vec![inputs[0].clone()])
    }

    fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
        let pairs: Vec<String> = self.pairs.iter().map(|(from, to)| format!("[{from}, {to}]")).collect();
        let channel = channel_attr(cx);
        let pairs = format!("dense<{}> : tensor<{}x2xi64>", list(&pairs), pairs.len());
        let attrs = join(&[channel, format!("source_target_pairs = {pairs}")], ", ");
        format!("\"stablehlo.collective_permute\"({}) <{{{attrs}}}> : {}", cx.operands(), cx.signature())
    }

    fn vjp(&self, cx: &mut Vjp<'_, '_>) -> Cotangents {
        let pairs = self.pairs.iter().map(|&(from, to)| (to, from)).collect();
        Ok(vec![Some(cx.graph().apply1(CollectivePermute { pairs }, &[&cx.ct()]))])
    }
}

/// A fold over devices that has a derivative.
fn only_sums(fold: Fold) -> Result<(), String> {
    if fold == Fold::Sum { Ok(()) } else { Err(format!("only sums over devices have a derivative, not {fold:?}")) }
}

macro_rules! device_number {
    ($(#[$doc:meta] $op:ident . $method:ident $name:literal $summary:literal;)*) => {
        $(
            #[$doc]
            #[derive(Clone, Debug)]
            pub struct $op;

            op_info!($op, 0, $name, $summary, Zero "it has no operands");

            impl Op for $op {
                fn info(&self) -> &'static OpInfo {
                    &Self::INFO
                }

                fn infer(&self, _inputs: &[&Aval]) -> Result<Vec<Aval>, String> {
                    Ok(vec![Aval::new(DType::U32, &[])])
                }

                fn stablehlo(&self, cx: &mut Cx<'_, '_>) -> String {
                    format!("stablehlo.{} : {}", $name, cx.output_type(0))
                }
            }

            impl Graph {
                #[$doc]
                #[track_caller]
                pub fn $method(&self) -> Tensor {
                    self.apply1($op, &[])
                }
            }
        )*
    };
}

device_number! {
    /// The number of this device among those that share the program's arguments, as ui32.
    PartitionId.partition_id "partition_id" "number of this device in the mesh";
    /// The number of this copy of the program, as ui32.
    ReplicaId.replica_id "replica_id" "number of this copy of the program";
}

impl Graph {
    /// Where this device stands along a mesh axis, an i32 scalar; 0 where there is no such axis. Inside
    /// `Graph::manual_computation`.
    #[track_caller]
    pub fn coordinate(&self, mesh_axis: &str) -> Tensor {
        let axes = self.mesh().map_or(Vec::new(), |mesh| mesh.axes().to_vec());
        match axes.iter().position(|(name, _)| name == mesh_axis) {
            None => self.scalar(0i64, DType::I32),
            Some(i) => {
                let stride: usize = axes[i + 1..].iter().map(|(_, size)| size).product();
                self.partition_id().cast(DType::I32) / stride as i64 % axes[i].1 as i64
            }
        }
    }
}

impl Tensor {
    /// The devices that differ only along these mesh axes, group by group.
    #[track_caller]
    fn groups(&self, op: &str, axes: &[&str]) -> Option<Groups> {
        let Some(mesh) = self.graph.mesh() else {
            self.graph
                .fail(Location::caller(), format!("{op}: devices communicate along mesh axes, and no mesh is set"));
            return None;
        };
        if let Some(axis) = axes.iter().find(|axis| mesh.size(axis).is_none()) {
            let known: Vec<_> = mesh.axes().iter().map(|(name, _)| name).collect();
            let message = format!("{op}: the mesh has no axis {axis:?}, it has {}", join(&known, ", "));
            self.graph.fail(Location::caller(), message);
            return None;
        }
        Some(mesh.groups(&axes.iter().map(|axis| axis.to_string()).collect::<Vec<_>>()))
    }

    /// The fold of the tensors of all devices along these mesh axes. Inside `Graph::manual_computation`, as are all
    /// collectives. Errors: an axis that the mesh does not have.
    #[track_caller]
    pub fn all_reduce(&self, fold: Fold, mesh_axes: &[&str]) -> Tensor {
        let Some(groups) = self.groups("all_reduce", mesh_axes) else { return self.clone() };
        self.graph.apply1(AllReduce { fold, groups }, &[self])
    }

    /// The tensors of all devices along these mesh axes, one after the other along `axis`.
    #[track_caller]
    pub fn all_gather(&self, axis: isize, mesh_axes: &[&str]) -> Tensor {
        let Some(axis) = self.axis("all_gather", axis) else { return self.clone() };
        let Some(groups) = self.groups("all_gather", mesh_axes) else { return self.clone() };
        self.graph.apply1(AllGather { axis, groups }, &[self])
    }

    /// This device's piece, along `axis`, of the fold of the tensors of all devices along these mesh axes.
    #[track_caller]
    pub fn reduce_scatter(&self, fold: Fold, axis: isize, mesh_axes: &[&str]) -> Tensor {
        let Some(axis) = self.axis("reduce_scatter", axis) else { return self.clone() };
        let Some(groups) = self.groups("reduce_scatter", mesh_axes) else { return self.clone() };
        self.graph.apply1(ReduceScatter { fold, axis, groups }, &[self])
    }

    /// Sends piece i along `split_axis` to device i of these mesh axes, and joins what comes along `concat_axis`.
    #[track_caller]
    pub fn all_to_all(&self, split_axis: isize, concat_axis: isize, mesh_axes: &[&str]) -> Tensor {
        let Some(split_axis) = self.axis("all_to_all", split_axis) else { return self.clone() };
        let Some(concat_axis) = self.axis("all_to_all", concat_axis) else { return self.clone() };
        let Some(groups) = self.groups("all_to_all", mesh_axes) else { return self.clone() };
        self.graph.apply1(AllToAll { split_axis, concat_axis, groups }, &[self])
    }

    /// Sends each device's tensor to the device `shift` places on along a mesh axis, round and round.
    #[track_caller]
    pub fn collective_permute(&self, shift: usize, mesh_axis: &str) -> Tensor {
        let Some(groups) = self.groups("collective_permute", &[mesh_axis]) else { return self.clone() };
        let ring = |group: &Vec<usize>| -> Vec<(usize, usize)> {
            (0..group.len()).map(|i| (group[i], group[(i + shift) % group.len()])).collect()
        };
        self.graph.apply1(CollectivePermute { pairs: groups.iter().flat_map(ring).collect() }, &[self])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType::F32;
    use crate::graph::testing::error;
    use crate::graph::{Mesh, Rules};

    fn manual(build: impl FnOnce(&Tensor) -> Tensor) -> Result<Vec<String>, String> {
        let g = Graph::new("test");
        let rules = Rules::new(&[("batch", &["data"]), ("mlp", &["model"])]);
        g.set_mesh(Mesh::new([("data", 2), ("model", 4)]).unwrap(), rules);
        let x = g.arg("x", F32, &[8, 16]);
        let y = g.manual_computation(&[(&x, &["batch", "mlp"])], &[&["", ""]], |a| vec![build(&a[0])]);
        g.output("y", &y[0]);
        let text = g.finish().map_err(|error| error.message)?.stablehlo();
        Ok(text.lines().skip(4).map(|line| line.trim().to_string()).collect())
    }

    #[test]
    fn text() {
        let first = |build: fn(&Tensor) -> Tensor| manual(build).unwrap()[0].clone();
        let channel = "channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>";
        let model = "replica_groups = dense<[[0, 1, 2, 3], [4, 5, 6, 7]]> : tensor<2x4xi64>";
        let data = "replica_groups = dense<[[0, 4], [1, 5], [2, 6], [3, 7]]> : tensor<4x2xi64>";
        assert_eq!(
            first(|x| x.all_reduce(Fold::Sum, &["model"])),
            format!("%all_reduce = \"stablehlo.all_reduce\"(%x_1) <{{{channel}, {model}, use_global_device_ids}}> ({{")
        );
        assert_eq!(
            first(|x| x.all_gather(1, &["data"])),
            format!(
                "%all_gather = \"stablehlo.all_gather\"(%x_1) <{{all_gather_dim = 1 : i64, {channel}, {data}, use_global_device_ids}}> : (tensor<4x4xf32>) -> tensor<4x8xf32> loc(\"all_gather\")"
            )
        );
        assert_eq!(
            first(|x| x.reduce_scatter(Fold::Max, 0, &["model"])),
            format!(
                "%reduce_scatter = \"stablehlo.reduce_scatter\"(%x_1) <{{{channel}, {model}, scatter_dimension = 0 : i64, use_global_device_ids}}> ({{"
            )
        );
        assert_eq!(
            first(|x| x.all_to_all(0, 1, &["data"])),
            format!(
                "%all_to_all = \"stablehlo.all_to_all\"(%x_1) <{{{channel}, {data}, concat_dimension = 1 : i64, split_count = 2 : i64, split_dimension = 0 : i64}}> : (tensor<4x4xf32>) -> tensor<2x8xf32> loc(\"all_to_all\")"
            )
        );
        let ring = first(|x| x.collective_permute(1, "model"));
        assert!(ring.contains("source_target_pairs = dense<[[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], "), "{ring}");
        let id = first(|x| x.graph().partition_id().broadcast_to(&[4, 4]));
        assert_eq!(id, "%partition_id = stablehlo.partition_id : tensor<ui32> loc(\"partition_id\")");
        let id = first(|x| x.graph().replica_id().broadcast_to(&[4, 4]));
        assert_eq!(id, "%replica_id = stablehlo.replica_id : tensor<ui32> loc(\"replica_id\")");
    }

    #[test]
    fn every_collective_has_a_channel_of_its_own() {
        let text = manual(|x| x.all_reduce(Fold::Sum, &["data"]).all_reduce(Fold::Sum, &["model"])).unwrap().join(" ");
        assert!(text.contains("handle = 1,") && text.contains("handle = 2,"), "{text}");
    }

    #[test]
    fn errors() {
        let message = |build: fn(&Tensor) -> Tensor| manual(build).unwrap_err();
        assert_eq!(
            message(|x| x.all_reduce(Fold::Sum, &["expert"])),
            "all_reduce: the mesh has no axis \"expert\", it has data, model"
        );
        assert_eq!(
            message(|x| x.narrow(0, 0, 3).reduce_scatter(Fold::Sum, 0, &["model"])),
            "reduce_scatter: axis 0 of f32[3,4] has length 3, which 4 devices do not divide"
        );
        assert!(message(|x| x.all_gather(2, &["model"])).contains("axis 2 of f32[4,4]"));
        let twice = CollectivePermute { pairs: vec![(0, 1), (0, 2)] };
        assert!(error(|g| vec![g.apply1(twice, &[&g.arg("x", F32, &[])])]).contains("a device sends once"));
        let uneven = AllReduce { fold: Fold::Sum, groups: vec![vec![0, 1], vec![2]] };
        assert!(error(|g| vec![g.apply1(uneven, &[&g.arg("x", F32, &[])])]).contains("must have one size"));
        assert!(error(|g| vec![g.arg("x", F32, &[]).all_reduce(Fold::Sum, &["data"])]).contains("no mesh is set"));
    }
}
