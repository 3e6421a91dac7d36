//! `xllama compile`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::json;
use xla::graph::Platform;
use xla::wheel::PluginKind;
use xllama::Error;
use xllama::compile::{self, ExecutableFile, Job, Keep, Machine, Report, Row, Step, Target, presets};
use xllama::config::ModelConfig;
use xllama::params::{Llama, Param};
use xllama::precision::Precision;
use xllama::runtime::{cache_len, device};
use xllama::sharding::MeshShape;

use super::model_args::{
    CacheArgs, ModelArg, Partitioner, default_dtype, fetch_options, parse_precision, report_fetch,
};
use super::output::Output;
use super::train_args::TrainArgs;
use super::{Context, table};

/// Compile a program for a device that need not be there, and say what it takes and how fast it can be.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  xllama compile --target v5e:2x4 --model llama-2-7b --program decode --batch 8 --max-seq 2048
  xllama compile --target h200 --model llama-3.1-8b --program prefill --prompt-tokens 2048 --json
  xllama compile --target v5e:4x4 --model llama-2-7b --program train --mesh fsdp=16 --prompt-tokens 2048
  xllama compile --target v6e:2x4 --model llama-3.1-8b --sweep --sweep-batch 1,8,64
  xllama compile --target cpu --model smollm2-135m --batch 4 -o decode.program

Targets:
  v5e:2x4, v5p:2x2x4   slices of TPU chips: v4, v5e, v5p, v6e, tpu7x
  h200, h200x8         GPUs: h100, h200, b200
  my.textproto:1x1x8   GPUs as a file describes them
  cpu, cpux4           the processor of this machine")]
