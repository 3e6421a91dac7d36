//! Where the pieces of a tensor lie: meshes, rules from logical to mesh axes, and their two spellings.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::aval::{join, list};

/// A mesh or rule that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ShardingError(pub(crate) String);

/// Devices arranged in a grid with named axes, numbered row by row: the last axis is the fastest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mesh {
    axes: Vec<(String, usize)>,
}

impl Mesh {
    /// A mesh from (name, number of devices) pairs, such as `[("data", 2), ("model", 4)]`.
    ///
    /// Errors: no axis, an axis of length 0, a name twice, or a name that is not made of letters, digits and `_`.
    pub fn new<'a>(axes: impl IntoIterator<Item = (&'a str, usize)>) -> Result<Mesh, ShardingError> {
        let mut mesh = Mesh { axes: Vec::new() };
        for (name, size) in axes {
            if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
                return Err(ShardingError(format!(
                    "mesh axis {name:?}: a name is made of ASCII letters, digits and `_`"
                )));
            }
            if size == 0 {
                return Err(ShardingError(format!("mesh axis {name:?} has 0 devices: it needs at least 1")));
            }
            if mesh.size(name).is_some() {
                return Err(ShardingError(format!("mesh axis {name:?} is given twice")));
            }
            mesh.axes.push((name.to_string(), size));
        }
        if mesh.axes.is_empty() {
            return Err(ShardingError("a mesh needs at least one axis".into()));
        }
        Ok(mesh)
    }

    /// The axes in order: name and number of devices.
    pub fn axes(&self) -> &[(String, usize)] {
        &self.axes
    }

    /// Number of devices along an axis, `None` where the mesh has no such axis.
    pub fn size(&self, axis: &str) -> Option<usize> {
        self.axes.iter().find(|(name, _)| name == axis).map(|(_, size)| *size)
    }

    /// Number of devices in all.
    pub fn devices(&self) -> usize {
        self.axes.iter().map(|(_, size)| size).product()
    }

    /// Number of devices along these axes together.
    pub fn devices_along(&self, axes: &[String]) -> usize {
        axes.iter().filter_map(|axis| self.size(axis)).product()
    }

    /// The `sdy.mesh` line.
    pub(crate) fn shardy(&self) -> String {
        let axes: Vec<_> = self.axes.iter().map(|(name, size)| format!("{name:?}={size}")).collect();
        format!("sdy.mesh @mesh = <[{}]>", axes.join(", "))
    }

    /// Where a device stands along each axis.
    fn coordinates(&self, device: usize) -> Vec<usize> {
        let mut rest = device;
        let mut coordinates = vec![0; self.axes.len()];
        for (coordinate, (_, size)) in coordinates.iter_mut().zip(&self.axes).rev() {
            *coordinate = rest % size;
            rest /= size;
        }
        coordinates
    }

    /// The device groups that a collective over `axes` works in: each group differs only along those axes.
    pub(crate) fn groups(&self, axes: &[String]) -> Vec<Vec<usize>> {
        // By coordinates: first those outside `axes`, which tell the groups apart, then those along them, in the order
        // in which the axes are named.
        let mut groups: BTreeMap<Vec<usize>, BTreeMap<Vec<usize>, usize>> = BTreeMap::new();
        for device in 0..self.devices() {
            let coordinate = self.coordinates(device);
            let position = |axis: &String| self.axes.iter().position(|(name, _)| name == axis);
            let inside = axes.iter().filter_map(position).map(|i| coordinate[i]).collect();
            let outside = (0..self.axes.len()).filter(|&i| !axes.contains(&self.axes[i].0)).map(|i| coordinate[i]);
            groups.entry(outside.collect()).or_default().insert(inside, device);
        }
        groups.into_values().map(|members| members.into_values().collect()).collect()
    }
}

/// The table from logical axes ("heads", "embed", …) to mesh axes ("model", "data", …).
///
/// A mesh axis that the mesh in use does not have is skipped, so one table serves many meshes; a logical axis that has
/// no line in the table is an error, so a misspelt one is found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    table: Vec<(String, Vec<String>)>,
}

impl Rules {
    /// A table from (logical axis, mesh axes) lines; no mesh axes means that the axis is never split.
    pub fn new(lines: &[(&str, &[&str])]) -> Rules {
        let table = lines
            .iter()
            .map(|(logical, mesh)| (logical.to_string(), mesh.iter().map(|axis| axis.to_string()).collect()))
            .collect();
        Rules { table }
    }

    /// The mesh axes of a logical axis, in order (major first); `None` where the table has no such line.
    pub fn mesh_axes(&self, logical: &str) -> Option<&[String]> {
        self.table.iter().find(|(name, _)| name == logical).map(|(_, axes)| axes.as_slice())
    }

