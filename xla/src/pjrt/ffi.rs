//! Rust functions as custom calls: XLA's FFI from the handler's side.
//!
//! A program calls a handler by name,
//! `stablehlo.custom_call @name(%x) {api_version = 4 : i32, backend_config = {axis = 1 : i64}}`,
//! after [`Plugin::register_handler`] has made it known. A handler's panic and its error both fail the execution;
//! neither unwinds into the plugin.

use super::error::{Code, Error};
use super::ffi_pool::ThreadPool;
use super::ffi_sys as sys;
use super::plugin::Plugin;
use super::value::slice;
use crate::DType;
use half::{bf16, f16};
use std::any::TypeId;
use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;

/// A custom call that is a Rust function.
pub trait Handler: 'static {
    /// The name programs call it by; one name is one handler for the life of the process.
    const NAME: &'static str;

    /// Computes the results from the arguments. May run on several threads at once.
    ///
    /// # Errors
    /// What it returns fails the execution and comes back from it or from its outputs.
    fn call(frame: &mut CallFrame<'_>) -> Result<(), FfiError>;
}

/// Why a handler failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FfiError {
    /// The status code of the execution.
    pub code: Code,
    /// What the user reads.
    pub message: String,
}

impl FfiError {
    /// An error with a code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        FfiError { code, message: message.into() }
    }

    /// The usual one: the program calls the handler with something it does not take.
    pub fn invalid(message: impl Into<String>) -> Self {
        FfiError::new(Code::InvalidArgument, message)
    }
}

/// Names that were registered: (platform, name) and whose they are.
pub(super) type Registry = BTreeMap<(String, &'static str), TypeId>;

impl Plugin {
    /// Makes a handler known to the plugin's compiler. `platform` is `Host` for the CPU, `CUDA` for NVIDIA's GPUs.
    /// Registering the same handler again does nothing.
    ///
    /// # Errors
    /// The plugin has no FFI, another handler has the name, or the plugin refused.
    pub fn register_handler<H: Handler>(&self, platform: &str) -> Result<(), Error> {
        const FUNCTION: &str = "PJRT_FFI_Register_Handler (its FFI extension)";
        let extension = self.extension(super::sys::EXTENSION_FFI).ok_or_else(|| self.unsupported(FUNCTION))?;
        if extension.struct_size < size_of::<sys::RegisterExtension>() || self.api_version().1 < sys::REGISTER_SINCE {
            return Err(self.unsupported(FUNCTION));
        }
        // SAFETY: an extension of this type and size has this layout.
        let extension = unsafe { &*std::ptr::from_ref(extension).cast::<sys::RegisterExtension>() };
        let register = extension.register_handler.ok_or_else(|| self.unsupported(FUNCTION))?;

        let mut registry = self.handlers().lock().unwrap_or_else(PoisonError::into_inner);
        let key = (platform.to_owned(), H::NAME);
        match registry.get(&key) {
            Some(owner) if *owner == TypeId::of::<H>() => return Ok(()),
            Some(_) => {
                return Err(Error::invalid(format!("another handler is registered as {} for {platform}", H::NAME)));
            }
            None => {}
        }
        let handler: sys::RawHandler = trampoline::<H>;
        let mut args = sys::RegisterHandler {
            struct_size: size_of::<sys::RegisterHandler>(),
            name: H::NAME.as_ptr(),
            name_size: H::NAME.len(),
            handler: handler as *const c_void,
            platform: platform.as_ptr(),
            platform_size: platform.len(),
            traits: 0,
        };
        // SAFETY: the plugin copies the names during the call; the handler is a function and lives for ever.
        let error = unsafe { register(&mut args) };
        self.error(error, "register a custom-call handler")?;
        registry.insert(key, TypeId::of::<H>());
        Ok(())
    }
}

/// What the plugin calls, for metadata and for work. Never unwinds.
unsafe extern "C" fn trampoline<H: Handler>(raw: *mut sys::RawFrame) -> *mut sys::RawFfiError {
    // SAFETY: XLA passes a frame that is valid during the call.
    let frame = unsafe { &*raw };
    // SAFETY: the extensions of a frame are valid during the call.
    if unsafe { answer_metadata(frame) } || frame.stage != sys::STAGE_EXECUTE {
        return std::ptr::null_mut();
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| H::call(&mut CallFrame { raw: frame, taken: Vec::new() })));
    let error = match outcome {
        Ok(Ok(())) => return std::ptr::null_mut(),
        Ok(Err(e)) => FfiError { message: format!("{}: {}", H::NAME, e.message), code: e.code },
        Err(panic) => FfiError::new(Code::Internal, format!("{} panicked: {}", H::NAME, panic_text(&*panic))),
    };
    // SAFETY: the frame's table is valid during the call.
    unsafe { create_error(frame.api, &error) }
}

