//! Whole programs: donation, serialization, the text of graphs, and their errors.

use std::cell::RefCell;

use ndarray::{Array1, array};
use xla::DType;
use xla::graph::ops::custom_call::{Attr, CustomCall};
use xla::graph::{Algorithm, Aval, Emission, Graph, Module, einsum};
use xla::pjrt::CompileOptions;

use crate::case::{Case, compile};
use crate::{devices, ffi, on_each};

/// One step of a cache: position `at` gets `new`; beside it the sum of all.
fn step(donate: bool) -> Module {
    let g = Graph::new("step");
    let cache = g.arg("cache", DType::F32, &[1, 51, 3]);
    let new = g.arg("new", DType::F32, &[1, 1, 3]);
    let at = g.arg("at", DType::I32, &[1]);
    let next = cache.update_positions(&new, &at);
    g.output("sum", &next.sum(&[0, 1, 2]));
    if donate {
        g.output_aliased("cache", &next, &cache)
    } else {
        g.output("cache", &next)
    }
    g.finish().unwrap()
}

#[test]
fn a_donated_argument_is_gone_and_the_chain_is_right() {
    on_each(|client| {
        let exe = client.compile(&step(true).stablehlo(), &CompileOptions::default()).unwrap();
        assert!(exe.memory_stats().unwrap().alias >= 51 * 3 * 4);
        let mut cache = client.upload_slice(&[0f32; 153], &[1, 51, 3], None).unwrap();
        for i in 0..50i32 {
            let new = client.upload_slice(&[i as f32, 1.0, -1.0], &[1, 1, 3], None).unwrap();
            let at = client.upload_slice(&[i], &[1], None).unwrap();
            let mut out = exe.execute(&[&cache, &new, &at]).unwrap();
            assert!(cache.is_deleted().unwrap() && !new.is_deleted().unwrap());
            assert!(exe.execute(&[&cache, &new, &at]).is_err(), "a donated buffer is used again");
            assert!(cache.to_host().is_err());
            assert_eq!(out[0].to_vec::<f32>().unwrap(), [(i * (i + 1) / 2) as f32]);
            cache = out.remove(1);
        }
        let mut wanted: Vec<f32> = (0..50).flat_map(|i| [i as f32, 1.0, -1.0]).collect();
        wanted.extend([0.0; 3]);
        assert_eq!(cache.to_vec::<f32>().unwrap(), wanted);
    });
}

#[test]
fn without_donation_the_argument_stays() {
    on_each(|client| {
        let exe = client.compile(&step(false).stablehlo(), &CompileOptions::default()).unwrap();
        assert_eq!(exe.memory_stats().unwrap().alias, 0);
        let cache = client.upload_slice(&[0f32; 153], &[1, 51, 3], None).unwrap();
        let new = client.upload_slice(&[1f32, 2.0, 3.0], &[1, 1, 3], None).unwrap();
        let at = client.upload_slice(&[50i32], &[1], None).unwrap();
        for _ in 0..3 {
            let out = exe.execute(&[&cache, &new, &at]).unwrap();
            assert_eq!(out[0].to_vec::<f32>().unwrap(), [6.0]);
        }
        assert!(!cache.is_deleted().unwrap());
        assert_eq!(cache.to_vec::<f32>().unwrap(), [0.0; 153]);
    });
}

/// A dot, a function called twice, a loop, a sort and a call of a handler.
fn mixed() -> Case {
    let mut c = Case::new("mixed");
    let g = c.g.clone();
    let (x, w) = (c.arg(&array![[1f32, -2.0, 3.0]]), c.arg(&array![[2f32, 0.0], [0.0, 1.0], [1.0, 1.0]]));
    let _scope = g.scope("layers.0");
    let h = einsum("AB,BC->AC", &x, &w).named("h"); // 5, 1
    let twice = g.call("half", &[&h], |a| vec![&a[0] * 0.5]);
    let twice = g.call("half", &[&twice[0]], |_| unreachable!("the function is reused")); // 1.25, 0.25
    let n = g.scalar(3, DType::I32);
    let looped = g.while_loop(&[&n, &twice[0]], |v| v[0].gt(0), |v| vec![&v[0] - 1, &v[1] + &v[1]]); // 10, 2
    let scaled = CustomCall::new(ffi::SCALE, vec![Aval::new(DType::F32, &[1, 2])]).attr("by", Attr::F32(3.0));
    let scaled = g.apply1(scaled, &[&looped[1]]);
    c.is(&scaled.sort(-1, false), &array![[6f32, 30.0]]);
    let many: Array1<f32> = (0..100).map(|i| i as f32).collect();
    let blob = g.constant(many.as_slice().unwrap(), &[100]);
    c.is(&blob, &many);
    c
}

