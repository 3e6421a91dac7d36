//! One program with its arguments and the results that it must give.

use half::{bf16, f16};
use ndarray::{Array, ArrayD, Dimension, IxDyn};
use xla::DType;
use xla::graph::{ArgAttrs, Element, Emission, Graph, Mesh, Module, Sharding, Tensor};
use xla::pjrt::{Buffer, Client, CompileOptions, Error, HostData, LoadedExecutable, OptionOverride};

/// A graph under construction, its arguments and what its outputs must be.
pub(crate) struct Case {
    pub(crate) g: Graph,
    args: Vec<Host>,
    wanted: Vec<Wanted>,
}

/// An array in host form.
struct Host {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// What an output must be.
enum Wanted {
    /// The same bits (any NaN for a NaN).
    Same(Host),
    /// The same numbers to within this part of them.
    Near(ArrayD<f64>, f64),
}

/// How near a result of this type comes to the exact one: a few roundings.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 1e-6,
        DType::F16 => 2f64.powi(-9),
        DType::BF16 => 2f64.powi(-7),
        _ => 0.0,
    }
}

impl Case {
    pub(crate) fn new(name: &str) -> Case {
        Case { g: Graph::new(name), args: Vec::new(), wanted: Vec::new() }
    }

    /// Adds an argument with these elements.
    pub(crate) fn arg<T: Element, D: Dimension>(&mut self, values: &Array<T, D>) -> Tensor {
        self.add(Host::of(values), None)
    }

    /// Adds an argument that is cut over the mesh by the logical names of its axes.
    pub(crate) fn sharded_arg<T: Element, D: Dimension>(&mut self, values: &Array<T, D>, logical: &[&str]) -> Tensor {
        self.add(Host::of(values), Some(logical))
    }

    /// Adds an argument of this element type; gives back also the numbers as they are after rounding to the type.
    pub(crate) fn arg_as<D: Dimension>(&mut self, values: &Array<f64, D>, dtype: DType) -> (Tensor, Array<f64, D>) {
        let mut bytes = Vec::new();
        values.iter().for_each(|&value| encode(value, dtype, &mut bytes));
        let host = Host { dtype, shape: values.shape().to_vec(), bytes };
        let rounded = Array::from_shape_vec(values.raw_dim(), host.numbers()).unwrap();
        (self.add(host, None), rounded)
    }

    /// Adds an argument from its host form.
    pub(crate) fn arg_bytes(&mut self, bytes: &[u8], dtype: DType, shape: &[usize]) -> Tensor {
        self.add(Host { dtype, shape: shape.to_vec(), bytes: bytes.to_vec() }, None)
    }

    fn add(&mut self, host: Host, sharding: Option<&[&str]>) -> Tensor {
        let name = format!("arg{}", self.args.len());
        let tensor = self.g.arg_with(&name, host.dtype, &host.shape, ArgAttrs { sharding });
        self.args.push(host);
        tensor
    }

    /// The tensor must have these elements, bit for bit.
    #[track_caller]
    pub(crate) fn is<T: Element, D: Dimension>(&mut self, tensor: &Tensor, wanted: &Array<T, D>) {
        self.output(tensor, None, Wanted::Same(Host::of(wanted)));
    }

    /// The tensor must have this host form.
    #[track_caller]
    pub(crate) fn is_bytes(&mut self, tensor: &Tensor, wanted: &[u8]) {
        let host = Host { dtype: tensor.dtype(), shape: tensor.shape().to_vec(), bytes: wanted.to_vec() };
        self.output(tensor, None, Wanted::Same(host));
    }

    /// The tensor must have these elements, to within a few roundings of its type.
    #[track_caller]
    pub(crate) fn near<D: Dimension>(&mut self, tensor: &Tensor, wanted: &Array<f64, D>) {
        self.near_within(tensor, wanted, tolerance(tensor.dtype()));
    }

    /// The tensor must have these elements, to within this part of each.
    #[track_caller]
    pub(crate) fn near_within<D: Dimension>(&mut self, tensor: &Tensor, wanted: &Array<f64, D>, tolerance: f64) {
        self.output(tensor, None, Wanted::Near(wanted.clone().into_dyn(), tolerance));
    }

    /// As [`Case::near`], of a tensor that is cut over the mesh by the logical names of its axes.
    #[track_caller]
    pub(crate) fn sharded_near<D: Dimension>(&mut self, tensor: &Tensor, logical: &[&str], wanted: &Array<f64, D>) {
        let wanted = Wanted::Near(wanted.clone().into_dyn(), tolerance(tensor.dtype()));
        self.output(tensor, Some(logical), wanted);
    }

