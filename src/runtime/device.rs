//! From the name of a device to a client: which plugin, fetched if need be, and its first device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use xla::pjrt::{Client, KeyValueStore, Plugin, Value, on_tpu_vm};
use xla::wheel::{self, FetchOptions, PluginKind, Progress};

use crate::Error;
use crate::distributed::{self, Process};

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

/// An accelerator whose plugin is installed and that is in this machine, else the CPU.
fn default_kind() -> PluginKind {
    let installed = |kind| {
        let find = || wheel::installed(wheel::default_build(kind).ok()?, &FetchOptions::default());
        find().is_some()
    };
    if on_tpu_vm() && installed(PluginKind::Tpu) {
        PluginKind::Tpu
    } else if Path::new("/dev/nvidiactl").exists() && installed(PluginKind::Cuda) {
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
///
/// # Errors
/// The plugin does not open or has no device here.
pub fn open(path: &Path, devices: usize) -> Result<(Plugin, Client), Error> {
    let (plugin, client, _) = open_together(path, devices, Process::SINGLE, None)?;
    Ok((plugin, client))
}

/// [`open`] as one of several processes, which meet at `store`; also gives the place that the plugin sees this one in.
///
/// # Errors
/// Those of [`open`] and [`distributed::client`].
pub fn open_together(
    path: &Path,
    devices: usize,
    process: Process,
    store: Option<Arc<dyn KeyValueStore>>,
) -> Result<(Plugin, Client, Process), Error> {
    let plugin = Plugin::load(path)?;
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if name.starts_with("libtpu") && !on_tpu_vm() {
        return Err(Error::Device {
            name: path.display().to_string(),
            what: "there is no TPU in this machine to run on; `xllama compile --target v5e:2x4` compiles without one, and \
                   XLA_ON_TPU_VM=1 says that there is one after all"
                .into(),
        });
    }
    // Only the CPU plugin takes this option, and without it makes four devices; another refuses the unknown name.
    let cpu = [("cpu_device_count", Value::from(devices as i64))];
    let options: &[_] = if name.contains("cpu") { &cpu } else { &[] };
    let (client, process) = distributed::client(&plugin, options, process, store)?;
    Ok((plugin, client, process))
}
