//! Text to token ids and back, from the files that lie in a Hugging Face folder.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::ModelWrapper;
use tokenizers::normalizers::Replace;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, Model, NormalizerWrapper};

use super::Error;

/// A tokenizer with the settings of its model: what `AutoTokenizer.from_pretrained(folder)` is in `transformers`.
///
/// `Send` and `Sync`; share it in an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special_tokens: BTreeMap<String, String>,
    byte_fallback: bool,
    vocab_size: usize,
}

/// The roles that every tokenizer of `transformers` knows, in its order, which is the order in which tokens
/// missing from the vocabulary get their ids.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Model types whose folders name `LlamaTokenizer` and do not mean it: `transformers` 5 then takes `tokenizer.json`
/// as it is.
const NOT_REALLY_LLAMA: [&str; 8] =
    ["arctic", "internlm2", "internlm3", "minicpm3", "nemotron", "phi3", "phimoe", "qwen2"];

impl Tokenizer {
    /// The tokenizer of a model folder with a `tokenizer.json`.
    ///
    /// Reads `tokenizer_config.json` and, where that has no `added_tokens_decoder`, `special_tokens_map.json` too;
    /// neither has to exist.
    ///
    /// # Errors
    /// A file that is missing or damaged, named in the error.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let json = dir.join("tokenizer.json");
        if !json.is_file() {
            return Err(Error::NoTokenizer { dir: dir.to_owned() });
        }
        let config = Config::read(dir)?;
        Self::build(&read(&json)?, &json.display().to_string(), &config, None)
    }

    /// The tokenizer of a model folder that may hold a SentencePiece `tokenizer.model` only.
    ///
    /// `sentencepiece` turns the bytes of `tokenizer.model` into the value of a `tokenizer.json`; it is not called
    /// where a `tokenizer.json` exists. As such a file cannot say whether a text starts with BOS,
    /// `tokenizer_config.json` does (`add_bos_token`, true where it is silent, and `add_eos_token`, false).
    ///
    /// # Errors
    /// A file that is missing or damaged, named in the error.
    pub fn from_dir_with<F>(dir: &Path, sentencepiece: F) -> Result<Self, Error>
    where
        F: FnOnce(&[u8]) -> Result<Value, Box<dyn StdError + Send + Sync>>,
    {
        let model = dir.join("tokenizer.model");
        if dir.join("tokenizer.json").is_file() || !model.is_file() {
            return Self::from_dir(dir);
        }
        let origin = model.display().to_string();
        let json =
            sentencepiece(&read(&model)?).map_err(|source| Error::BadTokenizer { origin: origin.clone(), source })?;
        let config = Config::read(dir)?;
        let sequence = Affixes { bos: config.flag("add_bos_token", true)?, eos: config.flag("add_eos_token", false)? };
        Self::build(json.to_string().as_bytes(), &origin, &config, Some(sequence))
    }

    /// A tokenizer from the values of a `tokenizer.json` and a `tokenizer_config.json`, wherever they come from.
    ///
    /// # Errors
    /// [`Error::BadTokenizer`] and [`Error::BadConfig`].
    pub fn from_json(tokenizer: &Value, config: Option<&Value>) -> Result<Self, Error> {
        let config = Config::from_value(config)?;
        Self::build(tokenizer.to_string().as_bytes(), "tokenizer.json", &config, None)
    }

    /// What `transformers` does between reading the files and the first call.
    fn build(json: &[u8], origin: &str, config: &Config, affixes: Option<Affixes>) -> Result<Self, Error> {
        let bad = |source| Error::BadTokenizer { origin: origin.to_owned(), source };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(bad)?;

        // Lengths are the caller's business: a prompt is never cut or padded by a setting in a file.
        inner.with_truncation(None).map_err(bad)?;
        inner.with_padding(None);
        inner.set_encode_special_tokens(config.flag("split_special_tokens", false)?);
        anchor_to_lines(&mut inner).map_err(|error| bad(Box::new(error)))?;

        if config.is_llama() && !contains(json, b"\"ByteLevel\"") {
            as_llama_tokenizer(&mut inner, config)?;
        }

        let mut special_tokens = config.special_tokens()?;
        if affixes.is_some() {
            // SentencePiece models name these three themselves, and Llama's names are the common ones.
            for (role, token) in [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")] {
                if inner.token_to_id(token).is_some() && !special_tokens.iter().any(|(name, _)| name == role) {
                    special_tokens.push((role.to_owned(), AddedToken::from(token, true)));
                }
            }
        }
        inner.add_tokens(&config.added_tokens()?);
        let named: Vec<AddedToken> = special_tokens.iter().map(|(_, token)| token.clone().special(true)).collect();
        inner.add_tokens(&named);
        inner.add_tokens(&config.extra_special_tokens()?);

        let special_tokens = special_tokens.into_iter().map(|(role, token)| (role, token.content)).collect();
        if let Some(affixes) = affixes {
            affixes.apply(&mut inner, &special_tokens).map_err(bad)?;
        }
        let byte_fallback = match inner.get_decoder() {
            Some(DecoderWrapper::ByteFallback(_)) => true,
            Some(DecoderWrapper::Sequence(steps)) => {
                steps.get_decoders().iter().any(|d| matches!(d, DecoderWrapper::ByteFallback(_)))
            }
            _ => false,
        };
        // Counting all tokens at once makes a copy of the vocabulary.
        let known = inner.get_vocab_size(false);
        let added = inner.get_added_vocabulary().get_vocab();
        let vocab_size = known + added.keys().filter(|token| inner.get_model().token_to_id(token).is_none()).count();
        Ok(Self { inner, special_tokens, byte_fallback, vocab_size })
    }

    /// The ids of a text, as `tokenizer(text, add_special_tokens=…)["input_ids"]` gives them.
    ///
    /// Special tokens written out in the text (`<s>`) become their ids. `add_special_tokens` also adds those that
    /// the tokenizer puts around every text, mostly BOS in front.
    ///
    /// # Errors
    /// [`Error::Encode`], for a vocabulary that cannot express the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(Error::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of these ids, as `tokenizer.decode(ids, skip_special_tokens=…)` gives it. Ids that are no token's
    /// are left out; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Decode`], for a decoder that cannot handle its own tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special).map_err(Error::Decode)
    }

    /// The token with this id, as it stands in the vocabulary (`▁the`, `Ġthe`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token, written as it stands in the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `decode` leaves this id out when it skips special tokens.
    pub fn is_special(&self, id: u32) -> bool {
        let vocabulary = self.inner.get_added_vocabulary();
        vocabulary.simple_id_to_token(id).is_some_and(|token| vocabulary.is_special_token(&token))
    }

    /// The number of tokens, added ones included. A model may have more rows in its embedding than that.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that starts a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.role("bos_token")
    }

    /// The token that ends a text. `generation_config.json` may name more of them.
    pub fn eos_id(&self) -> Option<u32> {
        self.role("eos_token")
    }

    /// The token that fills up a batch.
    pub fn pad_id(&self) -> Option<u32> {
        self.role("pad_token")
    }

    /// The token for what the vocabulary does not have.
    pub fn unk_id(&self) -> Option<u32> {
        self.role("unk_token")
    }

    /// The special tokens by role (`bos_token` → `<s>`), which is what a chat template sees of them.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.special_tokens
    }

    fn role(&self, name: &str) -> Option<u32> {
        self.id(self.special_tokens.get(name)?)
    }

    /// Whether this token stands for one byte of a character that the vocabulary does not have.
    ///
    /// The rule is the decoder's: six characters, `<0x` and two hexadecimal digits. It reads a whole run of such
    /// tokens at once.
    pub(super) fn is_byte(&self, token: &str) -> bool {
        let digits = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
        self.byte_fallback && digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
    }
}

