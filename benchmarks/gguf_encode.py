"""The encoders of GGUF's types beside llama.cpp's: millions of values a second.

Both encode the same tensor with the same number of threads, in turns in one process; the best round
counts, as anything else that runs only slows one down. llama.cpp's quantiser is taken from
`build/llama-cpp` or from RORQUAL_LLAMA_CPP (see tests/weights/llama_cpp_oracle.py); without it only
ours is measured.

    python benchmarks/gguf_encode.py                        # every type, two threads
    python benchmarks/gguf_encode.py --types Q4_K --threads 1
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rorqual.ops.quant_types import K_QUANTS, SMALL_BLOCKS
from rorqual.ops.quantise import encode_blocks

ROWS, COLUMNS = 1024, 2048
PIECE_ROWS = 128

Encoder = Callable[[torch.Tensor, str], torch.Tensor]


def rate(encode: Encoder, x: torch.Tensor, name: str, threads: int) -> float:
    """Values a second over all threads, each with pieces of its own."""
    pieces = list(x.split(PIECE_ROWS))
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: encode(piece, name), pieces))
    return x.numel() / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="*", default=[*K_QUANTS, *SMALL_BLOCKS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "weights"))
    import llama_cpp_oracle as llama_cpp

    has_reference = llama_cpp.PYTHON.is_file()
    x = 0.02 * torch.randn(ROWS, COLUMNS)
    for name in arguments.types:
        encode_blocks(x[:PIECE_ROWS], name)  # warms up
        best = {"ours": 0.0, "llama.cpp": 0.0}
        for _ in range(arguments.rounds):
            best["ours"] = max(best["ours"], rate(encode_blocks, x, name, arguments.threads))
            if has_reference:
                theirs = rate(llama_cpp.quantised, x, name, arguments.threads)
                best["llama.cpp"] = max(best["llama.cpp"], theirs)
        shown = f"{name:5s} {best['ours'] / 1e6:7.1f} Melem/s"
        if has_reference:
            shown += f"  llama.cpp {best['llama.cpp'] / 1e6:7.1f}"
            shown += f"  ratio {best['ours'] / best['llama.cpp']:.2f}"
        print(shown, flush=True)


if __name__ == "__main__":
    main()
