//! Pins that slots do not see each other, in every layout of the cache: texts that begin and end at different times, prompts
//! of different lengths in one batch, beginnings taken over from another slot, a pool of pages that is too small.

use std::path::PathBuf;

use xla::DType;
use xllama::generation::SamplingOptions;
use xllama::runtime::{CacheOptions, Engine, Session};

use crate::support::{Folder, engine, golden};

const STATIC: CacheOptions = CacheOptions { dtype: None, page_size: None, pages: None };
const PAGED: CacheOptions = CacheOptions { page_size: Some(16), ..STATIC };

/// Full layers, windowed ones, and both in one model, there also with pages; windows of 7 make rings of 39.
const CASES: [(&str, CacheOptions); 4] =
    [("gqa2", STATIC), ("gqa2", PAGED), ("mistral-window7", STATIC), ("gemma3-window7", PAGED)];

fn open(case: &str, options: CacheOptions) -> Engine {
    engine(&PathBuf::from(golden(case))).with_cache(options)
}

/// `len` ids below `vocab`.
fn prompt(len: usize, salt: usize, vocab: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 31 + i * i * salt + salt) % vocab) as u32).collect()
}

fn drawn(session: &Session) -> Vec<u32> {
    let drawn = session.read_tokens().expect("tokens").wait().expect("tokens");
    drawn.iter().map(|drawn| drawn.id).collect()
}

/// `n` greedy tokens after `prompt` in a session of its own.
fn alone(engine: &Engine, prompt: &[u32], n: usize) -> Vec<u32> {
    let mut session = Session::new(engine, 1, 256).expect("a session");
    session.prefill(&[prompt.to_vec()], &[SamplingOptions::default()], None).expect("a prefill");
    let mut text = drawn(&session);
    while text.len() < n {
        session.decode().expect("a step");
        text.extend(drawn(&session));
    }
    text
}

#[test]
fn texts_begin_and_end_at_different_times() {
    for (case, options) in CASES {
        let engine = open(case, options);
        let vocab = engine.config().vocab_size;
        let greedy = SamplingOptions::default();
        let mut session = Session::new(&engine, 3, 256).expect("a session");
        // At which step a prompt begins, in which slot, and its length.
        let starts = [(0, 0, 50), (3, 1, 5), (7, 2, 90), (25, 1, 33), (60, 1, 64)];
        let mut texts: Vec<(usize, Vec<u32>, Vec<u32>)> = Vec::new();
        for step in 0..90 {
            if step > 0 {
                session.decode().expect("a step");
                let ids = drawn(&session);
                for (slot, id) in ids.iter().enumerate() {
                    if let Some(text) = texts.iter_mut().rev().find(|(of, ..)| *of == slot) {
                        text.2.push(*id);
                    }
                }
            }
            for (_, slot, len) in starts.iter().filter(|(at, ..)| *at == step) {
                let prompt = prompt(*len, step + 2, vocab);
                session.free(*slot);
                session.start(*slot, &prompt, &greedy).expect("a start");
                texts.push((*slot, prompt, vec![drawn(&session)[*slot]]));
            }
        }
        for (slot, prompt, text) in texts {
            let wanted = alone(&engine, &prompt, text.len());
            assert_eq!(text, wanted, "{case}, {options:?}: {} tokens in slot {slot}", prompt.len());
        }
    }
}

#[test]
fn a_beginning_is_taken_over() {
    for (case, options) in CASES {
        let engine = open(case, options);
        let vocab = engine.config().vocab_size;
        let greedy = SamplingOptions::default();
        let first = prompt(60, 3, vocab);
        let second = [&first[..45], &prompt(20, 5, vocab)].concat();
        let mut session = Session::new(&engine, 3, 256).expect("a session");
        session.start(0, &first, &greedy).expect("a start");
        let mut texts = [vec![drawn(&session)[0]], Vec::new(), Vec::new()];
        for (slot, prompt) in [(1, &first), (2, &second)] {
            let reused = session.reuse(slot, prompt).expect("a copy");
            // Of a ring the last positions only can be taken back: 15 are within its slack, with those since drawn.
            let wanted = if slot == 1 { 59 } else { 45 };
            assert_eq!(reused, wanted, "{case}, {options:?}");
            assert_eq!(session.used()[slot], reused);
            session.start(slot, &prompt[reused..], &greedy).expect("a start");
            let ids = drawn(&session);
            texts[slot].push(ids[slot]);
        }
        for _ in 1..40 {
            session.decode().expect("a step");
            texts.iter_mut().zip(drawn(&session)).for_each(|(text, id)| text.push(id));
        }
        for (prompt, text) in [&first, &first, &second].into_iter().zip(texts) {
            assert_eq!(text, alone(&engine, prompt, 40), "{case}, {options:?}");
        }
        let other = prompt(30, 9, vocab);
        assert_eq!(session.reuse(1, &other).expect("nothing to copy"), 0);
        assert_eq!(session.used()[1], 0, "the slot is empty then");
    }
}

