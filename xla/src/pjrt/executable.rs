//! Compiled programs: what they need, what they cost, and running them.

use super::buffer::Buffer;
use super::client::Client;
use super::device::Device;
use super::element;
use super::error::Error;
use super::plugin::Plugin;
use super::sys::{self, Arguments};
use super::value::{self, Value};
use crate::DType;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

/// Element type and axes of an array.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Its element type.
    pub dtype: DType,
    /// Its axes, major to minor.
    pub dims: Vec<usize>,
}

impl Shape {
    pub(super) fn from_raw(element_type: i32, dims: &[i64]) -> Result<Shape, Error> {
        let dtype = element::from_raw(element_type).ok_or_else(|| {
            Error::invalid(format!("an array has the PJRT element type {element_type}, which is not supported here"))
        })?;
        let dims = dims.iter().map(|&d| usize::try_from(d)).collect::<Result<Vec<_>, _>>();
        let dims = dims.map_err(|_| Error::invalid("an array has an axis of unknown size, which is not supported"))?;
        Ok(Shape { dtype, dims })
    }

    pub(super) fn dims_i64(&self) -> Vec<i64> {
        self.dims.iter().map(|&d| d as i64).collect()
    }
}

/// A compiled program that is not necessarily loaded onto devices.
pub struct Executable {
    plugin: Plugin,
    raw: *mut sys::RawExecutable,
    // A loaded program's client, which must outlive the program.
    _client: Option<Client>,
}

// SAFETY: PJRT executables may be queried and destroyed from any thread.
unsafe impl Send for Executable {}
// SAFETY: as above; nothing changes them.
unsafe impl Sync for Executable {}

/// Memory that a program takes on one device, in bytes, as the compiler planned it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CompiledMemoryStats {
    pub generated_code: i64,
    pub argument: i64,
    pub output: i64,
    /// The part of the outputs that reuses arguments (donation).
    pub alias: i64,
    pub temp: i64,
    /// The most that is in use at one time; 0 where the plugin does not say.
    pub peak: i64,
    pub host_generated_code: i64,
    pub host_argument: i64,
    pub host_output: i64,
    pub host_alias: i64,
    pub host_temp: i64,
}

/// A program after the compiler's passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptimizedProgram {
    /// `hlo` or `hlo_with_config` (serialized protos), or `mlir`.
    pub format: String,
    /// The program in that format.
    pub bytes: Vec<u8>,
}

impl Executable {
    pub(super) fn from_raw(plugin: Plugin, raw: *mut sys::RawExecutable, client: Option<Client>) -> Self {
        Executable { plugin, raw, _client: client }
    }

