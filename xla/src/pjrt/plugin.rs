//! A loaded plugin and the one way to call its functions.

use super::client::Client;
use super::error::{Code, Error};
use super::key_value::KeyValueStore;
use super::sys::{self, Arguments};
use super::topology::{Topology, is_libtpu, set_tpu_compile_environment};
use super::value::{self, Value};
use super::{executable::Executable, ffi};
use super::{library, options::CompileOptions};
use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// The version of the PJRT C API that these bindings follow, major and minor.
pub const API_VERSION: (i32, i32) = (0, 117);

/// The function table was put into its present order in this version.
const OLDEST_MINOR: i32 = 57;

/// A PJRT plugin: a shared library that compiles and runs programs on some kind of device.
///
/// A plugin stays open until the process ends, so this is a cheap handle that lives as long as one likes.
#[derive(Clone, Copy)]
pub struct Plugin(&'static Inner);

pub(super) struct Inner {
    api: *const sys::Api,
    functions: &'static [*const ()],
    path: PathBuf,
    version: (i32, i32),
    attributes: BTreeMap<String, Value>,
    pub(super) handlers: Mutex<ffi::Registry>,
}

// SAFETY: `api` and `functions` point to the plugin's table, which is never written after `GetPjrtApi` and never
// unloaded; the functions themselves may be called from any thread by the contract of PJRT.
unsafe impl Send for Inner {}
// SAFETY: as above; the one mutable part is behind a mutex.
unsafe impl Sync for Inner {}

impl Plugin {
    /// Opens and initializes a plugin. Loading a path a second time gives the same plugin.
    ///
    /// `TF_CPP_MIN_LOG_LEVEL` is set to 3 where it is unset, so that the plugin's log stays off stderr; for a file
    /// named `libtpu*` see also [`set_tpu_compile_environment`]. Both write the process environment, which is safe
    /// unless C code on another thread reads it at the same time: load plugins before starting such threads.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::NotAPlugin`], [`Error::VersionSkew`], or what the plugin's own initialization says.
    pub fn load(path: impl AsRef<Path>) -> Result<Plugin, Error> {
        static LOADED: OnceLock<Mutex<HashMap<PathBuf, Plugin>>> = OnceLock::new();
        let path = path.as_ref();
        let canonical = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut loaded = LOADED.get_or_init(Default::default).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plugin) = loaded.get(&canonical) {
            return Ok(*plugin);
        }
        set_env_default("TF_CPP_MIN_LOG_LEVEL", "3");
        // XLA counts the processors that the process may be scheduled on, and not what a container's quota leaves of them.
        set_env_default(CPU_THREADS, &std::thread::available_parallelism().map_or(1, usize::from).to_string());
        if is_libtpu(path) {
            set_tpu_compile_environment();
        }
        // Opened by the name that was given: a library finds its neighbours from there, not from behind a link.
        let path = std::path::absolute(path).unwrap_or_else(|_| canonical.clone());
        let api = library::open(&path)?;
        // SAFETY: `library::open` checked that the table has at least its head; it is the plugin's static data.
        let plugin = unsafe { Plugin::from_api(path, api) }?;
        loaded.insert(canonical, plugin);
        Ok(plugin)
    }

    /// # Safety
    /// `api` is the function table of a plugin, valid as long as the process and as large as it says.
    unsafe fn from_api(path: PathBuf, api: *const sys::Api) -> Result<Plugin, Error> {
        // SAFETY: the caller's promise.
        let head = unsafe { &*api };
        let version = (head.version.major, head.version.minor);
        if version.0 != API_VERSION.0 || version.1 < OLDEST_MINOR {
            let reason = format!(
                "needed is {}.{OLDEST_MINOR} or later with the same major version; install a newer build of the plugin",
                API_VERSION.0
            );
            return Err(Error::VersionSkew { path, found: version, ours: API_VERSION, reason });
        }
        let count = (head.struct_size - size_of::<sys::Api>()) / size_of::<*const ()>();
        // SAFETY: the caller's promise: the function pointers follow the head, as many as the table's size covers.
        let functions = unsafe { std::slice::from_raw_parts(api.add(1).cast::<*const ()>(), count) };
        let mut inner =
            Inner { api, functions, path, version, attributes: BTreeMap::new(), handlers: Mutex::default() };
        inner.require::<sys::ErrorDestroy>()?;
        inner.require::<sys::ErrorMessage>()?;
        inner.require::<sys::ErrorGetCode>()?;
        // Memory is handed back only after an event was awaited, so a plugin that cannot be waited for is refused.
        inner.require::<sys::EventAwait>()?;
        inner.call(&mut sys::PluginInitialize::new())?;
        let mut args = sys::PluginAttributes::new();
        match inner.call(&mut args) {
            // SAFETY: the plugin set both; they live as long as the process.
            Ok(()) => inner.attributes = unsafe { value::from_raw(args.attributes, args.num_attributes) },
            Err(e) if e.is_unsupported() => {}
            Err(e) => return Err(e),
        }
        Ok(Plugin(Box::leak(Box::new(inner))))
    }

    /// Creates a client, which owns the plugin's devices.
    ///
    /// `options` are the plugin's own, for instance `cpu_device_count` (an integer) for the CPU.
    ///
    /// # Errors
    /// What the plugin says: an unknown option, no device, a device in use.
    pub fn client(&self, options: &[(&str, Value)]) -> Result<Client, Error> {
        Client::create(*self, options, None)
    }

    /// Creates a client that shares its devices with the clients of other processes, which it finds through `store`.
    ///
    /// Every process of the program makes its client with a store that holds the same keys. A GPU plugin takes the
    /// options `node_id` (this process's index) and `num_nodes` (how many there are), both integers, and returns when
    /// every process has come. The store is kept as long as the client and called from the plugin's threads.
    ///
    /// # Errors
    /// As for [`Plugin::client`], and what the store said: a process that did not come in time, a server that is down.
    pub fn client_with_store(&self, options: &[(&str, Value)], store: Arc<dyn KeyValueStore>) -> Result<Client, Error> {
        Client::create(*self, options, Some(store))
    }

    /// Describes devices that need not be present, for [`Plugin::compile_for`].
    ///
    /// # Errors
    /// A name or option the plugin does not know, or a plugin without topologies.
    pub fn topology(&self, name: &str, options: &[(&str, Value)]) -> Result<Topology, Error> {
        Topology::create(*self, name, options)
    }

    /// Compiles a program for devices that need not be present. The result can be examined and serialized, not run.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compile_for(
        &self,
        topology: &Topology,
        stablehlo: &str,
        options: &CompileOptions,
    ) -> Result<Executable, Error> {
        if topology.plugin() != self {
            return Err(Error::invalid("the topology belongs to another plugin than the one that compiles"));
        }
        topology.compile(stablehlo, options)
    }

    /// Version of the PJRT C API that the plugin was built with, major and minor.
    pub fn api_version(&self) -> (i32, i32) {
        self.0.version
    }

    /// The plugin's file.
    pub fn path(&self) -> &'static Path {
        &self.0.path
    }

    /// What the plugin says of itself, for instance `xla_version` and `stablehlo_current_version`.
    pub fn attributes(&self) -> &'static BTreeMap<String, Value> {
        &self.0.attributes
    }

    /// Calls the function that belongs to `args`.
    pub(super) fn call<A: Arguments>(&self, args: &mut A) -> Result<(), Error> {
        self.0.call(args)
    }

    /// An extension of the plugin by its type, where it has it.
    pub(super) fn extension(&self, kind: i32) -> Option<&'static sys::Extension> {
        // SAFETY: the table and the extensions chained to it are static data of the plugin.
        let mut next = unsafe { (*self.0.api).extension_start };
        while !next.is_null() {
            // SAFETY: not null, see above.
            let extension: &'static sys::Extension = unsafe { &*next };
            if extension.kind == kind {
                return Some(extension);
            }
            next = extension.next;
        }
        None
    }

    pub(super) fn handlers(&self) -> &'static Mutex<ffi::Registry> {
        &self.0.handlers
    }

    pub(super) fn unsupported(&self, function: &'static str) -> Error {
        self.0.unsupported(function)
    }

    /// Takes over an error object of the plugin.
    pub(super) fn error(&self, raw: *mut sys::RawError, doing: &'static str) -> Result<(), Error> {
        self.0.take_error(raw, doing)
    }
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("path", &self.0.path).field("api_version", &self.0.version).finish()
    }
}

