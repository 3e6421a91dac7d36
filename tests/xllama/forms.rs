//! Pins that the forms of the graph for TPUs and GPUs compute what the CPU's do: whole prompts in blocks, chunks, steps of
//! one token for one slot and for several. They run on the CPU here.

use std::path::Path;

use converter::Checkpoint;
use xla::DType;
use xla::graph::Platform;
use xllama::runtime::{Engine, LoadOptions, Session, device};

use crate::support::{golden, plugin};

/// Grouped heads, all layers windowed, full and windowed layers in one model, and experts.
const CASES: [&str; 4] = ["gqa2", "mistral-window7", "gemma3-window7", "mixtral-5x3"];

/// Two blocks of a TPU's prefill.
const LONG: usize = 1024;

fn engine(case: &str, forms: Platform) -> Engine {
    let (plugin, client) = device::open(plugin(), 1).expect("the plugin opens");
    let checkpoint = Checkpoint::open(Path::new(&golden(case))).expect("a checkpoint");
    let options = LoadOptions { forms: Some(forms), ..LoadOptions::new(DType::F32, None) };
    Engine::load(plugin, client, &checkpoint, options, &|_, _| ()).expect("it loads")
}

/// The logits of every step, one after another: a long prompt at once, a chunk, two single tokens; then two slots with a
/// prompt each and a single token each.
fn logits(engine: &Engine) -> Vec<Vec<f32>> {
    let vocab = engine.config().vocab_size;
    let ids = |n: usize, salt: usize| (0..n).map(|i| ((i * 31 + i * i * salt) % vocab) as u32).collect::<Vec<_>>();
    let runs = |slots: usize, steps: &[(usize, usize)]| {
        let mut session = Session::new(engine, slots, LONG + 64).expect("a session");
        let one = |&(n, padded): &(usize, usize)| {
            let rows: Vec<Vec<u32>> = (0..slots).map(|slot| ids(n, slot + padded + 1)).collect();
            session.logits(&rows, padded).expect("logits")
        };
        steps.iter().map(one).collect::<Vec<_>>()
    };
    [runs(1, &[(LONG, LONG), (20, 32), (1, 1), (1, 1)]), runs(2, &[(70, 80), (1, 1)])].concat()
}

#[test]
fn every_platforms_forms_agree() {
    for case in CASES {
        let wanted = logits(&engine(case, Platform::Cpu));
        for forms in [Platform::Tpu, Platform::Gpu] {
            for (step, (found, wanted)) in logits(&engine(case, forms)).iter().zip(&wanted).enumerate() {
                assert_eq!(found.len(), wanted.len());
                let worst = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= 1e-4, "{case}, {forms:?}, step {step}: {worst}");
            }
        }
    }
}
