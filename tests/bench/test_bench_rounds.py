"""Who is measured when, and beside which read rate. Oracle: rates that are told here, and limits
and work worked out by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from rorqual.bench import rounds
from rorqual.bench.figures import Figure, Load, Work
from rorqual.bench.processes import BenchError, Ended
from rorqual.bench.report import Report
from rorqual.bench.rounds import Bench
from rorqual.bench.weights import Form
from small import LITTLE

FORM = Form(fixed=1000, one_expert=10, storages="bfloat16", operands="bf16")
WORK = Work(num_bytes=100, flops=1, operands="bf16", num_tokens=1, experts=3.5)
LOAD = Load(prefill=(600,), streams=(2,), depths=(8,), decode_tokens=4)


@dataclass
class Peer:
    name: str
    is_broken: bool = False
    form: Form = FORM

    def measure(self, load: Load) -> Iterator[Figure]:
        if self.is_broken:
            raise BenchError(f"{self.name} failed")
        yield Figure("decode", 7.0, "tokens/s", 8, 2)
        yield Figure("prefill", 9.0, "tokens/s", 600, 1)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the machine reads, measurement by measurement; no process starts."""
    left: list[float] = []

    def told(name: str, command: list[Any]) -> Ended:
        if name == rounds.OURS:
            figure = asdict(Figure("decode", 5.0, "tokens/s", 8, 2, WORK))
            return Ended(f"{json.dumps(asdict(FORM))}\n{json.dumps(figure)}", "", 0.5, None)
        rate = left.pop(0)
        gemm = {"kernels": "torch", "operands": "bf16", "shape": [4, 4, 4], "flops": 1e30}
        return Ended(
            json.dumps({"read": {"best": rate, "median": rate}, "gemm": [gemm]}), "", 0.5, None
        )

    monkeypatch.setattr(rounds, "run", told)
    return left


def test_a_share_is_of_the_read_rates_around_it(reads: list[float]) -> None:
    """Each engine's mean of before and after; one that fails leaves the last rate to the next."""
    reads += [100, 200, 400, 800, 1600, 3200, 6400, 12800]
    peers = [Peer("first"), Peer("broken", is_broken=True), Peer("second")]
    report = Report()
    Bench(LITTLE, LOAD, "m", peers=peers, num_rounds=2).run(report)
    assert reads == []
    assert list(report.missing) == ["broken"]
    around = {"rorqual": (150, 2400), "first": (300, 4800), "second": (600, 9600)}
    for (engine, (what, *_)), row in report.rows.items():
        assert row.figure.work is not None
        num_bytes = row.figure.work.num_bytes
        num_tokens = {"decode": 1 if engine == "rorqual" else 2, "prefill": 600}[what]
        assert row.limits == pytest.approx(
            [num_tokens * rate / num_bytes for rate in around[engine]]
        )


def test_a_peer_reads_the_experts_that_ours_counted(reads: list[float]) -> None:
    """Two streams of 8 tokens, and half of the 4 that follow, in two bytes a value."""
    reads += [100] * 3
    report = Report()
    Bench(LITTLE, LOAD, "m", peers=[Peer("first")]).run(report)
    work = report.rows["first", ("decode", 8, 2)].figure.work
    assert work is not None
    width = LITTLE.kv_lora_rank + LITTLE.qk_rope_head_dim
    latents = LITTLE.num_hidden_layers * width * 2 * (2 * 8 + 2 * 2)
    assert work.num_bytes == 1000 + 10 * 3.5 + latents
    prompt = report.rows["first", ("prefill", 600, 1)].figure.work
    assert prompt is not None
    assert 2 * 1000 < prompt.num_bytes < 2 * (1000 + 10 * LITTLE.n_routed_experts)
