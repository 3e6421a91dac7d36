#!/usr/bin/env python3
"""Write what transformers makes of conversations and texts, which the tests of `src/text` hold ours to.

    python3 scripts/make_chat_goldens.py [--out tests/data/chat] [--python PY]
    python3 scripts/make_chat_goldens.py --check FOLDER [--python PY]

The first reads `templates/*.jinja` under --out and writes beside it
  goldens.json        every template with every conversation: the prompt, or the error
  tokenizers/*/       two small tokenizers, one with byte tokens as SentencePiece has and one over bytes as GPT-2 has,
                      under several tokenizer_config.json
  tokenizers.json     ids of texts and texts of ids for each of them

The second renders every *.jinja of FOLDER with transformers and with ours (through cargo test) and names each prompt that
differs; what transformers itself fails on has no right answer and is left out. It is for the templates of models, which
are not ours to keep here. Many are in one package:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz --wildcards '*/models/templates/*.jinja'
    python3 scripts/make_chat_goldens.py --check llama_cpp_python-0.3.36/vendor/llama.cpp/models/templates

All of its 70 are equal but meetkai-functionary-medium-v3.1 with tools, where HTML escapes follow from a `safe` filter.

Needs python >= 3.10 with venv and pip. The pinned packages below are installed once into a virtual environment in the
cache folder (XDG_CACHE_HOME or ~/.cache, then xllama/venvs; 250 MB, no torch). `--python PY` uses an interpreter that
has them already. The same command writes the same bytes.
"""
import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

PINS = ["transformers==5.23.0", "tokenizers==0.23.3", "jinja2==3.1.6"]
NOW = datetime.datetime(2024, 7, 9, 15, 4, 5)

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CALL = {"id": "call00001", "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Malmö", "days": 2, "units": ["C", None], "exact": True}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The <b>weather</b> of a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
CONVERSATIONS = {
    "one question": [{"role": "user", "content": "Is 1 < 2 & \"3\" > '2'? é 🙂"}],
    "with a system text": [{"role": "system", "content": "  Be brief. "}, {"role": "user", "content": " Hi\n"}],
    "several turns": [{"role": "system", "content": "Be brief. /no_think"}, {"role": "user", "content": "a"},
                      {"role": "assistant", "content": "<think>\nb first\n</think>\n\nb"}, {"role": "user", "content": "c"},
                      {"role": "assistant", "content": "\n<think>\nthen d\n</think>\n\nd"}],
    "reasoning apart": [{"role": "user", "content": "q"},
                        {"role": "assistant", "reasoning": "because", "content": "a", "tool_calls": None}],
    "out of turn": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "assistant first": [{"role": "assistant", "content": "a"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": " look "}, {"type": "image"},
                                           {"type": "text", "text": "well"}]}],
    "tool call": [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
                  {"role": "tool", "content": "{\"t\": 21}"}, {"role": "tool", "content": "sunny"},
                  {"role": "assistant", "content": "21 and sunny"}],
}
MADE_BY = {"made_by": "scripts/make_chat_goldens.py", "packages": PINS}
HEAD = MADE_BY | {"now": NOW.isoformat(), "special_tokens": SPECIAL_TOKENS, "conversations": CONVERSATIONS}
# What a template is rendered with; the rest renders with the first of these.
VARIABLES = [{}, {"enable_thinking": False, "refuse_system": True}, {"tools": TOOLS, "date": "1 May 2023"}]

# ------------------------------------------------------------------------------------- any python3: get the packages


