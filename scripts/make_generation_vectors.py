#!/usr/bin/env python3
"""Make the vectors of searches and of typical sampling: what transformers and PyTorch choose for small models.

    pip install torch==2.15.0 transformers==5.23.0
    python3 scripts/make_generation_vectors.py tests/data/generation

Writes vectors.json: beams of `generate(num_beams=N)` with their scores; contrastive searches, by equation 5 of Su et
al. (2022) as it stands there (transformers 5 has none), each candidate run over the whole text; and the ids that
`TypicalLogitsWarper` keeps. Models run in float64. A search is stored only if float32 finds the same, so that rounding
decides none of them.
"""
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, TypicalLogitsWarper

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 40
# Name of the golden, length of the prompt: that of the window of 7 is longer than its ring.
MODELS = {"gqa2": 20, "mistral-window7": 50, "qwen3": 45}
BEAMS = [(n, penalty) for n in (2, 4) for penalty in (0.6, 1.0, 2.0)]
CONTRASTIVE = [(4, 0.6), (3, 0.2), (6, 0.9)]


def load(name, dtype):
    return AutoModelForCausalLM.from_pretrained(ROOT / "golden" / name / "model", dtype=dtype).eval()


def beams(model, prompt, n, penalty, early, eos):
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        num_beams=n, num_return_sequences=n, length_penalty=penalty, early_stopping=early, max_new_tokens=NEW_TOKENS,
        eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )
    # A beam of -1 stands where a text had ended.
    lengths = (out.beam_indices >= 0).sum(1).tolist()
    texts = [row[len(prompt):][:length].tolist() for row, length in zip(out.sequences, lengths)]
    return texts, out.sequences_scores.tolist()


def contrastive(model, prompt, k, alpha, eos):
    ids = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        states = model.model(ids).last_hidden_state
        p, best = model.lm_head(states[0, -1]).softmax(-1).topk(k)
        candidates = torch.cat([ids.repeat(k, 1), best[:, None]], 1)
        new = model.model(candidates).last_hidden_state[:, -1]
        similar = torch.cosine_similarity(new[:, None], states[0][None], dim=-1).max(1).values
        chosen = best[((1 - alpha) * p - alpha * similar).argmax()]
        ids = torch.cat([ids, chosen[None, None]], 1)
        if chosen in eos:
            break
    return ids[0, len(prompt):].tolist()


def searches(name, length):
    double, single = load(name, torch.float64), load(name, torch.float32)
    vocab = double.config.vocab_size
    prompt = [(i * 31 + 7) % vocab for i in range(length)]
    found = {"beams": [], "contrastive": []}
    # Ids that the best texts hold in their middle end a text in a second round, and two of them in a third.
    plain = beams(double, prompt, 4, 1.0, False, [2])[0]
    common = [text[len(text) // 3] for text in plain] + [plain[0][len(plain[0]) // 2]]
    ends = [[2], [common[0]], sorted({common[1], common[-1]})]
    for eos in ends:
        for n, penalty in BEAMS:
            for early in (False, True):
                texts, scores = beams(double, prompt, n, penalty, early, eos)
                if beams(single, prompt, n, penalty, early, eos)[0] == texts:
                    case = {"n": n, "length_penalty": penalty, "early_stopping": early, "eos": eos}
                    found["beams"].append(case | {"tokens": texts, "scores": scores})
    for k, alpha in CONTRASTIVE:
        tokens = contrastive(double, prompt, k, alpha, [2])
        for eos in [[2], [tokens[len(tokens) // 2]]]:
            tokens = contrastive(double, prompt, k, alpha, eos)
            if contrastive(single, prompt, k, alpha, eos) == tokens:
                found["contrastive"].append({"k": k, "alpha": alpha, "eos": eos, "tokens": tokens})
    wanted = len(ends) * len(BEAMS) * 2 + len(CONTRASTIVE) * 2
    print(f"{name}: {sum(map(len, found.values()))} of {wanted} searches do not hang on rounding")
    return {"model": name, "prompt": prompt} | found


def typical():
    generator = torch.Generator().manual_seed(11)
    cases = []
    for scale in (0.5, 2.0, 6.0):
        logits = torch.randn(6, 40, generator=generator) * scale
        for mass in (0.05, 0.3, 0.7, 0.95, 0.999):
            kept = TypicalLogitsWarper(mass=mass)(None, logits.double()).isfinite()
            if torch.equal(kept, TypicalLogitsWarper(mass=mass)(None, logits).isfinite()):
                ids = [row.nonzero()[:, 0].tolist() for row in kept]
                cases.append({"logits": [[round(x, 6) for x in row] for row in logits.tolist()], "p": mass, "kept": ids})
    return cases


@torch.inference_mode()
def main():
    vectors = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "searches": [searches(name, length) for name, length in MODELS.items()],
        "typical": typical(),
    }
    path = Path(sys.argv[1]) / "vectors.json"
    path.write_text(json.dumps(vectors, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
