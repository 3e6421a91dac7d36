//! What the form of a model's layers costs: the same step with its layers written out, as a function that is called L
//! times, and as a loop over stacked parameters, each compiled in a process of its own.
//!
//! ```sh
//! cargo run --release --example layer_forms -- llama-2-7b v5e:2x4 --batch 8 --len 2048
//! ```
//!
//! On `cpu` the three are also run and loaded in turns. What came out stands in `docs/compile-cost.md`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use xla::DType;
use xla::graph::{Arg, ArgAttrs, Graph, Module, Platform, Tensor};
use xla::hlo;
use xla::pjrt::{Buffer, Client, CompileOptions, HostData, LoadedExecutable, OptionOverride};
use xla::wheel::{FetchOptions, PluginKind};
use xllama::compile::{Machine, Step, Target, mesh_for, presets};
use xllama::config::ModelConfig;
use xllama::kv_cache::{KvCache, LayerCache, Place};
use xllama::model::{self, LayerInput, Rope};
use xllama::params::{self, DecoderBlock, Llama, Param, Weight};
use xllama::runtime::{Blueprint, CacheOptions, StepSpec, device};
use xllama::sharding::MeshShape;

const USAGE: &str = "usage: layer_forms MODEL TARGET [--prefill TOKENS] [--batch B] [--len POSITIONS] [--dtype f32|bf16]
         [--mesh AXIS=N,…] [--plugin FILE] [--rounds N] [--option NAME=VALUE]… [--form unrolled|function|loop]
MODEL is a preset such as llama-2-7b or a folder with a config.json, TARGET one of `xllama compile`. The step is decode
unless --prefill says how many tokens. --rounds is for cpu: how often each form is run and loaded. --form compiles one form
in this process.";

/// How the L layers of a model become one program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// L copies of the block.
    Unrolled,
    /// A function of the module, called L times.
    Function,
    /// A loop over parameters and caches that are stacked, (L, …).
    Loop,
}

const FORMS: [(Form, &str); 3] = [(Form::Unrolled, "unrolled"), (Form::Function, "function"), (Form::Loop, "loop")];

/// The command line.
struct Args {
    model: String,
    target: Target,
    step: Step,
    batch: usize,
    len: usize,
    dtype: DType,
    mesh: Option<MeshShape>,
    plugin: Option<PathBuf>,
    rounds: usize,
    options: Vec<(String, OptionOverride)>,
    form: Option<Form>,
}

impl Args {
    fn parse(mut words: impl Iterator<Item = String>) -> anyhow::Result<Args> {
        let mut next = |what: &str| words.next().with_context(|| format!("{what} is missing\n{USAGE}"));
        let (model, target) = (next("MODEL")?, Target::parse(&next("TARGET")?, None)?);
        let (step, dtype) = (Step::Decode, DType::BF16);
        let (mesh, plugin, form, options) = (None, None, None, Vec::new());
        let mut args = Args { model, target, step, batch: 1, len: 512, dtype, mesh, plugin, rounds: 9, options, form };
        while let Ok(flag) = next("a flag") {
            let value = next(&format!("the value of {flag}"))?;
            let wrong = || format!("{flag}: {value:?} is not understood\n{USAGE}");
            match flag.as_str() {
                "--prefill" => args.step = Step::Prefill { tokens: value.parse().with_context(wrong)? },
                "--batch" => args.batch = value.parse().with_context(wrong)?,
                "--len" => args.len = value.parse().with_context(wrong)?,
                "--rounds" => args.rounds = value.parse().with_context(wrong)?,
                "--mesh" => args.mesh = Some(value.parse().map_err(anyhow::Error::msg).with_context(wrong)?),
                "--plugin" => args.plugin = Some(value.into()),
                "--dtype" => {
                    let known = [DType::F32, DType::BF16].into_iter().find(|dtype| dtype.name() == value);
                    args.dtype = known.with_context(wrong)?;
                }
                "--form" => {
                    let known = FORMS.iter().find(|(_, name)| *name == value);
                    args.form = Some(known.with_context(wrong)?.0);
                }
                "--option" => {
                    let (name, value) = value.split_once('=').with_context(wrong)?;
                    let value = match (value.parse(), value.parse()) {
                        (Ok(flag), _) => OptionOverride::Bool(flag),
                        (_, Ok(n)) => OptionOverride::Int(n),
                        _ => OptionOverride::Str(value.into()),
                    };
                    args.options.push((name.into(), value));
                }
                _ => bail!("{flag} is no flag of this command\n{USAGE}"),
            }
        }
        ensure!(args.step.tokens() <= args.len, "--len: the cache must hold the {} tokens", args.step.tokens());
        Ok(args)
    }
}

