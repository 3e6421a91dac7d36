//! Ops over a mesh of four devices. Each program runs with Shardy's and with GSPMD's spelling.

use ndarray::{Array2, Axis, Zip, array, concatenate, s};
use xla::DType;
use xla::graph::{Fold, Mesh, Rules, Tensor, einsum};

use super::Row;
use crate::case::Case;

/// Four devices in a mesh; "rows" is cut over all of them.
fn on_mesh(c: &mut Case, axes: &[(&str, usize)]) {
    let rules = Rules::new(&[
        ("rows", &["data", "model"]),
        ("batch", &["data"]),
        ("mlp", &["model"]),
        ("vocab", &["model", "data"]),
    ]);
    c.g.set_mesh(Mesh::new(axes.iter().copied()).unwrap(), rules);
}

/// What each device makes of its own three rows of four numbers, and what it must make of the pieces of all.
fn manual(
    c: &mut Case,
    axes: &[(&str, usize)],
    op: impl Fn(&Tensor) -> Tensor,
    wanted: impl Fn(usize, &[Array2<f32>]) -> Array2<f32>,
) {
    on_mesh(c, axes);
    let whole = Array2::from_shape_fn((12, 4), |(i, j)| (10 * i + j) as f32);
    let pieces: Vec<Array2<f32>> = (0..4).map(|d| whole.slice(s![3 * d..3 * d + 3, ..]).to_owned()).collect();
    let x = c.sharded_arg(&whole, &["rows", ""]);
    let y = c.g.manual_computation(&[(&x, &["rows", ""])], &[&["rows", ""]], |a| vec![op(&a[0])]);
    let parts: Vec<Array2<f32>> = (0..4).map(|d| wanted(d, &pieces)).collect();
    let parts: Vec<_> = parts.iter().map(|part| part.view()).collect();
    c.sharded_is(&y[0], &["rows", ""], &concatenate(Axis(0), &parts).unwrap());
}

/// Devices 0 and 1 differ along "model", 0 and 2 along "data".
const SQUARE: &[(&str, usize)] = &[("data", 2), ("model", 2)];