    /// The module's name.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn name(&self) -> Result<String, Error> {
        let mut args = sys::ExecutableName::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; the text lives as long as the executable.
        Ok(unsafe { value::text(args.name, args.name_size) })
    }

    /// Copies of the program that run side by side on different data.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn num_replicas(&self) -> Result<usize, Error> {
        let mut args = sys::ExecutableNumReplicas::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        Ok(args.count)
    }

    /// Devices that share one copy of the program.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn num_partitions(&self) -> Result<usize, Error> {
        let mut args = sys::ExecutableNumPartitions::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        Ok(args.count)
    }

    /// Outputs per device.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn num_outputs(&self) -> Result<usize, Error> {
        let mut args = sys::ExecutableNumOutputs::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        Ok(args.count)
    }

    /// Bytes of machine code; 0 or -1 where the plugin does not know.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn code_size(&self) -> Result<i64, Error> {
        let mut args = sys::ExecutableCodeSize::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        Ok(args.bytes)
    }

    /// Shapes of the outputs, those of one device where the program is partitioned.
    ///
    /// # Errors
    /// The plugin cannot say, or an output has an element type that is not supported here.
    pub fn outputs(&self) -> Result<Vec<Shape>, Error> {
        let mut types = sys::ExecutableOutputTypes::new();
        types.executable = self.raw;
        self.plugin.call(&mut types)?;
        let mut dims = sys::ExecutableOutputDims::new();
        dims.executable = self.raw;
        self.plugin.call(&mut dims)?;
        // SAFETY: the plugin set these; they live as long as the executable, and `dims` has as many elements as the
        // ranks add up to.
        let (types, ranks, mut dims) = unsafe {
            let ranks = value::slice(dims.dim_sizes, dims.num_outputs);
            let total = ranks.iter().sum();
            (value::slice(types.types.cast_const(), types.num_types), ranks, value::slice(dims.dims, total))
        };
        let mut shapes = Vec::with_capacity(types.len());
        for (&element_type, &rank) in types.iter().zip(ranks) {
            let (shape, rest) = dims.split_at(rank);
            shapes.push(Shape::from_raw(element_type, shape)?);
            dims = rest;
        }
        Ok(shapes)
    }

    /// The compiler's memory plan for one device.
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn memory_stats(&self) -> Result<CompiledMemoryStats, Error> {
        let mut args = sys::ExecutableMemoryStats::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        Ok(CompiledMemoryStats {
            generated_code: args.generated_code,
            argument: args.argument,
            output: args.output,
            alias: args.alias,
            temp: args.temp,
            peak: args.peak_memory,
            host_generated_code: args.host_generated_code,
            host_argument: args.host_argument,
            host_output: args.host_output,
            host_alias: args.host_alias,
            host_temp: args.host_temp,
        })
    }

    /// The compiler's cost estimate by property, for instance `flops` and `bytes accessed`.
    ///
    /// # Errors
    /// The plugin has none.
    pub fn cost_analysis(&self) -> Result<BTreeMap<String, Value>, Error> {
        let mut args = sys::ExecutableCostAnalysis::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; they live as long as the executable.
        Ok(unsafe { value::from_raw(args.properties, args.num_properties) })
    }

    /// The program after the compiler's passes.
    ///
    /// # Errors
    /// The plugin does not give it.
    pub fn optimized_program(&self) -> Result<OptimizedProgram, Error> {
        let mut program = sys::Program {
            struct_size: size_of::<sys::Program>(),
            extension_start: std::ptr::null_mut(),
            code: std::ptr::null_mut(),
            code_size: 0,
            format: std::ptr::null(),
            format_size: 0,
            reserved: [0; 4],
        };
        let mut args = sys::ExecutableOptimizedProgram::new();
        args.executable = self.raw;
        args.program = &mut program;
        // The first call tells the size, the second fills the buffer.
        self.plugin.call(&mut args)?;
        // SAFETY: `program` is ours and was filled by the call.
        let mut bytes = vec![0u8; unsafe { (*args.program).code_size }];
        // SAFETY: as above.
        unsafe { (*args.program).code = bytes.as_mut_ptr() };
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; the text is a constant of the plugin.
        let format = unsafe { value::text(program.format, program.format_size) };
        Ok(OptimizedProgram { format, bytes })
    }

    /// A fingerprint of the program, its options and the compiler: equal inputs give equal fingerprints.
    ///
    /// # Errors
    /// The plugin has none.
    pub fn fingerprint(&self) -> Result<Vec<u8>, Error> {
        let mut args = sys::ExecutableFingerprint::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; they live as long as the executable.
        Ok(unsafe { value::slice(args.fingerprint, args.fingerprint_size) }.to_vec())
    }

    /// The program in a form that [`Client::deserialize`] of the same plugin build on the same kind of machine
    /// loads.
    ///
    /// # Errors
    /// The plugin cannot serialize it.
    pub fn serialize(&self) -> Result<Vec<u8>, Error> {
        let mut args = sys::ExecutableSerialize::new();
        args.executable = self.raw;
        self.plugin.call(&mut args)?;
        // SAFETY: the plugin set both; they live until the deleter is called.
        let bytes = unsafe { value::slice(args.bytes, args.bytes_size) }.to_vec();
        if let Some(delete) = args.deleter {
            // SAFETY: the plugin's own deleter for its own object, called once.
            unsafe { delete(args.backing) };
        }
        Ok(bytes)
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        let mut args = sys::ExecutableDestroy::new();
        args.executable = self.raw;
        // There is nobody to tell.
        let _ = self.plugin.call(&mut args);
    }
}

impl std::fmt::Debug for Executable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Executable({})", self.name().unwrap_or_default())
    }
}

/// A compiled program on its devices, ready to run.
pub struct LoadedExecutable {
    client: Client,
    raw: *mut sys::RawLoaded,
    program: Executable,
    num_outputs: usize,
    num_devices: usize,
    /// Shapes of the outputs where one device makes them whole.
    outputs: Option<Vec<Arc<Shape>>>,
}

// SAFETY: PJRT loaded executables may be run, queried and destroyed from any thread.
unsafe impl Send for LoadedExecutable {}
// SAFETY: as above.
unsafe impl Sync for LoadedExecutable {}

