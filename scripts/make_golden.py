#!/usr/bin/env python3
"""Write golden outputs of PyTorch, which `xllama golden check` and the tests hold the compiled model to.

    python3 scripts/make_golden.py [--out golden] [--cases NAME ...]
        small random checkpoints (written too) and their goldens
    python3 scripts/make_golden.py --model DIR --out DIR [--name NAME] [--text FILE | --tokens-file F.npy] [--prompts …]
        the golden of a checkpoint in Hugging Face form, for instance that of `xllama export-hf smollm2-135m DIR`;
        nothing of the checkpoint is copied

Needs python >= 3.11 with venv and pip. The pinned packages below are installed once into a virtual environment in the
cache folder (XDG_CACHE_HOME or ~/.cache, then xllama/venvs; 5.6 GB, since the default torch wheel brings its CUDA
libraries; nothing here uses a GPU). `--python PY` uses an interpreter that has them already.
A case is added to the manifest that --out has, or replaces the one of its name. On one machine the same command
writes the same bytes. golden/README.md describes the format.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PINS = ["torch==2.15.0", "transformers==5.23.0", "safetensors==0.8.0", "tokenizers==0.23.3", "numpy==2.4.6"]

FORMAT, VERSION = "xllama-golden", 1
TOLERANCES = {
    "f32_kl_max": 1e-7,
    "activation_relative": 1e-5,
    "consistency_absolute": 1e-4,
    "bf16_kl_factor": 1.25,
    "greedy_min_margin": 1e-3,
}
GREEDY_TOKENS = 40
FULL_LOGITS_UP_TO = 8192  # a larger vocabulary is stored as its TOP_K best ids and one class for the rest
TOP_K = 2048

# Ordinary text, with what tokenizers stumble over: digits, quotes, a dash, accents, two spaces, a line break.
TEXT = """The ferry left the harbour at 6:45 on a grey Tuesday morning, eleven minutes late. Nobody minded. Marta had \
bought two coffees and a bag of plums, and she set them on the bench by the window, where the glass was wet with spray.
"You're early," said the man in the blue coat, although the clock above the café showed 7:02. He counted 1350 steps \
from the pier to the old mill — or so he claimed —  and every one of them, he said, was worth the view."""
PROMPTS = ["Once upon a time", "The sun rises in the", "def fibonacci(n):"]


# ------------------------------------------------------------------------------------- any python3: get the packages


def environment():
    """The interpreter of a virtual environment that holds PINS; made on the first call."""
    import fcntl

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xllama" / "venvs"
    venv = cache / ("golden-" + hashlib.sha256("\n".join(PINS).encode()).hexdigest()[:12])
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python, complete = venv / "bin" / "python", venv / "complete"
        if not complete.exists():
            print(f"installing {' '.join(PINS)} into {venv} (once)", file=sys.stderr)
            try:
                subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, stdout=sys.stderr)
                subprocess.run(
                    [python, "-m", "pip", "install", "--disable-pip-version-check", *PINS],
                    check=True,
                    stdout=sys.stderr,
                )
            except subprocess.CalledProcessError as e:
                raise GoldenError(f"the pinned packages could not be installed: {e}") from None
            complete.touch()
    return python


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default="golden", metavar="DIR", help="where to write (default: golden)")
    ap.add_argument("--cases", nargs="+", metavar="NAME", help="only these of the small random checkpoints")
    ap.add_argument(
        "--model", metavar="DIR", help="a checkpoint in Hugging Face form, instead of the small random ones"
    )
    ap.add_argument("--name", help="with --model: the case's name (default: the folder's)")
    ap.add_argument(
        "--model-id",
        metavar="M",
        help="with --model: what the manifest names for `xllama golden check` to load (default: as --name)",
    )
    ap.add_argument(
        "--text", metavar="FILE", help="with --model: the text to run (default: a paragraph in this script)"
    )
    ap.add_argument("--tokens-file", metavar="F.npy", help="with --model: int32 token ids to run instead of a text")
    ap.add_argument(
        "--prompts", nargs="*", metavar="P", help="with --model: prompts to continue greedily (default: three)"
    )
    ap.add_argument(
        "--activations",
        default=None,
        metavar="I,J|none",
        help=f"with --model: layers to store (default: first and last, none where V > {FULL_LOGITS_UP_TO})",
    )
    ap.add_argument(
        "--reference",
        choices=["float64", "float32"],
        default="float64",
        help="with --model: dtype of the reference run; float64 needs 8 bytes a parameter",
    )
    ap.add_argument("--no-bf16", action="store_true", help="leave out PyTorch's own bf16 run")
    ap.add_argument("--python", metavar="PY", help="an interpreter that has the pinned packages")
    args = ap.parse_args()
    if args.model is None:
        for option in ("name", "model_id", "text", "tokens_file", "prompts", "activations"):
            if getattr(args, option) is not None:
                ap.error(f"--{option.replace('_', '-')} needs --model DIR")
    elif args.cases:
        ap.error("--cases names small random checkpoints and cannot be given with --model")
    if args.text and args.tokens_file:
        ap.error("--text and --tokens-file exclude each other")
    return args


def main():
    args = parse_arguments()
    if sys.version_info < (3, 11):
        sys.exit(f"error: python must be 3.11 or later, found {sys.version.split()[0]}")
    if os.environ.get("XLLAMA_GOLDEN_STAGE") != "run":
        try:
            python = args.python or environment()
        except GoldenError as e:
            sys.exit(f"error: {e}")
        env = dict(
            os.environ,
            XLLAMA_GOLDEN_STAGE="run",
            HF_HUB_OFFLINE="1",
            TRANSFORMERS_OFFLINE="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            TOKENIZERS_PARALLELISM="false",
        )
        os.execve(python, [str(python), *sys.argv], env)
    try:
        run(args)
    except GoldenError as e:
        sys.exit(f"error: {e}")


class GoldenError(Exception):
    """Something that the person who runs this can mend."""


# -------------------------------------------------------------------------------------- the small random checkpoints


def small_cases():
    """name -> (config.json, seed, options). Together: R = H/G of 1, 2, 3, 4 and G = 1, each rope type, biases, tied and
    untied heads, both spellings of the config, sharded files, bf16 and f16. head_dim differs from hidden/heads in all
    but `llama1`, whose config leaves out all that a Llama-1 checkpoint's leaves out. Seeds are such that the greedy
    continuation has at least 18 different tokens and never comes nearer than 0.02 to a tie."""

    def config(m, h, g, k, f, v, layers, dtype="float32", **more):
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": v,
            "hidden_size": m,
            "intermediate_size": f,
            "num_hidden_layers": layers,
            "num_attention_heads": h,
            "num_key_value_heads": g,
            "head_dim": k,
            "hidden_act": "silu",
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": dtype,
        } | more

    def rope(theta, kind="default", **more):
        return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}

    def version4(cfg, theta, scaling):
        cfg = {k: v for k, v in cfg.items() if k != "dtype"} | {"torch_dtype": cfg["dtype"]}
        return cfg | {"rope_theta": theta, "rope_scaling": scaling, "transformers_version": "4.46.0"}

    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    llama1 = config(48, 3, 3, 16, 80, 163, 2, rms_norm_eps=1e-6)
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "dtype"):
        del llama1[key]
    return {
        "llama1": (llama1 | {"torch_dtype": "float32"}, 24, {}),
        "gqa2": (config(48, 4, 2, 16, 88, 211, 2) | rope(10000.0), 31, {}),
        "gqa3-linear-tied": (
            config(48, 6, 2, 12, 80, 197, 2, tie_word_embeddings=True, rms_norm_eps=1e-3)
            | rope(25000.0, "linear", factor=4.0),
            48,
            {},
        ),
        "gqa4-llama3-bias": (
            config(64, 8, 2, 16, 104, 223, 2, attention_bias=True, mlp_bias=True) | rope(500000.0, "llama3", **llama3),
            68,
            {},
        ),
        "mqa-gelu": (
            config(40, 4, 1, 20, 72, 179, 3, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh") | rope(100000.0),
            66,
            {},
        ),
        "sharded-v4": (
            version4(config(48, 6, 3, 20, 64, 191, 4), 50000.0, {"rope_type": "llama3", **llama3}),
            84,
            {"shards": 3},
        ),
        "bf16": (
            config(48, 4, 2, 16, 96, 205, 2, dtype="bfloat16", attention_bias=True, tie_word_embeddings=True)
            | rope(10000.0),
            104,
            {},
        ),
        "f16-v4": (
            version4(
                config(48, 6, 2, 10, 96, 199, 2, dtype="float16", mlp_bias=True),
                1000.0,
                {"type": "linear", "factor": 2.0},
            ),
            87,
            {},
        ),
    }


SMALL_POSITIONS = 88


def random_tensors(cfg, seed):
    """Parameters by Hugging Face name. Scales are such that attention is selective and logits are far from flat, so a
    wrong rotation, head order or a forgotten bias moves the output visibly (see `sensitivity`)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    m, f, v, h = cfg["hidden_size"], cfg["intermediate_size"], cfg["vocab_size"], cfg["num_attention_heads"]
    g, k = cfg.get("num_key_value_heads", h), cfg.get("head_dim", m // h)
    tied = cfg.get("tie_word_embeddings", False)
    out = {}

    def normal(name, shape, std, mean=0.0):
        out[name] = (mean + std * rng.standard_normal(shape)).astype(np.float32)

    def linear(name, rows, columns, gain, bias):
        normal(name + ".weight", (rows, columns), gain / columns**0.5)
        if bias:
            normal(name + ".bias", (rows,), 0.3)

    normal("model.embed_tokens.weight", (v, m), 0.3 if tied else 1.0)
    for i in range(cfg["num_hidden_layers"]):
        layer, bias = f"model.layers.{i}.", cfg.get("attention_bias", False)
        normal(layer + "input_layernorm.weight", (m,), 0.2, 1.0)
        linear(layer + "self_attn.q_proj", h * k, m, 1.4, bias)
        linear(layer + "self_attn.k_proj", g * k, m, 1.4, bias)
        linear(layer + "self_attn.v_proj", g * k, m, 1.0, bias)
        linear(layer + "self_attn.o_proj", m, h * k, 1.5, bias)
        bias = cfg.get("mlp_bias", False)
        normal(layer + "post_attention_layernorm.weight", (m,), 0.2, 1.0)
        linear(layer + "mlp.gate_proj", f, m, 1.2, bias)
        linear(layer + "mlp.up_proj", f, m, 1.2, bias)
        linear(layer + "mlp.down_proj", m, f, 1.2, bias)
    normal("model.norm.weight", (m,), 0.2, 1.0)
    if not tied:
        linear("lm_head", v, m, 2.5, False)
    return out


def write_small_model(folder, cfg, seed, shards=1):
    import torch
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", cfg)
    dtype = getattr(torch, cfg.get("dtype") or cfg["torch_dtype"])
    tensors = {name: torch.from_numpy(a).to(dtype) for name, a in random_tensors(cfg, seed).items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    index = {"metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())}, "weight_map": {}}
    names = list(tensors)
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * s // shards : len(names) * (s + 1) // shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= {n: file for n in part}
    write_json(folder / "model.safetensors.index.json", index)


# ---------------------------------------------------------------------------------------------- running transformers


def load(folder, dtype, attention=None):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = AutoConfig.from_pretrained(folder).model_type
    if kind != "llama":
        raise GoldenError(f"{folder}: model_type must be llama, found {kind}")
    more = {"attn_implementation": attention} if attention else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, **more
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise GoldenError(f"{folder}: {what.replace('_', ' ')}: {sorted(map(str, info[what]))}")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model.eval()


class Exact:
    """While open, transformers' Llama computes in the model's own dtype throughout.

    Its RMSNorm, the angles of its rotary embedding and its eager softmax compute in float32 whatever the dtype is, and
    would leave float32 rounding in a float64 run. The inverse frequencies stay the float32 numbers that they are in the
    definition. Formulas unchanged."""

    def __enter__(self):
        import torch
        from transformers.models.llama import modeling_llama as module

        def rms_norm(self, x):
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

        def rotary(self, x, position_ids):
            angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

        def attention(block, q, k, v, mask, scaling, dropout=0.0, **_):
            k, v = (module.repeat_kv(t, block.num_key_value_groups) for t in (k, v))
            scores = q @ k.transpose(2, 3) * scaling
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            return (weights @ v).transpose(1, 2).contiguous(), weights

        self.saved = []
        for owner, name, value in (
            (module.LlamaRMSNorm, "forward", rms_norm),
            (module.LlamaRotaryEmbedding, "forward", rotary),
            (module, "eager_attention_forward", attention),
        ):
            self.saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    def __exit__(self, *_):
        for owner, name, value in self.saved:
            setattr(owner, name, value)


def forward(model, tokens, layers=()):
    """float64 logits (T, V), and the activations of `layers` as float64 arrays by golden name."""
    import torch
    from transformers.models.llama import modeling_llama as module

    taps, handles, rotations = {}, [], []

    def tap(block, name):
        def keep(_, __, output):
            taps[name] = (output[0] if isinstance(output, tuple) else output)[0]

        handles.append(block.register_forward_hook(keep))

    if layers:
        tap(model.model.embed_tokens, "embedding")
        tap(model.model.norm, "final_norm")
    for i in layers:
        block = model.model.layers[i]
        tap(block.input_layernorm, f"layers.{i}/input_norm")
        tap(block.self_attn.v_proj, f"layers.{i}/attention/v")
        tap(block.self_attn, f"layers.{i}/attention/out")
        tap(block.post_attention_layernorm, f"layers.{i}/post_attn_norm")
        tap(block.mlp, f"layers.{i}/mlp/out")
        tap(block, f"layers.{i}/out")
    rotate = module.apply_rotary_pos_emb

    def rotate_and_keep(q, k, *args, **kwargs):
        rotated = rotate(q, k, *args, **kwargs)
        rotations.append((q, k, *rotated))  # one entry a layer, in order; each (1, heads, T, K)
        return rotated

    module.apply_rotary_pos_emb = rotate_and_keep
    try:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        module.apply_rotary_pos_emb = rotate
        for handle in handles:
            handle.remove()
    for i in layers:
        taps[f"layers.{i}/attention/v"] = taps[f"layers.{i}/attention/v"].unflatten(-1, (-1, model.config.head_dim))
        for name, x in zip(("q", "k", "q_rope", "k_rope"), rotations[i], strict=True):
            taps[f"layers.{i}/attention/{name}"] = x[0].transpose(0, 1)
    return logits.double().numpy(), {name: x.double().numpy() for name, x in taps.items()}


def greedy(model, prompt):
    """GREEDY_TOKENS best tokens after `prompt`, through the cache, and for each the gap between the two best logits."""
    import torch
    from transformers import DynamicCache

    tokens, margins, cache = [], [], DynamicCache(config=model.config)
    step = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            logits = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            best = logits.topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
            step = best.indices[:1][None]
    return tokens, margins


def logsumexp(x):
    import numpy as np

    top = x.max(-1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def kl(golden, other, ids=None):
    """KL(golden || other) in nats from logits (T, V); with `ids` (T, k), over those and a class for the rest."""
    import numpy as np

    def log_probabilities(x):
        if ids is None:
            return x - logsumexp(x)
        rest = np.ones(x.shape, bool)
        np.put_along_axis(rest, ids, False, -1)
        rest = x[rest].reshape(len(x), -1)
        return np.concatenate([np.take_along_axis(x, ids, -1), logsumexp(rest)], -1) - logsumexp(x)

    p, q = log_probabilities(golden), log_probabilities(other)
    return np.maximum((np.exp(p) * (p - q)).sum(-1), 0.0)


def relative_error(a, golden):
    return max((abs(a[name] - g).max() / abs(g).max() for name, g in golden.items()), default=None)


# ----------------------------------------------------------------------------- what a misread model would cost in KL


def misreadings(model, cfg):
    """name -> (how to spoil the model, smallest KL that must result). Each entry is a mistake an implementation
    can make; where it hardly moved the output, the golden could not catch it."""
    import torch

    h, g, k = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    layers = model.model.layers

    def permute(linear, rows, dim=0):
        linear.weight.data = linear.weight.data.index_select(dim, rows)
        if dim == 0 and linear.bias is not None:
            linear.bias.data = linear.bias.data[rows]

    def each(change):
        return lambda: [change(layer) for layer in layers]

    def interleaved(layer):
        pairs = torch.arange(k).view(-1, 2).T.reshape(-1)  # 0, 2, 4, …, 1, 3, 5, …
        permute(layer.self_attn.q_proj, (torch.arange(h)[:, None] * k + pairs).reshape(-1))
        permute(layer.self_attn.k_proj, (torch.arange(g)[:, None] * k + pairs).reshape(-1))

    def head_order(layer):  # query head h reads key/value head h % G instead of h / R
        heads = torch.arange(h).view(h // g, g).T.reshape(-1)
        rows = (heads[:, None] * k + torch.arange(k)).reshape(-1)
        permute(layer.self_attn.q_proj, rows)
        permute(layer.self_attn.o_proj, rows, dim=1)

    def no_bias(*names):
        def change(layer):
            for name in names:
                getattr(getattr(layer, name.split(".")[0]), name.split(".")[1]).bias.data.zero_()

        return each(change)

    def frequencies(theta):
        def change():
            model.model.rotary_emb.inv_freq.copy_(1.0 / theta ** (torch.arange(0, k, 2).float() / k))

        return change

    def epsilon():
        for norm in [model.model.norm] + [n for x in layers for n in (x.input_layernorm, x.post_attention_layernorm)]:
            norm.variance_epsilon = 0.0

    theta = cfg.rope_parameters["rope_theta"]
    out = {
        "rope interleaved": (each(interleaved), 1e-3),
        "rope absent": (lambda: model.model.rotary_emb.inv_freq.zero_(), 1e-3),
        "norm epsilon absent": (epsilon, 0.0),
        "post_attn_norm weight absent": (each(lambda x: x.post_attention_layernorm.weight.data.fill_(1.0)), 1e-3),
        "gate and up exchanged": (each(lambda x: exchange_gate_and_up(x.mlp)), 1e-3),
    }
    if 1 < g < h:
        out["query heads in (R, G) order"] = (each(head_order), 1e-3)
    if k != cfg.hidden_size // h:
        out["scores scaled by hidden/heads"] = (
            each(lambda x: setattr(x.self_attn, "scaling", (cfg.hidden_size / h) ** -0.5)),
            1e-3,
        )
    if cfg.rope_parameters["rope_type"] != "default":
        out["rope scaling absent"] = (frequencies(theta), 1e-3)
    if theta != 10000.0:
        out["rope theta 10000"] = (frequencies(10000.0), 1e-3)
    if cfg.attention_bias:
        out["q, k, v bias absent"] = (no_bias("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 1e-3)
        out["o bias absent"] = (no_bias("self_attn.o_proj"), 1e-3)
    if cfg.mlp_bias:
        out["mlp bias absent"] = (no_bias("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), 1e-3)
    if cfg.hidden_act != "silu":
        out["silu instead"] = (lambda: [setattr(x.mlp, "act_fn", torch.nn.SiLU()) for x in layers], 1e-3)
        out["gelu by erf instead"] = (lambda: [setattr(x.mlp, "act_fn", torch.nn.GELU()) for x in layers], 5e-7)
    return out


def exchange_gate_and_up(mlp):
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def sensitivity(folder, tokens, golden):
    model, out = load(folder, "float64", "eager"), {}
    for name in misreadings(model, model.config):
        model = load(folder, "float64", "eager")
        spoil, least = misreadings(model, model.config)[name]
        spoil()
        out[name] = float(kl(golden, forward(model, tokens)[0]).max())
        if out[name] < least:
            raise GoldenError(
                f"{folder}: `{name}` moves the output by a KL of only {out[name]:.1e}; change the case's seed or sizes"
            )
    return out


# --------------------------------------------------------------------------------------------------- writing a golden


def write_json(path, value):
    text = json.dumps(value, indent=2, ensure_ascii=False)
    text = re.sub(r"\[[-\d,\s]*\]", lambda m: re.sub(r"\s+", " ", m[0]).replace("[ ", "[").replace(" ]", "]"), text)
    partial = Path(f"{path}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def write_npz(path, arrays):
    """As numpy.savez_compressed, but with fixed times in the archive, so that the same arrays give the same bytes."""
    import numpy as np

    with zipfile.ZipFile(path, "w") as z:
        for name, a in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(a), version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(name + ".npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            z.writestr(entry, data.getvalue(), compresslevel=9)


def logit_arrays(logits, top):
    import numpy as np

    if not top:
        return {"logits": logits.astype(np.float32)}
    order = np.argsort(-logits, axis=-1, kind="stable")
    best, rest = order[:, :TOP_K], order[:, TOP_K:]
    return {
        "top_ids": best.astype(np.int32),
        "top_logits": np.take_along_axis(logits, best, -1).astype(np.float32),
        "rest_lse": logsumexp(np.take_along_axis(logits, rest, -1))[:, 0],
    }


def rounded(x):
    """Six digits: figures for people, equal on machines whose last bits differ."""
    return None if x is None else float(f"{x:.6g}")


def before_a_tie(text, tokens, margins):
    """The continuation up to where the two best logits come too near for float32 to tell them apart."""
    count = next((i for i, margin in enumerate(margins) if margin < TOLERANCES["greedy_min_margin"]), len(tokens))
    if count < len(tokens):
        print(
            f"note: prompt {text!r}: token {count} is nearly a tie ({margins[count]:.1e}); kept what is before it",
            file=sys.stderr,
        )
    return tokens[:count], margins[:count]


def golden(folder, tokens, prompts, layers, reference, bf16):
    """Arrays for the npz, float64 logits, and what the manifest says of them. `prompts`: (text or None, ids)."""
    import numpy as np

    model = load(folder, reference, "eager")
    vocab, last = model.config.vocab_size, model.config.num_hidden_layers - 1
    if min(tokens) < 0 or max(tokens) >= vocab:
        raise GoldenError(f"token ids must lie in 0..{vocab}, found {min(tokens)}..{max(tokens)}")
    top = vocab > FULL_LOGITS_UP_TO
    if layers is None:
        layers = [] if top else sorted({0, last})
    if any(i > last for i in layers):
        raise GoldenError(f"--activations: layers must lie in 0..{last}, found {layers}")
    with Exact():
        logits, taps = forward(model, tokens, layers)
        continued = [before_a_tie(text, *greedy(model, ids)) for text, ids in prompts]
    del model

    model = load(folder, "float32")
    f32, f32_taps = forward(model, tokens, layers)
    for (text, ids), (expected, _) in zip(prompts, continued):
        if greedy(model, ids)[0][: len(expected)] != expected:
            raise GoldenError(f"prompt {text!r}: float32 and {reference} continue differently; choose another prompt")
    del model
    arrays = {"tokens": np.array(tokens, np.int32)} | logit_arrays(logits, top)
    f32_kl = kl(logits, f32, arrays.get("top_ids"))
    figures = {
        "f32": {
            "kl_mean": rounded(f32_kl.mean()),
            "kl_max": rounded(f32_kl.max()),
            "activation_relative_max": rounded(relative_error(f32_taps, taps)),
        },
        "bf16": None,
    }

    if bf16:
        bf16_kl = kl(logits, forward(load(folder, "bfloat16"), tokens)[0], arrays.get("top_ids"))
        figures["bf16"] = {"kl_mean": rounded(bf16_kl.mean()), "kl_max": rounded(bf16_kl.max())}
        arrays["bf16_kl"] = bf16_kl
    arrays |= {name: taps[name].astype(np.float32) for name in sorted(taps)}
    return (
        arrays,
        logits,
        {
            "reference_dtype": reference,
            "positions": len(tokens),
            "vocab_size": vocab,
            "logits": {"kind": "top", "k": TOP_K} if top else {"kind": "full"},
            "activations": layers,
            "greedy": [
                {"text": text, "prompt": ids, "tokens": new, "min_margin": rounded(min(margins))}
                for (text, ids), (new, margins) in zip(prompts, continued)
                if new
            ],
            "pytorch": figures,
        },
    )


def versions():
    from importlib.metadata import version

    return {"python": platform.python_version()} | {p.split("==")[0]: version(p.split("==")[0]) for p in PINS}


def command():
    words = sys.argv[1:]
    if "--python" in words:
        at = words.index("--python")
        del words[at : at + 2]
    return shlex.join(["python3", "scripts/make_golden.py", *words])


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def finish(out, entry):
    """Adds the hashes and puts the entry into the manifest."""
    folder = out / entry["name"]
    entry["command"], entry["versions"] = command(), versions()
    entry["files"] = {p.relative_to(out).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    path, cases = out / "manifest.json", []
    if path.exists():
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise GoldenError(f"{path} is not a manifest of {FORMAT} version {VERSION}; give another --out")
        cases = [c for c in manifest["cases"] if c["name"] != entry["name"]]
    cases = sorted([*cases, entry], key=lambda c: c["name"])
    write_json(path, {"format": FORMAT, "version": VERSION, "tolerances": TOLERANCES, "cases": cases})
    f32, bf16 = entry["pytorch"]["f32"], entry["pytorch"]["bf16"]
    print(
        f"{entry['name']:18} T {entry['positions']:4}  V {entry['vocab_size']:6}  PyTorch: f32 KL {f32['kl_max']:.1e}"
        + (f"  activations {f32['activation_relative_max']:.1e}" if entry["activations"] else "")
        + (f"  bf16 KL mean {bf16['kl_mean']:.1e} max {bf16['kl_max']:.1e}" if bf16 else "")
        + f"  greedy margin {min((g['min_margin'] for g in entry['greedy']), default=float('nan')):.1e}"
        + (
            f"  least sensitive {min(entry['sensitivity'].items(), key=lambda s: s[1])}"
            if "sensitivity" in entry
            else ""
        )
    )


def small_golden(out, name, cfg, seed, options, bf16):
    import numpy as np

    folder = out / name / "model"
    write_small_model(folder, cfg, seed, **options)
    tokens = np.random.default_rng(seed + 1).integers(0, cfg["vocab_size"], SMALL_POSITIONS).tolist()
    arrays, logits, entry = golden(folder, tokens, [(None, tokens)], None, "float64", bf16)
    if len(entry["greedy"][0]["tokens"]) < GREEDY_TOKENS:
        raise GoldenError(f"{folder}: the greedy continuation meets a near tie; choose another seed")
    write_npz(out / name / "golden.npz", arrays)
    finish(
        out,
        {"name": name, "model": {"path": f"{name}/model"}, "npz": f"{name}/golden.npz", "seed": seed, "text": None}
        | entry
        | {"sensitivity": {k: rounded(v) for k, v in sensitivity(folder, tokens, logits).items()}},
    )


def user_golden(args, out):
    import numpy as np
    from transformers import AutoTokenizer

    folder = Path(args.model)
    if not (folder / "config.json").is_file():
        raise GoldenError(f"--model must be a folder in Hugging Face form, found no config.json in {folder}")
    name = args.name or folder.resolve().name
    encode = None
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    elif args.text or args.prompts or not args.tokens_file:
        raise GoldenError(f"{folder} has no tokenizer: give --tokens-file and no text or prompts")
    text = None
    if args.tokens_file:
        tokens = np.load(args.tokens_file).reshape(-1).tolist()
    else:
        text = Path(args.text).read_text(encoding="utf-8") if args.text else TEXT
        tokens = encode(text)
    if not tokens:
        raise GoldenError("there must be at least one token to run, found none")
    if encode:
        prompts = [(p, encode(p)) for p in (PROMPTS if args.prompts is None else args.prompts)]
    else:
        prompts = [(None, tokens)]
    layers = {None: None, "none": []}.get(args.activations, args.activations)
    if layers:
        layers = sorted({int(i) for i in layers.split(",")})
    arrays, _, entry = golden(folder, tokens, prompts, layers, args.reference, not args.no_bf16)
    (out / name).mkdir(parents=True, exist_ok=True)
    write_npz(out / name / "golden.npz", arrays)
    sources = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".model", ".safetensors")]
    finish(
        out,
        {"name": name, "model": {"model": args.model_id or name}, "npz": f"{name}/golden.npz", "text": text}
        | entry
        | {"source_files": {p.name: sha256(p) for p in sources}},
    )


def run(args):
    import torch
    import transformers

    torch.set_num_threads(1)  # sums in the same order whatever the number of cores
    transformers.logging.set_verbosity_error()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.model:
        return user_golden(args, out)
    cases = small_cases()
    for name in args.cases or cases:
        if name not in cases:
            raise GoldenError(f"--cases: expected some of {', '.join(cases)}, found {name}")
        small_golden(out, name, *cases[name], not args.no_bf16)


if __name__ == "__main__":
    main()