impl PartialEq for Plugin {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self.0, other.0)
    }
}

impl Eq for Plugin {}

impl Inner {
    /// The function of the table that takes `A`, where the plugin has it.
    fn function<A: Arguments>(&self) -> Result<*const (), Error> {
        match self.functions.get(A::SLOT) {
            Some(f) if !f.is_null() => Ok(*f),
            _ => Err(self.unsupported(A::NAME)),
        }
    }

    /// Refuses a plugin without a function that nothing here can do without.
    fn require<A: Arguments>(&self) -> Result<(), Error> {
        let lacks = |_| Error::NotAPlugin { path: self.path.clone(), reason: format!("its table lacks {}", A::NAME) };
        self.function::<A>().map(drop).map_err(lacks)
    }

    fn unsupported(&self, function: &'static str) -> Error {
        Error::Unsupported { function, path: self.path.clone(), api: self.version }
    }

    /// The callers of this module fill `args` with live objects of this plugin and with memory that stays valid
    /// during the call: every raw pointer in `pjrt` comes from the plugin and is owned by the wrapper that passes it.
    fn call<A: Arguments>(&self, args: &mut A) -> Result<(), Error> {
        let function = self.function::<A>()?;
        // SAFETY: the slot of `A` holds a function of this type in every table of our major version.
        let function: unsafe extern "C" fn(*mut A) -> *mut sys::RawError = unsafe { std::mem::transmute(function) };
        // SAFETY: see above for the arguments; the struct carries its size, so a plugin that knows more fields or
        // fewer reads no further than both know.
        let error = unsafe { function(args) };
        if error.is_null() { Ok(()) } else { self.take_error(error, A::DOING) }
    }

