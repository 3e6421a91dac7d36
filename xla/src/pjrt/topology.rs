//! Devices that need not be present, and compiling for them.

use super::client::{self, Client};
use super::device::{self, DeviceDescription};
use super::error::Error;
use super::executable::Executable;
use super::options::CompileOptions;
use super::plugin::{Plugin, set_env_default};
use super::sys::{self, Arguments};
use super::value::{self, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// A description of a set of devices.
pub struct Topology {
    plugin: Plugin,
    raw: *mut sys::RawTopology,
    /// The client that owns `raw`, where it was not created on its own.
    owner: Option<Client>,
}

// SAFETY: PJRT topologies are constant after creation and may be used and destroyed from any thread.
unsafe impl Send for Topology {}
// SAFETY: as above.
unsafe impl Sync for Topology {}

impl Topology {
    pub(super) fn create(plugin: Plugin, name: &str, options: &[(&str, Value)]) -> Result<Self, Error> {
        let raw_options = value::to_raw(options);
        let mut args = sys::TopologyCreate::new();
        args.name = name.as_ptr();
        args.name_size = name.len();
        args.create_options = raw_options.as_ptr();
        args.num_options = raw_options.len();
        plugin.call(&mut args)?;
        Ok(Topology { plugin, raw: args.topology, owner: None })
    }

    pub(super) fn of_client(client: &Client) -> Result<Self, Error> {
        let mut args = sys::ClientTopology::new();
        args.client = client.raw();
        client.plugin().call(&mut args)?;
        Ok(Topology { plugin: *client.plugin(), raw: args.topology, owner: Some(client.clone()) })
    }

    /// The plugin that made it.
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    pub(super) fn compile(&self, stablehlo: &str, options: &CompileOptions) -> Result<Executable, Error> {
        let options = options.encode()?;
        let program = client::program(stablehlo);
        let mut args = sys::Compile::new();
        args.topology = self.raw;
        args.program = &program;
        args.options = options.as_ptr();
        args.options_size = options.len();
        self.plugin.call(&mut args)?;
        Ok(Executable::from_raw(self.plugin, args.executable, self.owner.clone()))
    }

    /// `cpu`, `cuda`, `tpu`, …
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn platform_name(&self) -> Result<String, Error> {
        let mut args = sys::TopologyPlatformName::new();
        args.topology = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; the text lives as long as the topology.
        Ok(unsafe { value::text(args.name, args.name_size) })
    }

    /// The plugin's own words about its version.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn platform_version(&self) -> Result<String, Error> {
        let mut args = sys::TopologyPlatformVersion::new();
        args.topology = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: as above.
        Ok(unsafe { value::text(args.version, args.version_size) })
    }

    /// The devices it describes.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn devices(&self) -> Result<Vec<DeviceDescription>, Error> {
        let mut args = sys::TopologyDevices::new();
        args.topology = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; the list lives as long as the topology.
        let raw = unsafe { value::slice(args.descriptions, args.num_descriptions) };
        raw.iter().map(|&raw| device::read_description(&self.plugin, raw)).collect()
    }

    /// What else the plugin says of it.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn attributes(&self) -> Result<BTreeMap<String, Value>, Error> {
        let mut args = sys::TopologyAttributes::new();
        args.topology = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; they live as long as the topology.
        Ok(unsafe { value::from_raw(args.attributes, args.num_attributes) })
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if self.owner.is_none() {
            let mut args = sys::TopologyDestroy::new();
            args.topology = self.raw;
            // There is nobody to tell.
            let _ = self.plugin.call(&mut args);
        }
    }
}

impl std::fmt::Debug for Topology {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Topology({})", self.platform_name().unwrap_or_default())
    }
}

/// Whether a plugin is Google's TPU library, by its file name.
pub(super) fn is_libtpu(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("libtpu"))
}

/// Whether this machine has TPUs: `XLA_ON_TPU_VM` says so where it is set (`0` or nothing: no), else the PCI bus, where
/// Google's TPUs stand with these numbers (JAX, `hardware_utils.py`).
pub fn on_tpu_vm() -> bool {
    match std::env::var_os("XLA_ON_TPU_VM") {
        Some(said) => !said.is_empty() && said != "0",
        None => has_tpu(Path::new("/sys/bus/pci/devices")),
    }
}

/// Looks for TPUs among the PCI devices of a folder.
fn has_tpu(devices: &Path) -> bool {
    const GOOGLE: &str = "0x1ae0";
    /// v2 and v3, v4, v5p, v5e, v6e, v7x.
    const TPUS: [&str; 6] = ["0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"];
    let Ok(entries) = std::fs::read_dir(devices) else { return false };
    entries.flatten().any(|entry| {
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        read("vendor").trim() == GOOGLE && TPUS.contains(&read("device").trim())
    })
}

/// Keeps libtpu from looking for TPUs: it compiles for topologies and asks no metadata server.
///
/// Sets, where they are unset, `TPU_SKIP_MDS_QUERY`, `TPU_ACCELERATOR_TYPE`, `TPU_WORKER_ID`,
/// `TPU_WORKER_HOSTNAMES` and `ALLOW_MULTIPLE_LIBTPU_LOAD`. [`Plugin::load`] calls this for a file named `libtpu*`
/// unless this machine has TPUs ([`on_tpu_vm`]).
pub fn set_tpu_compile_environment() {
    if on_tpu_vm() {
        return;
    }
    set_env_default("TPU_SKIP_MDS_QUERY", "1");
    set_env_default("TPU_ACCELERATOR_TYPE", "v5litepod-4");
    set_env_default("TPU_WORKER_ID", "0");
    set_env_default("TPU_WORKER_HOSTNAMES", "localhost");
    set_env_default("ALLOW_MULTIPLE_LIBTPU_LOAD", "1");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tpu_is_not_a_network_card() {
        let bus = tempfile::tempdir().unwrap();
        let add = |slot: &str, vendor: &str, device: &str| {
            let folder = bus.path().join(slot);
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("vendor"), format!("{vendor}\n")).unwrap();
            std::fs::write(folder.join("device"), format!("{device}\n")).unwrap();
        };
        assert!(!has_tpu(&bus.path().join("nowhere")));
        // Google's network card, and another maker's device with a TPU's number
        add("0000:00:04.0", "0x1ae0", "0x0042");
        add("0000:00:05.0", "0x8086", "0x0063");
        assert!(!has_tpu(bus.path()));
        add("0000:00:06.0", "0x1ae0", "0x0063");
        assert!(has_tpu(bus.path()));
    }
}
