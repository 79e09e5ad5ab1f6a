"""Blocks that run whole in C++, at the edges of their pieces: second blocks of rows and of a past,
equal scores, latents of nothing. Oracle: the modules one by one, or what is written here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_fused import CLOSE, assert_near, native_model
from torch import Tensor

import rorqual
import small
from rorqual.engine.cache_formats import CacheDtype
from rorqual.engine.flat_step import Span
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.served import use_kernels
from rorqual.ops import native
from rorqual.weights import load
from small import lively

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
LONG = small.LITTLE.with_changes(num_hidden_layers=2, num_nextn_predict_layers=0)
BLOCKS = tuple(range(3, 143))


def states(
    model: DeepseekV3, cuts: tuple[int, ...], cache: PagedLatentCache, *, is_fused: bool
) -> list[Tensor]:
    fused = model.fused
    model.fused = fused if is_fused else None
    ids = [(7 * i + i // 97) % 97 for i in range(cuts[-1])]
    pairs = zip((0, *cuts), cuts, strict=False)
    found = [Runner(model, cache).run([Span(ids[a:b], a, BLOCKS)])[0] for a, b in pairs]
    model.fused = fused
    return found


def cache_of(config: ModelConfig, kind: CacheDtype = "float32") -> PagedLatentCache:
    return PagedLatentCache(config, (144, 16), kind, torch.empty(0))


def test_more_rows_than_a_block_and_a_past_of_long_chunks(tmp_path: Path) -> None:
    """2,100 rows in a step, some 525 of them an expert's; then queries whose past is cut into
    chunks that are longer than what is scored at once.
    """
    model = native_model(LONG, tmp_path)
    cuts = (2100, 2101, 2104, 2140)
    found = states(model, cuts, cache_of(LONG), is_fused=True)
    assert_near(found, states(model, cuts, cache_of(LONG), is_fused=False), CLOSE)


def steered(config: ModelConfig, folder: Path, bias: Tensor) -> DeepseekV3:
    """All experts score the same, and the bias chooses."""
    model = lively(config)
    for layer in model.sparse_layers():
        with torch.no_grad():
            layer.gate.weight.zero_()
            layer.gate.e_score_correction_bias.copy_(bias)
    rorqual.save(model, str(folder))
    loaded = load(folder, "stored")
    use_kernels(loaded, "native")
    return loaded


@pytest.mark.parametrize("name", ["base", "half_of_groups"])
def test_of_equal_experts_and_groups_the_first_are_chosen(name: str, tmp_path: Path) -> None:
    config = small.variants(small.SMALL)[name].with_changes(num_nextn_predict_layers=0)
    num = config.n_routed_experts
    falling = torch.linspace(1, 0.5, num)
    tied = steered(config, tmp_path / "tied", torch.zeros(num))
    ordered = steered(config, tmp_path / "ordered", falling)
    found = states(tied, (40, 41), cache_of(config), is_fused=True)
    assert_near(found, states(ordered, (40, 41), cache_of(config), is_fused=False), CLOSE)


@pytest.mark.parametrize("kind", ["q8", "fp8"])
def test_latents_of_nothing_have_the_least_scale(kind: CacheDtype, tmp_path: Path) -> None:
    """Codes are 0 and no quotient of nothing. Of q8 the second group, of 12 values, is nothing."""
    config = LONG.with_changes(kv_lora_rank=44)
    model = lively(config)
    with torch.no_grad():
        for layer in model.model.layers.values():
            layer.self_attn.kv_a_layernorm.weight[32 if kind == "q8" else 0 :] = 0
    rorqual.save(model, str(tmp_path))
    loaded = load(tmp_path, "stored")
    use_kernels(loaded, "native")
    cache = cache_of(config, kind)
    for layer in cache._layers:
        for plane in layer.planes:
            plane.view(torch.uint8).fill_(77)
    (h,) = states(loaded, (20,), cache, is_fused=True)
    assert h.isfinite().all()
    codes, scales, _ = (plane.flatten(0, 1)[48:68] for plane in cache._layers[0].planes)
    codes, scales = codes.view(torch.uint8).view(20, -1), scales.view(20, -1)
    least = torch.tensor(1e-30).bfloat16() if kind == "q8" else torch.tensor(1e-12)
    assert not (codes[:, 32:] & 127).any()
    assert (scales[:, -1] == least).all()
