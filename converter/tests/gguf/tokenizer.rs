use converter::gguf::GgufFile;
use converter::tokenizer::from_sentencepiece;
use serde_json::{Value as Json, json};
use tokenizers::Tokenizer;

use super::builder::{Builder, V};
use super::data;

/// The file of that name, parsed.
fn part(file: &GgufFile, name: &str) -> Json {
    let files = file.tokenizer_files().unwrap();
    let (_, bytes) = files.iter().find(|(n, _)| n == name).unwrap_or_else(|| panic!("{name} is missing"));
    serde_json::from_slice(bytes).unwrap()
}

fn tokenizer(builder: &Builder) -> Tokenizer {
    part(&builder.open().unwrap(), "tokenizer.json").to_string().parse().unwrap()
}

fn refused(builder: &Builder) -> String {
    builder.open().unwrap().tokenizer_files().unwrap_err().to_string()
}

fn tokens(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    tokenizer.encode(text, true).unwrap().get_tokens().to_vec()
}

/// Byte-level BPE over a few letters: `Ġ` is the space, `Ċ` the newline.
fn gpt2(pre: &'static str) -> Builder {
    let tokens = "<|end|> <|start|> Ġ Ċ a b c A 1 2 3 4 ! ' s \" Ã ©".split(' ');
    let merges = ["a b", "ab c", "Ġ a", "1 2", "12 3", "123 4", "Ġ Ġ", "' s", "! Ċ", "Ã ©", "A b"];
    let merged = merges.iter().map(|merge| merge.replace(' ', ""));
    let tokens: Vec<String> = tokens.map(str::to_owned).chain(merged).chain(["<img>".to_owned()]).collect();
    let kinds = (0..tokens.len() as i32).map(|i| {
        if i < 2 {
            3
        } else if i as usize == tokens.len() - 1 {
            4
        } else {
            1
        }
    });
    Builder::llama()
        .with("tokenizer.ggml.model", V::Str("gpt2"))
        .with("tokenizer.ggml.pre", V::Str(pre))
        .with("tokenizer.ggml.token_type", V::I32s(kinds.collect()))
        .with("tokenizer.ggml.tokens", V::Strs(tokens))
        .with("tokenizer.ggml.merges", V::Strs(merges.map(str::to_owned).to_vec()))
        .with("tokenizer.ggml.bos_token_id", V::U32(1))
        .with("tokenizer.ggml.eos_token_id", V::U32(0))
}

#[test]
fn each_pre_tokenizer_splits_its_own_way() {
    for (pre, text, expected) in [
        ("gpt-2", "1234 abc", "1234 Ġ abc"),
        ("default", "1234", "1234"),
        ("smollm", "1234 abc", "1 2 3 4 Ġ abc"),
        ("starcoder", "12", "1 2"),
        ("llama-bpe", "1234 abc", "<|start|> 123 4 Ġ abc"),
        ("llama3", "a's A'S", "<|start|> a 's Ġ A ' S"),
        ("qwen2", "123 abc", "1 2 3 Ġ abc"),
        ("tekken", "12", "<|start|> 1 2"),
        // Capital and small letters part ways nowhere but here.
        ("tekken", "abA", "<|start|> ab A"),
        ("qwen2", "abAb", "ab Ab"),
        // Llama 3 and its kin take newlines with the punctuation before them, GPT-2 does not.
        ("gpt-2", "!\n", "! Ċ"),
        ("llama-bpe", "!\n", "<|start|> !Ċ"),
        // Spaces before a word: all but the last one stay together.
        ("smollm", "   a", "ĠĠ Ġa"),
        ("llama-bpe", "   a", "<|start|> ĠĠ Ġa"),
    ] {
        let mut expected: Vec<&str> = expected.split(' ').collect();
        // There is no token for this letter, and byte-level BPE without an unknown token leaves it out.
        expected.retain(|token| *token != "S");
        assert_eq!(tokens(&tokenizer(&gpt2(pre)), text), expected, "{pre} {text:?}");
    }
}

