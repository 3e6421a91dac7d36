//! The table: for each op programs that use it.

use xla::DType::{BF16, F32, F64, I32, Pred, U32, U64};
use xla::graph::{Algorithm, Branch, CustomCall, Fold, Graph, Kernel, Mesh, Rules, Save, Tensor, einsum};

/// The shape of an input, and the range of its numbers where no golden gives them.
type Input = (&'static [usize], f64, f64);

/// One program.
pub(crate) struct Row {
    /// The op's name in `ops::ALL`.
    pub(crate) op: &'static str,
    /// The name of its golden, if PyTorch has one.
    pub(crate) name: &'static str,
    /// The arguments, all of f64.
    pub(crate) inputs: &'static [Input],
    /// What is done before there are arguments.
    pub(crate) prepare: fn(&Graph),
    /// From arguments to outputs, all of f64.
    pub(crate) build: fn(&Graph, &[Tensor]) -> Vec<Tensor>,
    /// What its derivative can be held to beside a golden.
    pub(crate) shows: Shows,
}

/// What a derivative can be held to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shows {
    /// Central differences, and the other mode.
    All,
    /// The other mode: the function has a kink there, or its derivative is another one's.
    NoDifferences,
    /// The golden alone: cotangents are rounded on the way.
    Rounded,
}

const fn row(
    op: &'static str,
    name: &'static str,
    inputs: &'static [Input],
    build: fn(&Graph, &[Tensor]) -> Vec<Tensor>,
) -> Row {
    Row { op, name, inputs, prepare: |_| {}, build, shows: Shows::All }
}

/// A row of one input and one output.
macro_rules! one {
    ($op:literal, $name:literal, $shape:expr, $low:expr, $high:expr, $build:expr) => {
        row($op, $name, &[(&$shape, $low, $high)], |_, x| {
            let build: fn(&Tensor) -> Tensor = $build;
            vec![build(&x[0])]
        })
    };
}

/// A row of two inputs and one output.
macro_rules! two {
    ($op:literal, $name:literal, $left:expr, $right:expr, $low:expr, $high:expr, $build:expr) => {
        row($op, $name, &[(&$left, $low, $high), (&$right, $low, $high)], |_, x| {
            let build: fn(&Tensor, &Tensor) -> Tensor = $build;
            vec![build(&x[0], &x[1])]
        })
    };
}

/// A row on four devices, two along "data" and two along "model".
const fn on_mesh(
    op: &'static str,
    name: &'static str,
    inputs: &'static [Input],
    build: fn(&Graph, &[Tensor]) -> Vec<Tensor>,
) -> Row {
    let prepare = |g: &Graph| {
        let rules = Rules::new(&[("batch", &["data"]), ("mlp", &["model"]), ("rows", &["data", "model"])]);
        g.set_mesh(Mesh::new([("data", 2), ("model", 2)]).unwrap(), rules);
    };
    Row { op, name, inputs, prepare, build, shows: Shows::All }
}

/// Squares of one device's pieces through `op`, and the whole of them on every device.
fn pieces(g: &Graph, x: &Tensor, op: impl Fn(&Tensor) -> Tensor) -> Vec<Tensor> {
    g.manual_computation(&[(x, &["rows", ""])], &[&["rows", ""]], |a| vec![op(&a[0].square()) * &a[0]])
}

/// Kept with the numbers of a [2, 3] so that an integer op has something to scale.
fn scaled(g: &Graph, x: &Tensor, op: impl Fn(&Tensor) -> Tensor) -> Vec<Tensor> {
    let counted = g.iota(I32, x.shape(), 1) + 1;
    vec![x * op(&counted).cast(F64)]
}

/// Positions of a (4, …) table: twice the same, and two that are out of range.
fn positions(g: &Graph) -> Tensor {
    g.constant(&[2i32, 0, 2, 9, -3, 1], &[2, 3])
}

