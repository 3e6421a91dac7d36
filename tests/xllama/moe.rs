//! Mixtures of experts against a plain evaluation in f64, choices among equal scores and router losses against PyTorch.
//!
//! That the work grows with k and not with E is not a timed test: `src/model/moe.rs` has the figures.

use std::path::Path;

use serde_json::json;
use xla::DType;
use xla::graph::{Graph, Tensor};
use xla::pjrt::{Client, CompileOptions};
use xllama::config::{Activation, ExpertGroups, ModelConfig, MoeConfig, Router, SharedExpert};
use xllama::model::{load_balancing_loss, moe, router_z_loss};
use xllama::params::{Mlp, Moe, Weight};
use xllama::runtime::device;

use crate::support::{block, plugin};

/// Values and their shape.
type Array = (Vec<f32>, Vec<usize>);

/// Runs a graph of these f32 arguments.
fn run(client: &Client, args: &[&Array], build: impl FnOnce(&[Tensor]) -> Tensor) -> Vec<f32> {
    let g = Graph::new("test");
    let tensors: Vec<Tensor> =
        args.iter().enumerate().map(|(i, (_, shape))| g.arg(&format!("arg{i}"), DType::F32, shape)).collect();
    g.output("result", &build(&tensors));
    let text = g.finish().expect("a valid graph").stablehlo();
    let exe = client.compile(&text, &CompileOptions::default()).expect("it compiles");
    let buffers: Vec<_> =
        args.iter().map(|(values, shape)| client.upload_slice(values, shape, None).expect("uploaded")).collect();
    exe.execute(&buffers.iter().collect::<Vec<_>>()).expect("it runs")[0].to_vec().expect("f32")
}

fn client() -> Client {
    device::open(plugin(), 1).expect("the plugin opens").1
}

/// Numbers in [−1, 1).
fn random(seed: u64, shape: &[usize]) -> Array {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    ((0..shape.iter().product()).map(|_| next()).collect(), shape.to_vec())
}

