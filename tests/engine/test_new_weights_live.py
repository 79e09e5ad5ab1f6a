"""New weights while answers run: streams, grammars, the prefix cache, drafts, stored weights.

Oracle: an engine that was made with the new weights and goes on from the same beginning.
"""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ALWAYS, CONFIG, guessing
from test_async_engine import Held, run, started

import rorqual
from patience import HANG_SECONDS
from rorqual.engine import (
    AnswerClosed,
    AnswerStream,
    Engine,
    EngineFailed,
    EngineOverloaded,
    Grammar,
    Piece,
    Request,
    SamplingParams,
)
from rorqual.errors import UsageError
from rorqual.model import DeepseekV3, build
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"speculate": 2, "draft_policy": ALWAYS},
    {"is_batch_invariant": True},
]


@pytest.fixture(scope="module")
def old() -> DeepseekV3:
    return guessing(1)


@pytest.fixture(scope="module")
def new() -> DeepseekV3:
    """It guesses as well as the old one, and says something else."""
    model = guessing(1)
    with torch.no_grad():
        weight = model.state_dict()["lm_head.weight"]
        weight.copy_(weight.roll(7, 0))
    return model


def copy_of(model: DeepseekV3) -> DeepseekV3:
    copied = build(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied


async def pieces_of(stream: AnswerStream) -> list[Piece]:
    return [piece async for piece in stream]


def ids_of(pieces: list[Piece], version: int) -> list[int]:
    return [i for piece in pieces if piece.weights_version == version for i in piece.token_ids]


@pytest.mark.parametrize("settings", SETTINGS)
def test_running_streams_go_on_with_the_new_weights(
    old: DeepseekV3,
    new: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    settings: dict[str, Any],
) -> None:
    """Also drafts: they come from the new hidden states, so as many are right as of a fresh one."""
    engine = Engine(copy_of(old), tokenizer, **settings)
    found: list[list[Piece]] = []

    async def test() -> None:
        async with started(engine) as face:
            held = Held(engine)
            streams = [face.submit(Request(prompt, GREEDY)) for prompt in prompts]
            held.allow(3)
            begun = [[await anext(stream)] for stream in streams]
            update = asyncio.create_task(face.update(new.state_dict()))
            await asyncio.sleep(0)  # it is in the queue, before the step that may run now
            held.release()
            assert await update == 1
            rest = await asyncio.gather(*map(pieces_of, streams))
            found.extend(first + more for first, more in zip(begun, rest, strict=True))

    run(test())
    fresh = Engine(copy_of(new), tokenizer, **settings)
    for prompt, pieces in zip(prompts, found, strict=True):
        first, then = ids_of(pieces, 0), ids_of(pieces, 1)
        assert len(first) + len(then) == NUM_TOKENS
        assert first
        assert then
        params = SamplingParams(temperature=0, max_tokens=len(then), ignore_eos=True)
        (expected,) = fresh.generate([[*prompt, *first]], params)
        assert then == expected.token_ids
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_drafts_after_an_update_are_those_of_the_new_model(
    old: DeepseekV3, new: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    settings = SETTINGS[1]
    engine = Engine(copy_of(old), tokenizer, **settings)
    answer = engine.add(Request(prompts[4], GREEDY))
    while len(answer.token_ids) < 5:
        engine.step()
    before, num_first = answer.usage, len(answer.token_ids)
    engine.update(new.state_dict())
    while engine.has_work:
        engine.step()
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS - num_first, ignore_eos=True)
    fresh = Engine(copy_of(new), tokenizer, **settings)
    (expected,) = fresh.generate([[*prompts[4], *answer.token_ids[:num_first]]], params)
    assert answer.token_ids[num_first:] == expected.token_ids
    for name in ("drafted", "accepted"):
        counts = zip(getattr(answer.usage, name), getattr(before, name), strict=True)
        assert tuple(after - then for after, then in counts) == getattr(expected.usage, name)


@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_a_grammar_is_kept_across_an_update(
    old: DeepseekV3, new: DeepseekV3, tokenizer: Tokenizer, settings: dict[str, Any]
) -> None:
    """What stands already counts: the rest goes on from there, and ends in time."""
    pytest.importorskip("llguidance")
    engine = Engine(copy_of(old), tokenizer, **settings)
    grammar = Grammar("regex", "([a-e]{3} ){4}end")
    answers = [
        engine.add(
            Request([5, 6], SamplingParams(temperature=1, seed=s, grammar=grammar, max_tokens=24))
        )
        for s in range(4)
    ]
    for _ in range(4):
        engine.step()
    engine.update(new.state_dict())
    while engine.has_work:
        engine.step()
    for answer in answers:
        assert re.fullmatch(grammar.text, answer.text)
        assert answer.finish_reason == "stop"
        assert answer.output().weights_versions == (0, 1)


def test_the_prefix_cache_forgets_and_learns_anew(
    old: DeepseekV3, new: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine, fresh = Engine(copy_of(old), tokenizer), Engine(copy_of(new), tokenizer)
    found: list[list[Piece]] = []

    async def test() -> None:
        async with started(engine) as face:
            for is_new in (False, False, True, False):
                if is_new:
                    await face.update(new.state_dict())
                found.append(await pieces_of(face.submit(Request(prompts[2], GREEDY))))

    run(test())
    cached = [pieces[-1].usage and pieces[-1].usage.num_cached_tokens for pieces in found]
    assert cached == [0, 80, 0, 80]
    (expected,) = fresh.generate([prompts[2]], GREEDY)
    assert ids_of(found[2], 1) == ids_of(found[3], 1) == expected.token_ids


WRONG: dict[str, tuple[str, Any]] = {
    "name": ("model.nowhere", torch.zeros(1)),
    "shape": ("lm_head.weight", torch.zeros(3, 4)),
    "integers": ("lm_head.weight", torch.zeros(CONFIG.vocab_size, 64, dtype=torch.int64)),
    "complex": ("lm_head.weight", torch.zeros(CONFIG.vocab_size, 64, dtype=torch.complex64)),
    "fp8 without scales": (
        "lm_head.weight",
        torch.zeros(CONFIG.vocab_size, 64).to(torch.float8_e4m3fn),
    ),
    "no tensor": ("lm_head.weight", [0.0]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_not_the_models_changes_nothing_and_stops_nobody(
    old: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]], kind: str
) -> None:
    name, value = WRONG[kind]
    engine = Engine(copy_of(old), tokenizer)
    (expected,) = engine.generate(prompts[:1], GREEDY)
    wrong = {"model.norm.weight": torch.zeros(CONFIG.hidden_size), name: value}

    async def test() -> None:
        async with started(engine) as face:
            held = Held(engine)
            stream = face.submit(Request(prompts[0], GREEDY))
            held.allow(2)
            first = await anext(stream)
            update = asyncio.create_task(face.update(wrong))
            await asyncio.sleep(0)
            held.release()
            with pytest.raises(UsageError, match="not this model's") as problem:
                await update
            assert name in str(problem.value.found)
            pieces = [first, *await pieces_of(stream)]
            assert ids_of(pieces, 0) == expected.token_ids
            assert engine.weights_version == 0

    run(test())


@pytest.mark.parametrize("how", ["before the start", "after the close"])
def test_an_engine_that_does_not_run_takes_no_weights(
    old: DeepseekV3, tokenizer: Tokenizer, how: str
) -> None:
    async def test() -> None:
        async with started(Engine(copy_of(old), tokenizer)) as face:
            pass
        face = rorqual.engine.AsyncEngine(face._engine) if how == "before the start" else face
        with pytest.raises(EngineOverloaded, match="no new weights"):
            await face.update({})

    run(test())


def test_whoever_waits_when_the_engine_ends_is_told_and_whoever_gave_up_changes_nothing(
    old: DeepseekV3, new: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine = Engine(copy_of(old), tokenizer)

    async def test() -> None:
        async with started(engine) as face:
            held = Held(engine)
            stream = face.submit(Request(prompts[0], GREEDY))
            held.allow(1)
            await anext(stream)
            given_up = asyncio.create_task(face.update(new.state_dict()))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            closing = asyncio.create_task(face.close())
            await asyncio.sleep(0)
            face._is_taking = True  # as if it had come a moment sooner
            late = asyncio.create_task(face.update(new.state_dict()))
            await asyncio.sleep(0)
            held.release()
            await closing
            with pytest.raises(AnswerClosed, match="was closed"):
                await late

    run(test())
    assert engine.weights_version == 0


def test_whoever_waits_when_the_engine_fails_is_told(
    old: DeepseekV3, new: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """The thread ends in the step before which the weights were handed over."""
    engine = Engine(copy_of(old), tokenizer)
    has_begun, may_end = threading.Event(), threading.Event()

    def fail() -> None:
        has_begun.set()
        assert may_end.wait(HANG_SECONDS)
        raise SystemExit(3)

    async def test() -> None:
        async with started(engine) as face:
            engine.step = fail  # type: ignore[method-assign, assignment]
            stream = face.submit(Request(prompts[0], GREEDY))
            assert await asyncio.to_thread(has_begun.wait, HANG_SECONDS)
            updates = [asyncio.create_task(face.update(new.state_dict())) for _ in range(2)]
            await asyncio.sleep(0)
            may_end.set()
            for waiting in (*updates, pieces_of(stream), face.update({})):
                with pytest.raises(EngineFailed, match="SystemExit"):
                    await waiting
            assert engine.weights_version == 0

    run(test())


def test_other_threads_may_update(
    old: DeepseekV3, new: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    engine = Engine(copy_of(old), tokenizer)

    async def test() -> None:
        async with started(engine) as face:
            update = asyncio.to_thread(asyncio.run, face.update(new.state_dict()))
            pieces, version = await asyncio.gather(
                pieces_of(face.submit(Request(prompts[0], GREEDY))), update
            )
            assert version == 1
            assert len(ids_of(pieces, 0) + ids_of(pieces, 1)) == NUM_TOKENS

    run(test())


def test_weights_in_the_bytes_of_their_file_are_not_replaced(
    old: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]], tmp_path: Path
) -> None:
    """They would have to be encoded anew. What is not stored so (norms, the router's bias) may."""
    rorqual.save(old, tmp_path / "fp8", dtype="fp8")
    engine = Engine(str(tmp_path / "fp8"), tokenizer, dtype="stored")
    before = engine.generate(prompts[:2], GREEDY)
    for name in (
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.experts.down_proj",
    ):
        with pytest.raises(UsageError, match="not this model's") as problem:
            engine.update({name: old.state_dict()[name]})
        assert f"{name} lies in the bytes of its file" in str(problem.value.found)
        assert 'dtype="float32"' in str(problem.value.fix)
    assert engine.generate(prompts[:2], GREEDY) == before
    assert engine.update({"model.norm.weight": -torch.ones(CONFIG.hidden_size)}) == 1
    assert engine.generate(prompts[:2], GREEDY) != before
