//! `xllama devices`.

use std::process::ExitCode;

use serde_json::json;

use super::model_args::DeviceArg;
use super::progress::mebibytes;
use super::{Context, table};

/// List the devices of a plugin, with their memory.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama devices --device cpu")]
pub struct Args {
    #[command(flatten)]
    device: DeviceArg,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let path = self.device.plugin_path(context)?;
        let (plugin, client) = self.device.client(&path, 1)?;
        let mut devices = Vec::new();
        for d in client.addressable_devices() {
            let memory = d.memory_stats()?;
            devices.push(json!({
                "id": d.id(),
                "kind": d.kind(),
                "description": d.description().text,
                "bytes_in_use": memory.as_ref().map(|m| m.bytes_in_use),
                "bytes_limit": memory.as_ref().and_then(|m| m.bytes_limit),
            }));
        }
        let (major, minor) = plugin.api_version();
        let json = json!({
            "plugin": path,
            "api_version": format!("{major}.{minor}"),
            "platform": client.platform_name(),
            "platform_version": client.platform_version(),
            "devices": devices,
        });
        context.print(&json, || {
            println!("{} (PJRT {major}.{minor}), platform {}", path.display(), client.platform_name());
            let rows: Vec<Vec<String>> = devices
                .iter()
                .map(|d| {
                    let bytes = |key: &str| d[key].as_u64().map_or("unknown".into(), mebibytes);
                    let text = |key: &str| d[key].as_str().unwrap_or_default().to_string();
                    vec![
                        d["id"].to_string(),
                        text("kind"),
                        text("description"),
                        bytes("bytes_in_use"),
                        bytes("bytes_limit"),
                    ]
                })
                .collect();
            table::print(&["id", "kind", "description", "in use", "limit"], &rows, &[0, 3, 4]);
        });
        Ok(ExitCode::SUCCESS)
    }
}
