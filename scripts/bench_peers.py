#!/usr/bin/env python3
"""Compare xllama's speed with its peers on this machine, in one interleaved run.

    python3 scripts/bench_peers.py [--model DIR] [--peers llama.cpp,candle] [--dtype f32|bf16|int8|int4] [--json]
    python3 scripts/bench_peers.py --shape llama-3.2-1b --dtype bf16 --peers none
    python3 scripts/bench_peers.py --train [--dtype f32|bf16] [--lora 8] [--batch 4] [--tokens 256] [--json]

Every engine reads the same checkpoint (a folder in Hugging Face form; by default SmolLM2, written into the cache by
`xllama export-hf smollm2-135m`; with --shape random weights of a known model's shape, drawn once into the cache),
prefills --prompt-tokens ids and then decodes --gen-tokens more, greedily, batch of 1.

What --dtype means: llama.cpp has every matrix as F32, BF16, Q8_0 or Q4_0 and its key/value cache as f32, bf16, f16 or
f16, as xllama has it; beside Q4_0 the embedding and the head are Q8_0, as both programs' own conversions have them for
this model. candle has f32 weights or the same Q8_0 and Q4_0 file, always with a cache in f32; jax and torch have f32 and bf16. Who lacks a dtype is left
out, with a word.

Each runs as a process that loads and warms up once and then does one repetition on command; the engines take turns
(in an order that rotates), and all but the one at work are stopped (SIGSTOP). Prefill ends when the first new token is
known, which needs the last position's logits only; decoding is one step a token. Ratios are medians of the rounds' own
ratios, since a machine's speed drifts.

With --train a repetition is one step of training, beside jax and torch: train_peers.py says what a step is.

Peers are installed on first use, each into a virtual environment in the cache folder (XDG_CACHE_HOME or ~/.cache, then
xllama/venvs), pinned below: jax 0.7 GB; torch 5.6 GB (shared with make_golden.py); llama.cpp is compiled from the
source package of llama-cpp-python for this very CPU, which needs a C++ compiler and takes 5 to 30 minutes, once;
candle is built by cargo for this very CPU, out of a generated project in the cache, in some minutes, once.
Needs python >= 3.11 with venv and pip, `cargo build --release` before, and an idle machine: on a busy one, engines
whose threads spin while they wait for each other (torch, llama.cpp) lose far more than the others.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

PEERS = {
    "jax": ("jax", ["jax[cpu]==0.10.2", "jaxlib==0.10.2", "numpy==2.4.6", "tokenizers==0.23.3"], []),
    "torch": (
        "golden",
        ["torch==2.15.0", "transformers==5.23.0", "safetensors==0.8.0", "tokenizers==0.23.3", "numpy==2.4.6"],
        [],
    ),  # as in make_golden.py, which shares the environment
    "llama.cpp": (
        "llama-cpp",
        ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6", "tokenizers==0.23.3"],
        ["--no-binary", "llama-cpp-python"],
    ),
    "candle": ("gguf", ["gguf==0.19.0", "numpy==2.4.6", "tokenizers==0.23.3"], []),  # and CANDLE_CARGO below
}
DTYPES = {
    "jax": ["f32", "bf16"],
    "torch": ["f32", "bf16"],
    "llama.cpp": ["f32", "bf16", "int8", "int4"],
    "candle": ["f32", "int8", "int4"],  # its products on a CPU take no bf16
}
TRAINING = ["jax", "torch"]  # who trains
GGUF_WEIGHTS = {"f32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
GGUF_CACHE = {"f32": "F32", "bf16": "BF16", "int8": "F16", "int4": "F16"}
CANDLE = "0.11.1"
SHAPES = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }
}
GREEDY_PROMPT, GREEDY_TOKENS = "Once upon a time", 16
REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xllama"


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", metavar="DIR", help="a checkpoint in Hugging Face form (default: SmolLM2-135M)")
    ap.add_argument("--shape", choices=SHAPES, help="random bf16 weights of this model's shape instead of --model")
    ap.add_argument("--peers", help=f"which of {', '.join(PEERS)}, comma-separated, or none (default: all that can)")
    ap.add_argument("--dtype", choices=GGUF_WEIGHTS, default="f32", help="of weights and arithmetic")
    ap.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    ap.add_argument("--gen-tokens", type=int, default=64, metavar="N")
    ap.add_argument("--repeat", "--rounds", type=int, default=7, metavar="N", help="rounds (default: %(default)s)")
    ap.add_argument("--cores", type=int, metavar="N", help="let every engine use N cores (default: all)")
    ap.add_argument("--xllama", metavar="BIN", help="the binary (default: target/release/xllama, else on PATH)")
    ap.add_argument("--without-xllama", action="store_true", help="only the peers")
    ap.add_argument("--json", action="store_true", help="JSON on standard output, the table on standard error")
    ap.add_argument("--train", action="store_true", help="one step of training instead of prefill and decoding")
    ap.add_argument("--batch", type=int, default=4, metavar="N", help="texts of a training step (default: %(default)s)")
    ap.add_argument("--tokens", type=int, default=256, metavar="N", help="of each such text (default: %(default)s)")
    ap.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank; 0: all weights")
    ap.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    ap.add_argument("--candle", metavar="BIN", help=argparse.SUPPRESS)
    ap.add_argument("--write-random", metavar="DIR", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if args.shape and args.model:
        ap.error("--shape and --model are two models: give one of them")
    able = TRAINING if args.train else list(PEERS)
    args.peers = able if args.peers is None else [p for p in args.peers.split(",") if p and args.peers != "none"]
    for peer in args.peers:
        if peer not in able:
            ap.error(f"--peers: expected some of {', '.join(able)}, found {peer}")
    for option in ("prompt_tokens", "gen_tokens") if args.train else ("batch", "tokens", "lora"):
        if getattr(args, option) != ap.get_default(option):
            ap.error(f"--{option.replace('_', '-')} is for runs with{'out' if args.train else ''} --train")
    if args.train and args.dtype not in ("f32", "bf16"):
        ap.error(f"--train: --dtype must be f32 or bf16, found {args.dtype}")
    # the last token of a text has no target
    for option, least in {"prompt_tokens": 1, "gen_tokens": 1, "repeat": 1, "batch": 1, "tokens": 2, "lora": 0}.items():
        if getattr(args, option) < least:
            ap.error(f"--{option.replace('_', '-')} must be at least {least}, found {getattr(args, option)}")
    return args


class BenchError(Exception):
    """Something that the person who runs this can mend."""


def say(text):
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------- the engines' processes


def environment(peer):
    """The interpreter of a virtual environment that holds the peer's packages; made on the first call."""
    import fcntl

    name, pins, options = PEERS[peer]
    venv = CACHE / "venvs" / f"{name}-{hashlib.sha256(chr(10).join(pins).encode()).hexdigest()[:12]}"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python, complete = venv / "bin" / "python", venv / "complete"
        if not complete.exists():
            say(
                f"installing {' '.join(pins)} into {venv} (once)"
                + ("; this compiles C++ and takes many minutes" if options else "")
            )
            try:
                subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True, stdout=sys.stderr)
                subprocess.run(
                    [python, "-m", "pip", "install", "--disable-pip-version-check", *options, *pins],
                    check=True,
                    stdout=sys.stderr,
                )
            except subprocess.CalledProcessError as e:
                raise BenchError(f"could not be installed: {e}") from None
            complete.touch()
    return python


