//! Struct layouts of XLA's FFI (`xla/ffi/api/c_api.h`, the part that versions 0.1 to 0.4 share) and of the PJRT
//! extension that registers handlers (`xla/pjrt/c/pjrt_c_api_ffi_extension.h`).

use super::sys::{Extension, RawError};
use std::ffi::{c_char, c_void};

/// The FFI version that handlers report; the CPU plugins from API 0.81 to 0.115 accept it.
pub(super) const VERSION: (i32, i32) = (0, 2);

/// The oldest minor version of PJRT whose [`RegisterHandler`] is known to have this layout.
pub(super) const REGISTER_SINCE: i32 = 81;

/// `XLA_FFI_Extension_Metadata`.
pub(super) const EXTENSION_METADATA: i32 = 1;
/// `XLA_FFI_ExecutionStage_EXECUTE`.
pub(super) const STAGE_EXECUTE: i32 = 3;

pub(super) const ATTR_ARRAY: i32 = 1;
pub(super) const ATTR_DICTIONARY: i32 = 2;
pub(super) const ATTR_SCALAR: i32 = 3;
pub(super) const ATTR_STRING: i32 = 4;

/// `XLA_FFI_ArgType_BUFFER` and `XLA_FFI_RetType_BUFFER`.
pub(super) const KIND_BUFFER: i32 = 1;

pub(super) type RawHandler = unsafe extern "C" fn(*mut RawFrame) -> *mut RawFfiError;

#[repr(C)]
pub(super) struct RawFfiError {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct RawContext {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct RawVersion {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) major: i32,
    pub(super) minor: i32,
}

#[repr(C)]
pub(super) struct FfiExtension {
    pub(super) struct_size: usize,
    pub(super) kind: i32,
    pub(super) next: *mut FfiExtension,
}

#[repr(C)]
pub(super) struct MetadataExtension {
    pub(super) base: FfiExtension,
    pub(super) metadata: *mut Metadata,
}

/// The head of `XLA_FFI_Metadata`; later versions add fields behind it.
#[repr(C)]
pub(super) struct Metadata {
    pub(super) struct_size: usize,
    pub(super) version: RawVersion,
    pub(super) traits: u32,
}

#[repr(C)]
pub(super) struct RawArray {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) dtype: i32,
    pub(super) data: *mut c_void,
    pub(super) rank: i64,
    pub(super) dims: *const i64,
}

/// `XLA_FFI_Args` and `XLA_FFI_Rets`.
#[repr(C)]
pub(super) struct RawList {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) size: i64,
    pub(super) kinds: *const i32,
    pub(super) items: *const *const RawArray,
}

#[repr(C)]
pub(super) struct RawAttributes {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) size: i64,
    pub(super) kinds: *const i32,
    pub(super) names: *const *const ByteSpan,
    pub(super) values: *const *const c_void,
}

#[repr(C)]
pub(super) struct ByteSpan {
    pub(super) data: *const u8,
    pub(super) len: usize,
}

#[repr(C)]
pub(super) struct RawScalar {
    pub(super) dtype: i32,
    pub(super) value: *const c_void,
}

#[repr(C)]
pub(super) struct RawValues {
    pub(super) dtype: i32,
    pub(super) size: usize,
    pub(super) data: *const c_void,
}

#[repr(C)]
pub(super) struct RawFrame {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) api: *const FfiApi,
    pub(super) context: *mut RawContext,
    pub(super) stage: i32,
    pub(super) args: RawList,
    pub(super) results: RawList,
    pub(super) attributes: RawAttributes,
}

type Unused = *const c_void;

/// The head of `XLA_FFI_Api`, up to the last function used here.
#[repr(C)]
pub(super) struct FfiApi {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) version: RawVersion,
    pub(super) internal: Unused,
    pub(super) error_create: Option<unsafe extern "C" fn(*mut ErrorCreate) -> *mut RawFfiError>,
    pub(super) error_get_message: Option<unsafe extern "C" fn(*mut ErrorGetMessage)>,
    pub(super) error_destroy: Option<unsafe extern "C" fn(*mut ErrorDestroy)>,
    pub(super) handler_register: Unused,
    pub(super) stream_get: Unused,
    pub(super) type_register: Unused,
    pub(super) context_get: Unused,
    pub(super) state_set: Unused,
    pub(super) state_get: Unused,
    pub(super) memory_allocate: Unused,
    pub(super) memory_free: Unused,
    pub(super) pool_schedule: Option<unsafe extern "C" fn(*mut PoolSchedule) -> *mut RawFfiError>,
    pub(super) pool_num_threads: Option<unsafe extern "C" fn(*mut PoolNumThreads) -> *mut RawFfiError>,
}

#[repr(C)]
pub(super) struct ErrorCreate {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) message: *const c_char,
    pub(super) code: i32,
}

#[repr(C)]
pub(super) struct ErrorGetMessage {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) error: *mut RawFfiError,
    pub(super) message: *const c_char,
}

#[repr(C)]
pub(super) struct ErrorDestroy {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) error: *mut RawFfiError,
}

#[repr(C)]
pub(super) struct PoolSchedule {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) context: *mut RawContext,
    pub(super) task: unsafe extern "C" fn(*mut c_void),
    pub(super) data: *mut c_void,
}

#[repr(C)]
pub(super) struct PoolNumThreads {
    pub(super) struct_size: usize,
    pub(super) extension_start: *mut FfiExtension,
    pub(super) context: *mut RawContext,
    pub(super) num_threads: *mut i64,
}

/// `PJRT_FFI_Extension`.
#[repr(C)]
pub(super) struct RegisterExtension {
    pub(super) base: Extension,
    pub(super) type_register: Unused,
    pub(super) user_data_add: Unused,
    pub(super) register_handler: Option<unsafe extern "C" fn(*mut RegisterHandler) -> *mut RawError>,
}

/// `PJRT_FFI_Register_Handler_Args` as of [`REGISTER_SINCE`]; it has no extension pointer.
#[repr(C)]
pub(super) struct RegisterHandler {
    pub(super) struct_size: usize,
    pub(super) name: *const u8,
    pub(super) name_size: usize,
    pub(super) handler: *const c_void,
    pub(super) platform: *const u8,
    pub(super) platform_size: usize,
    pub(super) traits: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn layouts_match_the_header() {
        assert_eq!(size_of::<RawArray>(), 48);
        assert_eq!(size_of::<RawList>(), 40);
        assert_eq!(size_of::<RawAttributes>(), 48);
        assert_eq!(offset_of!(RawFrame, args), 40);
        assert_eq!(offset_of!(RawFrame, attributes), 120);
        assert_eq!(offset_of!(FfiApi, error_create), 48);
        assert_eq!(offset_of!(FfiApi, pool_num_threads), 144);
        assert_eq!(offset_of!(RegisterExtension, register_handler), 40);
        assert_eq!(offset_of!(Metadata, traits), 32);
    }
}
