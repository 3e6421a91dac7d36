//! Struct layouts and function table of `pjrt_c_api.h`, version 0.117. Nothing here calls anything.

use std::ffi::c_void;

/// Opaque objects of the plugin.
macro_rules! opaque {
    ($($name:ident),* $(,)?) => {
        $(#[repr(C)]
        pub(super) struct $name {
            _private: [u8; 0],
        })*
    };
}

opaque!(
    RawError,
    RawEvent,
    RawClient,
    RawDevice,
    RawMemory,
    RawDescription,
    RawTopology,
    RawExecutable,
    RawLoaded,
    RawBuffer,
    RawContext,
    RawBacking,
);

/// The head of every extension of the chain that starts at [`Api::extension_start`].
#[repr(C)]
pub(super) struct Extension {
    pub(super) struct_size: usize,
    pub(super) kind: i32,
    pub(super) next: *mut Extension,
}

/// `PJRT_Extension_Type_FFI`.
pub(super) const EXTENSION_FFI: i32 = 5;

#[repr(C)]
pub(super) struct ApiVersion {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) major: i32,
    pub(super) minor: i32,
}

/// The head of `PJRT_Api`; the function pointers named in [`TABLE`] follow it.
#[repr(C)]
pub(super) struct Api {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) version: ApiVersion,
}

