//! Arrays on a device.

use super::client::Client;
use super::device::Device;
use super::element::{self, Element};
use super::error::Error;
use super::event::Event;
use super::executable::Shape;
use super::sys::{self, Arguments};
use super::value;
use crate::DType;
use std::sync::Arc;

/// An array on a device. Dropping it frees the memory once pending work that uses it is done.
///
/// A buffer that a program donated (or that was [deleted](Buffer::delete)) keeps its dtype and shape but has no
/// contents: reading it or passing it to another execution is an error.
pub struct Buffer {
    client: Client,
    raw: *mut sys::RawBuffer,
    shape: Arc<Shape>,
}

// SAFETY: PJRT buffers may be used and destroyed from any thread.
unsafe impl Send for Buffer {}
// SAFETY: as above; deletion through `&self` is synchronised by the plugin.
unsafe impl Sync for Buffer {}

/// Host memory to upload.
#[derive(Clone)]
pub enum HostData<'a> {
    /// Copied during the call.
    Borrowed(&'a [u8]),
    /// Kept alive and, where the plugin can, used in place.
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl HostData<'_> {
    /// The memory.
    pub fn bytes(&self) -> &[u8] {
        match self {
            HostData::Borrowed(bytes) => bytes,
            HostData::Shared(owner) => (**owner).as_ref(),
        }
    }

    /// Gives the memory back to its owner when the plugin says that it is done with it.
    pub(super) fn keep_until(self, client: &Client, done: *mut sys::RawEvent) -> Result<(), Error> {
        let done = Event::from_raw(client, done);
        let HostData::Shared(owner) = self else { return Ok(()) };
        match done {
            Some(done) => done.on_ready(move |_| drop(owner)),
            None => {
                // No event, no way to know: the device may read the memory for as long as it likes.
                std::mem::forget(owner);
                Ok(())
            }
        }
    }
}

impl Buffer {
    /// Takes over a buffer of the plugin.
    pub(super) fn from_raw(client: &Client, raw: *mut sys::RawBuffer, shape: Arc<Shape>) -> Buffer {
        Buffer { client: client.clone(), raw, shape }
    }

    /// Takes over a buffer of the plugin and asks it for its shape.
    pub(super) fn adopt(client: &Client, raw: *mut sys::RawBuffer) -> Result<Buffer, Error> {
        let placeholder = Arc::new(Shape { dtype: DType::U8, dims: Vec::new() });
        // From here on a failure drops the buffer.
        let mut buffer = Buffer::from_raw(client, raw, placeholder);
        let plugin = client.plugin();
        let mut element_type = sys::BufferElementType::new();
        element_type.buffer = raw;
        plugin.call(&mut element_type)?;
        let mut dims = sys::BufferDimensions::new();
        dims.buffer = raw;
        plugin.call(&mut dims)?;
        // SAFETY: the plugin set both; the dimensions live as long as the buffer.
        let dims = unsafe { value::slice(dims.dims, dims.num_dims) };
        buffer.shape = Arc::new(Shape::from_raw(element_type.element_type, dims)?);
        Ok(buffer)
    }

    pub(super) fn raw(&self) -> *mut sys::RawBuffer {
        self.raw
    }