def environment():
    """The interpreter of a virtual environment that holds PINS; made on the first call."""
    import fcntl

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xllama" / "venvs"
    venv = cache / ("chat-" + hashlib.sha256("\n".join(PINS).encode()).hexdigest()[:12])
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python, complete = venv / "bin" / "python", venv / "complete"
        if not complete.exists():
            print(f"installing {' '.join(PINS)} into {venv} (once)", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
            subprocess.run([python, "-m", "pip", "install", "--disable-pip-version-check", *PINS], check=True,
                           stdout=sys.stderr)
            complete.touch()
    return python


def have_pins():
    from importlib.metadata import PackageNotFoundError, version

    try:
        return all(version(pin.split("==")[0]) == pin.split("==")[1] for pin in PINS)
    except PackageNotFoundError:
        return False


# ----------------------------------------------------------------------------------------------- templates


def render_all(templates):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    chat_template_utils.datetime = Clock
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS.values())}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), **SPECIAL_TOKENS)

    cases = []
    for template in templates:
        source = template.read_text(encoding="utf-8")
        names = set(VARIABLES[1]) | set(VARIABLES[2])
        for conversation, messages in CONVERSATIONS.items():
            for variables in VARIABLES:
                used = {name: value for name, value in variables.items() if name in source and name in names}
                if variables and not used:
                    continue
                for add_generation_prompt in [True, False] if "add_generation_prompt" in source else [False]:
                    case = {"template": template.name, "conversation": conversation, "variables": used,
                            "add_generation_prompt": add_generation_prompt}
                    try:
                        case["prompt"] = tokenizer.apply_chat_template(
                            messages, chat_template=source, tokenize=False,
                            add_generation_prompt=add_generation_prompt, **used)
                    except Exception as error:  # whatever the template ends in is the golden
                        kind = "refused" if type(error).__name__ == "TemplateError" else "failed"
                        case[kind] = str(error)
                    cases.append(case)
    return cases


# ----------------------------------------------------------------------------------------------- tokenizers

SENTENCES = ["once upon a time there was a little girl named Lily", "she loved to play outside in the park",
             "one day she saw a big red ball", "I'm sure they'll say it wasn't 12 or 345", "the cat sat on the mat"]
TEXTS = ["", "once upon a time", " once  upon\n a time ", "<s>play</s> the ball", "héllo 🙂👩‍👧 日本", "\n\n\tshe 12345!",
         "a<|turn|>b <mask> c", "I'm THE cat's", "▁▁ x", "<0x41>", "Ġx", "  a  \n  b  \n"]


def base_tokenizers():
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    bos_first = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])

    spaces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces.normalizer = normalizers.Sequence([
        normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    spaces.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 90, special_tokens=special + byte_tokens, show_progress=False))
    file = json.loads(spaces.to_str())
    file["added_tokens"] = file["added_tokens"][:len(special)]
    spaces = Tokenizer.from_str(json.dumps(file))
    spaces.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spaces.post_processor = bos_first

    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bytes_.decoder = decoders.ByteLevel()
    bytes_.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 60, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bytes_.post_processor = bos_first
    return {"byte_tokens": spaces, "byte_level": bytes_}


def token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True} | flags


# name -> (which base, tokenizer_config.json, change to tokenizer.json, other files)
def variants():
    plain = dict(SPECIAL_TOKENS)
    llama = plain | {"tokenizer_class": "LlamaTokenizerFast"}
    no_processor = {"post_processor": None}
    cut = {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}
    decoder = {str(i): token(t) for i, t in enumerate(["<unk>", "<s>", "</s>"])}
    return {
        "byte tokens": ("byte_tokens", plain, {}, {}),
        "byte level": ("byte_level", plain, {}, {}),
        "no config": ("byte_level", None, {}, {}),
        "add_bos_token is ignored beside a tokenizer.json": ("byte_tokens", plain | {"add_bos_token": True}, no_processor, {}),
        "add_bos_token false too": ("byte_tokens", plain | {"add_bos_token": False}, {}, {}),
        "truncation is the caller's": ("byte_level", plain, cut, {}),
        "LlamaTokenizer": ("byte_tokens", llama, {}, {}),
        "LlamaTokenizer, legacy": ("byte_tokens", llama | {"legacy": True}, {}, {}),
        "LlamaTokenizer, no prefix space": ("byte_tokens", llama | {"add_prefix_space": False}, no_processor, {}),
        "LlamaTokenizer in name only": ("byte_level", llama, {}, {}),
        "LlamaTokenizer of another model": ("byte_tokens", llama, {}, {"config.json": {"model_type": "phi3"}}),
        "tokens not in the vocabulary": ("byte_level", plain | {
            "pad_token": "<pad>", "image_token": "<image>", "additional_special_tokens": ["<|turn|>"]}, {}, {}),
        "named extra tokens": ("byte_level", plain | {
            "extra_special_tokens": {"turn_token": "<|turn|>"},
            "pad_token": token("<mask>", lstrip=True) | {"__type": "AddedToken"}}, {}, {}),
        "added_tokens_decoder": ("byte_tokens", plain | {"pad_token": "</s>", "added_tokens_decoder": decoder | {
            "349": token("<|turn|>"), "350": token("<mask>", special=False, rstrip=True)}}, {}, {}),
        "special_tokens_map.json": ("byte_tokens", {}, {}, {"special_tokens_map.json": {
            "bos_token": token("<s>"), "eos_token": "</s>", "pad_token": "</s>"}}),
        "a common token as eos": ("byte_level", plain | {"eos_token": "Ġthe"}, {}, {}),
        "special tokens as text": ("byte_level", plain | {"split_special_tokens": True}, {}, {}),
    }


