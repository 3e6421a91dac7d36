#!/usr/bin/env python3
"""Make the vectors of derivatives: what PyTorch's autograd gives in float64 for ops that our graph has too.

    pip install torch==2.15.0
    python3 scripts/make_gradient_vectors.py xla/tests/data

Writes gradients.json: for each name the inputs, the cotangents of the outputs and the gradients of the inputs. The rows of
xla/tests/gradients/rows.rs have the same names.
"""
import json, sys
from pathlib import Path

import torch
import torch.nn.functional as F

generator = torch.Generator().manual_seed(20)


def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def t(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def unary(f, low, high):
    return f, [uniform(low, high, 2, 3)]


def binary(f, low=-1.0, high=1.0):
    return f, [uniform(low, high, 2, 3), uniform(low, high, 2, 3)]


ROWS = torch.tensor([[2, 0, 2], [3, 1, 2]])
ALONG = torch.tensor([[2, 0, 2], [3, 1, 1]])
TIES = [t([1, 2, 3], [4, 5, 6]), t([1, 3, 2], [4, 4, 7])]
CASES = {
    "abs": unary(torch.abs, -2, 2),
    "cbrt": unary(lambda x: x.pow(1 / 3), 0.2, 2),
    "ceil": unary(lambda x: x.ceil() + x, 0.1, 4),
    "cos": unary(torch.cos, -3, 3),
    "erf": unary(torch.erf, -2, 2),
    "exp": unary(torch.exp, -2, 2),
    "expm1": unary(torch.expm1, -2, 2),
    "floor": unary(lambda x: x.floor() + x, 0.1, 4),
    "log": unary(torch.log, 0.2, 3),
    "log1p": unary(torch.log1p, -0.5, 3),
    "sigmoid": unary(torch.sigmoid, -3, 3),
    "silu": unary(F.silu, -3, 3),
    "gelu": unary(F.gelu, -3, 3),
    "gelu_tanh": unary(lambda x: F.gelu(x, approximate="tanh"), -3, 3),
    "neg": unary(torch.neg, -1, 1),
    "round": unary(lambda x: x.round() + x, 0.1, 4),
    "rsqrt": unary(torch.rsqrt, 0.2, 3),
    "sign": unary(lambda x: x.sign() * x, 0.1, 4),
    "sin": unary(torch.sin, -3, 3),
    "sqrt": unary(torch.sqrt, 0.2, 3),
    "tan": unary(torch.tan, -1, 1),
    "tanh": unary(torch.tanh, -2, 2),
    "add": binary(torch.add),
    "atan2": binary(torch.atan2),
    "div": binary(torch.div, 0.5, 2),
    "maximum": binary(torch.maximum),
    "minimum": binary(torch.minimum),
    "maximum_ties": (torch.maximum, TIES),
    "minimum_ties": (torch.minimum, TIES),
    "mul": binary(torch.mul),
    "pow": binary(torch.pow, 0.3, 2),
    "pow_zero": (torch.pow, [t([0, 2, 0], [3, 0, 1]), t([2, 3, 1], [0.5, 4, 2])]),
    "fmod": binary(torch.fmod, 0.3, 2),
    "sub": binary(torch.sub),
    "where": binary(lambda x, y: torch.where(x > 0.1, x * y, x + y)),
    "clamp": (
        lambda low, x, high: torch.clamp(x, low, high),
        [uniform(-1, 0, 3, 4), uniform(-2, 2, 3, 4), uniform(0, 1, 3, 4)],
    ),
    "to_float32_and_back": unary(lambda x: x.square().float().double() * x, -1, 1),
    "to_bfloat16_and_back": unary(lambda x: (x.bfloat16().double() + x) * 0.5, -1, 1),
    "detach": unary(lambda x: x.detach() * x, -1, 1),
    "expand": (lambda x: x.expand(3, 2, 4), [uniform(-1, 1, 2, 1)]),
    "reshape": (lambda x: x.reshape(3, 4), [uniform(-1, 1, 2, 6)]),
    "permute": (lambda x: x.permute(2, 0, 1), [uniform(-1, 1, 2, 3, 4)]),
    "flip": (lambda x: x.flip(0, 2), [uniform(-1, 1, 2, 3, 2)]),
    "slice": (lambda x: x[1:4, 0:6:4], [uniform(-1, 1, 5, 7)]),
    "cat": (lambda *x: torch.cat(x, 1), [uniform(-1, 1, 2, n) for n in (3, 1, 2)]),
    "embedding": (lambda x: F.embedding(ROWS, x), [uniform(-1, 1, 4, 3)]),
    "take_along_dim": (lambda x: torch.take_along_dim(x, ALONG, 1), [uniform(-1, 1, 2, 4)]),
    "index_add": (
        lambda x, y: x.index_add(0, torch.tensor([2, 0, 2, 3, 2]), y),
        [uniform(-1, 1, 4, 3), uniform(-1, 1, 5, 3)],
    ),
    "matmul": (torch.matmul, [uniform(-1, 1, 3, 4), uniform(-1, 1, 4, 2)]),
    "grouped_scores": (
        lambda q, k: torch.einsum("bsgrk,btgk->bgsrt", q, k),
        [uniform(-1, 1, 2, 3, 2, 2, 4), uniform(-1, 1, 2, 5, 2, 4)],
    ),
    "projection_out": (
        lambda x, w: torch.einsum("bshk,hkm->bsm", x, w),
        [uniform(-1, 1, 2, 3, 2, 4), uniform(-1, 1, 2, 4, 5)],
    ),
    "outer": (lambda x, y: torch.einsum("ab,c->bca", x, y), [uniform(-1, 1, 2, 3), uniform(-1, 1, 4)]),
    "sum": (lambda x: x.sum((0, 2)), [uniform(-1, 1, 2, 3, 4)]),
    "mean": (lambda x: x.mean(1), [uniform(-1, 1, 2, 3, 4)]),
    "amax": (lambda x: x.amax((0, 2)), [uniform(-1, 1, 2, 3, 4)]),
    "amin": (lambda x: x.amin(1), [uniform(-1, 1, 2, 3, 4)]),
    "amax_ties": (lambda x: x.amax(1), [t([1, 3, 3, 2], [5, 5, 5, 5], [0, 0, -1, 0])]),
    "prod": (lambda x: x.prod(1), [uniform(0.5, 1.5, 3, 4)]),
    "prod_zeros": (lambda x: x.prod(1), [t([1, 0, 3, 2], [0, 5, 0, 5], [0.5, -1, 2, 3])]),
    "softmax": (lambda x: x.softmax(-1), [uniform(-2, 2, 3, 5)]),
    "max_dim": (lambda x: x.max(1).values * (x.max(1).indices + 1), [uniform(-2, 2, 3, 5)]),
    "cumsum": (lambda x: x.cumsum(1), [uniform(-1, 1, 2, 5)]),
    "sort": (lambda x: x.sort(-1).values, [uniform(-1, 1, 3, 5)]),
    "topk": (lambda x: x.topk(3).values, [uniform(-1, 1, 3, 5)]),
}


def array(x):
    return {"shape": list(x.shape), "values": x.detach().flatten().tolist()}


def main():
    out = {}
    for name, (f, inputs) in CASES.items():
        inputs = [x.clone().requires_grad_() for x in inputs]
        y = f(*inputs)
        ct = uniform(-1, 1, *y.shape)
        gradients = torch.autograd.grad(y, inputs, ct)
        out[name] = {"inputs": [array(x) for x in inputs], "cotangents": [array(ct)], "gradients": [array(g) for g in gradients]}
    path = Path(sys.argv[1]) / "gradients.json"
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in out.items())
    path.write_text("{\n" + text + "\n}\n")
    print(f"{path}: {len(out)} cases, torch {torch.__version__}")


if __name__ == "__main__":
    main()
