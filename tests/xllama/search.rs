//! Pins what searches find, by vectors of `scripts/make_generation_vectors.py`: beams and their scores as transformers has
//! them, contrastive search by its formula, the ids that typical sampling keeps; in every layout of the cache.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use serde_json::Value;
use xla::DType;
use xla::graph::Graph;
use xla::pjrt::CompileOptions;
use xllama::generation::{
    Beam, BeamOptions, FinishReason, GenerateOptions, SamplingOptions, beam_search, contrastive_search, sampling,
};
use xllama::runtime::{CacheOptions, Engine, Session, device};
use xllama::text::Tokenizer;

use crate::support::{engine, golden, plugin, repository};

const NEW_TOKENS: usize = 40;

fn vectors() -> Value {
    let path = repository("tests/data/generation/vectors.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("there")).expect("valid")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn ids(value: &Value) -> Vec<u32> {
    list(value).iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn number(value: &Value) -> f32 {
    value.as_f64().expect("a number") as f32
}

fn open(case: &Value, options: CacheOptions) -> Engine {
    engine(&PathBuf::from(golden(case["model"].as_str().expect("a name")))).with_cache(options)
}

fn search(engine: &Engine, prompt: &[u32], case: &Value) -> Vec<Beam> {
    let n = case["n"].as_u64().expect("a number") as usize;
    let mut session = Session::new(engine, n, prompt.len() + NEW_TOKENS).expect("a session");
    let options = BeamOptions {
        max_tokens: NEW_TOKENS,
        length_penalty: number(&case["length_penalty"]),
        early_stopping: case["early_stopping"] == true,
        stop_ids: ids(&case["eos"]).into_iter().collect(),
    };
    beam_search(&mut session, prompt, &options, &AtomicBool::new(false)).expect("a search").beams
}

/// Asserts that a search found what its vector says.
#[track_caller]
fn same(found: &[Beam], case: &Value, what: &str) {
    let wanted: Vec<Vec<u32>> = list(&case["tokens"]).iter().map(ids).collect();
    let eos = ids(&case["eos"]);
    let tokens: Vec<&Vec<u32>> = found.iter().map(|beam| &beam.tokens).collect();
    assert_eq!(tokens, wanted.iter().collect::<Vec<_>>(), "{what}");
    for (beam, score) in found.iter().zip(list(&case["scores"])) {
        assert!((beam.score - number(score)).abs() <= 1e-4, "{what}: {} for {score}", beam.score);
        let ended = beam.tokens.last().is_some_and(|id| eos.contains(id));
        assert_eq!(beam.finish_reason, if ended { FinishReason::Stop } else { FinishReason::Length });
    }
}

#[test]
fn beams_are_those_of_transformers() {
    for case in list(&vectors()["searches"]) {
        let engine = open(case, CacheOptions::default());
        let beams = list(&case["beams"]);
        assert!(beams.len() >= 30, "{}", case["model"]);
        for beam in beams {
            let what = format!("{} {} {} {}", case["model"], beam["n"], beam["length_penalty"], beam["eos"]);
            same(&search(&engine, &ids(&case["prompt"]), beam), beam, &what);
        }
    }
}

#[test]
fn beams_in_pages_and_int8() {
    for case in list(&vectors()["searches"]) {
        let prompt = ids(&case["prompt"]);
        let beams = || list(&case["beams"]).iter().filter(|beam| beam["n"] == 4).step_by(5);
        let engine = open(case, CacheOptions { page_size: Some(16), ..CacheOptions::default() });
        for beam in beams() {
            same(&search(&engine, &prompt, beam), beam, &format!("{}, pages", case["model"]));
        }
        for page_size in [None, Some(16)] {
            let engine = open(case, CacheOptions { dtype: Some(DType::I8), page_size, pages: None });
            // Where nothing but a mean per token is compared: one step decided otherwise leads elsewhere.
            let all = list(&case["beams"]);
            let beam = all.iter().find(|b| b["n"] == 4 && b["length_penalty"] == 1.0).expect("there");
            let found = search(&engine, &prompt, beam);
            assert_eq!(found.len(), 4);
            let (best, wanted) = (found[0].score, number(&beam["scores"][0]));
            assert!((best - wanted).abs() <= 0.05 * wanted.abs(), "{}: {best} for {wanted}", case["model"]);
        }
    }
}

/// Beams stop where a session ends, on Ctrl-C, and where there are fewer ids than beams.
#[test]
fn beams_end() {
    let vectors = vectors();
    let case = &vectors["searches"][0];
    let engine = open(case, CacheOptions::default());
    let options = BeamOptions { max_tokens: 500, length_penalty: 1.0, early_stopping: false, stop_ids: [0].into() };
    let prompt: Vec<u32> = (0..250).map(|i| (i * 7) % 211).collect();
    let run = |n, options: &BeamOptions, interrupted| {
        let mut session = Session::new(&engine, n, 256).expect("a session");
        beam_search(&mut session, &prompt, options, &AtomicBool::new(interrupted)).expect("a search").beams
    };
    let full = run(3, &options, false);
    assert!(full.iter().all(|beam| beam.tokens.len() <= 7), "six places, and one that needs none: {full:?}");
    assert_eq!(full.len(), 3);
    let interrupted = run(3, &options, true);
    assert!(interrupted.iter().all(|b| b.tokens.len() == 1), "{interrupted:?}");
    assert!(interrupted.iter().any(|b| b.finish_reason == FinishReason::Interrupted), "{interrupted:?}");
    assert!(run(3, &BeamOptions { max_tokens: 0, ..options.clone() }, false).is_empty());
    assert_eq!(run(250, &BeamOptions { max_tokens: 1, ..options }, false).len(), 211, "each id once");
}

#[test]
fn contrastive_search_follows_its_formula() {
    // The text does not matter here, but there has to be some.
    let tokenizer = Tokenizer::from_json(
        &serde_json::from_slice(
            &std::fs::read(repository("tests/data/chat/tokenizers/byte_level.json")).expect("there"),
        )
        .expect("valid"),
        None,
    )
    .expect("a tokenizer");
    for case in list(&vectors()["searches"]) {
        let prompt = ids(&case["prompt"]);
        for options in [CacheOptions::default(), CacheOptions { page_size: Some(16), ..CacheOptions::default() }] {
            let engine = open(case, options);
            for wanted in list(&case["contrastive"]) {
                let k = wanted["k"].as_u64().expect("a number") as usize;
                let mut session = Session::new(&engine, k, prompt.len() + NEW_TOKENS).expect("a session");
                let options = GenerateOptions {
                    max_tokens: NEW_TOKENS,
                    sampling: SamplingOptions::default(),
                    stop_ids: ids(&wanted["eos"]).into_iter().collect(),
                    stop_strings: Vec::new(),
                };
                let alpha = number(&wanted["alpha"]);
                let (on, go) = (&mut |_: &str| (), AtomicBool::new(false));
                let found = contrastive_search(&mut session, &tokenizer, &prompt, alpha, &options, &go, on);
                assert_eq!(found.expect("a text").tokens, ids(&wanted["tokens"]), "{} {k} {alpha}", case["model"]);
            }
        }
    }
}

#[test]
fn typical_ids_are_those_of_transformers() {
    let client = device::open(plugin(), 1).expect("the plugin opens").1;
    let cases = vectors();
    let cases = list(&cases["typical"]);
    assert!(cases.len() >= 12);
    let (b, v) = (6, 40);
    let g = Graph::new("typical");
    let logits = g.arg("logits", DType::F32, &[b, v]);
    let p = g.arg("p", DType::F32, &[b, 1]);
    let weights = (&logits - logits.max_keep(&[1]).broadcast_to(&[b, v])).exp();
    g.output("kept", &sampling::typical(&weights, &p).cast(DType::I32));
    let text = g.finish().expect("a valid graph").stablehlo();
    let program = client.compile(&text, &CompileOptions::default()).expect("it compiles");
    for case in cases {
        let logits: Vec<f32> = list(&case["logits"]).iter().flat_map(|row| list(row).iter().map(number)).collect();
        let kept = |p: f32| {
            let logits = client.upload_slice(&logits, &[b, v], None).expect("uploaded");
            let p = client.upload_slice(&vec![p; b], &[b, 1], None).expect("uploaded");
            let kept = program.execute(&[&logits, &p]).expect("it runs")[0].to_vec::<i32>().expect("i32");
            let row = |row: &[i32]| (0..v as u32).filter(|id| row[*id as usize] == 1).collect::<Vec<u32>>();
            kept.chunks(v).map(row).collect::<Vec<_>>()
        };
        let wanted: Vec<Vec<u32>> = list(&case["kept"]).iter().map(ids).collect();
        assert_eq!(kept(number(&case["p"])), wanted, "p = {}", case["p"]);
        assert!(kept(1.0).iter().all(|row| row.len() == v), "1 keeps all");
        assert!(kept(1e-6).iter().all(|row| row.len() == 1), "one is left");
    }
}
