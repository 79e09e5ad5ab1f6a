"""Which known device a GPU is, by the name that its driver gives it, and what a device's products
peak at.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rorqual.ops.ceilings import Peak, operands_of, product_peak
from rorqual.plan.devices import HARDWARE
from rorqual.plan.hardware import Hardware

if TYPE_CHECKING:
    import torch

# Only the boards that the figures are of: others of the same name (PCIe, NVL, D) are slower.
_NAMES = {
    r"NVIDIA A100-SXM\d-40GB": "A100-40",
    r"NVIDIA A100-SXM\d-80GB": "A100-80",
    r"NVIDIA H100 80GB HBM3": "H100",
    r"NVIDIA H800": "H800",
    r"NVIDIA H20": "H20",
    r"NVIDIA H200": "H200",
    r"NVIDIA B200": "B200",
    r"AMD Instinct MI300X.*": "MI300X",
    r"AMD Instinct MI325X.*": "MI325X",
    r"NVIDIA L40S": "L40S",
    r"NVIDIA GeForce RTX 3090": "RTX3090",
    r"NVIDIA GeForce RTX 4090": "RTX4090",
    r"NVIDIA GeForce RTX 5090": "RTX5090",
}


def hardware_of_gpu(name: str) -> Hardware | None:
    """None where no figures are known for the board."""
    found = (known for pattern, known in _NAMES.items() if re.fullmatch(pattern, name))
    return next((HARDWARE[known] for known in found), None)


def peak_of(device: torch.device, precision: str) -> Peak | None:
    """For products in `precision`, float32 or bfloat16: of a GPU the data sheet's, of the CPU
    measured. None where nothing is known.
    """
    operands = operands_of(precision)
    if device.type == "cpu":
        return product_peak(operands)
    if device.type != "cuda":
        return None
    import torch

    found = hardware_of_gpu(torch.cuda.get_device_name(device))
    if found is None or operands not in found.flops:
        return None
    return Peak(found.flops[operands], f"{found.name}: {found.source}")
