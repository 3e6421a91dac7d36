//! `xllama golden check`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::Subcommand;
use serde_json::json;
use xllama::golden::{Case, Manifest, Row, check};

use super::model_args::{CacheArgs, DeviceArg, MeshArgs, ModelArg, ModelArgs};
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
        mesh: MeshArgs,
        #[command(flatten)]
        cache: CacheArgs,
    },
}

/// Cases that are checked side by side; each holds its model in memory.
const WORKERS: usize = 4;

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let Action::Check { dir, model, case: wanted, device, mesh, cache } = self.action;
        let manifest = Manifest::open(&dir)?;
        let plugin = device.plugin_path(context)?;
        let cases: Vec<&Case> =
            manifest.cases.iter().filter(|c| wanted.as_ref().is_none_or(|w| c.name.contains(w))).collect();
        let run = |case: &Case| {
            context.reporter.say(&format!("checking {}", case.name));
            let model = ModelArg { model: case.model(&dir, model.as_deref()) };
            let load = |checkpoint: &converter::Checkpoint, precision, shape| {
                let args = ModelArgs {
                    model: model.clone(),
                    device: device.clone(),
                    dtype: Some(precision),
                    mesh: MeshArgs { mesh: shape, ..mesh.clone() },
                    cache: cache.clone(),
                };
                args.engine(context, &plugin, checkpoint)
            };
            let checked = model.open(context).and_then(|c| Ok(check(case, &dir, &manifest, &c, mesh.mesh, &load)?));
            checked.unwrap_or_else(|why| vec![Row::failed(case, &why)])
        };
        // Most of the time goes into compiling, which uses one core.
        let next = AtomicUsize::new(0);
        let done: Vec<OnceLock<Vec<Row>>> = cases.iter().map(|_| OnceLock::new()).collect();
        let work = || {
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(case) = cases.get(at) else { return };
                let _ = done[at].set(run(case));
            }
        };
        std::thread::scope(|scope| {
            let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(WORKERS);
            (1..workers).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        let rows: Vec<Row> = done.into_iter().filter_map(OnceLock::into_inner).flatten().collect();
        if rows.is_empty() {
            anyhow::bail!(
                "{}: no case to check{}",
                dir.display(),
                wanted.map_or(String::new(), |w| format!(" with {w:?} in its name"))
            );
        }
        context.reporter.clear();
        let refused = rows.iter().filter(|r| r.refused).count();
        if refused == rows.len() {
            anyhow::bail!("{}: {}", dir.display(), rows[0].note.as_deref().unwrap_or_default());
        }
        let failed = rows.iter().filter(|r| !r.pass).count();
        context.print(&json!({ "rows": rows, "failed": failed, "refused": refused, "ok": failed == 0 }), || {
            print(&rows, failed, refused)
        });
        Ok(ExitCode::from(u8::from(failed > 0)))
    }
}

fn print(rows: &[Row], failed: usize, refused: usize) {
    let figure = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.1e}"));
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                r.case.clone(),
                r.check.clone(),
                figure(r.max_abs_error),
                figure(r.mean_kl),
                figure(r.max_kl),
                r.top1.map_or("-".into(), |x| format!("{:.1} %", 100.0 * x)),
                r.tolerance.clone(),
                match (r.refused, r.pass) {
                    (true, _) => "not divided",
                    (_, true) => "ok",
                    (_, false) => "FAILED",
                }
                .into(),
            ]
        })
        .collect();
    let head = ["case", "check", "max abs error", "mean KL", "max KL", "top-1", "tolerance", "verdict"];
    table::print(&head, &cells, &[2, 3, 4, 5]);
    for row in rows.iter().filter(|r| r.note.is_some()) {
        println!("{} {}: {}", row.case, row.check, row.note.as_deref().unwrap_or_default());
    }
    let divided = if refused > 0 { format!(", {refused} cases not divided by the mesh") } else { String::new() };
    println!("{} comparisons, {failed} failed{divided}", rows.len() - refused);
}
