//! What the compiler says of a program: memory of one device, work, talk between devices, and how fast it can be.

use std::collections::BTreeMap;
use std::time::Instant;

use serde_json::{Value, json};
use xla::hlo::{self, Collective, CollectiveKind, Cost, Cycles, DataCopy};

use super::chips::{Floors, Work};
use super::job::{Job, Prepared, Sizes};
use super::memory::{Shortage, is_shortage};
use super::target::{Compiled, Machine};
use crate::Error;
use crate::kv_cache::CacheShape;

/// Copies smaller than this are not counted: index arithmetic and scalars.
const COPY_THRESHOLD: u64 = 1 << 20;

/// Memory of one device in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// What the program is given.
    pub arguments: u64,
    /// What it gives back.
    pub outputs: u64,
    /// The part of the outputs that takes over arguments.
    pub aliased: u64,
    /// What it needs while it runs.
    pub temporaries: u64,
    /// The machine code.
    pub code: u64,
    /// All of it at once: arguments + outputs − aliased + temporaries + code, or what the compiler says is needed.
    pub total: u64,
    /// What there is, where that is known.
    pub limit: Option<u64>,
    /// Whether the compiler gave up for want of memory, whatever the other figures say.
    pub refused: bool,
}

impl Memory {
    /// Whether it fits, where that is known.
    pub fn fits(&self) -> Option<bool> {
        match self.refused {
            true => Some(false),
            false => self.limit.map(|limit| self.total <= limit),
        }
    }

    /// Bytes that are left, below 0 where they are missing.
    pub fn margin(&self) -> Option<i64> {
        self.limit.map(|limit| limit as i64 - self.total as i64)
    }
}

/// What only a compiled program can tell.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Operations of one device by the compiler's own count, where the plugin gives it.
    pub flops: Option<f64>,
    /// Bytes that one device's operations read and write, likewise.
    pub bytes_accessed: Option<f64>,
    /// The compiler's estimate of its computations, on TPU.
    pub cycles: Option<Cycles>,
    /// Where devices speak with each other.
    pub collectives: Vec<Collective>,
    /// Moves of at least 1 MiB inside the device's memory.
    pub copies: Vec<DataCopy>,
    /// Instructions with an estimate, the dearest first.
    pub costs: Vec<Cost>,
    /// Loops in the program.
    pub loops: usize,
    /// Executions, by opcode, that take time and that the estimates leave out; none where there are no estimates.
    pub unestimated: BTreeMap<String, u64>,
}

/// The result of compiling one job for one machine.
#[derive(Clone, Debug)]
pub struct Report {
    /// Seconds that the compiler took.
    pub compile_s: f64,
    /// The cache that the program runs on.
    pub cache: CacheShape,
    /// Memory of one device.
    pub memory: Memory,
    /// What arithmetic says of one device.
    pub sizes: Sizes,
    /// What the compiled program says; `None` where it was not compiled because it does not fit.
    pub figures: Option<Figures>,
    /// The compiler's words where it does not fit.
    pub shortage: Option<String>,
    /// The least time of each part of a device, where its figures are known.
    pub floors: Option<Floors>,
    /// Tokens that one run takes or gives.
    pub tokens: usize,
    /// Packages of devices.
    pub chips: usize,
}

/// Compiles a job, and says what came of it. A program that does not fit is a report, not an error.
///
/// # Errors
/// What building says, and what the compiler says otherwise.
pub fn compile(job: &Job<'_>, machine: &Machine) -> Result<(Report, Prepared, Option<Compiled>), Error> {
    let prepared = job.prepare()?;
    let started = Instant::now();
    let compiled = machine.compile(&prepared.text, &machine.options(prepared.options.clone()));
    let compile_s = started.elapsed().as_secs_f64();
    let (compiled, shortage) = match compiled {
        Ok(compiled) => (Some(compiled), None),
        Err(Error::Pjrt(e)) if is_shortage(&e) => (None, Some(e.to_string().replace('\n', " "))),
        Err(e) => return Err(e),
    };
    let report = Report::new(job, machine, &prepared, compiled.as_ref(), shortage, compile_s)?;
    Ok((report, prepared, compiled))
}

impl Report {
    fn new(
        job: &Job<'_>,
        machine: &Machine,
        prepared: &Prepared,
        compiled: Option<&Compiled>,
        shortage: Option<String>,
        compile_s: f64,
    ) -> Result<Report, Error> {
        let sizes = &prepared.sizes;
        let memory = match compiled {
            Some(compiled) => memory_of(compiled, machine)?,
            None => missing_memory(sizes, shortage.as_deref(), machine.limit),
        };
        let figures = compiled.map(figures).transpose()?;
        let floors = machine.chip.map(|chip| {
            let work = Work {
                hbm_bytes: (sizes.arguments - sizes.idle_experts + sizes.written) as f64,
                flops: sizes.flops,
                // from 0.0, since an empty sum of floats is -0.0
                link_bytes: figures.iter().flat_map(|f| &f.collectives).map(sent).fold(0.0, |sum, n| sum + n),
                cycles: figures.as_ref().and_then(|f| f.cycles).map(|cycles| cycles.total as f64),
            };
            chip.floors(&work, job.precision.dtype)
        });
        let (tokens, chips) = (job.tokens(), machine.chips());
        let cache = prepared.cache;
        Ok(Report { compile_s, cache, memory, sizes: *sizes, figures, shortage, floors, tokens, chips })
    }

