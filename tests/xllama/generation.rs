//! Pins what is generated: seeds, stops, filters and penalties, whole characters, batches, and that the sampler in the
//! graph draws from the distribution that it says it draws from.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use converter::Checkpoint;
use serde_json::{Value, json};
use xllama::generation::{FinishReason, GenerateOptions, SamplingOptions, generate};
use xllama::runtime::{Engine, Session};
use xllama::text::Tokenizer;

use crate::support::{Folder, Tiny, VOCAB, byte_id, engine, finish, golden, run, xllama_with_own_cache};

/// Runs `xllama generate ARGS --json --model MODEL`.
fn text(model: &str, args: &[&str]) -> Value {
    run([&["generate", "--json", "--model", model], args].concat()).json()
}

fn tokens(done: &Value) -> Vec<u64> {
    done["tokens"].as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id")).collect()
}

#[test]
fn seeds_decide() {
    let folder = Tiny::random().folder();
    let draw =
        |seed: &str| text(&folder.model(), &["once", "--max-tokens", "24", "--temperature", "1.5", "--seed", seed]);
    let one = draw("1");
    assert_eq!((&one["tokens"], &one["text"]), (&draw("1")["tokens"], &draw("1")["text"]));
    let others: BTreeSet<Vec<u64>> = ["0", "1", "2", "18446744073709551615"].map(|s| tokens(&draw(s))).into();
    assert_eq!(others.len(), 4, "four seeds, four texts");
}

#[test]
fn narrow_filters_are_greedy() {
    let folder = Tiny::random().folder();
    let draw = |args: &[&str]| tokens(&text(&folder.model(), &[&["once upon", "--max-tokens", "24"], args].concat()));
    let greedy = draw(&[]);
    for narrow in [["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]] {
        for temperature in ["0.1", "1.5", "100"] {
            let drawn = draw(&[&["--temperature", temperature, "--seed", "7"][..], &narrow].concat());
            assert_eq!(drawn, greedy, "{narrow:?} at {temperature}");
        }
    }
    assert_eq!(draw(&["--temperature", "1e-30", "--seed", "7"]), greedy, "as cold as can be");
    assert_ne!(draw(&["--temperature", "1.5", "--seed", "7"]), greedy);
}

#[test]
fn biases_and_penalties() {
    let folder = Tiny::random().folder();
    let draw = |args: &[&str]| tokens(&text(&folder.model(), &[&["once upon", "--max-tokens", "20"], args].concat()));
    let greedy = draw(&[]);
    let first = greedy[0].to_string();
    let forced = draw(&["--logit-bias", "77=1e6"]);
    assert_eq!(forced, [77; 20]);
    for forbidden in ["-inf", "-1e9"] {
        let drawn = draw(&["--logit-bias", &format!("{first}={forbidden}")]);
        assert!(!drawn.contains(&greedy[0]), "{drawn:?}");
    }
    let warm = draw(&["--temperature", "5", "--logit-bias", &format!("{first}=-inf"), "--logit-bias", "77=-inf"]);
    assert!(!warm.contains(&greedy[0]) && !warm.contains(&77), "{warm:?}");

    // Large enough penalties leave no id twice.
    for penalty in [["--presence-penalty", "1e6"], ["--frequency-penalty", "1e6"]] {
        let drawn = draw(&penalty);
        assert_eq!(drawn[0], greedy[0], "nothing was generated yet");
        assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), 20, "{penalty:?}: {drawn:?}");
    }
    assert_ne!(draw(&["--repetition-penalty", "1.8"]), draw(&["--logit-bias", &format!("{first}=0")]));
}