/// Gives the patterns of a `tokenizer.json` the meaning that they have in Python, where the regular expressions are
/// Oniguruma's: `^` and `$` match at every line.
fn anchor_to_lines(inner: &mut tokenizers::Tokenizer) -> Result<(), serde_json::Error> {
    fn anchored<T: Serialize + DeserializeOwned>(part: Option<&T>) -> Result<Option<T>, serde_json::Error> {
        let mut json = serde_json::to_value(part)?;
        if anchor(&mut json) > 0 { serde_json::from_value(json) } else { Ok(None) }
    }
    /// How many patterns were changed.
    fn anchor(json: &mut Value) -> usize {
        match json {
            Value::Array(items) => items.iter_mut().map(anchor).sum(),
            Value::Object(fields) => fields.iter_mut().map(|(key, value)| pattern(key, value)).sum(),
            _ => 0,
        }
    }
    fn pattern(key: &str, value: &mut Value) -> usize {
        match value {
            Value::String(pattern) if key == "Regex" && pattern.contains(['^', '$']) => {
                pattern.insert_str(0, "(?m)");
                1
            }
            value => anchor(value),
        }
    }
    if let Some(normalizer) = anchored(inner.get_normalizer())? {
        inner.with_normalizer(Some(normalizer));
    }
    if let Some(pre_tokenizer) = anchored(inner.get_pre_tokenizer())? {
        inner.with_pre_tokenizer(Some(pre_tokenizer));
    }
    if let Some(decoder) = anchored(inner.get_decoder())? {
        inner.with_decoder(Some(decoder));
    }
    Ok(())
}

