"""Edges of the plan's arithmetic: shapes that divide badly, limits above what is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rorqual.engine.cache_formats import bytes_per_token
from rorqual.model import preset
from rorqual.plan import find_hardware, measure, plan_inference
from rorqual.plan.hardware import USABLE_SHARE
from rorqual.plan.memory import fits, memory_of
from rorqual.plan.wish import Wish

V3 = preset("671b")


@pytest.mark.parametrize("rank", [32, 33, 63, 500])
@pytest.mark.parametrize("kv", ["fp8", "q8"])
def test_the_cache_is_the_engines_for_ranks_that_fill_no_group(rank: int, kv: str) -> None:
    config = preset("tiny").with_changes(kv_lora_rank=rank)
    engines = bytes_per_token(config, kv, torch.bfloat16)  # type: ignore[arg-type]
    assert Wish(config, "bf16", kv).cache_bytes_per_token == engines * config.num_hidden_layers


def test_as_many_streams_as_fit_are_kept_where_all_is_made_smaller() -> None:
    """Room for the weights of Q2_K_XS and three short streams of FP8 cache: three are said."""
    wish = Wish(V3, "bf16", "bf16", 4096, 8)
    smallest = replace(wish, weights="Q2_K_XS", kv="fp8")
    three = memory_of(replace(smallest, batch=3), find_hardware("H200")).total
    hardware = replace(find_hardware("H200"), memory_bytes=three / USABLE_SHARE + 1)
    planned = plan_inference(V3, hardware, weights="bf16", context=4096, batch=8)
    (together,) = (text for text in planned.suggestions if "--batch" in text and "--kv" in text)
    flags = dict(zip(together.split()[::2], together.split()[1::2], strict=False))
    found = Wish(
        V3, flags["--weights"], flags["--kv"], int(flags["--context"]), int(flags["--batch"])
    )
    assert fits(found, hardware)
    assert not fits(replace(found, batch=found.batch + 1), hardware)
    assert found.batch > 1


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 1000.0), ("999", 999.0), ("1000", 1000.0), ("5000", 1000.0)]
)
def test_memory_is_the_lesser_of_the_machines_and_the_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: float
) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    monkeypatch.setattr(measure, "GROUP_LIMIT", tmp_path / "memory.max")
    monkeypatch.setattr(measure, "_physical_bytes", lambda: 1000)
    assert measure.total_memory_bytes() == expected
