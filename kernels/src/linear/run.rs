//! Products as chunks of work: which kernel, how it is cut, who finishes.

use super::element::elements;
use super::finish::{Product, finish};
use super::input::{BLOCK_ROWS, Input, Kind};
use super::stream::Cut;
use super::{FEW, Job, Linear, Order, Weight, codes, dots, panel, stream};
use crate::packed::BLOCK;
use crate::pool::worth;
use crate::scratch::{Scratch, Shared};
use crate::simd::Simd;
use crate::{Isa, Pool};

/// Rows that are worth a tile where there are many.
const TILE_ROWS: usize = 120;

/// Columns of a tile where there are many rows.
const TILE_COLUMNS: usize = 64;

/// Sums that one thread adds rather than wake others for them.
const ALONE: usize = worth(1 << 17);

/// How a job is done.
enum Plan {
    /// Spans of terms, finished when all are there: for each weight its cut and where its sums start.
    Spans(Vec<(Cut, usize)>),
    /// Tiles of rows × columns with all terms, each finished by itself.
    Tiles { rows: usize, columns: usize },
}

impl Plan {
    fn new(job: &Job, rows: usize, threads: usize, sums: &mut usize) -> Plan {
        let width = |weight: &Linear| match &weight.weight {
            Weight::Rows { values, order: Order::Kn } if rows <= FEW => Some(size(values)),
            _ => None,
        };
        let n = job.n();
        if let Some(widths) = job.weights.iter().map(width).collect::<Option<Vec<usize>>>() {
            let cut = |(weight, size): (&Linear, usize)| {
                let cut = Cut::new(weight.k, n, size, rows);
                let at = *sums;
                *sums += cut.spans() * rows * n;
                (cut, at)
            };
            return Plan::Spans(job.weights.iter().zip(widths).map(cut).collect());
        }
        if rows > FEW {
            // As many as all threads have a few of, but not so few rows that packing the weight's panels costs.
            let tiles = (8 * threads).div_ceil(n.div_ceil(TILE_COLUMNS).max(1)).clamp(1, rows.div_ceil(TILE_ROWS));
            return Plan::Tiles { rows: rows.div_ceil(tiles).next_multiple_of(BLOCK_ROWS), columns: TILE_COLUMNS };
        }
        // As many bytes as are worth a chunk.
        let bytes: usize = job.weights.iter().map(bytes).sum();
        let wanted = (bytes / 64).clamp(16 << 10, 128 << 10);
        Plan::Tiles { rows, columns: (wanted * n / bytes.max(1)).clamp(1, n.max(1)).next_multiple_of(BLOCK) }
    }

    fn tasks(&self, n: usize, all_rows: usize) -> usize {
        match self {
            Plan::Spans(cuts) => cuts.iter().map(|(cut, _)| cut.tasks()).sum(),
            Plan::Tiles { rows, columns } => all_rows.div_ceil(*rows) * n.div_ceil(*columns),
        }
    }
}

fn size(values: &super::Values) -> usize {
    elements!(values, |w| size_of_val(*w) / w.len().max(1))
}

fn bytes(weight: &Linear) -> usize {
    match &weight.weight {
        Weight::Rows { values, .. } => elements!(values, |w| size_of_val(*w)),
        Weight::Packed(packed) => packed.q.len(),
    }
}

/// Does all jobs; slices have been checked.
pub(super) fn run(isa: Isa, pool: &dyn Pool, x: &[f32], rows: usize, jobs: &[Job]) {
    let Some(k) = jobs.first().map(|job| job.weights[0].k).filter(|_| rows > 0) else { return };
    let mut inputs: Vec<(Kind, Input)> = Vec::new();
    for kind in jobs.iter().flat_map(|job| job.weights).map(Kind::of) {
        if inputs.iter().all(|(other, _)| *other != kind) {
            inputs.push((kind, Input::new(isa, pool, kind, x, rows, k)));
        }
    }
    let input = |weight: &Linear| {
        let kind = Kind::of(weight);
        &inputs[inputs.iter().position(|(other, _)| *other == kind).unwrap_or_default()].1
    };
    let mut sums = 0;
    let plans: Vec<Plan> = jobs.iter().map(|job| Plan::new(job, rows, pool.threads(), &mut sums)).collect();
    let tasks: Vec<usize> = plans.iter().zip(jobs).map(|(plan, job)| plan.tasks(job.n(), rows)).collect();
    let mut scratch = Scratch::new(sums);
    let sums = Shared::new(&mut scratch);

    let (all, threads) = (tasks.iter().sum(), if rows > FEW { 1 } else { pool.threads() });
    pool.share(all, &|task| {
        let (mut job, mut task) = (0, apart(task, all, threads));
        while task >= tasks[job] {
            task -= tasks[job];
            job += 1;
        }
        let (plan, job) = (&plans[job], &jobs[job]);
        dispatch!(isa, |simd| match plan {
            Plan::Spans(cuts) => span(simd, job, cuts, task, rows, &input, sums),
            Plan::Tiles { rows: tile_rows, columns } => tile(simd, job, *tile_rows, *columns, task, rows, &input),
        });
    });

    for (plan, job) in plans.iter().zip(jobs) {
        let Plan::Spans(cuts) = plan else { continue };
        let n = job.n();
        let product = |&(cut, at): &(Cut, usize)| Product {
            // SAFETY: `at` was counted up to the length of the sums when the cuts were made.
            at: unsafe { sums.get().add(at) },
            spans: cut.spans(),
            span: rows * n,
            stride: n,
        };
        let (first, up) = (product(&cuts[0]), cuts.get(1).map(product));
        let width = if cuts[0].0.spans() * rows * n > ALONE { (ALONE / 8 / rows).next_multiple_of(64) } else { n };
        let piece = Piece { first, up, rows, width };
        match n <= width {
            true => piece.finish(isa, job, 0),
            false => pool.share(n.div_ceil(width), &|i| piece.finish(isa, job, i * width)),
        }
    }
}

