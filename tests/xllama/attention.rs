//! Pins attention: the three forms agree, sinks are PyTorch's, and a row of scores is what its definition says in f64.

use xla::DType;
use xla::graph::{Graph, Platform, Tensor};
use xla::pjrt::Client;
use xllama::kv_cache::{Order, Past};
use xllama::model::Queries;

use crate::support::{block, plugin};

/// Sizes (B, S, G, R, K) and T.
const SIZES: [usize; 5] = [2, 256, 2, 3, 20];

fn client() -> Client {
    let (_, client) = xllama::runtime::device::open(plugin(), 1).expect("the CPU plugin");
    client
}

/// Runs a graph of one result.
fn run(client: &Client, build: impl FnOnce(&Graph) -> Tensor) -> Vec<f32> {
    let g = Graph::new("test");
    let out = build(&g);
    g.output("out", &out);
    let text = g.finish().expect("a valid graph").stablehlo();
    let executable = client.compile(&text, &xllama::runtime::compile_options(Platform::Cpu)).expect("it compiles");
    executable.execute(&[]).expect("it runs")[0].to_vec().expect("float32")
}

/// Numbers from −1 to 1 that depend on `seed`.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

struct Case {
    order: Order,
    /// Position of the first query of each slot.
    first: [i32; 2],
    /// Keys.
    t: usize,
    softcap: Option<f64>,
    sinks: bool,
}

impl Case {
    fn key_positions(&self) -> Vec<i32> {
        let row = |first: i32| {
            let t = self.t as i32;
            match self.order {
                Order::Absolute | Order::Prefix => (0..t).collect::<Vec<_>>(),
                Order::Trailing { before, .. } => (0..t).map(|i| first - before as i32 + i).collect(),
                Order::Windowed { .. } => (0..t).map(|i| first - ((first - i + t) % t)).collect(),
            }
        };
        self.first.into_iter().flat_map(row).collect()
    }

    /// q, k, v and sinks, scaled so that the softmax is selective.
    fn values(&self) -> [Vec<f32>; 4] {
        let [b, s, g, r, k] = SIZES;
        let keys = b * g * self.t * k;
        let q = random(b * s * g * r * k, 1).into_iter().map(|x| 2.0 * x).collect();
        [q, random(keys, 2), random(keys, 3), random(g * r, 4)]
    }