fn main() -> ExitCode {
    match Args::parse(std::env::args().skip(1)).and_then(|args| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let cfg = config(&args.model)?;
    let mesh_devices = args.mesh.map_or(1, |mesh| mesh.devices());
    if let Some(form) = args.form {
        let machine = args.target.open(&plugin(args)?, mesh_devices)?;
        return compile(args, &cfg, &machine, form);
    }
    println!("{HEADER}");
    for (_, name) in FORMS {
        // The most memory that a process ever had does not go down, so each form has its own.
        let child =
            Command::new(std::env::current_exe()?).args(std::env::args().skip(1)).args(["--form", name]).status();
        ensure!(child?.success(), "the form {name} did not compile: its own error stands above");
    }
    if args.target.plugin() == PluginKind::Cpu && mesh_devices == 1 && args.rounds > 0 {
        ensure!(args.dtype == DType::F32, "--dtype: the forms are compared with f32 weights; --rounds 0 only compiles");
        let (_, client) = device::open(&plugin(args)?, 1)?;
        take_turns(args, &cfg, &client)?;
    }
    Ok(())
}

/// The configuration of a preset or of a folder; all of its layers must be alike, as a loop has one body.
fn config(name: &str) -> anyhow::Result<ModelConfig> {
    let cfg = match presets::find(name) {
        Some(preset) => preset.config()?,
        None => {
            let file = Path::new(name).join("config.json");
            let text = std::fs::read_to_string(&file).with_context(|| {
                format!("MODEL: {name} is neither a folder with a config.json nor one of {}", presets::names())
            })?;
            ModelConfig::from_json(&text, &file)?
        }
    };
    let alike = cfg.layers.iter().all(|layer| *layer == cfg.layers[0]);
    ensure!(alike, "MODEL: the layers of {name} differ, and a loop over layers needs one body for all of them");
    ensure!(cfg.embedding_scale == 1.0, "MODEL: {name} scales its embedding, which the loop's program leaves out");
    Ok(cfg)
}

fn plugin(args: &Args) -> anyhow::Result<PathBuf> {
    let known = device::DeviceName::Known(args.target.plugin());
    let name = args.plugin.clone().map_or(known, device::DeviceName::Path);
    Ok(device::plugin_path(&name, &FetchOptions::default(), &mut |_| ())?)
}

/// One form of the step as text, with its options.
fn text(
    args: &Args,
    cfg: &ModelConfig,
    form: Form,
    mesh: MeshShape,
    platform: Platform,
) -> anyhow::Result<(Module, String, CompileOptions)> {
    let params = &Llama::declare(cfg);
    let Args { step, batch, len, dtype, .. } = *args;
    let model = Blueprint::new(cfg, params, dtype, mesh, platform)?;
    let spec = StepSpec::alone(step.tokens(), model.cache_shape(&CacheOptions::default(), batch, len), &model);
    let module = build(form, &spec, &model)?;
    let mut options = model.compile_options();
    options.env_options.extend(args.options.iter().cloned());
    let text = model.stablehlo(&module);
    Ok((module, text, options))
}

const HEADER: &str = "\
| form | text, KB | compile, s | peak of the process, MB | of it before | temporaries, MB | code, MB | serialized, MB | cycles |
|---|---|---|---|---|---|---|---|---|";

/// Compiles one form and prints its row.
fn compile(args: &Args, cfg: &ModelConfig, machine: &Machine, form: Form) -> anyhow::Result<()> {
    let mesh = mesh_for(args.mesh, &args.target, machine.devices, cfg)?;
    let (_, text, options) = text(args, cfg, form, mesh, Platform::named(&machine.platform))?;
    let before = peak_memory()?;
    let started = Instant::now();
    let compiled = machine.compile(&text, &machine.options(options))?;
    let seconds = started.elapsed().as_secs_f64();
    let peak = peak_memory()?;
    let stats = compiled.memory_stats()?;
    let program = compiled.optimized_program()?;
    let cycles = hlo::Module::parse(&program.format, &program.bytes)?.cycles();
    let cycles = cycles.map_or("none given".into(), |cycles| format!("{:.2} M", cycles.total as f64 / 1e6));
    let [temporaries, code, serialized] =
        [stats.temp as f64, stats.generated_code as f64, compiled.serialize()?.len() as f64].map(|bytes| bytes / 1e6);
    println!(
        "| {form:?} | {} | {seconds:.1} | {} | {} | {temporaries:.1} | {code:.2} | {serialized:.2} | {cycles} |",
        text.len() / 1000,
        peak / 1_000_000,
        before / 1_000_000,
    );
    Ok(())
}

/// The most memory that this process has had, in bytes.
fn peak_memory() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("peak memory is read as Linux gives it")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kib.context("/proc/self/status has no line VmHWM")? * 1024)
}

