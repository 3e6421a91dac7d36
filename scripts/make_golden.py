#!/usr/bin/env python3
"""Write golden outputs of PyTorch, which `xllama golden check` and the tests hold the compiled model to.

    python3 scripts/make_golden.py [--out golden] [--cases NAME ...]
        small random checkpoints (written too) and their goldens, and the vectors of single blocks
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

FORMAT, VERSION = "xllama-golden", 3
TOLERANCES = {
    "f32_kl_max": 1e-7,
    "activation_relative": 1e-5,
    "consistency_absolute": 1e-4,
    "kl_factor": {  # of PyTorch's own figures
        "bf16": {"kl_mean": 1.25, "kl_max": 1.25},
        "f16": {"kl_mean": 1.25, "kl_max": 4.0},
        "int8": {"kl_mean": 1.5, "kl_max": 4.0},
        "int4": {"kl_mean": 1.5, "kl_max": 4.0},
    },
    "greedy_min_margin": 1e-3,
}
GREEDY_TOKENS = 40
ACTIVATION_POSITIONS = 8
FULL_LOGITS_UP_TO = 8192  # a larger vocabulary is stored as its TOP_K best ids and one class for the rest
TOP_K = 1024
MODEL_TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"),
    *("glm4_moe", "phi3", "gemma2", "gemma3_text", "smollm3", "olmo2"),
)

# Ordinary text, with what tokenizers stumble over: digits, quotes, a dash, accents, two spaces, a line break.
TEXT = """The ferry left the harbour at 6:45 on a grey Tuesday morning, eleven minutes late. Nobody minded. Marta had \
bought two coffees and a bag of plums, and she set them on the bench by the window, where the glass was wet with spray.
"You're early," said the man in the blue coat, although the clock above the café showed 7:02. He counted 1350 steps \
from the pier to the old mill — or so he claimed —  and every one of them, he said, was worth the view."""
PROMPTS = ["Once upon a time", "The history of the lighthouse", "def fibonacci(n):"]


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
        "--greedy-tokens",
        type=int,
        default=GREEDY_TOKENS,
        metavar="N",
        help=f"tokens to continue each prompt by (default: {GREEDY_TOKENS})",
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
    ap.add_argument("--no-narrow", action="store_true", help="leave out PyTorch's own runs in bf16, f16, int8 and int4")
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
    """name -> (config.json, seed, options): `positions` of the run (88), `router_gap` that its tokens must keep (0),
    `max_shard_size`, and `saved`: config.json as save_pretrained writes it, not as it stands here.

    At least two cases a model type, of which one has its config as transformers 4 wrote it and one as transformers 5
    does. Together: R = H/G of 1, 2, 3, 4 and G = 1, head_dim other than hidden/heads, every rope type, windows shorter
    than the run, biases, tied and untied heads, sharded files, bf16 and f16. Seeds are such that the greedy
    continuation has at least 12 different tokens, never comes nearer than 0.02 to a tie, and takes no expert by less
    than 1e-3."""

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

    def member(model_type, m, h, g, k, f, v, layers, **more):
        """A config of another model type, with the keys that the files of all of them have; bf16 unless it says."""
        classes = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "glm4_moe": "Glm4Moe"}
        classes |= {"gemma3_text": "Gemma3", "smollm3": "SmolLM3"}
        cfg = config(m, h, g, k, f, v, layers, "bfloat16") | {
            "architectures": [classes.get(model_type, model_type.capitalize()) + "ForCausalLM"],
            "model_type": model_type,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "pad_token_id": None,
            "use_cache": True,
        }
        del cfg["mlp_bias"]
        if model_type in ("mistral", "mixtral", "qwen2", "qwen2_moe", "phi3"):
            del cfg["attention_bias"]
        if model_type.startswith("gemma"):
            cfg["hidden_activation"] = "gelu_pytorch_tanh"
            del cfg["hidden_act"]
            cfg |= {"tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
        return cfg | more

    def rope(theta, kind="default", **more):
        return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}

    def version4(cfg, type_key="rope_type"):
        """The same in transformers 4's spelling, which leaves `layer_types` to follow from other keys."""
        cfg = {k: v for k, v in cfg.items() if k not in ("dtype", "layer_types")} | {"torch_dtype": cfg["dtype"]}
        scaling = dict(cfg.pop("rope_parameters"))
        if "full_attention" in scaling:
            local, scaling = scaling["sliding_attention"], dict(scaling["full_attention"])
            cfg["rope_local_base_freq"] = local["rope_theta"]
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in scaling:
                cfg[key] = scaling.pop(key)
        kind = scaling.pop("rope_type")
        scaling = None if kind == "default" else {type_key: kind, **scaling}
        return cfg | {"rope_scaling": scaling, "transformers_version": "4.46.0"}

    def kinds(pattern):
        return {"layer_types": [{"w": "sliding_attention", "f": "full_attention"}[kind] for kind in pattern]}

    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    llama1 = config(48, 3, 3, 16, 80, 163, 2, rms_norm_eps=1e-6)
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings", "dtype"):
        del llama1[key]
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 1.0}
    short, long = [1.0, 1.02, 1.05, 1.1, 1.2, 1.3], [1.1, 1.5, 2.4, 3.6, 5.5, 8.0]
    qwen2_moe = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 28}
    glm = {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1}
    softcaps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
    plain = rope(10000.0)
    moe = {"router_gap": 0.1}  # far enough apart for bf16 to choose the same experts

    # fmt: off
    return {
        "llama1": (llama1 | {"torch_dtype": "float32"}, 24, {}),
        "gqa2": (config(48, 4, 2, 16, 88, 211, 2) | rope(10000.0), 31, {}),
        "gqa3-linear-tied": (
            config(48, 6, 2, 12, 80, 197, 2, tie_word_embeddings=True, rms_norm_eps=1e-3)
            | rope(25000.0, "linear", factor=4.0), 48, {}),
        "gqa4-llama3-bias": (
            config(64, 8, 2, 16, 104, 223, 2, attention_bias=True, mlp_bias=True)
            | rope(500000.0, "llama3", **llama3), 68, {}),
        "mqa-gelu": (
            config(40, 4, 1, 20, 72, 179, 3, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")
            | rope(100000.0), 66, {}),
        "sharded-v4": (
            version4(config(48, 6, 3, 20, 64, 191, 4) | rope(50000.0, "llama3", **llama3)),
            84, {"max_shard_size": 230_000}),
        "bf16": (
            config(48, 4, 2, 16, 96, 205, 2, dtype="bfloat16", attention_bias=True, tie_word_embeddings=True)
            | rope(10000.0), 104, {}),
        "f16-v4": (
            version4(config(48, 6, 2, 10, 96, 199, 2, dtype="float16", mlp_bias=True)
                     | rope(1000.0, "linear", factor=2.0), "type"), 87, {}),
        "llama-dynamic-short": (
            config(32, 4, 2, 12, 48, 97, 2, "bfloat16", max_position_embeddings=140)
            | rope(1000.0, "dynamic", factor=4.0), 201, {"saved": True, "positions": 96}),
        "llama-dynamic-long": (
            version4(config(32, 4, 2, 12, 48, 97, 2, "bfloat16", max_position_embeddings=64)
                     | rope(1000.0, "dynamic", factor=3.0)), 202, {"positions": 96}),
        "llama-yarn": (
            config(32, 4, 2, 16, 48, 97, 2, "bfloat16", max_position_embeddings=128)
            | rope(10000.0, "yarn", factor=4.0, original_max_position_embeddings=32),
            403, {"saved": True, "positions": 96}),
        "llama-yarn-mscale": (
            version4(config(32, 4, 4, 16, 48, 97, 2, "bfloat16", max_position_embeddings=128)
                     | rope(1000.0, "yarn", **yarn, mscale=1.0, mscale_all_dim=0.3)), 304, {"positions": 96}),
        "llama-yarn-factor": (
            config(32, 4, 1, 20, 48, 97, 2, "bfloat16", max_position_embeddings=128)
            | rope(1000.0, "yarn", **yarn, attention_factor=0.85, truncate=False),
            305, {"saved": True, "positions": 96}),
        "mistral-window7": (
            version4(member("mistral", 32, 4, 1, 12, 48, 97, 3, sliding_window=7) | plain), 710, {"positions": 96}),
        "mistral-window33": (
            member("mistral", 36, 6, 2, 10, 48, 89, 2, sliding_window=33, dtype="float32") | rope(100000.0),
            211, {"saved": True, "positions": 120}),
        "mixtral-5x3": (
            version4(member("mixtral", 32, 4, 2, 12, 24, 89, 2, sliding_window=None, num_local_experts=5,
                            num_experts_per_tok=3, dtype="float32") | rope(1000000.0)), 414, moe),
        "mixtral-8x2-window": (
            member("mixtral", 32, 4, 2, 12, 24, 89, 3, sliding_window=16, num_local_experts=8, num_experts_per_tok=2)
            | plain, 313, moe | {"saved": True}),
        "qwen2": (  # its window must not be used
            version4(member("qwen2", 32, 4, 2, 12, 48, 97, 2, tie_word_embeddings=True, use_sliding_window=False,
                            sliding_window=16, max_window_layers=0, dtype="float32") | rope(1000000.0)),
            5214, {"positions": 90}),
        "qwen2-window": (
            member("qwen2", 32, 4, 1, 12, 48, 97, 3, use_sliding_window=True, sliding_window=16, max_window_layers=1)
            | plain, 415, {"saved": True, "positions": 100}),
        "qwen3": (
            version4(member("qwen3", 32, 4, 2, 20, 48, 97, 2, tie_word_embeddings=True) | rope(1000000.0)), 216, {}),
        "qwen3-bias-window": (
            member("qwen3", 36, 6, 2, 12, 48, 97, 3, attention_bias=True, use_sliding_window=True, sliding_window=7,
                   rms_norm_eps=1e-3, **kinds("wfw")) | plain, 217, {"saved": True, "positions": 96}),
        "qwen2-moe": (
            version4(member("qwen2_moe", 32, 4, 2, 12, 48, 89, 2, num_experts=6, num_experts_per_tok=2,
                            norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], **qwen2_moe) | plain),
            318, moe),
        "qwen2-moe-step2": (
            member("qwen2_moe", 32, 4, 4, 12, 40, 89, 3, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
                   decoder_sparse_step=2, qkv_bias=True, **qwen2_moe) | rope(1000000.0), 619, moe | {"saved": True}),
        "qwen3-moe-16x4": (
            version4(member("qwen3_moe", 32, 4, 2, 12, 48, 89, 2, num_experts=16, num_experts_per_tok=4,
                            moe_intermediate_size=16, norm_topk_prob=True) | rope(1000000.0)), 620, moe),
        "qwen3-moe-mixed": (
            member("qwen3_moe", 40, 4, 2, 12, 48, 89, 3, num_experts=8, num_experts_per_tok=2,
                   moe_intermediate_size=16, norm_topk_prob=False, mlp_only_layers=[1], attention_bias=True) | plain,
            2121, moe | {"saved": True}),
        "glm4-moe": (
            version4(member("glm4_moe", 32, 4, 2, 12, 40, 89, 2, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
                            topk_group=1, n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5,
                            use_qk_norm=True, attention_bias=True, **glm)
                     | rope(1000000.0, partial_rotary_factor=0.5)), 1122, {"router_gap": 0.02}),
        "glm4-moe-groups": (
            member("glm4_moe", 32, 4, 1, 16, 40, 89, 3, n_routed_experts=16, num_experts_per_tok=3, n_group=4,
                   topk_group=2, n_shared_experts=2, norm_topk_prob=False, routed_scaling_factor=0.7,
                   use_qk_norm=False, attention_bias=False, **glm)
            | rope(10000.0, partial_rotary_factor=0.5), 323, {"router_gap": 0.02, "saved": True}),
        "phi3-window": (
            version4(member("phi3", 32, 4, 2, 12, 48, 97, 2, sliding_window=16, dtype="float32",
                            original_max_position_embeddings=256) | plain), 724, {"positions": 96}),
        "phi3-longrope-short": (
            version4(member("phi3", 48, 4, 2, 12, 48, 97, 2, sliding_window=None, max_position_embeddings=512,
                            original_max_position_embeddings=128)
                     | rope(10000.0, "longrope", short_factor=short, long_factor=long), "type"), 325, {}),
        "phi3-longrope-long": (
            member("phi3", 48, 4, 1, 12, 48, 97, 2, sliding_window=None, max_position_embeddings=256,
                   original_max_position_embeddings=64)
            | rope(10000.0, "longrope", short_factor=short, long_factor=long), 226, {"saved": True, "positions": 96}),
        "phi3-partial": (
            member("phi3", 48, 4, 2, 16, 48, 97, 2, sliding_window=33, tie_word_embeddings=True)
            | rope(10000.0, partial_rotary_factor=0.75), 927, {"saved": True, "positions": 104}),
        "gemma2": (
            version4(member("gemma2", 32, 4, 2, 12, 48, 97, 3, sliding_window=7, query_pre_attn_scalar=10, **softcaps)
                     | plain), 3328, {"positions": 96}),
        "gemma2-window33": (
            member("gemma2", 36, 6, 2, 10, 48, 97, 2, sliding_window=33, query_pre_attn_scalar=16, dtype="float32",
                   attn_logit_softcapping=3.0, final_logit_softcapping=None, tie_word_embeddings=False, **kinds("fw"))
            | rope(50000.0), 429, {"saved": True, "positions": 100}),
        "gemma3": (
            version4(member("gemma3_text", 32, 4, 1, 16, 40, 97, 4, sliding_window=16, sliding_window_pattern=3,
                            query_pre_attn_scalar=12, rope_parameters={
                                "full_attention": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 8.0},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}})),
            5430, {"positions": 104}),
        "gemma3-window7": (
            member("gemma3_text", 36, 6, 3, 12, 40, 97, 3, sliding_window=7, query_pre_attn_scalar=20,
                   tie_word_embeddings=False, rms_norm_eps=1e-3, **kinds("wfw"), rope_parameters={
                       "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                       "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}),
            331, {"saved": True, "positions": 96}),
        "smollm3": (
            version4(member("smollm3", 32, 4, 1, 12, 40, 97, 3, tie_word_embeddings=True, mlp_bias=False,
                            no_rope_layer_interval=3, no_rope_layers=[1, 1, 0], use_sliding_window=False,
                            sliding_window=None) | rope(50000.0)), 732, {}),
        "smollm3-window": (
            member("smollm3", 36, 6, 2, 10, 40, 97, 3, mlp_bias=True, attention_bias=True, no_rope_layers=[1, 0, 1],
                   use_sliding_window=True, sliding_window=16) | rope(2000000.0),
            533, {"saved": True, "positions": 96}),
        # Seed 934 has a position where PyTorch's own two bf16 attentions are apart by a factor of 2.5.
        "olmo2": (
            version4(member("olmo2", 32, 4, 2, 12, 48, 97, 2, rms_norm_eps=1e-6) | rope(500000.0)), 935, {}),
        "olmo2-bias": (
            member("olmo2", 36, 6, 2, 10, 48, 97, 2, attention_bias=True, rms_norm_eps=1e-3)
            | plain, 1535, {"saved": True, "positions": 160}),
    }
    # fmt: on


