//! A client: the devices of a plugin, what is compiled for them, and the arrays on them.

use super::buffer::{Buffer, HostData};
use super::device::{self, Device, DeviceRecord};
use super::element::{self, Element};
use super::error::Error;
use super::executable::{LoadedExecutable, Shape};
use super::key_value::{Callbacks, KeyValueStore};
use super::options::CompileOptions;
use super::plugin::Plugin;
use super::sys::{self, Arguments};
use super::topology::Topology;
use super::value::{self, Value};
use crate::DType;
use std::sync::Arc;

/// A cheap handle; the client is destroyed when the last handle, buffer, executable and event of it are gone.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    plugin: Plugin,
    raw: *mut sys::RawClient,
    platform_name: String,
    platform_version: String,
    process_index: i32,
    devices: Vec<DeviceRecord>,
    /// Dropped after `drop` has destroyed the client: the plugin may call back as long as the client lives.
    _callbacks: Option<Callbacks>,
}

// SAFETY: PJRT clients accept calls from any thread; the device pointers are owned by the client and constant.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing in it changes after it is made.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut args = sys::ClientDestroy::new();
        args.client = self.raw;
        // There is nobody to tell.
        let _ = self.plugin.call(&mut args);
    }
}

impl Client {
    pub(super) fn create(
        plugin: Plugin,
        options: &[(&str, Value)],
        store: Option<Arc<dyn KeyValueStore>>,
    ) -> Result<Client, Error> {
        let raw_options = value::to_raw(options);
        let callbacks = store.map(Callbacks::new);
        let mut args = sys::ClientCreate::new();
        args.create_options = raw_options.as_ptr();
        args.num_options = raw_options.len();
        if let Some(callbacks) = &callbacks {
            callbacks.give_to(&mut args);
        }
        plugin.call(&mut args)?;
        // From here on a failure drops `inner`, which destroys the client.
        let mut inner = Inner {
            plugin,
            raw: args.client,
            platform_name: String::new(),
            platform_version: String::new(),
            process_index: 0,
            devices: Vec::new(),
            _callbacks: callbacks,
        };
        let mut args = sys::ClientPlatformName::new();
        args.client = inner.raw;
        plugin.call(&mut args)?;
        // SAFETY: the plugin set both; the text lives as long as the client.
        inner.platform_name = unsafe { value::text(args.name, args.name_size) };
        let mut args = sys::ClientPlatformVersion::new();
        args.client = inner.raw;
        plugin.call(&mut args)?;
        // SAFETY: as above.
        inner.platform_version = unsafe { value::text(args.version, args.version_size) };
        let mut args = sys::ClientProcessIndex::new();
        args.client = inner.raw;
        plugin.call(&mut args)?;
        inner.process_index = args.process_index;
        let mut args = sys::ClientDevices::new();
        args.client = inner.raw;
        plugin.call(&mut args)?;
        // SAFETY: as above.
        let devices = unsafe { value::slice(args.devices, args.num_devices) };
        inner.devices = devices.iter().map(|&raw| device::read_record(&plugin, raw)).collect::<Result<_, _>>()?;
        Ok(Client(Arc::new(inner)))
    }

    /// The plugin this client came from.
    pub fn plugin(&self) -> &Plugin {
        &self.0.plugin
    }

    pub(super) fn raw(&self) -> *mut sys::RawClient {
        self.0.raw
    }

    pub(super) fn records(&self) -> &[DeviceRecord] {
        &self.0.devices
    }

    pub(super) fn same(&self, other: &Client) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// `cpu`, `cuda`, `tpu`, …
    pub fn platform_name(&self) -> &str {
        &self.0.platform_name
    }

    /// The plugin's own words, for instance a CUDA or libtpu version.
    pub fn platform_version(&self) -> &str {
        &self.0.platform_version
    }

    /// This process's place in a multi-process program; 0 otherwise.
    pub fn process_index(&self) -> i32 {
        self.0.process_index
    }

    /// All devices, those of other processes included.
    pub fn devices(&self) -> Vec<Device> {
        (0..self.0.devices.len()).map(|i| Device::new(self, i)).collect()
    }

    /// The devices that this process can use.
    pub fn addressable_devices(&self) -> Vec<Device> {
        self.devices().into_iter().filter(Device::is_addressable).collect()
    }

    pub(super) fn device_of(&self, raw: *mut sys::RawDevice) -> Option<Device> {
        self.0.devices.iter().position(|d| d.raw == raw).map(|i| Device::new(self, i))
    }

    /// A description of the client's devices that can be compiled for.
    ///
    /// # Errors
    /// The plugin has no topologies.
    pub fn topology(&self) -> Result<Topology, Error> {
        Topology::of_client(self)
    }

