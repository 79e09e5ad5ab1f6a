"""What this machine can do. Oracles: clocks and files written here in place of the machine's, and
counts by hand.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from rorqual.ops import ceilings
from rorqual.ops.native import KINDS, library


def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake() -> dict[str, object]:
        calls.append(1)
        return {"bandwidth": 3e10, "flops": {"float32": 1e11, "bf16": 4e11}}

    monkeypatch.setattr(ceilings, "measure", fake)
    file = tmp_path / "cache/here.json"
    first = ceilings.this_machine(file)
    assert ceilings.this_machine(file) == first
    assert len(calls) == 1
    assert first.bandwidth == 3e10
    assert first.memory_bytes > 1e8
    table = json.loads(file.read_text())
    file.write_text(json.dumps(table | {"machine": "another"}))
    ceilings.this_machine(file)
    file.write_text("{ broken")
    ceilings.this_machine(file)
    assert len(calls) == 3
    assert ceilings.this_machine(file, remeasure=True).machine == first.machine
    assert len(calls) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ceilings.cache_file() == tmp_path / "xdg/rorqual/here.json"


def test_a_small_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "GEMM_SIZE", 64)
    table = ceilings.measure()
    assert table["bandwidth"] > 1e8
    assert set(table["flops"]) == {"float32", "bf16"}


def test_the_processor_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(ceilings.platform, "processor", lambda: "")
    monkeypatch.setattr(ceilings.platform, "machine", lambda: "x99")
    assert ceilings.describe_machine().startswith("x99, ")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert ceilings.describe_machine().startswith("x99, ")
    (tmp_path / "cpuinfo").write_text("cpu: 1\nmodel name\t: A: B @ 3\nmodel name\t: C\n")
    assert ceilings.describe_machine().startswith("A: B @ 3, ")


WHOLE = {"day": "2025-01-31", "bandwidth": 3e10, "flops": {"float32": 1e11, "bf16": 4e11}}


@pytest.mark.parametrize(
    "change",
    [
        {"day": "yesterday"},
        {"day": None},
        {"bandwidth": 0},
        {"bandwidth": "3e10"},
        {"bandwidth": None},
        {"flops": {"float32": 1e11}},
        {"flops": {"float32": 1e11, "bf16": -1}},
        {"flops": [1e11]},
    ],
)
def test_a_record_that_is_not_whole_is_measured_anew(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = {"bandwidth": 7e10, "flops": {"float32": 1e10, "bf16": 2e10}}
    monkeypatch.setattr(ceilings, "measure", lambda: fresh)
    file, machine = tmp_path / "here.json", {"machine": ceilings.describe_machine()}
    file.write_text(json.dumps(machine | WHOLE))
    assert ceilings.this_machine(file).bandwidth == 3e10
    file.write_text(json.dumps(machine | WHOLE | change))
    assert ceilings.this_machine(file).bandwidth == 7e10
    assert json.loads(file.read_text())["bandwidth"] == 7e10


def test_where_nothing_can_be_kept_it_is_measured_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    fresh = {"bandwidth": 7e10, "flops": {"float32": 1e10, "bf16": 2e10}}
    monkeypatch.setattr(ceilings, "measure", lambda: fresh)
    monkeypatch.setattr(ceilings, "write_json", refuse)
    assert ceilings.this_machine(tmp_path / "here.json").flops == fresh["flops"]


def test_rates_are_of_the_best_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: rounds of 4, 2, 3, 9 and 8 seconds after one that is not timed; a product of n rows
    and columns has n^3 multiplications and as many additions.
    """
    moments: Iterator[int] = iter([0, 4, 10, 12, 20, 23, 30, 39, 40, 48])
    calls: list[None] = []
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(moments))
    assert ceilings._best_seconds(lambda: calls.append(None)) == 2
    assert len(calls) == 6
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 10)
    monkeypatch.setattr(ceilings, "GEMM_SIZE", 8)
    monkeypatch.setattr(ceilings, "_seconds", lambda work: [2.0, 0.5, 1.0])
    rate = (8**3 + 8**3) / 0.5
    assert ceilings.measure() == {
        "bandwidth": 1024 / 0.5, "flops": {"float32": rate, "bf16": rate}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 1000.0), ("999", 999.0), ("1000", 1000.0), ("5000", 1000.0)]
)
def test_memory_is_the_lesser_of_the_machines_and_the_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: float
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    monkeypatch.setattr(ceilings, "GROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(ceilings, "_physical_bytes", lambda: 1000)
    assert ceilings.total_memory_bytes() == expected


def test_each_implementation_multiplies_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product runs, gives (M, O), and counts 2 M I O operations; 256 columns suit every kind
    that can be packed, 48 no K-quant.
    """
    shapes = []

    def half_a_second(work: Callable[[], object]) -> float:
        shapes.append(tuple(work().shape))  # type: ignore[attr-defined]
        return 0.5

    monkeypatch.setattr(ceilings, "_best_seconds", half_a_second)
    rates = list(ceilings.gemm_rates([(20, 256, 64), (20, 48, 64)]))
    assert set(shapes) == {(20, 64)}
    assert {rate.flops for rate in rates} == {2 * 20 * 256 * 64 / 0.5, 2 * 20 * 48 * 64 / 0.5}
    wide = {rate.kernels: rate.operands for rate in rates if rate.shape == (20, 256, 64)}
    assert {"torch", "torch._int_mm"} <= set(wide)
    assert wide["torch._int_mm"] == "int8"
    assert [r.operands for r in rates if r.kernels == "torch"] == ["float32", "bf16"] * 2
    if library() is not None:
        native = {f"native {kind}": "int8" for kind in KINDS}
        native |= {"native BF16": "bf16", "native F32": "float32"}
        assert {name: wide[name] for name in native} == native
    assert not any("Q4_K" in rate.kernels for rate in rates if rate.shape[1] == 48)


def test_the_read_rate_has_its_best_and_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 10)
    monkeypatch.setattr(ceilings, "_seconds", lambda work: [4.0, 1.0, 2.0])
    assert ceilings.read_rate() == ceilings.ReadRate(best=1024, median=512)


def test_what_is_slower_limits() -> None:
    assert ceilings.slower(2.0, 1.0) == (2.0, "bandwidth")
    assert ceilings.slower(1.0, 2.0) == (2.0, "compute")


def test_the_peak_is_the_best_of_all_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, found = tmp_path / "cache/products.json", iter([2e11, 1e11, 3e11, 5e11])
    monkeypatch.setattr(ceilings, "_product_flops", lambda *_: next(found))
    peak, days = partial(ceilings.product_peak, file=file), iter("AABBCCDD")
    monkeypatch.setattr(ceilings.time, "strftime", lambda form: next(days))
    assert [peak("bf16").flops for _ in "AABBCC"] == [2e11] * 4 + [3e11] * 2
    assert peak("float32").flops == 5e11, "other operands have their own"
    assert ceilings.describe_machine() in peak("float32").source


@pytest.mark.parametrize("text", ["{ broken", "[]", '{"KEY": {"flops": "x"}}', '{"KEY": 3}'])
def test_a_broken_record_of_the_peak_is_measured_anew(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_product_flops", lambda *_: 2e11)
    file = tmp_path / "products.json"
    file.write_text(text.replace("KEY", f"bf16: {ceilings.describe_machine()}"))
    assert ceilings.product_peak("bf16", file).flops == 2e11
    assert '"flops": 200000000000.0' in file.read_text()


def test_measuring_the_peak_moves_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "GEMM_SIZE", 64)
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    assert ceilings._product_flops("float32") > 1e6
    assert torch.equal(torch.rand(3), wanted)


def test_what_others_take_of_the_processors_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: five rounds of 9 seconds, in which two threads computed 8, 6, 12, 20 and 8 seconds
    together.
    """
    wall, busy = itertools.count(0, 9), iter([0, 8, 8, 14, 14, 26, 26, 46, 46, 54])
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(ceilings.time, "process_time", lambda: next(busy))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert ceilings._busy_seconds(lambda: None) == 3
