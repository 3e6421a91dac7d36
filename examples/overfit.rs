//! Trains a model of 260 thousand parameters on a page of text until it recites it, on this machine's processor:
//!
//! ```sh
//! cargo run --release --example overfit -- llama-that-recites
//! cargo run --release -- generate "The llama" --model llama-that-recites --max-tokens 1300
//! ```
//!
//! The folder that it writes has the weights, a tokenizer of single bytes, and the loss as a picture, `loss.svg`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use converter::{Checkpoint, Llama, ModelConfig};
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use xla::DType;
use xla::graph::Save;
use xla::wheel::FetchOptions;
use xllama::generation::{GenerateOptions, SamplingOptions, generate};
use xllama::model::LossOptions;
use xllama::runtime::{Engine, GradientSpec, LoadOptions, Session, TrainSpec, Trainer, device};
use xllama::text::Tokenizer;
use xllama::training::{Decay, Schedule};

/// What is learned by heart.
const PAGE: &str = "\
The llama is a camel of the Andes that carries a third of its own weight over passes where the air is thin. When the load is a \
pound too heavy it lies down, and reads the driver a lecture with its eyes.

A compiler is a llama of another kind. It takes in a model at the one end, looks at the whole of it before it takes the first \
step, and then goes down the mountain without stopping at every stone to ask the way. What it has seen it need not see again; \
what two paths share it carries once.

To learn a page by heart is the least that a model can do, and so the first thing that a training has to show. The loss \
begins at the logarithm of the number of letters, since a model that knows nothing thinks all of them alike. Then the common \
letters become likely, then the pairs, then the words; and in the end there is one way through the page, from the first letter \
to the last, and nothing is left to be surprised at.

Whoever hears this page from the model itself may be sure of one thing: on the way there every derivative had the right sign.";

/// The most steps that are taken, and the loss at which the page is known: less than ln 2 over all 1047 places, so that each byte has
/// more than half of the probability.
const STEPS: u32 = 400;
const KNOWN: f32 = 0.0006;

/// The id before the text and the one after it; those of bytes follow.
const BEGIN: i32 = 0;
const END: i32 = 1;

fn main() -> anyhow::Result<()> {
    let out = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| "llama-that-recites".into()));
    ensure!(!out.exists(), "{} is there already; name another folder", out.display());
    let ids: Vec<i32> = PAGE.bytes().map(|byte| i32::from(byte) + 2).collect();
    let tokens = [&[BEGIN], &ids[..]].concat();
    let targets = [&ids[..], &[END]].concat();

    let start = tempfile::tempdir().context("a folder for the model to begin with")?;
    let parameters = write_model(start.path())?;
    let checkpoint = Checkpoint::open(start.path())?;

    let asked = std::env::var("XLLAMA_DEVICE").ok().filter(|name| !name.is_empty());
    let name = device::DeviceName::parse(Some(asked.as_deref().unwrap_or("cpu")))?;
    let plugin = device::plugin_path(&name, &FetchOptions::default(), &mut |_| ())?;
    let (plugin, client) = device::open(&plugin, 1)?;
    let gradient =
        GradientSpec { batch: 1, tokens: tokens.len(), loss: LossOptions::default(), save: Save::Everything };
    let decay = Decay::Cosine { steps: STEPS, final_fraction: 0.1 };
    let spec = TrainSpec { schedule: Schedule { peak: 4e-3, warmup: 20, decay }, ..TrainSpec::new(gradient, 1) };
    let options = || LoadOptions::new(DType::F32, None);
    let started = Instant::now();
    let mut trainer = Trainer::load(&plugin, client.clone(), &checkpoint, options(), (None, 0), spec, &|_, _| ())?;
    eprintln!(
        "{parameters} parameters, {} bytes; the step is compiled after {:.1} s",
        ids.len(),
        started.elapsed().as_secs_f64()
    );

    let bar = ProgressBar::new(u64::from(STEPS));
    bar.set_style(ProgressStyle::with_template("{wide_bar} step {pos} of at most {len}  {msg}  {elapsed_precise}")?);
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        let metrics = trainer.step(&tokens, &targets)?;
        losses.push(metrics.loss);
        bar.set_message(format!("loss {:.4}", metrics.loss));
        bar.inc(1);
        ensure!(metrics.loss.is_finite(), "the loss is {}", metrics.loss);
        if metrics.loss < KNOWN {
            break;
        }
    }
    bar.finish();

    trainer.save(&checkpoint, &out)?;
    picture(&losses, &out.join("loss.svg"))?;
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("loss {first:.3} to {last:.4} in {} steps; {}", losses.len(), out.display());

    // What was written, read as any other model.
    let saved = Checkpoint::open(&out)?;
    let engine = Engine::load(plugin, client, &saved, options(), &|_, _| ())?;
    let tokenizer = Tokenizer::from_dir(&out)?;
    let mut session = Session::new(&engine, 1, tokens.len() + 1)?;
    let options = GenerateOptions {
        max_tokens: tokens.len(),
        sampling: SamplingOptions::default(),
        stop_ids: [END as u32].into(),
        stop_strings: Vec::new(),
    };
    let said = generate(&mut session, &tokenizer, &[BEGIN as u32], &options, &AtomicBool::new(false), &mut |_| ())?;
    println!("\n{}", said.text);
    let same = said.text.bytes().zip(PAGE.bytes()).take_while(|(a, b)| a == b).count();
    ensure!(said.text == PAGE, "it recites {same} of {} bytes", PAGE.len());
    Ok(())
}

