//! Pins every kernel to the StableHLO form that defines it: the same model with kernels and without, in every type of weights
//! and cache, for prompts, chunks and single tokens of one slot and of several; and each operation on odd shapes.

use std::path::Path;

use converter::{Checkpoint, Packing};
use xla::DType;
use xla::graph::{Graph, Platform, Tensor};
use xllama::generation::sampling::{SamplerArgs, SamplerSpec, sample};
use xllama::model::{mlp, rms_norm};
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

/// What a graph of one result gives with kernels and without, and that only one of both calls any.
fn both<T: xla::pjrt::Element>(build: impl Fn(&Graph) -> Tensor) -> [Vec<T>; 2] {
    [true, false].map(|kernels| {
        let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
        let g = Graph::new("test");
        g.set_kernels(if kernels { register_kernels(&plugin) } else { &[] });
        g.output("out", &build(&g));
        let text = g.finish().expect("a valid graph").stablehlo();
        assert_eq!(text.contains("xllama."), kernels, "{text}");
        let executable = client.compile(&text, &compile_options(Platform::Cpu)).expect("it compiles");
        executable.execute(&[]).expect("it runs")[0].to_vec().expect("the type that was asked for")
    })
}

fn agree(what: &str, build: impl Fn(&Graph) -> Tensor) {
    let [with, without] = both::<f32>(build);
    let largest = without.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let worst = with.iter().zip(&without).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(with.len() == without.len() && largest > 0.0 && worst <= 2e-6 * largest, "{what}: {worst} of {largest}");
}

#[test]
fn operations_agree_on_odd_shapes() {
    let cfg = Checkpoint::open(Path::new(&golden("gqa2"))).expect("a checkpoint").config().clone();
    for (rows, m, f) in [(1, 1, 1), (1, 37, 65), (3, 129, 31), (16, 300, 17)] {
        let dims = |g: &Graph| {
            let weight = |shape: [usize; 2], scale| Weight::Float(values(g, &shape, scale));
            let (gate_proj, up_proj, down_proj) = (weight([m, f], 0.05), weight([m, f], 0.04), weight([f, m], 0.3));
            let p = Mlp {
                gate_proj,
                gate_bias: None,
                up_proj,
                up_bias: None,
                down_proj,
                down_bias: None,
                gate_lora: None,
                up_lora: None,
                down_lora: None,
            };
            mlp(&p, &values(g, &[1, rows, m], 1.0), &cfg)
        };
        agree(&format!("a feed-forward of {rows} × {m} × {f}"), dims);
        let norm = |g: &Graph| rms_norm(&values(g, &[1, rows, m], 1.0), &values(g, &[1, m], 1.0).reshape(&[m]), &cfg);
        agree(&format!("a norm of {rows} × {m}"), norm);
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
        let [with, without] = both::<i32>(choose);
        assert_eq!(with, without);
        assert_eq!(with, vec![(vocab as i32 - 1).min(96); rows]);
    }
}
