#!/usr/bin/env python3
"""What packed weights cost in quality, beside llama.cpp's Q8_0 and Q4_0 of the same checkpoint, on the same tokens.

    python3 scripts/quality_peers.py TEXT [--model DIR] [--tokens 4096] [--context 512] [--json]

Both sides cut the text's first --tokens tokens into windows of --context and predict every token of a window but the
first. Perplexity is exp of the mean negative log-likelihood; KL is KL(f32 ‖ quantised) of each position's distribution
over the whole vocabulary, in nats, its mean and its largest value. xllama's f32 is the base of xllama's rows and
llama.cpp's F32 file the base of llama.cpp's (two f32 runs agree to 1e-4 in perplexity: the first rows show it).

llama.cpp quantises the F32 file itself (llama_model_quantize), once with every matrix of the named type as xllama has
them (`pure`), once as it does by itself, which keeps the head of a Q4_0 file finer. Its logits come through
llama-cpp-python in the environment of bench_peers.py, with a key/value cache in f16, as xllama's packed models have.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import bench_peers as peers

OURS = ["bf16", "f16", "int8", "int4"]
FTYPES = {"Q8_0": 7, "Q4_0": 2}  # llama_ftype


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("text", metavar="TEXT", help="a UTF-8 text file")
    ap.add_argument("--model", metavar="DIR", help="a checkpoint in Hugging Face form (default: SmolLM2-135M)")
    ap.add_argument("--tokens", type=int, default=4096, metavar="N", help="of the text (default: %(default)s)")
    ap.add_argument("--context", type=int, default=512, metavar="N", help="of a window (default: %(default)s)")
    ap.add_argument("--xllama", metavar="BIN", help="the binary (default: target/release/xllama, else on PATH)")
    ap.add_argument("--ours", default=",".join(OURS), help="xllama's dtypes, comma-separated (default: %(default)s)")
    ap.add_argument("--json", action="store_true", help="JSON on standard output, the table on standard error")
    ap.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = ap.parse_args()
    if not 2 <= args.context <= args.tokens:
        ap.error(f"--context must be between 2 and --tokens {args.tokens}, found {args.context}")
    return args


def xllama_score(xllama, args, dtype):
    command = [xllama, "perplexity", args.text, "--model", args.model, "--dtype", dtype, "--kl-base", "f32"]
    command += ["--max-tokens", args.tokens, "--context", args.context, "--json", "--quiet"]
    out = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True)
    if out.returncode != 0:
        raise peers.BenchError(f"xllama perplexity --dtype {dtype} failed")
    return {key: json.loads(out.stdout)[key] for key in ("perplexity", "kl_mean", "kl_max", "tokens")}


# ------------------------------------------------------------------------------- inside llama.cpp's own environment


def quantised(api, source, name, pure):
    """The F32 file in another type, beside it."""
    path = source.with_suffix(f".{name}{'-pure' if pure else ''}.gguf")
    if not path.exists():
        params = api.llama_model_quantize_default_params()
        params.ftype, params.pure = FTYPES[name], pure
        partial = path.with_suffix(f".partial-{os.getpid()}")
        if api.llama_model_quantize(str(source).encode(), str(partial).encode(), params) != 0:
            raise peers.BenchError(f"llama.cpp could not quantise {source} to {name}")
        partial.rename(path)
    return path


def head_of(path):
    """The stored type of the matrix that makes the logits."""
    import gguf

    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    return types.get("output.weight") or types["token_embd.weight"]


class Model:
    """Logits of llama.cpp for a whole window."""

    def __init__(self, api, path, context, cache):
        import gguf

        self.api = api
        model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not model:
            raise peers.BenchError(f"llama.cpp could not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = context
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.type_k = params.type_v = int(gguf.GGMLQuantizationType[cache])
        self.context = api.llama_init_from_model(model, params)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(context, 0, 1)

    def log_probabilities(self, ids):
        """(tokens, vocabulary), float64 sums"""
        import numpy as np

        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(ids)
        for i, id in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = id, i, 1
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
        if self.api.llama_decode(self.context, self.batch) != 0:
            raise peers.BenchError("llama_decode failed")
        rows = self.api.llama_get_logits(self.context)
        x = np.ctypeslib.as_array(rows, (len(ids), self.vocab)).astype(np.float64)
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))


def work(args):
    """Prints {row: {perplexity, kl_mean, kl_max, tokens, head}} of llama.cpp."""
    import llama_cpp as api
    import numpy as np
    from tokenizers import Tokenizer

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = json.loads((Path(args.model) / "config.json").read_text())
    args.dtype = "f32"
    source = peers.gguf_of(args, config)
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    ids = tokenizer.encode(Path(args.text).read_text()).ids[: args.tokens]
    if len(ids) < 2:
        raise peers.BenchError(f"{args.text} has {len(ids)} tokens, two are needed")
    api.llama_backend_init()
    files = {"F32": source}
    files |= {f"{name}, pure": quantised(api, source, name, True) for name in FTYPES}
    files |= {f"{name}, by itself": quantised(api, source, name, False) for name in FTYPES}
    models = {row: Model(api, path, args.context, "F32" if row == "F32" else "F16") for row, path in files.items()}
    nll, kl, count = dict.fromkeys(models, 0.0), {row: [] for row in models}, 0
    for begin in range(0, len(ids) - 1, args.context):
        window = ids[begin : begin + args.context]
        base = None
        for row, model in models.items():
            p = model.log_probabilities(window)[:-1]
            base = p if base is None else base
            nll[row] -= p[np.arange(len(p)), window[1:]].sum()
            kl[row].append((np.exp(base) * (base - p)).sum(-1))
        count += len(window) - 1
        peers.say(f"llama.cpp: {min(begin + args.context, len(ids))} of {len(ids)} tokens")
    rows = {}
    for row, path in files.items():
        divergence = np.concatenate(kl[row])
        rows[row] = {
            "perplexity": math.exp(nll[row] / count),
            "kl_mean": float(divergence.mean()),
            "kl_max": float(divergence.max()),
            "tokens": count,
            "head": head_of(path),
        }
    print(json.dumps(rows), file=answers, flush=True)


def main():
    args = parse_arguments()
    try:
        if args.worker:
            return work(args)
        args.text = os.path.abspath(args.text)
        xllama = peers.find_xllama(args)
        (peers.CACHE / "bench").mkdir(parents=True, exist_ok=True)
        args.model = os.path.abspath(args.model or peers.default_model(xllama))
        command = [peers.environment("llama.cpp"), __file__, args.text, "--worker", "--model", args.model]
        command += ["--tokens", args.tokens, "--context", args.context]
        log = peers.CACHE / "bench" / "quality.log"
        with open(log, "wb") as errors:
            out = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=errors, text=True)
        if out.returncode != 0:
            raise peers.BenchError(f"llama.cpp's part failed; its log is {log}")
        theirs = json.loads(out.stdout)
        ours = {dtype: xllama_score(xllama, args, dtype) for dtype in args.ours.split(",") if dtype}
    except peers.BenchError as e:
        sys.exit(f"error: {e}")
    table = sys.stderr if args.json else sys.stdout
    print(f"{Path(args.model).name}, {args.tokens} tokens in windows of {args.context}", file=table)
    print(f"{'':10} {'':18} {'head':6} {'perplexity':>10} {'mean KL':>10} {'max KL':>10}", file=table)
    for engine, rows in (("llama.cpp", theirs), ("xllama", ours)):
        for row, s in rows.items():
            figures = f"{s['perplexity']:10.4f} {s['kl_mean']:10.3e} {s['kl_max']:10.3e}"
            print(f"{engine:10} {row:18} {s.get('head', ''):6} {figures}", file=table)
    if args.json:
        print(json.dumps({"xllama": ours, "llama.cpp": theirs}))


if __name__ == "__main__":
    main()
