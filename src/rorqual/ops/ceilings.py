"""What this machine can do at most: the rate at which it reads memory, and that of its products.

`rorqual plan` and training want a few figures, measured once and kept in the user's cache
(`this_machine`): the file names the processor, and is measured anew where that is another one (a
home folder on several machines). `rorqual bench` measures again beside each of its rows.
"""

# M rows of activations, I inputs, O outputs

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rorqual.errors import RorqualError
from rorqual.files import cache_folder, read_json, write_json
from rorqual.log import console

READ_BYTES = 1 << 29  # beyond any cache
GEMM_SIZE = 2048
NUM_ROUNDS = 5
ENCODED_ROWS = 64
OF_STORAGE = {"float32": "float32", "F32": "float32", "bfloat16": "bf16", "BF16": "bf16"}
IN_FLOAT32 = ("decoded", "widened")
"""Kernels that make float32 of whatever is stored."""
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
CPUINFO = Path("/proc/cpuinfo")
GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Measured:
    """What this machine can do: bytes, bytes a second, FLOP/s by dtype."""

    machine: str
    day: str  # of the measurement, such as 2025-01-31
    memory_bytes: float
    bandwidth: float
    flops: dict[str, float]


@dataclass(frozen=True)
class Peak:
    """The products that one device can make, FLOP/s, and who says so."""

    flops: float
    source: str


@dataclass(frozen=True)
class ReadRate:
    """Bytes a second of a sum over memory, with torch's threads."""

    best: float
    median: float


@dataclass(frozen=True)
class GemmRate:
    """FLOP/s of (M, I) times (O, I), best of a few. `operands` is what is multiplied: float32, bf16
    or int8.
    """

    kernels: str
    operands: str
    shape: tuple[int, int, int]  # M, I, O
    flops: float


def slower(read_seconds: float, compute_seconds: float) -> tuple[float, str]:
    """What a piece of work takes at least, and what limits it: "bandwidth" or "compute"."""
    is_reading = read_seconds >= compute_seconds
    return max(read_seconds, compute_seconds), "bandwidth" if is_reading else "compute"


def cache_file() -> Path:
    return cache_folder() / "here.json"


def this_machine(file: Path | None = None, *, remeasure: bool = False) -> Measured:
    """The measured figures, from the cache if they are this machine's, unless `remeasure`."""
    file = file or cache_file()
    machine = describe_machine()
    table: dict[str, Any] = {}
    if file.is_file():
        try:
            table = read_json(file)
        except RorqualError:  # a broken cache is measured anew
            table = {}
    if remeasure or table.get("machine") != machine or not _is_whole(table):
        with console().status("measuring this machine, once"):
            table = {"machine": machine, "day": time.strftime("%Y-%m-%d"), **measure()}
        with suppress(OSError):  # a read-only home: measured anew next time
            write_json(file, table)
    flops = dict(table["flops"])
    return Measured(machine, table["day"], total_memory_bytes(), table["bandwidth"], flops)


def product_peak(operands: str, file: Path | None = None) -> Peak:
    """That of this machine with torch's threads, for `operands` float32 or bf16: the best that was
    ever measured, once a day, in a second. What others take of the processors does not count.
    """
    table: dict[str, Any] = {}
    with suppress(RorqualError):  # a broken cache, a user without a home: measured anew
        file = file or cache_folder() / "products.json"
        table = read_json(file) if file.is_file() else {}
    key, today = f"{operands}: {describe_machine()}", time.strftime("%Y-%m-%d")
    known = table.get(key)
    best, day = 0.0, None
    if isinstance(known, dict) and isinstance(known.get("flops"), int | float):
        best, day = float(known["flops"]), known.get("day")
    if day != today or best <= 0:
        best = max(best, _product_flops(operands, _busy_seconds))
        with suppress(OSError):
            if file is not None:
                write_json(file, {**table, key: {"flops": best, "day": today}})
    return Peak(best, f"square products on {describe_machine()}")


def _is_whole(table: dict[str, Any]) -> bool:
    flops = table.get("flops")
    numbers = [table.get("bandwidth"), *(flops.values() if isinstance(flops, dict) else [None])]
    has_all = isinstance(flops, dict) and {"bf16", "float32"} <= set(flops)
    has_all = has_all and _DAY.fullmatch(str(table.get("day"))) is not None
    return has_all and all(isinstance(n, (int, float)) and n > 0 for n in numbers)