pub(crate) const ROWS: &[Row] = &[
    one!("abs", "abs", [2, 3], -2.0, 2.0, |x| x.abs()),
    one!("cbrt", "cbrt", [2, 3], 0.2, 2.0, |x| x.cbrt()),
    one!("ceil", "ceil", [2, 3], 0.1, 4.0, |x| x.ceil() + x),
    row("count_leading_zeros", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| n.clz())),
    one!("cosine", "cos", [2, 3], -3.0, 3.0, |x| x.cos()),
    one!("erf", "erf", [2, 3], -2.0, 2.0, |x| x.erf()),
    one!("exponential", "exp", [2, 3], -2.0, 2.0, |x| x.exp()),
    one!("exponential_minus_one", "expm1", [2, 3], -2.0, 2.0, |x| x.expm1()),
    one!("floor", "floor", [2, 3], 0.1, 4.0, |x| x.floor() + x),
    one!("is_finite", "", [2, 3], -1.0, 1.0, |x| x.is_finite().cast(F64) * x),
    one!("log", "log", [2, 3], 0.2, 3.0, |x| x.log()),
    one!("log_plus_one", "log1p", [2, 3], -0.5, 3.0, |x| x.log1p()),
    one!("logistic", "sigmoid", [2, 3], -3.0, 3.0, |x| x.logistic()),
    one!("logistic", "silu", [2, 3], -3.0, 3.0, |x| x.silu()),
    one!("erf", "gelu", [2, 3], -3.0, 3.0, |x| x.gelu()),
    one!("tanh", "gelu_tanh", [2, 3], -3.0, 3.0, |x| x.gelu_tanh()),
    one!("negate", "neg", [2, 3], -1.0, 1.0, |x| -x),
    row("not", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| !n)),
    row("popcnt", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| n.popcnt())),
    one!("round_nearest_even", "round", [2, 3], 0.1, 4.0, |x| x.round() + x),
    one!("round_nearest_afz", "", [2, 3], 0.1, 4.0, |x| x.round_afz() + x),
    one!("rsqrt", "rsqrt", [2, 3], 0.2, 3.0, |x| x.rsqrt()),
    one!("sign", "sign", [2, 3], 0.1, 4.0, |x| x.sign() * x),
    one!("sine", "sin", [2, 3], -3.0, 3.0, |x| x.sin()),
    one!("sqrt", "sqrt", [2, 3], 0.2, 3.0, |x| x.sqrt()),
    one!("tan", "tan", [2, 3], -1.0, 1.0, |x| x.tan()),
    one!("tanh", "tanh", [2, 3], -2.0, 2.0, |x| x.tanh()),
    two!("add", "add", [2, 3], [2, 3], -1.0, 1.0, |x, y| x + y),
    // The same value twice: its cotangents are added up.
    one!("add", "", [2, 3], -1.0, 1.0, |x| (x + x) * x + x),
    row("and", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| n & &(n + 1))),
    two!("atan2", "atan2", [2, 3], [2, 3], -1.0, 1.0, |x, y| x.atan2(y)),
    two!("divide", "div", [2, 3], [2, 3], 0.5, 2.0, |x, y| x / y),
    two!("maximum", "maximum", [2, 3], [2, 3], -1.0, 1.0, |x, y| x.maximum(y)),
    two!("minimum", "minimum", [2, 3], [2, 3], -1.0, 1.0, |x, y| x.minimum(y)),
    Row {
        shows: Shows::NoDifferences,
        ..two!("maximum", "maximum_ties", [2, 3], [2, 3], -1.0, 1.0, |x, y| x.maximum(y))
    },
    Row {
        shows: Shows::NoDifferences,
        ..two!("minimum", "minimum_ties", [2, 3], [2, 3], -1.0, 1.0, |x, y| x.minimum(y))
    },
    two!("multiply", "mul", [2, 3], [2, 3], -1.0, 1.0, |x, y| x * y),
    row("or", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| n | &(n + 1))),
    two!("power", "pow", [2, 3], [2, 3], 0.3, 2.0, |x, y| x.pow(y)),
    Row { shows: Shows::NoDifferences, ..two!("power", "pow_zero", [2, 3], [2, 3], 0.3, 2.0, |x, y| x.pow(y)) },
    two!("remainder", "fmod", [2, 3], [2, 3], 0.3, 2.0, |x, y| x % y),
    row("shift_left", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| n.shift_left(1))),
    row("shift_right_arithmetic", "", &[(&[2, 3], -1.0, 1.0)], |g, x| {
        scaled(g, &x[0], |n| n.shift_right_arithmetic(1))
    }),
    row("shift_right_logical", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| n.shift_right_logical(1))),
    two!("subtract", "sub", [2, 3], [2, 3], -1.0, 1.0, |x, y| x - y),
    row("xor", "", &[(&[2, 3], -1.0, 1.0)], |g, x| scaled(g, &x[0], |n| n ^ &(n + 1))),
    one!("compare", "", [2, 3], -1.0, 1.0, |x| x.gt(0.1).cast(F64) * x),
    two!("select", "where", [2, 3], [2, 3], -1.0, 1.0, |x, y| x.gt(0.1).select(&(x * y), &(x + y))),
    row("clamp", "clamp", &[(&[3, 4], -1.0, 0.0), (&[3, 4], -2.0, 2.0), (&[3, 4], 0.0, 1.0)], |g, x| {
        vec![g.apply1(xla::graph::ops::select::Clamp, &[&x[0], &x[1], &x[2]])]
    }),
    one!("convert", "", [2, 3], -1.0, 1.0, |x| x.cast(I32).cast(F64) * x),
    Row {
        shows: Shows::Rounded,
        ..one!("convert", "to_float32_and_back", [2, 3], -1.0, 1.0, |x| x.square().cast(F32).cast(F64) * x)
    },
    Row {
        shows: Shows::Rounded,
        ..one!("convert", "to_bfloat16_and_back", [2, 3], -1.0, 1.0, |x| (x.cast(BF16).cast(F64) + x) * 0.5)
    },
    one!("bitcast_convert", "", [2, 3], -1.0, 1.0, |x| x.bitcast(U64).bitcast(F64) + x.square() - x.stop_gradient()),
    Row {
        shows: Shows::NoDifferences,
        ..one!("reduce_precision", "", [2, 3], -1.0, 1.0, |x| x.square().reduce_precision(8, 23) * x)
    },
    Row {
        shows: Shows::NoDifferences,
        ..one!("stop_gradient", "detach", [2, 3], -1.0, 1.0, |x| x.stop_gradient() * x)
    },
    one!("constant", "", [2, 3], -1.0, 1.0, |x| x * 3.0),
    row("iota", "", &[(&[2, 3], -1.0, 1.0)], |g, x| vec![&x[0] * g.iota(F64, &[2, 3], 1)]),
    one!("broadcast_in_dim", "expand", [2, 1], -1.0, 1.0, |x| x.broadcast(&[3, 2, 4], &[1, 2])),
    // Axes that change places.
    one!("broadcast_in_dim", "", [2, 3], -1.0, 1.0, |x| x.broadcast(&[3, 4, 2], &[2, 0])),
    one!("reshape", "reshape", [2, 6], -1.0, 1.0, |x| x.reshape(&[3, 4])),
    one!("transpose", "permute", [2, 3, 4], -1.0, 1.0, |x| x.transpose(&[2, 0, 1])),
    one!("reverse", "flip", [2, 3, 2], -1.0, 1.0, |x| x.reverse(&[0, -1])),
    one!("slice", "slice", [5, 7], -1.0, 1.0, |x| {
        x.graph()
            .apply1(xla::graph::ops::slice::Slice { start: vec![1, 0], limit: vec![4, 6], stride: vec![1, 4] }, &[x])
    }),
    row("pad", "", &[(&[3, 4], -1.0, 1.0), (&[], 0.5, 0.6)], |g, x| {
        let op = xla::graph::ops::slice::Pad { low: vec![2, -1], high: vec![1, 3], interior: vec![0, 2] };
        vec![g.apply1(op, &[&x[0], &x[1]])]
    }),
    row("concatenate", "cat", &[(&[2, 3], -1.0, 1.0), (&[2, 1], -1.0, 1.0), (&[2, 2], -1.0, 1.0)], |g, x| {
        vec![g.concatenate(&[&x[0], &x[1], &x[2]], 1)]
    }),
    row("dynamic_slice", "", &[(&[4, 5], -1.0, 1.0)], |g, x| {
        // The second window would stick out, so it is moved inside.
        let (one, nine) = (g.scalar(1i64, I32), g.scalar(9i64, I32));
        vec![x[0].dynamic_slice(&[&one, &one], &[2, 3]), x[0].dynamic_slice(&[&nine, &one], &[2, 3])]
    }),
    row("dynamic_update_slice", "", &[(&[4, 5], -1.0, 1.0), (&[2, 3], -1.0, 1.0)], |g, x| {
        let (one, nine) = (g.scalar(1i64, I32), g.scalar(9i64, I32));
        let once = x[0].dynamic_update_slice(&x[1], &[&one, &one]);
        vec![once.dynamic_update_slice(&(&x[1] * 2.0), &[&nine, &one])]
    }),
    row("gather", "embedding", &[(&[4, 3], -1.0, 1.0)], |g, x| {
        vec![x[0].take(&g.constant(&[2i32, 0, 2, 3, 1, 2], &[2, 3]), 0)]
    }),
    row("gather", "", &[(&[2, 4, 3], -1.0, 1.0)], |g, x| vec![x[0].take(&positions(g), 1)]),
    row("gather", "take_along_dim", &[(&[2, 4], -1.0, 1.0)], |g, x| {
        vec![x[0].take_along(&g.constant(&[2i32, 0, 2, 3, 1, 1], &[2, 3]), 1)]
    }),
    // Windows of two components, some of them sticking out.
    row("gather", "", &[(&[4, 5], -1.0, 1.0)], |g, x| {
        let op = xla::graph::ops::gather::Gather {
            offset_dims: vec![1, 2],
            collapsed_slice_dims: vec![],
            operand_batching_dims: vec![],
            start_indices_batching_dims: vec![],
            start_index_map: vec![1, 0],
            index_vector_dim: 1,
            slice_sizes: vec![2, 3],
            indices_are_sorted: false,
        };
        vec![g.apply1(op, &[&x[0], &g.constant(&[0i32, 1, 4, 9, 1, 1], &[3, 2])])]
    }),
    row("scatter", "index_add", &[(&[4, 3], -1.0, 1.0), (&[5, 3], -1.0, 1.0)], |g, x| {
        vec![x[0].scatter(&g.constant(&[2i32, 0, 2, 3, 2], &[5, 1]), &x[1], Some(Fold::Sum), false)]
    }),
    // An index out of range writes nothing.
    row("scatter", "", &[(&[4, 5], -1.0, 1.0), (&[3], -1.0, 1.0)], |g, x| {
        let at = g.constant(&[0i32, 4, 2, 5, 3, 1], &[3, 2]);
        vec![x[0].scatter(&at, &x[1], None, true), x[0].scatter(&at, &x[1], Some(Fold::Sum), true)]
    }),
    row("scatter", "", &[(&[2, 6, 3], -1.0, 1.0), (&[2, 2, 3], -1.0, 1.0)], |g, x| {
        // The second slot's window does not fit.
        vec![x[0].update_positions(&x[1], &g.constant(&[1i32, 5], &[2]))]
    }),
    two!("dot_general", "matmul", [3, 4], [4, 2], -1.0, 1.0, |x, y| einsum("AB,BC->AC", x, y)),
    two!("dot_general", "grouped_scores", [2, 3, 2, 2, 4], [2, 5, 2, 4], -1.0, 1.0, |x, y| {
        einsum("BSGRK,BTGK->BGSRT", x, y)
    }),
    two!("dot_general", "projection_out", [2, 3, 2, 4], [2, 4, 5], -1.0, 1.0, |x, y| einsum("BSHK,HKM->BSM", x, y)),
    // Several pairs whose orders differ between the operands.
    two!("dot_general", "", [2, 3, 4, 5], [5, 4, 6, 2], -1.0, 1.0, |x, y| {
        x.dot_general(y, &[(0, 3)], &[(3, 0), (2, 1)], F64)
    }),
    two!("dot_general", "outer", [2, 3], [4], -1.0, 1.0, |x, y| einsum("AB,C->BCA", x, y)),
    one!("reduce", "sum", [2, 3, 4], -1.0, 1.0, |x| x.sum(&[0, 2])),
    one!("reduce", "mean", [2, 3, 4], -1.0, 1.0, |x| x.mean(&[1])),
    one!("reduce", "amax", [2, 3, 4], -1.0, 1.0, |x| x.max(&[0, 2])),
    one!("reduce", "amin", [2, 3, 4], -1.0, 1.0, |x| x.min(&[1])),
    Row { shows: Shows::NoDifferences, ..one!("reduce", "amax_ties", [3, 4], -1.0, 1.0, |x| x.max(&[1])) },
    one!("reduce", "prod", [3, 4], 0.5, 1.5, |x| x.product(&[1])),
    one!("reduce", "prod_zeros", [3, 4], -1.0, 1.0, |x| x.product(&[1])),
    one!("reduce", "", [2, 3, 4], 0.5, 1.5, |x| x.product(&[2, 0])),
    one!("reduce", "", [2, 3], -1.0, 1.0, |x| x.gt(0.0).any(&[1]).cast(F64) * x.sum(&[1])),
    one!("reduce", "softmax", [3, 5], -2.0, 2.0, |x| x.softmax(-1)),
    row("reduce", "", &[(&[2, 3], -1.0, 1.0), (&[], -1.0, 1.0)], |g, x| {
        vec![g.apply1(xla::graph::ops::reduce::Reduce { fold: Fold::Sum, axes: vec![1] }, &[&x[0], &x[1]])]
    }),
    row("arg_reduce", "max_dim", &[(&[3, 5], -2.0, 2.0)], |g, x| {
        use xla::graph::ops::{reduce::ArgReduce, select::Direction};
        let both = g.apply(ArgReduce { direction: Direction::Gt, axis: 1 }, &[&x[0]]);
        vec![&both[0] * (both[1].cast(F64) + 1.0)]
    }),
    one!("reduce_window", "cumsum", [2, 5], -1.0, 1.0, |x| x.cumsum(1)),
    one!("reduce_window", "", [5, 7], -1.0, 1.0, |x| {
        x.reduce_window(Fold::Sum, &[2, 3], &[1, 2], &[(1, 0), (0, 2)])
    }),
    one!("sort", "sort", [3, 5], -1.0, 1.0, |x| x.sort(-1, false)),
    row("sort", "", &[(&[3, 4], -1.0, 1.0), (&[3, 4], -1.0, 1.0)], |_, x| x[0].sort_with(&[&x[1]], 0, true)),
    one!("top_k", "topk", [3, 5], -1.0, 1.0, |x| x.top_k(3).0),
    row("rng_bit_generator", "", &[(&[2, 3], -1.0, 1.0)], |g, x| {
        let state = g.constant(&[7u64, 1], &[2]);
        vec![&x[0] * state.rng_bits(Algorithm::ThreeFry, U32, &[2, 3]).1.cast(F64) * 2f64.powi(-32)]
    }),
    row("call", "", &[(&[2, 3], -1.0, 1.0), (&[3, 3], -1.0, 1.0)], |g, x| {
        // The same function twice, once of its own result.
        let layer = |x: &Tensor, w: &Tensor| {
            g.call("layer", &[x, w], |a| {
                let h = einsum("AB,BC->AC", &a[0], &a[1]).tanh();
                vec![&h * &h + &a[0], h.sum(&[0])]
            })
        };
        let first = layer(&x[0], &x[1]);
        let second = layer(&first[0], &x[1]);
        vec![second[0].clone(), &first[1] * &second[1]]
    }),
    row("scan", "", &[(&[3, 3], -1.0, 1.0), (&[2, 3], -1.0, 1.0), (&[4, 2, 3], -1.0, 1.0)], |g, x| {
        let (carry, stacks) = g.scan("layers", 4, &[&x[0]], &[&x[1]], &[&x[2]], |w, h, x| {
            let next = (einsum("AB,BC->AC", &h[0], &w[0]) + &x[0]).tanh();
            (vec![next.clone()], vec![next.square().sum(&[0]), &next * &x[0]])
        });
        vec![carry[0].clone(), stacks[0].clone(), stacks[1].clone()]
    }),
    // A counter beside a float, and a piece that no gradient reaches.
    row("scan", "", &[(&[2], -1.0, 1.0), (&[3, 2], -1.0, 1.0)], |g, x| {
        let zero = g.scalar(0i64, I32);
        let (carry, _) = g.scan("count", 3, &[], &[&zero, &x[0]], &[&x[1]], |_, h, x| {
            let n = h[0].cast(F64).broadcast_to(&[2]);
            (vec![&h[0] + 1, &h[1] * (n + 1.0).sqrt() + x[0].square() * x[0].stop_gradient().sign()], vec![])
        });
        vec![carry[1].clone()]
    }),
    row("case", "", &[(&[2, 3], -1.0, 1.0), (&[2, 3], -1.0, 1.0)], |g, x| {
        let branches: [&Branch<'_>; 2] = [&|a: &[Tensor]| vec![a[0].tanh() * &a[1]], &|a: &[Tensor]| vec![a[0].exp()]];
        let inputs = [&x[0], &x[1]];
        let first = g.case(&g.scalar(0i64, I32), &inputs, &branches).remove(0);
        let second = g.case(&g.scalar(1i64, I32), &inputs, &branches).remove(0);
        let third = g.cond(&g.scalar(false, Pred), &inputs, |a| vec![a[0].clone()], |a| vec![a[1].square()]).remove(0);
        vec![first, second * third]
    }),
    row("optimization_barrier", "", &[(&[2], -1.0, 1.0), (&[3], -1.0, 1.0)], |g, x| {
        g.optimization_barrier(&[&x[0].square(), &x[1].exp()])
    }),
    // A call that a definition stands for: the plugin has no such handler, so the definition runs.
    row("tanh", "", &[(&[2, 3], -1.0, 1.0)], |g, x| {
        g.kernel(Kernel::new("test.unknown"), &[&x[0]], |a| vec![a[0].tanh() * &a[0]])
    }),
    // A kernel that is there: its derivative is that of its definition.
    Row {
        prepare: |g| g.set_kernels(&["gradients.tanh_square"]),
        ..row("custom_call", "", &[(&[2, 3], -1.0, 1.0)], |g, x| {
            let kernel = Kernel::new("gradients.tanh_square");
            g.kernel(kernel, &[&x[0].exp()], |a| vec![a[0].tanh().square()])
        })
    },
    // Two results and one argument without a cotangent; in a function that computes its forward half once more, too.
    row("custom_vjp", "", &[(&[2, 3], -1.0, 1.0), (&[3, 4], -1.0, 1.0)], |g, x| {
        let product = |x: &Tensor, w: &Tensor| {
            let rows = g.iota(F64, &[2], 0);
            let forward = |a: &[Tensor]| {
                let y = einsum("AB,BC->AC", &a[0], &a[1]) + a[2].broadcast(&[2, 4], &[0]);
                (vec![y.square(), y.sum(&[1])], vec![a[0].clone(), a[1].clone(), y * 2.0])
            };
            let backward = |kept: &[Tensor], ct: &[Tensor]| {
                let of_y = &ct[0] * &kept[2] + ct[1].broadcast(&[2, 4], &[0]);
                vec![Some(einsum("AC,BC->AB", &of_y, &kept[1])), Some(einsum("AB,AC->BC", &kept[0], &of_y)), None]
            };
            g.custom_vjp("product", &[x, w, &rows], forward, backward)
        };
        let first = product(&x[0].tanh(), &x[1]);
        let again = g.checkpoint("again", Save::Nothing, &[&x[0], &x[1]], |a| vec![product(&a[0], &a[1]).remove(0)]);
        // One more that no gradient goes through stays the op that it is.
        let signs = product(&x[0].stop_gradient(), &x[1].stop_gradient()).remove(1).sign();
        vec![first[0].clone(), &first[1] * again[0].sum(&[1]) * signs]
    }),
    on_mesh("sharding_constraint", "", &[(&[4, 6], -1.0, 1.0), (&[6, 8], -1.0, 1.0)], |_, x| {
        let h = einsum("BM,MF->BF", &x[0].shard(["batch", ""]), &x[1].shard(["", "mlp"])).shard(["batch", "mlp"]);
        vec![h.tanh().shard(["", "mlp"])]
    }),
    on_mesh("manual_computation", "", &[(&[4, 3], -1.0, 1.0), (&[3, 2], -1.0, 1.0)], |g, x| {
        // The second operand lies whole on every device, and so does the second result.
        let inputs: [(&Tensor, &[&str]); 2] = [(&x[0], &["batch", ""]), (&x[1], &["", "mlp"])];
        g.manual_computation(&inputs, &[&["batch", "mlp"], &["", ""]], |a| {
            let h = einsum("BM,MF->BF", &a[0], &a[1]).tanh();
            let total = einsum("BF,BG->FG", &h, &a[0]).all_gather(0, &["model"]).all_reduce(Fold::Sum, &["data"]);
            vec![h, total]
        })
    }),
    on_mesh("all_reduce", "", &[(&[8, 2], -1.0, 1.0)], |g, x| {
        pieces(g, &x[0], |x| x.all_reduce(Fold::Sum, &["model"]))
    }),
    on_mesh("all_gather", "", &[(&[8, 2], -1.0, 1.0)], |g, x| {
        pieces(g, &x[0], |x| x.all_gather(0, &["data", "model"]).reshape(&[4, 2, 2]).sum(&[0]))
    }),
    on_mesh("reduce_scatter", "", &[(&[8, 2], -1.0, 1.0)], |g, x| {
        pieces(g, &x[0], |x| x.reduce_scatter(Fold::Sum, 0, &["model"]).broadcast_to(&[2, 2]))
    }),
    on_mesh("all_to_all", "", &[(&[8, 2], -1.0, 1.0)], |g, x| {
        pieces(g, &x[0], |x| x.all_to_all(1, 0, &["data"]).reshape(&[2, 2]))
    }),
    on_mesh("collective_permute", "", &[(&[8, 2], -1.0, 1.0)], |g, x| {
        pieces(g, &x[0], |x| x.collective_permute(1, "model"))
    }),
    on_mesh("partition_id", "", &[(&[8, 2], -1.0, 1.0)], |g, x| {
        pieces(g, &x[0], |x| x * (g.partition_id().cast(F64) + 1.0).broadcast_to(&[2, 2]))
    }),
    on_mesh("replica_id", "", &[(&[8, 2], -1.0, 1.0)], |g, x| {
        pieces(g, &x[0], |x| x * (g.replica_id().cast(F64) + 1.0).broadcast_to(&[2, 2]))
    }),
];

