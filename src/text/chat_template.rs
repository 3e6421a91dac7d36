//! Chat templates: a conversation becomes the prompt that the model was trained on.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::path::{Path, PathBuf};

use jiff::civil::DateTime;
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde_json::{Map, Value, json};

use super::tokenizer::Config;
use super::{Error, clock, python};

/// A model's chat template, rendered as `tokenizer.apply_chat_template(…, tokenize=False)` of `transformers` does.
///
/// The template writes BOS and every other control token itself: encode its result without adding special tokens.
///
/// A few things that no template of a supported model needs are not as in Python: `'%s' % x` is an error, a tuple is
/// written as a list, `~` writes a list or mapping as JSON, `safe` escapes nothing that is added to it, and a loop over
/// `none` is empty.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    source: String,
    special_tokens: BTreeMap<String, String>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What else a template can see.
#[derive(Debug, Clone, Default)]
pub struct RenderOptions {
    /// Whether the prompt ends with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// What `strftime_now` tells; the local clock where there is none.
    pub now: Option<DateTime>,
    /// Variables of this one template, such as `enable_thinking`; also `tools` and `documents`, else null.
    pub variables: Map<String, Value>,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] where the model has none; a file that cannot be read; [`Error::TemplateSyntax`].
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let config = Config::read(dir)?;
        let path = dir.join("chat_template.jinja");
        if path.is_file() {
            let source = std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
            return Self::new(&source, &config.special_token_texts()?);
        }
        Self::in_config(&config, dir.to_owned())
    }

    /// The template in the value of a `tokenizer_config.json`.
    ///
    /// # Errors
    /// As for [`ChatTemplate::from_dir`].
    pub fn from_config(tokenizer_config: &Value) -> Result<Self, Error> {
        Self::in_config(&Config::from_value(Some(tokenizer_config))?, PathBuf::from("tokenizer_config.json"))
    }

    fn in_config(config: &Config, place: PathBuf) -> Result<Self, Error> {
        let source = config.chat_template()?.ok_or(Error::NoChatTemplate { dir: place })?;
        Self::new(source, &config.special_token_texts()?)
    }

    /// A template from its text. `special_tokens` are variables by role, see
    /// [`Tokenizer::special_tokens`](super::Tokenizer::special_tokens).
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`].
    pub fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self, Error> {
        let source = without_generation_tags(&source.replace("\r\n", "\n").replace('\r', "\n"));
        environment(DateTime::default()).template_from_str(&source).map_err(explain)?;
        Ok(Self { source, special_tokens: special_tokens.clone() })
    }

    /// The prompt for a conversation.
    ///
    /// # Errors
    /// [`Error::TemplateRefused`] with the template's words where it calls `raise_exception`;
    /// [`Error::TemplateFailed`]; [`Error::NoMessages`].
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, Error> {
        let messages: Vec<Value> = messages.iter().map(|m| json!({"role": m.role, "content": m.content})).collect();
        self.render_json(&messages, options)
    }

    /// The prompt for a conversation whose messages have more than a role and a text: parts, tool calls, reasoning.
    ///
    /// # Errors
    /// As for [`ChatTemplate::render`].
    pub fn render_json(&self, messages: &[Value], options: &RenderOptions) -> Result<String, Error> {
        if messages.is_empty() {
            return Err(Error::NoMessages);
        }
        let mut variables = Map::new();
        variables.insert("tools".to_owned(), Value::Null);
        variables.insert("documents".to_owned(), Value::Null);
        variables.extend(self.special_tokens.iter().map(|(role, token)| (role.clone(), token.clone().into())));
        variables.extend(options.variables.clone());
        variables.insert("messages".to_owned(), messages.iter().map(normalized).collect());
        variables.insert("add_generation_prompt".to_owned(), options.add_generation_prompt.into());

        let environment = environment(options.now.unwrap_or_else(clock::now));
        environment.template_from_str(&self.source).and_then(|t| t.render(&variables)).map_err(explain)
    }
}

/// Steps that a template may take: a hundred times what a long conversation needs, and an end to a hostile loop.
const FUEL: u64 = 50_000_000;

/// Jinja as `transformers` sets it up.
fn environment<'source>(now: DateTime) -> Environment<'source> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_formatter(python::write_value);
    env.set_unknown_method_callback(python::call_method);
    env.add_filter("tojson", python::tojson);
    env.add_filter("string", python::to_str);
    env.add_filter("length", python::length);
    env.add_filter("count", python::length);
    env.add_filter("replace", python::replace);
    env.add_filter("trim", python::trim);
    env.add_filter("upper", python::upper);
    env.add_filter("lower", python::lower);
    env.add_filter("title", python::title);
    env.add_filter("escape", python::escape);
    env.add_filter("e", python::escape);
    env.add_filter("join", python::join);
    env.add_filter("int", python::int);
    env.add_filter("float", python::float);
    env.add_test("sequence", python::is_sequence);
    env.add_test("iterable", python::is_iterable);
    env.add_test("number", python::is_number);
    env.add_function("raise_exception", |message: minijinja::Value| -> Result<String, minijinja::Error> {
        let refusal = Refusal(python::to_str(&message));
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(refusal))
    });
    env.add_function("strftime_now", move |format: &str| clock::strftime(now, format));
    env
}

/// What a template gave to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn explain(error: minijinja::Error) -> Error {
    let mut source: Option<&(dyn StdError + 'static)> = Some(&error);
    while let Some(cause) = source {
        if let Some(Refusal(message)) = cause.downcast_ref() {
            return Error::TemplateRefused { message: message.clone() };
        }
        source = cause.source();
    }
    let line = error.line().unwrap_or(1);
    let detail = error.detail().map(str::to_owned);
    match error.kind() {
        ErrorKind::SyntaxError => Error::TemplateSyntax { line, message: detail.unwrap_or_default() },
        kind => {
            let message = detail.map_or_else(|| kind.to_string(), |detail| format!("{kind}: {detail}"));
            Error::TemplateFailed { line, message }
        }
    }
}

/// A message as a template gets it: no key without a value, and the reasoning under both names that templates read.
fn normalized(message: &Value) -> Value {
    let Value::Object(fields) = message else { return message.clone() };
    let mut fields = fields.clone();
    fields.retain(|_, value| !value.is_null());
    let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|name| fields.get(*name)).cloned();
    if let Some(reasoning) = reasoning {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    Value::Object(fields)
}

/// The template with `{% generation %}` … `{% endgeneration %}` as `{% with %}` … `{% endwith %}`: the tag marks the
/// assistant's words for training, renders what it encloses and has a scope of its own, which is what `with` does.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let inside = &rest[at + 2..];
        let name = inside.strip_prefix(['-', '+']).unwrap_or(inside).trim_start();
        out.push_str(&rest[..rest.len() - name.len()]);
        rest = name;
        for (tag, replacement) in [("generation", "with"), ("endgeneration", "endwith")] {
            let after = name.strip_prefix(tag).filter(|after| {
                let after = after.trim_start();
                after.strip_prefix(['-', '+']).unwrap_or(after).starts_with("%}")
            });
            if let Some(after) = after {
                out.push_str(replacement);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/chat");

    fn template(source: &str) -> ChatTemplate {
        let special_tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let special_tokens = special_tokens.map(|(role, token)| (role.to_owned(), token.to_owned()));
        ChatTemplate::new(source, &BTreeMap::from(special_tokens)).unwrap()
    }

    fn render(source: &str) -> Result<String, Error> {
        template(source).render(&[Message::new("user", "hi")], &RenderOptions::default())
    }

    /// How many prompts of `data` (see scripts/make_chat_goldens.py) were rendered, and every one that is not equal.
    fn compare(data: &Path) -> (usize, Vec<String>) {
        let goldens: Value = serde_json::from_slice(&std::fs::read(data.join("goldens.json")).unwrap()).unwrap();
        let special_tokens = serde_json::from_value(goldens["special_tokens"].clone()).unwrap();
        let now = goldens["now"].as_str().unwrap().parse().unwrap();
        let cases = goldens["cases"].as_array().unwrap();
        let differ = |case: &Value| {
            let file = case["template"].as_str().unwrap();
            let source = std::fs::read_to_string(data.join("templates").join(file)).unwrap();
            let messages = goldens["conversations"][case["conversation"].as_str().unwrap()].as_array().unwrap();
            let options = RenderOptions {
                add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
                now: Some(now),
                variables: case["variables"].as_object().unwrap().clone(),
            };
            let found = ChatTemplate::new(&source, &special_tokens).and_then(|t| t.render_json(messages, &options));
            let equal = match &found {
                Ok(prompt) => case["prompt"] == *prompt,
                Err(Error::TemplateRefused { message }) => case["refused"] == *message,
                Err(_) => case["failed"].is_string(),
            };
            let name = format!("{file}, {}, {}", case["conversation"], Value::from(options.variables));
            let found = found.unwrap_or_else(|error| error.to_string());
            let expected = ["prompt", "refused", "failed"].iter().find_map(|end| case[*end].as_str()).unwrap();
            let same = found.chars().zip(expected.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
            let rest = |text: &str| text.split_at(same).1.chars().take(80).collect::<String>();
            let [found, expected] = [rest(&found), rest(expected)];
            (!equal)
                .then(|| format!("{name}, from byte {same}:\n  ours         {found:?}\n  transformers {expected:?}"))
        };
        (cases.len(), cases.iter().filter_map(differ).collect())
    }

    /// Every prompt, and every refusal word for word, is that of transformers 5.23.0 (scripts/make_chat_goldens.py).
    #[test]
    fn prompts_are_those_of_transformers() {
        let (cases, different) = compare(Path::new(DATA));
        assert!(cases > 200);
        assert!(different.is_empty(), "{}", different.join("\n"));
    }

    #[test]
    #[ignore = "of templates that are not ours: python3 scripts/make_chat_goldens.py --check FOLDER runs it"]
    fn prompts_of_a_folder_are_those_of_transformers() {
        let data = std::env::var_os("XLLAMA_CHAT_DATA").expect("run scripts/make_chat_goldens.py --check FOLDER");
        let (cases, different) = compare(Path::new(&data));
        println!("{cases} prompts and refusals, {} differ", different.len());
        assert!(different.is_empty(), "{}", different.join("\n"));
    }

    #[test]
    fn errors_tell_the_line() {
        let none = BTreeMap::new();
        let error = ChatTemplate::new("a\n{% if %}", &none).unwrap_err().to_string();
        assert!(error.starts_with("the chat template does not parse, line 2: "), "{error}");
        let error = render("a\nb\n{{ 'x' + 1 }}").unwrap_err().to_string();
        assert!(error.starts_with("the chat template failed, line 3: "), "{error}");
        let error = render("{{ messages[0].nothing.more }}").unwrap_err().to_string();
        assert_eq!(error, "the chat template failed, line 1: undefined value");
        let error = render("{% macro m() %}{{ raise_exception('not <you>') }}{% endmacro %}{{ m() }}").unwrap_err();
        assert_eq!(error.to_string(), "the chat template refused: not <you>");
    }

    #[test]
    fn an_endless_template_ends() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{{ '' }}\
                       {% endfor %}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless), Err(Error::TemplateFailed { .. })));
    }

    #[test]
    fn an_empty_conversation_is_an_error() {
        assert!(matches!(template("x").render(&[], &RenderOptions::default()), Err(Error::NoMessages)));
    }

    #[test]
    fn generation_tags_vanish_whatever_their_white_space() {
        for source in [
            "a{% generation %}b{% endgeneration %}c",
            "a{%- generation -%} b {%- endgeneration -%}c",
            "a{%generation%}b{%endgeneration%}c",
            "a{%+   generation\n%}b{% endgeneration   -%} c",
        ] {
            assert_eq!(render(source).unwrap(), "abc", "{source}");
        }
        assert_eq!(
            render("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}").unwrap(),
            "21"
        );
        assert_eq!(
            without_generation_tags("{% if generation %}{% generations %}"),
            "{% if generation %}{% generations %}"
        );
    }

    #[test]
    fn line_endings_are_jinjas() {
        assert_eq!(render("a\r\n{% if true %}\r\nb\r{% endif %}\r\n").unwrap(), "a\nb\n");
    }

    #[test]
    fn a_folder_has_its_template_in_one_of_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let from_dir = || ChatTemplate::from_dir(dir.path());
        let prompt = || from_dir().unwrap().render(&[Message::new("user", "hi")], &RenderOptions::default()).unwrap();
        let config =
            |value: Value| std::fs::write(dir.path().join("tokenizer_config.json"), value.to_string()).unwrap();
        assert!(matches!(from_dir(), Err(Error::NoChatTemplate { .. })));

        config(json!({"bos_token": {"content": "<s>", "__type": "AddedToken"}, "chat_template": "{{ bos_token }}one"}));
        assert_eq!(prompt(), "<s>one");
        let named = [json!({"name": "tool_use", "template": "t"}), json!({"name": "default", "template": "d"})];
        config(json!({"chat_template": named}));
        assert_eq!(prompt(), "d");
        config(json!({"chat_template": [named[0]]}));
        assert!(from_dir().unwrap_err().to_string().starts_with("tokenizer_config.json: chat_template should be"));
        config(json!({"bos_token": "<b>", "chat_template": 3}));
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ bos_token }}file\n").unwrap();
        assert_eq!(prompt(), "<b>file");
    }

    #[test]
    fn the_clock_is_the_callers_or_the_local_one() {
        let options = RenderOptions { now: Some("2024-02-03T04:05:06".parse().unwrap()), ..Default::default() };
        let template = template("{{ strftime_now('%d %b %Y') }}");
        let messages = [Message::new("user", "hi")];
        assert_eq!(template.render(&messages, &options).unwrap(), "03 Feb 2024");
        let before = clock::strftime(clock::now(), "%d %b %Y");
        let today = template.render(&messages, &RenderOptions::default()).unwrap();
        let after = clock::strftime(clock::now(), "%d %b %Y");
        assert!(before == today || after == today);
    }

    #[test]
    fn can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<ChatTemplate>();
    }
}