/// Greedy tokens of constant logits under penalties, computed here.
#[test]
fn penalties_are_those_of_a_reference() {
    let logits: Vec<f32> = (0..12).map(|i| 3.0 - 0.37 * i as f32).collect();
    let folder = Tiny::constant(&logits).folder();
    let engine = engine(&folder.path("model"));
    let prompt = vec![0u32, 0, 4, 11];
    for (repetition, presence, frequency) in
        [(1.3, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.0, 0.3), (1.7, 0.2, 0.15), (0.8, -0.1, 0.4)]
    {
        let options = SamplingOptions {
            repetition_penalty: repetition,
            presence_penalty: presence,
            frequency_penalty: frequency,
            ..SamplingOptions::default()
        };
        let mut counts = [0.0f32; 12];
        let mut wanted = Vec::new();
        for _ in 0..30 {
            let penalised = logits.iter().enumerate().map(|(id, &x)| {
                let seen = counts[id] > 0.0 || prompt.contains(&(id as u32));
                let x = if !seen {
                    x
                } else if x < 0.0 {
                    x * repetition
                } else {
                    x / repetition
                };
                x - counts[id] * frequency - if counts[id] > 0.0 { presence } else { 0.0 }
            });
            let best =
                penalised.enumerate().fold((0, f32::MIN), |best, (id, x)| if x > best.1 { (id, x) } else { best });
            counts[best.0] += 1.0;
            wanted.push(best.0 as u32);
        }
        let drawn = drawn_alone(&engine, &prompt, &options, 30);
        assert_eq!(drawn, wanted, "{options:?}");
    }
}

/// `n` tokens after `prompt` in a session of its own.
fn drawn_alone(engine: &Engine, prompt: &[u32], options: &SamplingOptions, n: usize) -> Vec<u32> {
    drawn(engine, &[prompt.to_vec()], std::slice::from_ref(options), n, None).remove(0)
}

/// `n` tokens after each prompt, in one session.
fn drawn(
    engine: &Engine,
    prompts: &[Vec<u32>],
    options: &[SamplingOptions],
    n: usize,
    chunk: Option<usize>,
) -> Vec<Vec<u32>> {
    let longest = prompts.iter().map(Vec::len).max().expect("a prompt");
    let mut session = Session::new(engine, prompts.len(), longest + n + chunk.unwrap_or(32)).expect("a session");
    session.prefill(prompts, options, chunk).expect("a prefill");
    let mut texts = vec![Vec::new(); prompts.len()];
    for i in 0..n {
        let drawn = session.read_tokens().expect("tokens").wait().expect("tokens");
        texts.iter_mut().zip(drawn).for_each(|(text, drawn)| text.push(drawn.id));
        if i + 1 < n {
            session.decode().expect("a step");
        }
    }
    texts
}

#[test]
fn a_slot_gets_what_it_gets_alone() {
    let engine = engine(golden("gqa2").as_ref());
    let prompt = |len: u32, salt: u32| (0..len).map(|i| (i * 31 + salt) % 211).collect::<Vec<u32>>();
    let prompts = [prompt(5, 3), prompt(70, 1), prompt(33, 8)];
    let greedy = SamplingOptions::default();
    let random = |seed| SamplingOptions { temperature: 1.0, top_p: 0.9, seed, ..SamplingOptions::default() };
    let penalised = SamplingOptions { repetition_penalty: 1.4, logit_bias: vec![(9, 2.0)], ..random(5) };
    for options in [
        [greedy.clone(), greedy.clone(), greedy.clone()],
        [random(1), random(2), random(1)],
        [greedy, random(3), penalised],
    ] {
        let alone: Vec<Vec<u32>> = prompts.iter().zip(&options).map(|(p, o)| drawn_alone(&engine, p, o, 24)).collect();
        for chunk in [None, Some(16), Some(7)] {
            let together = drawn(&engine, &prompts, &options, 24, chunk);
            assert_eq!(together, alone, "chunks of {chunk:?}");
        }
    }
}

#[test]
fn a_text_goes_on_where_it_ended() {
    let engine = engine(golden("gqa2").as_ref());
    let options = [SamplingOptions::default()];
    let prompt: Vec<u32> = (0..40).map(|i| (i * 17 + 3) % 211).collect();
    let whole = drawn_alone(&engine, &prompt, &options[0], 8);
    let mut session = Session::new(&engine, 1, 256).expect("a session");
    session.prefill(&[prompt[..33].to_vec()], &options, None).expect("a prefill");
    session.decode().expect("a step that does not count");
    session.truncate(0, 20);
    session.prefill(&[prompt[20..].to_vec()], &options, None).expect("a prefill");
    assert_eq!(session.used(), [40]);
    for wanted in whole {
        assert_eq!(session.read_tokens().expect("tokens").wait().expect("tokens")[0].id, wanted);
        session.decode().expect("a step");
    }
    // The cache has an end, and what does not fit is an error.
    let error = (0..300).find_map(|_| session.decode().err()).expect("256 positions").to_string();
    assert!(error.contains("256 is the limit (the length of the cache)"), "{error}");
    assert!(session.prefill(&[vec![]], &options, None).is_err());
    assert!(session.prefill(&[vec![211]], &options, None).is_err());
    assert!(session.prefill(&[vec![1], vec![1]], &options, None).is_err());
}

