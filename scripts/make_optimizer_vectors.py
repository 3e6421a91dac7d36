#!/usr/bin/env python3
"""Make the vectors of optimizers: what PyTorch's optimizers, clipping and learning rates give in float32 on a CPU.

    pip install torch==2.15.0
    python3 scripts/make_optimizer_vectors.py tests/data/training

Writes optimizers.json: "start" and "gradients" (of 20 steps) are what all "runs" share; a run has its rate of each step, the
parameters after each and the state after the last. PyTorch has no Lion: `Lion` is algorithm 2 of Chen et al. (2023).
"clips" are gradients before and after `clip_grad_norm_`. "schedules" are rates by formula in float64; where torch.optim.lr_scheduler
has the schedule, they are held to it. "regression" is a whole training: a linear model, clipping, a schedule, AdamW.
"""
import json
import math
import sys
from pathlib import Path

import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

STEPS = 20
generator = torch.Generator().manual_seed(7)
# Names, shapes and whether weights decay.
PARAMETERS = {"scalar": ([], True), "vector": ([5], False), "matrix": ([2, 3], True), "cube": ([2, 1, 3], True)}


def normal(*shape):
    return torch.randn(shape, generator=generator)


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                m = self.state[w].setdefault("m", torch.zeros_like(w))
                c = beta1 * m + (1 - beta1) * w.grad
                w -= group["lr"] * (torch.sign(c) + group["weight_decay"] * w)
                m.copy_(beta2 * m + (1 - beta2) * w.grad)


def optimizer_of(spec, groups):
    """The optimizer that our JSON names, over groups with and without weight decay."""
    spec = dict(spec)
    name = spec.pop("name")
    decay = spec.pop("weight_decay", 0.01 if name == "adamw" else 0.0)
    groups = [{"params": ws, "weight_decay": decay if on else 0.0} for on, ws in groups if ws]
    if name == "adamw":
        betas = (spec.pop("beta1", 0.9), spec.pop("beta2", 0.999))
        made = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=spec.pop("epsilon", 1e-8))
    elif name == "lion":
        made = Lion(groups, 1.0, (spec.pop("beta1", 0.9), spec.pop("beta2", 0.99)), 0.0)
    else:
        made = torch.optim.SGD(groups, lr=1.0, momentum=spec.pop("momentum", 0.0), nesterov=spec.pop("nesterov", False))
    assert not spec, spec
    return made


def rate(schedule, step):
    """The formula of a schedule."""
    peak, warmup, decay = schedule["peak"], schedule.get("warmup", 0), schedule["decay"]
    if step < warmup:
        return peak * step / warmup
    if decay["kind"] == "constant":
        return peak
    steps = decay["steps"]
    length = decay["decay_steps"] if decay["kind"] == "wsd" else steps - warmup
    left = min(max(steps - step, 0), length) / length
    if decay["kind"] == "cosine":
        left = math.sin(math.pi / 2 * left) ** 2
    return peak * (left + (1 - left) * decay["final_fraction"])


