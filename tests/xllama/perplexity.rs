//! `perplexity` over several windows: every token but the first of a window that shares nothing with the one before is
//! scored once, with the logits that `logits` gives for that window.

use std::fs::File;
use std::io::BufReader;

use crate::support::{Tiny, run};

/// Sum of −ln p of the targets, from `xllama logits` of each window.
fn reference(model: &str, folder: &crate::support::Folder, ids: &[usize], windows: &[(usize, usize, usize)]) -> f64 {
    let mut nll = 0.0;
    for &(begin, first, end) in windows {
        let list: Vec<String> = ids[begin..end].iter().map(usize::to_string).collect();
        let out = folder.arg("logits.npz");
        run(["logits", "--model", model, "--tokens", &list.join(","), "--out", &out]).ok();
        let mut npz = npyz::npz::NpzArchive::new(BufReader::new(File::open(&out).unwrap())).unwrap();
        let logits: Vec<f32> = npz.by_name("logits").unwrap().unwrap().into_vec().unwrap();
        let vocab = logits.len() / (end - begin);
        for target in first..end {
            let row = &logits[(target - begin - 1) * vocab..][..vocab];
            let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            nll -= f64::from(row[ids[target]]) - total.ln();
        }
    }
    nll
}

#[test]
fn windows_are_scored_as_logits_says() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let text = folder.arg("text.txt");
    std::fs::write(&text, "qzxjvkwpyqzxjvkwpybqzxjvk").unwrap();
    let whole = run(["perplexity", &text, "--model", &model, "--context", "64", "--json"]).json();
    let n = whole["tokens"].as_u64().unwrap() as usize + 1;

    let tokenizer = tokenizers::Tokenizer::from_file(folder.arg("model/tokenizer.json")).unwrap();
    let ids: Vec<usize> =
        tokenizer.encode("qzxjvkwpyqzxjvkwpybqzxjvk", true).unwrap().get_ids().iter().map(|i| *i as usize).collect();
    assert_eq!(ids.len(), n);
    assert!(n > 16, "more than two windows of 8");

    for (stride, windows) in [
        (8, (0..n).step_by(8).map(|b| (b, b + 1, (b + 8).min(n))).filter(|w| w.1 < w.2).collect::<Vec<_>>()),
        (5, {
            let mut scored = 1;
            let mut windows = Vec::new();
            for begin in (0..).step_by(5) {
                let end = (begin + 8).min(n);
                windows.push((begin, scored.max(begin + 1), end));
                scored = end;
                if end == n {
                    break;
                }
            }
            windows
        }),
    ] {
        let args =
            ["perplexity", &text, "--model", &model, "--context", "8", "--stride", &stride.to_string(), "--json"];
        let found = run(args.iter().copied().chain(["--kl-base", "f32"])).json();
        let tokens: usize = windows.iter().map(|(_, first, end)| end - first).sum();
        assert_eq!(found["tokens"], tokens, "stride {stride}");
        let expected = reference(&model, &folder, &ids, &windows) / tokens as f64;
        let nll = found["nll"].as_f64().unwrap();
        assert!((nll - expected).abs() < 1e-5, "stride {stride}: {nll}, expected {expected}");
        assert!(found["kl_max"].as_f64().unwrap() < 1e-12, "a run is as far from itself as nothing");
    }
}
