//! `xllama generate`.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::builder::NonEmptyStringValueParser;
use converter::Checkpoint;
use serde_json::{Value, json};
use xllama::Error;
use xllama::compile::ExecutableFile;
use xllama::generation::sampling::SamplerSpec;
use xllama::generation::{
    Beam, BeamOptions, FinishReason, GenerateOptions, Generation, beam_search, contrastive_search, generate, samples,
};
use xllama::runtime::{Engine, Session};
use xllama::text::{ChatTemplate, Message, TextStream, Tokenizer};

use super::model_args::ModelArgs;
use super::sampling_args::{Method, SamplingArgs, SearchArgs};
use super::template_args::TemplateArgs;
use super::{Context, table};

/// Generate text from a prompt.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  xllama generate \"Once upon a time\"\n  \
                        echo \"Name three colours.\" | xllama generate - --chat --max-tokens 50 --json\n  \
                        xllama generate \"The sea is\" --samples 3 --temperature 0.8 --max-tokens 20\n  \
                        xllama generate \"The sea is\" --beams 4 --max-tokens 20 --json\n  \
                        xllama generate \"The sea is\" --penalty-alpha 0.6 --top-k 4\n  \
                        xllama generate \"The sea is\" --logprobs 3 --max-tokens 5")]
pub struct Args {
    /// The prompt; `-` reads standard input. Without one the model begins on its own.
    #[arg(default_value = "", hide_default_value = true)]
    prompt: String,
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_tokens: usize,
    /// Positions of the context [default: what prompt and --max-tokens need, up to the model's own].
    #[arg(long, value_name = "N")]
    max_seq: Option<usize>,
    /// Run this program from `xllama compile -o` instead of compiling it here; may be given for prefill and decode.
    #[arg(long, value_name = "F")]
    executable: Vec<PathBuf>,
    /// End the text at this string, which is not printed; may be given several times.
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Apply the model's chat template: the prompt is a user's message.
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    search: SearchArgs,
}