    /// As [`Case::is`], of a tensor that is cut over the mesh by the logical names of its axes.
    #[track_caller]
    pub(crate) fn sharded_is<T: Element, D: Dimension>(
        &mut self,
        tensor: &Tensor,
        logical: &[&str],
        wanted: &Array<T, D>,
    ) {
        self.output(tensor, Some(logical), Wanted::Same(Host::of(wanted)));
    }

    #[track_caller]
    fn output(&mut self, tensor: &Tensor, logical: Option<&[&str]>, wanted: Wanted) {
        let (dtype, shape) = match &wanted {
            Wanted::Same(host) => (host.dtype, host.shape.as_slice()),
            Wanted::Near(values, _) => (tensor.dtype(), values.shape()),
        };
        assert_eq!((tensor.dtype(), tensor.shape()), (dtype, shape), "the graph's type is not that of what is wanted");
        let name = format!("out{}", self.wanted.len());
        match logical {
            Some(logical) => self.g.output_sharded(&name, tensor, logical),
            None => self.g.output(&name, tensor),
        }
        self.wanted.push(wanted);
    }

    pub(crate) fn module(&self) -> Module {
        self.g.finish().unwrap_or_else(|e| panic!("{e}"))
    }

    /// Runs the program on one client, on as many devices as the mesh has, in each spelling of sharding; the first
    /// result that is not as it must be is the error.
    pub(crate) fn run(&self, client: &Client) -> Result<(), String> {
        let module = self.module();
        let emissions: &[Emission] =
            if module.mesh().is_some() { &[Emission::Shardy, Emission::Gspmd] } else { &[Emission::Shardy] };
        for &emission in emissions {
            let outputs = compile(client, &module, emission)
                .and_then(|exe| self.execute(client, &module, &exe))
                .map_err(|e| format!("{emission:?}: {e}"))?;
            self.check(&module, &outputs).map_err(|e| format!("{emission:?}: {e}"))?;
        }
        Ok(())
    }

    /// Uploads each device's pieces of the arguments and runs the program; the results by device.
    pub(crate) fn execute(
        &self,
        client: &Client,
        module: &Module,
        exe: &LoadedExecutable,
    ) -> Result<Vec<Vec<Buffer>>, Error> {
        let mut lists = Vec::new();
        for (d, device) in exe.addressable_devices()?.iter().enumerate() {
            let mut list = Vec::new();
            for (host, arg) in self.args.iter().zip(module.args()) {
                let piece = host.piece(module.mesh(), arg.sharding.as_ref(), d);
                list.push(client.upload(HostData::Borrowed(&piece.bytes), piece.dtype, &piece.shape, Some(device))?);
            }
            lists.push(list);
        }
        exe.execute_sharded(&lists.iter().map(|list| list.iter().collect()).collect::<Vec<Vec<&Buffer>>>())
    }

    /// Compares the results of [`Case::execute`].
    pub(crate) fn check(&self, module: &Module, outputs: &[Vec<Buffer>]) -> Result<(), String> {
        for (d, outputs) in outputs.iter().enumerate() {
            for (i, ((buffer, wanted), output)) in outputs.iter().zip(&self.wanted).zip(module.outputs()).enumerate() {
                let bytes = buffer.to_host().map_err(|e| e.to_string())?;
                let found = Host { dtype: buffer.dtype(), shape: buffer.dims().to_vec(), bytes };
                wanted
                    .check(found, module.mesh(), output.sharding.as_ref(), d)
                    .map_err(|e| format!("output {i} on device {d}: {e}"))?;
            }
            if outputs.len() != self.wanted.len() {
                return Err(format!("{} outputs, wanted {}", outputs.len(), self.wanted.len()));
            }
        }
        Ok(())
    }
}

/// The program for as many devices as the mesh has.
///
/// XLA:CPU's maximum and minimum lose a NaN unless `xla_cpu_enable_fast_min_max` is off; it is on by default.
pub(crate) fn compile(client: &Client, module: &Module, emission: Emission) -> Result<LoadedExecutable, Error> {
    let mut options = match module.mesh() {
        Some(mesh) => CompileOptions {
            use_shardy_partitioner: emission == Emission::Shardy,
            ..CompileOptions::sharded(mesh.devices())
        },
        None => CompileOptions::default(),
    };
    options.env_options.insert("xla_cpu_enable_fast_min_max".into(), OptionOverride::Bool(false));
    client.compile(&module.stablehlo_with(emission), &options)
}