/// Names of the function pointers after [`Api`], in table order. The order is fixed since version 0.57.
pub(super) const TABLE: [&str; 138] = [
    "PJRT_Error_Destroy",
    "PJRT_Error_Message",
    "PJRT_Error_GetCode",
    "PJRT_Plugin_Initialize",
    "PJRT_Plugin_Attributes",
    "PJRT_Event_Destroy",
    "PJRT_Event_IsReady",
    "PJRT_Event_Error",
    "PJRT_Event_Await",
    "PJRT_Event_OnReady",
    "PJRT_Client_Create",
    "PJRT_Client_Destroy",
    "PJRT_Client_PlatformName",
    "PJRT_Client_ProcessIndex",
    "PJRT_Client_PlatformVersion",
    "PJRT_Client_Devices",
    "PJRT_Client_AddressableDevices",
    "PJRT_Client_LookupDevice",
    "PJRT_Client_LookupAddressableDevice",
    "PJRT_Client_AddressableMemories",
    "PJRT_Client_Compile",
    "PJRT_Client_DefaultDeviceAssignment",
    "PJRT_Client_BufferFromHostBuffer",
    "PJRT_DeviceDescription_Id",
    "PJRT_DeviceDescription_ProcessIndex",
    "PJRT_DeviceDescription_Attributes",
    "PJRT_DeviceDescription_Kind",
    "PJRT_DeviceDescription_DebugString",
    "PJRT_DeviceDescription_ToString",
    "PJRT_Device_GetDescription",
    "PJRT_Device_IsAddressable",
    "PJRT_Device_LocalHardwareId",
    "PJRT_Device_AddressableMemories",
    "PJRT_Device_DefaultMemory",
    "PJRT_Device_MemoryStats",
    "PJRT_Memory_Id",
    "PJRT_Memory_Kind",
    "PJRT_Memory_DebugString",
    "PJRT_Memory_ToString",
    "PJRT_Memory_AddressableByDevices",
    "PJRT_Executable_Destroy",
    "PJRT_Executable_Name",
    "PJRT_Executable_NumReplicas",
    "PJRT_Executable_NumPartitions",
    "PJRT_Executable_NumOutputs",
    "PJRT_Executable_SizeOfGeneratedCodeInBytes",
    "PJRT_Executable_GetCostAnalysis",
    "PJRT_Executable_OutputMemoryKinds",
    "PJRT_Executable_OptimizedProgram",
    "PJRT_Executable_Serialize",
    "PJRT_LoadedExecutable_Destroy",
    "PJRT_LoadedExecutable_GetExecutable",
    "PJRT_LoadedExecutable_AddressableDevices",
    "PJRT_LoadedExecutable_Delete",
    "PJRT_LoadedExecutable_IsDeleted",
    "PJRT_LoadedExecutable_Execute",
    "PJRT_Executable_DeserializeAndLoad",
    "PJRT_LoadedExecutable_Fingerprint",
    "PJRT_Buffer_Destroy",
    "PJRT_Buffer_ElementType",
    "PJRT_Buffer_Dimensions",
    "PJRT_Buffer_UnpaddedDimensions",
    "PJRT_Buffer_DynamicDimensionIndices",
    "PJRT_Buffer_GetMemoryLayout",
    "PJRT_Buffer_OnDeviceSizeInBytes",
    "PJRT_Buffer_Device",
    "PJRT_Buffer_Memory",
    "PJRT_Buffer_Delete",
    "PJRT_Buffer_IsDeleted",
    "PJRT_Buffer_CopyToDevice",
    "PJRT_Buffer_ToHostBuffer",
    "PJRT_Buffer_IsOnCpu",
    "PJRT_Buffer_ReadyEvent",
    "PJRT_Buffer_UnsafePointer",
    "PJRT_Buffer_IncreaseExternalReferenceCount",
    "PJRT_Buffer_DecreaseExternalReferenceCount",
    "PJRT_Buffer_OpaqueDeviceMemoryDataPointer",
    "PJRT_CopyToDeviceStream_Destroy",
    "PJRT_CopyToDeviceStream_AddChunk",
    "PJRT_CopyToDeviceStream_TotalBytes",
    "PJRT_CopyToDeviceStream_GranuleSize",
    "PJRT_CopyToDeviceStream_CurrentBytes",
    "PJRT_TopologyDescription_Create",
    "PJRT_TopologyDescription_Destroy",
    "PJRT_TopologyDescription_PlatformName",
    "PJRT_TopologyDescription_PlatformVersion",
    "PJRT_TopologyDescription_GetDeviceDescriptions",
    "PJRT_TopologyDescription_Serialize",
    "PJRT_TopologyDescription_Attributes",
    "PJRT_Compile",
    "PJRT_Executable_OutputElementTypes",
    "PJRT_Executable_OutputDimensions",
    "PJRT_Buffer_CopyToMemory",
    "PJRT_Client_CreateViewOfDeviceBuffer",
    "PJRT_Executable_Fingerprint",
    "PJRT_Client_TopologyDescription",
    "PJRT_Executable_GetCompiledMemoryStats",
    "PJRT_Memory_Kind_Id",
    "PJRT_ExecuteContext_Create",
    "PJRT_ExecuteContext_Destroy",
    "PJRT_Buffer_CopyRawToHost",
    "PJRT_AsyncHostToDeviceTransferManager_Destroy",
    "PJRT_AsyncHostToDeviceTransferManager_TransferData",
    "PJRT_Client_CreateBuffersForAsyncHostToDevice",
    "PJRT_AsyncHostToDeviceTransferManager_RetrieveBuffer",
    "PJRT_AsyncHostToDeviceTransferManager_Device",
    "PJRT_AsyncHostToDeviceTransferManager_BufferCount",
    "PJRT_AsyncHostToDeviceTransferManager_BufferSize",
    "PJRT_AsyncHostToDeviceTransferManager_SetBufferError",
    "PJRT_AsyncHostToDeviceTransferManager_AddMetadata",
    "PJRT_Client_DmaMap",
    "PJRT_Client_DmaUnmap",
    "PJRT_Client_CreateUninitializedBuffer",
    "PJRT_Client_UpdateGlobalProcessInfo",
    "PJRT_TopologyDescription_Deserialize",
    "PJRT_Client_CreateAliasBuffer",
    "PJRT_Client_FulfillAliasBuffer",
    "PJRT_LoadedExecutable_GetDeviceAssignment",
    "PJRT_Client_CreateErrorBuffer",
    "PJRT_AsyncHostToDeviceTransferManager_TransferLiteral",
    "PJRT_Buffer_CopyRawToHostFuture",
    "PJRT_Device_PoisonExecution",
    "PJRT_Device_CreateAsyncTrackingEvent",
    "PJRT_AsyncTrackingEvent_Destroy",
    "PJRT_Executable_GetCompileOptions",
    "PJRT_Buffer_DonateWithControlDependency",
    "PJRT_Event_Create",
    "PJRT_Event_Set",
    "PJRT_Device_GetAttributes",
    "PJRT_Client_Load",
    "PJRT_LoadedExecutable_AddressableDeviceLogicalIds",
    "PJRT_Buffer_Bitcast",
    "PJRT_Error_ForEachPayload",
    "PJRT_TopologyDescription_Fingerprint",
    "PJRT_Executable_ParameterMemoryKinds",
    "PJRT_Device_ClearMemoryStats",
    "PJRT_TopologyDescription_MakeCanonicalShapeForMemorySpace",
    "PJRT_TopologyDescription_GetMemorySpaceKindIds",
];

