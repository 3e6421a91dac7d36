//! How fast linears run beside what memory gives: a table of GB/s for one and eight rows, and of GOP/s for 512.
//!
//! `cargo run --release -p kernels --example bandwidth [-- MEGABYTES ROUNDS WEIGHT...]`: at least so many megabytes of
//! weights of each shape (default 64; more than the last-level cache shows memory itself), medians of so many rounds
//! (default 9), in which everything is measured in turn: compare within a table only. Only these weights, as the table
//! names them, where some are given.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use half::{bf16, f16};
use kernels::packed::{Bits, Format, Scales};
use kernels::{Isa, Linear, Order, Packed, Pool, Serial, Values, Weight, linear};

/// The weights of the table.
const WEIGHTS: [&str; 6] = ["f32", "bf16", "f16", "bf16 NK", "int8", "int4"];

fn main() {
    let mut args = std::env::args().skip(1);
    let mut number = |default| args.next().map_or(default, |arg| arg.parse().expect("a number"));
    let (megabytes, rounds) = (number(64), number(9));
    let wanted: Vec<String> = args.collect();
    if let Some(other) = wanted.iter().find(|wanted| !WEIGHTS.contains(&wanted.as_str())) {
        eprintln!("error: weight {other:?}: one of {WEIGHTS:?} required");
        std::process::exit(2);
    }
    let isa = Isa::detected();
    println!("{isa:?}, {megabytes} MB of each weight, medians of {rounds} rounds; GB/s, and GOP/s for 512 rows");
    println!(
        "{:>12} {:>6} {:>7} {:>7} {:>7} {:>7} {:>8}",
        "shape", "weight", "threads", "read", "1 row", "8 rows", "512 rows"
    );
    for (k, n) in [(576, 576), (576, 1536), (1536, 576), (2048, 8192)] {
        for name in WEIGHTS.into_iter().filter(|name| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name)) {
            let measure = |pool: &dyn Pool| measure(isa, pool, name, k, n, megabytes << 20, rounds);
            measure(&Serial);
            with_spinning(&measure);
        }
    }
}

fn measure(isa: Isa, pool: &dyn Pool, name: &str, k: usize, n: usize, bytes: usize, rounds: usize) {
    let format = |bits| Format { bits, group: 32, mins: false };
    let (eight, four) = (format(Bits::Eight), format(Bits::Four));
    let each = match name {
        "f32" => k * n * 4,
        "bf16" | "f16" | "bf16 NK" => k * n * 2,
        "int8" => k * n + k * n / 16,
        _ => k * n / 2 + k * n / 16,
    };
    let copies = bytes.div_ceil(each);
    let memory = vec![0x3f80_3f80u32; copies * k * n];
    let scales = vec![f16::ONE; copies * k * n / 32];
    let weight = |i: usize| {
        // SAFETY: any bits are numbers, and there are four bytes for each element.
        let weight = unsafe {
            let at = memory.as_ptr().cast::<u8>();
            let packed = |format: Format| {
                let length = k * n / 32 * format.group_bytes() / 16;
                let q = std::slice::from_raw_parts(at.add(i * length), length);
                let scales = Scales::F16(&scales[i * k * n / 32..(i + 1) * k * n / 32]);
                Weight::Packed(Packed { bits: format.bits, group: 32, q, scales, mins: None })
            };
            let rows = |values, order| Weight::Rows { values, order };
            match name {
                "f32" => {
                    rows(Values::F32(std::slice::from_raw_parts(at.cast::<f32>().add(i * k * n), k * n)), Order::Kn)
                }
                "f16" => {
                    rows(Values::F16(std::slice::from_raw_parts(at.cast::<f16>().add(i * k * n), k * n)), Order::Kn)
                }
                "int8" => packed(eight),
                "int4" => packed(four),
                name => {
                    let order = if name == "bf16" { Order::Kn } else { Order::Nk };
                    rows(Values::Bf16(std::slice::from_raw_parts(at.cast::<bf16>().add(i * k * n), k * n)), order)
                }
            }
        };
        Linear { weight, k, n }
    };
    let x = vec![0.5; 512 * k];
    let mut out = vec![0.0; 512 * n];
    let mut times: [Vec<f64>; 4] = Default::default();
    for _ in 0..rounds {
        for (times, rows) in times.iter_mut().zip([0, 1, 8, 512]) {
            // Of many rows two products are enough.
            let copies = if rows == 512 { copies.min(2) } else { copies };
            let start = Instant::now();
            match rows {
                0 => read(isa, pool, &memory[..copies * each / 4]),
                _ => (0..copies).for_each(|i| {
                    linear(isa, pool, &x[..rows * k], rows, &[weight(i)], None, &mut [&mut out[..rows * n]]);
                }),
            }
            times.push(start.elapsed().as_secs_f64() / copies as f64);
        }
    }
    let [plain, one, eight_rows, many] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    });
    let rate = |seconds: f64| each as f64 / seconds / 1e9;
    println!(
        "{:>12} {name:>6} {:>7} {:>7.1} {:>7.1} {:>7.1} {:>8.0}",
        format!("{k}×{n}"),
        pool.threads(),
        rate(plain),
        rate(one),
        rate(eight_rows),
        2.0 * 512.0 * (k * n) as f64 / many / 1e9
    );
}

