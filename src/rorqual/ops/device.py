"""Where to compute: a device by its name, host values brought there without waiting for it, and how
many processors there are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import UsageError

NAMES = "auto, cpu, cuda or cuda:N"


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is a GPU where torch sees one, else the CPU. UsageError for what is not there."""
    if isinstance(name, torch.device):
        return name
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"unknown device {name!r}", expected=NAMES)
    if not torch.cuda.is_available():
        has_cuda = torch.version.cuda is not None
        raise UsageError(
            f"the device {name!r} cannot be used",
            found="no GPU that torch can use" if has_cuda else "a torch without CUDA",
            expected="an NVIDIA GPU with its driver, and a torch built for CUDA",
            fix="choose the device cpu or auto",
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if match[1] is None else int(match[1])
    if index >= count:
        raise UsageError(
            f"there is no device {name!r}",
            found=f"{count} GPU{'s' if count > 1 else ''}",
            expected=f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0",
        )
    return torch.device("cuda", index)


def num_processors() -> int:
    """Those that this process may use: a container or `taskset` may leave it some of them."""
    if hasattr(os, "sched_getaffinity"):  # Windows and macOS have none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor there; to a GPU from pinned memory, so that the host goes on."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values if device.type == "cpu" else values.to(device, non_blocking=True)


def tensor_on(device: torch.device, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """`torch.tensor(values)` on the device; the host does not wait."""
    return to_device(torch.tensor(values, dtype=dtype), device)
