//! The tokenizer in a GGUF file's metadata as the files of a Hugging Face folder.

use serde_json::{Map, Value as Json, json};

use super::config::Keys;
use super::metadata::Metadata;
use crate::error::Error;
use crate::tokenizer::byte_level::{ByteLevel, Pre};
use crate::tokenizer::json::{TokenKind, added_token};
use crate::tokenizer::sentencepiece::{Algorithm, Piece, SentencePiece};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// See [`super::GgufFile::tokenizer_files`].
pub(super) fn tokenizer_files(keys: Keys<'_>) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let metadata = keys.metadata;
    let vocabulary = Vocabulary::read(metadata, keys.architecture.ordered_pieces)?;
    let tokenizer = match metadata.str(MODEL)?.ok_or_else(|| metadata.missing(MODEL))? {
        "gpt2" => vocabulary.byte_level()?,
        "llama" => vocabulary.sentencepiece()?,
        other => {
            let what = format!("is `{other}`; supported are `gpt2` (byte-level BPE) and `llama` (SentencePiece BPE)");
            return Err(Error::config(&metadata.path, MODEL, what));
        }
    };
    let names = vocabulary.special_names();
    let files = [
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", vocabulary.tokenizer_config(&names, keys.size("context_length")?)?),
        ("special_tokens_map.json", Json::Object(names)),
        ("generation_config.json", vocabulary.generation_config()?),
    ];
    Ok(files.into_iter().map(|(name, json)| (name.to_owned(), format!("{json:#}\n").into_bytes())).collect())
}