    /// The mesh axes of a tensor whose axes have these logical names ("" is never split).
    ///
    /// Errors: a name without a line in the table, and one mesh axis for two tensor axes.
    pub fn axes(&self, mesh: &Mesh, logical: &[&str]) -> Result<Sharding, ShardingError> {
        let mut dims: Vec<Vec<String>> = Vec::new();
        for &name in logical {
            let axes: Vec<String> = match self.mesh_axes(name) {
                _ if name.is_empty() => Vec::new(),
                Some(axes) => axes.iter().filter(|axis| mesh.size(axis).is_some()).cloned().collect(),
                None => {
                    let known: Vec<_> = self.table.iter().map(|(known, _)| known).collect();
                    return Err(ShardingError(format!(
                        "logical axis {name:?} has no rule: the table has {}",
                        join(&known, ", ")
                    )));
                }
            };
            if let Some(twice) = axes.iter().find(|axis| dims.iter().any(|dim| dim.contains(axis))) {
                return Err(ShardingError(format!(
                    "logical axes {logical:?}: mesh axis {twice:?} would split two axes of one tensor"
                )));
            }
            dims.push(axes);
        }
        Ok(Sharding { dims })
    }

    /// [`Rules::axes`] for a tensor of this shape.
    ///
    /// Errors: also a number of names that is not the rank, and a length that its devices do not divide (both numbers
    /// are named).
    pub fn resolve(&self, mesh: &Mesh, logical: &[&str], shape: &[usize]) -> Result<Sharding, ShardingError> {
        if logical.len() != shape.len() {
            return Err(ShardingError(format!(
                "{} logical axes {logical:?} for a tensor of rank {}: name every axis, \"\" for one that is not split",
                logical.len(),
                shape.len()
            )));
        }
        let sharding = self.axes(mesh, logical)?;
        for ((axes, &size), name) in sharding.dims.iter().zip(shape).zip(logical) {
            let devices = mesh.devices_along(axes);
            if size % devices != 0 {
                return Err(ShardingError(format!(
                    "axis {name:?} of length {size} cannot be split over {devices} devices (mesh axes {}): \
                     use a number of devices that divides {size}, or replicate {name:?}",
                    list(axes)
                )));
            }
        }
        Ok(sharding)
    }
}

/// How one tensor is split: for each axis the mesh axes that split it, major first; an empty list leaves it whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sharding {
    /// Mesh axes of each tensor axis.
    pub dims: Vec<Vec<String>>,
}

impl Sharding {
    /// The shape of one device's piece of an array of this shape.
    pub fn local_shape(&self, mesh: &Mesh, shape: &[usize]) -> Vec<usize> {
        shape.iter().zip(&self.dims).map(|(n, axes)| n / mesh.devices_along(axes)).collect()
    }

    /// The shape of the array whose pieces have this shape.
    pub fn global_shape(&self, mesh: &Mesh, piece: &[usize]) -> Vec<usize> {
        piece.iter().zip(&self.dims).map(|(n, axes)| n * mesh.devices_along(axes)).collect()
    }

    /// Which part of an array of this shape a device has, a range for each axis.
    pub fn part(&self, mesh: &Mesh, shape: &[usize], device: usize) -> Vec<Range<usize>> {
        let coordinates = mesh.coordinates(device);
        let range = |(&n, axes): (&usize, &Vec<String>)| {
            let number = axes.iter().fold(0, |number, axis| {
                let place = mesh.axes.iter().position(|(name, _)| name == axis);
                place.map_or(number, |i| number * mesh.axes[i].1 + coordinates[i])
            });
            let size = n / mesh.devices_along(axes);
            number * size..(number + 1) * size
        };
        shape.iter().zip(&self.dims).map(range).collect()
    }

    /// `[{"data"}, {}]`, the Shardy list of axes per dimension.
    pub(crate) fn shardy(&self) -> String {
        let dims: Vec<_> = self.dims.iter().map(|axes| format!("{{{}}}", join(&quoted(axes), ", "))).collect();
        format!("[{}]", dims.join(", "))
    }

