//! The same programs on every CPU plugin of the table: each op against a literal or an `ndarray` reference, donation,
//! four devices, serialized programs, custom calls in Rust, and the errors and the text of graphs.

#[path = "../pjrt_support/mod.rs"]
mod pjrt_support;

mod case;
mod devices;
mod ffi;
mod programs;
mod rows;

use std::sync::OnceLock;

use xla::pjrt::{Client, Value};

/// One client with four devices on each plugin, the handlers of the suite registered.
fn clients() -> &'static [Client] {
    static CLIENTS: OnceLock<Vec<Client>> = OnceLock::new();
    CLIENTS.get_or_init(|| {
        let plugins = pjrt_support::cpu_plugins();
        assert!(!plugins.is_empty(), "no CPU plugin for this machine");
        let client = |plugin: &xla::pjrt::Plugin| {
            ffi::register(plugin);
            plugin.client(&[("cpu_device_count", Value::from(4i64))]).unwrap()
        };
        plugins.iter().map(client).collect()
    })
}

/// Runs a test on each client, its plugin's file named in the output of a failure.
fn on_each(test: impl Fn(&Client)) {
    for client in clients() {
        println!("{}", client.plugin().path().display());
        test(client);
    }
}
