//! Ops that read or write at positions which are tensors.

use half::bf16;
use ndarray::{Axis, arr0, array, s};
use xla::DType;
use xla::graph::Fold;

use super::{Row, counted};

pub(super) const ROWS: &[Row] = &[
    ("dynamic_slice", |c| {
        let x = counted(&[5, 7]);
        let y = c.arg(&x);
        let (i, j) = (c.arg(&arr0(1i32)), c.arg(&arr0(6i32)));
        // The window is moved inside where it would stick out.
        c.is(&y.dynamic_slice(&[&i, &j], &[2, 3]), &x.slice(s![1..3, 4..7]).to_owned());
        let (i, j) = (c.arg(&arr0(-4i64)), c.arg(&arr0(2i64)));
        c.is(&y.dynamic_slice(&[&i, &j], &[2, 3]), &x.slice(s![0..2, 2..5]).to_owned());
        let u = c.arg(&arr0(3u32));
        c.is(&y.dynamic_slice(&[&u, &u], &[1, 1]), &array![[24f32]]);
    }),
    ("dynamic_update_slice", |c| {
        let mut x = counted(&[5, 7]);
        let y = c.arg(&x);
        let update = c.arg(&array![[-1f32, -2.0], [-3.0, -4.0]]);
        let (i, j) = (c.arg(&arr0(4i32)), c.arg(&arr0(2i32)));
        let z = y.dynamic_update_slice(&update, &[&i, &j]);
        x.slice_mut(s![3..5, 2..4]).assign(&array![[-1f32, -2.0], [-3.0, -4.0]]);
        c.is(&z, &x);
    }),
    ("gather", |c| {
        // An embedding lookup; an index out of range is moved to the nearest.
        let table = counted(&[5, 3]);
        let x = c.arg(&table);
        let i = c.arg(&array![[0i32, 4], [2, 2]]);
        let wanted = table.select(Axis(0), &[0, 4, 2, 2]).into_shape_with_order((2, 2, 3)).unwrap();
        c.is(&x.take(&i, 0), &wanted);
        let i = c.arg(&array![-1i64, 99]);
        c.is(&x.take(&i, 0), &table.select(Axis(0), &[0, 4]));
        let i = c.arg(&array![2u32, 0]);
        c.is(&x.take(&i, -1), &table.select(Axis(1), &[2, 0]));
        let deep = counted(&[2, 5, 3]);
        let y = c.arg(&deep);
        let i = c.arg(&arr0(3i32));
        c.is(&y.take(&i, 1), &deep.index_axis(Axis(1), 3).to_owned());
        let i = c.arg(&array![[2i32, 0, 1], [1, 1, 2], [0, 9, 0], [0, 1, 2], [2, 2, 2]]);
        let wanted = array![[2f32, 0.0, 1.0], [4.0, 4.0, 5.0], [6.0, 8.0, 6.0], [9.0, 10.0, 11.0], [14.0, 14.0, 14.0]];
        c.is(&x.take_along(&i, 1), &wanted);
        let table = counted(&[3, 2]).mapv(bf16::from_f32);
        let x = c.arg(&table);
        let i = c.arg(&array![2i32, 1]);
        c.is(&x.take(&i, 0), &table.select(Axis(0), &[2, 1]));
    }),
    ("scatter", |c| {
        // A key/value cache (B, T, G, K) with a window of S positions in each slot. The window of slot 2 would stick
        // out, that of slot 3 begins before 0: they write nothing.
        let mut cache = counted(&[4, 7, 2, 3]);
        let new = counted(&[4, 3, 2, 3]).mapv(|v| -1.0 - v);
        let (x, y) = (c.arg(&cache), c.arg(&new));
        let start = c.arg(&array![0i32, 4, 5, -1]);
        let written = x.update_positions(&y, &start);
        for (slot, at) in [(0, 0), (1, 4)] {
            cache.slice_mut(s![slot, at..at + 3, .., ..]).assign(&new.slice(s![slot, .., .., ..]));
        }
        c.is(&written, &cache);
    }),
    ("scatter", |c| {
        // One position of each slot of a bf16 cache; one is outside.
        let mut cache = counted(&[3, 5, 2, 3]).mapv(bf16::from_f32);
        let new = counted(&[3, 2, 3]).mapv(|v| bf16::from_f32(-1.0 - v));
        let (x, y) = (c.arg(&cache), c.arg(&new));
        let at = c.arg(&array![[0i32, 4], [1, 5], [2, 1]]);
        let written = x.scatter(&at, &y, None, true);
        cache.slice_mut(s![0, 4, .., ..]).assign(&new.slice(s![0, .., ..]));
        cache.slice_mut(s![2, 1, .., ..]).assign(&new.slice(s![2, .., ..]));
        c.is(&written, &cache);
    }),
    ("scatter", |c| {
        // Counts of tokens: an index twice, one outside.
        let counts = c.g.full(0, DType::I32, &[5]);
        let (tokens, one) = (c.arg(&array![[3i32], [1], [3], [9]]), c.arg(&array![1i32, 1, 1, 1]));
        c.is(&counts.scatter(&tokens, &one, Some(Fold::Sum), false), &array![0i32, 1, 0, 2, 0]);
        let x = c.arg(&array![1f32, 5.0, 2.0]);
        let (at, v) = (c.arg(&array![[0i32], [1], [0]]), c.arg(&array![4f32, 3.0, 7.0]));
        c.is(&x.scatter(&at, &v, Some(Fold::Max), false), &array![7f32, 5.0, 2.0]);
    }),
];
