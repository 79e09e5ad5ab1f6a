"""Ctrl-C at any moment of a step: it is heeded, the engine stays whole, and answers as before."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.interrupts import uninterrupted
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PLACES = ("schedule", "run", "commit", "publish", "release", "add")


def interrupt_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at_call: int) -> None:
    """Ctrl-C comes in the middle of the call with that number."""
    function, num_calls = getattr(owner, name), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at_call:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


def place_of(engine: Engine, name: str) -> tuple[Any, str]:
    return {
        "schedule": (engine._scheduler, "schedule"),
        "run": (engine._runner, "run"),
        "commit": (engine, "_commit"),
        "publish": (engine._scheduler, "publish"),
        "release": (engine._pool, "release"),
        "add": (engine._scheduler, "add"),
    }[name]


def stream_all(engine: Engine, prompts: list[list[int]]) -> list[str]:
    return ["".join(engine.stream(prompt, PARAMS)) for prompt in prompts]


def generate_all(engine: Engine, prompts: list[list[int]]) -> list[str]:
    return [output.text for output in engine.generate(prompts, PARAMS)]


@pytest.mark.concurrency
@pytest.mark.parametrize("at_call", [1, 3])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("answer", [generate_all, stream_all])
def test_an_interrupted_engine_is_whole_and_answers_as_before(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    answer: Callable[[Engine, list[list[int]]], list[str]],
    place: str,
    at_call: int,
) -> None:
    engine = Engine(model, tokenizer, max_batch=3, speculate=1)
    expected = answer(engine, prompts)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(patch, *place_of(engine, place), at_call)
        with pytest.raises(KeyboardInterrupt):
            answer(engine, prompts)
    stats = engine.stats()
    assert not engine.has_work
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert answer(engine, prompts) == expected


@pytest.mark.concurrency
def test_an_interruption_at_any_line_is_no_other_error(
    model: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]]
) -> None:
    """Whatever line of the engine is running when it comes."""
    engine = Engine(model, tokenizer, max_batch=2)
    lines_until = 40

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal countdown
        if "rorqual/engine" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line" and frame.f_code.co_name != "uninterrupted":
            countdown -= 1
            if countdown == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    num_interrupted = 0
    while True:
        countdown = lines_until
        try:
            sys.settrace(trace)
            generate_all(engine, prompts[:3])
        except KeyboardInterrupt:
            num_interrupted += 1
        finally:
            sys.settrace(None)
        stats = engine.stats()
        assert stats.num_free_blocks == stats.num_blocks, lines_until
        assert not engine.has_work, lines_until
        if countdown > 0:
            break
        lines_until += 97
    assert num_interrupted > 20


@pytest.mark.concurrency
def test_the_second_interruption_does_not_wait() -> None:
    reached: list[int] = []

    def interrupted_twice() -> None:
        with uninterrupted():
            for number in (1, 2):
                signal.raise_signal(signal.SIGINT)
                reached.append(number)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.concurrency
def test_handlers_of_others_and_other_threads_are_left_alone() -> None:
    heard: list[int] = []

    def handler(signal_number: int, frame: FrameType | None) -> None:
        heard.append(signal_number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is handler
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    seen: list[object] = []

    def elsewhere() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.concurrency
def test_an_error_in_the_block_comes_before_the_interruption() -> None:
    def broken() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