def random_values(name, shape, model_type, tied, rng):
    """Values of the parameter `name`. Scales are such that attention and routers are selective and logits are far from
    flat, so a wrong rotation, head order or a forgotten bias moves the output visibly (see `sensitivity`)."""
    part, gemma = name.split("."), model_type.startswith("gemma")
    if part[-1] in ("bias", "e_score_correction_bias"):
        mean, std = 0.0, 0.3
    elif part[-2].endswith("norm"):
        mean, std = (1.4 if part[-2] in ("q_norm", "k_norm") else 1.0), 0.2
        if gemma:  # its weights are added to one
            mean = 2.0 if part[-2] == "norm" and tied else mean - 1.0
    elif part[-2] == "embed_tokens":
        # Gemma multiplies by the root of the size: larger, and a tied embedding repeats its token.
        mean, std = 0.0, (0.15 if tied else 0.3) if gemma else (0.3 if tied else 1.0)
    else:
        gains = {"q_proj": 1.4, "k_proj": 1.4, "qkv_proj": 1.4, "v_proj": 1.0, "o_proj": 1.5, "lm_head": 2.5}
        gains |= {"gate": 1.0 if model_type == "glm4_moe" else 2.0, "shared_expert_gate": 1.5}
        mean, std = 0.0, gains.get(part[-2], 1.2) / shape[-1] ** 0.5
    return mean + std * rng.standard_normal(shape)


