//! Products of two float matrices with many rows, in f32: out (M, N) = left (M, K) · right (K, N).
//!
//! Both are packed into panels that a register tile reads in order, a block of each at a time, and tasks of rows × columns of
//! the result are shared among threads (Goto and van de Geijn 2008). No accumulator sees more than `TERMS` terms: sums of
//! parts lose fewer roundings than a running sum (Higham 1993).

mod pack;
mod tile;

use std::ops::Range;

use crate::attention::Parts;
use crate::linear::{Element, TERMS, Values, elements};
use crate::pool::worth;
use crate::scratch::{Scratch, Shared, counts};
use crate::simd::Simd;
use crate::{Isa, Pool, Serial};
use tile::{Place, ROWS};

/// Most lines and most parts of a packed block: it stays in a cache that all threads share.
const LINES: usize = 1024;
const PARTS: usize = 8;

/// Rows and columns of a task: its parts of both blocks and its result stay in a core's own cache.
const TASK_ROWS: usize = 32 * ROWS;
const TASK_COLUMNS: usize = 256;

/// Tasks that each thread has at least, where there are as many.
const TASKS: usize = 6;

/// Lines that are packed at a time.
const PACKED: usize = 192;

/// Products that one thread adds rather than wake others for them.
const ALONE: usize = worth(1 << 18);

/// Which axis of an operand lies together in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Together {
    /// The contracted one.
    Terms,
    /// The other, which the result has: a line is a row of the left operand, a column of the right one.
    Lines,
}

/// A matrix of each of a batch, one behind the other.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Operand<'a> {
    pub values: Values<'a>,
    pub together: Together,
}

/// Sizes of `batch` products of (M, K) with (K, N).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Sizes {
    pub batch: usize,
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

/// `out` = left · right: (M, N) for each of the batch.
///
/// # Panics
/// If a slice has not the length that the sizes ask for, or the machine not `isa`.
pub fn matmul(isa: Isa, pool: &dyn Pool, sizes: Sizes, left: Operand, right: Operand, out: &mut [f32]) {
    let Sizes { batch, m, k, n } = sizes;
    let check = |found: usize, wanted: [usize; 3], name: &str| {
        assert!(counts(found, &wanted), "matmul: {name} of {wanted:?} elements required, found {found}");
    };
    check(left.values.len(), [batch, m, k], "left");
    check(right.values.len(), [batch, k, n], "right");
    check(out.len(), [batch, m, n], "out");
    if k == 0 {
        out.fill(0.0);
    }
    if batch == 0 || m * n * k == 0 {
        return;
    }
    let out = Parts::new(out);
    let one = |pool: &dyn Pool, i: usize| {
        let (left_values, right_values) = (left.values.part(i, batch), right.values.part(i, batch));
        // SAFETY: nobody else has product i.
        let out = Shared::new(unsafe { out.part(i * m * n, m * n) });
        elements!(left_values, |a| elements!(right_values, |b| {
            let (left, right) = ((a, left.together), (b, right.together));
            dispatch_floats!(isa, |simd| product(simd, pool, [m, k, n], left, right, out));
        }));
    };
    if m * k * n > ALONE {
        (0..batch).for_each(|i| one(pool, i));
    } else if batch == 1 {
        one(&Serial, 0);
    } else {
        pool.share(batch, &|i| one(&Serial, i));
    }
}

/// In how many equal pieces of at most `most` to cut `len`, and the length of a piece, a multiple of `of`.
fn cut(len: usize, most: usize, of: usize) -> usize {
    len.div_ceil(len.div_ceil(most).max(1)).next_multiple_of(of)
}

/// The pieces of `all` that begin at multiples of `step`.
fn pieces(all: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..all).step_by(step).map(move |start| start..all.min(start + step))
}

/// A block of an operand, some of its lines and some parts of its terms, packed: parts of panels of terms of lines.
struct Block<const RIGHT: bool> {
    lines: Range<usize>,
    /// Lines of a panel.
    width: usize,
    panels: usize,
    parts: Vec<Part>,
    /// How the operand lay: panels of a left one whose terms lie together keep them so.
    together: Together,
    packed: Scratch<f32>,
}

/// Terms, and where their panels begin.
struct Part {
    terms: Range<usize>,
    at: usize,
}

