"""Edges of the plan's arithmetic: shapes that divide badly, limits above what is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rorqual.engine.cache_formats import bytes_per_token
from rorqual.model import preset
from rorqual.model.flops import count_parameters
from rorqual.plan import find_hardware, plan_inference
from rorqual.plan.hardware import USABLE_SHARE
from rorqual.plan.memory import fits, memory_of
from rorqual.plan.speed import speed_of
from rorqual.plan.wish import Wish
from rorqual.weights import model_folder

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


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_a_stream_has_a_row_of_logits_for_each_draft_and_one_more(num_drafts: int) -> None:
    """129,280 float32 a row, by hand."""
    plain, drafted = (
        memory_of(Wish(V3, "fp8", "bf16", 4096, 5, num_drafts=n), find_hardware("H200")).workspace
        for n in (0, num_drafts)
    )
    assert drafted - plain == 5 * num_drafts * 129_280 * 4


def test_a_draft_costs_one_mtp_layer_of_however_many() -> None:
    small = preset("16b")
    both = [small.with_changes(num_nextn_predict_layers=number) for number in (1, 2)]
    for bandwidth in (1e10, 1e20):  # limited by either
        device = replace(find_hardware("H200"), bandwidth=bandwidth)
        one, other = (speed_of(Wish(c, "fp8", "bf16", 1000, 4, num_drafts=1), device) for c in both)
        assert other.decode_bound == ("bandwidth" if bandwidth == 1e10 else "compute")
        assert one.decode_tokens_per_second == pytest.approx(other.decode_tokens_per_second)


def test_a_model_of_just_the_limit_runs_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    total = count_parameters(V3).total
    for limit, dtype in ((total, "float32"), (total - 1, "bfloat16")):
        monkeypatch.setattr(model_folder, "MAX_FLOAT32_PARAMETERS", limit)
        assert model_folder.auto_dtype(V3, has_kernels=False) == dtype
        assert model_folder.auto_dtype(V3, has_kernels=True) == "native"
