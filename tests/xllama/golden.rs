//! Every golden of the repository, on the default CPU plugin: logits, activations, chunks, decode, greedy text, and
//! bf16, f16, int8 and int4 against PyTorch, at the tolerances that the manifest states.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Runs `xllama golden check` in the repository and returns its rows.
fn rows(dir: &Path, more: &[&str]) -> (bool, Vec<Value>) {
    let out = Command::new(env!("CARGO_BIN_EXE_xllama"))
        .args(["golden", "check", "--json", "--quiet"])
        .arg(dir)
        .args(more)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("the binary runs");
    let stdout = String::from_utf8(out.stdout).expect("JSON is UTF-8");
    let json: Value = serde_json::from_str(&stdout)
        .unwrap_or_else(|e| panic!("{e}: {stdout}{}", String::from_utf8_lossy(&out.stderr)));
    (out.status.success(), json["rows"].as_array().expect("rows").clone())
}

/// The manifest of the repository's goldens.
fn manifest() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/manifest.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("there")).expect("valid")
}

#[test]
fn every_golden_holds() {
    let (ok, rows) = rows(Path::new("golden"), &[]);
    let failed: Vec<&Value> = rows.iter().filter(|r| r["pass"] != true).collect();
    assert!(ok && failed.is_empty(), "{failed:#?}");

    // The manifest's cases and the comparisons of each are all there.
    let manifest = manifest();
    for case in manifest["cases"].as_array().expect("cases") {
        let checks: Vec<&str> =
            rows.iter().filter(|r| r["case"] == case["name"]).map(|r| r["check"].as_str().expect("a name")).collect();
        let greedy = case["greedy"].as_array().is_some_and(|list| !list.is_empty()).then_some("greedy");
        let always = ["f32 prefill", "chunks that divide", "chunks that do not", "decode"];
        let narrow = ["bf16 prefill", "f16 prefill", "int8 prefill", "int4 prefill"];
        for wanted in always.into_iter().chain(narrow).chain(greedy) {
            assert!(checks.iter().any(|c| c.starts_with(wanted)), "{}: no {wanted} in {checks:?}", case["name"]);
        }
        let stored = !case["activations"].as_array().expect("a list").is_empty();
        assert_eq!(checks.contains(&"activations"), stored, "{}", case["name"]);
    }

    // Which code a weight is rounded to changes the mean KL of one small case by a third; over all cases it hardly does.
    for (narrow, most) in [("bf16", 0.6), ("f16", 0.6), ("int8", 1.1), ("int4", 1.0)] {
        let ratios: Vec<f64> = (manifest["cases"].as_array().expect("cases").iter())
            .map(|case| {
                let check = format!("{narrow} prefill");
                let row = rows.iter().find(|r| r["case"] == case["name"] && r["check"] == check).expect("a row");
                let pytorch = case["pytorch"][narrow]["kl_mean"].as_f64().expect("a figure");
                row["mean_kl"].as_f64().expect("a figure") / pytorch
            })
            .collect();
        let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        assert!(mean <= most, "{narrow}: {mean:.2} of PyTorch's mean KL, in the geometric mean: {ratios:.2?}");
    }
}

/// Every layout and type of cache: pages pass whatever the static one passes, bf16 and f16 lose no more than PyTorch in that type,
/// int8 no more than is stated. With rings and without, with experts.
#[test]
fn every_cache_holds() {
    for case in ["gqa2", "mistral-window7", "gemma3-window7", "mixtral-8x2-window"] {
        for more in ["--cache-page=16", "--cache-dtype=int8", "--cache-dtype=bf16", "--cache-dtype=f16"] {
            let (ok, rows) = rows(Path::new("golden"), &["--case", case, more]);
            assert!(ok, "{more}: {:#?}", rows.iter().filter(|r| r["pass"] != true).collect::<Vec<_>>());
            assert!(rows.len() >= 2);
        }
    }
}

/// The manifest covers the family: two cases or more of each type that the configuration knows.
#[test]
fn every_member_has_goldens() {
    let manifest = manifest();
    for member in converter::config::model_types() {
        let cases = manifest["cases"].as_array().expect("cases").iter().filter(|c| c["model_type"] == member).count();
        assert!(cases >= 2, "{member}: {cases} cases");
    }
}

/// A golden whose logits are another model's is a failure and exit code 1: the check can fail.
#[test]
fn a_wrong_golden_fails() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let copy = tempfile::tempdir().expect("a temporary folder");
    let mut manifest = manifest();
    let cases = manifest["cases"].as_array_mut().expect("cases");
    cases.retain(|c| c["name"] == "gqa2");
    // A float32 run cannot meet a tolerance below its own rounding.
    manifest["tolerances"]["f32_kl_max"] = 0.0.into();
    std::fs::write(copy.path().join("manifest.json"), manifest.to_string()).expect("written");
    std::os::unix::fs::symlink(root.join("gqa2"), copy.path().join("gqa2")).expect("linked");
    let (ok, rows) = rows(copy.path(), &[]);
    assert!(!ok);
    let verdicts: Vec<(&str, bool)> =
        rows.iter().map(|r| (r["check"].as_str().expect("a name"), r["pass"] == true)).collect();
    assert!(verdicts.contains(&("f32 prefill", false)), "{verdicts:?}");
    assert!(verdicts.contains(&("activations", true)), "{verdicts:?}");
}

/// A model with another vocabulary, or a damaged file, is a failed row that says so; the other cases still run.
#[test]
fn a_case_that_cannot_be_compared_is_a_failed_row() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let copy = tempfile::tempdir().expect("a temporary folder");
    let mut manifest = manifest();
    let cases = manifest["cases"].as_array_mut().expect("cases");
    cases.retain(|c| ["gqa2", "llama1", "mqa-gelu"].contains(&c["name"].as_str().expect("a name")));
    for case in cases.iter_mut() {
        if case["name"] == "llama1" {
            case["model"] = serde_json::json!({ "model": "some-model" });
        }
        if case["name"] == "mqa-gelu" {
            let files = case["files"].as_object_mut().expect("files");
            files.values_mut().for_each(|sum| *sum = "00".into());
        }
    }
    std::fs::write(copy.path().join("manifest.json"), manifest.to_string()).expect("written");
    for name in ["gqa2", "llama1", "mqa-gelu"] {
        std::os::unix::fs::symlink(root.join(name), copy.path().join(name)).expect("linked");
    }
    let wide = root.join("sharded-v4/model");
    let (ok, rows) = rows(copy.path(), &["--model", wide.to_str().expect("a plain path")]);
    assert!(!ok);
    let of = |name: &str| rows.iter().filter(|r| r["case"] == name).collect::<Vec<_>>();
    assert!(of("gqa2").len() > 4 && of("gqa2").iter().all(|r| r["pass"] == true));
    for (name, part) in [("llama1", "vocabulary"), ("mqa-gelu", "sha256")] {
        let [row] = of(name)[..] else { panic!("one row of {name}") };
        assert!(row["pass"] == false && row["note"].as_str().expect("a note").contains(part), "{row}");
    }
}