pub struct Args {
    /// What to compile for: v5e:2x4, v5p:2x2x4, h200, h200x8, my.textproto, cpu.
    #[arg(long, value_name = "T")]
    target: String,
    /// A published model by name (llama-2-7b, llama-3.1-405b, mixtral-8x7b, qwen3-8b, …), which needs no file; else as everywhere.
    #[arg(long, value_name = "M", default_value = xllama::models::DEFAULT_MODEL)]
    model: String,
    /// Only the first N layers of the model.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Which program.
    #[arg(long, value_enum, default_value_t = Which::Decode)]
    program: Which,
    /// How to split the model: data, fsdp, expert, sequence and model, such as model=4,data=2 [default: model as far as it goes].
    #[arg(long, value_name = "AXES")]
    mesh: Option<MeshShape>,
    /// Batch slots, or texts of a training step, over all devices [default: 1; of training one for each part of the mesh].
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u16).range(1..))]
    batch: Option<u16>,
    /// Positions of the cache [default: 2048, up to the model's own, and at least the prompt].
    #[arg(long, value_name = "N")]
    max_seq: Option<usize>,
    /// Tokens of one prefill, or of each text of a training step.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Type of parameters and products: f32, bf16 or f16, or int8 or int4 for packed matrices [default: f32 on a CPU, else the
    /// checkpoint's].
    #[arg(long, value_name = "DTYPE", value_parser = parse_precision)]
    dtype: Option<converter::Precision>,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten, next_help_heading = "Training (--program train)")]
    train: TrainArgs,
    /// The plugin that compiles: the path of a file [default: XLLAMA_DEVICE if it fits the target, else the installed one].
    #[arg(long, value_name = "PATH")]
    device: Option<PathBuf>,
    /// The description of a GPU (GpuTargetConfigProto in text form), for targets gpu, gpux8, h100, …
    #[arg(long, value_name = "F")]
    target_config: Option<PathBuf>,
    /// Which of XLA's partitioners splits the program.
    #[arg(long, alias = "emission", value_enum, default_value_t = Partitioner::Shardy)]
    partitioner: Partitioner,
    /// Write the executable, for `xllama generate --executable` on the target.
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Also print the N instructions that take most cycles (TPU), the N largest collectives and the N largest copies.
    #[arg(long, value_name = "N", default_value_t = 0)]
    costs: usize,
    /// Try every mesh with each of --sweep-batch, and mark the fastest for a chip.
    #[arg(long, conflicts_with_all = ["mesh", "out", "costs", "batch"])]
    sweep: bool,
    /// Batch sizes of --sweep.
    #[arg(long, value_name = "B,…", value_delimiter = ',', default_value = "1,8,64", requires = "sweep",
          value_parser = clap::value_parser!(u16).range(1..))]
    sweep_batch: Vec<u16>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Which {
    Prefill,
    Decode,
    Train,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        // Everything that can be wrong with the command line is found before a plugin is fetched.
        if self.program != Which::Train {
            self.train.refuse("--program train")?;
        }
        let target = Target::parse(&self.target, self.target_config.as_deref())?;
        let (cfg, params) = self.model(context)?;
        let step = match self.program {
            Which::Prefill => Step::Prefill { tokens: self.prompt_tokens as usize },
            Which::Decode => Step::Decode,
            Which::Train => self.train.step(self.prompt_tokens as usize, Keep::Nothing),
        };
        let len = self.len(&cfg, step)?;
        if let Some(devices) = target.devices() {
            compile::mesh_for(self.mesh, &target, devices, &cfg)?;
        } else if let Some(mesh) = self.mesh {
            mesh.check(&cfg)?;
        }
        if self.out.is_some() && self.program == Which::Train {
            let what = "writes programs that `xllama generate` runs, and a training step is none; leave it away".into();
            return Err(Error::Option { name: "out".into(), what }.into());
        }
        let out = self.out.as_deref().map(Output::new).transpose()?;

        let plugin = self.plugin(context, target.plugin())?;
        context.reporter.say(&format!("describing {target}"));
        let devices = self.mesh.map_or(1, |mesh| mesh.devices());
        let machine = target.open(&plugin, devices)?;
        let precision = Precision::of(self.dtype, default_dtype(&machine.platform, &cfg));
        let mesh = compile::mesh_for(self.mesh, &target, machine.devices, &cfg)?;
        let partitioner = self.partitioner.into();
        let parts = if self.program == Which::Train { mesh.data * mesh.fsdp * mesh.expert } else { 1 };
        let parts = parts * usize::from(self.train.microbatches);
        let (cache, batch) = (self.cache.options(), self.batch.map_or(parts, usize::from));
        let (model, cfg, params) = (self.model.as_str(), &cfg, &params);
        let platform = Platform::named(&machine.platform);
        let kernels = machine.kernels();
        let job = Job { model, cfg, params, precision, step, batch, len, cache, mesh, partitioner, platform, kernels };
        if self.sweep {
            return self.try_all(context, &job, &machine);
        }

        context.reporter.say(&format!("compiling {} of {model} for {target}, {mesh}", step.name()));
        let (report, prepared, compiled) = compile::compile(&job, &machine)?;
        context.reporter.clear();
        let mut json = report.json(&job, &machine);
        if let (Some(out), Some(path), Some(compiled)) = (out, &self.out, &compiled) {
            let file = ExecutableFile::new(path, &job, &prepared, &machine, compiled)?;
            let bytes = file.encode();
            out.write(&bytes)?;
            json["out"] = path.display().to_string().into();
            json["out_bytes"] = bytes.len().into();
        }
        if self.costs > 0 {
            dearest(&report, self.costs, &mut json);
        }
        context.print(&json, || print(&job, &machine, &report, &json));
        Ok(ExitCode::SUCCESS)
    }

    /// The model's configuration and parameters, without weights.
    fn model(&self, context: &Context) -> anyhow::Result<(ModelConfig, Llama<Param>)> {
        let cfg = match presets::find(&self.model) {
            Some(preset) => preset.config()?,
            None => {
                let arg = ModelArg { model: self.model.clone() };
                let checkpoint = arg.open(context).map_err(|e| match e.downcast::<Error>() {
                    Ok(Error::Model { name, what }) => {
                        Error::Model { name, what: format!("{what}; or one of {}", presets::names()) }.into()
                    }
                    Ok(other) => other.into(),
                    Err(other) => other,
                })?;
                checkpoint.config().clone()
            }
        };
        let cfg = self.layers.map_or(Ok(cfg.clone()), |layers| compile::cut(&cfg, layers))?;
        let mut cfg = cfg;
        cfg.lora = self.train.lora().filter(|_| self.program == Which::Train);
        let params = Llama::declare(&cfg).with_adapters(&cfg);
        Ok((cfg, params))
    }

    /// Positions of the cache.
    fn len(&self, cfg: &ModelConfig, step: Step) -> Result<usize, Error> {
        let context = cfg.context_len();
        let len = self.max_seq.unwrap_or(2048.min(context).max(step.tokens()));
        if len > context || len < step.tokens() {
            let what = format!(
                "{len} must be at least the {} tokens of the program and at most the {context} positions that the model was made for",
                step.tokens()
            );
            return Err(Error::Option { name: "max-seq".into(), what });
        }
        Ok(cache_len(len))
    }

    /// The file of the plugin that compiles for this kind of target, installed first if need be.
    fn plugin(&self, context: &Context, kind: PluginKind) -> anyhow::Result<PathBuf> {
        // The environment names the device that programs run on, which need not be the one that is compiled for.
        let usual = || std::env::var_os("XLLAMA_DEVICE").map(PathBuf::from).filter(|p| p.is_file() && fits(p, kind));
        let name = match self.device.clone().or_else(usual) {
            Some(path) => device::DeviceName::Path(path),
            None => device::DeviceName::Known(kind),
        };
        let _guard = context.interrupt.watch();
        let path = device::plugin_path(&name, &fetch_options(context), &mut |p| report_fetch(context, &p))?;
        context.reporter.clear();
        Ok(path)
    }

    fn try_all(&self, context: &Context, job: &Job<'_>, machine: &Machine) -> anyhow::Result<ExitCode> {
        let guard = context.interrupt.watch();
        let batches: Vec<usize> = self.sweep_batch.iter().map(|batch| usize::from(*batch)).collect();
        let mut progress = |job: &Job<'_>, i: usize, count: usize| {
            let what = format!("{} of {count}: {}, batch {}", i + 1, job.mesh, job.batch);
            context.reporter.say(&what);
            !guard.flag().load(std::sync::atomic::Ordering::Relaxed)
        };
        let rows = compile::sweep(job, machine, &batches, &mut progress)?;
        context.reporter.clear();
        let json = json!({
            "target": machine.target().to_string(),
            "devices": machine.devices,
            "chips": machine.chips(),
            "model": job.model,
            "program": job.step.name(),
            "max_seq": job.len,
            "dtype": job.precision.name(),
            "rows": rows.iter().map(|row| row.json(machine.chips())).collect::<Vec<_>>(),
        });
        context.print(&json, || print_rows(&rows, machine));
        Ok(ExitCode::SUCCESS)
    }
}

