//! Devices, their memories and statistics.

use super::client::Client;
use super::error::Error;
use super::plugin::Plugin;
use super::sys::{self, Arguments};
use super::value::{self, Value};
use std::collections::BTreeMap;

/// A device of a client.
#[derive(Clone)]
pub struct Device {
    client: Client,
    index: usize,
}

/// What a client reads of a device when it is made.
pub(super) struct DeviceRecord {
    pub(super) raw: *mut sys::RawDevice,
    pub(super) description: DeviceDescription,
    pub(super) local_hardware_id: i32,
    pub(super) addressable: bool,
}

/// What is known of a device whether it is present or only described by a topology.
#[derive(Clone, Debug)]
pub struct DeviceDescription {
    /// Unique among the devices of a client or topology.
    pub id: i32,
    /// The process that addresses it; 0 in a single-process program.
    pub process_index: i32,
    /// The vendor's name of this kind of device, for instance `TPU v5 lite`.
    pub kind: String,
    /// A line for a log.
    pub text: String,
    /// What else the plugin says, for instance `coords` and `core_on_chip`.
    pub attributes: BTreeMap<String, Value>,
}

/// A memory that a device can address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Unique among memories of this client.
    pub id: i32,
    /// For instance `device`, `pinned_host`, `unpinned_host`.
    pub kind: String,
}

/// Allocator statistics of a device, in bytes where not said otherwise; `None` where the plugin does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct MemoryStats {
    pub bytes_in_use: i64,
    pub peak_bytes_in_use: Option<i64>,
    /// A count.
    pub num_allocs: Option<i64>,
    pub largest_alloc_size: Option<i64>,
    pub bytes_limit: Option<i64>,
    pub bytes_reserved: Option<i64>,
    pub peak_bytes_reserved: Option<i64>,
    pub bytes_reservable_limit: Option<i64>,
    pub largest_free_block_bytes: Option<i64>,
    pub pool_bytes: Option<i64>,
    pub peak_pool_bytes: Option<i64>,
}

impl Device {
    pub(super) fn new(client: &Client, index: usize) -> Self {
        Device { client: client.clone(), index }
    }

    fn record(&self) -> &DeviceRecord {
        &self.client.records()[self.index]
    }

    pub(super) fn raw(&self) -> *mut sys::RawDevice {
        self.record().raw
    }

    /// The client it belongs to.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its id, unique among the client's devices.
    pub fn id(&self) -> i32 {
        self.record().description.id
    }

    /// The vendor's name of this kind of device.
    pub fn kind(&self) -> &str {
        &self.record().description.kind
    }

    /// All that the plugin says of the device.
    pub fn description(&self) -> &DeviceDescription {
        &self.record().description
    }

    /// The number the driver gives the device, -1 where it gives none.
    pub fn local_hardware_id(&self) -> i32 {
        self.record().local_hardware_id
    }

    /// Whether this process can use the device.
    pub fn is_addressable(&self) -> bool {
        self.record().addressable
    }

    /// Allocator statistics; `None` where the plugin keeps none.
    ///
    /// # Errors
    /// The plugin could not read them.
    pub fn memory_stats(&self) -> Result<Option<MemoryStats>, Error> {
        let mut args = sys::DeviceMemoryStats::new();
        args.device = self.raw();
        match self.client.plugin().call(&mut args) {
            Ok(()) => Ok(Some(MemoryStats {
                bytes_in_use: args.bytes_in_use,
                peak_bytes_in_use: args.peak_bytes_in_use.get(),
                num_allocs: args.num_allocs.get(),
                largest_alloc_size: args.largest_alloc_size.get(),
                bytes_limit: args.bytes_limit.get(),
                bytes_reserved: args.bytes_reserved.get(),
                peak_bytes_reserved: args.peak_bytes_reserved.get(),
                bytes_reservable_limit: args.bytes_reservable_limit.get(),
                largest_free_block_bytes: args.largest_free_block_bytes.get(),
                pool_bytes: args.pool_bytes.get(),
                peak_pool_bytes: args.peak_pool_bytes.get(),
            })),
            Err(e) if e.is_unsupported() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The memories the device can address.
    ///
    /// # Errors
    /// The plugin cannot list them.
    pub fn memories(&self) -> Result<Vec<Memory>, Error> {
        let plugin = self.client.plugin();
        let mut args = sys::DeviceMemories::new();
        args.device = self.raw();
        plugin.call(&mut args)?;
        // SAFETY: the plugin set both; the list lives as long as the device.
        let raw = unsafe { value::slice(args.memories, args.num_memories) };
        raw.iter()
            .map(|&memory| {
                let mut id = sys::MemoryId::new();
                id.memory = memory;
                plugin.call(&mut id)?;
                let mut kind = sys::MemoryKind::new();
                kind.memory = memory;
                plugin.call(&mut kind)?;
                // SAFETY: the plugin set both; the text lives as long as the memory.
                Ok(Memory { id: id.id, kind: unsafe { value::text(kind.kind, kind.kind_size) } })
            })
            .collect()
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({}: {})", self.id(), self.kind())
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        self.raw() == other.raw()
    }
}

impl Eq for Device {}

/// Reads what a client keeps of a device.
pub(super) fn read_record(plugin: &Plugin, raw: *mut sys::RawDevice) -> Result<DeviceRecord, Error> {
    let mut args = sys::DeviceGetDescription::new();
    args.device = raw;
    plugin.call(&mut args)?;
    let description = read_description(plugin, args.description)?;
    let mut args = sys::DeviceIsAddressable::new();
    args.device = raw;
    plugin.call(&mut args)?;
    let addressable = args.is_addressable;
    let mut args = sys::DeviceLocalHardwareId::new();
    args.device = raw;
    let local_hardware_id = plugin.call(&mut args).map_or(-1, |()| args.local_hardware_id);
    Ok(DeviceRecord { raw, description, local_hardware_id, addressable })
}

/// Reads a description; what the plugin does not give stays empty, except for the id.
pub(super) fn read_description(plugin: &Plugin, raw: *mut sys::RawDescription) -> Result<DeviceDescription, Error> {
    let mut id = sys::DescriptionId::new();
    id.description = raw;
    plugin.call(&mut id)?;
    let mut process = sys::DescriptionProcessIndex::new();
    process.description = raw;
    let process_index = plugin.call(&mut process).map_or(0, |()| process.process_index);
    let mut kind = sys::DescriptionKind::new();
    kind.description = raw;
    plugin.call(&mut kind)?;
    let mut text = sys::DescriptionDebugString::new();
    text.description = raw;
    plugin.call(&mut text)?;
    let mut attributes = sys::DescriptionAttributes::new();
    attributes.description = raw;
    plugin.call(&mut attributes)?;
    // SAFETY: the plugin set these; they live as long as the description.
    unsafe {
        Ok(DeviceDescription {
            id: id.id,
            process_index,
            kind: value::text(kind.kind, kind.kind_size),
            text: value::text(text.text, text.text_size),
            attributes: value::from_raw(attributes.attributes, attributes.num_attributes),
        })
    }
}