#[test]
fn qwen2_composes_characters_first() {
    assert_eq!(tokens(&tokenizer(&gpt2("qwen2")), "e\u{301}"), ["Ã©"]);
    assert_ne!(tokens(&tokenizer(&gpt2("llama3")), "e\u{301}"), ["<|start|>", "Ã©"]);
}

#[test]
fn words_of_the_vocabulary_are_taken_whole_where_merges_are_ignored() {
    // "Ab" is a token and "A b" a merge; without that merge only ignore_merges finds it.
    let without = |pre| gpt2(pre).with("tokenizer.ggml.merges", V::Strs(vec!["a b".to_owned()]));
    assert_eq!(tokens(&tokenizer(&without("llama-bpe")), "Ab"), ["<|start|>", "Ab"]);
    assert_eq!(tokens(&tokenizer(&without("gpt-2")), "Ab"), ["A", "b"]);
}

#[test]
fn special_and_user_defined_tokens_are_recognized_in_text() {
    let tokenizer = tokenizer(&gpt2("smollm"));
    assert_eq!(tokens(&tokenizer, "a<|start|>a<img>a"), ["a", "<|start|>", "a", "<img>", "a"]);
    let ids = tokenizer.encode("a<|start|>a<img>", false).unwrap().get_ids().to_vec();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "aa<img>");
}

#[test]
fn beginning_and_end_as_the_file_says() {
    let both = gpt2("smollm")
        .with("tokenizer.ggml.add_bos_token", V::Bool(true))
        .with("tokenizer.ggml.add_eos_token", V::Bool(true));
    assert_eq!(tokens(&tokenizer(&both), "a"), ["<|start|>", "a", "<|end|>"]);
    let neither = gpt2("llama3").with("tokenizer.ggml.add_bos_token", V::Bool(false));
    assert_eq!(tokens(&tokenizer(&neither), "a"), ["a"]);
    let nameless = both.without("tokenizer.ggml.bos_token_id");
    assert!(refused(&nameless).contains("tokenizer.ggml.bos_token_id: is required and absent"));
}

#[test]
fn the_other_files() {
    let file = gpt2("smollm")
        .with("tokenizer.chat_template", V::Str("{{ messages }}"))
        .with("tokenizer.ggml.padding_token_id", V::U32(0))
        .with("tokenizer.ggml.eot_token_id", V::U32(1))
        .open()
        .unwrap();
    assert_eq!(
        part(&file, "special_tokens_map.json"),
        json!({ "bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|end|>" })
    );
    assert_eq!(
        part(&file, "generation_config.json"),
        json!({ "_from_model_config": true, "bos_token_id": 1, "eos_token_id": [0, 1], "pad_token_id": 0 })
    );
    let config = part(&file, "tokenizer_config.json");
    assert_eq!(config["chat_template"], "{{ messages }}");
    assert_eq!(config["model_max_length"], 128);
    assert_eq!(config["added_tokens_decoder"]["0"]["content"], "<|end|>");
    assert_eq!(config["added_tokens_decoder"].as_object().unwrap().len(), 3);
}

/// The fixture has the vocabulary of spm_bpe.model, whose normalizer is what a GGUF stands for.
#[test]
fn sentencepiece_in_a_gguf_is_the_same_as_in_its_own_file() {
    let file = GgufFile::open(&data("tiny.gguf")).unwrap();
    let model = std::fs::read(data("spm_bpe.model")).unwrap();
    assert_eq!(part(&file, "tokenizer.json"), from_sentencepiece(&model).unwrap());
    let config = part(&file, "tokenizer_config.json");
    assert_eq!(config["add_prefix_space"], true);
    assert_eq!(config["bos_token"], "<s>");
    assert!(config["chat_template"].as_str().unwrap().starts_with("{% for"));
}

