#!/usr/bin/env python3
"""Make the vectors of training: what PyTorch's autograd gives in float64 for the small checkpoints of golden/.

    python3 scripts/make_training_vectors.py tests/data [--only gradients|lora|steps] [--cases NAME ...]
    python3 scripts/make_training_vectors.py tests/data --model smollm2-135m-hf --name smollm2-135m

Writes three files, or with --model an entry of a fourth. In them a tensor is its norm and its products with 8 vectors of signs, from which the norm of a
difference can be estimated (Achlioptas 2003, "Database-friendly random projections").

training.json: for each case the batch, the losses, and the gradient of each tensor of the checkpoint.
training/lora.json: the losses and gradients of the same batches with low-rank adapters (Hu et al. 2021; names as in
peft) on the projections of attention, dense feed-forwards and shared experts, the checkpoint itself frozen.
training/steps.json: twenty steps of AdamW on some of the cases, and where the tensors are after them. "+lora" trains
adapters instead; "+accumulate" has two microbatches a step.
training/models.json: as training.json, of the goldens of real checkpoints, which `xllama export-hf` writes in Hugging
Face form.

It runs in the environment of make_golden.py.
"""
import argparse, json, os, sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_golden

ROOT = Path(__file__).resolve().parent.parent
SKETCHES = 8
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3}
EXPERT_OPTIONS = {"load_balancing": 0.02, "router_z_loss": 1e-3}

RANK, ALPHA = 4, 6
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

STEPS = 20
OPTIMIZER = {"name": "adamw", "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}
SCHEDULE = {"peak": 3e-3, "warmup": 5, "decay": {"kind": "cosine", "steps": STEPS, "final_fraction": 0.1}}
CLIP = 1.0
LEAST_GAP = 1e-5  # of experts: where they are nearly as good as each other, another rounding takes other ones
STEP_CASES = {
    "gqa2": ("", "+lora", "+accumulate"),  # grouped heads, larger than hidden / heads
    "gqa3-linear-tied": ("", "+lora"),
    "gemma2": ("",),  # windows, softcaps, norms of what a block adds
    "qwen2-window": ("",),  # biases; in qwen2, rounding to float32 moves those of keys 14 times as much
    "qwen3": ("",),  # norms of queries and keys
    "mixtral-5x3": ("",),  # of the mixtures, the one whose experts remain furthest apart
}


def split_mix(seed, n):
    """SplitMix64's outputs for seed · 2³² + 1, 2, …, n."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = (np.uint64(seed << 32) + np.arange(1, n + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def signs(seed, n):
    """+1 and −1 by the top bit."""
    import numpy as np

    return 1.0 - 2.0 * (split_mix(seed, n) >> np.uint64(63)).astype(np.float64)


def small_values(seed, n):
    """Between −0.1 and 0.1 by the top 53 bits, and rounded to float32, which is where the other side starts."""
    import numpy as np

    u = (split_mix(seed, n) >> np.uint64(11)).astype(np.float64) / 2**53
    return (0.1 * (2 * u - 1)).astype(np.float32)


def short(x, digits=9):
    return float(f"{x:.{digits}g}")


def norm(x):
    return short((x * x).sum().item() ** 0.5)


def sketch(x):
    x = x.detach().double().flatten().numpy()
    return {"norm": norm(x), "sketch": [short((x * signs(k, x.size)).sum()) for k in range(SKETCHES)]}


def router_losses(logits, cfg, options):
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(cfg, "num_local_experts", None) or cfg.num_experts
    flat = torch.cat([x.reshape(-1, experts) for x in logits])
    z = flat.logsumexp(-1).square().mean()
    balance = load_balancing_loss_func(tuple(x.reshape(-1, experts) for x in logits), experts, cfg.num_experts_per_tok)
    return options["load_balancing"] * balance + options["router_z_loss"] * z


def rows_of(tokens, vocab, pad):
    """Two texts. PyTorch's embedding keeps the gradient from a row of padding, so there is none."""
    rows = [tokens, [(3 * t + 1) % vocab for t in reversed(tokens)]]
    return [[t if t != pad else (pad or 0) + 1 for t in row] for row in rows]


def targets_of(rows):
    """The next tokens, of which every fifth does not count."""
    return [[t if i % 5 != 2 else -100 for i, t in enumerate(row[1:])] + [-100] for row in rows]


def rotated(rows, places):
    assert all(0 <= places < len(row) for row in rows), places
    return [row[places:] + row[:places] for row in rows]


class Case:
    """A checkpoint in float64, its batch and its losses."""

    def __init__(self, folder, golden):
        import numpy as np

        self.folder, self.model = folder, make_golden.load(folder, "float64", "eager")
        self.model.requires_grad_(True)
        self.cfg = self.model.config
        tokens = np.load(golden / "golden.npz")["tokens"].tolist()
        self.rows = rows_of(tokens, self.cfg.vocab_size, self.cfg.pad_token_id)
        self.targets = targets_of(self.rows)
        make_golden.settle_frequencies(self.model, len(tokens))
        self.has_routers = self.cfg.model_type in ("mixtral", "qwen2_moe", "qwen3_moe")
        self.options = OPTIONS | (EXPERT_OPTIONS if self.has_routers else {})

    def backward(self, rows, targets):
        """Adds to the gradients. The loss, its cross-entropy, and by how much the routers chose their experts."""
        import torch
        import torch.nn.functional as F

        cfg, options = self.cfg, self.options
        with make_golden.exactly(self.model) as mode, torch.enable_grad():
            more = {"output_router_logits": True} if self.has_routers else {}
            out = self.model(input_ids=torch.tensor(rows), use_cache=False, **more)
            logits, ids = out.logits.reshape(-1, cfg.vocab_size), torch.tensor(targets).reshape(-1)
            assert logits.dtype == torch.float64, logits.dtype
            own = F.cross_entropy(logits, ids, ignore_index=-100)
            loss = F.cross_entropy(logits, ids, ignore_index=-100, label_smoothing=options["label_smoothing"])
            loss = loss + options["z_loss"] * logits.logsumexp(-1)[ids >= 0].square().mean()
            if self.has_routers:
                loss = loss + router_losses(out.router_logits, cfg, options)
            loss.backward()
        return loss.item(), own.item(), mode.router_gap

    def start(self):
        """The tensors of the checkpoint."""
        from safetensors.torch import load_file

        return {name: x for file in self.folder.glob("*.safetensors") for name, x in load_file(file).items()}

    def tensors(self):
        """Those of the model now, in the names and shapes of the checkpoint, whatever transformers makes of them."""
        from safetensors.torch import load_file

        found = {}
        with tempfile.TemporaryDirectory() as temp:
            self.model.save_pretrained(temp)
            for file in sorted(Path(temp).glob("*.safetensors")):
                found |= load_file(file)
        return dict(sorted(found.items()))


def gradients(case, *_):
    import torch

    loss, own, _ = case.backward(case.rows, case.targets)
    for parameter in case.model.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter.data)
    for buffer in case.model.buffers():  # what is saved with the parameters is none, and has no gradient
        buffer.zero_()
    entry = {"options": case.options, "tokens": case.rows, "targets": case.targets}
    entry |= {"loss": loss, "cross_entropy": own}
    return entry | {"gradients": {name: sketch(x) for name, x in case.tensors().items()}}


