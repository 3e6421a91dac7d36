//! `tokenizer.model` files: what the resulting `tokenizer.json` encodes, against SentencePiece itself.

use std::path::PathBuf;

use converter::tokenizer::{from_sentencepiece, from_sentencepiece_with};
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

const MODELS: [&str; 4] = ["spm_bpe", "spm_bpe_trim", "spm_unigram", "spm_unigram_bytes"];

fn data(name: &str) -> Vec<u8> {
    std::fs::read(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap()
}

fn model(name: &str) -> Vec<u8> {
    data(&format!("{name}.model"))
}

fn load(json: &Json) -> Tokenizer {
    json.to_string().parse().unwrap()
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

fn tokens(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    tokenizer.encode(text, true).unwrap().get_tokens().to_vec()
}

#[test]
fn encodes_as_sentencepiece_does() {
    let vectors: Json = serde_json::from_slice(&data("spm_vectors.json")).unwrap();
    assert_eq!(vectors["versions"]["sentencepiece"], "0.2.3");
    for name in MODELS {
        let tokenizer = load(&from_sentencepiece(&model(name)).unwrap());
        let cases = vectors["models"][name].as_array().unwrap();
        assert!(cases.len() > 100);
        for case in cases {
            let text = case[0].as_str().unwrap();
            let expected: Vec<u32> = serde_json::from_value(case[1].clone()).unwrap();
            assert_eq!(ids(&tokenizer, text), expected, "{name}: {text:?}");
        }
    }
}

#[test]
fn decodes_to_the_text() {
    let tokenizer = load(&from_sentencepiece(&model("spm_bpe")).unwrap());
    for text in ["the river", " the river", "a  b", "🙂 naïve\n", "日本"] {
        assert_eq!(tokenizer.decode(&ids(&tokenizer, text), true).unwrap(), text);
    }
}

#[test]
fn begins_with_bos_unless_told_otherwise() {
    let bytes = model("spm_bpe");
    let with = |settings: Json| tokens(&load(&from_sentencepiece_with(&bytes, &settings).unwrap()), "a");
    assert_eq!(with(Json::Null), ["<s>", "▁a"]);
    assert_eq!(with(json!({ "add_bos_token": false, "add_eos_token": true })), ["▁a", "</s>"]);
    assert_eq!(with(json!({ "add_bos_token": null, "add_prefix_space": false })), ["<s>", "a"]);
    let error = from_sentencepiece_with(&bytes, &json!({ "add_bos_token": "yes" })).unwrap_err().to_string();
    assert_eq!(error, "tokenizer_config.json: add_bos_token: must be a boolean, found \"yes\"");
}

/// What transformers' Llama tokenizers do with spaces, by the setting `legacy`.
#[test]
fn the_space_in_front_and_special_tokens() {
    let bytes = model("spm_bpe");
    let legacy = load(&from_sentencepiece(&bytes).unwrap());
    let newer = load(&from_sentencepiece_with(&bytes, &json!({ "legacy": false })).unwrap());
    assert_eq!(tokens(&legacy, "a</s>a"), ["<s>", "▁a", "</s>", "▁a"]);
    assert_eq!(tokens(&newer, "a</s>a"), ["<s>", "▁a", "</s>", "a"]);
    assert_eq!(tokens(&legacy, " a"), ["<s>", "▁", "▁a"]);
    assert_eq!(tokens(&newer, " a"), ["<s>", "▁a"]);
    assert_eq!(tokens(&legacy, ""), ["<s>"]);
}

/// Merging 32,000 pieces must not take long, even without optimization.
#[test]
fn large_vocabularies_are_quick() {
    let mut bytes = Vec::new();
    let mut push = |text: &str, score: f32, kind: u8| {
        let mut piece = vec![0x0a, text.len() as u8];
        piece.extend(text.as_bytes());
        piece.push(0x15);
        piece.extend(score.to_le_bytes());
        piece.extend([0x18, kind]);
        bytes.extend([0x0a, piece.len() as u8]);
        bytes.extend(piece);
    };
    push("<unk>", 0.0, 2);
    for i in 0..32_768u32 {
        // All words of up to 15 letters out of a and b, by their binary digits.
        let word: String = format!("{:b}", i + 2).chars().skip(1).map(|c| if c == '0' { 'a' } else { 'b' }).collect();
        push(&word, -(i as f32), 1);
    }
    bytes.extend([0x12, 2, 0x18, 2, 0x12, 3, 0xc8, 0x02, 0]); // trainer_spec: model_type BPE; bos_id 0
    let start = std::time::Instant::now();
    let json = from_sentencepiece(&bytes).unwrap();
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    assert!(json["model"]["merges"].as_array().unwrap().len() > 200_000);
}

#[test]
fn what_is_not_a_usable_model_is_refused() {
    let piece = b"\x0a\x05\x0a\x03abc".as_slice();
    for (bytes, message) in [
        (b"".as_slice(), "it has no pieces"),
        (b"{\"version\": \"1.0\"}", "not a SentencePiece model"),
        (&[0xff; 16], "a number has more than 64 bits"),
        (&[0x0a, 0x05, 0x0a], "5 bytes are needed, 1 are left"),
        (&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], "bytes are needed"),
        (&[0x0b], "a field has the wire type 3"),
        (&[0x08, 0x01], "pieces has the wrong wire type"),
        (&[0x0a, 0x00], "piece 0 is empty"),
        (&[0x0a, 0x03, 0x0a, 0x01, 0xff], "piece 0 is not UTF-8"),
        (&[piece, &[0x0a, 0x05, 0x0a, 0x01, b'x', 0x18, 0x09]].concat(), "piece 1 has the unknown type 9"),
        (&[piece, &[0x12, 0x02, 0x18, 0x04]].concat(), "its model type is 4 (character)"),
        (&[piece, &[0x12, 0x03, 0xc0, 0x01, 0x01]].concat(), "white space as a suffix"),
        (&[piece, &[0x1a, 0x02, 0x28, 0x00]].concat(), "escape_whitespaces"),
        (&[piece, &[0x12, 0x03, 0xc0, 0x02, 0x07]].concat(), "the unknown token is 7, beyond the 1 pieces"),
        (&[piece, piece, &[0x12, 0x02, 0x18, 0x02]].concat(), "the piece \"abc\" occurs twice, as 0 and 1"),
    ] {
        let error = from_sentencepiece(bytes).unwrap_err().to_string();
        assert!(error.starts_with("tokenizer.model: ") && error.contains(message), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn changed_models_never_panic(
        at in any::<prop::sample::Index>(), value in any::<u8>(), len in any::<prop::sample::Index>()
    ) {
        let mut bytes = model("spm_unigram");
        let at = at.index(bytes.len());
        bytes[at] = value;
        let _ = from_sentencepiece(&bytes);
        bytes.truncate(len.index(bytes.len()));
        let _ = from_sentencepiece(&bytes);
    }
}