def write_small_model(folder, cfg, seed, saved=False, max_shard_size=10**9):
    """The checkpoint with the names and forms that save_pretrained writes."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", cfg)
    dtype = getattr(torch, cfg.get("dtype") or cfg["torch_dtype"])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    tied = model.config.tie_word_embeddings

    def rank(name):
        part = name.split(".")
        if part[1] != "layers":
            return (0,) if part[1] == "embed_tokens" else (2,)
        within = {"input_layernorm": 0, "self_attn": 1, "post_attention_layernorm": 2}
        return 1, int(part[2]), within.get(part[3], 3)

    rng, tensors = np.random.default_rng(seed), model.state_dict()
    for name in sorted((n for n in tensors if not (tied and n == "lm_head.weight")), key=rank):
        values = random_values(name, tuple(tensors[name].shape), cfg["model_type"], tied, rng).astype(np.float32)
        tensors[name].copy_(torch.from_numpy(values))
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # kept in float32 whatever the rest is
            buffer.data = tensors[name]
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if saved:
        cfg = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", cfg)


def clear_tokens(model, count, seed, gap):
    """Random ids. With `gap`, none at which a router takes an expert by less than that over the next one."""
    import numpy as np

    rng, tokens = np.random.default_rng(seed), []
    if not gap:
        return rng.integers(0, model.config.vocab_size, count).tolist()
    while len(tokens) < count:
        with exactly(model) as exact:
            candidate = [*tokens, int(rng.integers(0, model.config.vocab_size))]
            forward(model, candidate)
        if exact.router_gap >= gap:
            tokens = candidate
    return tokens


# ---------------------------------------------------------------------------------------------- running transformers


def load(folder, dtype, attention=None, edit=None):
    """The checkpoint in `dtype`; `edit` changes its configuration first."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise GoldenError(f"{folder}: model_type must be one of {known}, found {config.model_type}")
    if edit:
        edit(config)
    if config.model_type == "gemma2":  # other kernels leave out its softcap
        attention = "eager"
    more = {"attn_implementation": attention} if attention else {}
    if attention and hasattr(config, "num_experts_per_tok"):
        more["experts_implementation"] = "eager"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True, **more
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise GoldenError(f"{folder}: {what.replace('_', ' ')}: {sorted(map(str, info[what]))}")
    frequencies = [b for name, b in model.model.rotary_emb.named_buffers() if name.endswith("inv_freq")]
    assert frequencies and all(b.dtype == torch.float32 for b in frequencies)
    return model.eval()