/// The position of a function in [`TABLE`]; an unknown name stops the build.
const fn slot(name: &str) -> usize {
    let mut i = 0;
    while i < TABLE.len() {
        if same(TABLE[i].as_bytes(), name.as_bytes()) {
            return i;
        }
        i += 1;
    }
    panic!("not a function of the PJRT table")
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// The argument struct of one function of the table.
///
/// # Safety
/// The implementor is `repr(C)`, begins with `struct_size: usize` and an extension pointer, has the fields of the
/// header's struct in its order, and is valid when all its bytes are zero.
pub(super) unsafe trait Arguments: Sized {
    /// The function's name in the header.
    const NAME: &'static str;
    /// Its position in [`TABLE`].
    const SLOT: usize;
    /// What the caller was trying to do, for error messages.
    const DOING: &'static str;

    /// All zero but for `struct_size`.
    fn new() -> Self {
        let mut args = std::mem::MaybeUninit::<Self>::zeroed();
        // SAFETY: by the trait's contract the struct begins with a usize and is valid when zeroed.
        unsafe {
            args.as_mut_ptr().cast::<usize>().write(size_of::<Self>());
            args.assume_init()
        }
    }
}

macro_rules! arguments {
    ($($function:literal, $doing:literal => $name:ident { $($field:ident: $ty:ty),* $(,)? })*) => {
        $(#[repr(C)]
        pub(super) struct $name {
            struct_size: usize,
            extension_start: *mut Extension,
            $(pub(super) $field: $ty,)*
            /// Fields that a newer plugin may know; zero means absent there.
            reserved: [usize; 4],
        }

        // SAFETY: repr(C), the two head fields come first, and every field is an integer, a bool, a raw pointer or
        // an optional function pointer, or a struct of these.
        unsafe impl Arguments for $name {
            const NAME: &'static str = $function;
            const SLOT: usize = slot($function);
            const DOING: &'static str = $doing;
        })*
    };
}

/// `PJRT_NamedValue`: arrays of it are indexed with this size, so it has no reserved words.
#[repr(C)]
pub(super) struct NamedValue {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) name: *const u8,
    pub(super) name_size: usize,
    pub(super) kind: i32,
    pub(super) payload: NamedPayload,
    pub(super) value_size: usize,
}

#[repr(C)]
pub(super) union NamedPayload {
    pub(super) string: *const u8,
    pub(super) int: i64,
    pub(super) int_list: *const i64,
    pub(super) float: f32,
    pub(super) boolean: bool,
}

pub(super) const NAMED_STRING: i32 = 0;
pub(super) const NAMED_INT: i32 = 1;
pub(super) const NAMED_INT_LIST: i32 = 2;
pub(super) const NAMED_FLOAT: i32 = 3;
pub(super) const NAMED_BOOL: i32 = 4;

#[repr(C)]
pub(super) struct Program {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) code: *mut u8,
    pub(super) code_size: usize,
    pub(super) format: *const u8,
    pub(super) format_size: usize,
    pub(super) reserved: [usize; 4],
}

/// `PJRT_CallbackError`: makes an error object of the plugin, with a copy of the message.
pub(super) type CallbackError =
    unsafe extern "C" fn(code: i32, message: *const u8, message_size: usize) -> *mut RawError;

/// `PJRT_KeyValueGetCallback_ValueDeleter`; the plugin passes it the value that a callback returned.
pub(super) type ValueDeleter = unsafe extern "C" fn(value: *mut u8);

/// `PJRT_KeyValueGetCallback` and its two relatives.
pub(super) type KeyValueCallback<A> = unsafe extern "C" fn(args: *mut A) -> *mut RawError;

/// What a plugin passes to the callback that waits for a key. It lies in the plugin's memory, so it has no reserved
/// words, and XLA leaves the two fields of its head unset.
#[repr(C)]
pub(super) struct KeyValueGet {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) key: *const u8,
    pub(super) key_size: usize,
    pub(super) timeout_ms: i32,
    pub(super) callback_error: *const CallbackError,
    pub(super) user_arg: *mut c_void,
    pub(super) value: *mut u8,
    pub(super) value_size: usize,
    pub(super) value_deleter: Option<ValueDeleter>,
}