    /// Whether it was compiled and, where the limit is known, fits.
    pub fn ok(&self) -> bool {
        self.figures.is_some() && self.memory.fits() != Some(false)
    }

    /// Tokens per second, over all devices, of a step that takes so many seconds.
    pub fn rate(&self, seconds: f64) -> f64 {
        self.tokens as f64 / seconds
    }

    /// The best guess at tokens per second over all devices: by the compiler's estimate where there is one, else by the
    /// roofline; `None` where it does not fit or nothing is known of the device.
    pub fn predicted(&self) -> Option<f64> {
        let floors = self.floors.filter(|_| self.ok())?;
        Some(self.rate(floors.estimate().unwrap_or(floors.roofline())))
    }

    /// The part of the device's peak that the model's own products take, in a step as long as [`Report::predicted`] says.
    pub fn utilization(&self) -> Option<f64> {
        let floors = self.floors.filter(|_| self.ok())?;
        Some(floors.flops / floors.estimate().unwrap_or(floors.roofline()))
    }

    /// Executions and bytes of one device by kind of collective.
    pub fn collectives(&self) -> BTreeMap<CollectiveKind, (u64, u64)> {
        let mut sums: BTreeMap<CollectiveKind, (u64, u64)> = BTreeMap::new();
        for c in self.figures.iter().flat_map(|f| &f.collectives) {
            let (count, bytes) = sums.entry(c.kind).or_default();
            *count = count.saturating_add(c.times);
            *bytes = bytes.saturating_add(c.bytes.saturating_mul(c.times));
        }
        sums
    }

    /// Bytes that are moved inside a device's memory without being computed with.
    pub fn copied_bytes(&self) -> u64 {
        let copies = self.figures.iter().flat_map(|f| &f.copies);
        copies.fold(0, |sum, copy| sum.saturating_add(copy.bytes.saturating_mul(copy.times)))
    }

    /// The object that `xllama compile --json` prints.
    pub fn json(&self, job: &Job<'_>, machine: &Machine) -> Value {
        let cache = &self.cache;
        let m = &self.memory;
        let figures = self.figures.as_ref();
        let sums = self.collectives();
        let each = |pick: fn(&(u64, u64)) -> u64| -> BTreeMap<&str, u64> {
            sums.iter().map(|(kind, sum)| (kind.name(), pick(sum))).collect()
        };
        let cycles = figures.and_then(|f| f.cycles);
        let step = |seconds: f64| {
            let rate = self.rate(seconds);
            json!({ "step_s": seconds, "tok_s": rate, "tok_s_per_chip": rate / self.chips as f64 })
        };
        let roofline = self.floors.map(|floors| {
            let mut object = step(floors.roofline());
            object["hbm_s"] = floors.hbm.into();
            object["flops_s"] = floors.flops.into();
            object["links_s"] = floors.links.into();
            object["bound"] = floors.bound().into();
            object
        });
        let estimate = self.floors.and_then(|floors| {
            let mut object = step(floors.estimate()?);
            object["cycles_s"] = floors.cycles.into();
            Some(object)
        });
        json!({
            "ok": self.ok(),
            "target": machine.target().to_string(),
            "device_kind": machine.kind,
            "platform_version": machine.version,
            "devices": machine.devices,
            "chips": self.chips,
            "hosts": machine.hosts,
            "model": job.model,
            "program": job.step.name(),
            "tokens": job.step.tokens(),
            "batch": job.batch,
            "max_seq": if cache.len == 0 { job.step.tokens() } else { cache.len },
            "mesh": job.mesh.to_string(),
            "dtype": job.precision.name(),
            "cache_dtype": cache.dtype.name(),
            "compile_s": self.compile_s,
            "per_device": {
                "arguments": m.arguments,
                "weights": self.sizes.weights,
                "cache": self.sizes.cache,
                "state": self.sizes.state,
                "outputs": m.outputs,
                "aliased": m.aliased,
                "temporaries": m.temporaries,
                "code": m.code,
                "total": m.total,
                "limit": m.limit,
                "fits": m.fits(),
                "margin": m.margin(),
            },
            "shortage": self.shortage,
            "flops": figures.and_then(|f| f.flops).unwrap_or(self.sizes.flops),
            "flops_from": if figures.is_some_and(|f| f.flops.is_some()) { "compiler" } else { "arithmetic" },
            "model_flops": self.sizes.flops,
            "bytes_accessed": figures.and_then(|f| f.bytes_accessed).unwrap_or((self.sizes.arguments - self.sizes.idle_experts) as f64),
            "bytes_from": if figures.is_some_and(|f| f.bytes_accessed.is_some()) { "compiler" } else { "arithmetic" },
            "collectives": each(|(count, _)| *count),
            "collective_bytes": each(|(_, bytes)| *bytes),
            "loops": figures.map(|f| f.loops),
            "copied_bytes": figures.map(|_| self.copied_bytes()),
            "cycles": cycles.map(|c| c.total),
            "unestimated": figures.map(|f| &f.unestimated),
            "dynamic_loops": cycles.map(|c| c.dynamic_loops),
            "roofline": roofline,
            "estimate": estimate,
            "utilization": self.utilization(),
        })
    }
}

