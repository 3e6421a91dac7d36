//! Pins every kernel to the StableHLO form that defines it: the same model with kernels and without, in every type of weights
//! and cache, for prompts, chunks and single tokens of one slot and of several; and each operation on odd shapes.

use std::path::Path;

use converter::{Checkpoint, Packing};
use xla::DType;
use xla::graph::{Graph, MATMUL, Platform, Tensor, einsum_as};
use xllama::config::Activation;
use xllama::generation::sampling::{SamplerArgs, SamplerSpec, sample};
use xllama::kv_cache::{Order, Past};
use xllama::model::{ATTEND, ATTEND_GRADIENT, GATE, GATE_GRADIENT, Queries, mlp, rms_norm};
use xllama::params::{Mlp, Weight};
use xllama::precision::{Integers, Precision};
use xllama::runtime::{CacheOptions, Engine, LoadOptions, compile_options, device, register_kernels};

use crate::support::{golden, logits, plugin};

fn engine(case: &str, precision: Precision, cache: Option<DType>, kernels: bool) -> Engine {
    let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
    let checkpoint = Checkpoint::open(Path::new(&golden(case))).expect("a checkpoint");
    let options = LoadOptions { precision, kernels, ..LoadOptions::new(DType::F32, None) };
    let engine = Engine::load(plugin, client, &checkpoint, options, &|_, _| ()).expect("it loads");
    engine.with_cache(CacheOptions { dtype: cache, ..CacheOptions::default() })
}