/// Probabilities after temperature, then top-k, then top-p of what is left, then min-p, then typical-p of what is left, in
/// float64.
fn reference(logits: &[f32], o: &SamplingOptions) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    let best = logits[order[0]];
    let weight = |id: usize| (f64::from(logits[id] - best) / f64::from(o.temperature)).exp();
    if o.top_k > 0 {
        order.truncate(o.top_k);
    }
    let total: f64 = order.iter().map(|id| weight(*id)).sum();
    let mut before = 0.0;
    let top_p: Vec<usize> = order
        .iter()
        .copied()
        .take_while(|id| {
            let kept = before < f64::from(o.top_p) * total;
            before += weight(*id);
            kept
        })
        .collect();
    let mut kept: Vec<usize> = top_p.into_iter().filter(|id| weight(*id) >= f64::from(o.min_p)).collect();
    let total: f64 = kept.iter().map(|id| weight(*id)).sum();
    let surprise = |id: &usize| -(weight(*id) / total).ln();
    let entropy: f64 = kept.iter().map(|id| weight(*id) / total * surprise(id)).sum();
    kept.sort_by(|a, b| (surprise(a) - entropy).abs().total_cmp(&(surprise(b) - entropy).abs()));
    let mut before = 0.0;
    kept.retain(|id| {
        let stays = before < f64::from(o.typical_p) * total;
        before += weight(*id);
        stays
    });
    let total: f64 = kept.iter().map(|id| weight(*id)).sum();
    (0..logits.len()).map(|id| if kept.contains(&id) { weight(id) / total } else { 0.0 }).collect()
}

/// Asserts that counts fit probabilities: Σ (n − e)² / e below its mean k plus 5 standard deviations √(2k).
#[track_caller]
fn fits(counts: &[f64], probabilities: &[f64], what: &str) {
    let n: f64 = counts.iter().sum();
    let cells = || counts.iter().zip(probabilities);
    assert!(
        cells().all(|(c, p)| *p > 0.0 || *c == 0.0),
        "{what}: an id that was filtered out: {counts:?} {probabilities:?}"
    );
    let chi2: f64 = cells().filter(|(_, p)| **p > 0.0).map(|(c, p)| (c - n * p).powi(2) / (n * p)).sum();
    let k = cells().filter(|(_, p)| **p > 0.0).count() as f64 - 1.0;
    assert!(chi2 <= k + 5.0 * (2.0 * k).sqrt(), "{what}: chi-square {chi2} with {k} degrees of freedom: {counts:?}");
}