/// A program that has no derivative: the op that has none, what the error says, and the function.
type Without = (&'static str, &'static str, fn(&Graph, &Tensor) -> Tensor);

/// Programs that have no derivative.
pub(crate) const WITHOUT: &[Without] = &[
    ("while", "write it with scan", |g, x| {
        let zero = g.scalar(0i64, I32);
        g.while_loop(&[&zero, x], |v| v[0].lt(3), |v| vec![&v[0] + 1, v[1].tanh()]).remove(1)
    }),
    ("custom_call", "what the handler \"test.unknown\" computes is not known", |g, x| {
        g.apply1(CustomCall::new("test.unknown", vec![x.aval().clone()]), &[x])
    }),
    ("scatter", "which of several updates of one place stays is not known", |g, x| {
        x.scatter(&g.constant(&[0i32, 0], &[2, 1]), &g.full(1.0, F64, &[2, 3]), None, false)
    }),
    ("scatter", "not Max", |g, x| {
        x.scatter(&g.constant(&[0i32, 0], &[2, 1]), &g.full(1.0, F64, &[2, 3]), Some(Fold::Max), true)
    }),
    ("reduce_window", "only sums over windows", |_, x| x.reduce_window(Fold::Max, &[1, 2], &[1, 1], &[(0, 0), (0, 0)])),
];