impl<const RIGHT: bool> Block<RIGHT> {
    fn new<S: Simd, T: Element>(
        simd: S,
        pool: &dyn Pool,
        (values, together): (&[T], Together),
        [all_lines, k]: [usize; 2],
        lines: Range<usize>,
        terms: &[Range<usize>],
    ) -> Self {
        let width = pack::width::<S, RIGHT>();
        let panels = lines.len().div_ceil(width);
        let mut len = 0;
        let mut parts = Vec::with_capacity(terms.len());
        for terms in terms {
            parts.push(Part { terms: terms.clone(), at: len });
            len += terms.len() * panels * width;
        }
        let mut packed = Scratch::new(len);
        let to = Parts::new(&mut packed);
        let some = PACKED / width;
        let across = panels.div_ceil(some);
        pool.share(parts.len() * across, &|chunk| {
            let (part, panel) = (&parts[chunk / across], chunk % across * some);
            let panel_len = part.terms.len() * width;
            let count = some.min(panels - panel);
            // SAFETY: every chunk has its own panels.
            let to = unsafe { to.part(part.at + panel * panel_len, count * panel_len) };
            let first = lines.start + panel * width;
            let (terms, lines) = (part.terms.clone(), first..lines.end.min(first + count * width));
            simd.vectorize(
                #[inline(always)]
                || match together {
                    Together::Lines => pack::lines::<S, T, RIGHT>(simd, values, all_lines, terms, lines, to),
                    Together::Terms if RIGHT => pack::columns(simd, values, k, terms, lines, to),
                    Together::Terms => pack::rows(simd, values, k, terms, lines, to),
                },
            );
        });
        Block { lines, width, panels, parts, together, packed }
    }

    /// A panel of a part.
    #[inline(always)]
    fn panel(&self, part: &Part, panel: usize) -> &[f32] {
        let len = part.terms.len() * self.width;
        &self.packed[part.at + panel * len..][..len]
    }

    /// The first line of a panel, and how many it has.
    #[inline(always)]
    fn lines(&self, panel: usize) -> (usize, usize) {
        let first = self.lines.start + panel * self.width;
        (first, self.width.min(self.lines.end - first))
    }
}

/// One product; slices have been checked, `out` is (M, N).
fn product<S: Simd, L: Element, R: Element>(
    simd: S,
    pool: &dyn Pool,
    [m, k, n]: [usize; 3],
    left: (&[L], Together),
    right: (&[R], Together),
    out: Shared<f32>,
) {
    let parts = k.div_ceil(TERMS);
    let terms: Vec<Range<usize>> = (0..parts).map(|part| part * k / parts..(part + 1) * k / parts).collect();
    let (rows, columns) = (cut(m, LINES, ROWS), cut(n, LINES, tile::columns::<S>()));
    for terms in terms.chunks(cut(parts, PARTS, 1)) {
        for rows in pieces(m, rows) {
            let a = Block::<false>::new(simd, pool, left, [m, k], rows, terms);
            for columns in pieces(n, columns) {
                let b = Block::<true>::new(simd, pool, right, [n, k], columns, terms);
                multiply(simd, pool, &a, &b, out, n);
            }
        }
    }
}

/// The product of two blocks, added to their rows and columns of `out`, rows of `stride`; the first part of K is written.
fn multiply<S: Simd>(simd: S, pool: &dyn Pool, a: &Block<false>, b: &Block<true>, out: Shared<f32>, stride: usize) {
    let columns = cut(b.panels, TASK_COLUMNS / b.width, 1);
    let across = b.panels.div_ceil(columns);
    // As many tasks as all threads have a few of.
    let down = a.panels.div_ceil(TASK_ROWS / a.width).max((TASKS * pool.threads()).div_ceil(across));
    let rows = a.panels.div_ceil(down);
    pool.share(a.panels.div_ceil(rows) * across, &|task| {
        let (row, column) = (task / across * rows, task % across * columns);
        let (rows, columns) = (row..a.panels.min(row + rows), column..b.panels.min(column + columns));
        simd.vectorize(
            #[inline(always)]
            // SAFETY: no other task has these rows and columns of `out`.
            || unsafe {
                match a.together {
                    Together::Terms => panels::<S, true>(simd, a, b, rows, columns, out.get(), stride),
                    Together::Lines => panels::<S, false>(simd, a, b, rows, columns, out.get(), stride),
                }
            },
        );
    });
}

/// The panels `rows` of `a` times the panels `columns` of `b`.
///
/// # Safety
/// `out` must be valid for reads and writes of the blocks' rows and columns, rows of `stride`; nobody else may have those of
/// these panels.
#[inline(always)]
unsafe fn panels<S: Simd, const ROWWISE: bool>(
    simd: S,
    a: &Block<false>,
    b: &Block<true>,
    rows: Range<usize>,
    columns: Range<usize>,
    out: *mut f32,
    stride: usize,
) {
    for (left_part, right_part) in a.parts.iter().zip(&b.parts) {
        let add = left_part.terms.start > 0;
        for column in columns.clone() {
            let right = b.panel(right_part, column);
            let (first_column, width) = b.lines(column);
            for row in rows.clone() {
                let left = a.panel(left_part, row);
                let (first_row, height) = a.lines(row);
                // SAFETY: these rows and columns are the panels'.
                unsafe {
                    let out = out.add(first_row * stride + first_column);
                    let place = Place { out, stride, rows: height, columns: width, add };
                    tile::tile::<S, ROWWISE>(simd, left, right, place);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
