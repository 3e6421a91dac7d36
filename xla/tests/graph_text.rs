//! Pins the text of whole modules, where errors are said to be, and that `ops::ALL` lists every op and no other.

use std::collections::BTreeSet;

use xla::DType::*;
use xla::graph::ops::custom_call::CustomCall;
use xla::graph::ops::{self, unary};
use xla::graph::*;

/// A small attention step: donation, scopes, names, a function called twice.
fn decode() -> Graph {
    let g = Graph::new("decode");
    let x = g.arg("x", BF16, &[2, 8]);
    let w = g.arg("layers.0.q_proj", BF16, &[8, 4]);
    let cache = g.arg("cache/k", BF16, &[2, 16, 4]);
    let position = g.arg("position", I32, &[2]);
    let _model = g.scope("model");
    let k = {
        let _layer = g.scope("layers.0/attention");
        g.call("project", &[&x, &w], |args| {
            let _scope = g.scope("dot");
            vec![einsum_as("BM,MK->BK", &args[0], &args[1], F32).named("k").cast(BF16)]
        })
    };
    let again = g.call("project", &[&x, &w], |_| unreachable!("the function is reused"));
    let cache_out = cache.update_positions(&k[0].expand_dims(1), &position);
    g.output("k", &again[0]);
    g.output_aliased("cache/k", &cache_out, &cache);
    g
}

#[test]
fn a_module_reads_like_the_model() {
    let text = decode().finish().unwrap().stablehlo();
    assert_eq!(
        text,
        r#"module @decode {
  func.func public @main(%x: tensor<2x8xbf16> loc("x"), %layers_0_q_proj: tensor<8x4xbf16> loc("layers.0.q_proj"), %cache_k: tensor<2x16x4xbf16> {tf.aliasing_output = 1 : i32} loc("cache/k"), %position: tensor<2xi32> loc("position")) -> (tensor<2x4xbf16> {jax.result_info = "k"}, tensor<2x16x4xbf16> {jax.result_info = "cache/k"}) {
    %call = func.call @project(%x, %layers_0_q_proj) : (tensor<2x8xbf16>, tensor<8x4xbf16>) -> tensor<2x4xbf16> loc("model/layers.0/attention/call")
    %call_1 = func.call @project(%x, %layers_0_q_proj) : (tensor<2x8xbf16>, tensor<8x4xbf16>) -> tensor<2x4xbf16> loc("model/call")
    %reshape = stablehlo.reshape %call : (tensor<2x4xbf16>) -> tensor<2x1x4xbf16> loc("model/reshape")
    %iota = stablehlo.iota dim = 0 : tensor<2x1xi32> loc("model/iota")
    %reshape_1 = stablehlo.reshape %position : (tensor<2xi32>) -> tensor<2x1xi32> loc("model/reshape")
    %concatenate = stablehlo.concatenate %iota, %reshape_1, dim = 1 : (tensor<2x1xi32>, tensor<2x1xi32>) -> tensor<2x2xi32> loc("model/concatenate")
    %scatter = "stablehlo.scatter"(%cache_k, %concatenate, %reshape) <{indices_are_sorted = true, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [1, 2], inserted_window_dims = [0], scatter_dims_to_operand_dims = [0, 1], index_vector_dim = 1>, unique_indices = true}> ({
    ^bb0(%old: tensor<bf16>, %new: tensor<bf16>):
      stablehlo.return %new : tensor<bf16>
    }) : (tensor<2x16x4xbf16>, tensor<2x2xi32>, tensor<2x1x4xbf16>) -> tensor<2x16x4xbf16> loc("model/scatter")
    return %call_1, %scatter : tensor<2x4xbf16>, tensor<2x16x4xbf16>
  }
  func.func private @project(%x: tensor<2x8xbf16>, %q_proj: tensor<8x4xbf16>) -> (tensor<2x4xbf16>) {
    %k = stablehlo.dot_general %x, %q_proj, contracting_dims = [1] x [0] : (tensor<2x8xbf16>, tensor<8x4xbf16>) -> tensor<2x4xf32> loc("project/dot/k")
    %convert = stablehlo.convert %k : (tensor<2x4xf32>) -> tensor<2x4xbf16> loc("project/dot/convert")
    return %convert : tensor<2x4xbf16>
  }
}
"#
    );
    assert_eq!(text, decode().finish().unwrap().stablehlo(), "the same graph gives the same text");
}

