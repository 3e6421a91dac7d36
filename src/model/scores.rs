//! softmax(q·kᵀ)·v over the keys that a query may see, in three forms with the same result: the whole score matrix, the
//! same for blocks of queries over their own past, and blocks of keys with a running softmax (Milakov and Gimelshein 2018;
//! Dao et al. 2022), which never holds S × T scores.

use xla::DType;
use xla::graph::{Attr, Graph, Kernel, Platform, Tensor, einsum_as};

use super::rows::{TPU_ROWS, pad};
use crate::kv_cache::{Order, Past};

/// Query rows of one block where a prompt is attended to in blocks. On a TPU every program has a price of its own, and a block takes
/// several, so that fewer and larger blocks are worth the keys that they cannot see. On a CPU 256 costs a prefill of 512 about 3 %
/// against 128, and takes 0.6 times as long to load (docs/compile-cost.md).
fn block(platform: Platform) -> usize {
    match platform {
        Platform::Tpu => 512,
        _ => 256,
    }
}

/// So many of these blocks stand in a program, one after another; more become a loop.
const MAX_BLOCKS: usize = 32;

/// Scores of one layer above which they are not held whole: memory, and a processor's caches.
const OFFLINE_BYTES: usize = 64 << 20;

/// Rows and columns of the scores that the running softmax holds at a time.
const ONLINE: [usize; 2] = [512, 1024];

/// The kernel of [`Queries::attend`]: q (B, S, G, R, K) f32, positions (B, S) i32, k and v (B, G, T, K), their scales (B, G, T, 1) f32
/// where they are int8, and the keys' positions (B, T) i32 where the attribute `window` is not 0; (B, S, G, R, K) f32. The
/// attribute `softcap` is 0 where there is none.
pub const ATTEND: &str = "xllama.attend";

/// The kernel of its derivative, for caches of floats: what [`ATTEND`] is given, and the cotangent (B, S, G, R, K) of its result; those
/// of q, k and v, f32.
pub const ATTEND_GRADIENT: &str = "xllama.attend_gradient";

/// The queries of one layer.
#[derive(Clone, Debug)]
pub struct Queries<'a> {
    /// (B, S, G, R, K), scaled, in the type of the products.
    pub q: Tensor,
    /// Where they stand, (B, S) i32.
    pub positions: &'a Tensor,
    /// Where they are only some of the step's rows, the first one's number, an i32 scalar.
    pub first_row: Option<Tensor>,
    /// c, where scores become c·tanh(scores / c) (Gemma 2).
    pub softcap: Option<f64>,
    /// A score for each head, (G, R) f32, that takes part in the softmax but has no value (gpt-oss).
    pub sinks: Option<&'a Tensor>,
}

/// The form that is cheapest for these sizes, (B, S, G, R, K) f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Whole,
    Blocks,
    Online,
}

fn form(q: &Queries<'_>, past: &Past) -> Form {
    let [b, s, g, r] = [0, 1, 2, 3].map(|axis| q.q.dim(axis));
    let bytes = |rows: usize| 4 * b * g * r * rows * past.k.dim(2);
    let in_order = q.first_row.is_none() && matches!(past.order, Order::Prefix | Order::Trailing { .. });
    let block = block(q.q.graph().platform());
    // The running softmax is a loop without a derivative.
    let fits = |rows: usize| bytes(rows) <= OFFLINE_BYTES || q.q.graph().training();
    if in_order && s > block && s.is_multiple_of(block) && s / block <= MAX_BLOCKS && fits(block) {
        Form::Blocks
    } else if fits(s) {
        Form::Whole
    } else {
        Form::Online
    }
}

