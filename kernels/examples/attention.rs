//! How fast attention is beside a plain read and plain multiplications: `cargo run --release -p kernels --example
//! attention`.
//!
//! Decode: GB/s of keys and values read by one query of each head. Prefill: GFLOP/s of the products that the mask
//! leaves. Everything is measured in turns, and the fastest counts: what else a machine does can only slow it down.
//! Arguments: `decode`, `prefill`, a number of threads.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use half::{bf16, f16};
use kernels::attention::{Attend, Kv, Sizes, attend};
use kernels::{Isa, Pool};

/// Work that a helping thread may take; taken away again before the call that brought it returns.
type Work = &'static (dyn Fn(usize) + Sync);

/// Threads that spin between calls, as those of a program in the middle of a token do.
struct Spinning {
    shared: Arc<Shared>,
    threads: usize,
}

struct Shared {
    /// Counts the calls.
    call: AtomicUsize,
    work: Mutex<Option<(Work, usize)>>,
    next: AtomicUsize,
    busy: AtomicUsize,
    over: AtomicBool,
}

impl Spinning {
    fn new(threads: usize) -> Spinning {
        let shared = Arc::new(Shared {
            call: AtomicUsize::new(0),
            work: Mutex::new(None),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        });
        for _ in 1..threads {
            let shared = shared.clone();
            std::thread::spawn(move || shared.help());
        }
        Spinning { shared, threads }
    }
}

impl Drop for Spinning {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn help(&self) {
        let mut seen = 0;
        while !self.over.load(Ordering::Relaxed) {
            let call = self.call.load(Ordering::Acquire);
            if call == seen {
                spin_loop();
                continue;
            }
            seen = call;
            // Under the lock, so that the caller, who takes the work away under it, sees who has begun.
            let work = {
                let work = self.work.lock().unwrap();
                self.busy.fetch_add(usize::from(work.is_some()), Ordering::AcqRel);
                *work
            };
            if let Some((work, chunks)) = work {
                self.take(work, chunks);
                self.busy.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    fn take(&self, work: Work, chunks: usize) {
        let next = || Some(self.next.fetch_add(1, Ordering::Relaxed)).filter(|&chunk| chunk < chunks);
        while let Some(chunk) = next() {
            work(chunk);
        }
    }
}

impl Pool for Spinning {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        // SAFETY: no thread calls it any more when this returns: those that have begun are waited for, and the others
        // find no work.
        let work = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Work>(f) };
        self.shared.next.store(0, Ordering::Relaxed);
        *self.shared.work.lock().unwrap() = Some((work, chunks));
        self.shared.call.fetch_add(1, Ordering::Release);
        self.shared.take(work, chunks);
        *self.shared.work.lock().unwrap() = None;
        while self.shared.busy.load(Ordering::Acquire) > 0 {
            spin_loop();
        }
    }
}

/// An array of the cache in every type.
struct Arrays {
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    f16: Vec<f16>,
    i8: Vec<i8>,
    scales: Vec<f32>,
}

impl Arrays {
    fn new(rows: usize, width: usize) -> Arrays {
        let f32: Vec<f32> = (0..rows * width).map(|i| ((i * 7919) % 2017) as f32 / 1008.5 - 1.0).collect();
        Arrays {
            bf16: f32.iter().map(|&x| bf16::from_f32(x)).collect(),
            f16: f32.iter().map(|&x| f16::from_f32(x)).collect(),
            i8: f32.iter().map(|&x| (x * 127.0) as i8).collect(),
            scales: vec![1.0 / 127.0; rows],
            f32,
        }
    }