    /// The client it belongs to.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.shape.dtype
    }

    /// Its shape.
    pub fn dims(&self) -> &[usize] {
        &self.shape.dims
    }

    /// Bytes of its host form: dense, row-major, one byte per value for 4-bit types and `pred`.
    pub fn host_size(&self) -> usize {
        element::byte_size(self.shape.dtype, &self.shape.dims).expect("a shape that exists does not overflow")
    }

    /// The device that holds it.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn device(&self) -> Result<Device, Error> {
        let mut args = sys::BufferDevice::new();
        args.buffer = self.raw;
        self.client.plugin().call(&mut args)?;
        self.client.device_of(args.device).ok_or_else(|| Error::invalid("the buffer's device is not the client's"))
    }

    /// Bytes it takes on the device, padding included.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn on_device_size(&self) -> Result<usize, Error> {
        let mut args = sys::BufferOnDeviceSize::new();
        args.buffer = self.raw;
        self.client.plugin().call(&mut args)?;
        Ok(args.bytes)
    }

    /// Frees the device memory once pending work that uses it is done. Deleting twice is harmless.
    ///
    /// # Errors
    /// The plugin refused.
    pub fn delete(&self) -> Result<(), Error> {
        let mut args = sys::BufferDelete::new();
        args.buffer = self.raw;
        self.client.plugin().call(&mut args)
    }

    /// True after [`Buffer::delete`] and after a program took the buffer over (donation).
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn is_deleted(&self) -> Result<bool, Error> {
        let mut args = sys::BufferIsDeleted::new();
        args.buffer = self.raw;
        self.client.plugin().call(&mut args)?;
        Ok(args.is_deleted)
    }

    /// The event of its contents being there, or of the work that makes them having failed. For a deleted or donated
    /// buffer either this or the event is an error.
    ///
    /// # Errors
    /// The plugin cannot watch the buffer.
    pub fn ready(&self) -> Result<Event, Error> {
        let mut args = sys::BufferReadyEvent::new();
        args.buffer = self.raw;
        self.client.plugin().call(&mut args)?;
        Event::from_raw(&self.client, args.event)
            .ok_or_else(|| Error::invalid("the plugin gave no event for a buffer to be ready"))
    }

    /// A copy on another device of the same client.
    ///
    /// # Errors
    /// The device already holds the buffer, or is another client's; the buffer is deleted.
    pub fn copy_to_device(&self, device: &Device) -> Result<Buffer, Error> {
        if !device.client().same(&self.client) {
            return Err(Error::invalid(format!("{device:?} belongs to another client than the buffer")));
        }
        let mut args = sys::BufferCopyToDevice::new();
        args.buffer = self.raw;
        args.device = device.raw();
        self.client.plugin().call(&mut args)?;
        Ok(Buffer::from_raw(&self.client, args.copy, self.shape.clone()))
    }

    /// Its contents as dense row-major bytes in the machine's byte order. Waits for pending work.
    ///
    /// # Errors
    /// The work that makes the contents failed, or the buffer is deleted or donated.
    pub fn to_host(&self) -> Result<Vec<u8>, Error> {
        self.read(self.host_size())
    }

    /// Its contents as values. Waits for pending work.
    ///
    /// # Errors
    /// `T` is not the buffer's element type; otherwise as for [`Buffer::to_host`].
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>, Error> {
        if T::DTYPE != self.shape.dtype {
            return Err(Error::invalid(format!(
                "the buffer holds {}{:?}, and {} was asked for",
                self.shape.dtype,
                self.shape.dims,
                T::DTYPE
            )));
        }
        self.read(self.host_size() / size_of::<T>())
    }

    /// Starts the copy of the contents to the host; [`HostRead::wait`] ends it.
    ///
    /// # Errors
    /// The buffer is deleted or donated.
    pub fn to_host_async(&self) -> Result<HostRead, Error> {
        let len = self.host_size();
        let mut data = Vec::with_capacity(len);
        // SAFETY: `HostRead` keeps `data` alive and unmoved until the copy is done, even when it is dropped.
        let event = unsafe { self.start_read(data.as_mut_ptr(), len) }?;
        Ok(HostRead { event, data, len })
    }

    /// Reads `count` values of `T`, together `host_size()` bytes.
    fn read<T: Element>(&self, count: usize) -> Result<Vec<T>, Error> {
        let mut data: Vec<T> = Vec::with_capacity(count);
        // SAFETY: the capacity is the array's size, and `data` outlives the wait that follows.
        let event = unsafe { self.start_read(data.as_mut_ptr().cast::<u8>(), size_of::<T>() * count) }?;
        if let Some(event) = event {
            event.wait()?;
        }
        if T::DTYPE == DType::Pred {
            // SAFETY: the copy is done; a value other than 0 and 1 would not be a bool.
            unsafe { normalise(data.as_mut_ptr().cast::<u8>(), count) };
        }
        // SAFETY: the copy wrote all `count` values.
        unsafe { data.set_len(count) };
        Ok(data)
    }

    /// Starts a copy to `dst` in dense row-major order.
    ///
    /// # Safety
    /// `dst` has room for `size` bytes and stays valid until the event is ready.
    unsafe fn start_read(&self, dst: *mut u8, size: usize) -> Result<Option<Event>, Error> {
        let rank = self.shape.dims.len();
        let minor_to_major: [i64; MAX_RANK] = std::array::from_fn(|i| rank as i64 - 1 - i as i64);
        if rank > MAX_RANK {
            return Err(Error::invalid(format!("cannot read an array of {rank} axes, at most {MAX_RANK}")));
        }
        // The device may keep the array in another order, so the host's is always named.
        let mut layout = sys::MemoryLayout {
            struct_size: size_of::<sys::MemoryLayout>(),
            extension_start: std::ptr::null_mut(),
            tiled: sys::TiledLayout {
                struct_size: size_of::<sys::TiledLayout>(),
                extension_start: std::ptr::null_mut(),
                minor_to_major: minor_to_major.as_ptr(),
                minor_to_major_size: rank,
                tile_dims: std::ptr::null(),
                tile_dim_sizes: std::ptr::null(),
                num_tiles: 0,
            },
            kind: 0,
        };
        let mut args = sys::BufferToHost::new();
        args.buffer = self.raw;
        args.host_layout = &mut layout;
        args.dst = dst.cast();
        args.dst_size = size;
        self.client.plugin().call(&mut args)?;
        Ok(Event::from_raw(&self.client, args.event))
    }
}

/// More axes than any program here has.
const MAX_RANK: usize = 32;

/// Turns every byte that is not 0 into 1.
///
/// # Safety
/// `data` points to `count` initialised bytes.
unsafe fn normalise(data: *mut u8, count: usize) {
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts_mut(data, count) };
    bytes.iter_mut().for_each(|b| *b = u8::from(*b != 0));
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut args = sys::BufferDestroy::new();
        args.buffer = self.raw;
        // There is nobody to tell.
        let _ = self.client.plugin().call(&mut args);
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({}{:?})", self.shape.dtype, self.shape.dims)
    }
}

/// A copy to the host that is on its way. Dropping it waits for the copy.
#[derive(Debug)]
pub struct HostRead {
    event: Option<Event>,
    data: Vec<u8>,
    len: usize,
}

impl HostRead {
    /// True once [`HostRead::wait`] will not block.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn is_ready(&self) -> Result<bool, Error> {
        self.event.as_ref().map_or(Ok(true), Event::is_ready)
    }

    /// Waits for the bytes: dense, row-major.
    ///
    /// # Errors
    /// The work that makes the contents failed.
    pub fn wait(mut self) -> Result<Vec<u8>, Error> {
        if let Some(event) = self.event.take() {
            event.wait()?;
        }
        // SAFETY: the copy is done and wrote `len` bytes, which is the capacity that was asked for.
        unsafe { self.data.set_len(self.len) };
        Ok(std::mem::take(&mut self.data))
    }
}

impl Drop for HostRead {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            // The plugin may be writing into `data`; only when the event is over is it ours to free.
            let _ = event.wait();
        }
    }
}