impl Queries<'_> {
    /// softmax(q·kᵀ)·v over what each query may see, (B, S, G, R, K) f32, in the form that suits the sizes.
    #[track_caller]
    pub fn attend(&self, past: &Past) -> Tensor {
        let (s, r) = (self.q.dim(1), self.q.dim(3));
        if self.q.graph().has_kernel(ATTEND) && self.sinks.is_none() && self.first_row.is_none() {
            return self.by_kernel(past);
        }
        if self.q.graph().platform() == Platform::Tpu && s * r < TPU_ROWS {
            return self.padded().offline_heads(past, None, r);
        }
        match form(self, past) {
            Form::Whole => self.offline(past),
            Form::Blocks => self.blocks(past),
            Form::Online => self.online(past, ONLINE),
        }
    }

    /// The same of one token of each slot that the past does not hold, but `own`, its key and value (B, 1, G, K): (B, 1, G, R, K) f32.
    #[track_caller]
    pub(super) fn attend_beside(&self, past: &Past, own: [&Tensor; 2]) -> Tensor {
        self.padded().offline_heads(past, Some(own), self.q.dim(3))
    }

    /// With as many query heads in a group as a TPU needs rows.
    #[track_caller]
    fn padded(&self) -> Self {
        let [s, r] = [1, 3].map(|axis| self.q.dim(axis));
        Queries { q: pad(&self.q, 3, r.max(TPU_ROWS.div_ceil(s)), 0.0), ..self.clone() }
    }

    /// By the kernel, which reads only the keys that some query sees.
    #[track_caller]
    fn by_kernel(&self, past: &Past) -> Tensor {
        let window = past.order.window();
        let q = self.q.cast(DType::F32);
        let mut inputs = vec![&q, self.positions, &past.k, &past.v];
        inputs.extend(past.scales.iter().flatten());
        inputs.extend(window.map(|_| &past.positions));
        let kernel = Kernel::new(ATTEND)
            .attr("window", Attr::I64(window.unwrap_or(0) as i64))
            .attr("softcap", Attr::F32(self.softcap.unwrap_or(0.0) as f32));
        let kernel = if past.scales.is_none() { kernel.gradient(ATTEND_GRADIENT) } else { kernel };
        let (dtype, softcap, has_scales, order) = (self.q.dtype(), self.softcap, past.scales.is_some(), past.order);
        let out = self.q.graph().kernel(kernel, &inputs, |args| {
            let [q, positions, k, v, rest @ ..] = args else { unreachable!("as it was called") };
            let (scales, key_positions) = rest.split_at(if has_scales { 2 } else { 0 });
            let scales = has_scales.then(|| [scales[0].clone(), scales[1].clone()]);
            let key_positions = key_positions.first().cloned();
            let key_positions = key_positions.unwrap_or_else(|| q.graph().iota(DType::I32, &[k.dim(0), k.dim(2)], 1));
            let past = Past { k: k.clone(), v: v.clone(), scales, positions: key_positions, order };
            vec![Queries { q: q.cast(dtype), positions, first_row: None, softcap, sinks: None }.offline(&past)]
        });
        out[0].clone()
    }

    /// With the whole score matrix (B, G, S, R, T). The sum of the softmax divides after the product with v.
    #[track_caller]
    pub fn offline(&self, past: &Past) -> Tensor {
        self.offline_heads(past, None, self.q.dim(3))
    }

    /// The same for the first `heads` of the R query heads of each group, and of one token with `own` as [`Queries::attend_beside`].
    #[track_caller]
    fn offline_heads(&self, past: &Past, own: Option<[&Tensor; 2]>, heads: usize) -> Tensor {
        let scores = self.scores(past);
        let mut highest = scores.max_keep(&[4]);
        if let Some(sinks) = self.sinks {
            highest = highest.maximum(&sink(sinks, highest.shape()));
        }
        let own = own.map(|[k, v]| (self.own_scores(k), v));
        if let Some((own, _)) = &own {
            highest = highest.maximum(own);
        }
        let highest = highest.stop_gradient();
        let weights = (&scores - highest.broadcast_to(scores.shape())).exp();
        let width = self.q.dim(4);
        let summed = (past.v.dim(3) > width).then(|| values(&weights, past));
        let mut total = match &summed {
            // A sum, for a slice would be copied into the order of the division, one more program.
            Some(out) => {
                let column = out.graph().iota(DType::I32, out.shape(), 4).eq(width as i64);
                column.select(out, 0.0).sum_keep(&[4])
            }
            None => weights.sum_keep(&[4]),
        };
        if let Some(sinks) = self.sinks {
            total = &total + (sink(sinks, highest.shape()) - &highest).exp();
        }
        if let Some(out) = summed {
            let out = out.narrow(4, 0, width);
            return queries_first(&(&out / total.broadcast_to(out.shape())));
        }
        let (weights, total) = match (self.q.graph().platform(), self.q.dim(1)) {
            (Platform::Tpu, 1) => once(&weights, &total, past),
            _ => (weights, total),
        };
        let kept = |x: Tensor| if heads == self.q.dim(3) { x } else { x.narrow(2, 0, heads) };
        let (mut out, mut total) = (kept(values(&weights, past)), kept(total));
        if let Some((own, v)) = own {
            let weight = kept((own - highest).exp());
            let v = v.cast(DType::F32).reshape(&[v.dim(0), v.dim(2), v.dim(3)]).broadcast(out.shape(), &[0, 1, 4]);
            out = out + weight.broadcast_to(v.shape()) * v;
            total = total + weight;
        }
        queries_first(&(&out / total.broadcast_to(out.shape())))
    }

    /// Block by block, each over the keys that it can see at all, which leaves out most of the scores that the mask
    /// would throw away.
    #[track_caller]
    pub fn blocks(&self, past: &Past) -> Tensor {
        let rows = block(self.q.graph().platform());
        let past = &past.with_sums();
        let block = |start: usize| {
            let end = start + rows;
            let (first, last) = match past.order {
                Order::Trailing { window, before } => (start + before + 1 - window, end + before),
                _ => (0, end),
            };
            let positions = self.positions.narrow(1, start, rows);
            Queries { q: self.q.narrow(1, start, rows), positions: &positions, ..self.clone() }
                .offline(&past.narrow(first, last - first))
        };
        let blocks: Vec<Tensor> = (0..self.q.dim(1)).step_by(rows).map(block).collect();
        self.q.graph().concatenate(&blocks.iter().collect::<Vec<_>>(), 1)
    }

    /// With a running softmax over blocks of `columns` keys for each block of `rows` queries; the loops stop where no
    /// query of the block sees further.
    #[track_caller]
    pub fn online(&self, past: &Past, [rows, columns]: [usize; 2]) -> Tensor {
        let g = self.q.graph();
        let (s, t) = (self.q.dim(1), past.k.dim(2));
        let (rows, columns) = (rows.min(s), columns.min(t));
        let (s_padded, t_padded) = (s.next_multiple_of(rows), t.next_multiple_of(columns));
        let q = pad(&self.q, 1, s_padded, 0.0);
        let positions = pad(self.positions, 1, s_padded, 0.0);
        let past = past.pad(t_padded);
        let (order, softcap, blocks) = (past.order, self.softcap, (t_padded / columns) as i64);
        let sinks = self.sinks;

        let zero = g.scalar(0i64, DType::I32);
        let out = g.full(0.0, DType::F32, q.shape());
        let fixed = past.tensors();
        let first_row = self.first_row.as_ref().unwrap_or(&zero);
        let mut state = vec![&zero, &out, &q, &positions, first_row];
        state.extend(&fixed);
        state.extend(sinks);
        let (has_scales, has_sinks) = (past.scales.is_some(), sinks.is_some());

        let done = g.while_loop(
            &state,
            |state| state[0].lt((s_padded / rows) as i64),
            |state| {
                let [i, out, q, positions, first_row, fixed @ ..] = state else { unreachable!("as the loop began") };
                let (fixed, sinks) = fixed.split_at(fixed.len() - usize::from(has_sinks));
                let zero = g.scalar(0i64, DType::I32);
                let start = i * rows as i64;
                let [b, _, groups, r, k] = [0, 1, 2, 3, 4].map(|axis| q.dim(axis));
                let at = [&zero, &start, &zero, &zero, &zero];
                let block = q.dynamic_slice(&at, &[b, rows, groups, r, k]);
                let block_positions = positions.dynamic_slice(&[&zero, &start], &[b, rows]);
                // the blocks of keys that some query of this block may see
                let (low, high) = match order {
                    Order::Trailing { window, before } => {
                        let row = first_row + &start;
                        (
                            (&row + (before + 1 - window) as i64) / columns as i64,
                            (&row + (rows + before - 1) as i64) / columns as i64 + 1i64,
                        )
                    }
                    _ => (zero.clone(), block_positions.max(&[0, 1]) / columns as i64 + 1i64),
                };
                let high = high.minimum(blocks);
                let stats = score_shape(g, [b, groups, rows, r, 1]);
                let (highest, total) = match sinks.first() {
                    Some(sinks) => (sink(sinks, &stats), g.full(1.0, DType::F32, &stats)),
                    None => (g.full(f64::from(f32::MIN), DType::F32, &stats), g.full(0.0, DType::F32, &stats)),
                };
                let sum = g.full(0.0, DType::F32, &score_shape(g, [b, groups, rows, r, k]));
                let mut inner = vec![&low, &high, &highest, &total, &sum, &block, &block_positions];
                inner.extend(fixed);
                let done = g.while_loop(
                    &inner,
                    |state| state[0].lt(&state[1]),
                    |state| {
                        let [j, high, highest, total, sum, block, positions, fixed @ ..] = state else {
                            unreachable!("as the loop began");
                        };
                        let past = Past::from_tensors(fixed, has_scales, order).slice(&(j * columns as i64), columns);
                        let q = Queries { q: block.clone(), positions, first_row: None, softcap, sinks: None };
                        let scores = q.scores(&past);
                        let now = highest.maximum(&scores.max_keep(&[4]));
                        let weights = (&scores - now.broadcast_to(scores.shape())).exp();
                        let shrink = (highest - &now).exp();
                        let total = total * &shrink + weights.sum_keep(&[4]);
                        let sum = sum * shrink.broadcast_to(sum.shape()) + values(&weights, &past);
                        let mut next = vec![j + 1i64, high.clone(), now, total, sum, block.clone(), positions.clone()];
                        next.extend(fixed.iter().cloned());
                        next
                    },
                );
                let (total, sum) = (&done[3], &done[4]);
                let block = queries_first(&(sum / total.broadcast_to(sum.shape())));
                let mut next = vec![i + 1i64, out.dynamic_update_slice(&block, &at)];
                next.extend(state[2..].iter().cloned());
                next
            },
        );
        done[1].narrow(1, 0, s)
    }

    /// q·kᵀ with the softcap, and −f32::MAX for keys that a query must not see: (B, G, S, R, T) f32, in [`score_shape`]'s order.
    #[track_caller]
    fn scores(&self, past: &Past) -> Tensor {
        let platform = self.q.graph().platform();
        let equation = match platform {
            Platform::Tpu => "BSGRK,BGTK->BGRST",
            _ => "BSGRK,BGTK->BGSRT",
        };
        let mut scores = match past.k.dtype() {
            DType::I8 => einsum_as(equation, &self.q, &past.k.cast(self.q.dtype()), DType::F32),
            _ => einsum_as(equation, &self.q, &past.k, DType::F32),
        };
        if let Some([scale, _]) = &past.scales {
            let t = past.k.dim(2);
            let [b, g] = [0, 1].map(|axis| scale.dim(axis));
            scores = &scores * scale.reshape(&[b, g, t]).broadcast(scores.shape(), &[0, 1, 4]);
        }
        let scores = self.capped(scores);
        visible(self.positions, past)
            .broadcast(scores.shape(), &[0, query_axis(platform), 4])
            .select(&scores, f64::from(f32::MIN))
    }

    /// Those of one token with its own key (B, 1, G, K), X = 1.
    #[track_caller]
    fn own_scores(&self, k: &Tensor) -> Tensor {
        let q = self.q.cast(DType::F32);
        let k = k.cast(DType::F32).broadcast(q.shape(), &[0, 1, 2, 4]);
        let [b, s, g, r] = [0, 1, 2, 3].map(|axis| q.dim(axis));
        let shape = score_shape(q.graph(), [b, g, s, r, 1]);
        self.capped((q * k).sum(&[4]).reshape(&shape))
    }

    #[track_caller]
    fn capped(&self, scores: Tensor) -> Tensor {
        match self.softcap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        }
    }
}

