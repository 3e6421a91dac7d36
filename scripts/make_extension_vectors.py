#!/usr/bin/env python3
"""Make the vectors of a larger vocabulary: what PyTorch and transformers make of the same new tokens.

    pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0 sentencepiece==0.2.3 protobuf
    python3 scripts/make_extension_vectors.py converter/tests/data

Writes extension.safetensors: rows in each type with their mean (summed in float64, rounded once), and the logits of
golden/gqa2 past its context with the rotary parameters of transformers' YaRN × 4; and extension.json: for each tokenizer
the ids that transformers gives to texts after `add_tokens`.
"""
import json, shutil, sys, tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS = 33, 20
TOKENS = ["<tool>", {"content": "<call>", "special": True}, "naïve café", "→→", "\n\n\n", "[INST]"]
TEXTS = [
    "", "<tool>", "a<tool>b", "<tool><call> x", "the <call>river</s>", " naïve café ", "naïve cafés", "a→→→b", "\n\n\n\n", "x [INST] y",
    "[INST", "<TOOL>", "<s><tool>", "one two  three", "日本<call>語",
]


def means():
    generator = torch.Generator().manual_seed(7)
    vectors = {}
    for dtype in [torch.float64, torch.float32, torch.bfloat16, torch.float16]:
        name = str(dtype).removeprefix("torch.")
        # float32 values, also in float64: their sums are exact, in whatever order
        rows = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).to(dtype)
        vectors |= {f"{name}.rows": rows, f"{name}.mean": rows.double().mean(0).to(dtype)}
    return vectors


def stretched(positions=300, kept=40):
    """Logits of the last positions of a text that is longer than the model's context of 256."""
    folder = ROOT / "golden/gqa2/model"
    config = AutoConfig.from_pretrained(folder)
    context = config.max_position_embeddings
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": context}
    config.rope_parameters = config.rope_parameters | scaling
    config.max_position_embeddings = 4 * context
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64, attn_implementation="eager")
    tokens = torch.randint(3, config.vocab_size, (1, positions), generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        logits = model(tokens).logits[0, -kept:].float()
    return {"yarn.tokens": tokens[0].to(torch.int32), "yarn.logits": logits.contiguous()}


def extended(tokenizer):
    before = len(tokenizer)
    known = [AddedToken(**({"content": t} if isinstance(t, str) else t), normalized=False) for t in TOKENS]
    assert tokenizer.add_tokens(known) == len(TOKENS)
    content = [token.content for token in known]
    ids = tokenizer.convert_tokens_to_ids(content)
    assert ids == list(range(before, len(tokenizer)))
    encoded = [(text, tokenizer.encode(text)) for text in TEXTS]
    texts = [[text, ids, tokenizer.decode(ids, skip_special_tokens=True)] for text, ids in encoded]
    return {"ids": ids, "texts": texts}


def sentencepiece(data):
    """The tokenizer of a folder with a lone tokenizer.model; transformers 5 has other defaults than 4 had."""
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(data / "spm_bpe.model", Path(folder) / "tokenizer.model")
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return AutoTokenizer.from_pretrained(folder)


def main():
    data = Path(sys.argv[1])
    save_file(means() | stretched(), data / "extension.safetensors")
    (data / "extension.safetensors").chmod(0o644)
    byte_level = PreTrainedTokenizerFast(tokenizer_file=str(ROOT / "tests/data/chat/tokenizers/byte_level.json"))
    tokenizers = {"byte_level": extended(byte_level), "spm_bpe": extended(sentencepiece(data))}
    vectors = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens": TOKENS,
        "tokenizers": tokenizers,
    }
    text = json.dumps(vectors, ensure_ascii=False)
    (data / "extension.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