/// Writes a Llama with grouped heads that knows nothing yet, and gives the number of its parameters.
fn write_model(folder: &Path) -> anyhow::Result<usize> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 258, "hidden_size": 64,
        "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 188, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": true, "bos_token_id": BEGIN, "eos_token_id": END,
        "dtype": "float32",
    });
    let cfg = ModelConfig::from_value(&config, &folder.join("config.json"))?;
    let tensors = Llama::declare(&cfg).hf_tensors();
    let mut seed = 1u64;
    let mut normal = || {
        // Twelve uniform numbers have variance 1 (xorshift64*, Vigna 2016).
        let mut uniform = || {
            seed ^= seed >> 12;
            seed ^= seed << 25;
            seed ^= seed >> 27;
            (seed.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..12).map(|_| uniform()).sum::<f32>() - 6.0
    };
    let mut bytes = Vec::new();
    for tensor in &tensors {
        let elements: usize = tensor.shape.iter().product();
        let values: Vec<f32> = match tensor.name.contains("norm") {
            true => vec![1.0; elements],
            false => (0..elements).map(|_| 0.05 * normal()).collect(),
        };
        bytes.push(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
    }
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(tensor, bytes)| Ok((tensor.name.as_str(), TensorView::new(Dtype::F32, tensor.shape.clone(), bytes)?)));
    let views = views.collect::<anyhow::Result<Vec<_>>>()?;
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    fs::write(folder.join("config.json"), format!("{config:#}\n"))?;
    fs::write(folder.join("tokenizer.json"), format!("{:#}\n", byte_tokenizer()))?;
    let names = json!({ "bos_token": "<begin>", "eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast" });
    fs::write(folder.join("tokenizer_config.json"), format!("{names:#}\n"))?;
    Ok(tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum())
}

/// A tokenizer whose tokens are single bytes, written as GPT-2 writes them (Radford et al. 2019).
fn byte_tokenizer() -> Value {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut vocab = Map::from_iter([("<begin>".to_string(), json!(BEGIN)), ("<end>".to_string(), json!(END))]);
    let mut shifted = 256;
    for byte in 0..256 {
        let letter = if printable(byte) { byte } else { shifted };
        shifted += u32::from(!printable(byte));
        vocab.insert(char::from_u32(letter).unwrap_or_default().to_string(), json!(byte + 2));
    }
    let special = |id: i32, content: &str| {
        json!({ "id": id, "content": content, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false })
    };
    let by_bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    json!({
        "version": "1.0",
        "added_tokens": [special(BEGIN, "<begin>"), special(END, "<end>")],
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<begin>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
            "special_tokens": { "<begin>": { "id": "<begin>", "ids": [BEGIN], "tokens": ["<begin>"] } },
        },
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    })
}

/// Draws the loss of each step, on a logarithmic scale.
fn picture(losses: &[f32], path: &Path) -> anyhow::Result<()> {
    let drawing = SVGBackend::new(path, (800, 450)).into_drawing_area();
    drawing.fill(&WHITE)?;
    let top = losses.iter().fold(1f32, |top, loss| top.max(*loss)) * 1.5;
    let mut chart = ChartBuilder::on(&drawing)
        .caption("Loss while a page is learned by heart", ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0..losses.len(), (KNOWN / 2.0..top).log_scale())?;
    chart.configure_mesh().x_desc("step").y_desc("nats per byte").draw()?;
    chart.draw_series(LineSeries::new(losses.iter().copied().enumerate(), BLUE.stroke_width(2)))?;
    drawing.present()?;
    Ok(())
}