/// Choices of one execution.
#[derive(Clone, Debug, Default)]
pub struct ExecuteOptions {
    /// Arguments that keep their contents although the program would take them over.
    pub non_donatable: Vec<usize>,
    /// Names a launch of a program over several processes; 0 for none.
    pub launch_id: i32,
}

impl LoadedExecutable {
    /// Takes over a loaded executable of the plugin.
    pub(super) fn from_raw(client: &Client, raw: *mut sys::RawLoaded) -> Result<Self, Error> {
        let mut args = sys::LoadedGetExecutable::new();
        args.loaded = raw;
        if let Err(e) = client.plugin().call(&mut args) {
            destroy(client.plugin(), raw);
            return Err(e);
        }
        let program = Executable::from_raw(*client.plugin(), args.executable, Some(client.clone()));
        // From here on a failure drops what was made so far.
        let mut loaded =
            LoadedExecutable { client: client.clone(), raw, program, num_outputs: 0, num_devices: 0, outputs: None };
        loaded.num_outputs = loaded.program.num_outputs()?;
        loaded.num_devices = loaded.raw_devices()?.len();
        if loaded.num_devices == 1 {
            // A plugin that does not tell is asked again, buffer by buffer, after each execution.
            let shapes = loaded.program.outputs().ok().filter(|s| s.len() == loaded.num_outputs);
            loaded.outputs = shapes.map(|s| s.into_iter().map(Arc::new).collect());
        }
        Ok(loaded)
    }

    fn raw_devices(&self) -> Result<&[*mut sys::RawDevice], Error> {
        let mut args = sys::LoadedDevices::new();
        args.executable = self.raw;
        self.client.plugin().call(&mut args)?;
        // SAFETY: the plugin set both; the list lives as long as the executable.
        Ok(unsafe { value::slice(args.devices, args.num_devices) })
    }

    /// The client it is loaded on.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The devices of this process that it runs on, in the order of
    /// [`execute_sharded`](LoadedExecutable::execute_sharded).
    ///
    /// # Errors
    /// The plugin cannot say.
    pub fn addressable_devices(&self) -> Result<Vec<Device>, Error> {
        let raw = self.raw_devices()?;
        Ok(raw.iter().filter_map(|&raw| self.client.device_of(raw)).collect())
    }

    /// Runs the program on its one device and returns its outputs, which may still be being made.
    ///
    /// Arguments that the program declares donated are deleted by this, whether or not it then fails.
    ///
    /// # Errors
    /// Wrong number, shape or device of arguments, a deleted argument, or what the program says where it fails at
    /// once. Later failures come back from the outputs.
    pub fn execute(&self, args: &[&Buffer]) -> Result<Vec<Buffer>, Error> {
        self.execute_with(args, &ExecuteOptions::default())
    }

    /// [`execute`](LoadedExecutable::execute) with options.
    ///
    /// # Errors
    /// As for [`execute`](LoadedExecutable::execute).
    pub fn execute_with(&self, args: &[&Buffer], options: &ExecuteOptions) -> Result<Vec<Buffer>, Error> {
        if self.num_devices != 1 {
            return Err(Error::invalid(format!(
                "the program runs on {} devices: use execute_sharded with one list of arguments for each",
                self.num_devices
            )));
        }
        let arguments = self.raw_arguments(args)?;
        let mut outputs = vec![std::ptr::null_mut(); self.num_outputs];
        self.run(&[arguments.as_ptr()], args.len(), &[outputs.as_mut_ptr()], options)?;
        self.take_outputs(&outputs)
    }

    /// Runs the program on all its devices: one list of arguments per device in, one list of outputs per device out,
    /// in the order of [`addressable_devices`](LoadedExecutable::addressable_devices).
    ///
    /// # Errors
    /// As for [`execute`](LoadedExecutable::execute), and where the number of lists is not the number of devices.
    pub fn execute_sharded(&self, args: &[Vec<&Buffer>]) -> Result<Vec<Vec<Buffer>>, Error> {
        self.execute_sharded_with(args, &ExecuteOptions::default())
    }

