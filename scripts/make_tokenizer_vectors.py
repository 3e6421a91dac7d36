#!/usr/bin/env python3
"""Make the SentencePiece fixtures of converter/tests: tiny trained models and what they encode texts to.

    pip install sentencepiece==0.2.3
    python3 scripts/make_tokenizer_vectors.py converter/tests/data

Writes spm_*.model, each of another kind, and spm_vectors.json, which holds for each of them a list of
[text, ids] as SentencePiece itself encodes. The training text is made here from a seed.
"""
import io, json, os, random, sys, tempfile

import sentencepiece as spm

SEED = 20240229
WORDS = ("the a one small river stone house light garden winter summer story paper window door bread water "
         "walks sings opens closes remembers finds keeps gives takes writes reads under over between because "
         "slowly quietly never always again together 1999 42 7.5 'tis don't naïve café straße <x0A>").split()

SUFFIXES = ["", "", "s", "ed", "ing", "er", "ly", "ness"]

TEXTS = [
    "", "a", " ", "  ", "    ", " a", "  a", "a ", "a  ", "a  b", "a   b    c", " a  b ", "\n", "\n\n", "a\n b", "a \nb", "\t",
    "a\tb", " \n ", "\r\n\r\n  x", "  \n  \n", "Once upon a time", "the river remembers the stone", "theriver", "THE RIVER",
    "1234567890 3.14", "3 + 4 = 7", "don't I'll we've", "naïve café straße", "日本語のテキスト", "中文 字符", "🙂", "🙂🙂 👨‍👩‍👧‍👦",
    "e\u0301", "ﬁ ﬂ", "\u200b", "\u00a0x", "a\u00a0b", "▁", "▁a", "a▁", "▁▁", "\x01\x7f", "\u2028", "<0x41>", "<0x0A>", "<s", "</s",
    "x" * 50, " " * 17 + "y", "a" * 33, "eee eeee eeeee", "if (x == 1) {\n    return y;\n}\n", "\ufffd", "𝒳𝒴", "ßßß", "½ ①",
    "the  garden \n  opens\tslowly", "between\u3000words",
]


def corpus():
    rng = random.Random(SEED)
    word = lambda: rng.choice(WORDS) + rng.choice(SUFFIXES)
    return [" ".join(word() for _ in range(rng.randrange(3, 12))) + rng.choice([".", "!", "?", ""]) for _ in range(400)]


def train(**settings):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, num_threads=1, minloglevel=2, character_coverage=1.0,
        **settings)
    return model.getvalue()


def fuzz():
    rng = random.Random(SEED + 1)
    alphabets = ["aeeehiorst     \n", "ae=-/0*<>\n\t▁é🙂日x  "]
    return ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40))) for alphabet in alphabets for _ in range(60)]


def main():
    out = os.path.abspath(sys.argv[1])
    os.makedirs(out, exist_ok=True)
    os.chdir(tempfile.mkdtemp())  # the path of the rules becomes part of the model
    rules = "rules.tsv"
    with open(rules, "w") as f:  # tab and ideographic space to space, the ligature and one-half spelled out
        f.write("9\t20\n3000\t20\nFB01\t66 69\nBD\t31 2F 32\n65 301\tE9\n")
    llama = dict(model_type="bpe", byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
                 normalization_rule_name="identity")
    models = {
        "spm_bpe": train(vocab_size=400, remove_extra_whitespaces=False, **llama),
        "spm_bpe_trim": train(vocab_size=380, remove_extra_whitespaces=True, **llama),
        "spm_unigram": train(vocab_size=130, model_type="unigram", normalization_rule_tsv=rules),
        "spm_unigram_bytes": train(vocab_size=390, model_type="unigram", byte_fallback=True,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False),
    }
    vectors = {"command": "scripts/make_tokenizer_vectors.py", "versions": {"sentencepiece": spm.__version__},
               "seed": SEED, "models": {}}
    for name, model in models.items():
        with open(os.path.join(out, name + ".model"), "wb") as f:
            f.write(model)
        processor = spm.SentencePieceProcessor(model_proto=model)
        vectors["models"][name] = [[text, processor.encode(text)] for text in TEXTS + fuzz()]
    with open(os.path.join(out, "spm_vectors.json"), "w") as f:
        f.write("{\n")
        for key in ("command", "versions", "seed"):
            f.write("%s: %s,\n" % (json.dumps(key), json.dumps(vectors[key])))
        f.write('"models": {\n')
        f.write(",\n".join("%s: [\n%s\n]" % (json.dumps(name), ",\n".join(json.dumps(case) for case in cases))
                           for name, cases in vectors["models"].items()))
        f.write("\n}\n}\n")


if __name__ == "__main__":
    main()
