"""Our engine as it is measured. Oracle: what routers choose, and room counted by trying it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rorqual
from rorqual.bench.figures import Load
from rorqual.bench.ours import Ours, counted_experts, options_for
from rorqual.engine import Engine, EngineOptions
from rorqual.errors import UsageError
from rorqual.ops.native import library
from rorqual.weights import load
from small import LITTLE, lively, tokenizer

CONFIG = LITTLE.with_changes(num_nextn_predict_layers=0)


def test_experts_are_counted_where_blocks_run_whole() -> None:
    """The C++ kernels' call of all blocks: the same choices are counted through their parts, and
    the call is there again afterwards.
    """
    model = lively(CONFIG)
    model.fused = whole = object()
    engine = Engine(model, tokenizer())
    model.fused = whole
    with counted_experts(engine) as counts:
        assert model.fused is None
        model(torch.tensor([[5]]))
    assert counts == [CONFIG.num_experts_per_tok]
    assert model.fused is whole


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize(("depth", "streams"), [(1, 5), (20, 3)])
def test_streams_have_room_for_what_is_decoded_while_others_begin(
    depth: int, streams: int, speculate: int
) -> None:
    """A prompt takes several steps here; no stream ends before it was timed."""
    load = Load(prefill=(16,), streams=(1, streams), depths=(depth,), decode_tokens=4)
    options = options_for(load, LITTLE, EngineOptions(max_step_tokens=8, speculate=speculate))
    ours = Ours(Engine(lively(LITTLE), tokenizer(), options), load)
    figure, *_ = ours.decode(streams, depth)
    assert figure.value > 0
    assert figure.key == ("decode", depth, streams)
    assert (figure.work is None) == bool(speculate)
    assert not ours.engine.has_work
    list(ours.decode(1, depth))
    prompt, known = ours.prefill(16)
    assert (prompt.what, known.what) == ("prefill", "known_prefix")
    assert ours.engine.stats().num_prefix_hit_tokens == 16


def test_a_step_reads_the_latents_of_all_that_came_before() -> None:
    """Prompts of 5, two tokens of each answer before the clock, and half of the four behind it."""
    load = Load(prefill=(), streams=(2,), depths=(5,), decode_tokens=4)
    engine = Engine(lively(CONFIG), tokenizer(), options_for(load, CONFIG, EngineOptions()))
    ours = Ours(engine, load)
    figure, *_ = ours.decode(2, 5)
    assert figure.work is not None
    weights = ours.form.step_bytes(figure.work.experts)
    latent = 4 * CONFIG.num_hidden_layers * (CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim)
    assert figure.work.num_bytes == pytest.approx(weights + latent * 2 * (5 + 2 + 4 / 2))


@pytest.mark.skipif(library() is None, reason="no C++ compiler built them")
def test_the_share_outside_the_kernels(tmp_path: Path) -> None:
    """One thread: what all kernels took is less than the time that went by, and is not nothing."""
    rorqual.save(lively(CONFIG), str(tmp_path))
    engine = Engine(load(tmp_path, "stored", kernels="native"), tokenizer(), kernels="native")
    ours = Ours(engine, Load(decode_tokens=4))
    for num_streams in (1, 3):
        decode, outside = ours.decode(num_streams, 5)
        assert (decode.what, outside.what) == ("decode", "outside")
        assert 0 < outside.value < 100
        assert outside.key == ("outside", 5, num_streams)
        assert outside.label.startswith(f"outside the C++ kernels, {num_streams} stream")


def test_a_context_that_is_too_short_is_refused() -> None:
    load = Load(prefill=(16,), streams=(1,), depths=(LITTLE.max_position_embeddings,))
    with pytest.raises(UsageError, match="longer than the model's context"):
        options_for(load, LITTLE, EngineOptions())
    assert (
        options_for(
            Load(streams=()), LITTLE.with_changes(max_position_embeddings=1024), EngineOptions()
        ).max_batch
        == 1
    )