    /// [`execute_sharded`](LoadedExecutable::execute_sharded) with options.
    ///
    /// # Errors
    /// As for [`execute_sharded`](LoadedExecutable::execute_sharded).
    pub fn execute_sharded_with(
        &self,
        args: &[Vec<&Buffer>],
        options: &ExecuteOptions,
    ) -> Result<Vec<Vec<Buffer>>, Error> {
        let num_args = args.first().map_or(0, Vec::len);
        if args.len() != self.num_devices || args.iter().any(|a| a.len() != num_args) {
            return Err(Error::invalid(format!(
                "the program runs on {} devices and needs as many lists of arguments, all of one length; found lists \
                 of lengths {:?}",
                self.num_devices,
                args.iter().map(Vec::len).collect::<Vec<_>>()
            )));
        }
        let arguments = args.iter().map(|a| self.raw_arguments(a)).collect::<Result<Vec<_>, _>>()?;
        let lists: Vec<_> = arguments.iter().map(|a| a.as_ptr()).collect();
        let mut outputs = vec![vec![std::ptr::null_mut(); self.num_outputs]; self.num_devices];
        let output_lists: Vec<_> = outputs.iter_mut().map(|o| o.as_mut_ptr()).collect();
        self.run(&lists, num_args, &output_lists, options)?;
        // Every buffer is taken over before the first error is returned, so that none leaks.
        let taken: Vec<_> = outputs.iter().map(|o| self.take_outputs(o)).collect();
        taken.into_iter().collect()
    }

    fn raw_arguments(&self, args: &[&Buffer]) -> Result<Vec<*mut sys::RawBuffer>, Error> {
        let raw = |(i, buffer): (usize, &&Buffer)| {
            if buffer.client().same(&self.client) {
                Ok(buffer.raw())
            } else {
                Err(Error::invalid(format!("argument {i} belongs to another client than the program")))
            }
        };
        args.iter().enumerate().map(raw).collect()
    }

    /// `arguments` and `outputs` have one list per device, of `num_args` and of `self.num_outputs` elements.
    fn run(
        &self,
        arguments: &[*const *mut sys::RawBuffer],
        num_args: usize,
        outputs: &[*mut *mut sys::RawBuffer],
        options: &ExecuteOptions,
    ) -> Result<(), Error> {
        let keep: Vec<i64> = options.non_donatable.iter().map(|&i| i as i64).collect();
        let mut raw_options = sys::ExecuteOptions {
            struct_size: size_of::<sys::ExecuteOptions>(),
            extension_start: std::ptr::null_mut(),
            send_callbacks: std::ptr::null_mut(),
            recv_callbacks: std::ptr::null_mut(),
            num_send_ops: 0,
            num_recv_ops: 0,
            launch_id: options.launch_id,
            non_donatable_input_indices: keep.as_ptr(),
            num_non_donatable_input_indices: keep.len(),
            context: std::ptr::null_mut(),
            call_location: std::ptr::null(),
            num_tasks: 0,
            task_ids: std::ptr::null_mut(),
            incarnation_ids: std::ptr::null_mut(),
            multi_slice_config: std::ptr::null_mut(),
            use_major_to_minor_data_layout_for_callbacks: false,
            hlo_output_callbacks: std::ptr::null_mut(),
            num_hlo_output_callbacks: 0,
            reserved: [0; 4],
        };
        let mut args = sys::LoadedExecute::new();
        args.executable = self.raw;
        args.options = &mut raw_options;
        args.argument_lists = arguments.as_ptr();
        args.num_devices = arguments.len();
        args.num_args = num_args;
        args.output_lists = outputs.as_ptr();
        self.client.plugin().call(&mut args)
    }

    /// Takes over the outputs of one device.
    fn take_outputs(&self, raw: &[*mut sys::RawBuffer]) -> Result<Vec<Buffer>, Error> {
        if let Some(shapes) = &self.outputs {
            let pairs = raw.iter().zip(shapes);
            return Ok(pairs.map(|(&raw, shape)| Buffer::from_raw(&self.client, raw, shape.clone())).collect());
        }
        let taken: Vec<_> = raw.iter().map(|&raw| Buffer::adopt(&self.client, raw)).collect();
        taken.into_iter().collect()
    }
}

impl Deref for LoadedExecutable {
    type Target = Executable;

    fn deref(&self) -> &Executable {
        &self.program
    }
}

impl Drop for LoadedExecutable {
    fn drop(&mut self) {
        destroy(self.client.plugin(), self.raw);
    }
}

impl std::fmt::Debug for LoadedExecutable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LoadedExecutable({} on {} devices)", self.name().unwrap_or_default(), self.num_devices)
    }
}

fn destroy(plugin: &Plugin, raw: *mut sys::RawLoaded) {
    let mut args = sys::LoadedDestroy::new();
    args.executable = raw;
    // There is nobody to tell.
    let _ = plugin.call(&mut args);
}
