//! Pins how real plugins take a key-value store: every CPU build, and the CUDA plugin where it is installed.
//!
//! The CPU builds take the callbacks and call none of them: their clients know the devices of their own process only.
//! The callbacks themselves are driven in the unit tests of `key_value.rs`.

mod pjrt_support;

use pjrt_support::cpu_plugins;
use std::sync::Arc;
use xla::pjrt::{CompileOptions, KeyValueStore, MemoryStore, Plugin, Value};
use xla::wheel::{FetchOptions, PluginKind, builds, installed};

fn store() -> Arc<dyn KeyValueStore> {
    Arc::new(MemoryStore::default())
}

const DOUBLE: &str = "func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> {
  %y = stablehlo.add %x, %x : tensor<2xf32>
  return %y : tensor<2xf32>
}";

#[test]
fn a_client_keeps_its_store_until_its_last_buffer_is_gone() {
    for plugin in cpu_plugins() {
        let store = store();
        let kept = Arc::downgrade(&store);
        let client = plugin.client_with_store(&[("cpu_device_count", Value::from(1i64))], store).unwrap();
        let x = client.upload_slice(&[1f32, 2.0], &[2], None).unwrap();
        let y = client.compile(DOUBLE, &CompileOptions::default()).unwrap().execute(&[&x]).unwrap();
        drop((client, x));
        assert!(kept.upgrade().is_some(), "a buffer of the client is alive");
        assert_eq!(y[0].to_vec::<f32>().unwrap(), [2.0, 4.0]);
        drop(y);
        assert!(kept.upgrade().is_none(), "nothing of the client is left");
    }
}

#[test]
fn a_failed_creation_lets_go_of_the_store() {
    // Older builds ignore a name that they do not know.
    for plugin in cpu_plugins().into_iter().filter(|p| p.api_version().1 >= 115) {
        let store = store();
        let kept = Arc::downgrade(&store);
        plugin.client_with_store(&[("no_such_option", Value::from(1i64))], store).unwrap_err();
        assert!(kept.upgrade().is_none());
    }
}

#[test]
fn the_cuda_plugin_takes_the_place_of_a_process_among_its_options() {
    let Some(path) = builds(PluginKind::Cuda).find_map(|build| installed(build, &FetchOptions::default())) else {
        return println!("skipped: the CUDA plugin is not installed");
    };
    let plugin = Plugin::load(path).unwrap();
    let place = [("node_id", Value::from(0i64)), ("num_nodes", Value::from(1i64))];
    match plugin.client_with_store(&place, store()) {
        Ok(client) => assert_eq!(client.process_index(), 0),
        // It looks for GPUs before it looks for other processes.
        Err(e) => assert!(e.to_string().contains("No visible GPU devices"), "{e}"),
    }
    let error = plugin.client_with_store(&[("process_index", Value::from(0i64))], store()).unwrap_err().to_string();
    assert!(error.contains("Unexpected option name") && error.contains("process_index"), "{error}");
}