/// The same for the callback that does not wait.
#[repr(C)]
pub(super) struct KeyValueTryGet {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) key: *const u8,
    pub(super) key_size: usize,
    pub(super) callback_error: *const CallbackError,
    pub(super) user_arg: *mut c_void,
    pub(super) value: *mut u8,
    pub(super) value_size: usize,
    pub(super) value_deleter: Option<ValueDeleter>,
}

/// The same for the callback that writes.
#[repr(C)]
pub(super) struct KeyValuePut {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) key: *const u8,
    pub(super) key_size: usize,
    pub(super) value: *const u8,
    pub(super) value_size: usize,
    pub(super) callback_error: *const CallbackError,
    pub(super) user_arg: *mut c_void,
}

/// `PJRT_Buffer_MemoryLayout` in its tiled form; the strides form is shorter and not used here.
#[repr(C)]
pub(super) struct MemoryLayout {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) tiled: TiledLayout,
    pub(super) kind: i32,
}

#[repr(C)]
pub(super) struct TiledLayout {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) minor_to_major: *const i64,
    pub(super) minor_to_major_size: usize,
    pub(super) tile_dims: *const i64,
    pub(super) tile_dim_sizes: *const usize,
    pub(super) num_tiles: usize,
}

#[repr(C)]
pub(super) struct ExecuteOptions {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut Extension,
    pub(super) send_callbacks: *mut c_void,
    pub(super) recv_callbacks: *mut c_void,
    pub(super) num_send_ops: usize,
    pub(super) num_recv_ops: usize,
    pub(super) launch_id: i32,
    pub(super) non_donatable_input_indices: *const i64,
    pub(super) num_non_donatable_input_indices: usize,
    pub(super) context: *mut RawContext,
    pub(super) call_location: *const u8,
    pub(super) num_tasks: usize,
    pub(super) task_ids: *mut i32,
    pub(super) incarnation_ids: *mut i64,
    pub(super) multi_slice_config: *mut c_void,
    pub(super) use_major_to_minor_data_layout_for_callbacks: bool,
    pub(super) hlo_output_callbacks: *mut c_void,
    pub(super) num_hlo_output_callbacks: usize,
    pub(super) reserved: [usize; 4],
}

/// One optional statistic: a value and whether it was set.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Stat {
    value: i64,
    is_set: bool,
}

impl Stat {
    pub(super) fn get(self) -> Option<i64> {
        self.is_set.then_some(self.value)
    }
}

/// `PJRT_HostBufferSemantics_kImmutableOnlyDuringCall`.
pub(super) const COPY_DURING_CALL: i32 = 0;
/// `PJRT_HostBufferSemantics_kImmutableZeroCopy`.
pub(super) const ZERO_COPY: i32 = 2;

pub(super) type OnReady = unsafe extern "C" fn(error: *mut RawError, user: *mut c_void);
pub(super) type BackingDeleter = unsafe extern "C" fn(*mut RawBacking);