    fn outputs(&self, client: &Client, form: impl Fn(&Queries<'_>, &Past) -> Tensor) -> Vec<f32> {
        let [b, s, groups, r, k] = SIZES;
        let [q, keys, values, sinks] = self.values();
        let (key_positions, t) = (self.key_positions(), self.t);
        let positions: Vec<i32> =
            self.first.into_iter().flat_map(|first| (0..s as i32).map(move |i| first + i)).collect();
        run(client, |g| {
            let past = Past {
                k: g.constant(&keys, &[b, groups, t, k]),
                v: g.constant(&values, &[b, groups, t, k]),
                scales: None,
                positions: g.constant(&key_positions, &[b, t]),
                order: self.order,
            };
            let positions = g.constant(&positions, &[b, s]);
            let sinks = self.sinks.then(|| g.constant(&sinks, &[groups, r]));
            let q = g.constant(&q, &[b, s, groups, r, k]);
            form(
                &Queries { q, positions: &positions, first_row: None, softcap: self.softcap, sinks: sinks.as_ref() },
                &past,
            )
        })
    }

    /// The definition, in f64.
    fn expected(&self) -> Vec<f64> {
        let [b, s, groups, r, k] = SIZES;
        let [q, keys, values, sinks] = self.values();
        let key_positions = self.key_positions();
        let window = match self.order {
            Order::Trailing { window, .. } | Order::Windowed { window } => window as i32,
            _ => i32::MAX,
        };
        let mut out = Vec::new();
        for (slot, i, g, h) in itertools(b, s, groups, r) {
            let q = &q[(((slot * s + i) * groups + g) * r + h) * k..][..k];
            let at = self.first[slot] + i as i32;
            let mut row: Vec<(f64, usize)> = Vec::new();
            for j in 0..self.t {
                let p = key_positions[slot * self.t + j];
                if p >= 0 && p <= at && at - p < window {
                    let key = &keys[((slot * groups + g) * self.t + j) * k..][..k];
                    let score: f64 = q.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    row.push((self.softcap.map_or(score, |cap| cap * (score / cap).tanh()), j));
                }
            }
            let sink = f64::from(sinks[g * r + h]);
            let total: f64 = row.iter().map(|(x, _)| x.exp()).sum::<f64>() + if self.sinks { sink.exp() } else { 0.0 };
            for c in 0..k {
                let value = |j: usize| f64::from(values[((slot * groups + g) * self.t + j) * k + c]);
                out.push(row.iter().map(|&(x, j)| x.exp() * value(j)).sum::<f64>() / total);
            }
        }
        out
    }
}

fn itertools(b: usize, s: usize, g: usize, r: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    (0..b * s * g * r).map(move |n| (n / (r * g * s), n / (r * g) % s, n / r % g, n % r))
}

#[test]
fn every_form_is_the_definition() {
    let client = client();
    let [_, s, ..] = SIZES;
    let absolute = Case { order: Order::Absolute, first: [300, 7], t: 640, softcap: None, sinks: true };
    let prefix = Case { order: Order::Prefix, first: [0, 0], t: s, softcap: Some(3.0), sinks: false };
    let order = Order::Trailing { window: 50, before: 82 };
    let trailing = Case { order, first: [500, 10], t: 82 + s, softcap: None, sinks: true };
    for case in [absolute, prefix, trailing] {
        let expected = case.expected();
        let check = |name: &str, form: &dyn Fn(&Queries<'_>, &Past) -> Tensor| {
            let found = case.outputs(&client, form);
            let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
            let worst = expected.iter().zip(&found).fold(0f64, |m, (a, b)| m.max((a - f64::from(*b)).abs()));
            // The forms are within twice this of each other: 1e-5 relative.
            assert!(worst / largest < 5e-6, "{name} {:?}: {worst:.1e} of {largest:.1e}", case.order);
        };
        check("whole", &|q, past| q.offline(past));
        if case.order != Order::Absolute {
            check("blocks", &|q, past| q.blocks(past));
        }
        // Blocks that divide the sizes, that do not, and that hold everything.
        for size in [[64, 128], [48, 100], [512, 1024], [1, 7]] {
            if size != [1, 7] || case.order != Order::Absolute {
                check(&format!("online {size:?}"), &|q, past| q.online(past, size));
            }
        }
        check("chosen", &|q, past| q.attend(past));
    }
}

#[test]
fn sinks_are_those_of_pytorch() {
    let client = client();
    let (s, h, g, k) = (24, 6, 2, 8);
    let [q, keys, values, sinks] = ["q", "k", "v", "sinks"].map(|name| block(&format!("sinks/{name}")).0);
    let found = |window: Option<usize>| {
        run(&client, |graph| {
            let heads_first = |x: &[f32]| graph.constant(x, &[1, s, g, k]).transpose(&[0, 2, 1, 3]);
            let positions = graph.iota(DType::I32, &[1, s], 1);
            let order = window.map_or(Order::Prefix, |window| Order::Trailing { window, before: 0 });
            let past = Past {
                k: heads_first(&keys),
                v: heads_first(&values),
                scales: None,
                positions: positions.clone(),
                order,
            };
            let q = graph.constant(&q, &[1, s, g, h / g, k]) * (k as f64).powf(-0.5);
            let sinks = graph.constant(&sinks, &[g, h / g]);
            Queries { q, positions: &positions, first_row: None, softcap: None, sinks: Some(&sinks) }.offline(&past)
        })
    };
    for (name, window) in [("sinks/out", None), ("sinks/out_window", Some(5))] {
        let expected = block(name).0;
        let found = found(window);
        let worst = expected.iter().zip(&found).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(expected.len() == found.len() && worst < 1e-6, "{name}: {worst:.1e}");
    }
}