/// The step in one of its forms, greedy. Arguments: parameters, cache (donated), tokens (B, S), position (B). Results: cache,
/// the next token (B, 1), the next position.
fn build(form: Form, spec: &StepSpec, model: &Blueprint) -> anyhow::Result<Module> {
    let (cfg, b, s) = (&model.cfg, spec.cache.batch, spec.tokens);
    let g = Graph::new(if s == 1 { "decode" } else { "prefill" });
    g.set_platform(model.platform);
    if let Some(mesh) = model.mesh.mesh() {
        g.set_mesh(mesh, model.mesh.rules(&spec.cache, s));
    }
    g.inline_calls(form == Form::Unrolled);
    let p = match form {
        Form::Loop => params::declare_args(&g, &stacked(&model.params), model.devices()),
        _ => params::declare_args(&g, &model.params, model.devices()),
    };
    let cache = match form {
        Form::Loop => stacked_cache(&g, spec, cfg),
        _ => KvCache::declare(&g, spec.cache, cfg),
    };
    let (tokens, first) = (g.arg("tokens", DType::I32, &[b, s]), g.arg("position", DType::I32, &[b]));
    let positions = first.broadcast(&[b, s], &[0]) + g.iota(DType::I32, &[b, s], 1);
    let place = Place { positions, first: first.clone(), valid: None, table: None, read_len: spec.read_len };
    let frequencies = model::frequencies(&g, b, None, cfg);
    let (hidden, new) = match form {
        Form::Loop => forward_loop(&p, &tokens, &place, &frequencies, &cache, spec, cfg),
        _ => {
            let decoded = model::forward(&p, &tokens, &place, &frequencies, &cache, &spec.cache, cfg);
            (decoded.hidden, decoded.cache)
        }
    };
    for (old, new) in cache.iter().zip(new.iter()) {
        g.output_aliased(&old.name().unwrap_or_default(), new, old);
    }
    let logits = model::lm_head(&p, &hidden.narrow(1, s - 1, 1), cfg);
    g.output("token", &logits.argmax(2));
    g.output("position", &(&first + s as i64));
    Ok(g.finish()?)
}

/// The parameters with the layers stacked, as a tree of one layer with a leading axis L.
fn stacked(params: &Llama<Param>) -> Llama<Param> {
    let stack = |p: &Param| {
        let shape = [&[params.layers.len()], p.shape.as_slice()].concat();
        Param { shape, logical: [&[""], p.logical.as_slice()].concat(), ..p.clone() }
    };
    let layers = vec![params.layers[0].as_ref().map(&mut |p| stack(p))];
    Llama { layers, ..params.clone() }
}

/// The cache in the same way: the arrays of one layer, (L, …).
fn stacked_cache(g: &Graph, spec: &StepSpec, cfg: &ModelConfig) -> KvCache<Tensor> {
    let layer = &cfg.layers[0];
    let axes = [&[""], spec.cache.layout(layer).axes(spec.cache.platform)].concat();
    let arg = |(part, dtype, dims): (&str, DType, [usize; 4])| {
        let dims = [&[cfg.n_layers], &dims[..]].concat();
        g.arg_with(&format!("cache/{part}"), dtype, &dims, ArgAttrs { sharding: Some(&axes) })
    };
    KvCache { layers: vec![LayerCache { arrays: spec.cache.arrays(cfg, layer).into_iter().map(arg).collect() }] }
}

