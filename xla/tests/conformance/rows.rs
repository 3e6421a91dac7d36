//! The table: for each op programs that use it and what they must give.

mod arrays;
mod collectives;
mod control;
mod elementwise;
mod folds;
mod positions;
mod products;

use std::collections::BTreeSet;

use ndarray::{ArrayD, IxDyn};
use xla::DType;
use xla::graph::ops;

use crate::case::Case;
use crate::clients;

/// An op's name in `ops::ALL`, and what builds a program with it.
type Row = (&'static str, fn(&mut Case));

const GROUPS: [&[Row]; 7] =
    [elementwise::ROWS, arrays::ROWS, positions::ROWS, products::ROWS, folds::ROWS, control::ROWS, collectives::ROWS];

/// The float types that every float op is run in.
const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// `n` numbers from `low` to `high` in even steps.
fn ramp(low: f64, high: f64, shape: &[usize]) -> ArrayD<f64> {
    let n: usize = shape.iter().product();
    let step = (high - low) / (n.max(2) - 1) as f64;
    ArrayD::from_shape_vec(IxDyn(shape), (0..n).map(|i| low + step * i as f64).collect()).unwrap()
}

/// 0, 1, 2, … in this shape.
fn counted(shape: &[usize]) -> ArrayD<f32> {
    let n: usize = shape.iter().product();
    ArrayD::from_shape_vec(IxDyn(shape), (0..n).map(|i| i as f32).collect()).unwrap()
}

/// Runs each row on each client; all failures are reported together.
fn run(rows: &[Row]) {
    let mut failures = Vec::new();
    for (name, build) in rows {
        let mut case = Case::new(name);
        build(&mut case);
        let made = case.module().body().op_names();
        assert!(made.contains(name), "the row of {name} makes {made:?}");
        for client in clients() {
            if let Err(message) = case.run(client) {
                let plugin = client.plugin().path().file_name().unwrap_or_default().to_string_lossy();
                failures.push(format!("{name} on {plugin}: {message}"));
            }
        }
    }
    assert!(failures.is_empty(), "{} of the rows fail:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn every_op_has_a_row() {
    let rows: BTreeSet<&str> = GROUPS.iter().copied().flatten().map(|(name, _)| *name).collect();
    let ops: BTreeSet<&str> = ops::ALL.iter().map(|op| op.name).collect();
    let missing: Vec<_> = ops.difference(&rows).collect();
    let unknown: Vec<_> = rows.difference(&ops).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "no row for {missing:?}, no op for {unknown:?}");
}

#[test]
fn elementwise_ops() {
    run(elementwise::ROWS);
}

#[test]
fn ops_that_move_elements() {
    run(arrays::ROWS);
}

#[test]
fn ops_with_positions() {
    run(positions::ROWS);
}

#[test]
fn products() {
    run(products::ROWS);
}

#[test]
fn folds_and_orders() {
    run(folds::ROWS);
}

#[test]
fn control_flow_and_calls() {
    run(control::ROWS);
}

#[test]
fn ops_over_four_devices() {
    run(collectives::ROWS);
}