def describe_machine() -> str:
    """The processor, its cores that we may use, and torch, which decides the speed of products."""
    import torch

    model = platform.processor() or platform.machine()
    if CPUINFO.exists():
        names = [line for line in CPUINFO.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    num = torch.get_num_threads()
    return f"{model}, {num} thread{'s' * (num != 1)}, torch {torch.__version__}"


def total_memory_bytes() -> float:
    """Physical memory, or the control group's limit if that is less."""
    total = _physical_bytes()
    if GROUP_LIMIT.exists() and (text := GROUP_LIMIT.read_text().strip()) != "max":
        total = min(total, int(text))
    return float(total)


def _physical_bytes() -> int:
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import ctypes

    status = (ctypes.c_ulonglong * 8)()  # Windows' MEMORYSTATUSEX: its size, then the total
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status[1]


def measure() -> dict[str, Any]:
    """Bytes a second of a reduction over memory, and FLOP/s of square products as the model
    computes them; best of a few.
    """
    flops = {name: _product_flops(name) for name in ("float32", "bf16")}
    return {"bandwidth": read_rate().best, "flops": flops}


def _product_flops(
    operands: str, seconds_of: Callable[[Callable[[], object]], float] | None = None
) -> float:
    import torch

    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[operands]
    state = torch.get_rng_state()  # who measures first trains the same
    with torch.no_grad():
        a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
        linear = _chosen(a)[1]
        seconds = (seconds_of or _best_seconds)(lambda: linear(a, a))
    torch.set_rng_state(state)
    return 2 * GEMM_SIZE**3 / seconds


def read_rate() -> ReadRate:
    import torch

    words = torch.ones(READ_BYTES // 4)
    seconds = _seconds(words.sum)
    return ReadRate(READ_BYTES / min(seconds), READ_BYTES / median(seconds))


def gemm_rates(shapes: Sequence[tuple[int, int, int]]) -> Iterator[GemmRate]:
    """Of each implementation that there is here for each (M, I, O), one after the other."""
    import torch

    with torch.inference_mode():
        for shape in shapes:
            for kernels, operands, multiply in _products(*shape):
                num_rows, num_inputs, num_outputs = shape
                work = 2 * num_rows * num_inputs * num_outputs
                yield GemmRate(kernels, operands, shape, work / _best_seconds(multiply))


def _products(
    num_rows: int, num_inputs: int, num_outputs: int
) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(kernels, operands, a product) for each implementation."""
    import torch
    import torch.nn.functional as F

    x_MI, weight_OI = torch.randn(num_rows, num_inputs), torch.randn(num_outputs, num_inputs)
    for operands, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        x, weight = x_MI.to(dtype), weight_OI.to(dtype)
        yield "torch", operands, lambda x=x, weight=weight: F.linear(x, weight)  # type: ignore[misc]
        name, linear = _chosen(weight)
        if linear is not F.linear:
            yield name, operands, lambda x=x, w=weight, f=linear: f(x, w)  # type: ignore[misc]
    x_int8, weight_int8 = (t.clamp(-3, 3).mul(40).to(torch.int8) for t in (x_MI, weight_OI))
    yield "torch._int_mm", "int8", lambda: torch._int_mm(x_int8, weight_int8.t())
    yield from _packed_products(x_MI, weight_OI)


def _packed_products(x_MI: Any, weight_OI: Any) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Those of the package's C++ kernels, for each kind that has the width."""
    import torch

    from rorqual.ops.native import KINDS
    from rorqual.ops.packed import can_pack, multiply, pack
    from rorqual.ops.quantise import encode_blocks

    num_outputs, counts = len(weight_OI), torch.tensor([len(x_MI)])
    for kind in KINDS:
        if not can_pack(kind, weight_OI.shape[1]):
            continue
        # A few rows, repeated: to encode them all would take longer than to multiply.
        codes = encode_blocks(weight_OI[:ENCODED_ROWS], kind)
        codes = codes.repeat(-(-num_outputs // len(codes)), 1)[:num_outputs]
        packed = pack(codes[None], kind, weight_OI.shape[1])
        x = x_MI.bfloat16() if kind == "BF16" else x_MI
        yield (
            f"native {kind}",
            operands_of(kind, "native"),
            lambda x=x, packed=packed, kind=kind: multiply(x, packed, kind, num_outputs, counts),  # type: ignore[misc]
        )


def operands_of(storage: str, kernels: str = "") -> str:
    """What kernels of that name multiply of weights that are stored so: `GemmRate.operands`."""
    if kernels in IN_FLOAT32:
        return "float32"
    return OF_STORAGE.get(storage, "int8")


def _chosen(weight: Any) -> tuple[str, Callable[[Any, Any], object]]:
    """What multiplies such a matrix in a model here: its name, and the product."""
    from rorqual.ops.kernels import Machine, choose, storage_of

    storage = storage_of(weight)
    kernels = choose(storage, Machine.of(weight.device))
    return kernels.name, kernels.linear


def _best_seconds(work: Callable[[], object]) -> float:
    return min(_seconds(work))


def _busy_seconds(work: Callable[[], object]) -> float:
    """The best round's, less what the threads waited for a processor."""
    import torch

    rounds = []
    for _ in range(NUM_ROUNDS):
        began, busy = time.perf_counter(), time.process_time()
        work()
        busy = (time.process_time() - busy) / torch.get_num_threads()
        rounds.append(min(time.perf_counter() - began, busy))
    return min(rounds)


def _seconds(work: Callable[[], object]) -> list[float]:
    """Of some rounds, after one that does not count."""
    work()
    seconds = []
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds
