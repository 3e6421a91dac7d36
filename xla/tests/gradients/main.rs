//! Every op's derivative: against central finite differences in f64, against PyTorch where it has the op, and in forward
//! mode against reverse mode. An op without a row fails the run, as does a golden without one.

#[path = "../pjrt_support/mod.rs"]
mod pjrt_support;

mod functions;
mod rows;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use rows::{ROWS, Row, Shows};
use serde::Deserialize;
use xla::DType::F64;
use xla::graph::{Gradient, Graph, Module, Tensor, ops};
use xla::pjrt::{
    CallFrame, Client, CompileOptions, FfiError, Handler, HostData, LoadedExecutable, OptionOverride, Value,
};

/// Rows of this many devices at most.
const DEVICES: usize = 4;

fn client() -> &'static Client {
    static CLIENT: OnceLock<Client> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let plugin = pjrt_support::cpu_plugins().into_iter().next().expect("a CPU plugin for this machine");
        plugin.register_handler::<TanhSquare>("Host").unwrap();
        plugin.client(&[("cpu_device_count", Value::from(DEVICES as i64))]).unwrap()
    })
}

/// tanh² x.
struct TanhSquare;

impl Handler for TanhSquare {
    const NAME: &'static str = "gradients.tanh_square";

    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError> {
        let x = frame.arg::<f64>(0)?;
        frame.result::<f64>(0)?.iter_mut().zip(x).for_each(|(y, x)| *y = x.tanh().powi(2));
        Ok(())
    }
}

/// An array of f64.
#[derive(Clone, Debug, Deserialize)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

/// Numbers from 0 to 1, the same for the same seed (SplitMix64).
fn noise(seed: u64, n: usize) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n).map(|_| next()).collect()
}

/// One compiled program of f64 arguments and results.
struct Program {
    exe: LoadedExecutable,
}

impl Program {
    fn new(module: &Module) -> Program {
        let mut options = match module.mesh() {
            Some(mesh) => CompileOptions::sharded(mesh.devices()),
            None => CompileOptions::default(),
        };
        options.env_options.insert("xla_cpu_enable_fast_min_max".into(), OptionOverride::Bool(false));
        let text = module.stablehlo();
        let exe = client().compile(&text, &options).unwrap_or_else(|e| panic!("{e}\n{text}"));
        Program { exe }
    }

    /// Runs it with the same whole arguments on each device; the results of the first.
    fn run(&self, args: &[Array]) -> Vec<Vec<f64>> {
        let mut lists = Vec::new();
        for device in &self.exe.addressable_devices().unwrap() {
            let upload = |array: &Array| {
                let bytes: Vec<u8> = array.values.iter().flat_map(|x| x.to_le_bytes()).collect();
                client().upload(HostData::Borrowed(&bytes), F64, &array.shape, Some(device)).unwrap()
            };
            lists.push(args.iter().map(upload).collect::<Vec<_>>());
        }
        let lists: Vec<Vec<_>> = lists.iter().map(|list| list.iter().collect()).collect();
        let results = self.exe.execute_sharded(&lists).unwrap_or_else(|e| panic!("{e}"));
        let numbers =
            |bytes: Vec<u8>| bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
        results[0].iter().map(|buffer| numbers(buffer.to_host().unwrap())).collect()
    }
}

/// A row's arguments in a graph, and what it makes of them.
fn built(row: &Row, inputs: &[Array]) -> (Graph, Vec<Tensor>, Vec<Tensor>) {
    let g = Graph::new(row.op);
    (row.prepare)(&g);
    let args: Vec<Tensor> = inputs.iter().enumerate().map(|(i, x)| g.arg(&format!("x{i}"), F64, &x.shape)).collect();
    let outputs = (row.build)(&g, &args);
    (g, args, outputs)
}

/// Fixed cotangents of the outputs.
fn cotangents(outputs: &[Tensor]) -> Vec<Array> {
    let one = |(j, y): (usize, &Tensor)| {
        let values = noise(100 + j as u64, y.aval().elements()).iter().map(|x| 2.0 * x - 1.0).collect();
        Array { shape: y.shape().to_vec(), values }
    };
    outputs.iter().enumerate().map(one).collect()
}

/// Σ output · cotangent.
fn weighed(g: &Graph, outputs: &[Tensor], weights: &[Array]) -> Tensor {
    let each = outputs.iter().zip(weights).map(|(y, w)| {
        let axes: Vec<isize> = (0..y.rank() as isize).collect();
        (y * g.constant(&w.values, &w.shape)).sum(&axes)
    });
    each.reduce(|a, b| a + b).expect("an output")
}

/// One case of the golden file.
#[derive(Deserialize)]
struct Golden {
    inputs: Vec<Array>,
    cotangents: Vec<Array>,
    gradients: Vec<Array>,
}

fn goldens() -> BTreeMap<String, Golden> {
    let text = include_str!("../data/gradients.json");
    serde_json::from_str(text).unwrap()
}

/// The largest difference, as a part of the larger of 1 and the largest number.
fn distance(found: &[f64], wanted: &[f64]) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let size = wanted.iter().fold(1f64, |m, x| m.max(x.abs()));
    found.iter().zip(wanted).fold(0f64, |m, (a, b)| {
        let d = (a - b).abs() / size;
        if d.is_nan() { f64::INFINITY } else { m.max(d) }
    })
}

