//! `xllama golden check`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;
use xllama::golden::{Manifest, Row, check};

use super::model_args::{CacheArgs, DeviceArg, ModelArg, ModelArgs};
use super::{Context, table};

/// Hold the model to what PyTorch computed.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama golden check golden/")]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Run every golden of a folder and print how far each is from PyTorch.
    #[command(after_help = "Example:\n  xllama golden check golden/ --case gqa2")]
    Check {
        /// The folder with manifest.json.
        #[arg(default_value = "golden")]
        dir: PathBuf,
        /// The model of those cases that name one instead of carrying it.
        #[arg(long, value_name = "M")]
        model: Option<String>,
        /// Only the cases whose name contains this.
        #[arg(long, value_name = "TEXT")]
        case: Option<String>,
        #[command(flatten)]
        device: DeviceArg,
        #[command(flatten)]
        cache: CacheArgs,
    },
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let Action::Check { dir, model, case: wanted, device, cache } = self.action;
        let manifest = Manifest::open(&dir)?;
        let plugin = device.plugin_path(context)?;
        let mut rows: Vec<Row> = Vec::new();
        for case in manifest.cases.iter().filter(|c| wanted.as_ref().is_none_or(|w| c.name.contains(w))) {
            context.reporter.say(&format!("checking {}", case.name));
            let model = ModelArg { model: case.model(&dir, model.as_deref()) };
            let load = |checkpoint: &converter::Checkpoint, dtype| {
                ModelArgs { model: model.clone(), device: device.clone(), dtype: Some(dtype), cache: cache.clone() }
                    .engine(context, &plugin, checkpoint)
            };
            let checked = model.open(context).and_then(|c| Ok(check(case, &dir, &manifest, &c, &load)?));
            match checked {
                Ok(checked) => rows.extend(checked),
                Err(why) => rows.push(Row::failed(case, &why)),
            }
        }
        if rows.is_empty() {
            anyhow::bail!(
                "{}: no case to check{}",
                dir.display(),
                wanted.map_or(String::new(), |w| format!(" with {w:?} in its name"))
            );
        }
        context.reporter.clear();
        let failed = rows.iter().filter(|r| !r.pass).count();
        context.print(&json!({ "rows": rows, "failed": failed, "ok": failed == 0 }), || print(&rows, failed));
        Ok(ExitCode::from(u8::from(failed > 0)))
    }
}

fn print(rows: &[Row], failed: usize) {
    let figure = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.1e}"));
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.case.clone(),
                r.check.clone(),
                figure(r.max_abs_error),
                figure(r.max_kl),
                r.top1.map_or("-".into(), |x| format!("{:.1} %", 100.0 * x)),
                r.tolerance.clone(),
                if r.pass { "ok" } else { "FAILED" }.into(),
            ]
        })
        .collect();
    table::print(&["case", "check", "max abs error", "max KL", "top-1", "tolerance", "verdict"], &cells, &[2, 3, 4]);
    for row in rows.iter().filter(|r| r.note.is_some()) {
        println!("{} {}: {}", row.case, row.check, row.note.as_deref().unwrap_or_default());
    }
    println!("{} comparisons, {failed} failed", rows.len());
}