def adapted_parts(path, module, cfg):
    """The projections in a Linear, as (path, rows): one, or in Phi-3 several."""
    above, _, leaf = path.rpartition(".")
    if leaf == "qkv_proj":
        heads = zip("qkv", (cfg.num_attention_heads, cfg.num_key_value_heads, cfg.num_key_value_heads))
        parts = [(f"{above}.{name}_proj", n * make_golden.head_dim(cfg)) for name, n in heads]
    elif leaf == "gate_up_proj":
        parts = [(f"{above}.{name}", module.out_features // 2) for name in ("gate_proj", "up_proj")]
    else:
        parts = [(path, module.out_features)] if leaf in ADAPTED else []
    assert not parts or sum(rows for _, rows in parts) == module.out_features, path
    return parts


def add_adapters(case):
    """Freezes the checkpoint and puts adapters beside its projections: y = W x + b + (alpha / rank) B (A x). Neither A
    nor B is zero, so that all gradients count."""
    import torch
    import torch.nn.functional as F

    case.model.requires_grad_(False)
    linears, shapes, tensors = {}, {}, case.start()
    for path, module in case.model.named_modules():
        if not isinstance(module, torch.nn.Linear) or ".experts." in path:
            continue
        parts = adapted_parts(path, module, case.cfg)
        if parts:
            assert tuple(tensors[f"{path}.weight"].shape) == (module.out_features, module.in_features), path
            linears[module] = [f"base_model.model.{part}" for part, _ in parts]
        for part, rows in parts:
            shapes[f"base_model.model.{part}.lora_A.weight"] = (RANK, module.in_features)
            shapes[f"base_model.model.{part}.lora_B.weight"] = (rows, RANK)
    adapters = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        values = torch.from_numpy(small_values(1000 + i, shape[0] * shape[1])).double()
        adapters[name] = values.reshape(shape).requires_grad_()

    def hook(module, inputs, output):
        paths = [(adapters[f"{path}.lora_A.weight"], adapters[f"{path}.lora_B.weight"]) for path in linears[module]]
        return output + ALPHA / RANK * torch.cat([F.linear(F.linear(inputs[0], a), b) for a, b in paths], -1)

    for module in linears:
        module.register_forward_hook(hook)
    return adapters


def lora(case, known, _):
    adapters = add_adapters(case)
    loss, own, gap = case.backward(case.rows, case.targets)
    assert gap >= LEAST_GAP, gap
    assert abs(loss - known["loss"]) > 1e-3, (loss, known["loss"])
    assert all(parameter.grad is None for parameter in case.model.parameters())
    zero = [name for name, x in adapters.items() if not x.grad.count_nonzero()]
    assert not zero, zero
    return {"loss": loss, "cross_entropy": own, "gradients": {name: sketch(x.grad) for name, x in adapters.items()}}


def steps(case, known, variant):
    """Every step has the rows rotated further; "+accumulate" has them twice, the second time by one place more."""
    import torch
    from make_optimizer_vectors import hold_to_torch, optimizer_of, rate

    hold_to_torch(SCHEDULE)
    if variant == "+lora":
        weights = add_adapters(case)
        start = {name: x.detach().clone() for name, x in weights.items()}
    else:
        weights = dict(case.model.named_parameters())  # a tied one is there once
        start = case.start()
    decays = [(on, [x for x in weights.values() if (x.dim() >= 2) == on]) for on in (True, False)]
    optimizer = optimizer_of(OPTIMIZER, decays)
    microbatches = 2 if variant == "+accumulate" else 1
    entry = {"losses": [], "cross_entropies": [], "norms": [], "rates": []}
    for step in range(STEPS):
        rows = sum((rotated(case.rows, 3 * step + m) for m in range(microbatches)), [])
        optimizer.zero_grad()
        loss, own, gap = case.backward(rows, targets_of(rows))
        assert gap >= LEAST_GAP, gap
        assert variant or step or abs(loss - known["loss"]) <= 1e-12 * loss, (loss, known["loss"])
        for group in optimizer.param_groups:
            group["lr"] = rate(SCHEDULE, step)
        before = torch.nn.utils.clip_grad_norm_(weights.values(), CLIP).item()
        optimizer.step()
        for values, x in zip(entry.values(), (loss, own, before, rate(SCHEDULE, step)), strict=True):
            values.append(short(x, 12))
    assert entry["losses"][0] > entry["losses"][-1], entry["losses"]
    final = {name: x.detach() for name, x in weights.items()} if variant == "+lora" else case.tensors()
    assert final.keys() == start.keys(), final.keys() ^ start.keys()
    assert all(x.dtype == torch.float64 and x.shape == start[name].shape for name, x in final.items())
    moved = {name: norm(x - start[name].double()) for name, x in final.items()}
    return entry | {"parameters": {name: sketch(x) | {"moved": moved[name]} for name, x in final.items()}}


def read(path):
    return json.loads(path.read_text())["cases"]


def write(path, head, entries):
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
    path.write_text(f'{json.dumps(head)[:-1]}, "cases": {{\n{text}\n}}}}\n')


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("out", type=Path)
    ap.add_argument("--cases", nargs="+", default=None)
    ap.add_argument("--only", choices=["gradients", "lora", "steps"], default=None)
    ap.add_argument("--model", type=Path, metavar="FOLDER", help="a real checkpoint")
    ap.add_argument("--name", help="the golden of --model")
    args = ap.parse_args()
    if (args.model is None) != (args.name is None) or (args.model and (args.cases or args.only)):
        ap.error("--model FOLDER and --name NAME go together, without --cases and --only")
    if os.environ.get("XLLAMA_GOLDEN_STAGE") != "run":
        python = make_golden.environment()
        env = dict(os.environ, XLLAMA_GOLDEN_STAGE="run", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        os.execve(python, [str(python), *sys.argv], env)
    import torch
    import transformers

    folders = {folder.parent.name: folder for folder in sorted((ROOT / "golden").glob("*/model"))}
    if args.cases:
        folders = {name: folder for name, folder in folders.items() if name in args.cases}
    versions = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    adapters = {"rank": RANK, "alpha": ALPHA}
    trained = {"optimizer": OPTIMIZER, "schedule": SCHEDULE, "clip": CLIP}
    batches, beside = args.out / "training.json", args.out / "training"

    if args.model:
        path = beside / "models.json"
        entry = gradients(Case(args.model, ROOT / "golden" / args.name))
        print(f"gradients {args.name}: loss {entry['loss']:.6f}")
        write(path, versions, (read(path) if path.exists() else {}) | {args.name: entry})
        return

    def make(kind, path, head, variants, make_one):
        if args.only not in (None, kind):
            return
        known = {} if kind == "gradients" else read(batches)
        entries = read(path) if args.cases and path.exists() else {}
        for name, folder in folders.items():
            for variant in variants.get(name, ()):
                case = Case(folder, folder.parent)
                if known:  # the batch is in no other file
                    found = [known[name][key] for key in ("options", "tokens", "targets")]
                    assert found == [case.options, case.rows, case.targets], name
                entry = entries[name + variant] = make_one(case, known.get(name), variant)
                losses = [f"{x:.6f}" for x in entry.get("losses", [entry.get("loss")])]
                print(f"{kind} {name}{variant}: loss", *losses[:: STEPS - 1], flush=True)
        path.parent.mkdir(exist_ok=True)
        write(path, versions | head, entries)

    every = dict.fromkeys(folders, ("",))
    make("gradients", batches, {}, every, gradients)
    make("lora", beside / "lora.json", adapters, every, lora)
    make("steps", beside / "steps.json", adapters | trained, STEP_CASES, steps)

if __name__ == "__main__":
    main()
