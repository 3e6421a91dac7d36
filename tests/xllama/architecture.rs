//! The layering rules: who may import whom, where `unsafe` may stand, and which crates stay in which room.

use std::fs;
use std::path::{Path, PathBuf};

/// Source files below `dir`, with their text.
fn sources(dir: &str) -> Vec<(PathBuf, String)> {
    fn walk(dir: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push((path.clone(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), &mut found);
    assert!(!found.is_empty(), "{dir} has no sources");
    found
}

/// Code lines (comments and doc examples left out) that match `bad`.
fn offending(dir: &str, allowed: &[&str], bad: impl Fn(&str) -> bool) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, text) in sources(dir) {
        let shown = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().display().to_string();
        if allowed.iter().any(|a| shown.contains(a)) {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if bad(code) {
                lines.push(format!("{shown}:{}: {}", i + 1, line.trim()));
            }
        }
    }
    lines
}

fn names(code: &str, krate: &str) -> bool {
    code.match_indices(krate).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + krate.len()..];
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') && after.starts_with("::")
    })
}

#[track_caller]
fn none(lines: Vec<String>, rule: &str) {
    assert!(lines.is_empty(), "{rule}:\n{}", lines.join("\n"));
}

#[test]
fn converter_and_xla_do_not_know_each_other() {
    none(offending("converter/src", &[], |c| names(c, "xla") || names(c, "xllama")), "converter imports xla");
    none(offending("xla/src", &[], |c| names(c, "converter") || names(c, "xllama")), "xla imports converter");
    let others = ["xla", "converter", "xllama"];
    none(offending("kernels/src", &[], |c| others.iter().any(|krate| names(c, krate))), "kernels import another room");
    none(offending("xla/src", &[], |c| names(c, "kernels")), "xla imports kernels");
}

#[test]
fn handlers_alone_call_kernels() {
    // The format of packed weights is known where they are declared.
    let bad = |c: &str| names(c, "kernels") && !c.contains("kernels::packed");
    none(offending("src", &["src/runtime/handlers"], bad), "a kernel is called outside src/runtime/handlers");
}

#[test]
fn graph_and_pjrt_do_not_know_each_other() {
    none(offending("xla/src/graph", &[], |c| c.contains("pjrt::") || c.contains("wheel::")), "graph imports pjrt");
    none(offending("xla/src/pjrt", &[], |c| c.contains("graph::") || c.contains("wheel::")), "pjrt imports graph");
}

/// Whether a line imports something that is not below one of `allowed`, or reaches for files or devices without an import.
fn reaches_beyond(code: &str, allowed: &[&str]) -> bool {
    let import = code.trim_start().strip_prefix("use ").or_else(|| code.trim_start().strip_prefix("pub use "));
    import.is_some_and(|path| !allowed.iter().any(|a| path.starts_with(a)))
        || ["std::fs", "std::io", "pjrt::"].iter().any(|room| code.contains(room))
}

#[test]
fn the_model_is_pure() {
    let rooms = ["super::", "crate::config", "crate::params", "crate::kv_cache", "xla::graph", "xla::DType"];
    let modules = [
        "attention::",
        "linear::",
        "llama::",
        "loss::",
        "mlp::",
        "moe::",
        "rms_norm::",
        "rope::",
        "router_loss::",
        "scores::",
        "top_k::",
    ];
    let allowed = [&rooms[..], &modules].concat();
    let bad = |code: &str| reaches_beyond(code, &allowed);
    none(offending("src/model", &[], bad), "src/model imports more than graph, params, config and kv_cache");
}

#[test]
fn training_sees_graphs_only() {
    let allowed = ["super::", "xla::graph", "xla::DType", "serde::", "std::f64::", "optimizer::", "schedule::"];
    let bad = |code: &str| code.contains("crate::") || reaches_beyond(code, &allowed);
    none(offending("src/training", &[], bad), "src/training imports more than graph");
}

#[test]
fn anyhow_and_clap_stay_in_the_binary() {
    let bad = |c: &str| names(c, "anyhow") || names(c, "clap") || c.contains("anyhow!(") || c.contains("bail!(");
    none(offending("src", &["src/cli/", "src/main.rs"], bad), "a library module uses anyhow or clap");
    none(offending("xla/src", &[], bad), "xla uses anyhow or clap");
    none(offending("converter/src", &[], bad), "converter uses anyhow or clap");
}

#[test]
fn checkpoint_formats_stay_in_the_converter() {
    let bad = |c: &str| names(c, "safetensors") || names(c, "memmap2");
    none(offending("src", &[], bad), "xllama reads checkpoint formats itself");
    none(
        offending("xla/src", &[], |c| names(c, "safetensors") || names(c, "serde") || names(c, "ndarray")),
        "xla knows checkpoints",
    );
}

#[test]
fn unsafe_stands_in_pjrt_only() {
    let bad = |c: &str| c.contains("unsafe ") && !c.contains("unsafe_");
    none(offending("src", &[], bad), "unsafe outside xla::pjrt");
    none(offending("converter/src", &[], bad), "unsafe outside xla::pjrt");
    none(offending("xla/src", &["xla/src/pjrt/"], bad), "unsafe outside xla::pjrt");
}
