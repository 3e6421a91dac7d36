//! Pins that the forms of the graph for TPUs and GPUs compute what the CPU's do: whole prompts in blocks, chunks, steps of
//! one token for one slot and for several, and the weights and caches that a TPU takes in pieces. They run on the CPU here.

use std::path::Path;

use converter::Checkpoint;
use xla::DType;
use xla::graph::{Graph, Platform, Tensor};
use xllama::kv_cache::{LayerCache, Layout, Place};
use xllama::model::{LayerInput, attention, mlp};
use xllama::params::{Attention, Mlp, Weight};
use xllama::runtime::{Engine, LoadOptions, Session, compile_options, device};

use crate::support::{golden, plugin};

/// Grouped heads, all layers windowed, full and windowed layers in one model, and experts.
const CASES: [&str; 4] = ["gqa2", "mistral-window7", "gemma3-window7", "mixtral-5x3"];

/// Two blocks of a TPU's prefill.
const LONG: usize = 1024;

fn engine(case: &str, forms: Platform) -> Engine {
    let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
    let checkpoint = Checkpoint::open(Path::new(&golden(case))).expect("a checkpoint");
    let options = LoadOptions { forms: Some(forms), ..LoadOptions::new(DType::F32, None) };
    Engine::load(plugin, client, &checkpoint, options, &|_, _| ()).expect("it loads")
}

/// The logits of every step, one after another: a long prompt at once, a chunk, two single tokens; then two slots with a
/// prompt each and a single token each.
fn logits(engine: &Engine) -> Vec<Vec<f32>> {
    let vocab = engine.config().vocab_size;
    let ids = |n: usize, salt: usize| (0..n).map(|i| ((i * 31 + i * i * salt) % vocab) as u32).collect::<Vec<_>>();
    let runs = |slots: usize, steps: &[(usize, usize)]| {
        let mut session = Session::new(engine, slots, LONG + 64).expect("a session");
        let one = |&(n, padded): &(usize, usize)| {
            let rows: Vec<Vec<u32>> = (0..slots).map(|slot| ids(n, slot + padded + 1)).collect();
            session.logits(&rows, padded).expect("logits")
        };
        steps.iter().map(one).collect::<Vec<_>>()
    };
    [runs(1, &[(LONG, LONG), (20, 32), (1, 1), (1, 1)]), runs(2, &[(70, 80), (1, 1)])].concat()
}

#[test]
fn every_platforms_forms_agree() {
    for case in CASES {
        let wanted = logits(&engine(case, Platform::Cpu));
        for forms in [Platform::Tpu, Platform::Gpu] {
            for (step, (found, wanted)) in logits(&engine(case, forms)).iter().zip(&wanted).enumerate() {
                assert_eq!(found.len(), wanted.len());
                let worst = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= 1e-4, "{case}, {forms:?}, step {step}: {worst}");
            }
        }
    }
}

/// Numbers that depend on where they stand along the last axes, up to four.
fn values(g: &Graph, shape: &[usize], scale: f64) -> Tensor {
    let along = |(axis, step): (usize, f64)| g.iota(DType::F32, shape, axis) * step;
    let places = (0..shape.len()).rev().zip([1.3, 0.37, 2.1, 0.7]).map(along);
    (places.reduce(|a, b| a + b).expect("an axis").sin() + 0.2) * scale
}

/// The text of a graph of one result in a platform's form, and what it gives.
fn run(platform: Platform, build: impl FnOnce(&Graph) -> Tensor) -> (String, Vec<f32>) {
    let (_, client) = device::open(plugin(), 1).expect("the plugin opens");
    let g = Graph::new("test");
    g.set_platform(platform);
    g.output("out", &build(&g));
    let text = g.finish().expect("a valid graph").stablehlo();
    let executable = client.compile(&text, &compile_options(Platform::Cpu)).expect("it compiles");
    (text, executable.execute(&[]).expect("it runs")[0].to_vec().expect("float32"))
}

