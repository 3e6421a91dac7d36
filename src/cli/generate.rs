//! `xllama generate`.

use std::collections::BTreeSet;
use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::builder::NonEmptyStringValueParser;
use converter::Checkpoint;
use serde_json::json;
use xllama::Error;
use xllama::generation::{FinishReason, GenerateOptions, Generation, generate};
use xllama::runtime::{Engine, Session};
use xllama::text::{ChatTemplate, Message, RenderOptions, Tokenizer};

use super::Context;
use super::model_args::ModelArgs;
use super::sampling_args::SamplingArgs;

/// Generate text from a prompt.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  xllama generate \"Once upon a time\"\n  \
                        echo \"Name three colours.\" | xllama generate - --chat --max-tokens 50 --json")]
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
    /// End the text at this string, which is not printed; may be given several times.
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Apply the model's chat template: the prompt is a user's message.
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
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
        self.sampling.options(None).validate(usize::MAX)?;
        let plugin = self.model.device.plugin_path(context)?;
        let checkpoint = self.model.model.open(context)?;
        let cfg = checkpoint.config().clone();
        let generation_config = generation_config(&checkpoint)?;
        let sampling = self.sampling.options(generation_config.as_ref());
        sampling.validate(cfg.vocab_size)?;

        let tokenizer = Tokenizer::of_checkpoint(&checkpoint)?;
        let ids = prompt_ids(&checkpoint, &tokenizer, &prompt, self.chat)?;
        let len = context_len(&checkpoint, ids.len(), self.max_tokens, self.max_seq)?;

        let loaded = self.model.load_checkpoint(context, plugin, checkpoint)?;
        let mut session = Session::new(&loaded.engine, 1, len)?;
        if self.max_tokens > 0 {
            compile(context, &loaded.engine, &session, ids.len(), sampling.spec())?;
        }
        let options = GenerateOptions {
            max_tokens: self.max_tokens.min(len + 1 - ids.len()),
            sampling,
            stop_ids: stop_ids(&loaded.checkpoint, &tokenizer)?,
            stop_strings: self.stop.clone(),
        };

        let guard = context.interrupt.watch();
        let stream = !context.json;
        let terminal = std::io::stdout().is_terminal();
        let mut first_token = None;
        let mut out = std::io::stdout().lock();
        if stream && terminal && !self.chat {
            write!(out, "{prompt}")?;
            out.flush()?;
        }
        let done = generate(&mut session, &tokenizer, &ids, &options, guard.flag(), &mut |piece| {
            first_token.get_or_insert_with(|| context.started.elapsed());
            if stream {
                // A closed pipe ends the output, not the accounting.
                let _ = write!(out, "{piece}").and_then(|()| if terminal { out.flush() } else { Ok(()) });
            }
        })?;
        drop(guard);
        if stream {
            writeln!(out)?;
        }
        drop(out);
        let stats = loaded.engine.compile_stats();
        let total = context.started.elapsed();
        if context.json {
            println!("{}", json_result(&done, ids.len(), loaded.load_time, stats.time, first_token, total));
        } else {
            context.reporter.note(&format!(
                "{} prompt tokens, {} generated; load {:.2} s, compile {:.2} s, first token after {:.2} s, \
                 prefill {:.0} tok/s, decode {:.1} tok/s",
                ids.len(),
                done.tokens.len(),
                loaded.load_time.as_secs_f64(),
                stats.time.as_secs_f64(),
                first_token.unwrap_or(total).as_secs_f64(),
                done.timing.prefill_rate(),
                done.timing.decode_rate(),
            ));
        }
        match done.finish_reason {
            FinishReason::Interrupted => Err(Error::Interrupted.into()),
            _ => Ok(ExitCode::SUCCESS),
        }
    }
}

fn json_result(
    done: &Generation,
    prompt_tokens: usize,
    load: Duration,
    compile: Duration,
    first_token: Option<Duration>,
    total: Duration,
) -> serde_json::Value {
    json!({
        "text": done.text,
        "tokens": done.tokens,
        "prompt_tokens": prompt_tokens,
        "finish_reason": done.finish_reason.name(),
        "timing": {
            "load_s": load.as_secs_f64(),
            "compile_s": compile.as_secs_f64(),
            "prefill_tok_s": done.timing.prefill_rate(),
            "decode_tok_s": done.timing.decode_rate(),
            "time_to_first_token_s": first_token.unwrap_or(total).as_secs_f64(),
            "total_s": total.as_secs_f64(),
        },
    })
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
) -> anyhow::Result<Vec<u32>> {
    let ids = if chat {
        let template = ChatTemplate::of_checkpoint(checkpoint)?;
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        tokenizer.encode(&template.render(&[Message::new("user", prompt)], &options)?, false)?
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
    let trained = checkpoint.config().max_position_embeddings;
    if let Some(asked) = max_seq
        && (asked == 0 || asked > trained)
    {
        let what = format!("must be between 1 and {trained} (max_position_embeddings of the model), found {asked}");
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
