"""This machine, measured once: read bandwidth, matrix products, memory; kept in the user's cache.

A few seconds of work. The file names the processor it was measured on, and is measured anew where
that is another one (a home folder on several machines).
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import RorqualError
from rorqual.files import read_json, write_json
from rorqual.log import console

READ_BYTES = 1 << 29  # beyond any cache
GEMM_SIZE = 2048
NUM_ROUNDS = 5
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


def cache_file() -> Path:
    """$XDG_CACHE_HOME/rorqual/here.json, or ~/.cache/rorqual/here.json."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "rorqual" / "here.json"


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
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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
    import torch

    from rorqual.ops.kernels import Machine, choose, storage_of

    words = torch.ones(READ_BYTES // 4)
    bandwidth = READ_BYTES / _best_seconds(words.sum)
    flops = {}
    with torch.no_grad():
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype)
            linear = choose(storage_of(a), Machine.of(a.device, storage_of(a))).linear
            seconds = _best_seconds(lambda a=a, linear=linear: linear(a, a))  # type: ignore[misc]
            flops[name] = 2 * GEMM_SIZE**3 / seconds
    return {"bandwidth": bandwidth, "flops": flops}


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best