def head_dim(cfg):
    return getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads


def windows(cfg):
    """The window of each layer, None where it reads all positions."""
    window = getattr(cfg, "sliding_window", None) or None
    kinds = getattr(cfg, "layer_types", None) or ["sliding_attention"] * cfg.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def longest_with_same_frequencies(cfg):
    """Up to how many tokens the rotary frequencies are those of a short text; None if they always are."""
    rope = cfg.rope_parameters
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return cfg.max_position_embeddings if rope.get("rope_type") == "dynamic" else None


def exact_mode(dtype):
    """A context in which whoever asks torch for float32 gets `dtype`; `router_gap` becomes the smallest relative
    distance between an entry that a torch.topk took and the best that it left."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        router_gap = float("inf")

        def __torch_function__(self, function, types, args=(), kwargs=None):
            own = lambda x: dtype if x is torch.float32 else x  # noqa: E731
            if function is torch.Tensor.float:
                return args[0].to(dtype)
            if function is torch.topk:
                self.look(*args, **(kwargs or {}))
            return function(*map(own, args), **{k: own(x) for k, x in (kwargs or {}).items()})

        def look(self, scores, k, dim=-1, **_):
            if k < scores.shape[dim]:
                best = scores.topk(k + 1, dim).values
                gap = (best[..., -2] - best[..., -1]) / best[..., -2].abs()
                self.router_gap = min(self.router_gap, float(gap.min()))

    return Mode()


def exactly(model):
    """A context in which transformers computes in the model's own dtype throughout, formulas unchanged.

    Its norms, rotary angles, softmaxes and routers ask for float32 whatever the dtype is, and would leave float32
    rounding in a float64 run. The inverse frequencies stay the float32 numbers that they are in the definition."""
    import torch

    embedding = model.model.embed_tokens
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, dtype=model.dtype)
    return exact_mode(model.dtype)


def settle_frequencies(model, length):
    """Makes the rotary frequencies for a text of `length`, which some rope types do at first use: outside `exactly`, so
    that they are the float32 numbers of every other run."""
    import torch

    if longest_with_same_frequencies(model.config):
        model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])


def forward(model, tokens, layers=(), rows=None):
    """float64 logits (T, V), and the activations of `layers` at positions `rows` as float64 arrays by golden name."""
    import torch

    taps, handles = {}, []
    cfg, rows = model.config, slice(None) if rows is None else rows
    k = head_dim(cfg)

    def keep(name, x):
        taps[name] = x[rows].detach().double().numpy()

    def tap(block, name, heads=False):
        def hook(_, __, output):
            x = (output[0] if isinstance(output, tuple) else output).reshape(len(tokens), -1)
            keep(name, x.unflatten(-1, (-1, k)) if heads else x)

        handles.append(block.register_forward_hook(hook))

    def tap_layer(i, block):
        at, attention = f"layers.{i}/", block.self_attn
        sandwich = hasattr(block, "post_feedforward_layernorm")  # norms of what a block adds, as Gemma and OLMo 2
        for module, name in (
            ("input_layernorm", "input_norm"),
            ("post_attention_layernorm", "attn_out_norm" if sandwich else "post_attn_norm"),
            ("pre_feedforward_layernorm", "post_attn_norm"),
            ("post_feedforward_layernorm", "mlp_out_norm"),
            ("self_attn", "attention/out"),
            ("mlp", "mlp/out"),
        ):
            if hasattr(block, module):
                tap(getattr(block, module), at + name)
        tap(block, at + "out")
        if hasattr(block.mlp, "gate"):
            tap(block.mlp.gate, at + "mlp/router_logits")
        if hasattr(attention, "qkv_proj"):
            heads, groups = cfg.num_attention_heads, cfg.num_key_value_heads

            def split(_, __, output):
                parts = output[0].unflatten(-1, (-1, k)).split([heads, groups, groups], 1)
                for name, x in zip("qkv", parts, strict=True):
                    keep(f"{at}attention/{name}", x)

            handles.append(attention.qkv_proj.register_forward_hook(split))
        else:
            for name in "qkv":
                tap(getattr(attention, f"{name}_proj"), f"{at}attention/{name}", heads=True)

        def rotating(q, k, *args, **kwargs):
            rotated = rotate(q, k, *args, **kwargs)
            names = [("_rope", rotated)] + ([("_norm", (q, k))] if hasattr(attention, "q_norm") else [])
            for suffix, (q, k) in names:
                keep(f"{at}attention/q{suffix}", q[0].transpose(0, 1))
                keep(f"{at}attention/k{suffix}", k[0].transpose(0, 1))
            return rotated

        handles.append(attention.register_forward_pre_hook(lambda *_: setattr(code, "apply_rotary_pos_emb", rotating)))
        handles.append(attention.register_forward_hook(lambda *_: setattr(code, "apply_rotary_pos_emb", rotate)))

    code = sys.modules[type(model).__module__]
    rotate = code.apply_rotary_pos_emb
    if layers:
        tap(model.model.embed_tokens, "embedding")
        tap(model.model.norm, "final_norm")
    for i in layers:
        tap_layer(i, model.model.layers[i])
    try:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    finally:
        code.apply_rotary_pos_emb = rotate
        for handle in handles:
            handle.remove()
    return logits.double().numpy(), taps


def greedy(model, prompt, count):
    """`count` best tokens after `prompt`, through the cache, and for each the gap between the two best logits."""
    import torch
    from transformers import DynamicCache

    tokens, margins, cache = [], [], DynamicCache(config=model.config)
    step = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
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

    def log_probabilities(x, ids):  # of one position: a large vocabulary's logits are needed once, not five times
        if ids is None:
            return x - logsumexp(x)
        return np.concatenate([x[ids], logsumexp(np.delete(x, ids))]) - logsumexp(x)

    def row(t):
        p, q = (log_probabilities(x[t], None if ids is None else ids[t]) for x in (golden, other))
        return max((np.exp(p) * (p - q)).sum(), 0.0)

    return np.array([row(t) for t in range(len(golden))])


def relative_error(a, golden):
    return max((abs(a[name] - g).max() / abs(g).max() for name, g in golden.items()), default=None)


# ------------------------------------------------------------------------------------------------ PyTorch in fewer bits


def in_groups(x, bits, scales="float32"):
    """x (…, K) as codes times a scale for each 32 terms, by the plain rules of llama.cpp's Q8_0 and Q4_0: the term of largest
    magnitude is ±127, or −8."""
    import torch

    end, most = {8: (127.0, 127), 4: (-8.0, 7)}[bits]
    groups = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / end
    codes = (groups / scale.where(scale != 0, 1.0)).round().clamp(max=most)
    return (codes * scale.to(getattr(torch, scales)).float()).flatten(-2)[..., : x.shape[-1]]


def with_rounded(inputs, floats=(), attention=False):
    """A context in which `inputs` rounds what is multiplied with a weight, unless that is one of `floats`, and both sides of the
    products of attention if it says so."""
    import torch
    from torch.overrides import TorchFunctionMode

    keep = {weight.data_ptr() for weight in floats}

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.linear and args[1].data_ptr() not in keep:
                args = (inputs(args[0]), *args[1:])
            elif function is torch.matmul and attention:
                args = tuple(map(inputs, args))
            return function(*args, **(kwargs or {}))

    return Mode()


def packed_logits(folder, bits, tokens):
    """Logits of a float32 run in which matrices are in groups of `bits`, with scales in half precision, and what is
    multiplied with them in groups of 8 bits. The embedding and the head have 8 bits in any case. Norms, biases, routers,
    the gate of a shared expert and all that is no product with a weight remain float32."""
    model = load(folder, "float32", "eager")  # whose experts are products like others
    floats = []
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or name.endswith((".gate.weight", "shared_expert_gate.weight")):
            floats.append(weight)
            continue
        own = 8 if name.endswith(("embed_tokens.weight", "lm_head.weight")) else bits
        for rows in weight.data.split(4096):
            rows.copy_(in_groups(rows, own, "float16"))
    with with_rounded(lambda x: in_groups(x, 8), floats):
        return forward(model, tokens)[0]


def narrow_logits(folder, name, tokens):
    """PyTorch's logits in bf16, f16, int8 or int4. Where its f16 overflows, they are those of float32 with weights and all sides
    of products in f16."""
    import numpy as np

    if name in ("int8", "int4"):
        return packed_logits(folder, int(name[3:]), tokens)
    dtype = {"bf16": "bfloat16", "f16": "float16"}[name]
    logits = forward(load(folder, dtype), tokens)[0]
    if name == "f16" and not np.isfinite(logits).all():
        print(f"note: {folder}: PyTorch's f16 overflows; taken with f16 in products only", file=sys.stderr)
        with with_rounded(lambda x: x.half().float(), attention=True):
            logits = forward(load(folder, dtype, "eager").float(), tokens)[0]
    return logits


# ----------------------------------------------------------------------------- what a misread model would cost in KL


def misreadings(cfg, raw):
    """name -> (change of the config or None, change of the model or None, smallest KL that must result). Each entry is
    a mistake an implementation can make; where it hardly moved the output, the golden could not catch it. A change of
    the model is called with it, its code (a module) and `patch`, which replaces an attribute until the run is over.
    `raw` is what stands in config.json."""
    import torch

    out, h, g, k = {}, cfg.num_attention_heads, cfg.num_key_value_heads, head_dim(cfg)
    ropes = [cfg.rope_parameters] if "rope_type" in cfg.rope_parameters else list(cfg.rope_parameters.values())
    get = lambda key, default=None: getattr(cfg, key, default)  # noqa: E731
    mixture = get("num_experts_per_tok")

    def config(name, least=1e-3, **changes):
        out[name] = (lambda c: [setattr(c, key, value) for key, value in changes.items()], None, least)

    def rope(name, change, least=1e-3):
        def edit(c):
            r = c.rope_parameters
            flat = "rope_type" in r
            c.rope_parameters = r | change(r) if flat else {kind: p | change(p) for kind, p in r.items()}

        out[name] = (edit, None, least)

    def model(name, least=1e-3):
        return lambda change: out.setdefault(name, (None, change, least))

    def zero(*ends):
        def change(m, *_):
            for name, x in (*m.named_parameters(), *m.named_buffers()):
                if name.endswith(ends):
                    x.data.zero_()

        return change

    def attentions(change):
        return lambda m, *_: [change(layer.self_attn) for layer in m.model.layers]

    def set_scaling(attention, scale):
        attention.scaling = scale

    @model("rope interleaved")
    def _(m, code, patch):
        rotate, turning = code.apply_rotary_pos_emb, int(k * ropes[0].get("partial_rotary_factor", 1.0))
        pairs = torch.arange(turning).view(-1, 2).T.reshape(-1)  # 0, 2, 4, …, 1, 3, 5, …
        pairs = torch.cat([pairs, torch.arange(turning, k)])
        patch(code, "apply_rotary_pos_emb", lambda q, k, *a, **kw: rotate(q[..., pairs], k[..., pairs], *a, **kw))

    @model("rope absent")
    def _(m, code, patch):
        patch(code, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k))

    @model("norm epsilon absent", 0.0)
    def _(m, *_):
        for module in m.modules():
            for name in ("variance_epsilon", "eps"):
                if hasattr(module, name):
                    setattr(module, name, 0.0)

    gemma = cfg.model_type.startswith("gemma")

    @model("post_attn_norm weight absent")
    def _(m, *_):
        for layer in m.model.layers:
            layer.post_attention_layernorm.weight.data.fill_(0.0 if gemma else 1.0)

    @model("gate and up exchanged")
    def _(m, *_):
        for module in m.modules():
            if hasattr(module, "gate_proj"):
                module.gate_proj, module.up_proj = module.up_proj, module.gate_proj
            elif hasattr(module, "gate_up_proj"):
                both = getattr(module.gate_up_proj, "weight", module.gate_up_proj)
                both.data = both.data.roll(both.shape[-2] // 2, -2)

    if 1 < g < h:  # query head h reads key/value head h % G instead of h / R

        @model("query heads in (R, G) order")
        def _(m, code, patch):
            patch(code, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1))

    if k != cfg.hidden_size // h:
        scale = (cfg.hidden_size / h) ** -0.5
        model("scores scaled by hidden/heads")(attentions(lambda a: set_scaling(a, scale)))
    if get("query_pre_attn_scalar", k) != k:
        model("scores scaled by head_dim")(attentions(lambda a: set_scaling(a, k**-0.5)))

    kinds = {r["rope_type"] for r in ropes} - {"default"}
    if "longrope" in kinds:
        exchanged = {"short_factor": ropes[0]["long_factor"], "long_factor": ropes[0]["short_factor"]}
        rope("short and long factors exchanged", lambda _: exchanged)
    elif kinds == {"dynamic"} and cfg.max_position_embeddings > 128:
        rope("rope scaled from the first token", lambda r: {"rope_type": "linear"})
    elif kinds:
        rope("rope scaling absent", lambda r: {"rope_type": "default"})
    if kinds & {"yarn", "longrope"}:
        rope("attention factor absent", lambda r: {"attention_factor": 1.0})
    if "yarn" in kinds:
        rope("correction range rounded otherwise", lambda r: {"truncate": not r.get("truncate", True)})
    if len(ropes) == 1 and ropes[0]["rope_theta"] != 10000.0:
        rope("rope theta 10000", lambda r: {"rope_theta": 10000.0})
    if len(ropes) > 1:
        full = cfg.rope_parameters["full_attention"]
        config("one rope for all layers", rope_parameters={kind: full for kind in cfg.rope_parameters})
        rope("thetas exchanged", lambda r: {"rope_theta": next(p["rope_theta"] for p in ropes if p != r)})
    if ropes[0].get("partial_rotary_factor", 1.0) != 1.0:
        rope("rope over the whole head", lambda r: {"partial_rotary_factor": 1.0})
    if 0 in get("no_rope_layers", []):
        config("rope in every layer", no_rope_layers=[1] * cfg.num_hidden_layers)
        config("rope in the other layers", no_rope_layers=[1 - x for x in cfg.no_rope_layers])

    if any(windows(cfg)):
        config("window longer by one", 1e-5, sliding_window=cfg.sliding_window + 1)
        config("window absent", sliding_window=10**6)
    elif raw.get("sliding_window"):
        everywhere = ["sliding_attention"] * cfg.num_hidden_layers
        config("window though switched off", sliding_window=raw["sliding_window"], layer_types=everywhere)
    if len(set(windows(cfg))) > 1:
        other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
        config("windows in the other layers", layer_types=[other[x] for x in cfg.layer_types])
    if cfg.model_type == "gemma2":
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if get(key):
                config(f"{key} absent", **{key: None})
    if gemma:

        @model("norm weight without the one")
        def _(m, *_):
            for name, x in m.named_parameters():
                if name.endswith("norm.weight"):
                    x.data -= 1.0

        @model("embedding not scaled")
        def _(m, *_):
            m.model.embed_tokens.embed_scale.fill_(1.0)

    attention_norms = get("use_qk_norm", cfg.model_type in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2"))
    if attention_norms:

        @model("q_norm, k_norm absent")
        def _(m, *_):
            for layer in m.model.layers:
                layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()

    if cfg.model_type == "olmo2":

        @model("q_norm, k_norm per head")
        def _(m, *_):
            for norm in (n for layer in m.model.layers for n in (layer.self_attn.q_norm, layer.self_attn.k_norm)):
                weight = norm.weight.data

                def per_head(x, weight=weight, norm=norm):
                    heads = x.unflatten(-1, (-1, k))
                    heads = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
                    return heads.flatten(-2) * weight

                norm.forward = per_head

    qkv_bias = get("attention_bias", False) or cfg.model_type == "qwen2" or get("qkv_bias", False)
    if qkv_bias:
        model("q, k, v bias absent")(zero("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"))
    if get("attention_bias", False) and cfg.model_type != "glm4_moe":
        model("o bias absent")(zero("self_attn.o_proj.bias"))
    if get("mlp_bias", False):
        model("mlp bias absent")(zero("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"))
    if get("hidden_act", get("hidden_activation")) != "silu":
        # The two forms of gelu differ by less than the tolerance of a KL; the activations tell them apart.
        for name, act, least in (("silu", torch.nn.SiLU(), 1e-3), ("gelu by erf", torch.nn.GELU(), 0.0)):

            @model(f"{name} instead", least)
            def _(m, *_, act=act):
                for layer in m.model.layers:
                    layer.mlp.act_fn = act

    if mixture:
        config("one expert fewer", num_experts_per_tok=mixture - 1)
        sigmoid = cfg.model_type == "glm4_moe"

        def weights(change):
            """Makes the router's weights `change(logits, router)` gathered at the experts that it took."""

            def spoil(m, *_):
                def hook(router, _, output):
                    logits, _, ids = output
                    return logits, change(logits, router).gather(1, ids).to(logits.dtype), ids

                for layer in m.model.layers:
                    if hasattr(layer.mlp, "gate"):
                        layer.mlp.gate.register_forward_hook(hook)

            return spoil

        if cfg.model_type == "mixtral":
            model("router weights not normalised")(weights(lambda x, _: x.softmax(-1)))
        else:
            config("norm_topk_prob the other way", norm_topk_prob=not cfg.norm_topk_prob)
        if sigmoid:
            model("correction bias absent")(zero("e_score_correction_bias"))
            if not cfg.norm_topk_prob:
                model("correction bias in the weights")(
                    weights(lambda x, r: (x.sigmoid() + r.e_score_correction_bias) * r.routed_scaling_factor)
                )
            config("expert groups absent", n_group=1, topk_group=1)
            config("routed_scaling_factor absent", routed_scaling_factor=1.0)
            model("shared experts absent")(zero("shared_experts.down_proj.weight"))
        if cfg.model_type == "qwen2_moe":
            model("shared expert absent")(zero("shared_expert.down_proj.weight"))

            @model("shared expert's gate absent")
            def _(m, *_):
                for layer in m.model.layers:
                    if hasattr(layer.mlp, "shared_expert_gate"):
                        layer.mlp.shared_expert_gate.register_forward_hook(lambda _, __, x: x * 0 + 1e3)

    return out