    /// The GSPMD string: `{devices=[2,1,4]<=[8] last_tile_dim_replicate}`.
    pub(crate) fn gspmd(&self, mesh: &Mesh) -> String {
        let position = |axis: &String| mesh.axes().iter().position(|(name, _)| name == axis);
        let mut order: Vec<usize> = self.dims.iter().flatten().filter_map(position).collect();
        if order.is_empty() {
            return "{replicated}".into();
        }
        let mut tiles: Vec<usize> = self.dims.iter().map(|axes| mesh.devices_along(axes)).collect();
        let rest: Vec<usize> = (0..mesh.axes().len()).filter(|i| !order.contains(i)).collect();
        let replicas: usize = rest.iter().map(|&i| mesh.axes()[i].1).product();
        if replicas > 1 {
            tiles.push(replicas);
        }
        order.extend(rest);
        let sizes: Vec<usize> = mesh.axes().iter().map(|(_, size)| *size).collect();
        let iota = if order.is_sorted() {
            format!("[{}]", mesh.devices())
        } else {
            format!("[{}]T({})", join(&sizes, ","), join(&order, ","))
        };
        let tail = if replicas > 1 { " last_tile_dim_replicate" } else { "" };
        format!("{{devices=[{}]<={iota}{tail}}}", join(&tiles, ","))
    }
}

impl fmt::Display for Sharding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shardy())
    }
}

/// Each name in double quotes.
pub(crate) fn quoted(names: &[String]) -> Vec<String> {
    names.iter().map(|name| format!("{name:?}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh() -> Mesh {
        Mesh::new([("data", 2), ("model", 4)]).unwrap()
    }

    fn rules() -> Rules {
        Rules::new(&[
            ("batch", &["data", "fsdp"]),
            ("heads", &["model"]),
            ("vocab", &["model", "data"]),
            ("embed", &[]),
        ])
    }

    #[test]
    fn resolves_and_spells() {
        let s = rules().resolve(&mesh(), &["batch", "embed", "heads"], &[4, 5, 8]).unwrap();
        assert_eq!(s.shardy(), r#"[{"data"}, {}, {"model"}]"#);
        assert_eq!(s.gspmd(&mesh()), "{devices=[2,1,4]<=[8]}");
        assert_eq!(s.local_shape(&mesh(), &[4, 5, 8]), [2, 5, 2]);
        let s = rules().resolve(&mesh(), &["heads", ""], &[8, 3]).unwrap();
        assert_eq!(s.gspmd(&mesh()), "{devices=[4,1,2]<=[2,4]T(1,0) last_tile_dim_replicate}");
        let s = rules().resolve(&mesh(), &["vocab"], &[16]).unwrap();
        assert_eq!(s.gspmd(&mesh()), "{devices=[8]<=[2,4]T(1,0)}");
        assert_eq!(rules().resolve(&mesh(), &["embed"], &[3]).unwrap().gspmd(&mesh()), "{replicated}");
        assert_eq!(mesh().shardy(), r#"sdy.mesh @mesh = <["data"=2, "model"=4]>"#);
    }

    #[test]
    fn every_device_has_its_part() {
        let s = rules().resolve(&mesh(), &["vocab", "embed"], &[16, 3]).unwrap();
        // model is the major axis of vocab, data the minor one; device 5 stands at data 1, model 1
        assert_eq!(s.part(&mesh(), &[16, 3], 5), [6..8, 0..3]);
        let s = rules().resolve(&mesh(), &["batch", "heads"], &[4, 8]).unwrap();
        assert_eq!(s.part(&mesh(), &[4, 8], 6), [2..4, 4..6]);
    }

    #[test]
    fn names_both_numbers() {
        let error = |names: &[&str], shape: &[usize]| rules().resolve(&mesh(), names, shape).unwrap_err().to_string();
        assert_eq!(
            error(&["batch", "heads"], &[2, 6]),
            "axis \"heads\" of length 6 cannot be split over 4 devices (mesh axes [model]): use a number of devices that divides 6, or replicate \"heads\""
        );
        assert!(error(&["head"], &[8]).contains("logical axis \"head\" has no rule: the table has batch, heads"));
        assert!(error(&["heads", "vocab"], &[8, 8]).contains("mesh axis \"model\" would split two axes"));
        assert!(error(&["heads"], &[8, 8]).contains("1 logical axes [\"heads\"] for a tensor of rank 2"));
    }

    #[test]
    fn rejects_meshes() {
        let error = |axes: &[(&str, usize)]| Mesh::new(axes.iter().copied()).unwrap_err().to_string();
        assert_eq!(error(&[("a", 0)]), "mesh axis \"a\" has 0 devices: it needs at least 1");
        assert_eq!(error(&[("a", 1), ("a", 2)]), "mesh axis \"a\" is given twice");
        assert_eq!(error(&[]), "a mesh needs at least one axis");
    }

    #[test]
    fn groups_devices() {
        assert_eq!(mesh().groups(&["model".into()]), [vec![0, 1, 2, 3], vec![4, 5, 6, 7]]);
        assert_eq!(mesh().groups(&["data".into()]), [[0, 4], [1, 5], [2, 6], [3, 7]]);
        assert_eq!(mesh().groups(&["model".into(), "data".into()]), [[0, 4, 1, 5, 2, 6, 3, 7]]);
    }
}