/// Answers the question for the handler's version, which comes as an extension of an otherwise empty frame.
///
/// # Safety
/// The frame's extensions are valid.
unsafe fn answer_metadata(frame: &sys::RawFrame) -> bool {
    let extension = frame.extension_start;
    // SAFETY: the caller's promise; a metadata extension has the layout of `MetadataExtension`.
    unsafe {
        if extension.is_null() || (*extension).kind != sys::EXTENSION_METADATA {
            return false;
        }
        let metadata = (*extension.cast::<sys::MetadataExtension>()).metadata;
        (*metadata).version.major = sys::VERSION.0;
        (*metadata).version.minor = sys::VERSION.1;
        (*metadata).traits = 0;
    }
    true
}

/// The text of a panic.
pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)")
}

/// An error object of XLA.
///
/// # Safety
/// `api` is the table of the frame that is being answered.
unsafe fn create_error(api: *const sys::FfiApi, error: &FfiError) -> *mut sys::RawFfiError {
    let message = CString::new(error.message.replace('\0', "\u{fffd}")).unwrap_or_default();
    let mut args = sys::ErrorCreate {
        struct_size: size_of::<sys::ErrorCreate>(),
        extension_start: std::ptr::null_mut(),
        message: message.as_ptr(),
        code: error.code as i32,
    };
    // SAFETY: the caller's promise; XLA copies the message.
    match unsafe { (*api).error_create } {
        // SAFETY: as above.
        Some(create) => unsafe { create(&mut args) },
        // Without a way to say that it failed the only honest end is to stop.
        None => std::process::abort(),
    }
}

/// Element types that a handler can see as a slice: plain data of which every bit pattern is a value.
///
/// # Safety
/// As said, and `DTYPES` are element types of exactly this size and alignment in memory.
pub unsafe trait FfiElement: Copy + Send + Sync + 'static {
    /// The element types a slice of this may be made of.
    const DTYPES: &'static [DType];
}

macro_rules! ffi_elements {
    ($($ty:ty => [$($dtype:ident),*]),* $(,)?) => {
        // SAFETY: numbers; 4-bit types, `pred` and 8-bit floats take one byte each.
        $(unsafe impl FfiElement for $ty {
            const DTYPES: &'static [DType] = &[$(DType::$dtype),*];
        })*
    };
}

ffi_elements! {
    i8 => [I8, I4], i16 => [I16], i32 => [I32], i64 => [I64],
    u8 => [U8, U4, Pred, F8E4M3FN, F8E5M2], u16 => [U16], u32 => [U32], u64 => [U64],
    f16 => [F16], bf16 => [BF16], f32 => [F32], f64 => [F64],
}

/// One call of a handler: its arguments, results and attributes.
pub struct CallFrame<'a> {
    raw: &'a sys::RawFrame,
    /// Results that were taken.
    taken: Vec<usize>,
}

/// An argument or a result: dense, row-major, 64-byte aligned on the CPU plugins.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    raw: &'a sys::RawArray,
}

impl<'a> Array<'a> {
    /// Its element type.
    ///
    /// # Errors
    /// It is not one of ours.
    pub fn dtype(&self) -> Result<DType, FfiError> {
        dtype(self.raw.dtype)
    }