/// What `LlamaTokenizer` of `transformers` 5 does to a `tokenizer.json`: it keeps vocabulary, merges, added tokens and
/// post-processor, and sets the rest itself. A space is prepended to the text (`legacy`: to each part between special
/// tokens), and nothing else is normalized.
fn as_llama_tokenizer(inner: &mut tokenizers::Tokenizer, config: &Config) -> Result<(), Error> {
    let ModelWrapper::BPE(bpe) = inner.get_model() else { return Ok(()) };
    let mut bpe = bpe.clone();
    bpe.fuse_unk = true;
    bpe.byte_fallback = true;
    bpe.unk_token = None;
    bpe.dropout = None;
    bpe.ignore_merges = false;

    let prefix = config.flag("add_prefix_space", true)?;
    let scheme = match (prefix, config.flag("legacy", false)?) {
        (false, _) => PrependScheme::Never,
        (true, false) => PrependScheme::First,
        (true, true) => PrependScheme::Always,
    };
    let underscore = Replace::new("▁", " ")
        .map_err(|source| Error::BadTokenizer { origin: "the pattern \"▁\"".to_owned(), source })?;
    let mut decoder: Vec<DecoderWrapper> = vec![underscore.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoder.push(Strip::new(' ', 1, 0).into());
    }

    inner.with_model(bpe);
    inner.with_normalizer(None::<NormalizerWrapper>);
    inner.with_pre_tokenizer(Some(Metaspace::new('▁', scheme, false)));
    inner.with_decoder(Some(Sequence::new(decoder)));
    Ok(())
}

/// The tokens put around a text by a tokenizer whose file does not say it.
struct Affixes {
    bos: bool,
    eos: bool,
}

impl Affixes {
    fn apply(
        &self,
        inner: &mut tokenizers::Tokenizer,
        special_tokens: &BTreeMap<String, String>,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let token = |wanted: bool, role: &str| special_tokens.get(role).filter(|_| wanted);
        let (bos, eos) = (token(self.bos, "bos_token"), token(self.eos, "eos_token"));
        let pieces = [bos.cloned(), Some("$A".to_owned()), eos.cloned()];
        let ids = bos.into_iter().chain(eos).filter_map(|t| Some((t.clone(), inner.token_to_id(t)?)));
        let template = TemplateProcessing::builder()
            .try_single(pieces.into_iter().flatten().collect::<Vec<_>>())?
            .special_tokens(ids.collect::<Vec<_>>())
            .build()?;
        inner.with_post_processor(Some(template));
        Ok(())
    }
}

