#!/usr/bin/env python3
"""Make the GGUF fixtures of converter/tests with the `gguf` package, the independent reader and writer.

    pip install gguf==0.19.0 numpy==2.4.6
    python3 scripts/make_gguf_vectors.py converter/tests/data

Needs the SentencePiece fixtures of make_tokenizer_vectors.py in that folder (its pip requirement too). Writes
  gguf_vectors.npz  for every type that is read: random blocks, and their values by gguf.quants.dequantize
  tiny.gguf         a whole model: grouped heads, head size not hidden / heads, biases, separate output head, llama3
                    rotary factors, SentencePiece tokenizer, a mix of types
  tiny.npz          the first rows (at most 64) of its tensors in Hugging Face's names and order
"""
import importlib.metadata, io, json, math, os, sys, zipfile

import gguf
import numpy as np
import sentencepiece.sentencepiece_model_pb2 as spm
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

SEED = 20240301
TYPES = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K]
# Where each type keeps its float16 scales, in bytes from the start of the block.
SCALES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82], T.Q3_K: [108],
          T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
# Both zeros, the smallest subnormal, the largest finite number, infinity.
EDGES = np.array([0x0000, 0x8000, 0x0001, 0x7BFF, 0x7C00], dtype=np.uint16)


def save_npz(path, arrays):
    """np.savez_compressed with fixed times, so that the same contents are the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array))
            archive.writestr(zipfile.ZipInfo(name + ".npy"), data.getvalue(), zipfile.ZIP_DEFLATED)


def random_blocks(rng, kind, count):
    """Blocks of random bits with scales of ordinary size; the last ones have a scale out of EDGES."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = rng.normal(0, 0.05, count).astype(np.float16).view(np.uint16)
        scale[count - len(EDGES):] = EDGES
        blocks[:, at:at + 2] = scale.view(np.uint8).reshape(count, 2)
    return blocks


def vectors(rng):
    out = {}
    for kind in TYPES:
        if kind == T.F32:
            raw = rng.integers(0, 2**32, 256, dtype=np.uint32)
            raw[np.isnan(raw.view(np.float32))] = 0x7F800000
            raw = raw.view(np.uint8)
        elif kind in (T.F16, T.BF16):
            raw = np.arange(2**16, dtype=np.uint16)[:: 13 if kind == T.F16 else 61]
            wide = raw.view(np.float16) if kind == T.F16 else (raw.astype(np.uint32) << 16).view(np.float32)
            raw = raw[~np.isnan(wide)].view(np.uint8)
        else:
            raw = random_blocks(rng, kind, 9 if gguf.GGML_QUANT_SIZES[kind][0] == 256 else 24)
        with np.errstate(invalid="ignore", over="ignore"):
            values = dequantize(raw, kind).astype(np.float32).ravel()
        out[kind.name + "/blocks"] = raw.ravel()
        out[kind.name + "/values"] = values
    return out


def llama3_factors(theta, head_dim):
    """As the converter of llama.cpp writes them: float32 throughout."""
    frequencies = np.float32(1) / np.power(np.float32(theta), np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    out = []
    for frequency in frequencies:
        wavelength = np.float32(2 * math.pi) / frequency
        if wavelength < 8192 / 4:
            out.append(1)
        elif wavelength > 8192:
            out.append(32)
        else:
            smooth = (np.float32(8192) / wavelength - np.float32(1)) / np.float32(3)
            out.append(1 / ((1 - smooth) / np.float32(32) + smooth))
    return np.array(out, dtype=np.float32)


def tiny(path, rng, tokenizer):
    hidden, heads, kv_heads, head_dim, ff, layers, theta = 32, 4, 2, 16, 64, 1, 500000.0
    vocab = len(tokenizer.pieces)
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("tiny")
    w.add_block_count(layers)
    w.add_context_length(256)
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(ff)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(theta)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_vocab_size(vocab)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([p.piece for p in tokenizer.pieces])
    w.add_token_scores([p.score for p in tokenizer.pieces])
    w.add_token_types([p.type for p in tokenizer.pieces])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    expected = {}

    def add(name, hf, shape, kind, permute_heads=None):
        x = rng.normal(0, 0.1, shape).astype(np.float32)
        raw = quantize(x, kind)
        values = dequantize(raw, kind).astype(np.float32).reshape(shape)
        if permute_heads:  # the file has head rows interleaved: pairs (j, j + K/2) stand together
            half = shape[0] // permute_heads // 2
            values = values.reshape(permute_heads, half, 2, -1).swapaxes(1, 2).reshape(shape)
        w.add_tensor(name, raw, raw_dtype=kind)
        expected[hf] = values[:64]  # enough of the vocabulary's rows

    add("token_embd.weight", "model.embed_tokens.weight", (vocab, hidden), T.Q8_0)
    add("output_norm.weight", "model.norm.weight", (hidden,), T.F32)
    add("output.weight", "lm_head.weight", (vocab, hidden), T.Q4_0)
    w.add_tensor("rope_freqs.weight", llama3_factors(theta, head_dim))
    q, kv = heads * head_dim, kv_heads * head_dim
    b, h = "blk.0.", "model.layers.0."
    add(b + "attn_norm.weight", h + "input_layernorm.weight", (hidden,), T.F32)
    add(b + "attn_q.weight", h + "self_attn.q_proj.weight", (q, hidden), T.Q4_1, heads)
    add(b + "attn_q.bias", h + "self_attn.q_proj.bias", (q,), T.F32, heads)
    add(b + "attn_k.weight", h + "self_attn.k_proj.weight", (kv, hidden), T.BF16, kv_heads)
    add(b + "attn_k.bias", h + "self_attn.k_proj.bias", (kv,), T.F32, kv_heads)
    add(b + "attn_v.weight", h + "self_attn.v_proj.weight", (kv, hidden), T.Q5_0)
    add(b + "attn_v.bias", h + "self_attn.v_proj.bias", (kv,), T.F32)
    add(b + "attn_output.weight", h + "self_attn.o_proj.weight", (hidden, q), T.F16)
    add(b + "attn_output.bias", h + "self_attn.o_proj.bias", (hidden,), T.F32)
    add(b + "ffn_norm.weight", h + "post_attention_layernorm.weight", (hidden,), T.F32)
    add(b + "ffn_gate.weight", h + "mlp.gate_proj.weight", (ff, hidden), T.Q5_1)
    add(b + "ffn_up.weight", h + "mlp.up_proj.weight", (ff, hidden), T.F32)
    add(b + "ffn_down.weight", h + "mlp.down_proj.weight", (hidden, ff), T.Q4_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return expected


def main():
    out = sys.argv[1]
    rng = np.random.default_rng(SEED)
    versions = json.dumps({"gguf": importlib.metadata.version("gguf"), "numpy": np.__version__, "seed": SEED}).encode()
    about = np.frombuffer(versions, dtype=np.uint8)
    save_npz(os.path.join(out, "gguf_vectors.npz"), {**vectors(rng), "about": about})
    tokenizer = spm.ModelProto()
    with open(os.path.join(out, "spm_bpe.model"), "rb") as f:
        tokenizer.ParseFromString(f.read())
    save_npz(os.path.join(out, "tiny.npz"), {**tiny(os.path.join(out, "tiny.gguf"), rng, tokenizer), "about": about})


if __name__ == "__main__":
    main()
