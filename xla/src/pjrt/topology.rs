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

/// Keeps libtpu from looking for TPUs: it compiles for topologies and asks no metadata server.
///
/// Sets, where they are unset, `TPU_SKIP_MDS_QUERY`, `TPU_ACCELERATOR_TYPE`, `TPU_WORKER_ID`,
/// `TPU_WORKER_HOSTNAMES` and `ALLOW_MULTIPLE_LIBTPU_LOAD`. [`Plugin::load`] calls this for a file named `libtpu*`
/// unless `XLA_ON_TPU_VM` is set to a value other than `0`, with which a user says that this machine has TPUs.
pub fn set_tpu_compile_environment() {
    let on_tpu_vm = std::env::var_os("XLA_ON_TPU_VM").is_some_and(|v| !v.is_empty() && v != "0");
    if on_tpu_vm {
        return;
    }
    set_env_default("TPU_SKIP_MDS_QUERY", "1");
    set_env_default("TPU_ACCELERATOR_TYPE", "v5litepod-4");
    set_env_default("TPU_WORKER_ID", "0");
    set_env_default("TPU_WORKER_HOSTNAMES", "localhost");
    set_env_default("ALLOW_MULTIPLE_LIBTPU_LOAD", "1");
}