/// Where the queries stand in scores: 2 of (B, G, S, R, T), or 3 of (B, G, R, S, T). The last two axes are cut into tiles of 8 × 128
/// on a TPU, which few heads would leave half empty, and the mask, (B, S, T), is the same for all R.
fn query_axis(platform: Platform) -> usize {
    if platform == Platform::Tpu { 3 } else { 2 }
}

/// The shape (B, G, S, R, X) as scores have it.
fn score_shape(g: &Graph, [b, groups, s, r, x]: [usize; 5]) -> [usize; 5] {
    if query_axis(g.platform()) == 3 { [b, groups, r, s, x] } else { [b, groups, s, r, x] }
}

/// Results in the order of scores as (B, S, G, R, K).
#[track_caller]
fn queries_first(x: &Tensor) -> Tensor {
    let order = if query_axis(x.graph().platform()) == 3 { [0, 3, 1, 2, 4] } else { [0, 2, 1, 3, 4] };
    x.transpose(&order)
}

/// The weights of one query, (B, G, R, 1, T), and their sum, (B, G, R, 1, 1), so that a TPU computes both in one program, and the
/// weights not a second time in the product; the axis of length 1 would keep it from that.
#[track_caller]
fn once(weights: &Tensor, total: &Tensor, past: &Past) -> (Tensor, Tensor) {
    let short = |x: &Tensor| {
        let [b, g, r, t] = [0, 1, 2, 4].map(|axis| x.dim(axis));
        x.reshape(&[b, g, r, t])
    };
    let dtype = if past.scales.is_some() { weights.dtype() } else { past.v.dtype() };
    let both = weights.graph().optimization_barrier(&[&short(weights).cast(dtype), &short(total)]);
    (both[0].reshape(weights.shape()), both[1].reshape(total.shape()))
}