    /// Name, bytes of an element, array.
    fn views(&self) -> [(&'static str, f64, Kv<'_>); 4] {
        [
            ("f32", 4.0, Kv::F32(&self.f32)),
            ("bf16", 2.0, Kv::Bf16(&self.bf16)),
            ("f16", 2.0, Kv::F16(&self.f16)),
            ("int8", 1.0, Kv::I8 { q: &self.i8, scales: &self.scales }),
        ]
    }
}

/// What is measured: called with the number of a layer.
type Function<'a> = Box<dyn FnMut(usize) + 'a>;

/// Seconds of each function for all layers, called in turns: of each layer the fastest turn, after one that does not
/// count.
fn measure(functions: &mut [Function<'_>], layers: usize, turns: usize) -> Vec<f64> {
    let mut best = vec![vec![f64::INFINITY; layers]; functions.len()];
    for turn in 0..turns + 1 {
        for (f, best) in functions.iter_mut().zip(&mut best) {
            for (layer, best) in best.iter_mut().enumerate() {
                let start = Instant::now();
                f(layer);
                if turn > 0 {
                    *best = best.min(start.elapsed().as_secs_f64());
                }
            }
        }
    }
    best.iter().map(|best| best.iter().sum()).collect()
}

/// Reads all of it.
fn read(pool: &dyn Pool, data: &[u64]) {
    const CHUNK: usize = 1 << 14;
    pool.run(data.len().div_ceil(CHUNK), &|i| {
        let mut sums = [0u64; 64];
        for line in data[i * CHUNK..data.len().min((i + 1) * CHUNK)].chunks_exact(64) {
            sums.iter_mut().zip(line).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
        }
        black_box(sums);
    });
}

/// Multiplies and adds what is in registers; returns how many floating-point operations that were: none where this is
/// not known how.
fn multiply(pool: &dyn Pool) -> f64 {
    const ROUNDS: usize = 20_000;
    let chunks = pool.threads() * 4;
    let (turns, each): (unsafe fn(usize), usize) = match Isa::detected() {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni | Isa::Avx512 => (multiply_512, 24 * 16 * 2),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => (multiply_256, 12 * 8 * 2),
        _ => return 0.0,
    };
    // SAFETY: the machine has the instructions that were detected.
    pool.run(chunks, &|_| unsafe { turns(ROUNDS) });
    (chunks * ROUNDS * each) as f64
}

/// A function of `rounds` turns of `$count` independent multiplications and additions of whole registers.
#[cfg(target_arch = "x86_64")]
macro_rules! multiply {
    ($name:ident, $feature:literal, $count:literal, $splat:ident, $fma:ident) => {
        #[target_feature(enable = $feature)]
        fn $name(rounds: usize) {
            use std::arch::x86_64::*;
            let (a, b) = ($splat(black_box(0.5)), $splat(black_box(0.25)));
            let mut acc = [a; $count];
            for _ in 0..rounds {
                for acc in &mut acc {
                    *acc = $fma(*acc, a, b);
                }
            }
            black_box(acc);
        }
    };
}

#[cfg(target_arch = "x86_64")]
multiply!(multiply_512, "avx512f", 24, _mm512_set1_ps, _mm512_fmadd_ps);
#[cfg(target_arch = "x86_64")]
multiply!(multiply_256, "avx2,fma", 12, _mm256_set1_ps, _mm256_fmadd_ps);

/// One query over a cache of `keys` positions, in as many layers as make the memory be read anew.
fn decode(isa: Isa, pool: &dyn Pool, keys: usize) {
    let (groups, heads, width) = (3, 3, 64);
    let layers = ((128 << 20) / (keys * groups * width * 8)).clamp(1, 256);
    let sizes = Sizes { batch: 1, queries: 1, groups, heads, width, keys };
    let array = || Arrays::new(groups * keys, width);
    let caches: Vec<[Arrays; 2]> = (0..layers).map(|_| [array(), array()]).collect();
    let q: Vec<f32> = (0..groups * heads * width).map(|i| ((i * 31) % 101) as f32 / 400.0 - 0.1).collect();
    let positions = [keys as i32 - 1];
    let words: Vec<Vec<u64>> = (0..layers).map(|_| vec![1; keys * groups * width]).collect();

    let mut functions: Vec<Function<'_>> = vec![Box::new(|layer| read(pool, &words[layer]))];
    let mut rows = vec![("read", (layers * keys * groups * width * 8) as f64)];
    for (kind, (name, size, _)) in caches[0][0].views().into_iter().enumerate() {
        let of_row = width as f64 * size + if name == "int8" { 4.0 } else { 0.0 };
        rows.push((name, (2 * layers * groups * keys) as f64 * of_row));
        let (caches, q, positions) = (&caches, &q, &positions);
        let mut out = vec![0.0; q.len()];
        functions.push(Box::new(move |layer| {
            let [k, v] = caches[layer].each_ref().map(|array| array.views()[kind].2);
            let problem = Attend { q, k, v, positions, key_positions: None, window: None, softcap: None, sizes };
            attend(isa, pool, &problem, &mut out);
            black_box(&out);
        }));
    }
    for ((name, bytes), time) in rows.iter().zip(measure(&mut functions, layers, 20)) {
        let each = time / layers as f64 * 1e6;
        println!("decode {keys:5} {name:5} {:6.1} GB/s {each:8.1} µs a layer", bytes / time / 1e9);
    }
}

/// As many queries as keys.
fn prefill(isa: Isa, pool: &dyn Pool, [queries, groups, heads, width]: [usize; 4]) {
    let sizes = Sizes { batch: 1, queries, groups, heads, width, keys: queries };
    let [k, v] = [(); 2].map(|()| Arrays::new(groups * queries, width));
    let q: Vec<f32> = (0..queries * groups * heads * width).map(|i| ((i * 31) % 101) as f32 / 400.0 - 0.1).collect();
    let positions: Vec<i32> = (0..queries as i32).collect();
    let mut operations = 0.0;
    let times = {
        let mut functions: Vec<Function<'_>> = vec![Box::new(|_| operations = multiply(pool))];
        for ((.., k), (.., v)) in k.views().into_iter().zip(v.views()) {
            let (q, positions) = (&q, &positions);
            let mut out = vec![0.0; q.len()];
            functions.push(Box::new(move |_| {
                let problem = Attend { q, k, v, positions, key_positions: None, window: None, softcap: None, sizes };
                attend(isa, pool, &problem, &mut out);
                black_box(&out);
            }));
        }
        measure(&mut functions, 1, if queries > 1000 { 10 } else { 50 })
    };
    println!("multiplications {:21.0} GFLOP/s", operations / times[0] / 1e9);
    let useful = (queries * (queries + 1) / 2 * groups * heads * width * 4) as f64;
    for ((name, ..), time) in k.views().into_iter().zip(&times[1..]) {
        let (speed, ms) = (useful / time / 1e9, time * 1e3);
        println!("prefill {queries:4} {groups}×{heads}×{width:3} {name:5} {speed:6.0} GFLOP/s {ms:8.3} ms");
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let threads = arguments.iter().find_map(|argument| argument.parse().ok());
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let wanted = |part: &str| arguments.iter().all(|argument| argument == part || argument.parse::<usize>().is_ok());
    let pool = Spinning::new(threads);
    let isa = Isa::detected();
    println!("{isa:?}, {} threads", pool.threads());
    if wanted("decode") {
        [256, 512, 4096, 16384].into_iter().for_each(|keys| decode(isa, &pool, keys));
    }
    if wanted("prefill") {
        let shapes = [[512, 3, 3, 64], [4096, 3, 3, 64], [512, 8, 4, 64], [512, 4, 2, 128]];
        shapes.into_iter().for_each(|shape| prefill(isa, &pool, shape));
    }
}
