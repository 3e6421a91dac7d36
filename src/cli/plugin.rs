//! `xllama plugin`.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;
use xla::wheel::{self, PluginKind};

use super::model_args::{fetch_options, report_fetch};
use super::progress::mebibytes;
use super::{Context, table};

/// List, install or locate PJRT plugins.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama plugin install cpu")]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// What is known and what is installed.
    #[command(after_help = "Example:\n  xllama plugin list cpu")]
    List {
        /// Only builds of this kind.
        kind: Option<PluginKind>,
    },
    /// Fetch a plugin with pip, check its hash and unpack it into the cache.
    #[command(after_help = "Example:\n  xllama plugin install cpu")]
    Install {
        /// cpu, cuda or tpu.
        kind: PluginKind,
        /// Another build than the default, by the name that `list` shows.
        #[arg(long)]
        build: Option<String>,
    },
    /// Print the path of an installed plugin.
    #[command(after_help = "Example:\n  xllama plugin path cpu")]
    Path {
        /// cpu, cuda or tpu.
        #[arg(default_value = "cpu")]
        kind: PluginKind,
    },
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        match self.action {
            Action::List { kind } => list(context, kind),
            Action::Install { kind, build } => install(context, kind, build.as_deref()),
            Action::Path { kind } => path(context, kind),
        }
    }
}

fn list(context: &Context, kind: Option<PluginKind>) -> anyhow::Result<ExitCode> {
    let options = fetch_options(context);
    let kinds = PluginKind::ALL.into_iter().filter(|k| kind.is_none_or(|wanted| wanted == *k));
    let builds: Vec<_> = kinds.flat_map(wheel::builds).collect();
    let rows: Vec<serde_json::Value> = builds
        .iter()
        .map(|b| {
            json!({
                "kind": b.kind.to_string(),
                "name": b.name,
                "version": b.version(),
                "api_version": format!("{}.{}", b.api.0, b.api.1),
                "download_bytes": b.download_bytes(),
                "default": wheel::default_build(b.kind).is_ok_and(|d| d.name == b.name),
                "path": wheel::installed(b, &options),
                "about": b.about,
            })
        })
        .collect();
    context.print(&json!({ "plugins": rows }), || {
        let rows: Vec<Vec<String>> = builds
            .iter()
            .zip(&rows)
            .map(|(b, row)| {
                vec![
                    b.kind.to_string(),
                    format!("{}{}", b.name, if row["default"] == true { " *" } else { "" }),
                    b.version().to_string(),
                    format!("{}.{}", b.api.0, b.api.1),
                    mebibytes(b.download_bytes()),
                    wheel::installed(b, &options).map_or("no".into(), |p| p.display().to_string()),
                ]
            })
            .collect();
        table::print(&["kind", "build", "version", "PJRT", "download", "installed"], &rows, &[4]);
        println!("* the default of its kind");
    });
    Ok(ExitCode::SUCCESS)
}

fn install(context: &Context, kind: PluginKind, name: Option<&str>) -> anyhow::Result<ExitCode> {
    let build = match name {
        None => wheel::default_build(kind).map_err(xllama::Error::from)?,
        Some(name) => wheel::builds(kind).find(|b| b.name == name).ok_or_else(|| {
            let known: Vec<&str> = wheel::builds(kind).map(|b| b.name).collect();
            xllama::Error::Option {
                name: "build".into(),
                what: format!("must be one of {}, found {name}", known.join(", ")),
            }
        })?,
    };
    let _guard = context.interrupt.watch();
    let path = wheel::install(build, &fetch_options(context), &mut |p| report_fetch(context, &p))
        .map_err(xllama::Error::from)?;
    context.reporter.clear();
    context.print(&json!({ "name": build.name, "version": build.version(), "path": path }), || {
        println!("{}", path.display())
    });
    Ok(ExitCode::SUCCESS)
}

fn path(context: &Context, kind: PluginKind) -> anyhow::Result<ExitCode> {
    let build = wheel::default_build(kind).map_err(xllama::Error::from)?;
    match wheel::installed(build, &fetch_options(context)) {
        Some(path) => context.print(&json!({ "path": path }), || println!("{}", path.display())),
        None => anyhow::bail!("the {kind} plugin is not installed; run `xllama plugin install {kind}`"),
    }
    Ok(ExitCode::SUCCESS)
}