/// What was generated, the text that counts first.
struct Done {
    texts: Vec<Generation>,
    /// What a beam search found, in the same order.
    beams: Vec<Beam>,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        let prompt = match self.prompt.as_str() {
            "-" => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("reading the prompt from standard input")?;
                text
            }
            text => text.to_string(),
        };
        // What is wrong with the request is said before anything is fetched or loaded.
        if self.template.is_given() && !self.chat {
            let what = "is for a chat template; add --chat".into();
            return Err(Error::Option { name: "template-var".into(), what }.into());
        }
        self.sampling.options(None).validate(usize::MAX)?;
        let method = self.search.method(&self.sampling, &self.stop)?;
        let programs = self.executable.iter().map(|path| ExecutableFile::open(path)).collect::<Result<Vec<_>, _>>()?;
        let plugin = self.model.device.plugin_path(context)?;
        let checkpoint = self.model.model.open(context)?;
        let cfg = checkpoint.config().clone();
        let generation_config = generation_config(&checkpoint)?;
        let sampling = self.search.complete(self.sampling.options(generation_config.as_ref()))?;
        sampling.validate(cfg.vocab_size)?;

        let tokenizer = Tokenizer::of_checkpoint(&checkpoint)?;
        let ids = prompt_ids(&checkpoint, &tokenizer, &prompt, self.chat, &self.template)?;
        // A program is for a cache of one length.
        let max_seq = match programs.first() {
            Some(program) => Some(program.max_seq()?),
            None => self.max_seq,
        };
        let len = context_len(&checkpoint, ids.len(), self.max_tokens, max_seq)?;
        if !programs.is_empty() && sampling.spec() != SamplerSpec::default() {
            let what = "holds a step that takes the likeliest token; add --temperature 0 and no penalties".into();
            return Err(Error::Option { name: "executable".into(), what }.into());
        }

        let loaded = self.model.load_checkpoint(context, plugin, checkpoint)?;
        for program in &programs {
            program.adopt(&loaded.engine)?;
        }
        let room = max_seq.filter(|_| !programs.is_empty()).unwrap_or(len);
        let mut session = Session::new(&loaded.engine, method.slots(), room)?;
        let drawn = matches!(method, Method::Draw | Method::Samples(_));
        if self.max_tokens > 0 && drawn {
            compile(context, &loaded.engine, &session, ids.len(), sampling.spec())?;
        }
        let options = GenerateOptions {
            max_tokens: self.max_tokens.min(len + 1 - ids.len()),
            sampling,
            stop_ids: stop_ids(&loaded.checkpoint, &tokenizer)?,
            stop_strings: self.stop.clone(),
        };

        let guard = context.interrupt.watch();
        let one = matches!(method, Method::Draw | Method::Contrastive { .. });
        let stream = !context.json && one;
        let terminal = std::io::stdout().is_terminal();
        let mut first_token = None;
        let mut out = std::io::stdout().lock();
        if stream && terminal && !self.chat {
            write!(out, "{prompt}")?;
            out.flush()?;
        }
        if !one {
            context.reporter.say(&format!("{} texts side by side", method.slots()));
        }
        let mut on_text = |piece: &str| {
            first_token.get_or_insert_with(|| context.started.elapsed());
            if stream {
                // A closed pipe ends the output, not the accounting.
                let _ = write!(out, "{piece}").and_then(|()| if terminal { out.flush() } else { Ok(()) });
            }
        };
        let mut beams = Vec::new();
        let texts = match method {
            Method::Draw => vec![generate(&mut session, &tokenizer, &ids, &options, guard.flag(), &mut on_text)?],
            Method::Samples(_) => {
                let mut on_text = |_: usize, piece: &str| on_text(piece);
                samples(&mut session, &tokenizer, &ids, &options, guard.flag(), &mut on_text)?
            }
            Method::Contrastive { alpha, .. } => {
                let session = &mut session;
                vec![contrastive_search(session, &tokenizer, &ids, alpha, &options, guard.flag(), &mut on_text)?]
            }
            Method::Beams { length_penalty, early_stopping, .. } => {
                let GenerateOptions { max_tokens, stop_ids, .. } = options;
                let options = BeamOptions { max_tokens, length_penalty, early_stopping, stop_ids };
                let found = beam_search(&mut session, &ids, &options, guard.flag())?;
                beams = found.beams;
                let whole = |beam: &Beam| -> anyhow::Result<Generation> {
                    Ok(Generation {
                        text: beam_text(&tokenizer, beam)?,
                        tokens: beam.tokens.clone(),
                        log_probabilities: Vec::new(),
                        finish_reason: beam.finish_reason,
                        timing: found.timing,
                    })
                };
                beams.iter().map(whole).collect::<anyhow::Result<_>>()?
            }
        };
        drop(guard);
        context.reporter.clear();
        if stream {
            writeln!(out)?;
        }
        drop(out);
        let done = Done { texts, beams };
        let stats = loaded.engine.compile_stats();
        let total = context.started.elapsed();
        if context.json {
            let timing = [loaded.load_time, stats.time, first_token.unwrap_or(total), total];
            println!("{}", json_result(&done, method, &tokenizer, ids.len(), timing));
        } else {
            done.print(method, &tokenizer);
            let timing = done.texts.first().map(|text| text.timing).unwrap_or_default();
            let beams = done.beams.first().map_or(String::new(), |beam| format!(" (score {:.4})", beam.score));
            context.reporter.note(&format!(
                "{} prompt tokens, {} generated{beams}; load {:.2} s, compile {:.2} s, first token after {:.2} s, \
                 prefill {:.0} tok/s, decode {:.1} tok/s",
                ids.len(),
                done.texts.iter().map(|text| text.tokens.len()).sum::<usize>(),
                loaded.load_time.as_secs_f64(),
                stats.time.as_secs_f64(),
                first_token.unwrap_or(total).as_secs_f64(),
                timing.prefill_rate(),
                timing.decode_rate(),
            ));
        }
        match done.texts.iter().any(|text| text.finish_reason == FinishReason::Interrupted) {
            true => Err(Error::Interrupted.into()),
            false => Ok(ExitCode::SUCCESS),
        }
    }
}

