"""What machines can do, as data: memory, bandwidth, dense matrix products; each with its source.

Figures are the data sheets' peaks, without sparsity, memory in decimal gigabytes; several devices
count as their sum. What no data sheet vouches for is marked so in its source. `here` is measured on
this machine (`ops.ceilings`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rorqual.errors import UsageError
from rorqual.ops.ceilings import this_machine

GB = 1e9
TERA = 1e12
# Share of the memory that a plan may fill: the rest is the driver's, the runtime's, fragments'.
USABLE_SHARE = 0.92
HERE = "here"
CPU_STEP_TOKENS = 512  # our engine's default


@dataclass(frozen=True)
class Source:
    """Where the figures come from. `is_data_sheet`: the vendor's own word on this very device."""

    title: str
    vendor: str
    year: int
    is_data_sheet: bool = True
    note: str | None = None

    def __str__(self) -> str:
        mark = "" if self.is_data_sheet else " (no data sheet)"
        return f"{self.title}, {self.vendor} {self.year}{mark}" + (
            f": {self.note}" if self.note else ""
        )


@dataclass(frozen=True)
class Hardware:
    """One device, or `num_devices` alike. `flops` maps a dtype of the operands to FLOP/s."""

    name: str
    memory_bytes: float
    bandwidth: float  # bytes a second, reading
    flops: dict[str, float]
    source: Source
    num_devices: int = 1
    step_tokens: int = 4096  # of prefill in one step: what engines take on such a device

    @property
    def is_cpu(self) -> bool:
        """This machine; all others of the table are accelerators."""
        return self.name == HERE

    @property
    def total_memory_bytes(self) -> float:
        return self.num_devices * self.memory_bytes

    @property
    def usable_bytes(self) -> float:
        return USABLE_SHARE * self.total_memory_bytes

    @property
    def total_bandwidth(self) -> float:
        return self.num_devices * self.bandwidth

    def total_flops(self, dtype: str) -> float:
        """FLOP/s for operands of that dtype, or of bfloat16 where the device has no faster way."""
        return self.num_devices * self.flops.get(dtype, self.flops["bf16"])

    @property
    def label(self) -> str:
        return self.name if self.num_devices == 1 else f"{self.num_devices}x{self.name}"

    def times(self, num_devices: int) -> Hardware:
        return replace(self, num_devices=num_devices)


_SPARSE = "products are half of the sheet's, which are with sparsity"
HARDWARE: dict[str, Hardware] = {
    device.name: device
    for device in (
        Hardware(
            "H100",
            80 * GB,
            3.35e12,
            {"bf16": 989.5 * TERA, "fp8": 1979 * TERA},
            Source("H100 Tensor Core GPU data sheet", "NVIDIA", 2023, note=f"SXM; {_SPARSE}"),
        ),
        Hardware(
            "H800",
            80 * GB,
            3.35e12,
            {"bf16": 989.5 * TERA, "fp8": 1979 * TERA},
            Source(
                "DeepSeek-V3 report §3.1, arXiv 2412.19437",
                "DeepSeek",
                2024,
                is_data_sheet=False,
                note="taken as the H100 SXM's; NVLink, which is not counted here, is slower: "
                "400 GB/s both ways, 160 GB/s reached each way (§3.2.2)",
            ),
        ),
        Hardware(
            "H200",
            141 * GB,
            4.8e12,
            {"bf16": 989.5 * TERA, "fp8": 1979 * TERA},
            Source("H200 Tensor Core GPU data sheet", "NVIDIA", 2024, note=f"SXM; {_SPARSE}"),
        ),
        Hardware(
            "MI300X",
            192 * GB,
            5.3e12,
            {"bf16": 1307.4 * TERA, "fp8": 2614.9 * TERA},
            Source("Instinct MI300X Accelerator data sheet", "AMD", 2023),
        ),
        Hardware(
            "910B",
            64 * GB,
            1.6e12,
            {"bf16": 376 * TERA},
            Source(
                "Serving Large Language Models on Huawei CloudMatrix384, arXiv 2506.12708",
                "Huawei",
                2025,
                is_data_sheet=False,
                note="half of an Ascend 910C, which is two such dies (752 TFLOP/s, 128 GB, "
                "3.2 TB/s); boards that were sold as 910B differ by up to a third; no FP8",
            ),
        ),
        Hardware(
            "RTX4090",
            24 * GB,
            1.008e12,
            {"bf16": 165.2 * TERA, "fp8": 330.3 * TERA},
            Source(
                "Ada GPU Architecture whitepaper, appendix A",
                "NVIDIA",
                2022,
                note="sums in float32",
            ),
        ),
    )
}
_ALIASES = {"ascend910b": "910B", "4090": "RTX4090", "h100sxm": "H100", "h200sxm": "H200"}
_COUNTED = re.compile(r"(?:(\d{1,6})\s*[x×*]\s*)?(.+)", re.IGNORECASE)


def find_hardware(text: str, *, remeasure: bool = False) -> Hardware:
    """`H800`, `8xH200`, `2 x RTX 4090`, `here`; UsageError with the list for any other name.

    `remeasure` measures this machine although its figures are known; UsageError for another.
    """
    found = _COUNTED.fullmatch(text.strip())
    assert found is not None, "the expression takes any text"
    name = re.sub(r"[\s_-]", "", found[2]).lower()
    num_devices = int(found[1] or 1)
    if name == HERE and num_devices == 1:
        found_here = this_machine(remeasure=remeasure)
        return Hardware(
            HERE,
            found_here.memory_bytes,
            found_here.bandwidth,
            found_here.flops,
            Source(
                f"measured on {found_here.day}",
                found_here.machine,
                int(found_here.day[:4]),
                is_data_sheet=False,
            ),
            step_tokens=CPU_STEP_TOKENS,
        )
    if remeasure:
        raise UsageError("--remeasure is for this machine", found=f"--on {text}", expected=HERE)
    known = {key.lower(): key for key in HARDWARE} | _ALIASES
    if name not in known or num_devices < 1:
        raise UsageError(
            f"unknown hardware {text!r}",
            expected=f"{', '.join(HARDWARE)} or {HERE}, with a number before it as in 8xH200",
        )
    return HARDWARE[known[name]].times(num_devices)