/// Everything sharded in both spellings.
#[test]
fn sharding_is_an_attribute_of_arguments_and_results() {
    let g = Graph::new("mlp");
    let rules = Rules::new(&[("batch", &["data"]), ("embed", &[]), ("mlp", &["model"])]);
    g.set_mesh(Mesh::new([("data", 2), ("model", 4)]).unwrap(), rules);
    let x = g.arg_with("x", F32, &[4, 8], ArgAttrs { sharding: Some(&["batch", "embed"]) });
    let w = g.arg_with("w", F32, &[8, 16], ArgAttrs { sharding: Some(&["embed", "mlp"]) });
    let h = einsum("BM,MF->BF", &x, &w).shard(["batch", "mlp"]);
    g.output_sharded("h", &h, &["batch", "mlp"]);
    g.output_aliased("x", &(&x + 1.0), &x);
    let module = g.finish().unwrap();
    assert_eq!(
        module.stablehlo(),
        r#"module @mlp attributes {mhlo.num_partitions = 8 : i32, mhlo.num_replicas = 1 : i32} {
  sdy.mesh @mesh = <["data"=2, "model"=4]>
  func.func public @main(%x: tensor<4x8xf32> {sdy.sharding = #sdy.sharding<@mesh, [{"data"}, {}]>, tf.aliasing_output = 1 : i32} loc("x"), %w: tensor<8x16xf32> {sdy.sharding = #sdy.sharding<@mesh, [{}, {"model"}]>} loc("w")) -> (tensor<4x16xf32> {jax.result_info = "h", sdy.sharding = #sdy.sharding<@mesh, [{"data"}, {"model"}]>}, tensor<4x8xf32> {jax.result_info = "x", sdy.sharding = #sdy.sharding<@mesh, [{"data"}, {}]>}) {
    %dot_general = stablehlo.dot_general %x, %w, contracting_dims = [1] x [0] : (tensor<4x8xf32>, tensor<8x16xf32>) -> tensor<4x16xf32> loc("dot_general")
    %sharding_constraint = sdy.sharding_constraint %dot_general <@mesh, [{"data"}, {"model"}]> : tensor<4x16xf32> loc("sharding_constraint")
    %constant = stablehlo.constant dense<1.0> : tensor<4x8xf32> loc("constant")
    %add = stablehlo.add %x, %constant : tensor<4x8xf32> loc("add")
    return %sharding_constraint, %add : tensor<4x16xf32>, tensor<4x8xf32>
  }
}
"#
    );
    let gspmd = module.stablehlo_with(Emission::Gspmd);
    assert!(gspmd.contains(
        r#"%w: tensor<8x16xf32> {mhlo.sharding = "{devices=[1,4,2]<=[2,4]T(1,0) last_tile_dim_replicate}"}"#
    ));
    assert!(!gspmd.contains("sdy."));
    assert_eq!(module.args()[1].sharding.as_ref().unwrap().local_shape(module.mesh().unwrap(), &[8, 16]), [8, 4]);
}

#[test]
fn the_first_error_names_the_callers_line() {
    let g = Graph::new("wrong");
    let (x, w) = (g.arg("x", F32, &[2, 576]), g.arg("w", F32, &[512, 64]));
    let _scope = g.scope("layers.0");
    let _inner = g.scope("attention");
    let (line, y) = (line!(), einsum("BM,MK->BK", &x, &w));
    let _ = &y + &x; // A second mistake, which is not reported.
    g.output("y", &y);
    let error = g.finish().unwrap_err();
    assert_eq!((error.location.file(), error.location.line()), (file!(), line));
    assert_eq!(
        error.to_string(),
        format!(
            "{}:{line}:{}: einsum \"BM,MK->BK\": axis M is 576 on the left and 512 on the right (in layers.0/attention)",
            file!(),
            error.location.column()
        )
    );
}