impl Done {
    /// Prints what has not been streamed.
    fn print(&self, method: Method, tokenizer: &Tokenizer) {
        match method {
            Method::Beams { .. } => println!("{}", self.texts.first().map_or("", |best| &best.text)),
            Method::Draw | Method::Contrastive { .. } => {
                self.texts.iter().for_each(|text| print_log_probabilities(text, tokenizer))
            }
            Method::Samples(_) => {
                for (i, text) in self.texts.iter().enumerate() {
                    println!("── {} ──\n{}", i + 1, text.text);
                    print_log_probabilities(text, tokenizer);
                }
            }
        }
    }
}

/// A line per token, if log-probabilities were asked for.
fn print_log_probabilities(text: &Generation, tokenizer: &Tokenizer) {
    let Some(first) = text.log_probabilities.first() else { return };
    let one = |id: u32, x: f32| [format!("{:?}", token_text(tokenizer, id)), format!("{x:.4}")];
    let mut header = vec!["token".to_string(), "logprob".into()];
    header.extend((1..=first.best.len()).flat_map(|i| [format!("likeliest {i}"), "logprob".into()]));
    let rows: Vec<Vec<String>> = text
        .log_probabilities
        .iter()
        .map(|drawn| {
            let own = (drawn.id, drawn.log_probability.unwrap_or(f32::NAN));
            [own].iter().chain(&drawn.best).flat_map(|(id, x)| one(*id, *x)).collect()
        })
        .collect();
    let right: Vec<usize> = (1..header.len()).step_by(2).collect();
    println!();
    table::print(&header.iter().map(String::as_str).collect::<Vec<_>>(), &rows, &right);
}

/// What a token says by itself. A piece of SentencePiece that begins with a space keeps it, which decoding takes from the
/// beginning of a text.
fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    let text = tokenizer.decode(&[id], false).unwrap_or_default();
    let space = tokenizer.token(id).is_some_and(|token| token.starts_with('▁')) && !text.starts_with(' ');
    if space { format!(" {text}") } else { text }
}

/// The text of a beam, without the id that ended it.
fn beam_text(tokenizer: &Tokenizer, beam: &Beam) -> anyhow::Result<String> {
    let shown = beam.tokens.len() - usize::from(beam.finish_reason == FinishReason::Stop);
    let mut stream = TextStream::new(tokenizer);
    let mut text = String::new();
    for id in &beam.tokens[..shown] {
        text.extend(stream.push(*id)?);
    }
    text.extend(stream.finish()?);
    Ok(text)
}

/// `timing`: load, compile, to the first token, all.
fn json_result(
    done: &Done,
    method: Method,
    tokenizer: &Tokenizer,
    prompt_tokens: usize,
    timing: [Duration; 4],
) -> Value {
    let text = |text: &Generation| {
        let mut value = json!({ "text": text.text, "tokens": text.tokens, "finish_reason": text.finish_reason.name() });
        if !text.log_probabilities.is_empty() {
            value["logprobs"] = log_probabilities(text, tokenizer);
        }
        value
    };
    let mut value = done.texts.first().map_or(json!({ "text": "", "tokens": [], "finish_reason": "length" }), text);
    let [load, compile, first_token, total] = timing.map(|time| time.as_secs_f64());
    let rates = done.texts.first().map(|text| text.timing).unwrap_or_default();
    value["prompt_tokens"] = prompt_tokens.into();
    value["timing"] = json!({
        "load_s": load,
        "compile_s": compile,
        "prefill_tok_s": rates.prefill_rate(),
        "decode_tok_s": rates.decode_rate(),
        "time_to_first_token_s": first_token,
        "total_s": total,
    });
    match method {
        Method::Samples(_) => value["samples"] = done.texts.iter().map(text).collect(),
        Method::Beams { .. } => {
            let beams = done.texts.iter().zip(&done.beams);
            value["beams"] = beams
                .map(|(text, beam)| {
                    let reason = beam.finish_reason.name();
                    json!({ "text": text.text, "tokens": text.tokens, "score": beam.score, "finish_reason": reason })
                })
                .collect();
        }
        Method::Draw | Method::Contrastive { .. } => {}
    }
    value
}

