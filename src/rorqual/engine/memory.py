"""How much memory is free, and how many blocks of latents are made of it."""

from __future__ import annotations

from pathlib import Path

import torch

from rorqual.errors import UsageError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
# Choice: where no size is asked for, half of the free memory is left to everything else.
DEFAULT_FRACTION = 0.5
FALLBACK_BYTES = 4 << 30  # where the system does not say what is free
MIN_BLOCKS = 2


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not MEMINFO.exists():
        return FALLBACK_BYTES
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def budget_bytes(asked: int | float | None, wanted: int, device: torch.device) -> int:
    """The cache's memory: `asked` bytes (int) or fraction of what is free (float).

    Without `asked` it is the `wanted` bytes, or half of what is free if that is less.
    """
    if asked is None:
        return min(wanted, int(free_bytes(device) * DEFAULT_FRACTION))
    if isinstance(asked, float):
        if not 0 < asked < 1:
            raise UsageError(
                "the cache's share of the free memory is out of range",
                found=asked,
                expected="above 0 and below 1; a whole number is bytes",
            )
        return int(free_bytes(device) * asked)
    return asked


def num_blocks(budget: int, block_bytes: int) -> int:
    """UsageError if not even two blocks fit."""
    count = budget // block_bytes
    if count < MIN_BLOCKS:
        raise UsageError(
            "the cache's memory is too small",
            found=f"{budget} bytes",
            expected=f"at least {MIN_BLOCKS * block_bytes}, which is two blocks",
            fix="give it more memory, or take smaller blocks",
        )
    return count
