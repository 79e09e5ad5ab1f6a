"""What a machine can do: memory, bandwidth, dense matrix products, links; each with its source.

Memory is in decimal gigabytes. Several devices count as their sum, and stand in machines of at most
`node_devices`. The known ones are in `devices.py`, a user's own in a file (`machine_file.py`), and
`here` is measured (`ops.ceilings`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GB = 1e9
TERA = 1e12
# Share of the memory that a plan may fill: the rest is the driver's, the runtime's, fragments'.
USABLE_SHARE = 0.92
HERE = "here"
CPU_STEP_TOKENS = 512  # our engine's default
# Choice: a disk on PCIe 4.0 x4, of which data sheets say 7 to 7.5 GB/s read in order.
DISK_RATE = 7 * GB


@dataclass(frozen=True)
class Source:
    """Where the figures come from. `is_data_sheet`: the vendor's own word on this very device."""

    title: str
    vendor: str
    year: int | None
    is_data_sheet: bool = True
    note: str | None = None

    def __str__(self) -> str:
        mark = "" if self.is_data_sheet else " (no data sheet)"
        said = f"{self.title}, {self.vendor}" + (f" {self.year}" if self.year else "")
        return said + mark + (f": {self.note}" if self.note else "")


@dataclass(frozen=True)
class Hardware:
    """One device, or `num_devices` alike. `flops` maps a dtype of the operands to FLOP/s.

    Links are what one device sends in a second: to others of its machine, and to other machines;
    None where no figure is known. `file` is the user's, if it says this.
    """

    name: str
    memory_bytes: float
    bandwidth: float  # bytes a second, reading
    flops: dict[str, float]
    source: Source
    num_devices: int = 1
    step_tokens: int = 4096  # of prefill in one step: what engines take on such a device
    is_cpu: bool = False
    runs_ours: bool = True  # whether our engine does: on CPUs, and where torch has CUDA or ROCm
    node_devices: int = 8
    link_rate: float | None = None
    network_rate: float | None = None
    disk_rate: float = DISK_RATE
    file: str | None = None

    @property
    def total_memory_bytes(self) -> float:
        return self.num_devices * self.memory_bytes

    @property
    def usable_bytes(self) -> float:
        return USABLE_SHARE * self.total_memory_bytes

    @property
    def total_bandwidth(self) -> float:
        return self.num_devices * self.bandwidth

    @property
    def num_nodes(self) -> int:
        """Machines that so many devices need."""
        return -(-self.num_devices // self.node_devices)

    def total_flops(self, dtype: str) -> float:
        """FLOP/s for operands of that dtype, or of bfloat16 where the device has no faster way."""
        return self.num_devices * self.flops.get(dtype, self.flops["bf16"])

    @property
    def label(self) -> str:
        return self.name if self.num_devices == 1 else f"{self.num_devices}x{self.name}"

    @property
    def flag(self) -> str:
        """What `--on` takes for it."""
        name = self.file or self.name
        return name if self.num_devices == 1 else f"{self.num_devices}x{name}"

    def times(self, num_devices: int) -> Hardware:
        return replace(self, num_devices=num_devices)