/// Reads all of `memory`, in chunks of 64 KB, some lines at a time.
fn read(isa: Isa, pool: &dyn Pool, memory: &[u32]) {
    let chunk = 16 << 10;
    pool.run(memory.len().div_ceil(chunk), &|i| {
        let part = &memory[i * chunk..memory.len().min((i + 1) * chunk)];
        black_box(sum(isa, part));
    });
}

/// The sum of all elements, by lanes of whichever vectors the compiler has for `isa`.
fn sum(isa: Isa, part: &[u32]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512Vnni || isa == Isa::Avx512 {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
        fn wide(part: &[u32]) -> u32 {
            lanes(part)
        }
        // SAFETY: the machine has this instruction set.
        return unsafe { wide(part) };
    }
    let _ = isa;
    lanes(part)
}

#[inline(always)]
fn lanes(part: &[u32]) -> u32 {
    let mut sums = [0u32; 128];
    for some in part.chunks_exact(128) {
        sums.iter_mut().zip(some).for_each(|(sum, &x)| *sum = sum.wrapping_add(x));
    }
    sums.iter().fold(0, |sum, &x| sum.wrapping_add(x))
}

/// Two threads that wait for chunks without sleeping.
struct Spinning<'a> {
    shared: &'a Shared,
}

#[derive(Default)]
struct Shared {
    /// The two words of the closure's address.
    job: [AtomicUsize; 2],
    chunks: AtomicUsize,
    next: AtomicUsize,
    started: AtomicUsize,
    done: AtomicUsize,
    end: AtomicBool,
}

impl Shared {
    fn take(&self, f: &(dyn Fn(usize) + Sync)) {
        loop {
            let chunk = self.next.fetch_add(1, Ordering::Relaxed);
            if chunk >= self.chunks.load(Ordering::Relaxed) {
                return;
            }
            f(chunk);
        }
    }
}

impl Pool for Spinning<'_> {
    fn threads(&self) -> usize {
        2
    }

    fn run(&self, chunks: usize, f: &(dyn Fn(usize) + Sync)) {
        let shared = self.shared;
        // SAFETY: the address is used until this function returns and no longer.
        let words: [usize; 2] = unsafe { std::mem::transmute(f) };
        words.iter().zip(&shared.job).for_each(|(word, job)| job.store(*word, Ordering::Relaxed));
        shared.chunks.store(chunks, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        let job = shared.started.fetch_add(1, Ordering::Release) + 1;
        shared.take(f);
        while shared.done.load(Ordering::Acquire) != job {
            std::hint::spin_loop();
        }
    }
}

fn with_spinning(f: &dyn Fn(&dyn Pool)) {
    let shared = Shared::default();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut job = 0;
            while !shared.end.load(Ordering::Relaxed) {
                let started = shared.started.load(Ordering::Acquire);
                if started == job {
                    std::hint::spin_loop();
                    continue;
                }
                job = started;
                let words = [0, 1].map(|i| shared.job[i].load(Ordering::Relaxed));
                // SAFETY: a closure's address that stays valid until this job is marked as done.
                shared.take(unsafe { std::mem::transmute::<[usize; 2], &(dyn Fn(usize) + Sync)>(words) });
                shared.done.store(job, Ordering::Release);
            }
        });
        f(&Spinning { shared: &shared });
        shared.end.store(true, Ordering::Relaxed);
    });
}