#[test]
fn prompts_of_different_lengths_get_their_own_logits() {
    for (case, options) in CASES {
        let engine = open(case, options);
        let vocab = engine.config().vocab_size;
        let rows = [prompt(70, 1, vocab), prompt(3, 2, vocab), Vec::new(), prompt(41, 4, vocab)];
        let mut session = Session::new(&engine, 4, 256).expect("a session");
        // All at once, then more of some: what was padding must not be seen.
        let more = [prompt(2, 6, vocab), prompt(9, 7, vocab), prompt(20, 8, vocab), Vec::new()];
        let mut found: Vec<Vec<f32>> = vec![Vec::new(); 4];
        for (rows, padded) in [(&rows, 80), (&more, 32)] {
            let logits = session.logits(rows, padded).expect("logits");
            let mut at = 0;
            for (slot, row) in rows.iter().enumerate() {
                found[slot].extend(&logits[at..at + row.len() * vocab]);
                at += row.len() * vocab;
            }
            assert_eq!(at, logits.len());
        }
        for (slot, found) in found.iter().enumerate() {
            let mut session = Session::new(&engine, 1, 256).expect("a session");
            let text = [&rows[slot][..], &more[slot]].concat();
            let wanted = session.logits(std::slice::from_ref(&text), text.len()).expect("logits");
            assert_eq!(found.len(), wanted.len());
            let worst = found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 1e-4, "{case}, {options:?}, slot {slot}: {worst}");
        }
    }
}

#[test]
fn a_pool_that_is_too_small_says_so() {
    let pages = CacheOptions { pages: Some(6), ..PAGED };
    let engine = open("gqa2", pages);
    let greedy = SamplingOptions::default();
    let mut session = Session::new(&engine, 2, 256).expect("a session");
    let (long, short) = (prompt(60, 3, 211), prompt(40, 4, 211));
    session.start(0, &long, &greedy).expect("four pages");
    let first = drawn(&session)[0];
    let error = session.start(1, &short, &greedy).expect_err("three pages, where two are left").to_string();
    assert!(error.contains("pages") && error.contains("free a slot"), "{error}");
    assert_eq!((session.used(), session.slots().free_pages()), (vec![60, 0], Some(2)), "nothing is changed");
    session.free(0);
    session.start(1, &short, &greedy).expect("six pages are left");
    let mut text = vec![drawn(&session)[1]];
    while text.len() < 30 {
        session.decode().expect("a step");
        text.push(drawn(&session)[1]);
    }
    assert_eq!(text, alone(&engine, &short, 30));
    assert_eq!(first, alone(&open("gqa2", PAGED), &long, 1)[0]);

    // Slots that share a beginning share its pages: two texts of 64 fit where one has room.
    let mut session = Session::new(&engine, 2, 256).expect("a session");
    let shared = prompt(64, 5, 211);
    session.start(0, &shared, &greedy).expect("four pages");
    assert_eq!(session.reuse(1, &shared).expect("no page is copied"), 63);
    assert_eq!(session.slots().free_pages(), Some(2));
    session.start(1, &shared[63..], &greedy).expect("one page is copied");
    assert_eq!(session.slots().free_pages(), Some(1));
    let ids = drawn(&session);
    assert_eq!(ids[1], alone(&open("gqa2", PAGED), &shared, 1)[0]);
}