    /// Its axes, major to minor.
    pub fn dims(&self) -> &'a [i64] {
        // SAFETY: XLA passes `rank` dimensions.
        unsafe { slice(self.raw.dims, usize::try_from(self.raw.rank).unwrap_or(0)) }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims().iter().map(|&d| usize::try_from(d).unwrap_or(0)).product()
    }

    /// True where an axis is 0 long.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The start of the elements.
    pub fn as_ptr(&self) -> *mut c_void {
        self.raw.data
    }

    /// The memory as addresses.
    fn range(&self) -> std::ops::Range<usize> {
        let start = self.raw.data as usize;
        // An element type of unknown size is taken to be large: at worst two arrays count as overlapping.
        let size = self.dtype().map_or(16, DType::size);
        start..start.saturating_add(self.len().saturating_mul(size))
    }

    fn overlaps(&self, other: &Array<'_>) -> bool {
        let (a, b) = (self.range(), other.range());
        a.start < b.end && b.start < a.end
    }

    fn check<T: FfiElement>(&self, what: &str, i: usize) -> Result<(*mut T, usize), FfiError> {
        let dtype = self.dtype()?;
        if !T::DTYPES.contains(&dtype) {
            let message = format!("{what} {i} is {dtype}{:?}, expected {:?}", self.dims(), T::DTYPES);
            return Err(FfiError::invalid(message));
        }
        let data = self.raw.data.cast::<T>();
        match self.len() {
            0 => Ok((std::ptr::NonNull::dangling().as_ptr(), 0)),
            _ if data.is_null() || !data.is_aligned() => {
                Err(FfiError::new(Code::Internal, format!("{what} {i} has the unusable address {data:?}")))
            }
            len => Ok((data, len)),
        }
    }
}

impl<'a> CallFrame<'a> {
    /// Number of arguments.
    pub fn num_args(&self) -> usize {
        usize::try_from(self.raw.args.size).unwrap_or(0)
    }

    /// Number of results.
    pub fn num_results(&self) -> usize {
        usize::try_from(self.raw.results.size).unwrap_or(0)
    }

    /// The shape of argument `i`.
    ///
    /// # Errors
    /// There is no such argument.
    pub fn arg_array(&self, i: usize) -> Result<Array<'a>, FfiError> {
        list_item(&self.raw.args, i, "argument")
    }

    /// The shape of result `i`.
    ///
    /// # Errors
    /// There is no such result.
    pub fn result_array(&self, i: usize) -> Result<Array<'a>, FfiError> {
        list_item(&self.raw.results, i, "result")
    }

    /// The elements of argument `i`.
    ///
    /// # Errors
    /// There is no such argument, its elements are not `T`, or it shares its memory with a result (the call's
    /// `output_operand_aliases`): then its contents are in that result, see [`CallFrame::result`].
    pub fn arg<T: FfiElement>(&self, i: usize) -> Result<&'a [T], FfiError> {
        let array = self.arg_array(i)?;
        for r in 0..self.num_results() {
            if self.result_array(r)?.overlaps(&array) {
                let message = format!("argument {i} shares its memory with result {r}: read and write it there");
                return Err(FfiError::invalid(message));
            }
        }
        let (data, len) = array.check::<T>("argument", i)?;
        // SAFETY: XLA passes `len` elements that nobody writes during the call: no result overlaps them.
        Ok(unsafe { std::slice::from_raw_parts(data, len) })
    }

    /// The elements of result `i`, once. They hold anything, or, where the call aliases the result to an argument,
    /// that argument's contents.
    ///
    /// # Errors
    /// There is no such result, its elements are not `T`, or it was taken before.
    pub fn result<T: FfiElement>(&mut self, i: usize) -> Result<&'a mut [T], FfiError> {
        let array = self.result_array(i)?;
        for &t in &self.taken {
            if t == i || self.result_array(t)?.overlaps(&array) {
                return Err(FfiError::new(Code::Internal, format!("result {i} was taken before (as result {t})")));
            }
        }
        let (data, len) = array.check::<T>("result", i)?;
        self.taken.push(i);
        // SAFETY: XLA passes room for `len` elements that are this call's to write; no argument slice overlaps them
        // (`arg` refuses) and no other result slice does (checked above). Any bits are a value of `T`.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, len) })
    }

    /// The call's attributes: the entries of its `backend_config` dictionary.
    pub fn attributes(&self) -> Attributes<'a> {
        Attributes { raw: &self.raw.attributes }
    }

    /// An attribute of the call by name.
    ///
    /// # Errors
    /// It is missing or of another type.
    pub fn attribute<T: FromAttribute<'a>>(&self, name: &str) -> Result<T, FfiError> {
        self.attributes().get(name)
    }

    /// XLA's threads.
    pub fn thread_pool(&self) -> ThreadPool<'a> {
        ThreadPool::new(self.raw)
    }
}