/// Gemma's scores do not follow its merges; runs of spaces are stored as they are, and found by merging.
#[test]
fn gemma_pieces_merge_in_their_order() {
    let pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "  ", "ab", "bc", "▁", "a", "b", "c", "\n", "▁▁▁"];
    let gemma = Builder::of("gemma3")
        .with("tokenizer.ggml.model", V::Str("llama"))
        .with("tokenizer.ggml.tokens", V::Strs(pieces.map(str::to_owned).to_vec()))
        .with("tokenizer.ggml.token_type", V::I32s(vec![3, 3, 3, 2, 4, 4, 1, 1, 1, 1, 1, 1, 1, 1]))
        .with("tokenizer.ggml.scores", V::F32s((0..14).map(|i| i as f32).collect()))
        .with("tokenizer.ggml.bos_token_id", V::U32(2))
        .with("tokenizer.ggml.unknown_token_id", V::U32(3))
        .with("tokenizer.ggml.add_space_prefix", V::Bool(false));
    let found = tokenizer(&gemma);
    for (text, expected) in [
        // By score "bc" would come first.
        ("abc", "<bos> ab c"),
        ("    a", "<bos> ▁▁ ▁▁ a"),
        ("   ", "<bos> ▁▁▁"),
        ("\n\n\n", "<bos> \n\n \n"),
    ] {
        assert_eq!(tokens(&found, text), expected.split(' ').collect::<Vec<_>>(), "{text:?}");
    }
    let ids = found.encode("   ab", false).unwrap().get_ids().to_vec();
    assert_eq!(found.decode(&ids, true).unwrap(), "   ab");
    let config = part(&gemma.open().unwrap(), "tokenizer_config.json");
    let added: Vec<&String> = config["added_tokens_decoder"].as_object().unwrap().keys().collect();
    assert_eq!(added, ["0", "1", "2", "3", "4"]);
    assert_eq!(config["add_prefix_space"], false);
}

#[test]
fn bad_tokenizers_are_refused() {
    let replace = |key: &str, value: V| gpt2("smollm").with(key, value);
    let strings = |values: &[&str]| V::Strs(values.iter().map(|v| (*v).to_owned()).collect());
    for (builder, message) in [
        (Builder::llama(), "tokenizer.ggml.tokens: is required and absent"),
        (replace("tokenizer.ggml.model", V::Str("bert")), "is `bert`; supported are `gpt2`"),
        (
            replace("tokenizer.ggml.pre", V::Str("falcon")),
            "tokenizer.ggml.pre: is `falcon`, which is not known; known are gpt-2, default, smollm",
        ),
        (replace("tokenizer.ggml.tokens", V::U32(1)), "must be an array of strings, found 1"),
        (
            replace("tokenizer.ggml.token_type", V::I32s(vec![1])),
            "must have one element for each of the 30 tokens, found 1",
        ),
        (replace("tokenizer.ggml.token_type", V::I32s(vec![7; 30])), "of token 0 is 7; 1 to 6 are defined"),
        (
            replace("tokenizer.ggml.bos_token_id", V::U32(30)),
            "tokenizer.ggml.bos_token_id: is 30, beyond the 30 tokens",
        ),
        (
            replace("tokenizer.ggml.merges", strings(&["ab"])),
            "merge 0 must be two tokens separated by a space, found \"ab\"",
        ),
        (replace("tokenizer.ggml.merges", strings(&["a z"])), "merge 0 is \"a z\", and \"z\" is not a token"),
        (replace("tokenizer.ggml.merges", strings(&["b a"])), "and \"ba\" is not a token"),
        (replace("tokenizer.ggml.model", V::Str("llama")), "tokenizer.ggml.scores: is required and absent"),
        (
            replace("tokenizer.ggml.tokens", strings(&["a", "a"]))
                .with("tokenizer.ggml.token_type", V::I32s(vec![1, 1]))
                .with("tokenizer.ggml.eos_token_id", V::U32(1)),
            "the token \"a\" occurs twice, as 0 and 1",
        ),
    ] {
        let error = refused(&builder);
        assert!(error.starts_with("model.gguf: ") && error.contains(message), "{error}");
    }
}
