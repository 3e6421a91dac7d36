#!/usr/bin/env python3
"""Make the vectors of training: what PyTorch's autograd gives in float64 for the small checkpoints of golden/.

    python3 scripts/make_training_vectors.py tests/data [--cases NAME ...]

Writes training.json: for each case the batch, the losses, and of the gradient of each tensor of the checkpoint its norm and
its products with 8 vectors of signs, from which the norm of a difference can be estimated (Achlioptas 2003,
"Database-friendly random projections"). It runs in the environment of make_golden.py.
"""
import argparse, json, os, sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_golden

ROOT = Path(__file__).resolve().parent.parent
SKETCHES = 8
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3}
EXPERT_OPTIONS = {"load_balancing": 0.02, "router_z_loss": 1e-3}


def signs(seed, n):
    """+1 and −1 by the top bit of SplitMix64's output for seed · 2³² + 1, 2, …, n."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = (np.uint64(seed << 32) + np.arange(1, n + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return 1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float64)


def router_losses(logits, cfg, options):
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(cfg, "num_local_experts", None) or cfg.num_experts
    flat = torch.cat([x.reshape(-1, experts) for x in logits])
    z = flat.logsumexp(-1).square().mean()
    balance = load_balancing_loss_func(tuple(x.reshape(-1, experts) for x in logits), experts, cfg.num_experts_per_tok)
    return options["load_balancing"] * balance + options["router_z_loss"] * z


def batch_of(tokens, vocab, pad):
    """Two texts, and targets of which every fifth does not count. PyTorch's embedding keeps the gradient from a row of padding,
    so there is none."""
    rows = [tokens, [(3 * t + 1) % vocab for t in reversed(tokens)]]
    rows = [[t if t != pad else (pad or 0) + 1 for t in row] for row in rows]
    targets = [[t if i % 5 != 2 else -100 for i, t in enumerate(row[1:])] + [-100] for row in rows]
    return rows, targets


def gradients(folder, tokens):
    import torch
    import torch.nn.functional as F
    from safetensors.torch import load_file

    model = make_golden.load(folder, "float64", "eager")
    cfg = model.config
    rows, targets = batch_of(tokens, cfg.vocab_size, cfg.pad_token_id)
    make_golden.settle_frequencies(model, len(tokens))
    options = dict(OPTIONS)
    has_routers = cfg.model_type in ("mixtral", "qwen2_moe", "qwen3_moe")
    if has_routers:
        options |= EXPERT_OPTIONS
    with make_golden.exactly(model), torch.enable_grad():
        model.requires_grad_(True)
        more = {"output_router_logits": True} if has_routers else {}
        out = model(input_ids=torch.tensor(rows), use_cache=False, **more)
        logits, ids = out.logits.reshape(-1, cfg.vocab_size), torch.tensor(targets).reshape(-1)
        assert logits.dtype == torch.float64, logits.dtype
        own = F.cross_entropy(logits, ids, ignore_index=-100)
        loss = F.cross_entropy(logits, ids, ignore_index=-100, label_smoothing=options["label_smoothing"])
        loss = loss + options["z_loss"] * logits.logsumexp(-1)[ids >= 0].square().mean()
        if has_routers:
            loss = loss + router_losses(out.router_logits, cfg, options)
        loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter.data)
    for buffer in model.buffers():  # what is saved with the parameters is none, and has no gradient
        buffer.zero_()
    found = {}
    with tempfile.TemporaryDirectory() as temp:
        # In the names and shapes of the checkpoint, whatever transformers makes of them.
        model.save_pretrained(temp)
        for file in sorted(Path(temp).glob("*.safetensors")):
            found |= load_file(file)
    entry = {"options": options, "tokens": rows, "targets": targets, "loss": loss.item(), "cross_entropy": own.item()}
    entry["gradients"] = {}
    for name, x in sorted(found.items()):
        x = x.double().flatten().numpy()
        sketch = [float(f"{(x * signs(k, x.size)).sum():.9g}") for k in range(SKETCHES)]
        entry["gradients"][name] = {"norm": float(f"{(x * x).sum() ** 0.5:.9g}"), "sketch": sketch}
    return entry


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--cases", nargs="+", default=None)
    args = ap.parse_args()
    if os.environ.get("XLLAMA_GOLDEN_STAGE") != "run":
        python = make_golden.environment()
        env = dict(os.environ, XLLAMA_GOLDEN_STAGE="run", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        os.execve(python, [str(python), *sys.argv], env)
    import numpy as np
    import torch
    import transformers

    path = args.out / "training.json"
    entries = json.loads(path.read_text())["cases"] if args.cases and path.exists() else {}
    for folder in sorted((ROOT / "golden").glob("*/model")):
        name = folder.parent.name
        if args.cases and name not in args.cases:
            continue
        tokens = np.load(folder.parent / "golden.npz")["tokens"].tolist()
        entries[name] = gradients(folder, tokens)
        print(f"{name}: loss {entries[name]['loss']:.6f}", flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
    path.write_text(f'{{"versions": {json.dumps(versions)}, "cases": {{\n{text}\n}}}}\n')


if __name__ == "__main__":
    main()