/// All that a row must show; the first thing that it does not is the error.
fn check(row: &Row, golden: Option<&Golden>) -> Result<(), String> {
    let inputs: Vec<Array> = match golden {
        Some(golden) => golden.inputs.clone(),
        None => (row.inputs.iter().enumerate())
            .map(|(i, &(shape, low, high))| {
                let n = shape.iter().product();
                let values = noise(i as u64 + 1, n).iter().map(|x| low + (high - low) * x).collect();
                Array { shape: shape.to_vec(), values }
            })
            .collect(),
    };
    let (g, args, outputs) = built(row, &inputs);
    let weights = golden.map_or_else(|| cotangents(&outputs), |golden| golden.cotangents.clone());
    let refs: Vec<&Tensor> = args.iter().collect();
    let loss = weighed(&g, &outputs, &weights);
    let gradients = g.grad(&loss, &refs);
    g.output("loss", &loss);
    gradients.iter().enumerate().for_each(|(i, x)| g.output(&format!("dx{i}"), x));
    let module = g.finish().map_err(|e| e.to_string())?;
    let made = module.body().op_names();
    if !made.contains(row.op) {
        return Err(format!("the row makes {made:?}"));
    }
    let results = Program::new(&module).run(&inputs);
    let found = &results[1..];
    if let Some(golden) = golden {
        for (i, (found, wanted)) in found.iter().zip(&golden.gradients).enumerate() {
            let off = distance(found, &wanted.values);
            if off > 1e-13 {
                return Err(format!("operand {i} is {off:.1e} from PyTorch: {found:?}, wanted {:?}", wanted.values));
            }
        }
    }

    // Central differences: their own error is some 1e-10 of the function.
    let (g, _, outputs) = built(row, &inputs);
    g.output("loss", &weighed(&g, &outputs, &weights));
    let value = Program::new(&g.finish().map_err(|e| e.to_string())?);
    let at = |inputs: &[Array]| value.run(inputs)[0][0];
    if distance(&[at(&inputs)], &results[0]) > 1e-14 {
        return Err(format!("the value beside its gradient is {:?}, alone {}", results[0], at(&inputs)));
    }
    for (i, found) in found.iter().enumerate().filter(|_| row.shows == Shows::All) {
        let difference = |e: usize| {
            let mut moved = inputs.clone();
            let h = 1e-6 * inputs[i].values[e].abs().max(1.0);
            moved[i].values[e] = inputs[i].values[e] + h;
            let above = at(&moved);
            moved[i].values[e] = inputs[i].values[e] - h;
            (above - at(&moved)) / (2.0 * h)
        };
        let wanted: Vec<f64> = (0..found.len()).map(difference).collect();
        let off = distance(found, &wanted);
        if off > 1e-7 {
            return Err(format!("operand {i} is {off:.1e} from differences: {found:?}, wanted {wanted:?}"));
        }
    }

    // Σ ct · (J t) = Σ (ctᵀ J) · t.
    if row.shows == Shows::Rounded {
        return Ok(());
    }
    let (g, args, outputs) = built(row, &inputs);
    let tangents: Vec<Array> = (inputs.iter().enumerate())
        .map(|(i, x)| Array { shape: x.shape.clone(), values: noise(200 + i as u64, x.values.len()) })
        .collect();
    let constants: Vec<Tensor> = tangents.iter().map(|t| g.constant(&t.values, &t.shape)).collect();
    let pairs: Vec<(&Tensor, &Tensor)> = args.iter().zip(&constants).collect();
    let pushed = g.jvp(&outputs.iter().collect::<Vec<_>>(), &pairs);
    g.output("forward", &weighed(&g, &pushed, &weights));
    let forward = Program::new(&g.finish().map_err(|e| format!("jvp: {e}"))?).run(&inputs)[0][0];
    let pulled: f64 = found.iter().zip(&tangents).flat_map(|(g, t)| g.iter().zip(&t.values).map(|(a, b)| a * b)).sum();
    let off = distance(&[forward], &[pulled]);
    if off > 1e-12 {
        return Err(format!("forward mode gives {forward}, reverse mode {pulled}"));
    }
    Ok(())
}

#[test]
fn every_op() {
    let goldens = goldens();
    let mut failures = Vec::new();
    for row in ROWS {
        if let Err(message) = check(row, goldens.get(row.name)) {
            failures.push(format!("{} ({}): {message}", row.op, row.name));
        }
    }
    for name in goldens.keys().filter(|name| !ROWS.iter().any(|row| row.name == **name)) {
        failures.push(format!("the golden {name} has no row"));
    }
    for info in ops::ALL {
        match info.gradient {
            Gradient::Missing(_) => {}
            _ if ROWS.iter().any(|row| row.op == info.name) => {}
            _ => failures.push(format!("{} has no row", info.name)),
        }
    }
    assert!(failures.is_empty(), "{} of {} rows fail:\n{}", failures.len(), ROWS.len(), failures.join("\n"));
}