/// As `--json` has it: the model's own log-probability of each token, and the likeliest tokens with theirs.
fn log_probabilities(text: &Generation, tokenizer: &Tokenizer) -> Value {
    let one = |id: u32, x: f32| json!({ "id": id, "token": token_text(tokenizer, id), "logprob": x });
    let tokens = text.log_probabilities.iter().map(|drawn| {
        let mut value = one(drawn.id, drawn.log_probability.unwrap_or(f32::NAN));
        value["top"] = drawn.best.iter().map(|(id, x)| one(*id, *x)).collect();
        value
    });
    tokens.collect()
}

/// Gets the programs ready that a prompt of `len` tokens needs, with a word on the screen.
pub fn compile(
    context: &Context,
    engine: &Engine,
    session: &Session,
    len: usize,
    spec: xllama::generation::sampling::SamplerSpec,
) -> anyhow::Result<()> {
    context.reporter.say("compiling (cached for the next time)");
    engine.prepare(&session.programs(len, spec))?;
    context.reporter.clear();
    Ok(())
}

/// The ids of a prompt: through the chat template if asked for; an empty prompt begins with the model's own first id.
pub fn prompt_ids(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    prompt: &str,
    chat: bool,
    variables: &TemplateArgs,
) -> anyhow::Result<Vec<u32>> {
    let ids = if chat {
        let template = ChatTemplate::of_checkpoint(checkpoint)?;
        tokenizer.encode(&template.render(&[Message::new("user", prompt)], &variables.options())?, false)?
    } else {
        tokenizer.encode(prompt, true)?
    };
    let bos = checkpoint.config().bos_token_id.or(tokenizer.bos_id());
    match (ids.is_empty(), bos) {
        (false, _) => Ok(ids),
        (true, Some(bos)) => Ok(vec![bos]),
        (true, None) => {
            Err(Error::Empty("the prompt has no tokens and the model has no first token; give a prompt".into()).into())
        }
    }
}

/// Positions for a prompt and its continuation, within `--max-seq` and what the model was made for.
pub fn context_len(
    checkpoint: &Checkpoint,
    prompt: usize,
    max_tokens: usize,
    max_seq: Option<usize>,
) -> Result<usize, Error> {
    let trained = checkpoint.config().context_len();
    if let Some(asked) = max_seq
        && (asked == 0 || asked > trained)
    {
        let what = format!("must be between 1 and {trained} (the context of the model), found {asked}");
        return Err(Error::Option { name: "max-seq".into(), what });
    }
    let limit = max_seq.unwrap_or(trained);
    if prompt > limit {
        return Err(Error::Context {
            what: format!("the prompt of {prompt} tokens"),
            needed: prompt,
            limit,
            reason: if max_seq.is_some() { "--max-seq" } else { "max_position_embeddings of the model" }.into(),
            advice: "shorten the prompt".into(),
        });
    }
    Ok(prompt.saturating_add(max_tokens).min(limit))
}

/// Ids that end a text: of config.json, generation_config.json and the tokenizer.
pub fn stop_ids(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> anyhow::Result<BTreeSet<u32>> {
    let mut ids: BTreeSet<u32> = checkpoint.config().eos_token_ids.iter().copied().collect();
    if let Some(config) = generation_config(checkpoint)? {
        let eos = &config["eos_token_id"];
        let several = eos.as_array().map_or(std::slice::from_ref(eos), Vec::as_slice);
        ids.extend(several.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()));
    }
    ids.extend(tokenizer.eos_id());
    Ok(ids)
}

/// The model's `generation_config.json`, if it has one.
pub fn generation_config(checkpoint: &Checkpoint) -> anyhow::Result<Option<serde_json::Value>> {
    let Some(bytes) = checkpoint.side_file("generation_config.json").map_err(Error::from)? else { return Ok(None) };
    let config = serde_json::from_slice(&bytes);
    Ok(Some(config.with_context(|| format!("{}/generation_config.json", checkpoint.path().display()))?))
}
