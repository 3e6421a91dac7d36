//! One program over four devices: the results of one device, in pieces.

use ndarray::{Array, Array2};
use xla::graph::{Emission, Mesh, Rules, einsum};

use crate::case::{Case, compile};
use crate::on_each;

/// A gated MLP (B, M) → (B, F) → (B, M), the batch over "data" and F over "model" where it is sharded.
pub(crate) fn mlp(sharded: bool) -> Case {
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
    let h = einsum("BM,MF->BF", &args[0], &args[1]).silu() * einsum("BM,MF->BF", &args[0], &args[2]);
    let h = h.shard(["batch", "mlp"]);
    let y = einsum("BF,FM->BM", &h, &args[3]).shard(["batch", "embed"]);

    let [x, gate, up, down] = [x, gate, up, down].map(|a: Array2<f32>| a.mapv(f64::from));
    let wanted = x.dot(&gate).mapv(|v| v / (1.0 + (-v).exp())) * x.dot(&up);
    // Shifted, so that the error counts against the largest.
    c.sharded_near(&(h + 10.0), &["batch", "mlp"], &(&wanted + 10.0));
    c.sharded_near(&(y + 100.0), &["batch", "embed"], &(wanted.dot(&down) + 100.0));
    c
}

#[test]
fn an_mlp_over_four_devices_equals_one_device() {
    on_each(|client| {
        mlp(false).run(client).unwrap();
        mlp(true).run(client).unwrap();
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