    /// Calls one of the functions that return nothing.
    fn call_void<A: Arguments>(&self, args: &mut A) -> Result<(), Error> {
        let function = self.function::<A>()?;
        // SAFETY: as in `call`, for the functions of the header that return nothing.
        let function: unsafe extern "C" fn(*mut A) = unsafe { std::mem::transmute(function) };
        // SAFETY: as in `call`.
        unsafe { function(args) };
        Ok(())
    }

    /// Reads and frees an error object; null is success.
    fn take_error(&self, raw: *mut sys::RawError, doing: &'static str) -> Result<(), Error> {
        if raw.is_null() {
            return Ok(());
        }
        let mut code = sys::ErrorGetCode::new();
        code.error = raw;
        if let Ok(function) = self.function::<sys::ErrorGetCode>() {
            // SAFETY: the slot holds a function of this type, and `raw` is alive.
            let function: unsafe extern "C" fn(*mut sys::ErrorGetCode) -> *mut sys::RawError =
                unsafe { std::mem::transmute(function) };
            // SAFETY: as above. It cannot fail for a live error, so what it returns is null.
            unsafe { function(&mut code) };
        }
        let mut message = sys::ErrorMessage::new();
        message.error = raw;
        let message = match self.call_void(&mut message) {
            // SAFETY: the message lives as long as the error, which is freed below.
            Ok(()) => unsafe { value::text(message.message, message.message_size) },
            Err(_) => "the plugin gave no message".to_owned(),
        };
        let mut destroy = sys::ErrorDestroy::new();
        destroy.error = raw;
        // Without a destructor the error object is leaked, which is all one can do.
        let _ = self.call_void(&mut destroy);
        Err(self.explain(doing, Code::from_raw(code.code), message))
    }

    /// Turns the one message that means "built for another version" into a sentence that says what to install.
    fn explain(&self, doing: &'static str, code: Code, message: String) -> Error {
        if message.contains("Unexpected PJRT_") && message.contains("size: expected") {
            let (major, minor) = API_VERSION;
            let reason = format!(
                "it refuses to {doing} ({}); install a build of the plugin with API {major}.{minor} or older, \
                 or a newer version of this program",
                message.trim_end_matches('.')
            );
            return Error::VersionSkew { path: self.path.clone(), found: self.version, ours: API_VERSION, reason };
        }
        Error::Plugin { doing, code, message }
    }
}

/// What XLA reads when it makes the threads of a CPU client.
const CPU_THREADS: &str = "NPROC";

/// Says how many threads the clients of CPU plugins made from here on compute with; else as many as the process may use, by its
/// affinity and its control group. To be called before other threads run.
pub fn set_cpu_threads(threads: NonZeroUsize) {
    // SAFETY: as in `set_env_default`; the caller's promise stands in the documentation.
    unsafe { std::env::set_var(CPU_THREADS, threads.to_string()) };
}

