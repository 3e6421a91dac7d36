//! Byte-level BPE, as GPT-2, Llama 3 and SmolLM have it, as a `tokenizer.json`.
//!
//! A GGUF file names the way text is split before merging (`tokenizer.ggml.pre`) without spelling it out; the table
//! here has the splits of the `tokenizer.json` of the models behind those names.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::json::{TokenKind, added_tokens, template};

/// What a name in `tokenizer.ggml.pre` stands for.
pub(crate) struct Pre {
    names: &'static [&'static str],
    split: Split,
    /// A word that is in the vocabulary is taken whole, whatever the merges say.
    ignore_merges: bool,
    /// Unicode normalization before everything else.
    nfc: bool,
    /// Whether a sequence begins with the beginning-of-sequence token where the file does not say.
    pub(crate) add_bos: bool,
}

enum Split {
    /// GPT-2's pattern, which the `ByteLevel` step has built in.
    Gpt2,
    /// Each digit by itself, then GPT-2's pattern.
    DigitsThenGpt2,
    /// The pattern of the model.
    Pattern(&'static str),
}

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Every known split. The first is also that of files that name none.
const PRES: [Pre; 5] = [
    Pre { names: &["gpt-2", "default"], split: Split::Gpt2, ignore_merges: false, nfc: false, add_bos: false },
    Pre {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        split: Split::DigitsThenGpt2,
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3"],
        split: Split::Pattern(LLAMA3),
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen"],
        split: Split::Pattern(QWEN2),
        ignore_merges: false,
        nfc: true,
        add_bos: false,
    },
    Pre { names: &["tekken"], split: Split::Pattern(TEKKEN), ignore_merges: true, nfc: false, add_bos: true },
];

impl Pre {
    /// The split of this name, or a message with the known names.
    pub(crate) fn find(name: Option<&str>) -> Result<&'static Pre, String> {
        let Some(name) = name else { return Ok(&PRES[0]) };
        PRES.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
            let known: Vec<&str> = PRES.iter().flat_map(|pre| pre.names).copied().collect();
            format!("is `{name}`, which is not known; known are {}", known.join(", "))
        })
    }

    fn pre_tokenizer(&self) -> Json {
        let steps = match self.split {
            Split::Gpt2 => return byte_level(false, true),
            Split::DigitsThenGpt2 => {
                json!([{ "type": "Digits", "individual_digits": true }, byte_level(false, true)])
            }
            Split::Pattern(regex) => json!([
                { "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false },
                byte_level(false, false),
            ]),
        };
        json!({ "type": "Sequence", "pretokenizers": steps })
    }
}

fn byte_level(add_prefix_space: bool, use_regex: bool) -> Json {
    json!({
        "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex,
    })
}

/// A vocabulary with its merges.
pub(crate) struct ByteLevel<'a> {
    pub(crate) pre: &'static Pre,
    /// Content and kind of each token, by id.
    pub(crate) tokens: &'a [(&'a str, TokenKind)],
    /// Pairs separated by one space, the first to be merged first.
    pub(crate) merges: &'a [&'a str],
    /// Put in front of and behind every text.
    pub(crate) bos: Option<(&'a str, u32)>,
    pub(crate) eos: Option<(&'a str, u32)>,
}

impl ByteLevel<'_> {
    /// The contents of `tokenizer.json`, or why there can be none.
    pub(crate) fn to_json(&self) -> Result<Json, String> {
        let mut ids = HashMap::new();
        let mut vocab = Map::new();
        for (id, (token, _)) in self.tokens.iter().enumerate() {
            if let Some(other) = ids.insert(*token, id) {
                return Err(format!("the token {token:?} occurs twice, as {other} and {id}"));
            }
            vocab.insert((*token).to_owned(), id.into());
        }
        let mut merges = Vec::with_capacity(self.merges.len());
        for (index, merge) in self.merges.iter().enumerate() {
            let parts: Vec<&str> = merge.split(' ').collect();
            let [left, right] = parts[..] else {
                return Err(format!("merge {index} must be two tokens separated by a space, found {merge:?}"));
            };
            for token in [left, right, &format!("{left}{right}")] {
                if !ids.contains_key(token) {
                    return Err(format!("merge {index} is {merge:?}, and {token:?} is not a token"));
                }
            }
            merges.push([left, right]);
        }
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added_tokens(self.tokens.iter().copied()),
            "normalizer": if self.pre.nfc { json!({ "type": "NFC" }) } else { Json::Null },
            "pre_tokenizer": self.pre.pre_tokenizer(),
            "post_processor": template(self.bos, self.eos),
            "decoder": byte_level(true, true),
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": self.pre.ignore_merges,
                "vocab": vocab,
                "merges": merges,
            },
        }))
    }
}