/// `tokenizer_config.json`, and what belongs to it from the files beside it.
pub(super) struct Config {
    values: Map<String, Value>,
    model_type: Option<String>,
}

impl Config {
    pub(super) fn from_value(tokenizer_config: Option<&Value>) -> Result<Self, Error> {
        Ok(Self { values: object("tokenizer_config.json", tokenizer_config)?, model_type: None })
    }

    pub(super) fn read(dir: &Path) -> Result<Self, Error> {
        let mut values = read_object(&dir.join("tokenizer_config.json"))?;
        if !values.contains_key("added_tokens_decoder") {
            values.extend(read_object(&dir.join("special_tokens_map.json"))?);
        }
        let model = read_object(&dir.join("config.json"))?;
        let text = |key: &str| model.get(key).and_then(Value::as_str).map(str::to_owned);
        if let (None, Some(class)) = (values.get("tokenizer_class"), text("tokenizer_class")) {
            values.insert("tokenizer_class".to_owned(), class.into());
        }
        Ok(Self { values, model_type: text("model_type") })
    }

    /// A boolean; absent or null is the default.
    fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        match self.values.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(bad_config(key, "true or false", other)),
        }
    }

    fn is_llama(&self) -> bool {
        let class = self.values.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        class.strip_suffix("Fast").unwrap_or(class) == "LlamaTokenizer"
            && !self.model_type.as_deref().is_some_and(|t| NOT_REALLY_LLAMA.contains(&t))
    }

    /// Role → token: the common roles, then any other key that ends in `_token`, then a named `extra_special_tokens`.
    fn special_tokens(&self) -> Result<Vec<(String, AddedToken)>, Error> {
        let mut tokens = Vec::new();
        for role in ROLES {
            if let Some(value) = self.values.get(role).filter(|v| !v.is_null()) {
                tokens.push((role.to_owned(), token(role, value, true)?));
            }
        }
        let other = |key: &str, value: &Value| {
            key.ends_with("_token") && !ROLES.contains(&key) && (value.is_string() || value.is_object())
        };
        for (key, value) in self.values.iter().filter(|(key, value)| other(key, value)) {
            tokens.push((key.clone(), token(key, value, true)?));
        }
        if let Some(Value::Object(named)) = self.values.get("extra_special_tokens") {
            for (key, value) in named {
                tokens.push((key.clone(), token(key, value, true)?));
            }
        }
        Ok(tokens)
    }

    /// Role → text of the special tokens, which is what a template sees of them.
    pub(super) fn special_token_texts(&self) -> Result<BTreeMap<String, String>, Error> {
        Ok(self.special_tokens()?.into_iter().map(|(role, token)| (role, token.content)).collect())
    }

    /// The chat template; of several the one named `default`.
    pub(super) fn chat_template(&self) -> Result<Option<&str>, Error> {
        let wrong =
            |found| bad_config("chat_template", "a string, or a list of {name, template} with a default", found);
        match self.values.get("chat_template") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(template)) => Ok(Some(template)),
            Some(value @ Value::Array(named)) => {
                let default = named.iter().find(|entry| entry["name"] == "default");
                default.and_then(|entry| entry["template"].as_str()).map(Some).ok_or_else(|| wrong(value))
            }
            Some(other) => Err(wrong(other)),
        }
    }

    /// `added_tokens_decoder`, by ascending id.
    fn added_tokens(&self) -> Result<Vec<AddedToken>, Error> {
        let key = "added_tokens_decoder";
        let Some(value) = self.values.get(key) else { return Ok(Vec::new()) };
        let Value::Object(entries) = value else { return Err(bad_config(key, "an object", value)) };
        let mut tokens = Vec::with_capacity(entries.len());
        for (id, value) in entries {
            let id: u32 = id.parse().map_err(|_| bad_config(key, "an object with ids as keys", &id.as_str().into()))?;
            tokens.push((id, token(key, value, false)?));
        }
        tokens.sort_by_key(|(id, _)| *id);
        Ok(tokens.into_iter().map(|(_, token)| token).collect())
    }

    /// `extra_special_tokens` where it is a list, else its older name.
    fn extra_special_tokens(&self) -> Result<Vec<AddedToken>, Error> {
        let given = |key: &'static str| self.values.get(key).and_then(Value::as_array).map(|list| (key, list));
        let extra = given("extra_special_tokens").filter(|(_, list)| !list.is_empty());
        let Some((key, list)) = extra.or_else(|| given("additional_special_tokens")) else { return Ok(Vec::new()) };
        list.iter().map(|value| token(key, value, true)).collect()
    }
}