    /// Compiles StableHLO text and loads the result onto the devices of the options.
    ///
    /// # Errors
    /// Options that contradict each other, or what the compiler says, with the position in the text.
    pub fn compile(&self, stablehlo: &str, options: &CompileOptions) -> Result<LoadedExecutable, Error> {
        let options = options.encode()?;
        let program = program(stablehlo);
        let mut args = sys::ClientCompile::new();
        args.client = self.raw();
        args.program = &program;
        args.options = options.as_ptr();
        args.options_size = options.len();
        self.plugin().call(&mut args)?;
        LoadedExecutable::from_raw(self, args.executable)
    }

    /// Loads what [`Executable::serialize`](super::Executable::serialize) gave, on the same plugin and kind of
    /// machine. FFI handlers that it calls must be registered before.
    ///
    /// # Errors
    /// The bytes are not such an executable. A plugin may check little: keep a hash beside bytes kept on disk.
    pub fn deserialize(&self, bytes: &[u8]) -> Result<LoadedExecutable, Error> {
        let mut args = sys::ExecutableDeserialize::new();
        args.client = self.raw();
        args.bytes = bytes.as_ptr();
        args.bytes_size = bytes.len();
        self.plugin().call(&mut args)?;
        LoadedExecutable::from_raw(self, args.loaded)
    }

    /// Makes an array on a device (the first addressable one by default) from dense row-major host data.
    ///
    /// [`HostData::Borrowed`] is copied before this returns. [`HostData::Shared`] is used in place where the plugin
    /// can (the CPU plugins: 64-byte aligned data) and kept alive until the plugin is done with it, which for data
    /// used in place is when the last user of the array is gone; its owner must not write to it meanwhile. 4-bit
    /// types and `pred` take one byte per value.
    ///
    /// # Errors
    /// The data's size is not that of the shape, the device is another client's, or the device is out of memory.
    pub fn upload(
        &self,
        data: HostData<'_>,
        dtype: DType,
        dims: &[usize],
        device: Option<&Device>,
    ) -> Result<Buffer, Error> {
        let bytes = data.bytes();
        let wanted = element::byte_size(dtype, dims);
        if wanted != Some(bytes.len()) {
            let wanted = wanted.map_or("more bytes than there are".to_owned(), |n| format!("{n} bytes"));
            return Err(Error::invalid(format!(
                "an array {dtype}{dims:?} has {wanted}, the host data {}",
                bytes.len()
            )));
        }
        let device = match device {
            Some(device) if !device.client().same(self) => {
                return Err(Error::invalid(format!("{device:?} belongs to another client than the upload's")));
            }
            Some(device) => device.raw(),
            None => match self.0.devices.iter().find(|d| d.addressable) {
                Some(record) => record.raw,
                None => return Err(Error::invalid("this client has no addressable device")),
            },
        };
        let shape = Shape { dtype, dims: dims.to_vec() };
        let raw_dims = shape.dims_i64();
        let mut args = sys::ClientBufferFromHost::new();
        args.client = self.raw();
        args.data = bytes.as_ptr().cast();
        args.element_type = element::to_raw(dtype);
        args.dims = raw_dims.as_ptr();
        args.num_dims = raw_dims.len();
        args.semantics = match data {
            HostData::Borrowed(_) => sys::COPY_DURING_CALL,
            HostData::Shared(_) => sys::ZERO_COPY,
        };
        args.device = device;
        self.plugin().call(&mut args)?;
        let buffer = Buffer::from_raw(self, args.buffer, Arc::new(shape));
        data.keep_until(self, args.done_with_host_buffer)?;
        Ok(buffer)
    }

    /// [`Client::upload`] of a slice, which is copied.
    ///
    /// # Errors
    /// As for [`Client::upload`].
    pub fn upload_slice<T: Element>(
        &self,
        data: &[T],
        dims: &[usize],
        device: Option<&Device>,
    ) -> Result<Buffer, Error> {
        self.upload(HostData::Borrowed(element::bytes_of(data)), T::DTYPE, dims, device)
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Client({}, {} devices)", self.platform_name(), self.0.devices.len())
    }
}

/// The C form of a program as text; it points into `stablehlo`, which the plugin only reads.
pub(super) fn program(stablehlo: &str) -> sys::Program {
    const FORMAT: &str = "mlir";
    sys::Program {
        struct_size: size_of::<sys::Program>(),
        extension_start: std::ptr::null_mut(),
        code: stablehlo.as_ptr().cast_mut(),
        code_size: stablehlo.len(),
        format: FORMAT.as_ptr(),
        format_size: FORMAT.len(),
        reserved: [0; 4],
    }
}