pub(super) const ROWS: &[Row] = &[
    ("sharding_constraint", |c| {
        on_mesh(c, SQUARE);
        let x = Array2::from_shape_fn((6, 10), |(i, j)| (i * 3 + j) as f32 - 12.0);
        let w = Array2::from_shape_fn((10, 4), |(i, j)| (i as f32) - 2.0 * (j as f32));
        let (a, b) = (c.sharded_arg(&x, &["batch", ""]), c.sharded_arg(&w, &["", "mlp"]));
        let h = einsum("BM,MF->BF", &a, &b).shard(["batch", "mlp"]);
        let h = (h + 1.0).shard(["", "mlp"]);
        c.sharded_is(&h, &["", "mlp"], &(x.dot(&w) + 1.0));
        c.sharded_is(&(&h * 2.0), &["batch", ""], &((x.dot(&w) + 1.0) * 2.0));
    }),
    ("sharding_constraint", |c| {
        // An axis cut over two mesh axes, the second of the mesh first.
        on_mesh(c, SQUARE);
        let table = Array2::from_shape_fn((8, 6), |(i, j)| (10 * i + j) as f32);
        let x = c.sharded_arg(&table, &["vocab", ""]);
        c.sharded_is(&(&x + 1.0), &["vocab", ""], &(&table + 1.0));
        c.sharded_is(&(&x * 2.0).shard(["rows", ""]), &["rows", ""], &(&table * 2.0));
        let at = c.sharded_arg(&array![7i32, 0, 3, 4], &["batch"]);
        let taken = table.select(Axis(0), &[7, 0, 3, 4]);
        c.sharded_is(&x.take(&at, 0).shard(["batch", ""]), &["batch", ""], &taken);
        c.sharded_is(&x.sum(&[0]).shard([""]), &[""], &table.sum_axis(Axis(0)));
    }),
    ("sharding_constraint", |c| {
        on_mesh(c, &[("data", 1), ("expert", 2), ("model", 2)]);
        let whole = Array2::from_shape_fn((4, 6), |(i, j)| (10 * i + j) as f32);
        let x = c.sharded_arg(&whole, &["batch", "mlp"]);
        c.sharded_is(&(&x + 1.0).shard(["rows", ""]), &["rows", ""], &(&whole + 1.0));
    }),
    ("manual_computation", |c| {
        // Inside a function, the inputs whole along one mesh axis, or cut along both in the other order.
        on_mesh(c, SQUARE);
        let whole = Array2::from_shape_fn((8, 6), |(i, j)| (10 * i + j) as f32);
        let x = c.sharded_arg(&whole, &["vocab", ""]);
        let g = c.g.clone();
        let y = g.call("inside", &[&x], |a| {
            let inputs: [(&Tensor, &[&str]); 2] = [(&a[0], &["batch", ""]), (&a[0], &["vocab", ""])];
            g.manual_computation(&inputs, &[&["batch", ""], &["vocab", ""], &["", ""]], |p| {
                let three = g.scalar(3, DType::I32);
                let looped = g.while_loop(
                    &[&three, &p[1]],
                    |v| v[0].gt(0),
                    |v| vec![&v[0] - 1, v[1].all_reduce(Fold::Sum, &["data"])],
                );
                vec![
                    p[0].reverse(&[0]),
                    looped[1].clone(),
                    p[1].sum_keep(&[0]).all_reduce(Fold::Sum, &["model", "data"]),
                ]
            })
        });
        let piece = |from: usize, n: usize| whole.slice(s![from..from + n, ..]);
        let reversed = concatenate(Axis(0), &[piece(0, 4).slice(s![..;-1, ..]), piece(4, 4).slice(s![..;-1, ..])]);
        c.sharded_is(&y[0], &["batch", ""], &reversed.unwrap());
        // Rows 0 and 1 are on device 0 and rows 2 and 3 on device 2, which differ along "data": 4 times their sum.
        let sums = [&piece(0, 2) + &piece(2, 2), &piece(4, 2) + &piece(6, 2)].map(|sum| sum * 4.0);
        let sums = concatenate(Axis(0), &[sums[0].view(), sums[0].view(), sums[1].view(), sums[1].view()]);
        c.sharded_is(&y[1], &["vocab", ""], &sums.unwrap());
        c.sharded_is(&y[2], &["", ""], &whole.sum_axis(Axis(0)).insert_axis(Axis(0)));
    }),
    ("manual_computation", |c| {
        // Each device sorts its own piece, which tells pieces from the whole.
        manual(c, SQUARE, |x| -(-x).sort(0, false), |d, x| x[d].slice(s![..;-1, ..]).to_owned());
        // A product whose inner axis is cut: the pieces' products are folded.
        let (x, w) = (array![[1f32, 2.0, 3.0, 4.0]], array![[1f32], [10.0], [100.0], [1000.0]]);
        let (a, b) = (c.sharded_arg(&x, &["", "mlp"]), c.sharded_arg(&w, &["mlp", ""]));
        let inputs: [(&Tensor, &[&str]); 2] = [(&a, &["", "mlp"]), (&b, &["mlp", ""])];
        let y = c.g.manual_computation(&inputs, &[&["", ""]], |p| {
            vec![einsum("AB,BC->AC", &p[0], &p[1]).all_reduce(Fold::Sum, &["model"])]
        });
        c.sharded_is(&y[0], &["", ""], &array![[4321f32]]);
    }),
    ("all_reduce", |c| manual(c, SQUARE, |x| x.all_reduce(Fold::Sum, &["model"]), |d, x| &x[d] + &x[d ^ 1])),
    ("all_reduce", |c| {
        manual(c, SQUARE, |x| x.all_reduce(Fold::Max, &["data", "model"]), |_, x| x[3].clone());
    }),
    ("all_reduce", |c| {
        let twice = |x: &Tensor| {
            x.cast(DType::BF16).all_reduce(Fold::Min, &["data"]).cast(DType::F32) + x.all_reduce(Fold::Sum, &["data"])
        };
        manual(c, SQUARE, twice, |d, x| {
            let low = x[d].clone().mapv(f64::from);
            let other = x[d ^ 2].mapv(f64::from);
            Zip::from(&low).and(&other).map_collect(|&a, &b| (a.min(b) + a + b) as f32)
        });
    }),
    ("all_gather", |c| {
        manual(
            c,
            SQUARE,
            |x| x.all_gather(1, &["data"]),
            |d, x| concatenate(Axis(1), &[x[d & 1].view(), x[d & 1 | 2].view()]).unwrap(),
        );
    }),
    ("all_gather", |c| {
        // In the order in which the axes are named: "model" before "data".
        manual(
            c,
            SQUARE,
            |x| x.all_gather(-1, &["model", "data"]),
            |_, x| concatenate(Axis(1), &[x[0].view(), x[2].view(), x[1].view(), x[3].view()]).unwrap(),
        );
    }),
    ("reduce_scatter", |c| {
        manual(
            c,
            SQUARE,
            |x| x.reduce_scatter(Fold::Sum, 1, &["model"]),
            |d, x| {
                let sum = &x[d] + &x[d ^ 1];
                let at = 2 * (d % 2);
                sum.slice(s![.., at..at + 2]).to_owned()
            },
        );
    }),
    ("all_to_all", |c| {
        manual(
            c,
            SQUARE,
            |x| x.all_to_all(1, 0, &["data"]),
            |d, x| {
                let at = 2 * (d / 2);
                let part = |i: usize| x[i].slice(s![.., at..at + 2]).to_owned();
                concatenate(Axis(0), &[part(d & 1).view(), part(d & 1 | 2).view()]).unwrap()
            },
        );
    }),
    ("collective_permute", |c| {
        manual(c, &[("model", 4)], |x| x.collective_permute(1, "model"), |d, x| x[(d + 3) % 4].clone());
    }),
    ("partition_id", |c| {
        let numbered = |x: &Tensor| x + x.graph().partition_id().cast(DType::F32).broadcast_to(x.shape());
        manual(c, SQUARE, numbered, |d, x| &x[d] + d as f32);
    }),
    ("replica_id", |c| {
        let numbered = |x: &Tensor| x + x.graph().replica_id().cast(DType::F32).broadcast_to(x.shape());
        manual(c, SQUARE, numbered, |d, x| x[d].clone());
    }),
];