/// A token written as a string, or as an object with its flags.
fn token(key: &str, value: &Value, special: bool) -> Result<AddedToken, Error> {
    let flag = |name: &str, default: bool| value.get(name).and_then(Value::as_bool).unwrap_or(default);
    let content = value.as_str().or_else(|| value.get("content")?.as_str());
    let content = content.ok_or_else(|| bad_config(key, "a token (a string, or an object with content)", value))?;
    let special = flag("special", special);
    Ok(AddedToken::from(content, special)
        .single_word(flag("single_word", false))
        .lstrip(flag("lstrip", false))
        .rstrip(flag("rstrip", false))
        .normalized(flag("normalized", !special)))
}

fn bad_config(key: &str, expected: &'static str, found: &Value) -> Error {
    Error::BadConfig { key: key.to_owned(), expected, found: found.to_string() }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

/// The object in a JSON file; an empty one where there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>, Error> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let value: Value =
        serde_json::from_slice(&read(path)?).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    object(&path.display().to_string(), Some(&value))
}

fn object(name: &str, value: Option<&Value>) -> Result<Map<String, Value>, Error> {
    match value {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map.clone()),
        Some(other) => Err(bad_config(name, "an object", other)),
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/chat");

    fn data(path: &str) -> Value {
        serde_json::from_slice(&std::fs::read(format!("{DATA}/{path}")).unwrap()).unwrap()
    }

    /// One of the small tokenizers: `byte_tokens` or `byte_level`.
    pub(in crate::text) fn fixture(base: &str) -> Tokenizer {
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
        Tokenizer::from_json(&data(&format!("tokenizers/{base}.json")), Some(&config)).unwrap()
    }

    fn ids(value: &Value) -> Vec<u32> {
        serde_json::from_value(value.clone()).unwrap()
    }

    /// Ids and texts are those of transformers 5.23.0 (scripts/make_chat_goldens.py) for the same folder.
    #[test]
    fn folders_load_as_transformers_loads_them() {
        for case in data("tokenizers.json")["cases"].as_array().unwrap() {
            let name = &case["name"];
            let dir = tempfile::tempdir().unwrap();
            let mut tokenizer = data(&format!("tokenizers/{}.json", case["base"].as_str().unwrap()));
            for (key, value) in case["change"].as_object().unwrap() {
                tokenizer[key] = value.clone();
            }
            std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
            for (file, content) in case["files"].as_object().unwrap() {
                std::fs::write(dir.path().join(file), content.to_string()).unwrap();
            }

            let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
            assert_eq!(tokenizer.vocab_size() as u64, case["vocab_size"], "{name}");
            assert_eq!(json!(tokenizer.special_tokens()), case["special_tokens"], "{name}");
            assert_eq!(json!(tokenizer.bos_id()), case["bos"], "{name}");
            assert_eq!(json!(tokenizer.eos_id()), case["eos"], "{name}");
            assert_eq!(json!(tokenizer.pad_id()), case["pad"], "{name}");
            for text in case["texts"].as_array().unwrap() {
                let words = text["text"].as_str().unwrap();
                assert_eq!(tokenizer.encode(words, true).unwrap(), ids(&text["ids"]), "{name}: {words:?}");
                assert_eq!(tokenizer.encode(words, false).unwrap(), ids(&text["plain"]), "{name}: {words:?}");
            }
            for text in case["ids"].as_array().unwrap() {
                let ids = ids(&text["ids"]);
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), text["text"], "{name}: {ids:?}");
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text["skipped"], "{name}: {ids:?}");
            }
        }
    }

    #[test]
    fn a_lone_sentencepiece_model_starts_with_bos_unless_told_otherwise() {
        let mut converted = data("tokenizers/byte_tokens.json");
        converted["post_processor"] = Value::Null;
        for (config, expected) in [
            (None, vec![1, 307]),
            (Some(json!({"add_bos_token": false})), vec![307]),
            (Some(json!({"add_bos_token": true, "add_eos_token": true, "eos_token": "</s>"})), vec![1, 307, 2]),
            (Some(json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": null})), vec![1, 307]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("tokenizer.model"), b"model").unwrap();
            if let Some(config) = &config {
                std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
            }
            let tokenizer = Tokenizer::from_dir_with(dir.path(), |bytes| {
                assert_eq!(bytes, b"model");
                Ok(converted.clone())
            });
            let tokenizer = tokenizer.unwrap();
            assert_eq!(tokenizer.encode("b", true).unwrap(), expected, "{config:?}");
            assert_eq!(tokenizer.encode("b", false).unwrap(), [307], "{config:?}");
            assert_eq!((tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()), (Some(1), Some(2), Some(0)));
        }
    }

    #[test]
    fn tokens_by_id_and_by_name() {
        let tokenizer = fixture("byte_level");
        let the = tokenizer.id("Ġthe").unwrap();
        assert_eq!(tokenizer.token(the).as_deref(), Some("Ġthe"));
        assert_eq!((tokenizer.id("no such token"), tokenizer.token(99_999)), (None, None));
        assert!(tokenizer.is_special(1) && !tokenizer.is_special(the));
        assert_eq!(tokenizer.decode(&[1, the, 99_999, 2], true).unwrap(), " the");
        assert_eq!(tokenizer.decode(&[1, the, 2], false).unwrap(), "<s> the</s>");
    }

    #[test]
    fn errors_name_the_file_and_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err();
        assert!(matches!(error, Error::NoTokenizer { .. }), "{error}");
        assert!(error.to_string().contains("needs tokenizer.json or tokenizer.model"), "{error}");

        std::fs::write(dir.path().join("tokenizer.json"), "{\"version\": \"1.0\"").unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: not a tokenizer that can be used"), "{error}");

        std::fs::write(dir.path().join("tokenizer_config.json"), "nonsense").unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json: not valid JSON"), "{error}");

        let config =
            |value: Value| Tokenizer::from_json(&data("tokenizers/byte_level.json"), Some(&value)).unwrap_err();
        assert_eq!(
            config(json!({"eos_token": 7})).to_string(),
            "tokenizer_config.json: eos_token should be a token (a string, or an object with content), found 7"
        );
        assert_eq!(
            config(json!({"split_special_tokens": "yes"})).to_string(),
            "tokenizer_config.json: split_special_tokens should be true or false, found \"yes\""
        );
        assert!(matches!(config(json!({"added_tokens_decoder": {"x": "a"}})), Error::BadConfig { .. }));
        assert!(matches!(config(json!([])), Error::BadConfig { .. }));
    }

    #[test]
    fn can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Tokenizer>();
    }
}
