//! From the name of a device to a client: which plugin, fetched if need be, and its first device.

use std::path::{Path, PathBuf};

use xla::pjrt::{Client, Plugin, Value};
use xla::wheel::{self, FetchOptions, PluginKind, Progress};

use crate::Error;

/// A device as the user names it: `cpu`, `cuda`, `tpu`, or the path of a PJRT plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// A plugin that can be installed by name.
    Known(PluginKind),
    /// A plugin file.
    Path(PathBuf),
}

impl DeviceName {
    /// Reads a device name; none picks an accelerator that is installed and present, else the CPU.
    pub fn parse(name: Option<&str>) -> Result<DeviceName, Error> {
        let Some(name) = name else { return Ok(DeviceName::Known(default_kind())) };
        if let Ok(kind) = name.parse::<PluginKind>() {
            return Ok(DeviceName::Known(kind));
        }
        let path = PathBuf::from(name);
        match path.exists() || name.contains(['/', '.']) {
            true => Ok(DeviceName::Path(path)),
            false => Err(Error::Device {
                name: name.into(),
                what: "neither cpu, cuda nor tpu, nor the path of a PJRT plugin (a .so file)".into(),
            }),
        }
    }
}

/// An accelerator whose plugin is installed and whose device node exists, else the CPU.
fn default_kind() -> PluginKind {
    let present = |kind, nodes: &[&str]| {
        let installed = || wheel::installed(wheel::default_build(kind).ok()?, &FetchOptions::default());
        nodes.iter().any(|n| Path::new(n).exists()) && installed().is_some()
    };
    if present(PluginKind::Tpu, &["/dev/accel0", "/dev/vfio/0"]) {
        PluginKind::Tpu
    } else if present(PluginKind::Cuda, &["/dev/nvidiactl"]) {
        PluginKind::Cuda
    } else {
        PluginKind::Cpu
    }
}

/// The plugin file of `name`, installed first if it is not there.
pub fn plugin_path(
    name: &DeviceName,
    options: &FetchOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<PathBuf, Error> {
    match name {
        DeviceName::Path(path) => Ok(path.clone()),
        DeviceName::Known(kind) => {
            let build = wheel::default_build(*kind)?;
            match wheel::installed(build, options) {
                Some(path) => Ok(path),
                None => Ok(wheel::install(build, options, progress)?),
            }
        }
    }
}

/// Opens the plugin and makes a client of `devices` devices (a CPU makes as many as it is asked for).
pub fn open(path: &Path, devices: usize) -> Result<(Plugin, Client), Error> {
    let plugin = Plugin::load(path)?;
    // Only the CPU plugin takes this option, and without it makes four devices; another refuses the unknown name.
    let cpu = [("cpu_device_count", Value::from(devices as i64))];
    let is_cpu = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.contains("cpu"));
    let client = match is_cpu {
        true => plugin.client(&cpu)?,
        false => plugin.client(&[])?,
    };
    Ok((plugin, client))
}