/// int8 loses little: the same greedy text for a while, and logits that are close.
#[test]
fn int8_is_close() {
    for case in ["gqa2", "mistral-window7"] {
        for page_size in [None, Some(16)] {
            let text = prompt(80, 1, 97);
            let logits = |dtype| {
                let engine = open(case, CacheOptions { dtype, page_size, pages: None });
                let mut session = Session::new(&engine, 1, 256).expect("a session");
                let mut all = Vec::new();
                for part in text.chunks(16) {
                    all.extend(session.logits(&[part.to_vec()], 16).expect("logits"));
                }
                all
            };
            let (exact, int8) = (logits(None), logits(Some(DType::I8)));
            let scale = exact.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            let worst = exact.iter().zip(&int8).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst > 0.0 && worst <= 0.02 * scale, "{case}: {worst} of {scale}");
        }
    }
}

/// A window that is hardly shorter than the cache is a window still: the logits are those of a longer cache, whose ring
/// is far from its end, and only a window of all positions is none.
#[test]
fn a_window_near_the_length_of_the_cache() {
    let folder = Folder::new();
    let source = PathBuf::from(golden("mistral-window7"));
    let config = std::fs::read_to_string(source.join("config.json")).expect("there");
    let mut all: Vec<Vec<f32>> = Vec::new();
    for window in [223, 224, 225, 240, 255, 256] {
        let path = folder.path(&window.to_string());
        std::fs::create_dir(&path).expect("new");
        std::fs::copy(source.join("model.safetensors"), path.join("model.safetensors")).expect("copied");
        let mut config: serde_json::Value = serde_json::from_str(&config).expect("JSON");
        config["sliding_window"] = window.into();
        std::fs::write(path.join("config.json"), config.to_string()).expect("written");
        let engine = engine(&path);
        let ids = prompt(256, 3, engine.config().vocab_size);
        let logits = |len: usize, chunk: usize| -> Vec<f32> {
            let mut session = Session::new(&engine, 1, len).expect("a session");
            ids.chunks(chunk).flat_map(|part| session.logits(&[part.to_vec()], chunk).expect("it runs")).collect()
        };
        let long = logits(600, 256);
        for (len, chunk) in [(256, 256), (256, 64), (600, 64)] {
            let found = logits(len, chunk);
            let worst = long.iter().zip(&found).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst < 1e-4, "window {window}, cache {len}, chunks of {chunk}: {worst}");
        }
        // Each window is another one.
        if let Some(before) = all.last() {
            assert!(before.iter().zip(&long).any(|(a, b)| (a - b).abs() > 1e-3), "window {window}");
        }
        all.push(long);
    }
}

#[test]
fn log_probabilities_are_those_of_the_slots_own_prompt() {
    let engine = open("gqa2", STATIC);
    let vocab = engine.config().vocab_size;
    // The second ends in a later chunk than the first, the third is started while both stand.
    let prompts = [prompt(20, 3, vocab), prompt(200, 4, vocab), prompt(40, 5, vocab)];
    for count in [0, 2] {
        let options = SamplingOptions { log_probabilities: Some(count), ..SamplingOptions::default() };
        let read = |session: &Session| session.read_tokens().expect("tokens").wait().expect("tokens");
        let mut together = Session::new(&engine, 3, 256).expect("a session");
        let mut all = [prompts[0].clone(), prompts[1].clone(), vec![1]].to_vec();
        together.prefill(&all, &vec![options.clone(); 3], None).expect("a prefill");
        together.free(2);
        together.start(2, &prompts[2], &options).expect("a start");
        all[2] = prompts[2].clone();
        let found = read(&together);
        for (slot, prompt) in all.iter().enumerate() {
            let mut alone = Session::new(&engine, 1, 256).expect("a session");
            alone.prefill(std::slice::from_ref(prompt), std::slice::from_ref(&options), None).expect("a prefill");
            let [wanted] = &read(&alone)[..] else { panic!("one slot") };
            let found = &found[slot];
            assert_eq!((found.id, found.best.len()), (wanted.id, count));
            let pairs = found.best.iter().zip(&wanted.best).map(|(a, b)| (a.1, b.1));
            let own = (found.log_probability.expect("asked for"), wanted.log_probability.expect("asked for"));
            for (a, b) in pairs.chain([own]) {
                assert!((a - b).abs() < 1e-4, "slot {slot}: {a} and {b}");
            }
        }
    }
}