/// Whether a plugin's file name says that it is of this kind, or says nothing.
fn fits(path: &Path, kind: PluginKind) -> bool {
    let name = path.file_name().map_or(String::new(), |name| name.to_string_lossy().to_lowercase());
    let says = |word: &str| name.contains(word);
    match kind {
        PluginKind::Cpu => !says("tpu") && !says("cuda"),
        PluginKind::Cuda => !says("tpu") && !says("cpu"),
        PluginKind::Tpu => !says("cuda") && !says("cpu"),
    }
}

/// Puts the instructions that a person who tunes the graph looks at into the report.
fn dearest(report: &Report, count: usize, json: &mut serde_json::Value) {
    let Some(figures) = &report.figures else { return };
    let costs = figures.costs.iter().take(count).map(|c| {
        json!({
            "total": c.total(), "times": c.times, "opcode": c.opcode, "name": c.name, "op_name": c.op_name, "cycles": c.cycles,
        })
    });
    json["costs"] = costs.collect();
    let mut collectives: Vec<_> = figures.collectives.iter().collect();
    collectives.sort_by_key(|c| std::cmp::Reverse(c.bytes.saturating_mul(c.times)));
    let collectives = collectives.into_iter().take(count).map(|c| {
        json!({
            "total": c.bytes.saturating_mul(c.times), "times": c.times, "opcode": c.kind.name(), "name": c.name,
            "op_name": c.op_name, "bytes": c.bytes, "group_size": c.group_size,
        })
    });
    json["largest_collectives"] = collectives.collect();
    let copies = figures.copies.iter().take(count).map(|c| {
        json!({
            "total": c.bytes.saturating_mul(c.times), "times": c.times, "opcode": c.opcode, "name": c.name,
            "op_name": c.op_name, "bytes": c.bytes,
        })
    });
    json["largest_copies"] = copies.collect();
}