def tokenize_all(out):
    import tempfile

    from transformers import AutoTokenizer

    shutil.rmtree(out / "tokenizers", ignore_errors=True)
    bases = {name: tokenizer.to_str() for name, tokenizer in base_tokenizers().items()}
    for name, file in bases.items():
        (out / "tokenizers").mkdir(exist_ok=True)
        (out / "tokenizers" / f"{name}.json").write_text(file + "\n", encoding="utf-8")

    rng = random.Random(7)
    cases = []
    for name, (base, config, change, files) in variants().items():
        with tempfile.TemporaryDirectory() as folder:
            files = {"config.json": {"model_type": "llama"}} | files | {"tokenizer.json": json.loads(bases[base]) | change}
            files |= {} if config is None else {"tokenizer_config.json": config}
            for file, content in files.items():
                Path(folder, file).write_text(json.dumps(content), encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [[rng.randrange(len(tokenizer)) for _ in range(rng.randrange(12))] for _ in range(6)]
        del files["tokenizer.json"]
        cases.append({
            "name": name, "base": base, "change": change, "files": files,
            "vocab_size": len(tokenizer), "special_tokens": tokenizer.special_tokens_map,
            "bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
            "texts": [{"text": text, "ids": tokenizer(text)["input_ids"],
                       "plain": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in TEXTS],
            "ids": [{"ids": each, "text": tokenizer.decode(each),
                     "skipped": tokenizer.decode(each, skip_special_tokens=True)} for each in ids],
        })
    return cases


def write(path, head, key, cases):
    """One case on a line, so that a change shows."""
    body = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in cases)
    fields = "".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)},\n" for k, v in head.items())
    path.write_text(f"{{\n{fields} {json.dumps(key)}: [\n{body}\n ]\n}}\n", encoding="utf-8")
    print(f"{path}: {len(cases)} {key}, {path.stat().st_size} bytes")


def check(folder):
    """The exit status of the test that renders the templates of `folder`."""
    import tempfile

    templates = sorted(folder.glob("*.jinja"))
    if not templates:
        sys.exit(f"error: {folder} has no *.jinja")
    with tempfile.TemporaryDirectory() as data:
        Path(data, "templates").symlink_to(folder.resolve())
        cases = [case for case in render_all(templates) if "failed" not in case]
        write(Path(data, "goldens.json"), HEAD, "cases", cases)
        command = ["cargo", "test", "--lib", "prompts_of_a_folder", "--", "--ignored", "--nocapture"]
        environ = os.environ | {"XLLAMA_CHAT_DATA": data}
        return subprocess.run(command, cwd=Path(__file__).parents[1], env=environ).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tests/data/chat", metavar="DIR", type=Path)
    parser.add_argument("--check", metavar="FOLDER", type=Path, help="compare the templates of FOLDER, write nothing")
    parser.add_argument("--python", metavar="PY", help="an interpreter that has the pinned packages")
    arguments = parser.parse_args()
    if arguments.python or not have_pins():
        if os.environ.get("XLLAMA_CHAT_GOLDENS"):
            sys.exit(f"error: {sys.executable} does not have {' '.join(PINS)}")
        python = arguments.python or environment()
        command = [python, __file__, "--out", arguments.out]
        command += ["--check", arguments.check] if arguments.check else []
        sys.exit(subprocess.run(command, env=os.environ | {"XLLAMA_CHAT_GOLDENS": "1"}).returncode)

    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.check:
        sys.exit(check(arguments.check))
    templates = sorted((arguments.out / "templates").glob("*.jinja"))
    write(arguments.out / "goldens.json", HEAD, "cases", render_all(templates))
    write(arguments.out / "tokenizers.json", MADE_BY, "cases", tokenize_all(arguments.out))


if __name__ == "__main__":
    main()
