"""A user's own machine, from a TOML file: what `--on FILE.toml` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from rorqual.config import fill, read_toml, settings
from rorqual.errors import ConfigError
from rorqual.plan.devices import server_bandwidth, server_flops
from rorqual.plan.hardware import CPU_STEP_TOKENS, DISK_RATE, GB, TERA, Hardware, Source

Positive = Annotated[float, Field(gt=0)]
Number = TypeVar("Number", int, float)
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
# Two ways to say the same, of which a file takes one.
BANDWIDTH = (("bandwidth_gb_s",), ("memory_channels", "channel_mt_s"))
PRODUCTS = (("bf16_tflops",), ("cores", "clock_ghz", "bf16_flop_per_cycle"))


@settings
class MachineFile:
    """One device, and how many there are. Rates are in decimal GB/s, links count one way."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
    memory_gb: Positive
    is_cpu: bool = False
    num_devices: Count = 1
    devices_per_machine: Count | None = None
    bandwidth_gb_s: Positive | None = None
    memory_channels: Count | None = None
    channel_mt_s: Positive | None = None
    bf16_tflops: Positive | None = None
    fp8_tflops: Positive | None = None
    float32_tflops: Positive | None = None
    cores: Count | None = None
    clock_ghz: Positive | None = None
    bf16_flop_per_cycle: Count | None = None
    link_gb_s: Positive | None = None
    network_gb_s: Positive | None = None
    disk_gb_s: Positive | None = None
    source: str = "what the file says"


def read_machine(path: Path) -> Hardware:
    """ConfigError for what is no such file."""
    found = fill(MachineFile, read_toml(path), path)
    _check_ways(found, path, BANDWIDTH)
    _check_ways(found, path, PRODUCTS)
    bandwidth = found.bandwidth_gb_s
    if bandwidth is None:
        bandwidth = server_bandwidth(_said(found.memory_channels), _said(found.channel_mt_s)) / GB
    return Hardware(
        found.name,
        found.memory_gb * GB,
        bandwidth * GB,
        _flops(found),
        Source(found.source, str(path), None, is_data_sheet=False),
        num_devices=found.num_devices,
        step_tokens=CPU_STEP_TOKENS if found.is_cpu else Hardware.step_tokens,
        is_cpu=found.is_cpu,
        node_devices=found.devices_per_machine or found.num_devices,
        link_rate=None if found.link_gb_s is None else found.link_gb_s * GB,
        network_rate=None if found.network_gb_s is None else found.network_gb_s * GB,
        disk_rate=DISK_RATE if found.disk_gb_s is None else found.disk_gb_s * GB,
        file=str(path),
    )


def _check_ways(found: MachineFile, path: Path, ways: tuple[tuple[str, ...], ...]) -> None:
    """Exactly one of the ways must be there, and whole."""
    given = [key for way in ways for key in way if getattr(found, key) is not None]
    if tuple(given) not in ways:
        raise ConfigError(
            f"{ways[0][0]} can be said in one of two ways",
            where=path,
            found=", ".join(given) or "neither",
            expected=" or ".join(" with ".join(way) for way in ways),
            fix="give the one, or the other whole",
        )


def _said(value: Number | None) -> Number:
    assert value is not None, "one of the two ways is whole"
    return value


def _flops(found: MachineFile) -> dict[str, float]:
    if found.bf16_tflops is not None:
        flops = {"bf16": found.bf16_tflops * TERA}
    else:
        flops = server_flops(
            _said(found.cores), _said(found.clock_ghz), _said(found.bf16_flop_per_cycle)
        )
    for dtype, value in (("fp8", found.fp8_tflops), ("float32", found.float32_tflops)):
        if value is not None:
            flops[dtype] = value * TERA
    return flops