#[test]
fn a_serialized_program_gives_the_same() {
    on_each(|client| {
        for (case, emission) in
            [(mixed(), Emission::Shardy), (devices::mlp(true), Emission::Shardy), (devices::mlp(true), Emission::Gspmd)]
        {
            let module = case.module();
            let bytes = compile(client, &module, emission).unwrap().serialize().unwrap();
            let loaded = client.deserialize(&bytes).unwrap();
            for _ in 0..2 {
                let outputs = case.execute(client, &module, &loaded).unwrap();
                case.check(&module, &outputs).unwrap();
            }
        }
        // Donation is a part of what is serialized.
        let bytes = client.compile(&step(true).stablehlo(), &CompileOptions::default()).unwrap().serialize().unwrap();
        let cache = client.upload_slice(&[0f32; 153], &[1, 51, 3], None).unwrap();
        let new = client.upload_slice(&[1f32, 2.0, 3.0], &[1, 1, 3], None).unwrap();
        let at = client.upload_slice(&[50i32], &[1], None).unwrap();
        let out = client.deserialize(&bytes).unwrap().execute(&[&cache, &new, &at]).unwrap();
        assert_eq!(out[0].to_vec::<f32>().unwrap(), [6.0]);
        assert!(cache.is_deleted().unwrap());
    });
}

#[test]
fn random_bits_are_the_same_everywhere() {
    let g = Graph::new("bits");
    let mut state = g.arg("state", DType::U64, &[2]);
    for (i, (dtype, shape)) in
        [(DType::U32, &[3, 7][..]), (DType::U64, &[5]), (DType::U32, &[]), (DType::U16, &[9]), (DType::U8, &[11])]
            .into_iter()
            .enumerate()
    {
        for algorithm in [Algorithm::ThreeFry, Algorithm::Philox] {
            let (next, bits) = state.rng_bits(algorithm, dtype, shape);
            g.output(&format!("bits {i} {algorithm:?}"), &bits);
            state = next;
        }
    }
    let (next, uniform) = state.rng_uniform(&[999]);
    g.output("state", &next);
    g.output("uniform", &uniform);
    let text = g.finish().unwrap().stablehlo();
    let first = RefCell::new(None);
    on_each(|client| {
        let exe = client.compile(&text, &CompileOptions::default()).unwrap();
        let draw = |seed: u64| -> Vec<Vec<u8>> {
            let state = client.upload_slice(&[seed, 0], &[2], None).unwrap();
            exe.execute(&[&state]).unwrap().iter().map(|out| out.to_host().unwrap()).collect()
        };
        let (drawn, uniform) = (draw(42), exe.outputs().unwrap().len() - 1);
        assert_eq!(drawn, draw(42));
        assert_ne!(drawn[0], draw(43)[0]);
        let numbers: Vec<f32> =
            drawn[uniform].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        assert!(numbers.iter().all(|x| (0.0..1.0).contains(x)));
        let mean = numbers.iter().sum::<f32>() / 999.0;
        assert!((mean - 0.5).abs() < 0.04, "{mean}");
        assert_eq!(*first.borrow_mut().get_or_insert_with(|| drawn.clone()), drawn);
    });
}