def candle_binary():
    """The program that runs candle; compiled on the first call."""
    import fcntl

    key = hashlib.sha256((CANDLE_CARGO + CANDLE_MAIN).encode()).hexdigest()[:12]
    project = CACHE / "bench" / f"candle-{key}"
    binary = project / "target" / "release" / "candle-peer"
    with open(f"{project}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            (project / "src").mkdir(parents=True, exist_ok=True)
            (project / "Cargo.toml").write_text(CANDLE_CARGO)
            (project / "src" / "main.rs").write_text(CANDLE_MAIN)
            say(f"building candle {CANDLE} in {project} (once; this takes some minutes)")
            flags = {"CARGO_TARGET_DIR": str(project / "target"), "RUSTFLAGS": "-C target-cpu=native"}
            try:
                subprocess.run(
                    ["cargo", "build", "--release"], cwd=project, env=os.environ | flags, check=True, stdout=sys.stderr
                )
            except (OSError, subprocess.CalledProcessError) as e:
                raise BenchError(f"could not be built: {e}") from None
    return binary


class Engine:
    """A process that prints {"ready": true} when loaded, and for each line `run` one JSON object with prefill_tok_s and
    decode_tok_s, or what train_peers.py asks for. Stopped whenever it is not its turn."""

    def __init__(self, name, command):
        self.name, self.log = name, CACHE / "bench" / f"{name}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.ready = self.read()
        self.versions = self.ready.get("versions")
        self.process.send_signal(signal.SIGSTOP)

    def read(self):
        line = self.process.stdout.readline()
        try:
            return json.loads(line)
        except ValueError:
            try:
                self.process.wait(5)  # the end of its log
            except subprocess.TimeoutExpired:
                self.process.kill()
            last = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise BenchError(
                f"{self.name} ended or answered with no JSON ({line.strip()!r}); its log {self.log} ends: "
                + " | ".join(last)
            ) from None

    def ask(self, line):
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # read() tells why
        answer = self.read()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def end(self):
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def find_xllama(args):
    target = Path(os.environ.get("CARGO_TARGET_DIR") or REPOSITORY / "target") / "release" / "xllama"
    binary = args.xllama or (target if target.exists() else shutil.which("xllama"))
    binary = binary and shutil.which(binary)
    if not binary:
        raise BenchError(f"no xllama binary: expected {target} (cargo build --release) or --xllama BIN")
    return str(binary)


def default_model(xllama):
    folder = CACHE / "bench" / "smollm2-135m-hf"
    if not (folder / "config.json").exists():
        say(f"exporting smollm2-135m to {folder}")
        subprocess.run([xllama, "export-hf", "smollm2-135m", folder], check=True, stdout=sys.stderr)
    return str(folder)


def random_model(shape):
    """A folder with a config.json and bf16 weights drawn from a normal distribution; no tokenizer."""
    folder = CACHE / "bench" / f"{shape}-random"
    if (folder / "config.json").exists():
        return str(folder)
    python = environment("candle")
    say(f"drawing the weights of {shape} into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, __file__, "--write-random", folder, "--shape", shape], check=True, stdout=sys.stderr)
    return str(folder)


def write_random(folder, config):
    """model.safetensors and then, as the mark of a whole folder, config.json. Norms are 1, matrices deviate by 0.02."""
    import numpy as np

    layers, h, g, k = sizes(config)
    m, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, m), "model.norm.weight": (m,)}
    for i in range(layers):
        parts = {
            "self_attn.q_proj": (h * k, m),
            "self_attn.k_proj": (g * k, m),
            "self_attn.v_proj": (g * k, m),
            "self_attn.o_proj": (m, h * k),
            "mlp.gate_proj": (f, m),
            "mlp.up_proj": (f, m),
            "mlp.down_proj": (m, f),
            "input_layernorm": (m,),
            "post_attention_layernorm": (m,),
        }
        shapes |= {f"model.layers.{i}.{part}.weight": shape for part, shape in parts.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            count = math.prod(shape)
            # One million values, repeated: drawing all of them takes a minute and reads no faster.
            a = draw.standard_normal(min(count, 1 << 20), np.float32) * np.float32(0.02)
            a = a if len(shape) > 1 else np.ones(m, np.float32)
            bits = (a.view(np.uint32) >> 16).astype(np.uint16)
            for begin in range(0, count, bits.size):
                file.write(bits[: count - begin].tobytes())
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def xllama_greedy(xllama, args):
    out = subprocess.run(
        [
            xllama,
            "generate",
            GREEDY_PROMPT,
            "--model",
            args.model,
            "--dtype",
            args.dtype,
            "--json",
            "--temperature",
            "0",
            "--max-tokens",
            str(GREEDY_TOKENS),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if out.returncode != 0:
        raise BenchError(f"xllama generate failed: {out.stderr.strip()}")
    return json.loads(out.stdout)["tokens"]


# ------------------------------------------------------------------------------------------------------ the driver


def summary(samples):
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "samples": samples}


def busy_cores():
    """How many cores others keep busy, seen over a second in which every engine is stopped."""

    def idle():
        return sum(int(x) / os.sysconf("SC_CLK_TCK") for x in Path("/proc/stat").read_text().split()[4:6])

    begin, before = time.perf_counter(), idle()
    time.sleep(1.0)
    return max(0.0, os.cpu_count() - (idle() - before) / (time.perf_counter() - begin))


def warn_if_busy():
    busy = busy_cores()
    if busy > 0.2:
        say(f"warning: other processes keep {busy:.1f} of {os.cpu_count()} cores busy; the figures will not be fair")
    return busy


def prepare(args):
    """Settles cores, folders and the model. -> the path of xllama, or None"""
    if args.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # the engines inherit it
    (CACHE / "bench").mkdir(parents=True, exist_ok=True)
    xllama = None if args.without_xllama else find_xllama(args)
    if args.shape:
        args.model = random_model(args.shape)
    elif args.model is None:
        if xllama is None:
            raise BenchError("--without-xllama needs --model DIR or --shape")
        args.model = default_model(xllama)
    args.model = os.path.abspath(args.model)
    return xllama


@contextlib.contextmanager
def loaded(args, ours, options):
    """(engines, who is left out and why): ours, by its command or None, and each of --peers, given the options."""
    engines, left_out = [], {}
    try:
        for name in [*(["xllama"] if ours else []), *args.peers]:
            try:
                if args.dtype not in DTYPES.get(name, [args.dtype]):
                    raise BenchError(f"has no {args.dtype} here")
                command = ours if name == "xllama" else [environment(name), __file__, *options, "--worker", name]
                if name == "candle":
                    command += ["--candle", candle_binary()]
                say(f"loading {name}")
                engines.append(Engine(name, command))
            except BenchError as e:
                if name == "xllama":
                    raise
                left_out[name] = str(e)
                say(f"left out: {name}: {e}")
        if not engines:
            raise BenchError("no engine left to measure")
        yield engines, left_out
    finally:
        for e in engines:
            e.end()


def in_turn(engines, i):
    """The order of round i."""
    shift = i % len(engines)
    return engines[shift:] + engines[:shift]


def drive(args):
    xllama = prepare(args)
    common = [
        "--model",
        args.model,
        "--dtype",
        args.dtype,
        "--prompt-tokens",
        args.prompt_tokens,
        "--gen-tokens",
        args.gen_tokens,
    ]
    ours = xllama and [xllama, "bench", *common, "--interactive"]
    with loaded(args, ours, common) as (engines, left_out):
        greedy = {}
        if (Path(args.model) / "tokenizer.json").exists():
            greedy = {
                e.name: xllama_greedy(xllama, args) if e.name == "xllama" else e.ask("greedy")["tokens"]
                for e in engines
            }
        busy = warn_if_busy()
        samples = {e.name: {"prefill_tok_s": [], "decode_tok_s": []} for e in engines}
        for e in engines:
            e.ask("run")  # warm: not counted
        for i in range(args.repeat):
            for e in in_turn(engines, i):
                answer = e.ask("run")
                for key, values in samples[e.name].items():
                    values.append(answer[key])
            say(
                f"round {i + 1} of {args.repeat}: "
                + "  ".join(f"{n} {s['prefill_tok_s'][-1]:.0f}/{s['decode_tok_s'][-1]:.1f}" for n, s in samples.items())
            )
    return report(args, {e.name: e.versions for e in engines}, samples, greedy, left_out, busy)


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "?")


def over_peers(samples):
    """{peer: {key: the median of the rounds' ratios, ours over the peer's}}"""
    ratios = {}
    for peer in samples.keys() - {"xllama"} if "xllama" in samples else ():
        ratios[peer] = {
            key: statistics.median(a / b for a, b in zip(ours, samples[peer][key]))
            for key, ours in samples["xllama"].items()
        }
    return ratios


def cell(values):
    s = summary(values)
    return f"{s['median']:8.1f} ({s['min']:.1f}–{s['max']:.1f})"


def report(args, versions, samples, greedy, left_out, busy):
    ratios = over_peers(samples)
    equal = len(set(map(tuple, greedy.values()))) <= 1
    cpu = cpu_name()
    result = {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "prompt_tokens": args.prompt_tokens,
        "gen_tokens": args.gen_tokens,
        "repeat": args.repeat,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "busy_cores_before": round(busy, 2),
        "versions": versions,
        "left_out": left_out,
        "results": {n: {key: summary(v) for key, v in s.items()} for n, s in samples.items()},
        "xllama_over_peer": ratios,
        "greedy_equal": equal,
        "greedy_tokens": greedy,
    }
    table = sys.stderr if args.json else sys.stdout

    print(f"{result['model']}, {args.dtype}, batch 1, {cpu}, {result['cores']} cores", file=table)
    print(f"tok/s, median (min–max) of {args.repeat} rounds", file=table)
    prefill, decode = f"prefill {args.prompt_tokens}", f"decode {args.gen_tokens}"
    print(f"{'':10} {prefill:>28} {'ours / it':>10} {decode:>28} {'ours / it':>10}", file=table)
    for name, s in samples.items():
        ratio = {key: f"{ratios[name][key]:.2f}" if name in ratios else "" for key in s}
        print(
            f"{name:10} {cell(s['prefill_tok_s']):>28} {ratio['prefill_tok_s']:>10} {cell(s['decode_tok_s']):>28} "
            f"{ratio['decode_tok_s']:>10}",
            file=table,
        )
    if greedy:
        print(
            f"first {GREEDY_TOKENS} greedy tokens after {GREEDY_PROMPT!r}: " + ("equal" if equal else "DIFFERENT"),
            file=table,
        )
        for name, tokens in {} if equal else greedy.items():
            print(f"    {name:10} {tokens}", file=table)
    if args.json:
        print(json.dumps(result))
    return 0 if equal or args.dtype != "f32" else 1


# --------------------------------------------------------------------------- inside a peer's environment: its engine


def answering():
    """A function that sends a value to the driver; what libraries print goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return lambda value: print(json.dumps(value), file=answers, flush=True)


def serve(args):
    """Answers the driver. An engine maps (ids, count) to (prefill seconds, decode seconds, 1 + count tokens)."""
    if args.worker == "candle":
        become_candle(args)
    answer = answering()
    config = json.loads((Path(args.model) / "config.json").read_text())
    engine, versions = {"jax": jax_engine, "torch": torch_engine, "llama.cpp": llama_cpp_engine}[args.worker](
        args, config
    )
    # the same ids everywhere; speed does not depend on which
    prompt = [(7919 * i + 17) % config["vocab_size"] for i in range(args.prompt_tokens)]
    engine(prompt, args.gen_tokens)
    answer({"ready": True, "versions": versions})
    for line in sys.stdin:
        if line.strip() == "greedy":
            from tokenizers import Tokenizer

            ids = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json")).encode(GREEDY_PROMPT).ids
            answer({"tokens": engine(ids, GREEDY_TOKENS - 1)[2]})
        else:
            prefill, decode, _ = engine(prompt, args.gen_tokens)
            answer({"prefill_tok_s": len(prompt) / prefill, "decode_tok_s": args.gen_tokens / decode})


def rope_of(config):
    """(theta, rope type, its parameters) in either of transformers' spellings."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (
        rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        rope.get("rope_type") or rope.get("type") or "default",
        rope,
    )