/// One mistake on each line; each must be said to be on that line, however deep the op is made.
#[test]
fn every_way_to_make_an_op_keeps_the_callers_line() {
    type Mistake = fn(&Graph, &Tensor);
    let mistakes: &[(u32, Mistake)] = &[
        (line!(), |_, x| drop(x + x.sum(&[0]))),
        (line!(), |_, x| drop(x.cast(I32) * 0.5)),
        (line!(), |_, x| drop(0.5 - x.cast(I32))),
        (line!(), |_, x| drop(-x.gt(0.0))),
        (line!(), |_, x| drop(x.cast(I32).gelu())),
        (line!(), |_, x| drop(x.maximum(&x.sum(&[0])))),
        (line!(), |_, x| drop(x.mean_keep(&[7]))),
        (line!(), |_, x| drop(x.softmax(2))),
        (line!(), |_, x| drop(x.take(x, 0))),
        (line!(), |_, x| drop(x.update_positions(x, x))),
        (line!(), |_, x| drop(x.argmax(3))),
        (line!(), |_, x| drop(x.cumsum(3))),
        (line!(), |_, x| drop(x.argsort(3, true))),
        (line!(), |_, x| drop(x.rng_uniform(&[2]))),
        (line!(), |g, x| drop(g.concatenate(&[x], 5))),
        (line!(), |_, x| assert_eq!(x.dim(9), 1)),
        (line!(), |_, x| drop(x.pad(x, &[0, 0], &[0, 0], &[0, 0]))),
        (line!(), |g, x| drop(g.while_loop(&[x], |v| v[0].clone(), |v| v.to_vec()))),
        (line!(), |g, x| drop(g.call("f", &[], |_| vec![x.clone()]))),
        (line!(), |_, x| drop(x.all_gather(0, &["model"]))),
        (line!(), |g, x| g.output_aliased("y", x, &x.exp())),
        (line!(), |g, _| drop(g.arg("x", F32, &[]))),
        (line!(), |g, x| drop(g.apply(ops::unary::Exp, &[x, x]))),
        (line!(), |g, _| g.reject("a rule of the caller's")),
    ];
    for (line, mistake) in mistakes {
        let g = Graph::new("wrong");
        let x = g.arg("x", F32, &[2, 3]);
        mistake(&g, &x);
        g.output("x", &x);
        let error = g.finish().expect_err(&format!("line {line} is a mistake"));
        assert_eq!((error.location.file(), error.location.line()), (file!(), *line), "{error}");
    }
}

#[test]
fn mistakes_in_the_frame_of_the_graph() {
    let message = |build: fn(&Graph)| {
        let g = Graph::new("wrong");
        build(&g);
        g.finish().unwrap_err().message
    };
    assert_eq!(message(|_| ()), "the graph has no outputs: add one with `output`");
    assert!(message(|g| drop((g.arg("x", F32, &[]), g.arg("x", F32, &[])))).contains("argument \"x\" is added twice"));
    assert!(
        message(|g| {
            let x = g.arg("x", F32, &[]);
            g.output("y", &x);
            g.output("y", &x);
        })
        .contains("output \"y\" is added twice")
    );
    let donate = |dtype, twice: bool| {
        let g = Graph::new("wrong");
        let (x, y) = (g.arg("x", F32, &[2]), g.arg("y", dtype, &[2]));
        g.output_aliased("a", &y, &x);
        if twice {
            g.output_aliased("b", &y, &x);
        }
        g.finish().unwrap_err().message
    };
    assert_eq!(donate(BF16, false), "output \"a\": bf16[2] cannot take over argument \"x\", which is f32[2]");
    assert_eq!(donate(F32, true), "output \"b\": argument \"x\" is donated to another output already");
    let other = Graph::new("other").arg("z", F32, &[]);
    let g = Graph::new("wrong");
    g.output("z", &other);
    assert!(g.finish().unwrap_err().message.contains("a tensor of another graph is used"));
    assert!(
        message(|g| {
            g.arg("x", F32, &[]);
            g.set_mesh(Mesh::new([("data", 2)]).unwrap(), Rules::default());
        })
        .contains("set_mesh comes after the first argument")
    );
}