/// The tokens and the ids with a meaning.
struct Vocabulary<'a> {
    metadata: &'a Metadata,
    /// See [`Architecture::ordered_pieces`](super::arch::Architecture::ordered_pieces).
    ordered: bool,
    tokens: Vec<(&'a str, TokenKind)>,
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata, ordered: bool) -> Result<Self, Error> {
        let contents = metadata.strings(TOKENS)?.ok_or_else(|| metadata.missing(TOKENS))?;
        let kinds = metadata.numbers(TOKEN_TYPE)?.ok_or_else(|| metadata.missing(TOKEN_TYPE))?;
        same_length(metadata, TOKEN_TYPE, kinds.len(), contents.len())?;
        let mut tokens = Vec::with_capacity(contents.len());
        for (id, (content, kind)) in contents.into_iter().zip(kinds).enumerate() {
            let kind = TokenKind::from_code(kind as u64).ok_or_else(|| {
                Error::config(&metadata.path, TOKEN_TYPE, format!("of token {id} is {kind}; 1 to 6 are defined"))
            })?;
            // Runs of spaces are not found in the text as it is: merges make them, as in the model's own tokenizer.
            let spaces = ordered && content.bytes().all(|byte| byte == b' ');
            tokens.push((content, if spaces { TokenKind::Normal } else { kind }));
        }
        let id = |name: &str| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match metadata.u32(&key)? {
                Some(id) if id as usize >= tokens.len() => {
                    Err(Error::config(&metadata.path, key, format!("is {id}, beyond the {} tokens", tokens.len())))
                }
                found => Ok(found),
            }
        };
        let (bos, eos, unknown, padding) = (id("bos")?, id("eos")?, id("unknown")?, id("padding")?);
        Ok(Self { metadata, ordered, tokens, bos, eos, unknown, padding })
    }

    fn byte_level(&self) -> Result<Json, Error> {
        let metadata = self.metadata;
        let merges = metadata.strings(MERGES)?.ok_or_else(|| metadata.missing(MERGES))?;
        let pre = Pre::find(metadata.str(PRE)?).map_err(|what| Error::config(&metadata.path, PRE, what))?;
        let (bos, eos) = self.framing(pre.add_bos)?;
        let named = |id: Option<u32>| id.map(|id| (self.tokens[id as usize].0, id));
        ByteLevel { pre, tokens: &self.tokens, merges: &merges, bos: named(bos), eos: named(eos) }
            .to_json()
            .map_err(|what| Error::config(&metadata.path, TOKENS, what))
    }

    fn sentencepiece(&self) -> Result<Json, Error> {
        let metadata = self.metadata;
        let scores = metadata.numbers(SCORES)?.ok_or_else(|| metadata.missing(SCORES))?;
        same_length(metadata, SCORES, scores.len(), self.tokens.len())?;
        let piece = |(id, (&(text, kind), score)): (usize, (&(&str, TokenKind), f64))| match self.ordered {
            true if kind == TokenKind::Normal => Piece { text: text.replace(' ', "▁"), score: -(id as f32), kind },
            true => Piece { text: text.to_owned(), score: -(id as f32), kind },
            false => Piece { text: text.to_owned(), score: score as f32, kind },
        };
        let pieces: Vec<Piece> = self.tokens.iter().zip(scores).enumerate().map(piece).collect();
        let (bos_id, eos_id) = self.framing(true)?;
        let model = SentencePiece {
            byte_fallback: pieces.iter().any(|piece| piece.kind == TokenKind::Byte),
            pieces,
            algorithm: Algorithm::Bpe,
            unk_id: self.unknown.unwrap_or(0),
            add_bos: bos_id.is_some(),
            bos_id,
            add_eos: eos_id.is_some(),
            eos_id,
            add_dummy_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
            remove_extra_whitespaces: metadata.bool("tokenizer.ggml.remove_extra_whitespaces")?.unwrap_or(false),
            charsmap: Vec::new(),
            legacy: true,
        };
        model.to_json().map_err(|what| Error::config(&metadata.path, TOKENS, what))
    }

    /// The tokens that go in front of and behind every text.
    fn framing(&self, add_bos: bool) -> Result<(Option<u32>, Option<u32>), Error> {
        let add = |key: &str, default: bool, id_key: &str, id: Option<u32>| match self.metadata.bool(key)? {
            // A file that asks for the token must say which it is; one that is silent gets it if it has one.
            Some(true) => id.map(Some).ok_or_else(|| self.metadata.missing(id_key)),
            Some(false) => Ok(None),
            None => Ok(id.filter(|_| default)),
        };
        let bos = add("tokenizer.ggml.add_bos_token", add_bos, "tokenizer.ggml.bos_token_id", self.bos)?;
        let eos = add("tokenizer.ggml.add_eos_token", false, "tokenizer.ggml.eos_token_id", self.eos)?;
        Ok((bos, eos))
    }

    /// The contents of the special tokens by their role.
    fn special_names(&self) -> Map<String, Json> {
        let roles = [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unknown),
            ("pad_token", self.padding),
        ];
        let named = |(role, id): (&str, Option<u32>)| Some((role.to_owned(), Json::from(self.tokens[id? as usize].0)));
        roles.into_iter().filter_map(named).collect()
    }

    fn tokenizer_config(&self, names: &Map<String, Json>, context: Option<usize>) -> Result<Json, Error> {
        let metadata = self.metadata;
        let added = self
            .tokens
            .iter()
            .enumerate()
            .filter_map(|(id, (content, kind))| Some((id.to_string(), added_token(content, kind.added()?))));
        let mut config = Map::new();
        let prefix_space =
            metadata.str(MODEL)? == Some("llama") && metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        config.insert("add_prefix_space".to_owned(), prefix_space.into());
        config.insert("added_tokens_decoder".to_owned(), Json::Object(added.collect()));
        config.extend(names.clone());
        if let Some(template) = metadata.str("tokenizer.chat_template")? {
            config.insert("chat_template".to_owned(), template.into());
        }
        config.insert("clean_up_tokenization_spaces".to_owned(), false.into());
        if let Some(length) = context {
            config.insert("model_max_length".to_owned(), length.into());
        }
        config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
        Ok(Json::Object(config))
    }

    /// Ids that generation needs; all tokens that end a turn count as ends.
    fn generation_config(&self) -> Result<Json, Error> {
        let mut ends: Vec<u32> = self.eos.into_iter().collect();
        for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            ends.extend(self.metadata.u32(key)?.filter(|id| !ends.contains(id)));
        }
        let mut config = Map::new();
        config.insert("_from_model_config".to_owned(), true.into());
        if let Some(bos) = self.bos {
            config.insert("bos_token_id".to_owned(), bos.into());
        }
        match ends[..] {
            [] => {}
            [end] => drop(config.insert("eos_token_id".to_owned(), end.into())),
            _ => drop(config.insert("eos_token_id".to_owned(), json!(ends))),
        }
        if let Some(padding) = self.padding {
            config.insert("pad_token_id".to_owned(), padding.into());
        }
        Ok(Json::Object(config))
    }
}

fn same_length(metadata: &Metadata, key: &str, found: usize, tokens: usize) -> Result<(), Error> {
    if found == tokens {
        return Ok(());
    }
    Err(Error::config(
        &metadata.path,
        key,
        format!("must have one element for each of the {tokens} tokens, found {found}"),
    ))
}
