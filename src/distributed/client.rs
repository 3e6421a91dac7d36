//! A client of a program of several processes.

use std::path::Path;
use std::sync::Arc;

use xla::pjrt::{Client, KeyValueStore, Plugin, Value};

use super::error::Error;
use super::process::Process;

/// How a plugin learns which process it is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// It is the only one: the CPU.
    Alone,
    /// libtpu asks its machine. Its processes may be in another order than the machines are named in.
    Asks,
    /// It is told: GPUs.
    Told,
}

impl Place {
    fn of(plugin: &Path) -> Place {
        let name = plugin.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("libtpu") {
            Place::Asks
        } else if name.contains("cpu") {
            Place::Alone
        } else {
            Place::Told
        }
    }

    /// What a plugin is told.
    fn options(self, process: Process, store: bool) -> Result<Vec<(&'static str, Value)>, Error> {
        match self {
            _ if process == Process::SINGLE => Ok(Vec::new()),
            Place::Asks => Ok(Vec::new()),
            Place::Alone => Err(Error::OneProcess { count: process.count() }),
            Place::Told if !store => Err(Error::NoCoordinator { count: process.count() }),
            Place::Told => Ok(vec![
                ("node_id", Value::from(process.index() as i64)),
                ("num_nodes", Value::from(process.count() as i64)),
            ]),
        }
    }
}

/// Makes a client that knows the devices of all processes, and returns it with this process's place among them. On a
/// TPU that place is libtpu's; `process` may be [`Process::SINGLE`] there, where nobody said otherwise.
///
/// `options` are the plugin's own; the place is added to them where the plugin wants it.
///
/// # Errors
/// The CPU plugin was given several processes, a GPU plugin several without a store, the client sees another number of
/// processes or itself in another place, or the plugin or the store said no.
pub fn client(
    plugin: &Plugin,
    options: &[(&str, Value)],
    process: Process,
    store: Option<Arc<dyn KeyValueStore>>,
) -> Result<(Client, Process), Error> {
    let place = Place::of(plugin.path());
    let mut all = options.to_vec();
    all.extend(place.options(process, store.is_some())?);
    let client = match store {
        Some(store) => plugin.client_with_store(&all, store)?,
        None => plugin.client(&all)?,
    };
    let seen = Process::of_client(&client);
    match process == Process::SINGLE || process == seen || (place == Place::Asks && process.count() == seen.count()) {
        true => Ok((client, seen)),
        false => Err(Error::Placement { told: process, seen }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_plugin_is_told_what_it_asks_for() {
        let process = Process::new(1, 2).unwrap();
        let options = |plugin: &str, process, store| Place::of(Path::new(plugin)).options(process, store);
        let place = [("node_id", Value::from(1i64)), ("num_nodes", Value::from(2i64))];
        assert_eq!(options("/lib/xla_cuda_plugin.so", process, true).unwrap(), place);
        assert_eq!(options("/lib/libtpu.so", process, false).unwrap(), []);
        assert_eq!(options("/lib/xla_cuda_plugin.so", Process::SINGLE, false).unwrap(), []);
        let error = options("/lib/xla_cuda_plugin.so", process, false).unwrap_err().to_string();
        assert!(error.contains("--coordinator http://HOST:2379"), "{error}");
        let error = options("/cpu/libpjrt_cpu.so", process, true).unwrap_err().to_string();
        assert!(error.contains("runs in one process"), "{error}");
    }
}