fn memory_of(compiled: &Compiled, machine: &Machine) -> Result<Memory, Error> {
    let stats = compiled.memory_stats()?;
    let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
    let [arguments, outputs, aliased] = [stats.argument, stats.output, stats.alias].map(bytes);
    let [temporaries, code] = [stats.temp, stats.generated_code].map(bytes);
    let total = (arguments + outputs).saturating_sub(aliased) + temporaries + code;
    Ok(Memory { arguments, outputs, aliased, temporaries, code, total, limit: machine.limit, refused: false })
}

/// Of a program that the compiler gave up on: what it says, or what arithmetic knows for certain.
fn missing_memory(sizes: &Sizes, shortage: Option<&str>, limit: Option<u64>) -> Memory {
    let said = shortage.and_then(Shortage::parse);
    let total = said.map_or(0, |s| s.needed).max(sizes.arguments);
    let limit = limit.or(said.map(|s| s.limit));
    let (outputs, aliased) = (sizes.cache, sizes.cache);
    Memory { arguments: sizes.arguments, outputs, aliased, total, limit, refused: true, ..Memory::default() }
}

fn figures(compiled: &Compiled) -> Result<Figures, Error> {
    let cost = compiled.cost_analysis().unwrap_or_default();
    let number = |key: &str| cost.get(key).and_then(|value| value.as_f64()).filter(|n| *n > 0.0);
    let program = compiled.optimized_program()?;
    let unreadable = |e: hlo::HloError| Error::Executable { path: "the optimized program".into(), what: e.to_string() };
    let module = hlo::Module::parse(&program.format, &program.bytes).map_err(unreadable)?;
    let cycles = module.cycles();
    let unestimated = module.unestimated().into_iter().filter(|_| cycles.is_some());
    Ok(Figures {
        flops: number("flops"),
        bytes_accessed: number("bytes accessed"),
        cycles,
        unestimated: unestimated.map(|(opcode, times)| (opcode.to_string(), times)).collect(),
        collectives: module.collectives(),
        copies: module.copies(COPY_THRESHOLD).into_iter().filter(|copy| !copy.between_memories).collect(),
        costs: module.costs(),
        loops: module.opcode_counts().get("while").copied().unwrap_or(0),
    })
}

/// Bytes that one device sends at least in all runs of a collective.
fn sent(collective: &Collective) -> f64 {
    let n = collective.group_size.max(1) as f64;
    let share = match collective.kind {
        CollectiveKind::AllReduce => 2.0 * (n - 1.0) / n,
        CollectiveKind::AllGather | CollectiveKind::AllToAll => (n - 1.0) / n,
        // The output is one share of what all have.
        CollectiveKind::ReduceScatter => n - 1.0,
        CollectiveKind::CollectivePermute | CollectiveKind::CollectiveBroadcast => 1.0,
    };
    share * collective.bytes as f64 * collective.times as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_compiler_gave_up_on_says_by_how_much() {
        let sizes = Sizes { arguments: 14 << 30, weights: 13 << 30, cache: 1 << 30, ..Sizes::default() };
        let limit = Some(16_909_336_576);
        let text =
            "the total memory required for HLO temporaries (16.78G) exceeds available HBM (15.75G). HLO module: d.";
        let memory = missing_memory(&sizes, Some(text), limit);
        assert_eq!(memory.total, (16.78 * (1u64 << 30) as f64).round() as u64);
        assert_eq!((memory.fits(), memory.limit), (Some(false), limit));
        assert_eq!(memory.margin(), Some(16_909_336_576 - memory.total as i64));
        // Without figures in the message there is what arithmetic knows; it does not fit all the same.
        let memory = missing_memory(&sizes, Some("RESOURCE_EXHAUSTED"), limit);
        assert_eq!((memory.total, memory.fits()), (14 << 30, Some(false)));
    }

    #[test]
    fn a_ring_sends_everything_twice_and_a_gather_once() {
        let collective = |kind, group_size| {
            let (name, op_name) = (String::new(), String::new());
            sent(&Collective { kind, name, op_name, bytes: 800, group_size, times: 3 })
        };
        assert_eq!(collective(CollectiveKind::AllReduce, 8), 2.0 * 700.0 * 3.0);
        assert_eq!(collective(CollectiveKind::AllGather, 8), 700.0 * 3.0);
        assert_eq!(collective(CollectiveKind::ReduceScatter, 8), 7.0 * 800.0 * 3.0);
        assert_eq!(collective(CollectiveKind::CollectivePermute, 8), 2400.0);
        assert_eq!(collective(CollectiveKind::AllReduce, 0), 0.0);
    }
}
