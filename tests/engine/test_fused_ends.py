"""What stands before whole layers and behind them: embedding, an MTP module's entry, the head, the
likeliest token. Oracle: the same modules one by one.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rorqual
import small
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.flat_step import Span, paged_tokens
from rorqual.engine.paged_cache import PagedLatentCache
from rorqual.engine.runner import Runner
from rorqual.errors import CheckpointError
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.fused import Wanted
from rorqual.model.served import use_kernels
from rorqual.model.stored import StoredEmbedding, StoredHead, StoredStack
from rorqual.ops import native
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.ops.quantise import encode_blocks
from rorqual.weights import load
from small import lively, relative_error

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C++ compiler built them")
CLOSE = 1e-5
WIDE = small.SMALL.with_changes(hidden_size=256, vocab_size=150, num_hidden_layers=2)
"""Rows that are whole blocks of any type; a vocabulary that fills no tile."""
BLOCKS = tuple(range(20, 60))
IDS = [(7 * i + 3) % 97 for i in range(40)]


def native_model(config: ModelConfig, folder: Path, dtype: str = "float32") -> DeepseekV3:
    rorqual.save(lively(config), str(folder), dtype=dtype)
    model = load(folder, "stored")
    use_kernels(model, "native")
    assert model.fused is not None
    return model


def stack_of(kind: str, num_rows: int, width: int) -> StoredStack:
    values = 0.3 * torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows))
    num_bytes = QUANT_TYPES[kind].num_bytes(width)
    stack = StoredStack(kind, (1, num_rows, width), num_bytes, (128, 128))
    stack.put(0, encode_blocks(values, kind))
    return stack


def runner(model: DeepseekV3, num_ids: int | None = None) -> Runner:
    return Runner(
        model, PagedLatentCache(model.config, (64, 16), "float32", torch.empty(0), 1), num_ids
    )


def by_modules(model: DeepseekV3, num_ids: int | None = None) -> Runner:
    """A runner of a model that does not run whole: a thin copy, with the same modules."""
    plain = DeepseekV3.__new__(DeepseekV3)
    plain.__dict__.update(model.__dict__, fused=None)
    assert model.fused is not None
    return runner(plain, num_ids)


def with_parts(model: DeepseekV3, **parts: nn.Module) -> DeepseekV3:
    for name, part in parts.items():
        setattr(model if name == "lm_head" else model.model, name, part)
    use_kernels(model, "native")
    return model


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_K", "Q6_K", "F16", "Q5_K", "Q4_0"])
@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_every_stored_type_of_embedding_and_head(kind: str, part: str, tmp_path: Path) -> None:
    """What has no packed form is looked up, and multiplied, by torch; blocks run whole still."""
    model = native_model(WIDE, tmp_path)
    stack = stack_of(kind, WIDE.vocab_size, WIDE.hidden_size)
    made: nn.Module = StoredEmbedding(stack) if part == "embed_tokens" else StoredHead(stack)
    with_parts(model, **{part: made})
    assert (stack.packed_EP is not None) == (kind in native.KINDS)
    spans, whole = [Span(IDS, 0, BLOCKS)], runner(model, 100)
    ran, expected = whole.step(spans, [17]), by_modules(model, 100).step(spans, [17])
    assert relative_error(ran.hidden[0], expected.hidden[0]) < CLOSE
    assert ran.scores.logits_NV is not None
    assert torch.equal(ran.scores.logits_NV, model.head(ran.hidden[0][-17:]))
    after, rows = [Span(IDS[1:], 1, BLOCKS)], [ran.hidden[0][:-1]]
    h, ids = whole.draft(1, after, rows)
    other, others = by_modules(model, 100).draft(1, after, rows)
    assert relative_error(h[0], other[0]) < CLOSE
    assert list(ids) == list(others)


@pytest.mark.parametrize("num_scored", [0, 1, 17, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_chosen_rows_have_the_logits_of_the_head(
    num_scored: int, dtype: str, is_tied: bool, tmp_path: Path
) -> None:
    """To the last bit, from any number of threads; the likeliest id lies below `num_ids`."""
    model = native_model(WIDE.with_changes(tie_word_embeddings=is_tied), tmp_path, dtype)
    spans = [Span(IDS, 0, BLOCKS), Span(IDS[:3], 0, (1,))]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(runner(model, 100).step(spans, [num_scored, 1]))
    torch.set_num_threads(before)
    ran = found[0]
    logits = model.head(torch.cat([ran.hidden[0][40 - num_scored :], ran.hidden[1][-1:]]))
    for each in found:
        assert all(map(torch.equal, each.hidden, ran.hidden))
        assert torch.equal(each.scores.logits_NV, logits)  # type: ignore[arg-type]
        assert list(each.scores.likeliest_N or ()) == logits[:, :100].argmax(-1).tolist()
    short = runner(model, 100).step(spans, [num_scored, 1], needs_logits=False).scores
    assert short.logits_NV is None
    assert short.likeliest_N == ran.scores.likeliest_N
    if is_tied:
        assert model.model.embed_tokens.stack is model.lm_head.stack  # type: ignore[union-attr]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_likeliest_of_a_large_vocabulary(threads: int, tmp_path: Path) -> None:
    """Of equal ones the lowest, though threads look at pieces of a row; none where one logit of any
    piece is not finite.
    """
    config = small.LITTLE.with_changes(vocab_size=20_011)
    model = native_model(config, tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for places in ((8191, 8192), (20_010, 16_384), (0, 20_010), (19_999,)):
        values = torch.zeros(config.vocab_size, config.hidden_size)
        h = runner(model).step([Span([5], 0, BLOCKS)], [0]).hidden[0][0]
        values[list(places)] = h
        stack = StoredStack("F32", (1, *values.shape), 4 * values.shape[1], (128, 128))
        stack.put(0, encode_blocks(values, "F32"))
        with_parts(model, lm_head=StoredHead(stack))
        scores = runner(model).step([Span([5], 0, BLOCKS)], [1], needs_logits=False).scores
        assert list(scores.likeliest_N or ()) == [min(places)]
    for place in (0, 8191, 8192, 16_384, 20_010):  # the last one fills no vector
        values = torch.zeros(config.vocab_size, config.hidden_size)
        values[place] = torch.nan
        stack = StoredStack("F32", (1, *values.shape), 4 * values.shape[1], (128, 128))
        stack.put(0, values.view(torch.uint8))
        with_parts(model, lm_head=StoredHead(stack))
        scores = runner(model).step([Span([5], 0, BLOCKS)], [1], needs_logits=False).scores
        assert list(scores.likeliest_N or ()) == [-1], place
    torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(
    value: float, temperature: float, tmp_path: Path
) -> None:
    model = native_model(small.SPOKEN, tmp_path)
    values = torch.ones(small.SPOKEN.vocab_size, small.SPOKEN.hidden_size)
    values[7] = value
    stack = StoredStack("F32", (1, *values.shape), 4 * values.shape[1], (128, 128))
    stack.put(0, values.view(torch.uint8))
    with_parts(model, lm_head=StoredHead(stack))
    engine = Engine(model, small.tokenizer())
    with pytest.raises(CheckpointError, match="not finite"):
        engine.generate([[5, 6]], SamplingParams(temperature=temperature, max_tokens=2))


def call(model: DeepseekV3, text: list[Span], wanted: Wanted | None = None, **changes: Any) -> Any:
    cache = PagedLatentCache(model.config, (64, 16), "float32", torch.empty(0), 1)
    tokens = paged_tokens(text, cache, model.config)._replace(**changes)
    return model.fused.call(0)(tokens, None, wanted)


def test_a_step_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Nothing is read or written beyond what there is."""
    model = native_model(WIDE, tmp_path)
    fine = [Span(IDS, 0, BLOCKS)]
    call(model, fine, Wanted([0, 39], 150, needs_logits=True))
    for span in (Span([150], 0, BLOCKS), Span([-1], 0, BLOCKS), Span([5, 1 << 40], 3, BLOCKS)):
        with pytest.raises(AssertionError, match="refuse a step"):
            call(model, [span])
    for rows in ([40], [-1], [3, 3], [4, 2]):
        with pytest.raises(AssertionError, match="refuse a step"):
            call(model, fine, Wanted(rows, 150, needs_logits=False))
    for num_ids in (0, 151):
        with pytest.raises(AssertionError, match="refuse a step"):
            call(model, fine, Wanted([0], num_ids, needs_logits=False))
    # Tokens, start, first slot seen, position, table, form.
    for changed in ((0, 39), (0, 41), (2, 1), (1, -1), (2, -1), (3, -1), (3, 217), (4, -1)):
        place, number = changed
        spans = [40, 0, 0, 0, 0, 0]
        spans[place] = number
        with pytest.raises(AssertionError, match="refuse a step"):
            call(model, fine, spans=array("q", spans))
    with pytest.raises(AssertionError, match="refuse a step"):
        call(model, fine, spans=array("q"))
    with pytest.raises(AssertionError, match="refuse a step"):
        call(model, [])


def test_angles_are_the_same_however_many_there_are(tmp_path: Path) -> None:
    model = native_model(small.SMALL, tmp_path)
    short, long = (model.fused.call(0)._angles.__class__(model.model.rotary) for _ in range(2))
    cos, sin = short.up_to(3)
    exact = model.model.rotary(torch.arange(3))
    assert torch.allclose(cos[:3], exact[0], atol=1e-6)
    assert torch.allclose(sin[:3], exact[1], atol=1e-6)
    more: tuple[Tensor, Tensor] = long.up_to(5000)
    assert all(
        torch.equal(table[: len(cos)], known) for table, known in zip(more, (cos, sin), strict=True)
    )
    assert len(short.up_to(300)[0]) >= 300
    assert torch.equal(short.up_to(5000)[1][:5000], more[1][:5000])