/// `model::forward` with the layers as a loop: of each stacked array the body takes its layer, and puts the layer's cache back.
fn forward_loop(
    p: &Llama<Weight>,
    tokens: &Tensor,
    place: &Place,
    frequencies: &[Tensor],
    cache: &KvCache<Tensor>,
    spec: &StepSpec,
    cfg: &ModelConfig,
) -> (Tensor, KvCache<Tensor>) {
    let (g, layer, block, caches) = (tokens.graph(), &cfg.layers[0], &p.layers[0], &cache.layers[0].arrays);
    let rope = layer.rope.map(|rope| model::ropes(&place.positions, frequencies, cfg).swap_remove(rope));
    let x = p.embedding.float().take(tokens, 0).cast(DType::F32).shard(["batch", "sequence", "hidden"]);
    let start = g.scalar(0i64, DType::I32);
    let mut values = vec![&start, &x];
    values.extend(caches);
    let renewed = values.len();
    values.extend([&place.positions, &place.first]);
    values.extend(rope.iter().flat_map(|rope| [&rope.cos, &rope.sin]));
    let block_tensors: Vec<Tensor> = block.iter().into_iter().map(Weight::float).collect();
    values.extend(&block_tensors);
    let body = |values: &[Tensor]| {
        let (i, x, caches) = (&values[0], &values[1], &values[2..renewed]);
        let mut rest = values[renewed..].iter().cloned();
        let mut next = || rest.next().expect("a body gets as many values as the loop was given");
        let (positions, first) = (next(), next());
        let place = Place { positions, first, ..place.clone() };
        let rope = rope.as_ref().map(|_| Rope { cos: next(), sin: next() });
        let p: DecoderBlock<Weight> = block.as_ref().map(&mut |weight| weight.with(|| layer_of(&next(), i)));
        let cache = LayerCache { arrays: caches.iter().map(|stack| layer_of(stack, i)).collect() };
        let at = LayerInput { rope: rope.as_ref(), place: &place, cache: &cache, layout: spec.cache.layout(layer) };
        let block = model::decoder_block(&p, x, &at, cfg);
        let put = |(stack, new): (&Tensor, &Tensor)| {
            stack.dynamic_update_slice(&new.expand_dims(0), &first_of(stack, i, &zero(i)))
        };
        let mut renewed_values = vec![i + 1i64, block.x];
        renewed_values.extend(caches.iter().zip(&block.cache.arrays).map(put));
        renewed_values.extend_from_slice(&values[renewed..]);
        renewed_values
    };
    let out = g.while_loop(&values, |values| values[0].lt(cfg.n_layers as i64), body);
    let cache = KvCache { layers: vec![LayerCache { arrays: out[2..renewed].to_vec() }] };
    (model::rms_norm(&out[1], &p.final_norm.float(), cfg), cache)
}

/// Layer i of a stacked array.
fn layer_of(stack: &Tensor, i: &Tensor) -> Tensor {
    let sizes = [&[1], &stack.shape()[1..]].concat();
    stack.dynamic_slice(&first_of(stack, i, &zero(i)), &sizes).reshape(&sizes[1..])
}

/// Where layer i of a stacked array begins.
fn first_of<'a>(stack: &Tensor, i: &'a Tensor, zero: &'a Tensor) -> Vec<&'a Tensor> {
    let mut starts = vec![zero; stack.rank()];
    starts[0] = i;
    starts
}

fn zero(i: &Tensor) -> Tensor {
    i.graph().scalar(0i64, DType::I32)
}

/// A form on its device.
struct Running {
    name: &'static str,
    program: LoadedExecutable,
    serialized: Vec<u8>,
    params: Vec<Buffer>,
    /// Cache, tokens, position.
    state: Vec<Buffer>,
    step_ms: Vec<f64>,
    load_ms: Vec<f64>,
}