#[test]
fn draws_have_the_distribution_of_a_reference() {
    const SLOTS: usize = 64;
    const STEPS: usize = 64;
    // Neither sorted nor evenly spaced.
    let logits: Vec<f32> = (0..16).map(|i| 1.1 * ((i * 7 + 3) % 16) as f32 / 4.0 - 0.013 * i as f32).collect();
    let folder = Tiny::constant(&logits).folder();
    let engine = engine(&folder.path("model"));
    let base = SamplingOptions { temperature: 1.0, ..SamplingOptions::default() };
    for (name, options) in [
        ("all", base.clone()),
        ("warm", SamplingOptions { temperature: 3.0, ..base.clone() }),
        ("top-k", SamplingOptions { top_k: 5, ..base.clone() }),
        ("top-p", SamplingOptions { top_p: 0.7, ..base.clone() }),
        ("min-p", SamplingOptions { min_p: 0.2, ..base.clone() }),
        ("all three", SamplingOptions { temperature: 2.0, top_k: 9, top_p: 0.8, min_p: 0.3, ..base.clone() }),
        ("typical", SamplingOptions { typical_p: 0.4, ..base.clone() }),
        (
            "all four",
            SamplingOptions { temperature: 2.0, top_k: 12, top_p: 0.9, min_p: 0.1, typical_p: 0.6, ..base.clone() },
        ),
        ("more than there are", SamplingOptions { top_k: 999, ..base }),
    ] {
        let seeded: Vec<SamplingOptions> =
            (0..SLOTS as u64).map(|seed| SamplingOptions { seed: seed * 1000 + 17, ..options.clone() }).collect();
        let texts = drawn(&engine, &vec![vec![1]; SLOTS], &seeded, STEPS, Some(1));
        let probabilities = reference(&logits, &options);
        let mut counts = [0.0; 16];
        texts.iter().flatten().for_each(|id| counts[*id as usize] += 1.0);
        fits(&counts, &probabilities, name);

        // Neighbours in a text and in a batch are independent.
        let kept: Vec<usize> = (0..16).filter(|id| probabilities[*id] > 0.0).collect();
        let pairs: Vec<f64> =
            kept.iter().flat_map(|a| kept.iter().map(|b| probabilities[*a] * probabilities[*b])).collect();
        let place = |id: u32| kept.iter().position(|k| *k == id as usize).expect("kept");
        let mut along = vec![0.0; pairs.len()];
        let mut across = vec![0.0; pairs.len()];
        for (slot, text) in texts.iter().enumerate() {
            text.windows(2).for_each(|w| along[place(w[0]) * kept.len() + place(w[1])] += 1.0);
            let next = &texts[(slot + 1) % SLOTS];
            text.iter().zip(next).for_each(|(a, b)| across[place(*a) * kept.len() + place(*b)] += 1.0);
        }
        fits(&along, &pairs, &format!("{name}, one after another"));
        fits(&across, &pairs, &format!("{name}, side by side"));
        assert!(texts.iter().collect::<BTreeSet<_>>().len() == SLOTS, "{name}: two seeds, one text");
    }
}

/// A text with characters of one to four bytes, each byte once.
const TEXT: &str = "aé🙂 日b!\nz";

#[test]
fn stops_cut_the_text() {
    let folder = Tiny::says(TEXT, 2).folder();
    let model = folder.model();
    let whole = text(&model, &[""]);
    assert_eq!((whole["text"].as_str(), whole["finish_reason"].as_str()), (Some(TEXT), Some("stop")));
    assert_eq!(tokens(&whole).len(), TEXT.len() + 1, "the id that ends the text is one of its tokens");
    for (stops, left) in [
        (&["🙂"][..], "aé"),
        (&["日b"], "aé🙂 "),
        (&["b!", "🙂 日"], "aé"),
        (&["never", "\n"], "aé🙂 日b!"),
        (&["日x", "!"], "aé🙂 日b"),
        (&["zz", "never"], TEXT),
        (&["a"], ""),
    ] {
        let args: Vec<&str> = stops.iter().flat_map(|s| ["--stop", s]).collect();
        let cut = text(&model, &[&[""], &args[..]].concat());
        assert_eq!((cut["text"].as_str(), cut["finish_reason"].as_str()), (Some(left), Some("stop")), "{stops:?}");
        let streamed = run([&["generate", "", "--quiet", "--model", &model], &args[..]].concat());
        assert_eq!(streamed.ok(), format!("{left}\n"));
    }
    run(["generate", "", "--stop", "", "--model", &model]).fails(2, &["--stop"]);

    // Several ids end a text: those of config.json and of generation_config.json.
    let config = json!({ "eos_token_id": [2, byte_id(b'b')] });
    std::fs::write(folder.path("model/generation_config.json"), config.to_string()).expect("writable");
    assert_eq!(text(&model, &[""])["text"], "aé🙂 日");
    Tiny::says(TEXT, 2).with("eos_token_id", json!([2, byte_id(b'!')])).write(&folder.path("model"));
    std::fs::remove_file(folder.path("model/generation_config.json")).expect("there");
    assert_eq!(text(&model, &[""])["text"], "aé🙂 日b");
}