/// That a TPU's form has these slices, each so often, and the CPU's none, and that both give the same.
fn agrees(build: impl Fn(&Graph) -> Tensor, slices: &[(&str, usize)]) {
    let ((whole, wanted), (cut, found)) = (run(Platform::Cpu, &build), run(Platform::Tpu, &build));
    for &(slice, count) in slices {
        assert_eq!((cut.matches(slice).count(), whole.matches(slice).count()), (count, 0), "{slice}");
    }
    let largest = wanted.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest > 0.01 && worst <= 1e-4 * largest, "{worst} of {largest}");
}

/// A feed-forward with 52 MB for each weight.
#[test]
fn large_weights_in_pieces_give_the_same() {
    let (m, f) = (1024, 12800);
    let cfg = Checkpoint::open(Path::new(&golden("gqa2"))).expect("a checkpoint").config().clone();
    let build = |g: &Graph| {
        let p = Mlp {
            gate_proj: values(g, &[m, f], 0.05),
            gate_bias: None,
            up_proj: values(g, &[m, f], 0.04),
            up_bias: None,
            down_proj: values(g, &[f, m], 0.03),
            down_bias: None,
            gate_lora: None,
            up_lora: None,
            down_lora: None,
        };
        mlp(&p.map(&mut Weight::Float), &values(g, &[1, 1, m], 1.0), &cfg)
    };
    agrees(build, &[("[0:640, 0:12800]", 2), ("[640:1024, 0:12800]", 2), ("[0:8192, 0:1024]", 1)]);
}

/// One token of each of five slots, whose keys that are read are 63 MB, and as many values; what it gives, and the cache where most
/// of the slots are written to.
#[test]
fn a_large_cache_in_pieces_gives_the_same() {
    let (b, t, read_len, m, h, groups, k) = (5, 16384, 12288, 48, 8, 4, 64);
    let mut cfg = Checkpoint::open(Path::new(&golden("gqa2"))).expect("a checkpoint").config().clone();
    cfg.attention.softcap = Some(3.0);
    let build = |g: &Graph| {
        let p = Attention {
            q_proj: values(g, &[m, h, k], 0.05),
            k_proj: values(g, &[m, groups, k], 0.4),
            v_proj: values(g, &[m, groups, k], 0.3),
            out_proj: values(g, &[h, k, m], 0.2),
            q_bias: None,
            k_bias: None,
            v_bias: None,
            out_bias: None,
            q_norm: None,
            k_norm: None,
            q_lora: None,
            k_lora: None,
            v_lora: None,
            out_lora: None,
        };
        let tpu = g.platform() == Platform::Tpu;
        // The order of a TPU's cache from that of other platforms', and the other way.
        let order = |x: Tensor| if tpu { x } else { x.transpose(&[0, 2, 1, 3]) };
        let cache = [1.0, 0.7].map(|scale| order(values(g, &[b, t, groups, k], scale)));
        let first = g.constant(&[0, 3, 9, read_len as i32 - 1, 5], &[b]);
        let place = Place { positions: first.reshape(&[b, 1]), first, valid: None, table: None, read_len };
        let cache = LayerCache { arrays: cache.to_vec() };
        let at = LayerInput { rope: None, place: &place, cache: &cache, layout: Layout::Static };
        let x = values(g, &[b, 1, m], 1.0);
        let (out, cache) = attention(&p.map(&mut |p| Weight::Float(p)), &[x.clone(), x], &at, &cfg);
        let written = cache.arrays.into_iter().map(|array| order(array).narrow(1, 0, 16));
        let all: Vec<Tensor> =
            std::iter::once(out).chain(written).map(|x| x.reshape(&[x.shape().iter().product()])).collect();
        g.concatenate(&all.iter().collect::<Vec<_>>(), 0)
    };
    let slots = |slots: &str| format!("[{slots}, 0:{t}, 0:{groups}, 0:{k}]");
    agrees(build, &[(&slots("0:4"), 2), (&slots("4:5"), 2)]);
}
