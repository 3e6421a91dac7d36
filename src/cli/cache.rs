//! `xllama cache`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Subcommand;
use jiff::Timestamp;
use serde_json::json;
use xla::wheel;
use xllama::Error;
use xllama::runtime::exec_cache::{self, Header, Store};

use super::progress::mebibytes;
use super::{Context, table};

/// List or remove compiled programs that are kept for the next run.
///
/// They are kept in the folder `executables` of the cache. When they exceed XLLAMA_EXECUTABLE_CACHE_BYTES (for example
/// 512MiB; 4GiB without it, and 0 stores nothing), those that were not used for longest make room.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama cache list")]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// What is kept, the last used first.
    #[command(after_help = "Example:\n  xllama cache list --json")]
    List,
    /// Remove compiled programs; what is needed again is compiled again.
    #[command(after_help = "Example:\n  xllama cache clear --older-than 30")]
    Clear {
        /// Only those that were not used for so many days.
        #[arg(long, value_name = "DAYS", default_value_t = 0, hide_default_value = true)]
        older_than: u32,
    },
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let store = Store::new(wheel::cache_dir().map_err(Error::from)?.join("executables"));
        match self.action {
            Action::List => list(context, &store),
            Action::Clear { older_than } => clear(context, &store, older_than),
        }
    }
}

fn list(context: &Context, store: &Store) -> anyhow::Result<ExitCode> {
    let limit = exec_cache::limit()?;
    let entries = store.list()?;
    let bytes: u64 = entries.iter().map(|e| e.bytes).sum();
    let rows: Vec<serde_json::Value> = entries
        .iter()
        .map(|e| {
            let header = e.header.as_ref();
            json!({
                "key": e.key,
                "program": header.map(|h| &h.program),
                "argument": header.map(|h| &h.argument),
                "platform": header.map(|h| &h.platform),
                "bytes": e.bytes,
                "created": header.and_then(Header::created).and_then(stamp),
                "used": stamp(e.used),
            })
        })
        .collect();
    context.print(&json!({ "folder": store.folder(), "bytes": bytes, "limit": limit, "entries": rows }), || {
        let rows: Vec<Vec<String>> = entries
            .iter()
            .map(|e| {
                let text = |field: fn(&Header) -> String| e.header.as_ref().map_or("unknown".into(), field);
                vec![
                    text(|h| h.program.clone()),
                    text(|h| h.argument.clone()),
                    text(|h| h.platform.clone()),
                    mebibytes(e.bytes),
                    text(|h| h.created().map_or("unknown".into(), ago)),
                    ago(e.used),
                    e.key.chars().take(12).collect(),
                ]
            })
            .collect();
        if !rows.is_empty() {
            let header = ["program", "first argument", "platform", "size", "compiled", "last used", "key"];
            table::print(&header, &rows, &[3, 4, 5]);
        }
        let (count, folder) = (entries.len(), store.folder().display());
        println!("{}, {} of at most {} in {folder}", programs(count), mebibytes(bytes), mebibytes(limit));
    });
    Ok(ExitCode::SUCCESS)
}

fn clear(context: &Context, store: &Store, days: u32) -> anyhow::Result<ExitCode> {
    let freed = store.clear(Duration::from_secs(u64::from(days) * 24 * 60 * 60))?;
    context.print(&json!({ "removed": freed.removed, "bytes": freed.bytes }), || {
        let folder = store.folder().display();
        println!("removed {}, {}, from {folder}", programs(freed.removed), mebibytes(freed.bytes));
    });
    Ok(ExitCode::SUCCESS)
}

fn programs(count: usize) -> String {
    format!("{count} compiled program{}", if count == 1 { "" } else { "s" })
}

/// A time in UTC, to the second; none where it is out of a calendar's range.
fn stamp(time: SystemTime) -> Option<String> {
    let seconds = time.duration_since(UNIX_EPOCH).ok()?.as_secs();
    Some(Timestamp::from_second(seconds.try_into().ok()?).ok()?.to_string())
}

/// How long ago, in the largest unit that counts at least one.
fn ago(time: SystemTime) -> String {
    let seconds = time.elapsed().map_or(0, |d| d.as_secs());
    match seconds {
        0..60 => "now".into(),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86400),
    }
}
