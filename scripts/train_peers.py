"""One step of training by xllama, jax and torch: `bench_peers.py --train` is the program, this its part.

A step is the same for all: --batch texts of --tokens ids, the mean cross-entropy of every next token, its gradient by
all weights (or, with --lora RANK, by adapters beside q, k, v, o, gate, up and down of each layer, the weights frozen),
clipped to a global norm of 1, AdamW on float32 weights. With bf16 the products' operands are rounded to bf16 in each
step; norms, softmax, logits and the optimizer stay in float32, and frozen weights are kept in bf16 from the start.
An engine is ready after its first step; a second one is not counted either. The losses of these two must agree.

Speed is batch × tokens by the time of a step. Memory is the largest resident set of the engine's process, read from the
kernel in the same way for all: in the counted steps, and before them (loading, compiling, the first two steps).
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import bench_peers as peers

RATE, BETAS, EPSILON, DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ALPHA_PER_RANK = 2.0
# Relative. Enough for adapters, too, though programs draw them differently: a draw moves the second loss by 1e-4.
TOLERANCES = {"f32": 1e-3, "bf16": 2e-2}

# ------------------------------------------------------------------------------------------------------ the driver


def peak_mb(engine):
    """The largest resident set of a process since it began or since forget_peak."""
    status = Path(f"/proc/{engine.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6


def forget_peak(engine):
    try:
        Path(f"/proc/{engine.process.pid}/clear_refs").write_text("5")
    except OSError as e:
        peers.say(f"warning: the peak memory of {engine.name} counts from its start: {e}")


def check_losses(losses, tolerance):
    for i in range(2):
        values = [x[i] for x in losses.values()]
        if not all(map(math.isfinite, values)) or max(values) - min(values) > tolerance * abs(min(values)):
            table = ", ".join(f"{name} {x[i]:.6f}" for name, x in losses.items())
            raise peers.BenchError(f"the engines disagree on the loss of step {i + 1} (tolerance {tolerance}): {table}")


def drive(args):
    xllama = peers.prepare(args)
    common = ["--train", "--model", args.model, "--dtype", args.dtype, "--batch", args.batch]
    ours = xllama and [xllama, "bench", *common, "--prompt-tokens", args.tokens, "--interactive"]
    if ours and args.lora:
        ours += ["--lora-rank", args.lora]
    options = [*common, "--tokens", args.tokens, "--lora", args.lora]
    with peers.loaded(args, ours, options) as (engines, left_out):
        losses = {e.name: [e.ready["loss"], e.ask("step")["loss"]] for e in engines}
        check_losses(losses, TOLERANCES[args.dtype])
        before = {}
        for e in engines:
            before[e.name] = peak_mb(e)
            forget_peak(e)
        busy = peers.warn_if_busy()
        samples = {e.name: {"tok_s": []} for e in engines}
        for i in range(args.repeat):
            for e in peers.in_turn(engines, i):
                answer = e.ask("step")
                samples[e.name]["tok_s"].append(args.batch * args.tokens / answer["step_s"])
                losses[e.name].append(answer["loss"])
            peers.say(
                f"round {i + 1} of {args.repeat}: "
                + "  ".join(f"{n} {s['tok_s'][-1]:.1f} (loss {losses[n][-1]:.4f})" for n, s in samples.items())
            )
        peaks = {e.name: {"peak_mb": peak_mb(e), "peak_before_mb": before[e.name]} for e in engines}
    versions = {e.name: e.versions for e in engines}
    if xllama:
        out = subprocess.run([xllama, "--version"], stdout=subprocess.PIPE, text=True).stdout.split()
        versions["xllama"] = {"xllama": out[-1] if out else "?"}
    return report(args, versions, samples, peaks, losses, left_out, busy)


def report(args, versions, samples, peaks, losses, left_out, busy):
    ratios = peers.over_peers(samples)
    for peer, ratio in ratios.items():
        ratio |= {key: ours / peaks[peer][key] for key, ours in peaks["xllama"].items()}
    result = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "lora_rank": args.lora,
        "batch": args.batch,
        "tokens": args.tokens,
        "repeat": args.repeat,
        "cpu": peers.cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "busy_cores_before": round(busy, 2),
        "versions": versions,
        "left_out": left_out,
        "results": {n: {"tok_s": peers.summary(s["tok_s"])} | peaks[n] for n, s in samples.items()},
        "xllama_over_peer": ratios,
        "losses": losses,
    }
    table = sys.stderr if args.json else sys.stdout
    what = f"LoRA of rank {args.lora}" if args.lora else "all weights"
    print(
        f"{result['model']}, training {what}, {args.dtype}, batch {args.batch} × {args.tokens}, {result['cpu']}, "
        f"{result['cores']} cores",
        file=table,
    )
    print(f"tok/s, median (min–max) of {args.repeat} rounds; peak memory in MB", file=table)
    heads = f"{'tok/s':>28} {'ours / it':>10} {'peak of steps':>14} {'ours / it':>10} {'peak before':>12}"
    print(f"{'':10} {heads} {'loss 1':>10} {'loss 2':>10}", file=table)
    for name, s in samples.items():
        speed, memory = (f"{ratios[name][k]:.2f}" if name in ratios else "" for k in ("tok_s", "peak_mb"))
        print(
            f"{name:10} {peers.cell(s['tok_s']):>28} {speed:>10} {peaks[name]['peak_mb']:14.0f} {memory:>10} "
            f"{peaks[name]['peak_before_mb']:12.0f} {losses[name][0]:10.5f} {losses[name][1]:10.5f}",
            file=table,
        )
    print("versions: " + ", ".join(f"{k} {v}" for own in versions.values() for k, v in (own or {}).items()), file=table)
    if args.json:
        print(json.dumps(result))
    return 0


# --------------------------------------------------------------------------- inside a peer's environment: its trainer


def serve(args):
    """Answers the driver. A trainer takes one step at each call and returns its loss, a number, when all is done."""
    answer = peers.answering()
    config = json.loads((Path(args.model) / "config.json").read_text())
    if config.get("model_type") != "llama" or config.get("hidden_act", "silu") != "silu":
        raise peers.BenchError(f"{args.worker} trains plain Llama here, found {config.get('model_type')}")
    weights = peers.read_weights(args.model)
    if any(name.endswith(".bias") for name in weights):
        raise peers.BenchError("a checkpoint with biases is not supported by the peers")
    # the same ids everywhere
    count, vocabulary = args.batch * args.tokens, config["vocab_size"]
    ids = [[(i * 7919 + 13) % vocabulary for i in range(b, b + args.tokens)] for b in range(0, count, args.tokens)]
    trainer, versions = {"jax": jax_trainer, "torch": torch_trainer}[args.worker](args, config, weights, ids)
    answer({"ready": True, "loss": trainer(), "versions": versions})
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = trainer()
        answer({"step_s": time.perf_counter() - begin, "loss": loss})


def layer_weights(weights, i):
    """name -> array of layer i, taken out of the weights so that no second copy of the model stays in memory."""
    names = {name: f"self_attn.{name}" for name in ATTENTION} | {name: f"mlp.{name}" for name in MLP}
    names |= {name: name for name in ("input_layernorm", "post_attention_layernorm")}
    return {name: weights.pop(f"model.layers.{i}.{path}.weight") for name, path in names.items()}


def draw_adapter(draw, rank, matrix):
    """A (rank, in) and B (out, rank) beside a matrix (out, in); both peers draw alike."""
    import numpy as np

    size_out, size_in = matrix.shape
    return draw.standard_normal((rank, size_in), np.float32) * np.float32(0.02), np.zeros((size_out, rank), np.float32)


def jax_trainer(args, config, weights, ids):
    """A jitted step as one writes it: value_and_grad of the whole model, nothing computed twice, AdamW by hand over the
    tree, state and trained weights donated. Products see batch and tokens as one axis, which matters to XLA's CPU
    compiler (SmolLM2, 4 × 256, f32: 14 % less time, with LoRA 33 %), as does unrolling the layers (a scan over them
    took 15 % more time and memory). What made no difference: weights (out, in) or (in, out); q, k, v and gate, up
    joined; jax.nn.dot_product_attention; in bf16, products with results in f32 that are rounded afterwards."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    layers, h, g, k = peers.sizes(config)
    batch, tokens = args.batch, args.tokens
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[args.dtype]
    eps = config.get("rms_norm_eps", 1e-6)
    draw = np.random.default_rng(0)

    def array(a):  # what is frozen needs no float32
        return jnp.array(a, dtype if args.lora and a.ndim > 1 else jnp.float32)

    model, adapters = {"layers": []}, []
    for i in range(layers):
        own = layer_weights(weights, i)
        if args.lora:
            pairs = {name: draw_adapter(draw, args.lora, own[name]) for name in ATTENTION + MLP}
            adapters.append({name: tuple(jnp.array(m.T) for m in pair) for name, pair in pairs.items()})
        model["layers"].append({name: array(a) for name, a in own.items()})
    model |= {name: array(weights.pop(name)) for name in list(weights)}
    frozen, trained = ({"model": model}, {"adapters": adapters}) if args.lora else ({}, {"model": model})

    angles = np.arange(tokens)[:, None, None] * peers.inverse_frequencies(config, k)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    visible = np.tril(np.ones((tokens, tokens), bool))

    def rms_norm(x, weight):
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight).astype(dtype)

    def rotate(x):  # (batch, tokens, heads, k)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)

    def layer(x, w, adapter):
        def product(x, name):
            y = x @ w[name].astype(dtype).T
            if name in adapter:
                a, b = (m.astype(dtype) for m in adapter[name])
                y += (ALPHA_PER_RANK * (x @ a)) @ b
            return y

        y = rms_norm(x, w["input_layernorm"])
        q, key, value = (product(y, name).reshape(batch, tokens, -1, k) for name in ("q_proj", "k_proj", "v_proj"))
        q = rotate(q).reshape(batch, tokens, g, h // g, k)
        scores = jnp.einsum("btgrk,bsgk->bgrts", q, rotate(key), preferred_element_type=jnp.float32)
        mix = jax.nn.softmax(jnp.where(visible, scores * k**-0.5, -jnp.inf), axis=-1).astype(dtype)
        x += product(jnp.einsum("bgrts,bsgk->btgrk", mix, value).reshape(batch * tokens, h * k), "o_proj")
        y = rms_norm(x, w["post_attention_layernorm"])
        return x + product(jax.nn.silu(product(y, "gate_proj")) * product(y, "up_proj"), "down_proj")

    def loss_of(trained, frozen, ids):
        both = trained | frozen
        model, adapters = both["model"], both.get("adapters", [{}] * layers)
        embedding = model["model.embed_tokens.weight"]
        x = embedding[ids.reshape(-1)].astype(dtype)
        for w, adapter in zip(model["layers"], adapters):
            x = layer(x, w, adapter)
        x = rms_norm(x.reshape(batch, tokens, -1)[:, :-1], model["model.norm.weight"])
        head = model.get("lm_head.weight", embedding).astype(dtype)
        logits = jnp.einsum("btm,vm->btv", x, head, preferred_element_type=jnp.float32)
        of_target = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - of_target)

    def step(trained, means, squares, count, frozen, ids):
        loss, gradients = jax.value_and_grad(loss_of)(trained, frozen, ids)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(gradients)))
        factor, count = jnp.minimum(1.0, CLIP / (norm + 1e-6)), count + 1  # as torch's clip_grad_norm_
        means = jax.tree.map(lambda m, x: BETAS[0] * m + (1 - BETAS[0]) * factor * x, means, gradients)
        squares = jax.tree.map(lambda v, x: BETAS[1] * v + (1 - BETAS[1]) * (factor * x) ** 2, squares, gradients)

        def update(w, m, v):
            m, v = m / (1 - BETAS[0] ** count), v / (1 - BETAS[1] ** count)
            return w - RATE * (m / (jnp.sqrt(v) + EPSILON) + (DECAY * w if w.ndim > 1 else 0.0))

        return jax.tree.map(update, trained, means, squares), means, squares, count, loss

    step = jax.jit(step, donate_argnums=(0, 1, 2, 3))
    ids = jnp.array(ids, jnp.int32)
    means, squares = (jax.tree.map(jnp.zeros_like, trained) for _ in range(2))
    state = (trained, means, squares, jnp.array(0.0, jnp.float32))
    del model, adapters, trained, means, squares  # donated

    def trainer():
        nonlocal state
        *state, loss = jax.block_until_ready(step(*state, frozen, ids))
        return float(loss)

    return trainer, {"jax": jax.__version__, "jaxlib": jax.lib.__version__}