fn list_item<'a>(list: &'a sys::RawList, i: usize, what: &str) -> Result<Array<'a>, FfiError> {
    let size = usize::try_from(list.size).unwrap_or(0);
    // SAFETY: XLA passes `size` kinds and items.
    let (kinds, items) = unsafe { (slice(list.kinds, size), slice(list.items, size)) };
    match (kinds.get(i), items.get(i)) {
        // SAFETY: an item of this kind points to an array that is valid during the call.
        (Some(&sys::KIND_BUFFER), Some(&item)) => Ok(Array { raw: unsafe { &*item } }),
        (Some(kind), _) => Err(FfiError::invalid(format!("{what} {i} is not an array (kind {kind})"))),
        (None, _) => Err(FfiError::invalid(format!("expected {what} {i}, the call has {size}"))),
    }
}

/// The element type of XLA's `PrimitiveType`.
fn dtype(raw: i32) -> Result<DType, FfiError> {
    Ok(match raw {
        1 => DType::Pred,
        2 => DType::I8,
        3 => DType::I16,
        4 => DType::I32,
        5 => DType::I64,
        6 => DType::U8,
        7 => DType::U16,
        8 => DType::U32,
        9 => DType::U64,
        10 => DType::F16,
        11 => DType::F32,
        12 => DType::F64,
        16 => DType::BF16,
        19 => DType::F8E5M2,
        20 => DType::F8E4M3FN,
        21 => DType::I4,
        22 => DType::U4,
        other => return Err(FfiError::invalid(format!("the element type {other} of XLA is not supported"))),
    })
}

/// A dictionary of attributes.
#[derive(Clone, Copy)]
pub struct Attributes<'a> {
    raw: &'a sys::RawAttributes,
}

