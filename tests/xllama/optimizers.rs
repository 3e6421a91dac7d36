//! Optimizers, clipping and schedules: twenty steps beside PyTorch's in one donated program, the same in a loop, in a function
//! and over a mesh, rates at both ends and between, and a whole training. `scripts/make_optimizer_vectors.py` makes the vectors.

use std::collections::BTreeMap;

use serde::Deserialize;
use xla::DType::{self, BF16, F32, I32};
use xla::graph::{ArgAttrs, Graph, Mesh, Module, Rules, Tensor, einsum};
use xla::pjrt::{Buffer, Client, CompileOptions, LoadedExecutable};
use xllama::runtime::device;
use xllama::training::{Decay, Optimizer, Schedule, clip_by_global_norm};

use crate::support::plugin;

const STEPS: usize = 20;

#[derive(Deserialize)]
struct Vectors {
    start: Vec<Array>,
    decay: Vec<bool>,
    /// By step, then by parameter.
    gradients: Vec<Vec<Vec<f32>>>,
    runs: Vec<Run>,
    clips: Vec<Clip>,
    schedules: Vec<Rates>,
    regression: Regression,
}

#[derive(Deserialize)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f32>,
}

#[derive(Deserialize)]
struct Run {
    optimizer: Optimizer,
    rates: Vec<f32>,
    after: Vec<Vec<Vec<f32>>>,
    state: Vec<BTreeMap<String, Vec<f32>>>,
}

#[derive(Deserialize)]
struct Clip {
    max: f64,
    gradients: Vec<Array>,
    norm: f32,
    clipped: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Rates {
    schedule: Schedule,
    steps: Vec<i32>,
    rates: Vec<f64>,
}

#[derive(Deserialize)]
struct Regression {
    optimizer: Optimizer,
    schedule: Schedule,
    max: f64,
    x: Vec<f32>,
    y: Vec<f32>,
    start: Vec<Vec<f32>>,
    norms: Vec<f32>,
    losses: Vec<f32>,
    after: Vec<Vec<Vec<f32>>>,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../data/training/optimizers.json")).expect("as the script writes it")
}

fn client(devices: usize) -> Client {
    device::open(plugin(), devices).expect("the plugin opens").1
}

fn compile(client: &Client, module: &Module) -> LoadedExecutable {
    let options = module.mesh().map_or_else(CompileOptions::default, |mesh| CompileOptions::sharded(mesh.devices()));
    client.compile(&module.stablehlo(), &options).expect("it compiles")
}

fn upload(client: &Client, values: &[f32], shape: &[usize]) -> Buffer {
    client.upload_slice(values, shape, None).expect("uploaded")
}

fn values(buffer: &Buffer) -> Vec<f32> {
    buffer.to_vec().expect("f32")
}

/// Each value within 1e-6 of itself, or of `floor` where it is below.
#[track_caller]
fn near(what: &str, found: &[f32], wanted: &[f32], floor: f32) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
        assert!((a - b).abs() <= 1e-6 * b.abs().max(floor), "{what}[{i}]: {a}, wanted {b}");
    }
}

/// The largest absolute value.
fn size(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |size, x| size.max(x.abs()))
}

/// Parameters with their state, each donated to what it becomes, the step count, gradients and rate: one step. With
/// `function` the update is called as a function.
fn step_module(optimizer: &Optimizer, start: &[Array], decay: &[bool], function: bool) -> Module {
    let g = Graph::new("step");
    let step = g.arg("step", I32, &[]);
    let mut donated = Vec::new();
    for (i, Array { shape, .. }) in start.iter().enumerate() {
        let state = optimizer.state(shape);
        let arrays = state.iter().map(|(name, aval)| g.arg(&format!("{i}.{name}"), aval.dtype, &aval.shape));
        donated.push([g.arg(&format!("{i}"), F32, shape)].into_iter().chain(arrays).collect::<Vec<_>>());
    }
    let rate = g.arg("rate", F32, &[]);
    let gradients: Vec<Tensor> =
        start.iter().enumerate().map(|(i, x)| g.arg(&format!("{i}.gradient"), F32, &x.shape)).collect();

    g.output_aliased("step", &(&step + 1), &step);
    for (i, (arrays, gradient)) in donated.iter().zip(&gradients).enumerate() {
        let update = |args: &[Tensor]| {
            let [step, rate, gradient, w, state @ ..] = args else { panic!("{} arguments", args.len()) };
            let (w, state) = optimizer.update(w, gradient, state, rate, step, decay[i]);
            [w].into_iter().chain(state).collect::<Vec<_>>()
        };
        let args: Vec<&Tensor> = [&step, &rate, gradient].into_iter().chain(arrays).collect();
        let results = if function {
            g.call(&format!("update.{}", decay[i]), &args, update)
        } else {
            update(&args.into_iter().cloned().collect::<Vec<_>>())
        };
        for (new, old) in results.iter().zip(arrays) {
            g.output_aliased(&old.name().expect("an argument"), new, old);
        }
    }
    g.finish().expect("a valid graph")
}