def inverse_frequencies(config, k):
    """Of a head of k channels: rope default, linear and llama3."""
    import numpy as np

    theta, kind, rope = rope_of(config)
    f = 1.0 / theta ** (np.arange(0, k, 2, dtype=np.float64) / k)
    if kind == "default":
        return f
    if kind == "linear":
        return f / rope["factor"]
    if kind != "llama3":
        raise BenchError(f"rope type {kind} is not supported here")
    low, high, turns = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"] * f / (2 * math.pi),
    )
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * f / rope["factor"] + smooth * f


def read_weights(folder):
    """name -> float32 array, from one or many safetensors files."""
    import numpy as np

    out = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        (size,) = struct.unpack("<Q", data[:8].tobytes())
        for name, t in json.loads(data[8 : 8 + size].tobytes()).items():
            if name == "__metadata__":
                continue
            a = data[8 + size + t["data_offsets"][0] : 8 + size + t["data_offsets"][1]]
            if t["dtype"] == "BF16":
                a = (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                a = a.view({"F32": np.float32, "F16": np.float16}[t["dtype"]]).astype(np.float32)
            out[name] = a.reshape(t["shape"])
    return out


def sizes(config):
    h = config["num_attention_heads"]
    g = config.get("num_key_value_heads") or h
    return config["num_hidden_layers"], h, g, config.get("head_dim") or config["hidden_size"] // h


def jax_engine(args, config):
    """A jitted Llama as one writes it for speed: weights are device arrays, q, k, v and gate, up joined into one matrix
    product each; the loop over layers is unrolled; the key/value cache is static and donated; prefill attends within
    the prompt only and computes the last position's logits; argmax is on the device; decoding feeds each step's token
    and position arrays straight to the next, so that dispatch runs ahead of the work and nothing comes back to the host
    before the end. Weights are (in, out) in f32 and (out, in) in bf16: of the two, the one that XLA's CPU compiler
    decodes faster (SmolLM2, 2 cores: 29 against 13 tok/s in f32, 16 against 3 in bf16; prefill does not care)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    layers, h, g, k = sizes(config)
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[args.dtype]
    eps = config.get("rms_norm_eps", 1e-6)
    act = {"silu": jax.nn.silu, "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True)}[
        config.get("hidden_act", "silu")
    ]
    frequencies = jnp.asarray(inverse_frequencies(config, k), jnp.float32)
    capacity = args.prompt_tokens + args.gen_tokens
    w = read_weights(args.model)
    if any(name.endswith(".bias") for name in w):
        raise BenchError("a checkpoint with biases is not supported by the jax peer")

    def matrix(a):  # (out, in) as in the checkpoint
        return jax.device_put(np.ascontiguousarray(a.T if dtype == jnp.float32 else a).astype(dtype))

    def product(x, a):
        return x @ (a if dtype == jnp.float32 else a.T)

    def joined(layer, *names):
        return matrix(np.concatenate([w[f"model.layers.{layer}.{n}.weight"] for n in names]))

    def vector(name):
        return jax.device_put(w[name].astype(dtype))

    params = {
        "embedding": vector("model.embed_tokens.weight"),
        "norm": vector("model.norm.weight"),
        "layers": [
            {
                "norm1": vector(f"model.layers.{i}.input_layernorm.weight"),
                "norm2": vector(f"model.layers.{i}.post_attention_layernorm.weight"),
                "qkv": joined(i, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "o": joined(i, "self_attn.o_proj"),
                "gate_up": joined(i, "mlp.gate_proj", "mlp.up_proj"),
                "down": joined(i, "mlp.down_proj"),
            }
            for i in range(layers)
        ],
    }
    params["head"] = matrix(w.get("lm_head.weight", w["model.embed_tokens.weight"]))

    def rms_norm(x, weight):
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(dtype) * weight

    def rotate(x, cos, sin):  # (heads, T, k)
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)

    def forward(params, cache, tokens, start):
        """tokens (T,) at positions start…; with T > 1 start must be 0. -> (best next token (1,), cache, next start)"""
        t = tokens.shape[0]
        positions = start + jnp.arange(t)
        angles = positions[:, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        visible = jnp.arange(t if t > 1 else capacity)[None, :] <= positions[:, None]
        x, new_cache = params["embedding"][tokens], []
        for p, (keys, values) in zip(params["layers"], cache):
            qkv = product(rms_norm(x, p["norm1"]), p["qkv"]).reshape(t, h + 2 * g, k).transpose(1, 0, 2)
            q, key, value = rotate(qkv[:h], cos, sin), rotate(qkv[h : h + g], cos, sin), qkv[h + g :]
            keys = jax.lax.dynamic_update_slice(keys, key, (0, start, 0))
            values = jax.lax.dynamic_update_slice(values, value, (0, start, 0))
            new_cache.append((keys, values))
            if t == 1:
                key, value = keys, values
            scores = jnp.einsum("grtk,gsk->grts", q.reshape(g, h // g, t, k), key, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(jnp.where(visible, scores * k**-0.5, -jnp.inf), axis=-1).astype(dtype)
            mixed = jnp.einsum("grts,gsk->tgrk", weights, value).reshape(t, h * k)
            x = x + product(mixed, p["o"])
            gate, up = jnp.split(product(rms_norm(x, p["norm2"]), p["gate_up"]), 2, axis=-1)
            x = x + product(act(gate) * up, p["down"])
        logits = product(rms_norm(x[-1:], params["norm"]), params["head"])
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), new_cache, start + t

    step = jax.jit(forward, donate_argnums=1)
    empty = jax.jit(
        lambda: [(jnp.zeros((g, capacity, k), dtype), jnp.zeros((g, capacity, k), dtype)) for _ in range(layers)]
    )

    def engine(ids, count):
        cache, ids, start = jax.block_until_ready((empty(), jnp.asarray(ids, jnp.int32), jnp.asarray(0, jnp.int32)))
        begin = time.perf_counter()
        token, cache, start = step(params, cache, ids, start)
        token.block_until_ready()
        middle = time.perf_counter()
        tokens = [token]
        for _ in range(count):
            token, cache, start = step(params, cache, token, start)
            tokens.append(token)
        jax.block_until_ready(tokens)
        end = time.perf_counter()
        return middle - begin, end - middle, [int(t[0]) for t in tokens]

    return engine, {"jax": jax.__version__, "jaxlib": jax.lib.__version__}


def torch_engine(args, config):
    """transformers' model with its default attention (sdpa) and growing cache, without the overhead of generate()."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()

    @torch.inference_mode()
    def engine(ids, count):
        cache, token, tokens, times = transformers.DynamicCache(config=model.config), torch.tensor([ids]), [], []
        times.append(time.perf_counter())
        for _ in range(1 + count):
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
            times.append(time.perf_counter())
        return times[1] - times[0], times[-1] - times[1], tokens

    return engine, {"torch": torch.__version__, "transformers": transformers.__version__}


def write_gguf(args, config, path):
    """The checkpoint as GGUF, every matrix in the run's type: query and key rows in the interleaved order that
    llama.cpp rotates, norms in float32, no vocabulary, rotary scaling as divisors of the plain frequencies."""
    import gguf
    import numpy as np

    layers, h, g, k = sizes(config)
    kind = gguf.GGMLQuantizationType[GGUF_WEIGHTS[args.dtype]]
    w = read_weights(args.model)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(h)
    writer.add_head_count_kv(g)
    writer.add_key_length(k)
    writer.add_value_length(k)
    writer.add_rope_dimension_count(k)
    theta = rope_of(config)[0]
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    divisors = theta ** -(np.arange(0, k, 2) / k) / inverse_frequencies(config, k)
    if abs(divisors - 1.0).max() > 1e-9:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, a in w.items():
        stem, suffix = name.rsplit(".", 1)
        if stem in whole:
            target = whole[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{parts[part]}"
            heads = {"attn_q": h, "attn_k": g}.get(parts[part])
            if heads:
                a = a.reshape(heads, 2, k // 2, -1).swapaxes(1, 2).reshape(a.shape)
        if a.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{target}.{suffix}", np.ascontiguousarray(a))
        else:
            eight = kind == gguf.GGMLQuantizationType.Q4_0 and stem in ("model.embed_tokens", "lm_head")
            own = gguf.GGMLQuantizationType.Q8_0 if eight else kind
            writer.add_tensor(f"{target}.{suffix}", gguf.quants.quantize(np.ascontiguousarray(a), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_of(args, config):
    """Where the checkpoint lies as GGUF; written on the first call."""
    if config.get("hidden_act", "silu") != "silu":
        raise BenchError(f"this architecture runs with silu only as GGUF, found {config['hidden_act']}")
    files = sorted(Path(args.model).glob("*.safetensors")) + [Path(args.model) / "config.json"]
    key = [
        str(Path(args.model).resolve()),
        args.dtype,
        "head in 8 bits",
        *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files),
    ]
    path = CACHE / "bench" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.gguf"
    if not path.exists():
        partial = path.with_suffix(f".partial-{os.getpid()}")
        write_gguf(args, config, partial)
        partial.rename(path)
    return path


def llama_cpp_engine(args, config):
    """llama.cpp through its C functions, with all cores; its micro-batches are its own 512, the rest is as it comes."""
    import gguf
    import llama_cpp as api
    import numpy as np

    path = gguf_of(args, config)
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    if not model:
        raise BenchError(f"llama.cpp could not load {path}")
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = args.prompt_tokens + args.gen_tokens
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    params.type_k = params.type_v = int(gguf.GGMLQuantizationType[GGUF_CACHE[args.dtype]])
    context = api.llama_init_from_model(model, params)
    vocab = config["vocab_size"]

    def best_after(ids):
        tokens = (api.llama_token * len(ids))(*ids)  # the batch borrows it
        if api.llama_decode(context, api.llama_batch_get_one(tokens, len(ids))) != 0:  # logits of the last only
            raise BenchError("llama_decode failed")
        return int(np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (vocab,)).argmax())

    def engine(ids, count):
        api.llama_memory_clear(api.llama_get_memory(context), True)
        begin = time.perf_counter()
        tokens = [best_after(ids)]
        middle = time.perf_counter()
        for _ in range(count):
            tokens.append(best_after(tokens[-1:]))
        return middle - begin, time.perf_counter() - middle, tokens

    return engine, {"llama-cpp-python": api.__version__}


def become_candle(args):
    """Replaces this process by candle's program, which speaks with the driver as serve() does."""
    config = json.loads((Path(args.model) / "config.json").read_text())
    weights, greedy, tokenizer = "-", [], Path(args.model) / "tokenizer.json"
    if args.dtype != "f32":
        weights = gguf_of(args, config)
    if tokenizer.exists():
        from tokenizers import Tokenizer

        greedy = Tokenizer.from_file(str(tokenizer)).encode(GREEDY_PROMPT).ids
    command = [args.candle, args.model, weights, args.prompt_tokens, args.gen_tokens, GREEDY_TOKENS]
    os.execv(args.candle, [str(c) for c in command] + [",".join(map(str, greedy))])


CANDLE_CARGO = f"""\
[package]
name = "candle-peer"
version = "0.0.0"
edition = "2024"

[dependencies]
candle-core = "={CANDLE}"
candle-nn = "={CANDLE}"
candle-transformers = "={CANDLE}"
serde_json = "1"

[profile.release]
lto = "thin"
codegen-units = 4

[workspace]
"""
CANDLE_MAIN = r"""
//! candle-peer MODEL_DIR GGUF|- PROMPT_TOKENS GEN_TOKENS GREEDY_TOKENS GREEDY_IDS: answers bench_peers.py.
//! Runs candle's quantised Llama on the GGUF, or its plain one in f32 on the folder.

use std::io::{BufRead, Write};
use std::time::Instant;

use candle_core::quantized::gguf_file;
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, quantized_llama};

enum Model {
    Float(llama::Llama, llama::Config),
    Quantized(quantized_llama::ModelWeights),
}

/// (prefill seconds, decode seconds, 1 + count tokens)
fn run(model: &mut Model, ids: &[u32], count: usize) -> Result<(f64, f64, Vec<u32>)> {
    let mut cache = match model {
        Model::Float(_, config) => Some(llama::Cache::new(true, DType::F32, config, &Device::Cpu)?),
        Model::Quantized(model) => {
            model.clear_kv_cache();
            None
        }
    };
    let (mut input, mut start, mut tokens, mut times) = (ids.to_vec(), 0, Vec::new(), vec![Instant::now()]);
    for _ in 0..1 + count {
        let x = Tensor::new(input.as_slice(), &Device::Cpu)?.unsqueeze(0)?;
        let logits = match (&mut *model, &mut cache) {
            (Model::Float(model, _), Some(cache)) => model.forward(&x, start, cache)?,
            (Model::Quantized(model), _) => model.forward(&x, start)?,
            (Model::Float(..), None) => unreachable!("a float model has a cache"),
        };
        let token = logits.argmax(D::Minus1)?.flatten_all()?.to_vec1::<u32>()?[0];
        start += input.len();
        input = vec![token];
        tokens.push(token);
        times.push(Instant::now());
    }
    Ok(((times[1] - times[0]).as_secs_f64(), (times[1 + count] - times[1]).as_secs_f64(), tokens))
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, gguf, prompt, gen_tokens, greedy_tokens, greedy] = args.as_slice() else {
        return Err("expected six arguments".into());
    };
    let (prompt, count, greedy_count): (usize, usize, usize) =
        (prompt.parse()?, gen_tokens.parse()?, greedy_tokens.parse()?);
    let greedy = greedy.split(',').filter(|s| !s.is_empty()).map(str::parse);
    let greedy = greedy.collect::<std::result::Result<Vec<u32>, _>>()?;
    let config: llama::LlamaConfig = serde_json::from_slice(&std::fs::read(format!("{folder}/config.json"))?)?;
    let vocab = config.vocab_size;
    let mut model = if gguf == "-" {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "safetensors") {
                files.push(path);
            }
        }
        let config = config.into_config(false);
        // SAFETY: nobody writes the checkpoint while this program runs.
        let weights = unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &Device::Cpu)? };
        Model::Float(llama::Llama::load(weights, &config)?, config)
    } else {
        let mut file = std::fs::File::open(gguf)?;
        let content = gguf_file::Content::read(&mut file)?;
        Model::Quantized(quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?)
    };
    let ids: Vec<u32> = (0..prompt).map(|i| ((7919 * i + 17) % vocab) as u32).collect();
    run(&mut model, &ids, count)?;
    let mut out = std::io::stdout();
    let mut answer = |value: serde_json::Value| -> std::io::Result<()> {
        writeln!(out, "{value}")?;
        out.flush()
    };
    answer(serde_json::json!({"ready": true, "versions": {"candle": "@VERSION@"}}))?;
    for line in std::io::stdin().lock().lines() {
        answer(if line?.trim() == "greedy" {
            serde_json::json!({"tokens": run(&mut model, &greedy, greedy_count - 1)?.2})
        } else {
            let (prefill, decode, _) = run(&mut model, &ids, count)?;
            serde_json::json!({"prefill_tok_s": prompt as f64 / prefill, "decode_tok_s": count as f64 / decode})
        })?;
    }
    Ok(())
}
""".replace("@VERSION@", CANDLE)


def main():
    args = parse_arguments()
    if sys.version_info < (3, 11):
        sys.exit(f"error: python must be 3.11 or later, found {sys.version.split()[0]}")
    try:
        if args.write_random:
            sys.exit(write_random(Path(args.write_random), SHAPES[args.shape]))
        if args.train:
            import train_peers

            sys.exit(train_peers.serve(args) if args.worker else train_peers.drive(args))
        sys.exit(serve(args) if args.worker else drive(args))
    except BenchError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    import bench_peers  # by the name that train_peers.py imports: a second copy would raise a BenchError of its own

    bench_peers.main()