/// weights (B, G, S, R, T) times values: (B, G, S, R, K) f32, both in [`score_shape`]'s order.
#[track_caller]
fn values(weights: &Tensor, past: &Past) -> Tensor {
    let equation = match weights.graph().platform() {
        Platform::Tpu => "BGRST,BGTK->BGRSK",
        _ => "BGSRT,BGTK->BGSRK",
    };
    match &past.scales {
        Some([_, scale]) => {
            let [b, g, t] = [0, 1, 2].map(|axis| scale.dim(axis));
            let weights = weights * scale.reshape(&[b, g, t]).broadcast(weights.shape(), &[0, 1, 4]);
            einsum_as(equation, &weights, &past.v.cast(DType::F32), DType::F32)
        }
        None => einsum_as(equation, &weights.cast(past.v.dtype()), &past.v, DType::F32),
    }
}

/// True where query s of slot b may see key t, (B, S, T).
#[track_caller]
fn visible(positions: &Tensor, past: &Past) -> Tensor {
    let shape = [positions.dim(0), positions.dim(1), past.positions.dim(1)];
    let (query, key) = (positions.broadcast(&shape, &[0, 1]), past.positions.broadcast(&shape, &[0, 2]));
    match past.order {
        Order::Absolute | Order::Prefix => key.le(&query),
        Order::Trailing { window, .. } | Order::Windowed { window } => {
            key.le(&query) & key.gt(&(query - window as i64)) & key.ge(0i64)
        }
    }
}

