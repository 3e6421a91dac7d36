//! The command line: one file per command, each with its options, its help and what it prints.

mod bench;
mod bench_profile;
mod bench_train;
mod cache;
mod chat;
mod compile;
mod convert;
mod devices;
mod distributed_args;
mod emit;
mod generate;
mod golden;
mod inspect;
mod interrupt;
mod logits;
mod manual;
mod model_args;
mod output;
mod perplexity;
mod plugin;
mod progress;
mod sampling_args;
mod table;
mod template_args;
mod train_args;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use xllama::Error;

use self::interrupt::Interrupt;
use self::progress::Reporter;

/// The Llama family, compiled: any PJRT device, one command, and logits to trust to the last digit.
#[derive(Parser)]
#[command(name = "xllama", version, propagate_version = true, max_term_width = 110)]
#[command(after_help = "Example:\n  xllama generate \"Once upon a time\"")]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print results and errors only, no progress.
    #[arg(long, short, global = true)]
    quiet: bool,
    /// One JSON object on standard output; everything else goes to standard error.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    Generate(generate::Args),
    Chat(chat::Args),
    ConvertParams(convert::ConvertArgs),
    ExportHf(convert::ExportArgs),
    Logits(logits::Args),
    Perplexity(perplexity::Args),
    Golden(golden::Args),
    Emit(emit::Args),
    Compile(Box<compile::Args>),
    Plugin(plugin::Args),
    Devices(devices::Args),
    Cache(cache::Args),
    Bench(bench::Args),
    Inspect(inspect::Args),
    Completions(manual::CompletionsArgs),
    Man(manual::ManArgs),
}

/// What every command gets besides its own options.
pub struct Context {
    /// When the process began.
    pub started: Instant,
    /// Results as JSON.
    pub json: bool,
    /// Progress on standard error.
    pub reporter: Reporter,
    /// Ctrl-C.
    pub interrupt: Interrupt,
}

impl Context {
    /// Prints the result of a command under `--json`, else what `human` prints.
    pub fn print(&self, json: &serde_json::Value, human: impl FnOnce()) {
        match self.json {
            true => println!("{json}"),
            false => human(),
        }
    }
}

/// Runs the command line of this process.
pub fn main(started: Instant) -> ExitCode {
    reset_sigpipe();
    let cli = Cli::parse();
    let level = if cli.quiet { "error" } else { "warn" };
    let filter = EnvFilter::try_from_env("XLLAMA_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
    let interrupt = match Interrupt::install() {
        Ok(interrupt) => interrupt,
        Err(e) => return fail(&e),
    };
    let context = Context { started, json: cli.json, reporter: Reporter::new(cli.quiet), interrupt };
    let done = match cli.command {
        Command::Generate(args) => args.run(&context),
        Command::Chat(args) => args.run(&context),
        Command::ConvertParams(args) => args.run(&context),
        Command::ExportHf(args) => args.run(&context),
        Command::Logits(args) => args.run(&context),
        Command::Perplexity(args) => args.run(&context),
        Command::Golden(args) => args.run(&context),
        Command::Emit(args) => args.run(&context),
        Command::Compile(args) => args.run(&context),
        Command::Plugin(args) => args.run(&context),
        Command::Devices(args) => args.run(&context),
        Command::Cache(args) => args.run(&context),
        Command::Bench(args) => args.run(&context),
        Command::Inspect(args) => args.run(&context),
        Command::Completions(args) => args.run(),
        Command::Man(args) => args.run(),
    };
    context.reporter.clear();
    match done {
        Ok(code) => code,
        Err(e) => fail(&e),
    }
}

/// One `error:` line; 2 for what the command line got wrong, 1 for everything else. Nothing and 0 where the reader of
/// standard output has had enough.
fn fail(e: &anyhow::Error) -> ExitCode {
    if e.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    let mut line = e.to_string();
    for cause in e.chain().skip(1).map(ToString::to_string) {
        // Many messages end in their cause already.
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    eprintln!("error: {}", line.replace('\n', " "));
    match e.downcast_ref::<Error>() {
        Some(Error::Option { .. }) => ExitCode::from(2),
        Some(Error::Distributed(e)) if e.is_usage() => ExitCode::from(2),
        _ => ExitCode::from(1),
    }
}

/// `println!` into a closed pipe panics; `xllama inspect | head` should end quietly instead.
fn reset_sigpipe() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let message = info.payload().downcast_ref::<String>().map_or("", String::as_str);
        if message.starts_with("failed printing to stdout") && message.contains("Broken pipe") {
            std::process::exit(0);
        }
        default(info);
    }));
}