/// One attribute.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub enum Attribute<'a> {
    Bool(bool),
    I8(i8),
    I16(i16),
    I32(i32),
    I64(i64),
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    F32(f32),
    F64(f64),
    Str(&'a str),
    I8s(&'a [i8]),
    I16s(&'a [i16]),
    I32s(&'a [i32]),
    I64s(&'a [i64]),
    F32s(&'a [f32]),
    F64s(&'a [f64]),
    Dictionary(Attributes<'a>),
}

impl<'a> Attributes<'a> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        usize::try_from(self.raw.size).unwrap_or(0)
    }

    /// True where there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The names, in order.
    pub fn names(&self) -> Vec<&'a str> {
        // SAFETY: XLA passes `len` names.
        let names = unsafe { slice(self.raw.names, self.len()) };
        // SAFETY: each points to a span that is valid during the call.
        names.iter().map(|&name| unsafe { span(name) }.unwrap_or("")).collect()
    }

    /// The attribute `name`, where there is one.
    ///
    /// # Errors
    /// It is of a type that is not supported.
    pub fn find(&self, name: &str) -> Result<Option<Attribute<'a>>, FfiError> {
        let Some(i) = self.names().iter().position(|n| *n == name) else { return Ok(None) };
        // SAFETY: XLA passes `len` kinds and values, and `i` is below `len`.
        let (kind, value) = unsafe { (slice(self.raw.kinds, self.len())[i], slice(self.raw.values, self.len())[i]) };
        // SAFETY: the value is valid during the call and of the kind that XLA says.
        let attribute = unsafe { read_attribute(kind, value) };
        let attribute = attribute.ok_or_else(|| FfiError::invalid(format!("attribute {name} is of no known type")))?;
        Ok(Some(attribute))
    }

    /// The attribute `name` as a `T`.
    ///
    /// # Errors
    /// It is missing or of another type.
    pub fn get<T: FromAttribute<'a>>(&self, name: &str) -> Result<T, FfiError> {
        let attribute = self.find(name)?;
        let attribute = attribute.ok_or_else(|| {
            FfiError::invalid(format!("expected an attribute {name} ({}), found {:?}", T::WHAT, self.names()))
        })?;
        T::from_attribute(attribute)
            .ok_or_else(|| FfiError::invalid(format!("attribute {name} is not of the type {}", T::WHAT)))
    }
}

/// Types an attribute can be read as.
pub trait FromAttribute<'a>: Sized {
    /// How MLIR writes the type.
    const WHAT: &'static str;

    /// The value, where the attribute is of this type.
    fn from_attribute(attribute: Attribute<'a>) -> Option<Self>;
}

macro_rules! from_attribute {
    ($($ty:ty, $variant:ident, $what:literal);* $(;)?) => {
        $(impl<'a> FromAttribute<'a> for $ty {
            const WHAT: &'static str = $what;

            fn from_attribute(attribute: Attribute<'a>) -> Option<Self> {
                match attribute {
                    Attribute::$variant(value) => Some(value),
                    _ => None,
                }
            }
        })*
    };
}

from_attribute! {
    bool, Bool, "i1";
    i8, I8, "i8";
    i16, I16, "i16";
    i32, I32, "i32";
    i64, I64, "i64";
    u8, U8, "ui8";
    u16, U16, "ui16";
    u32, U32, "ui32";
    u64, U64, "ui64";
    f32, F32, "f32";
    f64, F64, "f64";
    &'a str, Str, "string";
    &'a [i8], I8s, "array<i8>";
    &'a [i16], I16s, "array<i16>";
    &'a [i32], I32s, "array<i32>";
    &'a [i64], I64s, "array<i64>";
    &'a [f32], F32s, "array<f32>";
    &'a [f64], F64s, "array<f64>";
    Attributes<'a>, Dictionary, "dictionary";
}

/// The text of a span, where it is UTF-8.
///
/// # Safety
/// The span and its bytes are valid for `'a`.
unsafe fn span<'a>(span: *const sys::ByteSpan) -> Option<&'a str> {
    // SAFETY: the caller's promise.
    std::str::from_utf8(unsafe { slice((*span).data, (*span).len) }).ok()
}

/// # Safety
/// `value` is an attribute of this kind, valid for `'a`.
unsafe fn read_attribute<'a>(kind: i32, value: *const c_void) -> Option<Attribute<'a>> {
    // SAFETY: the caller's promise, for each kind.
    unsafe {
        match kind {
            sys::ATTR_SCALAR => read_scalar(&*value.cast::<sys::RawScalar>()),
            sys::ATTR_STRING => span(value.cast::<sys::ByteSpan>()).map(Attribute::Str),
            sys::ATTR_ARRAY => read_values(&*value.cast::<sys::RawValues>()),
            sys::ATTR_DICTIONARY => {
                Some(Attribute::Dictionary(Attributes { raw: &*value.cast::<sys::RawAttributes>() }))
            }
            _ => None,
        }
    }
}

/// # Safety
/// The scalar's value is valid and of its element type.
unsafe fn read_scalar<'a>(scalar: &sys::RawScalar) -> Option<Attribute<'a>> {
    let value = scalar.value;
    // SAFETY: the caller's promise; the read is unaligned so that nothing more is assumed.
    unsafe {
        Some(match dtype(scalar.dtype).ok()? {
            DType::Pred => Attribute::Bool(value.cast::<u8>().read() != 0),
            DType::I8 => Attribute::I8(value.cast::<i8>().read()),
            DType::I16 => Attribute::I16(value.cast::<i16>().read_unaligned()),
            DType::I32 => Attribute::I32(value.cast::<i32>().read_unaligned()),
            DType::I64 => Attribute::I64(value.cast::<i64>().read_unaligned()),
            DType::U8 => Attribute::U8(value.cast::<u8>().read()),
            DType::U16 => Attribute::U16(value.cast::<u16>().read_unaligned()),
            DType::U32 => Attribute::U32(value.cast::<u32>().read_unaligned()),
            DType::U64 => Attribute::U64(value.cast::<u64>().read_unaligned()),
            DType::F32 => Attribute::F32(value.cast::<f32>().read_unaligned()),
            DType::F64 => Attribute::F64(value.cast::<f64>().read_unaligned()),
            _ => return None,
        })
    }
}

/// # Safety
/// The array's data is valid for `'a`, of its element type and size.
unsafe fn read_values<'a>(values: &sys::RawValues) -> Option<Attribute<'a>> {
    let (data, size) = (values.data, values.size);
    // SAFETY: the caller's promise; XLA keeps each array in a vector of its element type, hence aligned.
    unsafe {
        Some(match dtype(values.dtype).ok()? {
            DType::I8 => Attribute::I8s(slice(data.cast(), size)),
            DType::I16 => Attribute::I16s(slice(data.cast(), size)),
            DType::I32 => Attribute::I32s(slice(data.cast(), size)),
            DType::I64 => Attribute::I64s(slice(data.cast(), size)),
            DType::F32 => Attribute::F32s(slice(data.cast(), size)),
            DType::F64 => Attribute::F64s(slice(data.cast(), size)),
            _ => return None,
        })
    }
}
