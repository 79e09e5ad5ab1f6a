"""Products of the C++ kernels by kind, rows and level, beside what one core can do at most.

One thread, and its processor time, so that other work beside it counts little; the best of some
rounds in turns with the ceilings: `torch._int_mm` (quantised kinds), torch's bfloat16 and float32
products, and a sum over memory. Matrices of one row are taken in turns from a pool beyond all
caches, those of many rows from one that the second cache holds.

    python benchmarks/native_products.py                        # all levels and kinds
    python benchmarks/native_products.py --levels avx2 --kinds Q4_K --rows 1 8 512
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from rorqual.ops import packed
from rorqual.ops.native import KINDS, level
from rorqual.ops.quant_types import QUANT_TYPES

LEVELS = ("avx512", "avx2", "portable")
SHAPES = ((1024, 512), (1024, 1024), (4096, 4096))  # outputs, inputs
POOL_BYTES = 1 << 29
ROUNDS = 9
CEILING_SIZE = 1024


def best_time(act: Callable[[], object]) -> float:
    """Seconds of this thread's processor time."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.thread_time()
        act()
        best = min(best, time.thread_time() - began)
    return best


def ceiling(kind: str) -> float:
    """Operations a second of torch's best product with such operands."""
    shape = CEILING_SIZE, CEILING_SIZE
    if kind in ("BF16", "F32"):
        x = torch.randn(shape, dtype=torch.bfloat16 if kind == "BF16" else torch.float32)
        return 2 * CEILING_SIZE**3 / best_time(lambda: x @ x)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    return 2 * CEILING_SIZE**3 / best_time(lambda: torch._int_mm(codes, codes))


def pool_of(kind: str, num: int, num_rows: int, num_columns: int) -> torch.Tensor:
    """One random matrix, many times: packed (E, P)."""
    num_bytes = QUANT_TYPES[kind].num_bytes(num_columns)
    codes = torch.randint(0, 60, (1, num_rows, num_bytes), dtype=torch.uint8)
    return packed.pack(codes, kind, num_columns).repeat(num, 1)


def measure(kind: str, rows: list[int]) -> None:
    most_ops, memory = ceiling(kind), torch.ones(POOL_BYTES // 8, dtype=torch.int64)
    most_bytes = POOL_BYTES / best_time(memory.sum)
    print(f"{level()} {kind}: at most {most_ops / 1e9:.0f} GOP/s, {most_bytes / 1e9:.1f} GB/s")
    for num_rows, num_columns in SHAPES:
        size = num_rows * QUANT_TYPES[kind].num_bytes(num_columns)
        pool_EP = pool_of(kind, max(1, POOL_BYTES // size), num_rows, num_columns)
        found = []
        for num in rows:
            used_EP = pool_EP if num <= 8 else pool_EP[:1]
            x = torch.randn(num * len(used_EP), num_columns)
            counts_E = torch.full((len(used_EP),), num)
            seconds = best_time(lambda: packed.multiply(x, used_EP, kind, num_rows, counts_E))  # noqa: B023
            ops = 2 * len(x) * num_rows * num_columns / seconds
            text = f"{num}: {ops / 1e9:.0f} GOP/s ({ops / most_ops:.0%})"
            if num <= 8:
                rate = len(used_EP) * size / seconds
                text += f", {rate / 1e9:.1f} GB/s ({rate / most_bytes:.0%})"
            found.append(text)
        print(f"  {num_rows} x {num_columns}, rows {'; '.join(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", nargs="*", default=LEVELS)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 2, 4, 8, 64, 512])
    parser.add_argument("--here", action="store_true", help="at this process's level")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.here:
        for kind in arguments.kinds:
            measure(kind, arguments.rows)
        return
    rows = [str(num) for num in arguments.rows]
    for name in arguments.levels:
        command = [sys.executable, __file__, "--here", "--kinds", *arguments.kinds, "--rows", *rows]
        subprocess.run(command, env=os.environ | {"RORQUAL_CPU": name}, check=True)


if __name__ == "__main__":
    main()