#[test]
fn twenty_steps_are_pytorchs() {
    let Vectors { start, decay, gradients, runs, .. } = vectors();
    let client = client(1);
    for (at, run) in runs.iter().enumerate() {
        let what = format!("{:?}", run.optimizer);
        let module = step_module(&run.optimizer, &start, &decay, at % 2 == 1);
        let kept = module.args().iter().filter(|arg| arg.aliased_output.is_some()).count();
        let arrays = run.optimizer.state(&[]).len();
        assert_eq!((kept, module.outputs().len()), (1 + start.len() * (1 + arrays), kept), "{what}");

        let exe = compile(&client, &module);
        let mut donated = vec![client.upload_slice(&[0i32], &[], None).expect("uploaded")];
        for Array { shape, values } in &start {
            donated.push(upload(&client, values, shape));
            let zeros = vec![0.0; values.len()];
            donated.extend((0..arrays).map(|_| upload(&client, &zeros, shape)));
        }
        for (turn, gradients) in gradients.iter().enumerate() {
            let mut rest = vec![upload(&client, &run.rates[turn..=turn], &[])];
            rest.extend(gradients.iter().zip(&start).map(|(x, w)| upload(&client, x, &w.shape)));
            let new = exe.execute(&donated.iter().chain(&rest).collect::<Vec<_>>()).expect("it runs");
            assert!(donated.iter().all(|old| old.is_deleted().expect("known")), "{what}: something is not donated");
            donated = new;
            for (i, wanted) in run.after[turn].iter().enumerate() {
                let found = values(&donated[1 + i * (1 + arrays)]);
                near(&format!("{what}, parameter {i} after step {turn}"), &found, wanted, 0.0);
            }
        }
        assert_eq!(donated[0].to_vec::<i32>().expect("i32"), [STEPS as i32]);
        for (i, wanted) in run.state.iter().enumerate() {
            assert_eq!(wanted.len(), arrays, "{what}");
            for (k, (name, _)) in run.optimizer.state(&[]).iter().enumerate() {
                let (found, wanted) = (values(&donated[2 + i * (1 + arrays) + k]), &wanted[*name]);
                near(&format!("{what}, {name} of parameter {i}"), &found, wanted, size(wanted));
            }
        }
    }
}