#[test]
fn a_stream_has_whole_characters() {
    let folder = Tiny::says(TEXT, 2).folder();
    let checkpoint = Checkpoint::open(&folder.path("model")).expect("a checkpoint");
    let tokenizer = Tokenizer::of_checkpoint(&checkpoint).expect("a tokenizer");
    let engine = engine(&folder.path("model"));
    let run = |max_tokens: usize, interrupt: bool| {
        let mut session = Session::new(&engine, 1, 64).expect("a session");
        let options = GenerateOptions {
            max_tokens,
            sampling: SamplingOptions::default(),
            stop_ids: [2].into(),
            stop_strings: vec!["never".into()],
        };
        let mut pieces: Vec<String> = Vec::new();
        let interrupt = AtomicBool::new(interrupt);
        let done =
            generate(&mut session, &tokenizer, &[1], &options, &interrupt, &mut |piece| pieces.push(piece.into()));
        let done = done.expect("a text");
        assert_eq!(pieces.concat(), done.text);
        (pieces, done)
    };
    let (pieces, done) = run(100, false);
    assert_eq!(pieces, ["a", "é", "🙂", " ", "日", "b", "!", "\n", "z"]);
    assert_eq!(done.finish_reason, FinishReason::Stop);

    // Cut inside of a character, at most the replacement character stands for what is missing.
    for n in 1..=TEXT.len() {
        let (pieces, done) = run(n, false);
        assert_eq!((done.tokens.len(), done.finish_reason), (n, FinishReason::Length));
        let whole: String = TEXT.char_indices().take_while(|(at, c)| at + c.len_utf8() <= n).map(|(_, c)| c).collect();
        let rest = done.text.strip_prefix(&whole).expect("the whole characters");
        assert!(rest.chars().all(|c| c == char::REPLACEMENT_CHARACTER), "{n}: {pieces:?}");
        assert_eq!(rest.is_empty(), whole.len() == n, "{n}: {pieces:?}");
    }
    let (_, done) = run(100, true);
    assert_eq!((done.text.as_str(), done.finish_reason), ("a", FinishReason::Interrupted));
}

#[test]
fn the_models_own_generation_config_counts() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let args = ["once", "--max-tokens", "12"];
    let greedy = text(&model, &args);
    let with = |config: Value| {
        std::fs::write(folder.path("model/generation_config.json"), config.to_string()).expect("writable");
        text(&model, &args)["tokens"].clone()
    };
    assert_eq!(with(json!({ "do_sample": false, "temperature": 1.5 })), greedy["tokens"]);
    assert_eq!(with(json!({ "do_sample": true, "temperature": 1.5, "top_k": 1 })), greedy["tokens"]);
    let sampled = with(json!({ "do_sample": true, "temperature": 1.5 }));
    assert_ne!(sampled, greedy["tokens"]);
    let asked = text(&model, &["once", "--max-tokens", "12", "--temperature", "0"]);
    assert_eq!(asked["tokens"], greedy["tokens"], "what the user asks for counts more");
    std::fs::write(folder.path("model/generation_config.json"), "{").expect("writable");
    run(["generate", "x", "--model", &model]).fails(1, &["generation_config.json"]);
    std::fs::write(folder.path("model/generation_config.json"), r#"{"do_sample": true, "temperature": -1}"#)
        .expect("writable");
    assert_eq!(run(["generate", "x", "--model", &model]).stderr.matches("error: ").count(), 1);
}

#[test]
fn other_types_speak_too() {
    let folder = Tiny::says(TEXT, 2).folder();
    for dtype in ["f32", "bf16", "f16"] {
        assert_eq!(text(&folder.model(), &["", "--dtype", dtype])["text"], TEXT, "{dtype}");
    }
    // A converted folder says the same as the one that it was made of.
    let out = Folder::new();
    run(["convert-params", &folder.model(), &out.arg("params")]).ok();
    assert_eq!(text(&out.arg("params"), &[""])["text"], TEXT);
    let random = Tiny::random().folder();
    run(["convert-params", &random.model(), &out.arg("random")]).ok();
    let (a, b) = (text(&random.model(), &["once"]), text(&out.arg("random"), &["once"]));
    assert_eq!(a["tokens"], b["tokens"]);
}

