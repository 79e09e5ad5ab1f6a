"""What is measured of an engine, and the least that the machine must do for it.

A figure's share of the limit is its rate over that at which memory gives the bytes that the work
must read, or the processor multiplies what it must multiply, whichever is less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rorqual.ops.ceilings import slower

RATE, SECONDS, BYTES, PERCENT = "tokens/s", "s", "bytes", "%"


@dataclass(frozen=True)
class Load:
    """What is asked of each engine. `depths`: tokens that a stream has before it is timed."""

    prefill: tuple[int, ...] = (512,)
    streams: tuple[int, ...] = (1, 2, 4, 8, 16)
    depths: tuple[int, ...] = (32,)
    decode_tokens: int = 32
    threads: int = 1
    prompt_tokens: int = 16  # of the first request

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(table: Mapping[str, Any]) -> Load:
        values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        return Load(**values)


@dataclass(frozen=True)
class Work:
    """What one step must do for `num_tokens` tokens. `operands`: what is multiplied, as in
    `ops.ceilings.GemmRate`. `experts` are the routed ones that a layer reads, the mean of layers.
    """

    num_bytes: float
    flops: float
    operands: str
    num_tokens: int
    experts: float

    def limit(self, read_rate: float, gemm_rates: Mapping[str, float]) -> tuple[float, str]:
        """Tokens a second at most, and what limits them: "bandwidth" or "compute"."""
        gemm_rate = gemm_rates.get(self.operands) or max(gemm_rates.values())
        seconds, bound = slower(self.num_bytes / read_rate, self.flops / gemm_rate)
        return self.num_tokens / seconds, bound


@dataclass(frozen=True)
class Figure:
    """One figure of one engine in one round. `what` is prefill (of `num_tokens`), one of `STREAMS`
    (of `num_streams` that have `num_tokens` each), or one of `LABELS`.
    """

    what: str
    value: float
    unit: str
    num_tokens: int = 0
    num_streams: int = 0
    work: Work | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.what, self.num_tokens, self.num_streams

    @property
    def label(self) -> str:
        if self.what == "prefill":
            return f"prefill of {self.num_tokens:,}"
        if self.what in STREAMS:
            plural = "" if self.num_streams == 1 else "s"
            return (
                f"{STREAMS[self.what]}, {self.num_streams} stream{plural} after {self.num_tokens:,}"
            )
        return LABELS[self.what].format(self.num_tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(table: Mapping[str, Any]) -> Figure:
        work = table.get("work")
        return Figure(**{**table, "work": Work(**work) if work else None})


STREAMS = {"decode": "decode", "outside": "outside the C++ kernels"}
LABELS = {
    "load": "loading",
    "first_token": "first request, {} tokens",
    "start": "process start to first token",
    "known_prefix": "first token after {:,} known tokens",
    "memory": "peak memory",
    "own_memory": "peak memory less imports",
}