impl Wanted {
    fn check(&self, found: Host, mesh: Option<&Mesh>, sharding: Option<&Sharding>, d: usize) -> Result<(), String> {
        match self {
            Wanted::Same(host) => {
                let wanted = host.piece(mesh, sharding, d);
                if (wanted.dtype, &wanted.shape) != (found.dtype, &found.shape) {
                    let (dtype, shape) = (found.dtype, &found.shape);
                    return Err(format!("{dtype}{shape:?}, wanted {}{:?}", wanted.dtype, wanted.shape));
                }
                let size = wanted.dtype.size();
                let (a, b) = (found.numbers(), wanted.numbers());
                for (i, (x, y)) in found.bytes.chunks(size).zip(wanted.bytes.chunks(size)).enumerate() {
                    if x != y && !(a[i].is_nan() && b[i].is_nan()) {
                        return Err(format!("element {i} is {x:02x?} ({}), wanted {y:02x?} ({})", a[i], b[i]));
                    }
                }
            }
            Wanted::Near(values, tolerance) => {
                let wanted = piece(values, mesh, sharding, d);
                if wanted.shape() != found.shape {
                    return Err(format!("{}{:?}, wanted {:?}", found.dtype, found.shape, wanted.shape()));
                }
                for (i, (x, &y)) in found.numbers().into_iter().zip(&wanted).enumerate() {
                    // Below a thousandth the error is not measured against the number itself.
                    let near = (x - y).abs() <= tolerance * y.abs().max(1e-3);
                    if !(near || x == y || (x.is_nan() && y.is_nan())) {
                        return Err(format!("{} element {i} is {x}, wanted {y} within {tolerance}", found.dtype));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Host {
    fn of<T: Element, D: Dimension>(values: &Array<T, D>) -> Host {
        let mut bytes = Vec::new();
        values.iter().for_each(|value| value.write(&mut bytes));
        Host { dtype: T::DTYPE, shape: values.shape().to_vec(), bytes }
    }

    fn numbers(&self) -> Vec<f64> {
        self.bytes.chunks(self.dtype.size()).map(|bytes| decode(bytes, self.dtype)).collect()
    }

    /// What device `d` holds of this array.
    fn piece(&self, mesh: Option<&Mesh>, sharding: Option<&Sharding>, d: usize) -> Host {
        let chunks = self.bytes.chunks(self.dtype.size()).map(<[u8]>::to_vec).collect();
        let piece = piece(&ArrayD::from_shape_vec(IxDyn(&self.shape), chunks).unwrap(), mesh, sharding, d);
        Host { dtype: self.dtype, shape: piece.shape().to_vec(), bytes: piece.iter().flatten().copied().collect() }
    }
}

/// What device `d` holds of an array: devices are numbered row by row over the mesh, and the first mesh axis of a tensor
/// axis cuts the largest pieces.
fn piece<T: Clone>(whole: &ArrayD<T>, mesh: Option<&Mesh>, sharding: Option<&Sharding>, d: usize) -> ArrayD<T> {
    let (Some(mesh), Some(sharding)) = (mesh, sharding) else { return whole.clone() };
    let coordinate = |axis: &str| {
        let position = mesh.axes().iter().position(|(name, _)| name == axis).unwrap();
        let faster: usize = mesh.axes()[position + 1..].iter().map(|(_, size)| size).product();
        d / faster % mesh.axes()[position].1
    };
    let mut part = whole.view();
    for (axis, names) in sharding.dims.iter().enumerate() {
        for name in names {
            let n = part.shape()[axis] / mesh.size(name).unwrap();
            let start = coordinate(name) * n;
            part.slice_axis_inplace(ndarray::Axis(axis), (start..start + n).into());
        }
    }
    part.to_owned()
}

/// Appends a number in the host form of an element type (floats and integers).
fn encode(value: f64, dtype: DType, bytes: &mut Vec<u8>) {
    match dtype {
        DType::F64 => value.write(bytes),
        DType::F32 => (value as f32).write(bytes),
        DType::BF16 => bf16::from_f64(value).write(bytes),
        DType::F16 => f16::from_f64(value).write(bytes),
        _ if dtype.is_integer() => bytes.extend(&(value as i128).to_le_bytes()[..dtype.size()]),
        _ => panic!("no numbers of type {dtype}"),
    }
}

/// The number that these bytes are. 64-bit integers lose their last digits, 8-bit floats are given as integers: their
/// bytes are compared.
fn decode(bytes: &[u8], dtype: DType) -> f64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let bits = u64::from_le_bytes(wide);
    match dtype {
        DType::F64 => f64::from_bits(bits),
        DType::F32 => f32::from_bits(bits as u32).into(),
        DType::BF16 => bf16::from_bits(bits as u16).into(),
        DType::F16 => f16::from_bits(bits as u16).into(),
        dtype if dtype.is_signed() => {
            let unused = 64 - 8 * bytes.len() as u32;
            ((bits << unused) as i64 >> unused) as f64
        }
        _ => bits as f64,
    }
}
