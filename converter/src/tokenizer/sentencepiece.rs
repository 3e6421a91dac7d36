//! A SentencePiece model, whatever file it came from, as a `tokenizer.json`.

use serde_json::{Map, Value as Json, json};

use super::json::{TokenKind, added_tokens, template};
use super::merges::{Scored, from_scores};

/// SentencePiece's stand-in for a space.
const SPACE: &str = "▁";

/// One entry of the vocabulary; its id is its position.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    pub(crate) kind: TokenKind,
}

/// How text is cut into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Bpe,
    Unigram,
}

/// A model with the settings of its normalizer.
#[derive(Clone, Debug)]
pub(crate) struct SentencePiece {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) algorithm: Algorithm,
    pub(crate) unk_id: u32,
    /// `None` where the model has no such token.
    pub(crate) bos_id: Option<u32>,
    pub(crate) eos_id: Option<u32>,
    pub(crate) add_bos: bool,
    pub(crate) add_eos: bool,
    /// Characters without a piece become their UTF-8 bytes' pieces instead of the unknown token.
    pub(crate) byte_fallback: bool,
    /// A space is put in front of the text.
    pub(crate) add_dummy_prefix: bool,
    /// Spaces at both ends go, runs of them become one.
    pub(crate) remove_extra_whitespaces: bool,
    /// SentencePiece's compiled character map; empty for none.
    pub(crate) charsmap: Vec<u8>,
    /// Whether the space in front is put before every stretch between special tokens (and doubles one that is
    /// there), as SentencePiece sees them, or once, as newer Llama tokenizers want it.
    pub(crate) legacy: bool,
}

impl SentencePiece {
    /// The contents of `tokenizer.json`, or why there can be none.
    pub(crate) fn to_json(&self) -> Result<Json, String> {
        let unk = self.token(self.unk_id, "unknown")?;
        let bos = self.bos_id.filter(|_| self.add_bos).map(|id| self.token(id, "beginning-of-sequence")).transpose()?;
        let eos = self.eos_id.filter(|_| self.add_eos).map(|id| self.token(id, "end-of-sequence")).transpose()?;
        let model = match self.algorithm {
            Algorithm::Bpe => self.bpe(unk.0)?,
            Algorithm::Unigram => self.unigram(),
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added_tokens(self.pieces.iter().map(|piece| (piece.text.as_str(), piece.kind))),
            "normalizer": self.normalizer(),
            "pre_tokenizer": self.pre_tokenizer(),
            "post_processor": template(bos, eos),
            "decoder": self.decoder(),
            "model": model,
        }))
    }

    fn token(&self, id: u32, what: &str) -> Result<(&str, u32), String> {
        let piece = self.pieces.get(id as usize);
        let piece =
            piece.ok_or_else(|| format!("the {what} token is {id}, beyond the {} pieces", self.pieces.len()))?;
        Ok((&piece.text, id))
    }

    fn normalizer(&self) -> Json {
        let replace =
            |pattern: Json, content: &str| json!({ "type": "Replace", "pattern": pattern, "content": content });
        let mut steps = Vec::new();
        if !self.charsmap.is_empty() {
            steps.push(json!({ "type": "Precompiled", "precompiled_charsmap": base64(&self.charsmap) }));
        }
        if self.remove_extra_whitespaces {
            // At the end the stand-in counts as a space, because it is removed after spaces have been replaced.
            steps.push(replace(json!({ "Regex": format!(r"\A +|[ {SPACE}]+\z") }), ""));
            steps.push(replace(json!({ "Regex": " {2,}" }), " "));
        }
        if self.legacy {
            if self.add_dummy_prefix {
                steps.push(json!({ "type": "Prepend", "prepend": SPACE }));
            }
            steps.push(replace(json!({ "String": " " }), SPACE));
        }
        if steps.is_empty() { Json::Null } else { json!({ "type": "Sequence", "normalizers": steps }) }
    }

    fn pre_tokenizer(&self) -> Json {
        if self.legacy {
            return Json::Null;
        }
        let scheme = if self.add_dummy_prefix { "first" } else { "never" };
        json!({ "type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": false })
    }

    fn decoder(&self) -> Json {
        let mut steps = vec![
            json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if self.add_dummy_prefix {
            steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        json!({ "type": "Sequence", "decoders": steps })
    }

    fn bpe(&self, unk: &str) -> Result<Json, String> {
        let mut vocab = Map::new();
        for (id, piece) in self.pieces.iter().enumerate() {
            if let Some(other) = vocab.insert(piece.text.clone(), id.into()) {
                return Err(format!("the piece {:?} occurs twice, as {other} and {id}", piece.text));
            }
        }
        // Pieces for bytes, control and the unknown are never the result of a merge.
        let mergeable =
            |piece: &&Piece| matches!(piece.kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused);
        let scored: Vec<Scored> = self
            .pieces
            .iter()
            .filter(mergeable)
            .map(|piece| Scored { text: &piece.text, score: piece.score })
            .collect();
        Ok(json!({
            "type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": self.byte_fallback, "ignore_merges": false,
            "vocab": vocab,
            "merges": from_scores(&scored),
        }))
    }

    /// The unigram model. `tokenizers` takes every entry for one that text may match, SentencePiece only those of
    /// kinds that stand for text: the others get a score so low that spelling them out always wins.
    fn unigram(&self) -> Json {
        let is_text =
            |piece: &Piece| matches!(piece.kind, TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused);
        let lowest = self.pieces.iter().filter(|piece| is_text(piece)).map(|piece| f64::from(piece.score));
        let lowest = lowest.fold(0.0, f64::min);
        // An unknown character costs 10 more than the lowest score.
        let score = |piece: &Piece| match is_text(piece) {
            true => f64::from(piece.score),
            false => (lowest - 11.0) * (piece.text.chars().count() + 1) as f64,
        };
        let vocab: Vec<(&str, f64)> = self.pieces.iter().map(|piece| (piece.text.as_str(), score(piece))).collect();
        json!({ "type": "Unigram", "unk_id": self.unk_id, "vocab": vocab, "byte_fallback": self.byte_fallback })
    }
}

/// RFC 4648 base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, &byte| bits << 8 | u32::from(byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let used = digit <= group.len();
            text.push(if used { char::from(DIGITS[(bits >> (18 - 6 * digit) & 63) as usize]) } else { '=' });
        }
    }
    text
}