/// Names of any kind, an argument that is an output, a tensor that is two outputs, arrays of nothing.
#[test]
fn odd_frames() {
    let g = Graph::new("a name: \"with\" 2 lines\nand é");
    let x = g.arg("x \"quoted\"\\ é\n", DType::F32, &[3]);
    let same = g.arg("x_quoted", DType::F32, &[3]);
    let unused = g.arg("0.main", DType::BF16, &[2]);
    let none = g.arg("none", DType::F32, &[0, 4]);
    let _scope = g.scope("a \"scope\"/%with/@signs");
    let y = g.call("main", &[&x], |a| vec![(&a[0] + 1.0).named("%0 \"y\"")]);
    let nothing = g.call("nothing", &[], |_| vec![]);
    assert!(nothing.is_empty());
    g.output("y \"1\"", &y[0]);
    g.output("y2", &y[0]);
    g.output("passed on", &x);
    g.output_aliased("donated as it is", &same, &same);
    g.output("joined", &g.concatenate(&[&none, &none], 0));
    g.output("nothing's product", &einsum("AB,AC->BC", &none, &none).sum(&[0, 1]));
    g.output("order", &none.sort(1, false));
    g.output("the first none", &y[0].top_k(0).1);
    let module = g.finish().unwrap();
    on_each(|client| {
        for emission in [Emission::Shardy, Emission::Gspmd] {
            let exe = compile(client, &module, emission).unwrap();
            let [a, b] = [[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]].map(|v| client.upload_slice(&v, &[3], None).unwrap());
            let c = client.upload_slice(&[half::bf16::ONE; 2], &[2], None).unwrap();
            let d = client.upload_slice::<f32>(&[], &[0, 4], None).unwrap();
            let out = exe.execute(&[&a, &b, &c, &d]).unwrap();
            let numbers = |i: usize| out[i].to_vec::<f32>().unwrap();
            assert_eq!((numbers(0), numbers(1)), (vec![2.0, 3.0, 4.0], vec![2.0, 3.0, 4.0]));
            assert_eq!((numbers(2), numbers(3), numbers(5)), (vec![1.0, 2.0, 3.0], vec![4.0, 5.0, 6.0], vec![0.0]));
            assert_eq!((out[4].dims(), out[6].dims(), out[7].dims()), (&[0, 4][..], &[0, 4][..], &[0][..]));
            assert!(b.is_deleted().unwrap() && !a.is_deleted().unwrap() && unused.rank() == 1);
        }
    });
}

/// The largest one by one are the largest of the sort, ties included, along the last of several axes.
#[test]
fn both_ways_to_the_largest() {
    let g = Graph::new("largest");
    let x = g.constant(&[1f32, 5.0, 5.0, -2.0, 5.0, 0.0, 0.0, 0.0, f32::NEG_INFINITY, 3.0, -1.0, 3.0], &[2, 2, 3]);
    for (name, (values, positions)) in [("sorted", x.top_k(2)), ("one by one", x.largest(2))] {
        g.output(name, &values);
        g.output(&format!("positions, {name}"), &positions);
    }
    let module = g.finish().unwrap();
    on_each(|client| {
        let out = compile(client, &module, Emission::Shardy).unwrap().execute(&[]).unwrap();
        assert_eq!((out[2].dims(), out[3].dims()), (out[0].dims(), out[1].dims()));
        assert_eq!(out[2].to_vec::<f32>().unwrap(), out[0].to_vec::<f32>().unwrap());
        assert_eq!(out[3].to_vec::<i32>().unwrap(), out[1].to_vec::<i32>().unwrap());
        assert_eq!(out[3].to_vec::<i32>().unwrap(), [1, 2, 1, 2, 0, 1, 0, 2]);
    });
}

#[test]
fn the_same_graph_gives_the_same_text() {
    for emission in [Emission::Shardy, Emission::Gspmd] {
        for build in [mixed, || devices::mlp(true), || devices::mlp(false)] {
            let (first, again) = (build().module(), build().module());
            assert_eq!(first.stablehlo_with(emission), again.stablehlo_with(emission));
            assert_eq!(first.stablehlo_with(emission), first.stablehlo_with(emission), "the text of one module");
        }
    }
}

#[test]
fn the_first_error_is_on_the_users_line() {
    let g = Graph::new("wrong");
    let x = g.arg("x", DType::F32, &[2, 3, 576]);
    let w = g.arg("w", DType::F32, &[512, 9, 64]);
    let _scope = g.scope("layers.0");
    let (line, q) = (line!(), einsum("BSM,MHK->BSHK", &x, &w));
    g.output("q", &q.reshape(&[1])); // A second mistake, on a result of the first.
    let error = g.finish().unwrap_err().to_string();
    let column = "    let (line, q) = (line!(), e".len();
    let message = "einsum \"BSM,MHK->BSHK\": axis M is 576 on the left and 512 on the right (in layers.0)";
    assert_eq!(error, format!("{}:{line}:{column}: {message}", file!()));
}