#[test]
fn a_loop_of_steps_is_the_same() {
    let Vectors { start, decay, gradients, runs, .. } = vectors();
    let client = client(1);
    for run in &runs {
        let arrays = run.optimizer.state(&[]).len();
        let g = Graph::new("steps");
        let mut init = vec![g.scalar(0, I32)];
        for x in &start {
            init.push(g.constant(&x.values, &x.shape));
            init.extend((0..arrays).map(|_| g.full(0, F32, &x.shape)));
        }
        let mut xs = vec![g.constant(&run.rates, &[STEPS])];
        for (i, x) in start.iter().enumerate() {
            let stacked: Vec<f32> = gradients.iter().flat_map(|step| step[i].clone()).collect();
            xs.push(g.constant(&stacked, &[&[STEPS][..], &x.shape].concat()));
        }
        let (carry, stacks) = g.scan(
            "steps",
            STEPS,
            &[],
            &init.iter().collect::<Vec<_>>(),
            &xs.iter().collect::<Vec<_>>(),
            |_, carry, xs| {
                let (step, (rate, gradients)) = (&carry[0], xs.split_first().expect("a rate"));
                let mut next = vec![step + 1];
                let mut stacks = Vec::new();
                for (i, (arrays, gradient)) in carry[1..].chunks(1 + arrays).zip(gradients).enumerate() {
                    let (w, state) = run.optimizer.update(&arrays[0], gradient, &arrays[1..], rate, step, decay[i]);
                    stacks.push(w.clone());
                    next.extend([w].into_iter().chain(state));
                }
                (next, stacks)
            },
        );
        g.output("step", &carry[0]);
        stacks.iter().enumerate().for_each(|(i, stack)| g.output(&format!("{i}"), stack));
        let found = compile(&client, &g.finish().expect("a valid graph")).execute(&[]).expect("it runs");
        assert_eq!(found[0].to_vec::<i32>().expect("i32"), [STEPS as i32]);
        for i in 0..start.len() {
            let wanted: Vec<f32> = run.after.iter().flat_map(|step| step[i].clone()).collect();
            near(&format!("{:?}, parameter {i}", run.optimizer), &values(&found[1 + i]), &wanted, 0.0);
        }
    }
}

#[test]
fn clipping_is_pytorchs() {
    let client = client(1);
    for case in vectors().clips {
        let g = Graph::new("clip");
        let args: Vec<Tensor> = (case.gradients.iter().enumerate())
            .map(|(i, gradient)| g.arg(&format!("{i}"), F32, &gradient.shape))
            .collect();
        let (clipped, norm) = clip_by_global_norm(&args, case.max);
        g.output("norm", &norm);
        clipped.iter().enumerate().for_each(|(i, x)| g.output(&format!("{i}"), x));
        let exe = compile(&client, &g.finish().expect("a valid graph"));
        let buffers: Vec<Buffer> = case.gradients.iter().map(|x| upload(&client, &x.values, &x.shape)).collect();
        let found = exe.execute(&buffers.iter().collect::<Vec<_>>()).expect("it runs");
        near("norm", &values(&found[0]), &[case.norm], 0.0);
        for (found, wanted) in found[1..].iter().zip(&case.clipped) {
            near("clipped", &values(found), wanted, 0.0);
        }
    }
}

#[test]
fn narrow_gradients_are_widened_first() {
    let g = Graph::new("narrow");
    // The square of 1 + 2⁻⁷ is between two numbers of bf16, and 256 times it is a sum that bf16 has not either.
    let gradient = g.full(1.0078125, BF16, &[256]);
    let (clipped, norm) = clip_by_global_norm(std::slice::from_ref(&gradient), f64::INFINITY);
    let w = g.full(1.0, F32, &[256]);
    let sgd = Optimizer::Sgd(Default::default());
    let (new, state) = sgd.update(&w, &gradient, &[], &g.scalar(0.001, F32), &g.scalar(0, I32), true);
    assert!(state.is_empty() && clipped[0].dtype() == F32 && norm.dtype() == F32 && new.dtype() == F32);
    g.output("norm", &norm);
    g.output("new", &new.narrow(0, 0, 1));
    let found = compile(&client(1), &g.finish().expect("a valid graph")).execute(&[]).expect("it runs");
    near("norm", &values(&found[0]), &[16.125], 0.0);
    near("new", &values(&found[1]), &[1.0 - 0.001 * 1.0078125], 0.0);
}

/// The rates of these steps, in one program.
fn rates(client: &Client, schedule: &Schedule, steps: &[i32]) -> Vec<f32> {
    let g = Graph::new("rates");
    let xs = g.constant(steps, &[steps.len()]);
    let (_, stacks) = g.scan("rates", steps.len(), &[], &[], &[&xs], |_, _, xs| (vec![], vec![schedule.rate(&xs[0])]));
    g.output("rates", &stacks[0]);
    let module = g.finish().expect("a valid graph");
    values(&compile(client, &module).execute(&[]).expect("it runs")[0])
}

#[test]
fn rates_are_those_of_the_formulas() {
    let client = client(1);
    for case in vectors().schedules {
        let found = rates(&client, &case.schedule, &case.steps);
        for ((step, found), wanted) in case.steps.iter().zip(&found).zip(&case.rates) {
            let off = (f64::from(*found) - wanted).abs();
            assert!(off <= 1e-6 * wanted, "{:?}, step {step}: {found}, wanted {wanted}", case.schedule);
        }
    }
}