/// The task that is taken as number `turn` of `all`: threads that take turns each go through neighbouring tasks, so that what one
/// has asked memory for beyond the end of a task is what it needs next.
pub(super) fn apart(turn: usize, all: usize, threads: usize) -> usize {
    let (each, longer) = (all / threads, all % threads);
    let thread = turn % threads;
    thread * each + thread.min(longer) + turn / threads
}

/// Columns of all rows, whose sums are there.
struct Piece {
    first: Product,
    up: Option<Product>,
    rows: usize,
    width: usize,
}

// SAFETY: its pointers are to sums that were written before it was made, and are only read.
unsafe impl Sync for Piece {}

impl Piece {
    fn finish(&self, isa: Isa, job: &Job, column: usize) {
        let n = job.n();
        // SAFETY: `column` is below n, and so are the columns up to the width, in products of `rows` rows and in add and
        // out, whose lengths have been checked; nobody else has these columns.
        unsafe {
            let at = |product: Product| Product { at: product.at.add(column), ..product };
            let add = job.add.map(|add| add.as_ptr().add(column));
            let (first, up) = (at(self.first), self.up.map(at));
            let (width, out) = (self.width.min(n - column), job.out.get().add(column));
            dispatch!(isa, |simd| finish(simd.floats(), first, up, job.activation, add, self.rows, width, out, n));
        }
    }
}

/// Task `task` of a job done by spans.
fn span<'a, S: Simd>(
    simd: S,
    job: &Job,
    cuts: &[(Cut, usize)],
    task: usize,
    rows: usize,
    input: &dyn Fn(&Linear) -> &'a Input<'a>,
    sums: Shared<f32>,
) {
    let (mut i, mut task) = (0, task);
    while task >= cuts[i].0.tasks() {
        task -= cuts[i].0.tasks();
        i += 1;
    }
    let (cut, at) = &cuts[i];
    let Weight::Rows { values, .. } = &job.weights[i].weight else { unreachable!("float weights are done by spans") };
    let x = input(&job.weights[i]).floats();
    let mut scratch = Scratch::new(cut.scratch(rows));
    // SAFETY: x and the weight have been checked; the sums of this weight start there and are as many as the cut
    // says; no other task has this span and piece.
    elements!(values, |w| unsafe {
        stream::task(simd.floats(), cut, task, x.as_ptr(), rows, w.as_ptr(), sums.get().add(*at), scratch.as_mut_ptr());
    });
}

/// Task `task` of a job done by tiles.
fn tile<'a, S: Simd>(
    simd: S,
    job: &Job,
    tile_rows: usize,
    tile_columns: usize,
    task: usize,
    rows: usize,
    input: &dyn Fn(&Linear) -> &'a Input<'a>,
) {
    let n = job.n();
    let across = n.div_ceil(tile_columns);
    // Neighbouring tasks take the same rows: theirs is what is read more often.
    let (row, column) = (task / across * tile_rows, task % across * tile_columns);
    let (some, columns) = (row..rows.min(row + tile_rows), column..n.min(column + tile_columns));
    // One product goes where its result does; of two, each has its own tile.
    let direct = job.weights.len() == 1;
    let size = if direct { 0 } else { tile_rows * tile_columns };
    let mut scratch = Scratch::<f32>::new(size * job.weights.len());
    let mut packed = Scratch::<f32>::new(panel::SCRATCH);
    // Once: a second mutable borrow of the tiles would end what the first one's pointer may do.
    let start = scratch.as_mut_ptr();
    // SAFETY: row and column are within out, whose length has been checked, and `size` is at most the tiles' length.
    let (out, tiles) = unsafe { (job.out.get().add(row * n + column), [0, size].map(|at| start.add(at))) };
    let stride = if direct { n } else { tile_columns };
    for (weight, to) in job.weights.iter().zip(if direct { [out; 2] } else { tiles }) {
        let k = weight.k;
        // SAFETY: x and the weight have been checked; the rows are below `rows`, from a multiple of `BLOCK_ROWS` on as codes are
        // divided, and the columns below n, a multiple of a block. Each goes to its own rows and columns of out, which no
        // other task has, or to a tile of `size` elements; the panel is `SCRATCH` long.
        unsafe {
            match &weight.weight {
                Weight::Packed(w) => {
                    codes::columns(simd, input(weight).codes(), some.clone(), k, w, columns.clone(), to, stride);
                }
                Weight::Rows { values, order } => elements!(values, |w| {
                    let (x, w) = (input(weight).floats()[some.start * k..].as_ptr(), w.as_ptr());
                    if rows <= FEW && *order == Order::Nk {
                        dots::columns(simd.floats(), x, some.len(), k, w, columns.clone(), to, stride);
                    } else {
                        let panel = packed.as_mut_ptr();
                        let columns = columns.clone();
                        panel::columns(simd.floats(), x, some.len(), k, w, n, *order, columns, to, stride, panel);
                    }
                }),
            }
        }
    }
    if direct && job.add.is_none() {
        return;
    }
    let product = |at: *mut f32| Product { at, spans: 1, span: 0, stride };
    let (first, up) = if direct { (product(out), None) } else { (product(tiles[0]), Some(product(tiles[1]))) };
    // SAFETY: add and out have been checked for n columns of all rows; no other task has these rows and columns.
    unsafe {
        let add = job.add.map(|add| add.as_ptr().add(row * n + column));
        finish(simd.floats(), first, up, job.activation, add, some.len(), columns.len(), out, n);
    }
}