/// A configuration with these experts; what else it says does not matter here.
fn config(moe: MoeConfig, hidden_act: Activation) -> ModelConfig {
    let json = json!({
        "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    });
    let mut cfg = ModelConfig::from_value(&json, Path::new("config.json")).expect("a valid configuration");
    (cfg.moe, cfg.hidden_act) = (Some(moe), hidden_act);
    cfg
}

fn mixture(n_experts: usize, top_k: usize) -> MoeConfig {
    MoeConfig {
        n_experts,
        top_k,
        d_ff: F,
        router: Router::Softmax,
        normalize: true,
        scale: 1.0,
        groups: None,
        correction_bias: false,
        shared: None,
    }
}

/// M is summed in parts, F is not.
const M: usize = 160;
const F: usize = 24;

/// The parameters of a mixture, each with its shape.
struct Weights {
    router: Array,
    bias: Array,
    experts: [Array; 3],
    shared: [Array; 3],
    shared_gate: Array,
}

impl Weights {
    fn random(cfg: &MoeConfig, seed: u64) -> Weights {
        let (e, shared) = (cfg.n_experts, cfg.shared.map_or(1, |shared| shared.d_ff));
        let scaled = |i: u64, shape: &[usize], by: f32| {
            let (values, shape) = random(seed * 100 + i, shape);
            (values.into_iter().map(|v| v * by).collect(), shape)
        };
        Weights {
            router: scaled(0, &[M, e], 0.2),
            bias: scaled(1, &[e], 0.3),
            experts: [scaled(2, &[e, M, F], 0.1), scaled(3, &[e, M, F], 0.1), scaled(4, &[e, F, M], 0.3)],
            shared: [scaled(5, &[M, shared], 0.1), scaled(6, &[M, shared], 0.1), scaled(7, &[shared, M], 0.3)],
            shared_gate: scaled(8, &[M], 0.1),
        }
    }

    /// The mixture of `x` (N, M) in the graph.
    fn in_graph(&self, client: &Client, cfg: &ModelConfig, x: &Array) -> Vec<f32> {
        let moe_cfg = cfg.moe.as_ref().expect("given");
        let [gate, up, down] = &self.experts;
        let [shared_gate, shared_up, shared_down] = &self.shared;
        let x = (x.0.clone(), vec![1, x.1[0], x.1[1]]);
        let args =
            [&x, &self.router, &self.bias, gate, up, down, shared_gate, shared_up, shared_down, &self.shared_gate];
        run(client, &args, |a| {
            let mlp = |a: &[Tensor]| Mlp {
                gate_proj: a[0].clone(),
                up_proj: a[1].clone(),
                down_proj: a[2].clone(),
                gate_bias: None,
                up_bias: None,
                down_bias: None,
                gate_lora: None,
                up_lora: None,
                down_lora: None,
            };
            let p = Moe {
                router: a[1].clone(),
                correction_bias: moe_cfg.correction_bias.then(|| a[2].clone()),
                gate_proj: a[3].clone(),
                up_proj: a[4].clone(),
                down_proj: a[5].clone(),
                shared: moe_cfg.shared.map(|_| mlp(&a[6..])),
                shared_gate: moe_cfg.shared.filter(|shared| shared.gated).map(|_| a[9].clone()),
            };
            moe(&p.map(&mut Weight::Float), &a[0], cfg).0
        })
    }

    /// The mixture of one token in f64, expert by expert.
    fn of_token(&self, cfg: &MoeConfig, x: &[f32]) -> Vec<f64> {
        let e = cfg.n_experts;
        let logits = product(x.iter().map(|&v| v.into()), &self.router.0, e);
        let total: f64 = logits.iter().map(|v| v.exp()).sum();
        let score = |v: f64| match cfg.router {
            Router::Softmax => v.exp() / total,
            Router::Sigmoid => 1.0 / (1.0 + (-v).exp()),
        };
        let scores: Vec<f64> = logits.iter().map(|&v| score(v)).collect();
        let biased = |i: usize| scores[i] + if cfg.correction_bias { self.bias.0[i].into() } else { 0.0 };
        let best = |mut of: Vec<(f64, usize)>, k: usize| {
            of.sort_by(|a, b| b.0.total_cmp(&a.0));
            of.truncate(k);
            of
        };
        let size = cfg.groups.map_or(e, |groups| e / groups.count);
        let of_group = |group: usize| best((group * size..(group + 1) * size).map(|i| (biased(i), i)).collect(), 2);
        let groups = (0..e / size).map(|g| (of_group(g).iter().map(|x| x.0).sum(), g)).collect();
        let open = best(groups, cfg.groups.map_or(1, |groups| groups.kept));
        let chosen =
            best(open.iter().flat_map(|&(_, g)| g * size..(g + 1) * size).map(|i| (biased(i), i)).collect(), cfg.top_k);
        let sum: f64 = if cfg.normalize { chosen.iter().map(|&(_, i)| scores[i]).sum() } else { 1.0 };

        let mut y = vec![0.0; M];
        let mut add = |weight: f64, part: [&[f32]; 3]| {
            let width = part[0].len() / M;
            let [gate, up] = [0, 1].map(|i| product(x.iter().map(|&v| v.into()), part[i], width));
            let h = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
            y.iter_mut().zip(product(h, part[2], M)).for_each(|(y, v)| *y += weight * v);
        };
        for (_, i) in chosen {
            let part = [0, 1, 2].map(|j| &self.experts[j].0[i * M * F..(i + 1) * M * F]);
            add(scores[i] / sum * cfg.scale, part);
        }
        if let Some(shared) = cfg.shared {
            let gate = product(x.iter().map(|&v| v.into()), &self.shared_gate.0, 1)[0];
            add(if shared.gated { 1.0 / (1.0 + (-gate).exp()) } else { 1.0 }, [0, 1, 2].map(|j| &self.shared[j].0[..]));
        }
        y
    }
}

/// A row times a matrix of `columns` columns.
fn product(row: impl Iterator<Item = f64>, matrix: &[f32], columns: usize) -> Vec<f64> {
    let mut y = vec![0.0; columns];
    for (v, weights) in row.zip(matrix.chunks(columns)) {
        y.iter_mut().zip(weights).for_each(|(y, &w)| *y += v * f64::from(w));
    }
    y
}

/// Asserts that rows are those wanted, to within `part` of the largest of each row.
#[track_caller]
fn near<T: Copy + Into<f64>>(found: &[f32], wanted: &[T], part: f64, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (n, (found, wanted)) in found.chunks(M).zip(wanted.chunks(M)).enumerate() {
        let largest = wanted.iter().map(|&w| w.into().abs()).fold(0.0, f64::max);
        for (i, (&f, &w)) in found.iter().zip(wanted).enumerate() {
            let w: f64 = w.into();
            assert!((f64::from(f) - w).abs() <= part * largest, "{what}: token {n}, {i}: {f}, wanted {w}");
        }
    }
}

#[test]
fn equals_a_plain_evaluation() {
    let client = client();
    let shared = |gated| Some(SharedExpert { d_ff: 20, gated });
    let sigmoid = MoeConfig { router: Router::Sigmoid, correction_bias: true, scale: 1.8, ..mixture(16, 4) };
    let cases = [
        ("mixtral", mixture(8, 2)),
        ("one expert", mixture(1, 1)),
        ("all experts", mixture(5, 5)),
        ("many experts", MoeConfig { normalize: false, ..mixture(40, 3) }),
        ("gated shared expert", MoeConfig { normalize: false, shared: shared(true), ..mixture(6, 2) }),
        ("sigmoid", MoeConfig { shared: shared(false), ..sigmoid.clone() }),
        ("groups", MoeConfig { groups: Some(ExpertGroups { count: 4, kept: 2 }), ..sigmoid.clone() }),
        ("sigmoid, not normalised", MoeConfig { normalize: false, ..sigmoid }),
    ];
    for (seed, (name, moe)) in cases.into_iter().enumerate() {
        let cfg = config(moe.clone(), Activation::Silu);
        let weights = Weights::random(&moe, seed as u64 + 1);
        // With 4 tokens and 40 experts, most experts have none.
        for n in [1, 4, 300].into_iter().filter(|&n| n != 4 || moe.n_experts == 40) {
            let x = random(seed as u64 + 50, &[n, M]);
            let wanted: Vec<f64> = x.0.chunks(M).flat_map(|x| weights.of_token(&moe, x)).collect();
            near(&weights.in_graph(&client, &cfg, &x), &wanted, 3e-6, &format!("{name}, {n} tokens"));
        }
    }
}

/// However uneven the choice is, every token gets its experts.
#[test]
fn no_token_is_dropped() {
    let client = client();
    let moe = mixture(8, 2);
    let cfg = config(moe.clone(), Activation::Silu);
    let mut x = random(3, &[300, M]);
    // The large term is the last of a token's logits, so that they are rounded at its size once and not at every term.
    x.0.chunks_mut(M).for_each(|x| x[M - 1] = 1.0);
    // All to expert 3 and another; all to two of the first three; most to 6 or 7.
    for (name, preferred, by) in [("one", 3..4, 8.0), ("three", 0..3, 8.0), ("last", 6..8, 2.0)] {
        let mut weights = Weights::random(&moe, 7);
        let last = &mut weights.router.0[(M - 1) * 8..];
        last.iter_mut().enumerate().for_each(|(e, w)| *w = if preferred.contains(&e) { by } else { 0.0 });
        let wanted: Vec<f64> = x.0.chunks(M).flat_map(|x| weights.of_token(&moe, x)).collect();
        near(&weights.in_graph(&client, &cfg, &x), &wanted, 3e-6, name);
    }
}

/// A token's result does not depend on the others, on their number, or on garbage in padded rows.
#[test]
fn a_token_is_the_same_in_every_batch() {
    let client = client();
    let parts_of = [(mixture(8, 2), [(299, 1), (40, 5)]), (mixture(64, 6), [(150, 1), (100, 130)])];
    for (moe, parts) in parts_of {
        let cfg = config(moe.clone(), Activation::Silu);
        let weights = Weights::random(&moe, 11);
        let x = random(5, &[300, M]);
        let all = weights.in_graph(&client, &cfg, &x);
        for (first, count) in parts {
            let part = (x.0[first * M..(first + count) * M].to_vec(), vec![count, M]);
            let found = weights.in_graph(&client, &cfg, &part);
            near(&found, &all[first * M..(first + count) * M], 2e-6, &format!("{count} tokens from {first}"));
        }
        let mut padded = x.clone();
        padded.0.extend([f32::NAN; 3 * M].iter().chain(&[f32::INFINITY; 2 * M]).chain(&[0.0; M]));
        padded.1[0] += 6;
        near(&weights.in_graph(&client, &cfg, &padded)[..300 * M], &all, 2e-6, "padded");
    }
}

/// The experts (N, k) that tokens with these logits (N, E) take, in ascending order. Expert e here gives the weight of
/// its choice at place e and 0 elsewhere.
fn taken(client: &Client, logits: &Array, k: usize) -> Vec<Vec<usize>> {
    let [n, e] = logits.1[..] else { panic!("{:?}", logits.1) };
    // A token is its logits and a one.
    let m = e + 1;
    let x: Vec<f32> = logits.0.chunks(e).flat_map(|row| row.iter().copied().chain([1.0])).collect();
    let ones = |shape: &[usize], at: &[usize]| -> Array {
        let mut values = vec![0.0; shape.iter().product()];
        at.iter().for_each(|&i| values[i] = 1.0);
        (values, shape.to_vec())
    };
    let each = |f: &dyn Fn(usize) -> usize| (0..e).map(f).collect::<Vec<_>>();
    let args = [
        &(x, vec![1, n, m]),
        &ones(&[m, e], &each(&|i| i * e + i)),
        &ones(&[e, m, 1], &each(&|i| i * m + e)),
        &ones(&[e, 1, m], &each(&|i| i * m + i)),
    ];
    let cfg = config(MoeConfig { d_ff: 1, normalize: false, ..mixture(e, k) }, Activation::Relu);
    let y = run(client, &args, |a| {
        let [router, gate_proj, down_proj] = [1, 2, 3].map(|i: usize| a[i].clone());
        let up_proj = gate_proj.clone();
        let p = Moe { router, correction_bias: None, gate_proj, up_proj, down_proj, shared: None, shared_gate: None };
        moe(&p.map(&mut Weight::Float), &a[0], &cfg).0
    });
    y.chunks(m).map(|y| (0..e).filter(|&i| y[i] > 0.0).collect()).collect()
}

#[test]
fn among_equals_the_same_as_pytorch() {
    let client = client();
    for (e, k) in [(4, 2), (8, 2), (8, 3), (16, 4), (64, 2), (64, 6), (128, 2), (128, 8), (160, 6)] {
        let found = taken(&client, &block(&format!("ties/{e}_{k}/scores")), k);
        let wanted = block(&format!("ties/{e}_{k}/ids")).0;
        for (row, (found, wanted)) in found.iter().zip(wanted.chunks(k)).enumerate() {
            let mut wanted: Vec<usize> = wanted.iter().map(|&id| id as usize).collect();
            wanted.sort_unstable();
            assert_eq!(*found, wanted, "E = {e}, k = {k}, row {row}");
        }
    }
}

/// A row on which libstdc++'s selection gives up after 8 partitions and goes on with a heap; the choice is `torch.topk`'s.
#[test]
fn among_equals_where_partitions_do_not_help() {
    let row = [1, 19, 7, 17, 1, 15, 5, 13, 1, 11, 3, 9, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 1, 1].map(|v: u8| v.into());
    let wanted: Vec<usize> = (1..22).filter(|&i| i != 8).collect();
    assert_eq!(taken(&client(), &(row.to_vec(), vec![1, 24]), 20), [wanted]);
}

#[test]
fn losses_of_the_router() {
    let client = client();
    let (logits, mask) = (block("balance/logits"), block("balance/mask"));
    let k = block("balance/k").0[0] as usize;
    let loss = |name: &str, found: Vec<f32>| {
        let wanted = block(name).0[0];
        assert!(found.len() == 1 && (found[0] - wanted).abs() <= 1e-6 * wanted, "{name}: {found:?}, wanted {wanted}");
    };
    loss("balance/loss", run(&client, &[&logits], |a| load_balancing_loss(&a[0], k, None)));
    loss("balance/loss_masked", run(&client, &[&logits, &mask], |a| load_balancing_loss(&a[0], k, Some(&a[1]))));
    loss("z/loss", run(&client, &[&logits], |a| router_z_loss(&a[0], None)));

    // With a mask: as if the masked tokens were not there.
    let kept: Vec<usize> = (0..mask.0.len()).filter(|&i| mask.0[i] == 1.0).collect();
    let [layers, n, e] = logits.1[..] else { panic!("{:?}", logits.1) };
    let rows = (0..layers).flat_map(|l| kept.iter().map(move |i| (l * n + i) * e));
    let short = (rows.flat_map(|at| logits.0[at..at + e].to_vec()).collect(), vec![layers, kept.len(), e]);
    let wanted = run(&client, &[&short], |a| router_z_loss(&a[0], None))[0];
    let found = run(&client, &[&logits, &mask], |a| router_z_loss(&a[0], Some(&a[1])))[0];
    assert!((found - wanted).abs() <= 1e-6 * wanted, "{found}, wanted {wanted}");
}