def sensitivity(folder, tokens, golden):
    from unittest import mock

    out, raw = {}, json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, (edit, change, least) in misreadings(load(folder, "float64", "eager").config, raw).items():
        model = load(folder, "float64", "eager", edit)
        code, patches = sys.modules[type(model).__module__], []

        def patch(owner, attribute, value, patches=patches):
            patches.append(mock.patch.object(owner, attribute, value))
            patches[-1].start()

        try:
            if change:
                change(model, code, patch)
            out[name] = float(kl(golden, forward(model, tokens)[0]).max())
        finally:
            for p in patches:
                p.stop()
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
    best = np.stack([np.argsort(-row, kind="stable")[:TOP_K] for row in logits])
    rest = [logsumexp(np.delete(row, ids))[0] for row, ids in zip(logits, best)]
    return {
        "top_ids": best.astype(np.int32),
        "top_logits": np.take_along_axis(logits, best, -1).astype(np.float32),
        "rest_lse": np.array(rest),
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


def stored_layers(model):
    """First and last, and one of each further kind (windowed, with experts, rotated), at most three."""

    def kind(i):
        block = model.model.layers[i]
        return windows(model.config)[i], type(block.mlp), bool(getattr(block.self_attn, "use_rope", True))

    chosen = sorted({0, model.config.num_hidden_layers - 1})
    for i in range(model.config.num_hidden_layers):
        if len(chosen) < 3 and kind(i) not in map(kind, chosen):
            chosen = sorted([*chosen, i])
    return chosen


def stored_positions(count, window):
    """Both ends, both sides of the window's edge, and others evenly between."""
    import numpy as np

    edge = {window - 1, window} if window and window < count else set()
    chosen = {0, min(1, count - 1), count - 1} | edge
    between = np.linspace(0, count - 1, ACTIVATION_POSITIONS - len(chosen) + 2)[1:-1]
    return sorted(chosen | set(between.round().astype(int).tolist()))


def golden(folder, tokens, prompts, layers, reference, narrow, greedy_tokens):
    """Arrays for the npz, float64 logits, and what the manifest says of them. `prompts`: (text or None, ids)."""
    import numpy as np

    model = load(folder, reference, "eager")
    cfg = model.config
    vocab, last = cfg.vocab_size, cfg.num_hidden_layers - 1
    if min(tokens) < 0 or max(tokens) >= vocab:
        raise GoldenError(f"token ids must lie in 0..{vocab}, found {min(tokens)}..{max(tokens)}")
    top = vocab > FULL_LOGITS_UP_TO
    if layers is None:
        layers = [] if top else stored_layers(model)
    if any(i > last for i in layers):
        raise GoldenError(f"--activations: layers must lie in 0..{last}, found {layers}")
    window = min((w for w in windows(cfg) if w), default=None)
    rows = stored_positions(len(tokens), window)
    # transformers would change the frequencies within a continuation that crosses this length; a cache cannot.
    longest = longest_with_same_frequencies(cfg)
    prompts = [(text, ids) for text, ids in prompts if longest is None or len(ids) + greedy_tokens <= longest]
    settle_frequencies(model, len(tokens))
    with exactly(model) as exact:
        logits, taps = forward(model, tokens, layers, rows)
        continued = [before_a_tie(text, *greedy(model, ids, greedy_tokens)) for text, ids in prompts]
    del model

    model = load(folder, "float32")
    f32, f32_taps = forward(model, tokens, layers, rows)
    for (text, ids), (expected, _) in zip(prompts, continued):
        if greedy(model, ids, len(expected))[0] != expected:
            raise GoldenError(f"prompt {text!r}: float32 and {reference} continue differently; choose another prompt")
    del model
    arrays = {"tokens": np.array(tokens, np.int32)} | logit_arrays(logits, top)
    f32_kl = kl(logits, f32, arrays.get("top_ids"))
    figures = {
        "f32": {
            "kl_mean": rounded(f32_kl.mean()),
            "kl_max": rounded(f32_kl.max()),
            "activation_relative_max": rounded(relative_error(f32_taps, taps)),
        }
    }
    for figure, limit in (("kl_max", "f32_kl_max"), ("activation_relative_max", "activation_relative")):
        if (figures["f32"][figure] or 0.0) > TOLERANCES[limit]:
            raise GoldenError(
                f"{folder}: {figure} of PyTorch's own float32 run must be at most {TOLERANCES[limit]:.0e}, "
                f"found {figures['f32'][figure]:.1e}: too near a choice that rounding decides"
            )
    del f32

    for name in TOLERANCES["kl_factor"] if narrow else ():
        narrow_kl = kl(logits, narrow_logits(folder, name, tokens), arrays.get("top_ids"))
        if not np.isfinite(narrow_kl).all():
            raise GoldenError(f"{folder}: PyTorch's own {name} run overflows; leave such runs out with --no-narrow")
        figures[name] = {"kl_mean": rounded(narrow_kl.mean()), "kl_max": rounded(narrow_kl.max())}
        if name == "bf16":
            arrays["bf16_kl"] = narrow_kl
    if layers:
        arrays["activation_positions"] = np.array(rows, np.int32)
    arrays |= {name: taps[name].astype(np.float32) for name in sorted(taps)}
    return (
        arrays,
        logits,
        {
            "model_type": cfg.model_type,
            "window": window,
            "reference_dtype": reference,
            "positions": len(tokens),
            "vocab_size": vocab,
            "logits": {"kind": "top", "k": TOP_K} if top else {"kind": "full"},
            "activations": layers,
            "router_gap": rounded(exact.router_gap) if exact.router_gap < float("inf") else None,
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


def update_manifest(out, change):
    """Applies `change` to the manifest in `out`, a new one if there is none."""
    path = out / "manifest.json"
    manifest = {"format": FORMAT, "version": VERSION, "tolerances": TOLERANCES, "blocks": None, "cases": []}
    if path.exists():
        manifest |= json.loads(path.read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise GoldenError(f"{path} is not a manifest of {FORMAT} version {VERSION}; give another --out")
    change(manifest)
    write_json(path, manifest)


def finish(out, entry):
    """Adds the hashes and puts the entry into the manifest."""
    folder = out / entry["name"]
    entry["command"], entry["versions"] = command(), versions()
    entry["files"] = {p.relative_to(out).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}

    def change(manifest):
        others = [c for c in manifest["cases"] if c["name"] != entry["name"]]
        manifest["cases"] = sorted([*others, entry], key=lambda c: c["name"])

    update_manifest(out, change)
    f32 = entry["pytorch"]["f32"]
    print(
        f"{entry['name']:18} T {entry['positions']:4}  V {entry['vocab_size']:6}  PyTorch: f32 KL {f32['kl_max']:.1e}"
        + (f"  activations {f32['activation_relative_max']:.1e}" if entry["activations"] else "")
        + "".join(
            f"  {name} KL mean {kl['kl_mean']:.1e} max {kl['kl_max']:.1e}"
            for name, kl in entry["pytorch"].items()
            if name != "f32"
        )
        + f"  greedy margin {min((g['min_margin'] for g in entry['greedy']), default=float('nan')):.1e}"
        + (f"  router gap {entry['router_gap']:.1e}" if entry["router_gap"] else "")
        + (
            f"  least sensitive {min(entry['sensitivity'].items(), key=lambda s: s[1])}"
            if "sensitivity" in entry
            else ""
        ),
        flush=True,
    )


def small_golden(out, name, cfg, seed, options, narrow):
    options = dict(options)
    count, gap = options.pop("positions", 88), options.pop("router_gap", 0.0)
    folder = out / name / "model"
    write_small_model(folder, cfg, seed, **options)
    tokens = clear_tokens(load(folder, "float64", "eager"), count, seed + 1, gap)
    arrays, logits, entry = golden(folder, tokens, [(None, tokens)], None, "float64", narrow, GREEDY_TOKENS)
    if any(len(g["tokens"]) < GREEDY_TOKENS for g in entry["greedy"]):
        raise GoldenError(f"{folder}: the greedy continuation meets a near tie; choose another seed")
    if (entry["router_gap"] or 1.0) < 1e-3:
        raise GoldenError(f"{folder}: the greedy continuation meets a near tie of experts; choose another seed")
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
    arrays, _, entry = golden(folder, tokens, prompts, layers, args.reference, not args.no_narrow, args.greedy_tokens)
    (out / name).mkdir(parents=True, exist_ok=True)
    write_npz(out / name / "golden.npz", arrays)
    sources = [p for p in sorted(folder.iterdir()) if p.suffix in (".json", ".model", ".safetensors")]
    finish(
        out,
        {"name": name, "model": {"model": args.model_id or name}, "npz": f"{name}/golden.npz", "text": text}
        | entry
        | {"source_files": {p.name: sha256(p) for p in sources}},
    )


# ------------------------------------------------------------------------------------------ vectors of single blocks


def block_vectors(out):
    """blocks.npz: float64 results of blocks that no model type here has, and of choices among equals."""
    import numpy as np
    import torch
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    rng, arrays = np.random.default_rng(7), {}
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    double = lambda x: torch.from_numpy(x).double()  # noqa: E731

    # attention with sinks, as gpt_oss
    t, h, g, k, window = 24, 6, 2, 8, 5
    inputs = {"q": 1.5 * normal(t, h, k), "k": 1.5 * normal(t, g, k), "v": normal(t, g, k), "sinks": normal(h)}
    block = torch.nn.Module()
    block.num_key_value_groups, block.sinks = h // g, double(inputs["sinks"])
    q, key, value = (double(inputs[name]).transpose(0, 1)[None] for name in "qkv")
    distance = torch.arange(t)[:, None] - torch.arange(t)
    for name, reach in (("out", t), ("out_window", window)):
        mask = torch.where((distance >= 0) & (distance < reach), 0.0, float("-inf")).double()
        result = eager_attention_forward(block.eval(), q, key, value, mask, scaling=k**-0.5)[0][0]
        arrays[f"sinks/{name}"] = result.numpy()
    arrays |= {f"sinks/{name}": x for name, x in inputs.items()}

    # losses of routers: Mixtral's load balancing, and the z-loss of ST-MoE, equation 5
    layers, batch, length, experts, top = 3, 4, 10, 6, 2
    logits = 2.0 * normal(layers, batch * length, experts)
    mask = (np.arange(length) < np.array([10, 7, 4, 9])[:, None]).astype(np.int32)
    gates = tuple(double(logits))
    with exact_mode(torch.float64):
        losses = [load_balancing_loss_func(gates, experts, top, m) for m in (None, torch.from_numpy(mask))]
    arrays |= {"balance/logits": logits, "balance/k": np.array(top, np.int32), "balance/mask": mask}
    arrays |= {"balance/loss": losses[0].numpy(), "balance/loss_masked": losses[1].numpy()}
    arrays["z/loss"] = double(logits).logsumexp(-1).square().mean().numpy()

    # which of equal scores torch.topk takes; the last row is all equal
    for experts, top in ((4, 2), (8, 2), (8, 3), (16, 4), (64, 2), (64, 6), (128, 2), (128, 8), (160, 6)):
        scores = rng.integers(0, 4, (64, experts)).astype(np.float32)
        scores[-1] = 0.0
        arrays[f"ties/{experts}_{top}/scores"] = scores
        arrays[f"ties/{experts}_{top}/ids"] = torch.topk(torch.from_numpy(scores), top).indices.int().numpy()

    write_npz(out / "blocks.npz", arrays)
    entry = {"npz": "blocks.npz", "command": command(), "versions": versions(), "sha256": sha256(out / "blocks.npz")}
    update_manifest(out, lambda manifest: manifest.update(blocks=entry))
    print(f"blocks             {len(arrays)} arrays")


def run(args):
    import torch
    import transformers

    torch.set_num_threads(1)  # sums in the same order whatever the number of cores
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.model:
        return user_golden(args, out)
    cases = small_cases()
    for name in args.cases or cases:
        if name not in cases:
            raise GoldenError(f"--cases: expected some of {', '.join(cases)}, found {name}")
        small_golden(out, name, *cases[name], not args.no_narrow)
    if not args.cases:
        block_vectors(out)


if __name__ == "__main__":
    main()