#[test]
fn the_default_model_speaks() {
    let mut first = xllama_with_own_cache();
    first.args(["generate", "The capital of France is", "--max-tokens", "12", "--json"]);
    let plain = finish(&mut first).json();
    assert!(plain["text"].as_str().is_some_and(|t| t.contains("Paris")), "{plain}");
    let mut chat = xllama_with_own_cache();
    chat.args(["generate", "--chat", "Name three colours.", "--max-tokens", "40", "--stop", "\n\n", "--json"]);
    let chat = finish(&mut chat).json();
    assert!(chat["text"].as_str().is_some_and(|t| !t.contains("\n\n") && t.len() > 5), "{chat}");
}

#[test]
fn samples_are_what_their_seeds_give_alone() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let base = ["once upon a time", "--max-tokens", "20", "--temperature", "1.2", "--top-p", "0.95"];
    for more in
        [&[][..], &["--repetition-penalty", "1.3", "--typical-p", "0.8"], &["--stop", "a"], &["--cache-page", "16"]]
    {
        let base = [&base[..], more].concat();
        let all = text(&model, &[&base[..], &["--samples", "4", "--seed", "5"]].concat());
        let samples = all["samples"].as_array().expect("a list");
        assert_eq!(samples.len(), 4);
        for (i, sample) in samples.iter().enumerate() {
            let alone = text(&model, &[&base[..], &["--seed", &(5 + i).to_string()]].concat());
            for key in ["text", "tokens", "finish_reason"] {
                assert_eq!(sample[key], alone[key], "{more:?}, sample {i}");
            }
        }
        for key in ["text", "tokens", "finish_reason"] {
            assert_eq!(all[key], samples[0][key], "the first is the one that counts");
        }
        let texts: BTreeSet<String> = samples.iter().map(|sample| sample["tokens"].to_string()).collect();
        assert_eq!(texts.len(), 4, "four seeds, four texts");
    }
    // A prompt of one token has nothing to share, and one sample is one text.
    let one = text(&model, &["", "--max-tokens", "3", "--samples", "2", "--temperature", "1"]);
    assert_eq!(one["samples"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        text(&model, &["x", "--max-tokens", "3", "--samples", "1"])["samples"].as_array().map(Vec::len),
        Some(1)
    );
    assert_eq!(text(&model, &["x", "--max-tokens", "0", "--samples", "2", "--temperature", "1"])["text"], "");

    let shown = run(["generate", "once", "--quiet", "--samples", "2", "--temperature", "1", "--model", &model]);
    let lines: Vec<&str> = shown.ok().lines().filter(|line| line.starts_with("──")).collect();
    assert_eq!(lines, ["── 1 ──", "── 2 ──"]);
}

#[test]
fn log_probabilities_are_the_models_own() {
    let folder = Tiny::random().folder();
    let model = folder.model();
    let out = folder.arg("logits.npz");
    // Whatever is done to the logits before the draw, the model's own count.
    for more in [&[][..], &["--temperature", "2", "--repetition-penalty", "1.5", "--top-k", "9", "--logit-bias", "7=3"]]
    {
        let prompt = ["once", "--max-tokens", "12"];
        let plain = text(&model, &[&prompt[..], more].concat());
        for n in [0usize, 3, 40] {
            let done = text(&model, &[&prompt[..], more, &["--logprobs", &n.to_string()]].concat());
            assert_eq!(done["tokens"], plain["tokens"], "they change nothing");
            let log_probabilities = done["logprobs"].as_array().expect("a list");
            assert_eq!(log_probabilities.len(), 12);

            // Against the logits of the whole text.
            let checkpoint = Checkpoint::open(&folder.path("model")).expect("a checkpoint");
            let tokenizer = Tokenizer::of_checkpoint(&checkpoint).expect("a tokenizer");
            let mut ids: Vec<u64> = tokenizer.encode("once", true).expect("ids").into_iter().map(u64::from).collect();
            let prompt_len = ids.len();
            ids.extend(tokens(&done));
            let list = ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
            run(["logits", "--tokens", &list, "--out", &out, "--model", &model]).ok();
            let mut archive = npyz::npz::NpzArchive::open(&out).expect("an archive");
            let logits: Vec<f32> =
                archive.by_name("logits").expect("readable").expect("there").into_vec().expect("f32");
            for (i, entry) in log_probabilities.iter().enumerate() {
                let row = &logits[(prompt_len + i - 1) * VOCAB..][..VOCAB];
                let total = row.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
                let wanted = |id: &Value| f64::from(row[id.as_u64().expect("an id") as usize]) - total;
                let close = |entry: &Value| {
                    let found = entry["logprob"].as_f64().expect("a number");
                    assert!((found - wanted(&entry["id"])).abs() < 1e-4, "{entry}");
                    assert!(entry["token"].is_string());
                    found
                };
                assert_eq!(entry["id"].as_u64(), Some(ids[prompt_len + i]));
                close(entry);
                let top: Vec<f64> = entry["top"].as_array().expect("a list").iter().map(close).collect();
                assert_eq!(top.len(), n);
                assert!(top.is_sorted_by(|a, b| a >= b), "{top:?}");
                let best = row.iter().copied().fold(f32::MIN, f32::max);
                assert!(top.first().is_none_or(|x| (x - (f64::from(best) - total)).abs() < 1e-4));
            }
        }
    }
    let shown = run(["generate", "once", "--quiet", "--max-tokens", "2", "--logprobs", "2", "--model", &model]);
    let lines: Vec<&str> = shown.ok().lines().rev().take(3).collect();
    assert!(lines[2].starts_with("─") && lines[0].contains('"') && lines[0].contains("-"), "{lines:?}");
    run(["generate", "x", "--logprobs", "320", "--model", &model]).fails(2, &["--logprobs", "319", "320"]);
}