arguments! {
    "PJRT_Error_Destroy", "free an error" => ErrorDestroy { error: *mut RawError }
    "PJRT_Error_Message", "read an error" => ErrorMessage {
        error: *const RawError, message: *const u8, message_size: usize,
    }
    "PJRT_Error_GetCode", "read an error" => ErrorGetCode { error: *const RawError, code: i32 }

    "PJRT_Plugin_Initialize", "initialize the plugin" => PluginInitialize {}
    "PJRT_Plugin_Attributes", "read the plugin's attributes" => PluginAttributes {
        attributes: *const NamedValue, num_attributes: usize,
    }

    "PJRT_Event_Destroy", "free an event" => EventDestroy { event: *mut RawEvent }
    "PJRT_Event_IsReady", "poll an event" => EventIsReady { event: *mut RawEvent, is_ready: bool }
    "PJRT_Event_Await", "wait for the device" => EventAwait { event: *mut RawEvent }
    "PJRT_Event_OnReady", "watch an event" => EventOnReady {
        event: *mut RawEvent, callback: Option<OnReady>, user_arg: *mut c_void,
    }

    "PJRT_Client_Create", "create a client" => ClientCreate {
        create_options: *const NamedValue, num_options: usize,
        kv_get_callback: Option<KeyValueCallback<KeyValueGet>>, kv_get_user_arg: *mut c_void,
        kv_put_callback: Option<KeyValueCallback<KeyValuePut>>, kv_put_user_arg: *mut c_void,
        client: *mut RawClient,
        kv_try_get_callback: Option<KeyValueCallback<KeyValueTryGet>>, kv_try_get_user_arg: *mut c_void,
    }
    "PJRT_Client_Destroy", "free a client" => ClientDestroy { client: *mut RawClient }
    "PJRT_Client_PlatformName", "read the platform's name" => ClientPlatformName {
        client: *mut RawClient, name: *const u8, name_size: usize,
    }
    "PJRT_Client_PlatformVersion", "read the platform's version" => ClientPlatformVersion {
        client: *mut RawClient, version: *const u8, version_size: usize,
    }
    "PJRT_Client_ProcessIndex", "read the process index" => ClientProcessIndex {
        client: *mut RawClient, process_index: i32,
    }
    "PJRT_Client_Devices", "list devices" => ClientDevices {
        client: *mut RawClient, devices: *const *mut RawDevice, num_devices: usize,
    }
    "PJRT_Client_TopologyDescription", "read the client's topology" => ClientTopology {
        client: *mut RawClient, topology: *mut RawTopology,
    }
    "PJRT_Client_Compile", "compile a program" => ClientCompile {
        client: *mut RawClient, program: *const Program,
        options: *const u8, options_size: usize, executable: *mut RawLoaded,
    }
    "PJRT_Client_BufferFromHostBuffer", "copy host data to a device" => ClientBufferFromHost {
        client: *mut RawClient, data: *const c_void, element_type: i32, dims: *const i64, num_dims: usize,
        byte_strides: *const i64, num_byte_strides: usize, semantics: i32,
        device: *mut RawDevice, memory: *mut RawMemory, device_layout: *mut MemoryLayout,
        done_with_host_buffer: *mut RawEvent, buffer: *mut RawBuffer,
    }

    "PJRT_DeviceDescription_Id", "read a device's id" => DescriptionId {
        description: *mut RawDescription, id: i32,
    }
    "PJRT_DeviceDescription_ProcessIndex", "read a device's process" => DescriptionProcessIndex {
        description: *mut RawDescription, process_index: i32,
    }
    "PJRT_DeviceDescription_Attributes", "read a device's attributes" => DescriptionAttributes {
        description: *mut RawDescription, num_attributes: usize, attributes: *const NamedValue,
    }
    "PJRT_DeviceDescription_Kind", "read a device's kind" => DescriptionKind {
        description: *mut RawDescription, kind: *const u8, kind_size: usize,
    }
    "PJRT_DeviceDescription_DebugString", "describe a device" => DescriptionDebugString {
        description: *mut RawDescription, text: *const u8, text_size: usize,
    }
    "PJRT_Device_GetDescription", "describe a device" => DeviceGetDescription {
        device: *mut RawDevice, description: *mut RawDescription,
    }
    "PJRT_Device_IsAddressable", "ask whether a device is addressable" => DeviceIsAddressable {
        device: *mut RawDevice, is_addressable: bool,
    }
    "PJRT_Device_LocalHardwareId", "read a device's hardware id" => DeviceLocalHardwareId {
        device: *mut RawDevice, local_hardware_id: i32,
    }
    "PJRT_Device_AddressableMemories", "list a device's memories" => DeviceMemories {
        device: *mut RawDevice, memories: *const *mut RawMemory, num_memories: usize,
    }
    "PJRT_Device_MemoryStats", "read a device's memory statistics" => DeviceMemoryStats {
        device: *mut RawDevice, bytes_in_use: i64, peak_bytes_in_use: Stat, num_allocs: Stat,
        largest_alloc_size: Stat, bytes_limit: Stat, bytes_reserved: Stat, peak_bytes_reserved: Stat,
        bytes_reservable_limit: Stat, largest_free_block_bytes: Stat, pool_bytes: Stat, peak_pool_bytes: Stat,
        peak_allocated_bytes: Stat,
    }
    "PJRT_Memory_Id", "read a memory's id" => MemoryId { memory: *mut RawMemory, id: i32 }
    "PJRT_Memory_Kind", "read a memory's kind" => MemoryKind {
        memory: *mut RawMemory, kind: *const u8, kind_size: usize,
    }

    "PJRT_Executable_Destroy", "free an executable" => ExecutableDestroy { executable: *mut RawExecutable }
    "PJRT_Executable_Name", "read an executable's name" => ExecutableName {
        executable: *mut RawExecutable, name: *const u8, name_size: usize,
    }
    "PJRT_Executable_NumReplicas", "read an executable's replicas" => ExecutableNumReplicas {
        executable: *mut RawExecutable, count: usize,
    }
    "PJRT_Executable_NumPartitions", "read an executable's partitions" => ExecutableNumPartitions {
        executable: *mut RawExecutable, count: usize,
    }
    "PJRT_Executable_NumOutputs", "read an executable's outputs" => ExecutableNumOutputs {
        executable: *mut RawExecutable, count: usize,
    }
    "PJRT_Executable_SizeOfGeneratedCodeInBytes", "read an executable's size" => ExecutableCodeSize {
        executable: *mut RawExecutable, bytes: i64,
    }
    "PJRT_Executable_GetCostAnalysis", "read a program's cost analysis" => ExecutableCostAnalysis {
        executable: *mut RawExecutable, num_properties: usize, properties: *const NamedValue,
    }
    "PJRT_Executable_OptimizedProgram", "read the optimized program" => ExecutableOptimizedProgram {
        executable: *mut RawExecutable, program: *mut Program,
    }
    "PJRT_Executable_Serialize", "serialize an executable" => ExecutableSerialize {
        executable: *const RawExecutable, bytes: *const u8, bytes_size: usize,
        backing: *mut RawBacking, deleter: Option<BackingDeleter>,
    }
    "PJRT_Executable_Fingerprint", "read an executable's fingerprint" => ExecutableFingerprint {
        executable: *mut RawExecutable, fingerprint: *const u8, fingerprint_size: usize,
    }
    "PJRT_Executable_OutputElementTypes", "read a program's output types" => ExecutableOutputTypes {
        executable: *mut RawExecutable, types: *mut i32, num_types: usize,
    }
    "PJRT_Executable_OutputDimensions", "read a program's output shapes" => ExecutableOutputDims {
        executable: *mut RawExecutable, num_outputs: usize, dims: *const i64, dim_sizes: *const usize,
    }
    "PJRT_Executable_GetCompiledMemoryStats", "read a program's memory statistics" => ExecutableMemoryStats {
        executable: *mut RawExecutable, generated_code: i64, argument: i64, output: i64, alias: i64, temp: i64,
        host_generated_code: i64, host_argument: i64, host_output: i64, host_alias: i64, host_temp: i64,
        peak_memory: i64, total_size: i64, total_allocation: i64, indefinite_allocations: i64,
        peak_unpadded_heap: i64,
    }
    "PJRT_Executable_DeserializeAndLoad", "load a serialized executable" => ExecutableDeserialize {
        client: *mut RawClient, bytes: *const u8, bytes_size: usize, loaded: *mut RawLoaded,
        options: *const u8, options_size: usize, load_options: *mut c_void,
    }

    "PJRT_LoadedExecutable_Destroy", "free a loaded executable" => LoadedDestroy { executable: *mut RawLoaded }
    "PJRT_LoadedExecutable_GetExecutable", "read a loaded executable" => LoadedGetExecutable {
        loaded: *mut RawLoaded, executable: *mut RawExecutable,
    }
    "PJRT_LoadedExecutable_AddressableDevices", "list an executable's devices" => LoadedDevices {
        executable: *mut RawLoaded, devices: *const *mut RawDevice, num_devices: usize,
    }
    "PJRT_LoadedExecutable_Execute", "execute a program" => LoadedExecute {
        executable: *mut RawLoaded, options: *mut ExecuteOptions,
        argument_lists: *const *const *mut RawBuffer, num_devices: usize, num_args: usize,
        output_lists: *const *mut *mut RawBuffer, device_complete_events: *mut *mut RawEvent,
        execute_device: *mut RawDevice,
    }

    "PJRT_Buffer_Destroy", "free a buffer" => BufferDestroy { buffer: *mut RawBuffer }
    "PJRT_Buffer_ElementType", "read a buffer's element type" => BufferElementType {
        buffer: *mut RawBuffer, element_type: i32,
    }
    "PJRT_Buffer_Dimensions", "read a buffer's shape" => BufferDimensions {
        buffer: *mut RawBuffer, dims: *const i64, num_dims: usize,
    }
    "PJRT_Buffer_OnDeviceSizeInBytes", "read a buffer's size" => BufferOnDeviceSize {
        buffer: *mut RawBuffer, bytes: usize,
    }
    "PJRT_Buffer_Device", "find a buffer's device" => BufferDevice {
        buffer: *mut RawBuffer, device: *mut RawDevice,
    }
    "PJRT_Buffer_Delete", "delete a buffer" => BufferDelete { buffer: *mut RawBuffer }
    "PJRT_Buffer_IsDeleted", "ask whether a buffer is deleted" => BufferIsDeleted {
        buffer: *mut RawBuffer, is_deleted: bool,
    }
    "PJRT_Buffer_CopyToDevice", "copy a buffer to another device" => BufferCopyToDevice {
        buffer: *mut RawBuffer, device: *mut RawDevice, copy: *mut RawBuffer,
    }
    "PJRT_Buffer_ToHostBuffer", "copy a buffer to the host" => BufferToHost {
        buffer: *mut RawBuffer, host_layout: *mut MemoryLayout, dst: *mut c_void, dst_size: usize,
        event: *mut RawEvent,
    }
    "PJRT_Buffer_ReadyEvent", "watch a buffer" => BufferReadyEvent {
        buffer: *mut RawBuffer, event: *mut RawEvent,
    }

    "PJRT_TopologyDescription_Create", "describe a topology" => TopologyCreate {
        name: *const u8, name_size: usize, create_options: *const NamedValue, num_options: usize,
        topology: *mut RawTopology,
    }
    "PJRT_TopologyDescription_Destroy", "free a topology" => TopologyDestroy { topology: *mut RawTopology }
    "PJRT_TopologyDescription_PlatformName", "read a topology's platform" => TopologyPlatformName {
        topology: *const RawTopology, name: *const u8, name_size: usize,
    }
    "PJRT_TopologyDescription_PlatformVersion", "read a topology's version" => TopologyPlatformVersion {
        topology: *mut RawTopology, version: *const u8, version_size: usize,
    }
    "PJRT_TopologyDescription_GetDeviceDescriptions", "list a topology's devices" => TopologyDevices {
        topology: *const RawTopology, descriptions: *const *mut RawDescription, num_descriptions: usize,
    }
    "PJRT_TopologyDescription_Attributes", "read a topology's attributes" => TopologyAttributes {
        topology: *mut RawTopology, attributes: *const NamedValue, num_attributes: usize,
    }
    "PJRT_Compile", "compile a program for a topology" => Compile {
        topology: *const RawTopology, program: *const Program, options: *const u8, options_size: usize,
        client: *mut RawClient, executable: *mut RawExecutable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// Offsets that the header's `_STRUCT_SIZE` constants imply on a 64-bit machine.
    #[test]
    fn layouts_match_the_header() {
        assert_eq!(size_of::<Api>(), 40);
        assert_eq!(size_of::<NamedValue>(), 56);
        assert_eq!(size_of::<TiledLayout>(), 56);
        assert_eq!(offset_of!(MemoryLayout, kind), 72);
        assert_eq!(offset_of!(ClientBufferFromHost, reserved), 120);
        assert_eq!(offset_of!(LoadedExecute, reserved), 80);
        assert_eq!(offset_of!(ExecuteOptions, hlo_output_callbacks), 128);
        assert_eq!(offset_of!(DeviceMemoryStats, peak_allocated_bytes), 192);
        assert_eq!(offset_of!(ExecutableMemoryStats, reserved), 144);
        assert_eq!(offset_of!(ClientCreate, kv_try_get_user_arg), 80);
        assert_eq!(offset_of!(KeyValueGet, value_deleter), 72);
        assert_eq!(offset_of!(KeyValueTryGet, value_deleter), 64);
        assert_eq!(offset_of!(KeyValuePut, user_arg), 56);
    }

    #[test]
    fn slots_follow_the_table() {
        assert_eq!(ErrorDestroy::SLOT, 0);
        assert_eq!(ClientCreate::SLOT, 10);
        assert_eq!(Compile::SLOT, 89);
        assert_eq!(ExecutableMemoryStats::SLOT, 96);
        let args = EventAwait::new();
        assert_eq!(args.struct_size, size_of::<EventAwait>());
        assert!(args.event.is_null());
    }
}