#[test]
fn functions_are_made_once_per_types_and_are_closed() {
    let g = Graph::new("calls");
    let (x, y) = (g.arg("x", F32, &[2]), g.arg("y", F32, &[3]));
    let double = |x: &Tensor| g.call("double", &[x], |args| vec![&args[0] + &args[0]]).remove(0);
    g.output("a", &double(&double(&x)));
    g.output("b", &double(&y));
    let module = g.finish().unwrap();
    let names: Vec<&str> = module.functions().iter().map(|function| function.name.as_str()).collect();
    assert_eq!(names, ["double", "double_1"]);
    assert_eq!(module.stablehlo().matches("func.call @double(").count(), 2);

    let g = Graph::new("capture");
    let x = g.arg("x", F32, &[2]);
    let y = g.call("f", &[], |_| vec![x.exp()]);
    g.output("y", &y[0]);
    let message = g.finish().unwrap_err().message;
    assert!(message.starts_with("exponential: a tensor from outside is used in a function"), "{message}");
}

#[test]
fn taps_and_calls_in_place() {
    let build = |inline: bool| {
        let g = Graph::new("taps");
        g.inline_calls(inline);
        let x = g.arg("x", F32, &[2]);
        let _scope = g.scope("layers.0");
        let y = g.call("block", &[&x], |args| {
            let _scope = g.scope("mlp");
            vec![args[0].exp().named("hidden").abs()]
        });
        g.output("y", &y[0].named("out"));
        let names: Vec<String> = g.taps().into_iter().map(|(name, _)| name).collect();
        for (name, tap) in g.taps() {
            g.output(&name, &tap);
        }
        (names, g.finish().unwrap().outputs().len())
    };
    assert_eq!(build(false), (vec!["layers.0/out".to_string()], 2));
    assert_eq!(build(true), (vec!["layers.0/mlp/hidden".to_string(), "layers.0/out".to_string()], 3));
}

#[test]
fn a_module_can_be_walked_and_rewritten() {
    let g = Graph::new("before");
    let x = g.arg("x", F32, &[2]);
    g.output("y", &(x.exp().named("e") + x.tanh()));
    let before = g.finish().unwrap();
    let exps = before.nodes().iter().filter(|node| node.op.downcast_ref::<unary::Exp>().is_some());
    assert_eq!(exps.count(), 1);

    // Every exp becomes expm1 + 1.
    let g = Graph::new("after");
    let args: Vec<Tensor> = before.args().iter().map(|arg| g.arg(&arg.name, arg.aval.dtype, &arg.aval.shape)).collect();
    let results = g.replay(before.body(), &args, &mut |node, inputs| {
        node.op.downcast_ref::<unary::Exp>().map(|_| vec![inputs[0].expm1() + 1.0])
    });
    g.output("y", &results[0]);
    let names: Vec<&str> = g.finish().unwrap().nodes().iter().map(|node| node.op.info().name).collect();
    assert_eq!(names, ["exponential_minus_one", "constant", "add", "tanh", "add"]);
}

#[test]
fn all_lists_every_op_once() {
    let names: BTreeSet<&str> = ops::ALL.iter().map(|op| op.name).collect();
    assert_eq!(names.len(), ops::ALL.len(), "a name stands twice");
    for op in ops::ALL {
        assert!(!op.summary.is_empty() && !op.summary.ends_with('.'), "{}: {:?}", op.name, op.summary);
    }
    assert_eq!(every_op().finish().unwrap().body().op_names(), names);
}