#[test]
fn searches_speak_and_do_not_mix() {
    let folder = Tiny::says(TEXT, 2).folder();
    let model = folder.model();
    let beams = text(&model, &["", "--beams", "3", "--max-tokens", "30"]);
    let list = beams["beams"].as_array().expect("a list");
    assert_eq!((beams["text"].as_str(), beams["finish_reason"].as_str(), list.len()), (Some(TEXT), Some("stop"), 3));
    let scores: Vec<f64> = list.iter().map(|beam| beam["score"].as_f64().expect("a number")).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    assert_eq!((&list[0]["text"], &list[0]["tokens"]), (&beams["text"], &beams["tokens"]));
    let shown = run(["generate", "", "--quiet", "--beams", "2", "--max-tokens", "30", "--model", &model]);
    assert_eq!(shown.ok(), format!("{TEXT}\n"));
    let contrastive = text(&model, &["", "--penalty-alpha", "0.3", "--top-k", "3", "--max-tokens", "30"]);
    assert_eq!(contrastive["text"], TEXT);
    for search in [&["--beams", "2"][..], &["--penalty-alpha", "0.6", "--top-k", "2"]] {
        assert_eq!(text(&model, &[&["", "--max-tokens", "0"], search].concat())["text"], "");
    }

    for (args, parts) in [
        (&["--beams", "2", "--temperature", "1"][..], &["--beams", "--temperature"][..]),
        (&["--beams", "2", "--repetition-penalty", "1.2"], &["--beams", "--repetition-penalty"]),
        (&["--beams", "2", "--logprobs", "1"], &["--beams", "--logprobs"]),
        (&["--beams", "2", "--stop", "x"], &["--beams", "--stop"]),
        (&["--beams", "2", "--samples", "2"], &["--samples", "--beams"]),
        (&["--beams", "2", "--penalty-alpha", "0.6"], &["--beams", "--penalty-alpha"]),
        (&["--beams", "2", "--length-penalty", "inf"], &["--length-penalty", "inf"]),
        (&["--beams", "0"], &["--beams"]),
        (&["--length-penalty", "1"], &["--beams"]),
        (&["--early-stopping"], &["--beams"]),
        (&["--penalty-alpha", "0.6"], &["--penalty-alpha", "--top-k"]),
        (&["--penalty-alpha", "1.6", "--top-k", "4"], &["--penalty-alpha", "1.6"]),
        (&["--penalty-alpha", "0.6", "--top-k", "4", "--top-p", "0.9"], &["--penalty-alpha", "--top-p"]),
        (&["--samples", "2"], &["--samples", "--temperature"]),
        (&["--samples", "0"], &["--samples"]),
    ] {
        run([&["generate", "x", "--model", &model], args].concat()).fails(2, parts);
    }
}