/// The largest difference, as a share of the largest logit.
fn worst(case: &str, precision: Precision, cache: Option<DType>) -> f32 {
    let [with, without] = [true, false].map(|kernels| logits(&engine(case, precision, cache, kernels)));
    assert_eq!(with.len(), without.len());
    let largest = without.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    with.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

fn packed(packing: Packing) -> Precision {
    Precision { dtype: DType::F32, integers: Integers::All(packing) }
}

#[test]
fn models_agree_with_their_definition() {
    // Sums in another order, and what they turn where numbers are rounded afterwards: to bf16 2⁻⁹, to f16 2⁻¹², to int8 2⁻⁸ of a group.
    let (exact, half, bf16, codes) = (1e-5, 2e-3, 1e-2, 2e-2);
    let mut failed = Vec::new();
    let mut check = |case: &str, precision: Precision, cache: Option<DType>, limit: f32| {
        let worst = worst(case, precision, cache);
        println!("{case} {precision:?} {cache:?}: {worst:.1e} of {limit:.0e}");
        if worst.is_nan() || worst > limit {
            failed.push(format!("{case} {precision:?} {cache:?}: {worst:.1e} > {limit:.0e}"));
        }
    };
    for case in ["gqa2", "mistral-window7", "gemma3-window7", "mixtral-5x3"] {
        check(case, DType::F32.into(), None, exact);
        check(case, DType::BF16.into(), None, bf16);
    }
    for (cache, limit) in [(DType::BF16, bf16), (DType::F16, half), (DType::I8, codes)] {
        check("gqa2", DType::F32.into(), Some(cache), limit);
        check("mistral-window7", DType::F32.into(), Some(cache), limit);
    }
    check("gqa2", DType::F16.into(), None, half);
    for packing in [Packing::INT8, Packing::INT4] {
        check("gqa2", packed(packing), Some(DType::F32), codes);
        check("mixtral-5x3", packed(packing), Some(DType::F32), codes);
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Numbers of both signs, the same in every program.
fn values(g: &Graph, shape: &[usize], scale: f32) -> Tensor {
    let data: Vec<f32> = (0..shape.iter().product()).map(|i: usize| ((i as f32 * 1.3).sin() + 0.2) * scale).collect();
    g.constant(&data, shape)
}

/// What a graph of one result gives with kernels, those of inference if `names` are none, and without, and that only one of both calls
/// any.
fn both<T: xla::pjrt::Element>(
    names: Option<&'static [&'static str]>,
    build: impl Fn(&Graph) -> Tensor,
) -> [Vec<T>; 2] {
    [true, false].map(|kernels| {
        let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
        let g = Graph::new("test");
        let registered = register_kernels(&plugin);
        g.set_kernels(if kernels { names.unwrap_or(registered) } else { &[] });
        g.output("out", &build(&g));
        let text = g.finish().expect("a valid graph").stablehlo();
        assert_eq!(text.contains("stablehlo.custom_call @"), kernels, "{text}");
        let executable = client.compile(&text, &compile_options(Platform::Cpu)).expect("it compiles");
        executable.execute(&[]).expect("it runs")[0].to_vec().expect("the type that was asked for")
    })
}

fn agree(what: &str, build: impl Fn(&Graph) -> Tensor) {
    within(2e-6, what, both::<f32>(None, build));
}

/// That these are the same but for a part of the largest.
fn within(tolerance: f32, what: &str, [with, without]: [Vec<f32>; 2]) {
    let largest = without.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let worst = with.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let alike = with.len() == without.len() && largest > 0.0 && worst <= tolerance * largest;
    assert!(alike, "{what}: {worst} of {largest}");
}

/// The gradients of Σ weight · y by each of these, as one row.
fn gradients(y: &Tensor, by: &[&Tensor]) -> Tensor {
    let g = y.graph();
    let loss = (y * values(g, y.shape(), 0.7)).sum(&(0..y.rank() as isize).collect::<Vec<_>>());
    let rows: Vec<Tensor> = g.grad(&loss, by).iter().map(|x| x.reshape(&[x.shape().iter().product()])).collect();
    g.concatenate(&rows.iter().collect::<Vec<_>>(), 0)
}

/// More rows than a tile has, windows, softcaps, several slots and heads, and every activation.
#[test]
fn derivatives_agree_on_odd_shapes() {
    let sizes = [[1, 1, 1, 1, 1, 1], [2, 5, 3, 2, 37, 9], [1, 130, 2, 3, 20, 130], [3, 70, 1, 5, 64, 150]];
    for ([b, s, groups, r, k, t], (window, softcap)) in
        sizes.into_iter().flat_map(|sizes| [(None, None), (Some(7), Some(0.8))].map(|form| (sizes, form)))
    {
        let names = Some(&[ATTEND, ATTEND_GRADIENT][..]);
        let found = both(names, |g| {
            let q = values(g, &[b, s, groups, r, k], 0.4);
            let (keys, v) = (values(g, &[b, groups, t, k], 0.9), values(g, &[b, groups, t, k], 1.1));
            let positions = g.iota(DType::I32, &[b, s], 1) + (t - s) as i64;
            let order = window.map_or(Order::Absolute, |window| Order::Windowed { window });
            let past =
                Past { k: keys.clone(), v: v.clone(), scales: None, positions: g.iota(DType::I32, &[b, t], 1), order };
            let queries = Queries { q: q.clone(), positions: &positions, first_row: None, softcap, sinks: None };
            gradients(&queries.attend(&past), &[&q, &keys, &v])
        });
        within(1e-5, &format!("attention {b} {s} {groups} {r} {k} {t}, window {window:?}, softcap {softcap:?}"), found);
    }
    let mut cfg = Checkpoint::open(Path::new(&golden("gqa2"))).expect("a checkpoint").config().clone();
    for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
        cfg.hidden_act = act;
        let found = both(Some(&[GATE, GATE_GRADIENT]), |g| {
            let (x, p) = (values(g, &[2, 7, 33], 1.0), feed_forward(g, 33, 65));
            gradients(&mlp(&p, &x, &cfg), &[&x, &p.gate_proj.float(), &p.up_proj.float(), &p.down_proj.float()])
        });
        within(1e-5, &format!("a gate with {act:?}"), found);
    }
}

/// Each product and both its derivatives, one of which contracts the rows.
#[test]
fn products_of_matrices_agree_on_odd_shapes() {
    for (rows, k, n, dtype) in [(9, 8, 17, DType::F32), (37, 145, 65, DType::F32), (50, 300, 70, DType::BF16)] {
        let found = both(Some(&[MATMUL]), |g| {
            let (x, w) = (values(g, &[2, rows, k], 1.0).cast(dtype), values(g, &[k, n], 0.3).cast(dtype));
            gradients(&einsum_as("BSM,MF->BSF", &x, &w, DType::F32).tanh(), &[&x, &w]).cast(DType::F32)
        });
        within(if dtype == DType::F32 { 1e-5 } else { 1e-2 }, &format!("{rows} × {k} × {n} {dtype}"), found);
    }
}

fn feed_forward(g: &Graph, m: usize, f: usize) -> Mlp<Weight> {
    let weight = |shape: [usize; 2], scale| Weight::Float(values(g, &shape, scale));
    let (gate_proj, up_proj, down_proj) = (weight([m, f], 0.05), weight([m, f], 0.04), weight([f, m], 0.3));
    let [gate_bias, up_bias, down_bias] = [None, None, None];
    let [gate_lora, up_lora, down_lora] = [None, None, None];
    Mlp { gate_proj, gate_bias, up_proj, up_bias, down_proj, down_bias, gate_lora, up_lora, down_lora }
}

#[test]
fn operations_agree_on_odd_shapes() {
    let cfg = Checkpoint::open(Path::new(&golden("gqa2"))).expect("a checkpoint").config().clone();
    for (rows, m, f) in [(1, 1, 1), (1, 37, 65), (3, 129, 31), (16, 300, 17)] {
        let dims = |g: &Graph| mlp(&feed_forward(g, m, f), &values(g, &[1, rows, m], 1.0), &cfg);
        agree(&format!("a feed-forward of {rows} × {m} × {f}"), dims);
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let weight = |g: &Graph| values(g, &[1, m], 1.0).reshape(&[m]).cast(dtype);
            let norm = |g: &Graph| rms_norm(&values(g, &[1, rows, m], 1.0), &weight(g), &cfg);
            agree(&format!("a norm of {rows} × {m} by {dtype}"), norm);
        }
    }
}

#[test]
fn the_likeliest_token_is_the_first_of_the_largest() {
    for (rows, vocab) in [(1, 1), (2, 50), (3, 20_001)] {
        // Equal values every 97 places.
        let logits = |g: &Graph| (g.iota(DType::F32, &[rows, vocab], 1) % 97.0) * 0.5;
        let choose = |g: &Graph| {
            let position = g.full(0i64, DType::I32, &[rows]);
            sample(&logits(g), &position, &SamplerArgs::declare(g, SamplerSpec::default(), rows, vocab))
        };
        let [with, without] = both::<i32>(None, choose);
        assert_eq!(with, without);
        assert_eq!(with, vec![(vocab as i32 - 1).min(96); rows]);
    }
}
