//! One program over four devices: the results of one device, in pieces.

use ndarray::{Array, Array2};
use xla::DType;
use xla::graph::{ArgAttrs, Emission, Graph, Mesh, Rules, einsum};

use crate::case::{Case, compile};
use crate::on_each;

/// A gated MLP (B, M) → (B, F) → (B, M) as a function, the batch over "data" and F over "model" where it is sharded.
pub(crate) fn mlp(sharded: bool) -> Case {
    build_mlp(sharded, false)
}

fn build_mlp(sharded: bool, inline: bool) -> Case {
    let wave = |rows: usize, columns: usize, step: f64| {
        Array::from_shape_fn((rows, columns), |(i, j)| (step * (i * columns + j) as f64).sin() as f32)
    };
    let (x, gate, up, down) = (wave(6, 10, 0.7), wave(10, 14, 1.1), wave(10, 14, 1.7), wave(14, 10, 0.3));
    let mut c = Case::new("mlp");
    if sharded {
        let rules = Rules::new(&[("batch", &["data"]), ("embed", &[]), ("mlp", &["model"])]);
        c.g.set_mesh(Mesh::new([("data", 2), ("model", 2)]).unwrap(), rules);
    }
    let args = [
        c.sharded_arg(&x, &["batch", "embed"]),
        c.sharded_arg(&gate, &["embed", "mlp"]),
        c.sharded_arg(&up, &["embed", "mlp"]),
        c.sharded_arg(&down, &["mlp", "embed"]),
    ];
    c.g.inline_calls(inline);
    let results = c.g.call("mlp", &args.each_ref(), |a| {
        let h = einsum("BM,MF->BF", &a[0], &a[1]).silu() * einsum("BM,MF->BF", &a[0], &a[2]);
        let h = h.shard(["batch", "mlp"]);
        let y = einsum("BF,FM->BM", &h, &a[3]).shard(["batch", "embed"]);
        vec![h, y]
    });

    let [x, gate, up, down] = [x, gate, up, down].map(|a: Array2<f32>| a.mapv(f64::from));
    let wanted = x.dot(&gate).mapv(|v| v / (1.0 + (-v).exp())) * x.dot(&up);
    // Shifted, so that the error counts against the largest.
    c.sharded_near(&(&results[0] + 10.0), &["batch", "mlp"], &(&wanted + 10.0));
    c.sharded_near(&(&results[1] + 100.0), &["batch", "embed"], &(wanted.dot(&down) + 100.0));
    c
}

#[test]
fn an_mlp_over_four_devices_equals_one_device() {
    on_each(|client| {
        for (sharded, inline) in [(false, false), (true, false), (true, true)] {
            build_mlp(sharded, inline).run(client).unwrap_or_else(|e| panic!("{sharded} {inline}: {e}"));
        }
    });
}

#[test]
fn each_device_holds_its_piece() {
    on_each(|client| {
        let case = mlp(true);
        let module = case.module();
        for emission in [Emission::Shardy, Emission::Gspmd] {
            let exe = compile(client, &module, emission).unwrap();
            let (devices, outputs) = (exe.addressable_devices().unwrap(), case.execute(client, &module, &exe).unwrap());
            assert_eq!((devices.len(), outputs.len()), (4, 4));
            for (device, outputs) in devices.iter().zip(&outputs) {
                // (6, 14) over two by two devices, and (6, 10) over the two of "data".
                assert_eq!((outputs[0].dims(), outputs[1].dims()), (&[3, 7][..], &[3, 10][..]));
                assert_eq!(outputs[0].device().unwrap(), *device);
            }
        }
    });
}

#[test]
fn a_donated_cache_over_four_devices_stays_in_its_pieces() {
    let g = Graph::new("step");
    g.set_mesh(
        Mesh::new([("data", 2), ("model", 2)]).unwrap(),
        Rules::new(&[("batch", &["data"]), ("kv_heads", &["model"])]),
    );
    let axes = |logical| ArgAttrs { sharding: Some(logical) };
    let cache = g.arg_with("cache", DType::F32, &[2, 7, 4], axes(&["batch", "", "kv_heads"]));
    let new = g.arg_with("new", DType::F32, &[2, 1, 4], axes(&["batch", "", "kv_heads"]));
    let at = g.arg_with("at", DType::I32, &[2], axes(&["batch"]));
    let next = cache.update_positions(&new, &at);
    g.output_aliased("cache", &next, &cache);
    g.output_sharded("sum", &next.sum(&[1, 2]), &[""]);
    let module = g.finish().unwrap();
    on_each(|client| {
        for emission in [Emission::Shardy, Emission::Gspmd] {
            let exe = compile(client, &module, emission).unwrap();
            let devices = exe.addressable_devices().unwrap();
            let up = |d: usize, values: &[f32], dims: &[usize]| {
                client.upload_slice(values, dims, Some(&devices[d])).unwrap()
            };
            let mut caches: Vec<_> = (0..4).map(|d| up(d, &[0.0; 14], &[1, 7, 2])).collect();
            for i in 0..7i32 {
                // Slot 1 (devices 2 and 3) is one position behind; its first window is outside.
                let rest: Vec<_> = (0..4)
                    .map(|d| {
                        let at = client.upload_slice(&[i - (d / 2) as i32], &[1], Some(&devices[d])).unwrap();
                        (up(d, &[(d + 1) as f32, i as f32], &[1, 1, 2]), at)
                    })
                    .collect();
                let lists: Vec<_> = caches.iter().zip(&rest).map(|(cache, (new, at))| vec![cache, new, at]).collect();
                let out = exe.execute_sharded(&lists).unwrap();
                assert!(caches.iter().all(|cache| cache.is_deleted().unwrap()));
                // Per slot Σ (d + 1) + i over what was written, on its two devices.
                let written = |slot: i32| ((slot..=i).map(|i| 2 * i + 4 * slot + 3).sum::<i32>()) as f32;
                assert!(out.iter().all(|out| out[1].to_vec::<f32>().unwrap() == [written(0), written(1)]));
                caches = out.into_iter().map(|mut out| out.remove(0)).collect();
            }
            let last: Vec<f32> = (1..7).flat_map(|i| [4.0, i as f32]).chain([0.0; 2]).collect();
            assert_eq!(caches[3].to_vec::<f32>().unwrap(), last);
        }
    });
}