#[test]
fn rates_are_exact_at_the_ends() {
    let client = client(1);
    // A third and a peak that no float is.
    let (peak, final_fraction, warmup, steps) = (0.3e-3, 1.0 / 3.0, 37, 1003);
    let last = (peak * final_fraction) as f32;
    let decays = [
        Decay::Linear { steps, final_fraction },
        Decay::Cosine { steps, final_fraction },
        Decay::Wsd { steps, decay_steps: 100, final_fraction },
    ];
    for decay in decays {
        let schedule = Schedule { peak, warmup, decay };
        let (warm, end) = (warmup as i32, steps as i32);
        let found = rates(&client, &schedule, &[0, warm, end, end + 1, i32::MAX]);
        assert_eq!(found, [0.0, peak as f32, last, last, last], "{schedule:?}");
        if let Decay::Wsd { decay_steps, .. } = decay {
            let stable = [warm + 1, end / 2, end - decay_steps as i32];
            assert_eq!(rates(&client, &schedule, &stable), [peak as f32; 3], "{schedule:?}");
        }
    }
    // A warm-up and nothing else, and a decay at once.
    let schedule = Schedule { peak, warmup: 4, decay: Decay::Linear { steps: 4, final_fraction } };
    let found = rates(&client, &schedule, &[0, 2, 4, 5]);
    assert_eq!(found, [0.0, (peak / 2.0) as f32, last, last]);
    let schedule = Schedule { peak, warmup: 0, decay: Decay::Constant };
    assert_eq!(rates(&client, &schedule, &[0, i32::MAX]), [peak as f32; 2]);
}

#[test]
fn a_training_is_pytorchs() {
    let case = vectors().regression;
    let g = Graph::new("train");
    let shapes: [&[usize]; 2] = [&[4, 3], &[3]];
    let step = g.arg("step", I32, &[]);
    let weights = [g.arg("w", F32, shapes[0]), g.arg("b", F32, shapes[1])];
    let states: Vec<Vec<Tensor>> = (weights.iter())
        .map(|w| {
            let name = w.name().expect("an argument");
            let state = case.optimizer.state(w.shape());
            state.iter().map(|(array, aval)| g.arg(&format!("{name}.{array}"), aval.dtype, &aval.shape)).collect()
        })
        .collect();
    let (x, y) = (g.constant(&case.x, &[6, 4]), g.constant(&case.y, &[6, 3]));
    let product = einsum("NM,MF->NF", &x, &weights[0]);
    let loss = (product + weights[1].broadcast_to(&[6, 3]) - y).square().mean(&[0, 1]);
    let (gradients, norm) = clip_by_global_norm(&g.grad(&loss, &[&weights[0], &weights[1]]), case.max);
    let rate = case.schedule.rate(&step);
    g.output_aliased("step", &(&step + 1), &step);
    let mut donated = Vec::new();
    for (i, w) in weights.iter().enumerate() {
        let (new, state) = case.optimizer.update(w, &gradients[i], &states[i], &rate, &step, i == 0);
        donated.push((new, w));
        donated.extend(state.into_iter().zip(&states[i]));
    }
    // The arguments' order.
    donated.sort_by_key(|(_, old)| old.id());
    for (new, old) in &donated {
        g.output_aliased(&old.name().expect("an argument"), new, old);
    }
    g.output("norm", &norm);
    g.output("loss", &loss);

    let client = client(1);
    let exe = compile(&client, &g.finish().expect("a valid graph"));
    let mut kept = vec![client.upload_slice(&[0i32], &[], None).expect("uploaded")];
    kept.extend(case.start.iter().zip(shapes).map(|(values, shape)| upload(&client, values, shape)));
    for (shape, start) in shapes.into_iter().zip(&case.start) {
        let zeros = vec![0.0; start.len()];
        kept.extend((0..2).map(|_| upload(&client, &zeros, shape)));
    }
    for turn in 0..STEPS {
        let mut results = exe.execute(&kept.iter().collect::<Vec<_>>()).expect("it runs");
        let loss = values(&results.pop().expect("a loss"));
        let norm = values(&results.pop().expect("a norm"));
        kept = results;
        near(&format!("loss {turn}"), &loss, &case.losses[turn..=turn], 0.0);
        near(&format!("norm {turn}"), &norm, &case.norms[turn..=turn], 0.0);
        for (i, wanted) in case.after[turn].iter().enumerate() {
            near(&format!("weights {i} after step {turn}"), &values(&kept[1 + i]), wanted, size(wanted));
        }
    }
}