def hold_to_torch(schedule):
    """Runs the schedulers of PyTorch to the last step of a schedule."""
    peak, warmup, decay = schedule["peak"], schedule.get("warmup", 0), schedule["decay"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    parts, milestones = [], []
    if warmup:
        parts.append(LambdaLR(optimizer, lambda step: step / warmup))
        milestones.append(warmup)
    steps = decay.get("steps", warmup + 20)
    if decay["kind"] == "constant":
        parts.append(ConstantLR(optimizer, 1.0))
    elif decay["kind"] == "cosine":
        parts.append(CosineAnnealingLR(optimizer, steps - warmup, eta_min=peak * decay["final_fraction"]))
    else:
        length = decay.get("decay_steps", steps - warmup)
        if length < steps - warmup:
            parts.append(ConstantLR(optimizer, 1.0))
            milestones.append(steps - length)
        parts.append(LinearLR(optimizer, 1.0, decay["final_fraction"], length))
    scheduler = SequentialLR(optimizer, parts, milestones)
    for step in range(steps + 1):
        found, wanted = optimizer.param_groups[0]["lr"], rate(schedule, step)
        assert abs(found - wanted) <= 1e-12 * peak, (schedule, step, found, wanted)
        optimizer.step()
        scheduler.step()


def schedule_case(schedule):
    decay, warmup = schedule["decay"], schedule.get("warmup", 0)
    last = decay.get("steps", warmup + 20)
    if last <= 1000:
        hold_to_torch(schedule)
    steps = set(range(0, last + 1, max(last // 40, 1)))
    for end in (warmup, last - decay.get("decay_steps", 0), last):
        steps.update(range(max(end - 2, 0), end + 3))
    steps = sorted(steps | {last + 17, 10 * last + 1})
    return {"schedule": schedule, "steps": steps, "rates": [rate(schedule, step) for step in steps]}


def short(x):
    """A float32 in as many digits as it needs."""
    return float(f"{x:.9g}")


def values(x):
    return [short(v) for v in x.detach().flatten().tolist()]


def run(spec, rates, start, gradients):
    weights = [w.clone().requires_grad_() for w in start]
    decays = [on for _, on in PARAMETERS.values()]
    groups = [(on, [w for w, d in zip(weights, decays) if d == on]) for on in (True, False)]
    optimizer = optimizer_of(spec, groups)
    after = []
    for lr, step in zip(rates, gradients):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for w, g in zip(weights, step):
            w.grad = g.clone()
        optimizer.step()
        # The test is relative to each value.
        assert all(w.abs().min() > 0.25 for w in weights), spec
        after.append([values(w) for w in weights])
    names = {"exp_avg": "m", "exp_avg_sq": "v", "momentum_buffer": "m", "m": "m"}
    state = [{names[k]: values(v) for k, v in optimizer.state[w].items() if k in names and v is not None} for w in weights]
    return {"optimizer": spec, "rates": [short(lr) for lr in rates], "after": after, "state": state}


def clip(max_norm, gradients):
    weights = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for w, g in zip(weights, gradients):
        w.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(weights, max_norm)
    before = [{"shape": list(g.shape), "values": values(g)} for g in gradients]
    return {"max": max_norm, "gradients": before, "norm": short(norm.item()), "clipped": [values(w.grad) for w in weights]}


def regression():
    """w (4, 3) and b (3): y = x w + b on one batch, mean squared error."""
    x, y = normal(6, 4), normal(6, 3) * 3
    weights = [normal(4, 3), normal(3)]
    start = [values(w) for w in weights]
    weights = [w.requires_grad_() for w in weights]
    spec = {"name": "adamw", "weight_decay": 0.1}
    schedule = {"peak": 0.05, "warmup": 5, "decay": {"kind": "cosine", "steps": STEPS, "final_fraction": 0.1}}
    optimizer = optimizer_of(spec, [(True, weights[:1]), (False, weights[1:])])
    norms, losses, after = [], [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(schedule, step)
        optimizer.zero_grad()
        loss = (x @ weights[0] + weights[1] - y).square().mean()
        loss.backward()
        norms.append(short(torch.nn.utils.clip_grad_norm_(weights, 1.5).item()))
        losses.append(short(loss.item()))
        optimizer.step()
        after.append([values(w) for w in weights])
    assert max(norms) > 1.5 > min(norms), norms
    data = {"x": values(x), "y": values(y), "start": start, "norms": norms, "losses": losses, "after": after}
    return {"optimizer": spec, "schedule": schedule, "max": 1.5, **data}


def main():
    # Between 1 and 2, so that no value comes near 0; gradients of many sizes, and a coordinate that has none.
    start = [normal(*shape).sign() * (1 + torch.rand(shape, generator=generator)) for shape, _ in PARAMETERS.values()]
    sizes = [10 ** (4 * torch.rand(shape, generator=generator) - 3.5) for shape, _ in PARAMETERS.values()]
    sizes[1][0], sizes[1][1], sizes[2][0, 1] = 0, 1e-7, 1e-9
    gradients = [[normal(*s.shape) * s for s in sizes] for _ in range(STEPS)]

    def decaying(peak):
        return [peak * (1 - step / STEPS) for step in range(STEPS)]

    runs = [
        ({"name": "adamw"}, [1e-2] * STEPS),
        ({"name": "adamw", "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.3}, decaying(5e-2)),
        ({"name": "adamw", "beta1": 0.0, "weight_decay": 0.0}, [1e-2] * STEPS),
        ({"name": "sgd"}, [1e-2] * STEPS),
        ({"name": "sgd", "weight_decay": 0.1}, decaying(1e-2)),
        ({"name": "sgd", "momentum": 0.9, "weight_decay": 0.1}, [5e-3] * STEPS),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, decaying(5e-3)),
        ({"name": "lion"}, [1e-2] * STEPS),
        ({"name": "lion", "beta1": 0.95, "beta2": 0.98, "weight_decay": 0.5}, decaying(1e-2)),
    ]
    schedules = [
        {"peak": 1e-3, "decay": {"kind": "constant"}},
        {"peak": 1e-3, "warmup": 10, "decay": {"kind": "constant"}},
        {"peak": 3e-4, "decay": {"kind": "linear", "steps": 50, "final_fraction": 0.0}},
        {"peak": 3e-4, "warmup": 7, "decay": {"kind": "linear", "steps": 50, "final_fraction": 0.1}},
        {"peak": 0.3, "decay": {"kind": "cosine", "steps": 64, "final_fraction": 0.0}},
        {"peak": 6e-4, "warmup": 20, "decay": {"kind": "cosine", "steps": 300, "final_fraction": 0.1}},
        {"peak": 6e-4, "warmup": 2000, "decay": {"kind": "cosine", "steps": 1000003, "final_fraction": 0.0}},
        {"peak": 0.01, "warmup": 5, "decay": {"kind": "wsd", "steps": 100, "decay_steps": 20, "final_fraction": 0.0}},
        {"peak": 0.01, "decay": {"kind": "wsd", "steps": 700, "decay_steps": 133, "final_fraction": 0.2}},
    ]
    clips = [
        (1.0, [normal(), normal(5), normal(2, 3), normal(2, 1, 3)]),
        (100.0, [normal(5), normal(2, 3)]),
        (0.1, [normal(3, 4) * 1e4, normal(7) * 1e-4]),
        (1.0, [torch.zeros(4)]),
    ]
    parts = {
        "start": json.dumps([{"shape": list(w.shape), "values": values(w)} for w in start]),
        "decay": json.dumps([on for _, on in PARAMETERS.values()]),
        "gradients": json.dumps([[values(g) for g in step] for step in gradients]),
    }
    lists = {
        "runs": [run(spec, rates, start, gradients) for spec, rates in runs],
        "clips": [clip(*case) for case in clips],
        "schedules": [schedule_case(schedule) for schedule in schedules],
    }
    parts |= {name: "[\n" + ",\n".join(map(json.dumps, cases)) + "\n]" for name, cases in lists.items()}
    parts["regression"] = json.dumps(regression())
    path = Path(sys.argv[1]) / "optimizers.json"
    path.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "\n}\n")
    counts = ", ".join(f"{len(cases)} {name}" for name, cases in lists.items())
    print(f"{path}: {counts}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