/// `1.69 GB`: decimal, as makers of memory and links count.
fn bytes(n: u64) -> String {
    scaled(n as f64, "B")
}

/// `4.76 M`, `1.69 GB`, `918 TFLOP`.
fn scaled(n: f64, unit: &str) -> String {
    let steps = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match steps.iter().find(|(step, _)| n.abs() >= *step) {
        Some((step, prefix)) => format!("{:.2} {prefix}{unit}", n / step),
        None => format!("{n:.0} {unit}"),
    }
}

/// `4.12 ms`.
fn seconds(s: f64) -> String {
    match s {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.2} µs", s * 1e6),
    }
}

/// The report for people.
fn print(job: &Job<'_>, machine: &Machine, report: &Report, json: &serde_json::Value) {
    let cache = report.cache;
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let (model, step, tokens) = (job.model, job.step.name(), count(job.step.tokens(), "token"));
    let dtype = job.precision.name();
    match job.step {
        Step::Train { .. } => println!("{model} {step}, {tokens} of {}, {dtype}", count(job.batch, "text")),
        Step::Prefill { .. } | Step::Decode => println!(
            "{model} {step}, {tokens} of {}, cache of {} positions, {dtype} (cache {})",
            count(job.batch, "slot"),
            cache.len,
            cache.dtype.name(),
        ),
    }
    println!(
        "{}: {} ({}), {}; mesh {}; {} {:.1} s\n",
        machine.target(),
        count(machine.devices, "device"),
        machine.kind,
        count(machine.hosts, "host"),
        job.mesh,
        if report.figures.is_some() { "compiled in" } else { "given up after" },
        report.compile_s
    );

    let m = &report.memory;
    let mut rows = [
        [
            "arguments",
            &bytes(m.arguments),
            &match job.step {
                Step::Train { .. } => {
                    format!("weights {}, state {}", bytes(report.sizes.weights), bytes(report.sizes.state))
                }
                _ => format!("weights {}, cache {}", bytes(report.sizes.weights), bytes(report.sizes.cache)),
            },
        ],
        ["outputs", &bytes(m.outputs), ""],
        ["aliased", &bytes(m.aliased), "outputs in the place of arguments"],
        ["temporaries", &bytes(m.temporaries), ""],
        ["code", &bytes(m.code), ""],
    ]
    .map(|row| row.map(String::from).to_vec())
    .to_vec();
    if report.figures.is_none() {
        rows.truncate(1);
    }
    rows.push(vec!["total".into(), bytes(m.total), String::new()]);
    let verdict = match (m.fits(), m.margin()) {
        (Some(true), Some(left)) => format!("fits, {} left", bytes(left.unsigned_abs())),
        (Some(false), Some(left)) if left < 0 => format!("does not fit: {} too much", bytes(left.unsigned_abs())),
        (Some(false), _) => "does not fit".into(),
        _ => String::new(),
    };
    rows.push(vec!["limit".into(), m.limit.map_or("unknown".into(), bytes), verdict]);
    table::print(&["memory of a device", "", ""], &rows, &[1]);

    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |what: &str, value: String, remark: String| rows.push(vec![what.into(), value, remark]);
    row("flops of the model", scaled(report.sizes.flops, "FLOP"), "by arithmetic".into());
    if let Some(figures) = &report.figures {
        if let Some(flops) = figures.flops {
            row("flops of the program", scaled(flops, "FLOP"), "by the compiler".into());
        }
        if let Some(n) = figures.bytes_accessed {
            row("bytes accessed", scaled(n, "B"), "by the compiler".into());
        }
        for (kind, (count, sum)) in report.collectives() {
            row(kind.name(), count.to_string(), bytes(sum));
        }
        row("loops", figures.loops.to_string(), String::new());
        row("copies", figures.copies.len().to_string(), bytes(report.copied_bytes()));
        if let Some(cycles) = figures.cycles {
            let dynamic = match cycles.dynamic_loops {
                0 => String::new(),
                n => format!("{n} loops of unknown length counted once"),
            };
            row("compute cycles", scaled(cycles.total as f64, ""), dynamic);
            let left_out: Vec<String> = figures.unestimated.iter().map(|(opcode, n)| format!("{n} {opcode}")).collect();
            row("without estimate", figures.unestimated.values().sum::<u64>().to_string(), left_out.join(", "));
        }
    }
    println!();
    table::print(&["work of a device", "", ""], &rows, &[1]);

    if let Some(floors) = report.floors.filter(|_| report.figures.is_some()) {
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut row = |what: String, s: f64| {
            // What a program does not do takes no time.
            if s > 0.0 {
                let rate = report.rate(s);
                rows.push(vec![what, seconds(s), format!("{rate:.1}"), format!("{:.1}", rate / report.chips as f64)]);
            }
        };
        row("memory".into(), floors.hbm);
        row("products".into(), floors.flops);
        row("links".into(), floors.links);
        row(format!("roofline ({})", floors.bound()), floors.roofline());
        if let (Some(cycles), Some(estimate)) = (floors.cycles, floors.estimate()) {
            row("compute cycles".into(), cycles);
            row("cycles or roofline".into(), estimate);
        }
        println!();
        let rate = match job.step {
            Step::Prefill { .. } => "prompt tok/s",
            Step::Decode | Step::Train { .. } => "tok/s",
        };
        table::print(&["at least, a step", "", rate, "of a chip"], &rows, &[1, 2, 3]);
        if let (Step::Train { .. }, Some(part)) = (job.step, report.utilization()) {
            println!("\nutilization: at most {:.0} % of the peak for the model's own products", 100.0 * part);
        }
    }
    if let Some(shortage) = &report.shortage {
        println!("\nthe compiler: {shortage}");
    }
    for (key, unit) in [("costs", "cycles"), ("largest_collectives", "bytes"), ("largest_copies", "bytes")] {
        let Some(items) = json[key].as_array().filter(|items| !items.is_empty()) else { continue };
        let cell = |item: &serde_json::Value, key: &str| item[key].as_str().map_or(item[key].to_string(), String::from);
        let cells = |item: &serde_json::Value| {
            ["total", "times", "opcode", "name", "op_name"].map(|key| cell(item, key)).to_vec()
        };
        println!();
        table::print(&[unit, "times", "opcode", "name", "of"], &items.iter().map(cells).collect::<Vec<_>>(), &[0, 1]);
    }
    if let (Some(out), Some(n)) = (json["out"].as_str(), json["out_bytes"].as_u64()) {
        println!("\n{out}: {}", bytes(n));
    }
}

fn print_rows(rows: &[Row], machine: &Machine) {
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            let rate = |rate: Option<f64>| rate.map_or(String::new(), |rate| format!("{rate:.1}"));
            vec![
                row.mesh.to_string(),
                row.batch.to_string(),
                match row.fits() {
                    Some(true) => "yes".into(),
                    Some(false) => "no".into(),
                    None => "unknown".into(),
                },
                bytes(row.memory.total),
                rate(row.rate()),
                rate(row.rate().map(|rate| rate / machine.chips() as f64)),
                match &row.problem {
                    Some(problem) => problem.clone(),
                    None if row.best => "fastest for a chip".into(),
                    None => String::new(),
                },
            ]
        })
        .collect();
    println!("{}: {} devices ({})\n", machine.target(), machine.devices, machine.kind);
    table::print(&["mesh", "batch", "fits", "a device", "tok/s", "of a chip", ""], &cells, &[1, 3, 4, 5]);
}