/// Sets an environment variable for the libraries to be opened, unless the user set it.
pub(super) fn set_env_default(name: &str, value: &str) {
    if std::env::var_os(name).is_none() {
        // SAFETY: Rust's own readers and writers of the environment share a lock. What remains is C code that reads
        // it on another thread at this moment; `Plugin::load` documents that plugins are loaded before such threads
        // run, and glibc never frees a replaced environment string.
        unsafe { std::env::set_var(name, value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::c_void;

    /// A table in the form of a plugin's, with `functions` in its first slots.
    #[repr(C)]
    struct Table {
        head: sys::Api,
        functions: [*const c_void; 11],
    }

    static MESSAGE: &str =
        "Unexpected PJRT_Client_Create_Args size: expected 999, got 120. Check installed software versions.";

    unsafe extern "C" fn read_message(args: *mut sys::ErrorMessage) {
        // SAFETY: the caller passes its own struct.
        unsafe {
            (*args).message = MESSAGE.as_ptr();
            (*args).message_size = MESSAGE.len();
        }
    }

    unsafe extern "C" fn read_code(args: *mut sys::ErrorGetCode) -> *mut sys::RawError {
        // SAFETY: the caller passes its own struct.
        unsafe { (*args).code = 3 };
        std::ptr::null_mut()
    }

    unsafe extern "C" fn succeed(_: *mut c_void) -> *mut sys::RawError {
        std::ptr::null_mut()
    }

    unsafe extern "C" fn fail(_: *mut c_void) -> *mut sys::RawError {
        std::ptr::dangling_mut()
    }

    fn fake(version: (i32, i32), slots: usize) -> Result<Plugin, Error> {
        let (succeed, fail) = (succeed as *const c_void, fail as *const c_void);
        let mut functions = [std::ptr::null(); 11];
        functions[0] = succeed;
        functions[1] = read_message as *const c_void;
        functions[2] = read_code as *const c_void;
        functions[3] = succeed;
        functions[8] = succeed;
        functions[10] = fail;
        let table = Box::leak(Box::new(Table {
            head: sys::Api {
                struct_size: size_of::<sys::Api>() + slots * size_of::<*const c_void>(),
                extension_start: std::ptr::null_mut(),
                version: sys::ApiVersion {
                    struct_size: size_of::<sys::ApiVersion>(),
                    extension_start: std::ptr::null_mut(),
                    major: version.0,
                    minor: version.1,
                },
            },
            functions,
        }));
        // SAFETY: the table is leaked, so it is valid for ever, and has at least `slots` functions.
        unsafe { Plugin::from_api(PathBuf::from("fake.so"), std::ptr::from_ref(table).cast()) }
    }

    #[test]
    fn other_versions_are_refused_in_a_sentence() {
        for version in [(1, 0), (0, 40)] {
            let error = fake(version, 11).unwrap_err().to_string();
            let start =
                format!("plugin fake.so has PJRT API {}.{} and this program speaks 0.117: ", version.0, version.1);
            assert!(error.starts_with(&start) && error.ends_with("install a newer build of the plugin"), "{error}");
        }
    }

    #[test]
    fn a_struct_that_is_too_small_names_versions_and_the_way_out() {
        let error = fake((0, 140), 11).unwrap().client(&[]).unwrap_err();
        assert!(matches!(error, Error::VersionSkew { found: (0, 140), .. }));
        let error = error.to_string();
        assert!(error.contains("fake.so has PJRT API 0.140") && error.contains("expected 999, got 120"), "{error}");
        assert!(error.contains("install a build of the plugin with API 0.117 or older"), "{error}");
    }

    #[test]
    fn missing_functions_are_named() {
        let plugin = fake((0, 60), 10).unwrap();
        let error = plugin.client(&[]).unwrap_err();
        assert_eq!(error.to_string(), "plugin fake.so (PJRT API 0.60) has no PJRT_Client_Create");
        assert!(error.is_unsupported());
        assert!(plugin.attributes().is_empty(), "a null entry is as good as none");
        struct Nothing;
        impl ffi::Handler for Nothing {
            const NAME: &'static str = "nothing";
            fn call(_: &mut ffi::CallFrame<'_>) -> Result<(), ffi::FfiError> {
                Ok(())
            }
        }
        assert!(plugin.register_handler::<Nothing>("Host").unwrap_err().is_unsupported());
        let error = fake((0, 60), 8).unwrap_err().to_string();
        assert_eq!(error, "fake.so is not a PJRT plugin: its table lacks PJRT_Event_Await");
    }
}