def torch_trainer(args, config, weights, ids):
    """A plain module of torch's own functions, which took 4 % less time than transformers' LlamaForCausalLM (SmolLM2,
    4 × 256, f32, 2 cores). AdamW is fused: with clipping 0.3 s of CPU time where foreach took 0.7. Each layer and the
    head are compiled, 6 % less time and 1 GB less than without; as one graph the model took 3 % less again, but more
    than a minute to compile. Without a C++ compiler it runs as it is. Autocast is torch's way to bf16, which is slow on
    CPUs that lack the instructions: there oneDNN's products take some four times as long as in f32."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(peers.CACHE / "bench" / "inductor"))
    import numpy as np
    import torch
    import torch.nn.functional as F

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    torch._inductor.config.cpp.threads = threads  # part of the key of what it has compiled before
    layers, _, _, k = peers.sizes(config)
    eps = config.get("rms_norm_eps", 1e-6)
    bf16 = args.dtype == "bf16"
    draw = np.random.default_rng(0)
    angles = torch.arange(args.tokens)[:, None] * torch.from_numpy(peers.inverse_frequencies(config, k))
    cos, sin = angles.cos().float(), angles.sin().float()

    def parameter(a):  # what is frozen needs no float32
        a = torch.from_numpy(a)
        if not args.lora:
            return torch.nn.Parameter(a)
        return torch.nn.Parameter(a.bfloat16() if bf16 and a.ndim > 1 else a, requires_grad=False)

    class Adapted(torch.nn.Module):
        """A product and its adapter."""

        def __init__(self, matrix):
            super().__init__()
            self.weight = parameter(matrix)
            self.a, self.b = (torch.nn.Parameter(torch.from_numpy(m)) for m in draw_adapter(draw, args.lora, matrix))

        def forward(self, x):
            return F.linear(x, self.weight) + ALPHA_PER_RANK * F.linear(F.linear(x, self.a), self.b)

    class Product(torch.nn.Module):
        def __init__(self, matrix):
            super().__init__()
            self.weight = parameter(matrix)

        def forward(self, x):
            return F.linear(x, self.weight)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    class Layer(torch.nn.Module):
        def __init__(self, own):
            super().__init__()
            for name in ATTENTION + MLP:
                setattr(self, name, (Adapted if args.lora else Product)(own[name]))
            self.norms = torch.nn.ParameterList(
                parameter(own[name]) for name in ("input_layernorm", "post_attention_layernorm")
            )

        def forward(self, x):
            batch, tokens, width = x.shape
            y = F.rms_norm(x, (width,), self.norms[0], eps)
            q, key, value = (
                p(y).view(batch, tokens, -1, k).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, key = rotate(q).to(value.dtype), rotate(key).to(value.dtype)
            mixed = F.scaled_dot_product_attention(q, key, value, is_causal=True, enable_gqa=True)
            x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
            y = F.rms_norm(x, (width,), self.norms[1], eps)
            return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))

    class Llama(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer(layer_weights(weights, i)) for i in range(layers))
            self.embedding = parameter(weights.pop("model.embed_tokens.weight"))
            self.norm = parameter(weights.pop("model.norm.weight"))
            self.head = parameter(weights.pop("lm_head.weight")) if weights else self.embedding

        def forward(self, ids):
            x = F.embedding(ids, self.embedding).float()
            for layer in self.layers:
                x = layer(x)
            return self.loss(x, ids)

        def loss(self, x, ids):
            logits = F.linear(F.rms_norm(x[:, :-1], (x.shape[-1],), self.norm, eps), self.head)
            return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    model, ids = Llama(), torch.tensor(ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE, betas=BETAS, eps=EPSILON, fused=True)

    def gradients():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(ids)
        loss.backward()
        return loss

    plain = model.loss
    try:
        for layer in model.layers:
            layer.compile()
        model.loss = torch.compile(plain)
        gradients()
        compiled = "on"
    except Exception as e:  # of many kinds, when there is no compiler or no Python.h
        print(f"not compiled: {e}", file=sys.stderr)
        for layer in model.layers:
            layer._compiled_call_impl = None  # what layer.compile() sets
        model.loss, compiled = plain, "off"

    def trainer():
        loss = gradients()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss.item()

    return trainer, {"torch": torch.__version__, "torch.compile": compiled}
