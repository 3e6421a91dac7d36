//! Whole programs: donation, serialization, the text of graphs, and their errors.

use ndarray::{Array1, array};
use xla::DType;
use xla::graph::ops::custom_call::{Attr, CustomCall};
use xla::graph::{Aval, Emission, Graph, Module, einsum};
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
    if donate { g.output_aliased("cache", &next, &cache) } else { g.output("cache", &next) }
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
        for (case, emission) in [
            (mixed(), Emission::Shardy),
            (devices::mlp(true), Emission::Shardy),
            (devices::mlp(true), Emission::Gspmd),
        ] {
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