/// The sinks (G, R) as scores (B, G, S, R, 1), in [`score_shape`]'s order.
#[track_caller]
fn sink(sinks: &Tensor, shape: &[usize]) -> Tensor {
    sinks.broadcast(shape, &[1, 5 - query_axis(sinks.graph().platform())])
}

impl Past {
    fn map(&self, f: impl Fn(&Tensor) -> Tensor, positions: Tensor) -> Past {
        let scales = self.scales.as_ref().map(|[k, v]| [f(k), f(v)]);
        Past { k: f(&self.k), v: f(&self.v), scales, positions, order: self.order }
    }

    /// Keys `first` … `first + len − 1`.
    #[track_caller]
    fn narrow(&self, first: usize, len: usize) -> Past {
        self.map(|x| x.narrow(2, first, len), self.positions.narrow(1, first, len))
    }

    /// On a TPU with a column of ones behind v, whose product is the sum of the weights: its matrix unit has room for it, and the
    /// vector unit would need as long for the sum as for the exponentials.
    #[track_caller]
    fn with_sums(&self) -> Past {
        let g = self.v.graph();
        if g.platform() != Platform::Tpu || self.scales.is_some() {
            return self.clone();
        }
        let mut column = self.v.shape().to_vec();
        column[3] = 1;
        let ones = g.full(1.0, self.v.dtype(), &column);
        Past { v: g.concatenate(&[&self.v, &ones], 3), ..self.clone() }
    }

    /// `len` keys from `first` (an i32 scalar) on.
    #[track_caller]
    fn slice(&self, first: &Tensor, len: usize) -> Past {
        let zero = first.graph().scalar(0i64, DType::I32);
        let slice = |x: &Tensor| {
            let size = [x.dim(0), x.dim(1), len, x.dim(3)];
            x.dynamic_slice(&[&zero, &zero, first, &zero], &size)
        };
        let positions = self.positions.dynamic_slice(&[&zero, first], &[self.positions.dim(0), len]);
        self.map(slice, positions)
    }

    /// With keys behind that stand after everything, where no query sees them.
    #[track_caller]
    fn pad(&self, len: usize) -> Past {
        let positions = pad(&self.positions, 1, len, f64::from(i32::MAX));
        self.map(|x| pad(x, 2, len, 0.0), positions)
    }

    fn tensors(&self) -> Vec<Tensor> {
        let scales = self.scales.iter().flatten();
        [&self.k, &self.v, &self.positions].into_iter().chain(scales).cloned().collect()
    }

    fn from_tensors(tensors: &[Tensor], has_scales: bool, order: Order) -> Past {
        let [k, v, positions, scales @ ..] = tensors else { unreachable!("as `tensors` gave them") };
        let scales = has_scales.then(|| [scales[0].clone(), scales[1].clone()]);
        Past { k: k.clone(), v: v.clone(), scales, positions: positions.clone(), order }
    }
}