/// Runs and loads the three forms in turns, on the same weights, and prints medians; they must draw the same tokens.
fn take_turns(args: &Args, cfg: &ModelConfig, client: &Client) -> anyhow::Result<()> {
    let mut forms = load(args, cfg, client)?;
    let decode = args.step == Step::Decode;
    let steps = if decode { 8.min(args.len / (args.rounds + 1)).max(1) } else { 1 };
    // The first round is to warm up.
    for round in 0..=args.rounds {
        let mut drawn = Vec::new();
        for form in &mut forms {
            let started = Instant::now();
            let mut tokens = Vec::new();
            for _ in 0..steps {
                let arguments: Vec<&Buffer> = form.params.iter().chain(&form.state).collect();
                let mut results = form.program.execute(&arguments)?;
                let token = &results[results.len() - 2];
                tokens.push(token.to_vec::<i32>()?);
                if !decode {
                    // The same prompt again: the results' last two are not what a prefill takes.
                    results.truncate(results.len() - 2);
                    results.extend(form.state.drain(form.state.len() - 2..));
                }
                form.state = results;
            }
            let step_ms = started.elapsed().as_secs_f64() * 1e3 / steps as f64;
            let started = Instant::now();
            client.deserialize(&form.serialized)?;
            let load_ms = started.elapsed().as_secs_f64() * 1e3;
            if round > 0 {
                form.step_ms.push(step_ms);
                form.load_ms.push(load_ms);
            }
            drawn.push(tokens);
        }
        ensure!(drawn.iter().all(|tokens| *tokens == drawn[0]), "the forms drew different tokens: {drawn:?}");
    }
    println!("\n| form | step, ms: median (least … most) | load, ms: median (least … most) |\n|---|---|---|");
    for Running { name, step_ms, load_ms, .. } in &mut forms {
        println!("| {name} | {} | {} |", spread(step_ms), spread(load_ms));
    }
    Ok(())
}

/// Compiles the three forms and gives them weights and a cache of zeros.
fn load(args: &Args, cfg: &ModelConfig, client: &Client) -> anyhow::Result<Vec<Running>> {
    let params = Llama::declare(cfg);
    let mut random = 1u64;
    let values = params.as_ref().map(&mut |p| (0..p.elements()).map(|_| weight(&mut random)).collect::<Vec<f32>>());
    let layers: Vec<Vec<&Vec<f32>>> = values.layers.iter().map(DecoderBlock::iter).collect();
    let stack = |leaf: usize| layers.iter().flat_map(|layer| layer[leaf]).copied().collect::<Vec<f32>>();
    let block = values.layers[0].from_leaves((0..layers[0].len()).map(stack)).context("a value for each leaf")?;
    let (embedding, final_norm, lm_head) =
        (values.embedding.clone(), values.final_norm.clone(), values.lm_head.clone());
    let stacked = Llama { embedding, layers: vec![block], final_norm, lm_head };

    let one = |(form, name): (Form, &'static str)| {
        let (module, text, options) = text(args, cfg, form, MeshShape::default(), Platform::Cpu)?;
        let program = client.compile(&text, &options)?;
        let serialized = program.serialize()?;
        let leaves = if form == Form::Loop { stacked.iter() } else { values.iter() };
        let (weights, rest) = module.args().split_at(leaves.len());
        let upload = |(arg, values): (&Arg, &Vec<f32>)| client.upload_slice(values, &arg.aval.shape, None);
        let params = weights.iter().zip(leaves).map(upload).collect::<Result<_, _>>()?;
        let zeros = |arg: &Arg| {
            let bytes = vec![0; arg.aval.shape.iter().product::<usize>() * arg.aval.dtype.size()];
            client.upload(HostData::Borrowed(&bytes), arg.aval.dtype, &arg.aval.shape, None)
        };
        let state = rest.iter().map(zeros).collect::<Result<_, _>>()?;
        let (step_ms, load_ms) = (Vec::new(), Vec::new());
        Ok(Running { name, program, serialized, params, state, step_ms, load_ms })
    };
    FORMS.into_iter().map(one).collect()
}

/// The next weight, evenly spread over -0.05 … 0.05 (Steele and Vigna's LXM multiplier as a plain congruential generator).
fn weight(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
    ((*state >> 40) as f32 / (1u32 << 24) as f32 - 0.5) * 0.1
}

fn spread(values: &mut [f64]) -> String {
    values.sort_unstable_by(f64::total_cmp);
    format!("{:.1} ({:.1} … {:.1})", values[values.len() / 2], values[0], values[values.len() - 1])
}