#[test]
fn two_devices_take_the_same_steps() {
    let shape = [4, 3];
    let numbers = |seed: usize| -> Vec<f32> { (0..12).map(|i| ((i * 7 + seed * 5) % 13) as f32 / 6.0 - 1.0).collect() };
    let (start, pulls) = (numbers(1), [numbers(2), numbers(3), numbers(4)]);
    let optimizer = Optimizer::AdamW(Default::default());
    let decay = Decay::Cosine { steps: 3, final_fraction: 0.1 };
    let schedule = Schedule { peak: 0.1, warmup: 1, decay };
    let build = |mesh: Option<Mesh>| {
        let g = Graph::new("step");
        if let Some(mesh) = mesh {
            g.set_mesh(mesh, Rules::new(&[("embed", &["fsdp"])]));
        }
        let arg =
            |name: &str, dtype: DType| g.arg_with(name, dtype, &shape, ArgAttrs { sharding: Some(&["embed", ""]) });
        let step = g.arg("step", I32, &[]);
        let (w, m, v, gradient) = (arg("w", F32), arg("m", F32), arg("v", F32), arg("gradient", F32));
        let (clipped, norm) = clip_by_global_norm(&[gradient], 0.5);
        let state = [m.clone(), v.clone()];
        let (new, state) = optimizer.update(&w, &clipped[0], &state, &schedule.rate(&step), &step, true);
        g.output_aliased("step", &(&step + 1), &step);
        for (new, old) in [(&new, &w), (&state[0], &m), (&state[1], &v)] {
            g.output_aliased(&old.name().expect("an argument"), new, old);
        }
        g.output("norm", &norm);
        g.finish().expect("a valid graph")
    };
    // What each of `devices` devices has after every step: its rows of w, and the norm.
    let run = |module: &Module, devices: usize| -> Vec<Vec<f32>> {
        let client = client(devices);
        let exe = compile(&client, module);
        let places = exe.addressable_devices().expect("devices");
        let rows = |values: &[f32], d: usize| {
            let n = values.len() / devices;
            let dims = [shape[0] / devices, shape[1]];
            client.upload_slice(&values[d * n..(d + 1) * n], &dims, Some(&places[d])).expect("uploaded")
        };
        let mut kept: Vec<Vec<Buffer>> = (0..devices)
            .map(|d| {
                let step = client.upload_slice(&[0i32], &[], Some(&places[d])).expect("uploaded");
                vec![step, rows(&start, d), rows(&[0.0; 12], d), rows(&[0.0; 12], d)]
            })
            .collect();
        let mut found = Vec::new();
        for pull in &pulls {
            let gradients: Vec<Buffer> = (0..devices).map(|d| rows(pull, d)).collect();
            let lists: Vec<Vec<&Buffer>> =
                kept.iter().zip(&gradients).map(|(kept, gradient)| kept.iter().chain([gradient]).collect()).collect();
            let results = exe.execute_sharded(&lists).expect("it runs");
            assert!(kept.iter().flatten().all(|old| old.is_deleted().expect("known")));
            found.push(results.iter().flat_map(|list| values(&list[1])).collect());
            results.iter().for_each(|list| near("norm", &values(&list[4]), &values(&results[0][4]), 0.0));
            found.push(values(&results[0][4]));
            kept = results.into_iter().map(|mut list| list.drain(..4).collect()).collect();
        }
        found
    };
    let wanted = run(&build(None), 1);
    let found = run(&build(Mesh::new([("fsdp", 2)]).ok()), 2);
    for (found, wanted) in found.iter().zip(&wanted) {
        near("on two devices", found, wanted, 0.1);
    }
}
