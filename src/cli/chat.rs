//! `xllama chat`.

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

use clap::builder::NonEmptyStringValueParser;
use serde_json::json;
use xllama::Error;
use xllama::generation::{GenerateOptions, generate};
use xllama::runtime::{CHUNKS, Session};
use xllama::text::{ChatTemplate, Message, RenderOptions, Tokenizer};

use super::Context;
use super::generate::{compile, generation_config, stop_ids};
use super::model_args::ModelArgs;
use super::sampling_args::SamplingArgs;
use super::template_args::TemplateArgs;

/// Talk with a model: one message a line, an empty line or Ctrl-D ends.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  xllama chat --system \"You answer in one sentence.\" --temperature 0.7")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A system message to begin with.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_tokens: usize,
    /// Positions of the whole conversation [default: 4096, up to the model's own].
    #[arg(long, value_name = "N")]
    max_seq: Option<usize>,
    /// End an answer at this string; may be given several times.
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Args {
    pub fn run(self, context: &Context) -> anyhow::Result<ExitCode> {
        self.sampling.options(None).validate(usize::MAX)?;
        let loaded = self.model.load(context)?;
        let tokenizer = loaded.tokenizer()?;
        let template = ChatTemplate::of_checkpoint(&loaded.checkpoint)?;
        let trained = loaded.engine.config().context_len();
        let len = self.max_seq.unwrap_or(4096.min(trained));
        if len == 0 || len > trained {
            let what = format!("must be between 1 and {trained} (the context of the model), found {len}");
            return Err(Error::Option { name: "max-seq".into(), what }.into());
        }
        let generation_config = generation_config(&loaded.checkpoint)?;
        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            sampling: self.sampling.options(generation_config.as_ref()),
            stop_ids: stop_ids(&loaded.checkpoint, &tokenizer)?,
            stop_strings: self.stop.clone(),
        };
        options.sampling.validate(loaded.engine.config().vocab_size)?;
        // Room for the padding of the last chunk of a prompt.
        let mut session = Session::new(&loaded.engine, 1, len + CHUNKS[CHUNKS.len() - 1])?;
        compile(context, &loaded.engine, &session, 1, options.sampling.spec())?;

        let render = self.template.options();
        let mut talk = Conversation {
            tokenizer: &tokenizer,
            template: &template,
            render: &render,
            messages: Vec::new(),
            cached: Vec::new(),
            len,
        };
        talk.messages.extend(self.system.as_ref().map(|s| Message::new("system", s)));
        let prompt = std::io::stdin().is_terminal() && !context.json;
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if prompt {
                print!("> ");
                std::io::stdout().flush()?;
            }
            let Some(line) = lines.next().transpose()? else { break };
            if line.trim().is_empty() {
                break;
            }
            talk.messages.push(Message::new("user", &line));
            talk.answer(context, &mut session, &options)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

struct Conversation<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    render: &'a RenderOptions,
    messages: Vec<Message>,
    /// Ids that stand in the session's cache.
    cached: Vec<u32>,
    len: usize,
}

impl Conversation<'_> {
    /// Renders the conversation, runs what the cache does not hold yet, streams the answer and keeps it.
    fn answer(&mut self, context: &Context, session: &mut Session, options: &GenerateOptions) -> anyhow::Result<()> {
        let ids = self.tokenizer.encode(&self.template.render(&self.messages, self.render)?, false)?;
        if ids.len() >= self.len {
            return Err(Error::Context {
                what: "the conversation".into(),
                needed: ids.len() + 1,
                limit: self.len,
                reason: "--max-seq".into(),
                advice: "begin a new one or raise --max-seq".into(),
            }
            .into());
        }
        // At least one token has to run for there to be logits.
        let same = ids.iter().zip(&self.cached).take_while(|(a, b)| a == b).count().min(ids.len() - 1);
        let same = session.truncate(0, session.keepable(0, same, ids.len()));
        let mut options = options.clone();
        options.max_tokens = options.max_tokens.min(self.len - ids.len());
        options.sampling.history = ids[..same].to_vec();

        let guard = context.interrupt.watch();
        let mut out = std::io::stdout().lock();
        let done = generate(session, self.tokenizer, &ids[same..], &options, guard.flag(), &mut |piece| {
            if !context.json {
                let _ = write!(out, "{piece}").and_then(|()| out.flush());
            }
        })?;
        guard.reset();
        match context.json {
            true => writeln!(
                out,
                "{}",
                json!({ "text": done.text, "tokens": done.tokens, "prompt_tokens": ids.len(), "finish_reason": done.finish_reason.name() })
            )?,
            false => writeln!(out)?,
        }
        self.cached = ids;
        self.cached.extend(&done.tokens);
        self.cached.truncate(session.used()[0]);
        self.messages.push(Message::new("assistant", &done.text));
        Ok(())
    }
}
