//! Parts of a `tokenizer.json` that every kind of tokenizer has.

use serde_json::{Value as Json, json};

/// What a token is for; the numbers are SentencePiece's, which GGUF took over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl TokenKind {
    pub(crate) fn from_code(code: u64) -> Option<Self> {
        use TokenKind::*;
        Some(match code {
            1 => Normal,
            2 => Unknown,
            3 => Control,
            4 => UserDefined,
            5 => Unused,
            6 => Byte,
            _ => return None,
        })
    }

    /// Whether the token is recognized as a whole in the text, and if so, whether it is left out of decoded text.
    pub(crate) fn added(self) -> Option<bool> {
        match self {
            TokenKind::Unknown | TokenKind::Control => Some(true),
            TokenKind::UserDefined => Some(false),
            TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => None,
        }
    }
}

/// An added token without its id, as `tokenizer_config.json` has it.
pub(crate) fn added_token(content: &str, special: bool) -> Json {
    json!({
        "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": special,
    })
}

/// The list `added_tokens` of `tokenizer.json`.
pub(crate) fn added_tokens<'a>(tokens: impl Iterator<Item = (&'a str, TokenKind)>) -> Vec<Json> {
    let entry = |(id, (content, kind)): (usize, (&str, TokenKind))| {
        let mut entry = json!({ "id": id });
        if let (Some(entry), Json::Object(rest)) = (entry.as_object_mut(), added_token(content, kind.added()?)) {
            entry.extend(rest);
        }
        Some(entry)
    };
    tokens.enumerate().filter_map(entry).collect()
}

/// The post-processor that puts `bos` in front of each text and `eos` behind it; `null` if there is neither.
pub(crate) fn template(bos: Option<(&str, u32)>, eos: Option<(&str, u32)>) -> Json {
    if bos.is_none() && eos.is_none() {
        return Json::Null;
    }
    let part = |name: &str, type_id: u32| {
        let special = |token: Option<(&str, u32)>| {
            token.map(|(content, _)| json!({ "SpecialToken": { "id": content, "type_id": type_id } }))
        };
        let text = json!({ "Sequence": { "id": name, "type_id": type_id } });
        [special(bos), Some(text), special(eos)].into_iter().flatten()
    };
    let mut special_tokens = serde_json::Map::new();
    for (content, id) in [bos, eos].into_iter().flatten() {
        special_tokens.insert(content.to_owned(), json!({ "id": content, "ids": [id], "tokens": [content] }));
    }
    json!({
        "type": "TemplateProcessing",
        "single": part("A", 0).collect::<Vec<_>>(),
        "pair": part("A", 0).chain(part("B", 1)).collect::<Vec<_>>(),
        "special_tokens": special_tokens,
    })
}