/// A graph in which each op is made at least once.
fn every_op() -> Graph {
    let g = Graph::new("every_op");
    g.set_mesh(Mesh::new([("data", 2)]).unwrap(), Rules::new(&[("batch", &["data"])]));
    let x = g.arg("x", F32, &[2, 4]);
    let n = g.arg("n", I32, &[2, 4]);
    let (y, m) = (x.exp(), n.popcnt());
    let p = g.arg("p", Pred, &[2, 4]);
    let i = g.arg("i", I32, &[]);
    let floats = [
        x.abs(),
        x.cbrt(),
        x.ceil(),
        x.cos(),
        x.erf(),
        x.exp(),
        x.expm1(),
        x.floor(),
        x.log(),
        x.log1p(),
        x.logistic(),
        -&x,
        x.round(),
        x.round_afz(),
        x.rsqrt(),
        x.sign(),
        x.sin(),
        x.sqrt(),
        x.tan(),
        x.tanh(),
        &x + &y,
        x.atan2(&x),
        &x / &y,
        x.maximum(&x),
        x.minimum(&x),
        &x * &y,
        x.pow(&x),
        &x % &y,
        &x - &y,
        p.select(&x, 0.0),
        x.clamp(0.0, 1.0),
        x.reduce_precision(5, 2),
        x.stop_gradient(),
        g.scan("turns", 2, &[], &[&x], &[], |_, x, _| (vec![x[0].abs()], vec![])).0.remove(0),
        x.reverse(&[0]),
        x.transpose(&[1, 0]),
        x.narrow(0, 0, 1),
        x.pad(0.0, &[1, 0], &[0, 0], &[0, 0]),
        g.concatenate(&[&x, &x], 0),
        x.cumsum(0),
        x.sort(0, false),
        x.top_k(2).0,
        x.dynamic_slice(&[&i, &i], &[1, 1]),
        x.dynamic_update_slice(&x, &[&i, &i]),
        x.take(&i, 0),
        x.update_positions(&x.narrow(1, 0, 1), &n.narrow(1, 0, 1).reshape(&[2])),
        einsum("AB,CB->AC", &x, &x),
        x.shard(["batch", ""]),
        x.sum(&[0]),
    ];
    let others = [
        n.clz(),
        n.popcnt(),
        !&n,
        &n & &m,
        &n | &m,
        &n ^ &m,
        n.shift_left(1),
        n.shift_right_logical(1),
        n.shift_right_arithmetic(1),
        x.is_finite(),
        x.lt(0.0),
        x.cast(BF16),
        x.bitcast(U32),
        x.argmax(0),
        g.iota(I32, &[2], 0),
        g.arg("s", U64, &[2]).rng_uniform(&[2]).1,
        g.scalar(1.0, F32).broadcast_to(&[2]),
    ];
    let mut results = [floats.to_vec(), others.to_vec()].concat();
    results.extend(g.call("f", &[&x], |a| a.to_vec()));
    results.extend(g.custom_vjp("f", &[&x], |a| (a.to_vec(), vec![]), |_, ct| vec![Some(ct[0].clone())]));
    results.extend(g.while_loop(&[&x], |_| g.scalar(false, Pred), |v| v.to_vec()));
    results.extend(g.case(&i, &[&x], &[&|a: &[Tensor]| a.to_vec()]));
    results.extend(g.optimization_barrier(&[&x]));
    results.extend(g.apply(CustomCall::new("f", vec![x.aval().clone()]), &[&x]));
    results.extend(g.manual_computation(&[(&x, &["batch", ""])], &[&["batch", ""]], |a| {
        let y = a[0].all_reduce(Fold::Sum, &["data"]).all_gather(0, &["data"]).reduce_scatter(Fold::Sum, 0, &["data"]);
        let y = y.all_to_all(1, 0, &["data"]).reshape(&[1, 4]).collective_permute(1, "data");
        let id = (g.partition_id() + g.replica_id()).cast(F32);
        vec![y + id.broadcast_to(&[1, 4])]
    }));
    for (i, result) in results.iter().enumerate() {
        g.output(&i.to_string(), result);
    }
    g
}
