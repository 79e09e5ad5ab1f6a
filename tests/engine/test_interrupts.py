"""Signals at any moment of a step: each is heeded, the engine is whole and answers as before."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from rorqual.engine import Engine, SamplingParams
from rorqual.engine.interrupts import uninterrupted
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PLACES = ("schedule", "run", "commit", "publish", "release", "add")


class TerminatedError(Exception):
    """What the handler of a signal raises here, as SystemExit elsewhere."""


def end(signal_number: int, frame: FrameType | None) -> None:
    raise TerminatedError


ERRORS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: TerminatedError}


@pytest.fixture(autouse=True)
def _sigterm_raises() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def interrupt_in(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: signal.Signals, at_call: int
) -> None:
    """The signal comes in the middle of the call with that number."""
    function, num_calls = getattr(owner, name), 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == at_call:
            signal.raise_signal(number)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


def place_of(engine: Engine, name: str) -> tuple[Any, str]:
    return {
        "schedule": (engine._scheduler, "schedule"),
        "run": (engine._runner, "step"),
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
@pytest.mark.parametrize(
    ("number", "at_call"), [(signal.SIGINT, 1), (signal.SIGINT, 3), (signal.SIGTERM, 3)]
)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("answer", [generate_all, stream_all])
def test_an_interrupted_engine_is_whole_and_answers_as_before(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    answer: Callable[[Engine, list[list[int]]], list[str]],
    place: str,
    number: signal.Signals,
    at_call: int,
) -> None:
    engine = Engine(model, tokenizer, max_batch=3, speculate=1)
    expected = answer(engine, prompts)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(patch, *place_of(engine, place), number, at_call)
        with pytest.raises(ERRORS[number]):
            answer(engine, prompts)
    stats = engine.stats()
    assert not engine.has_work
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_blocks == stats.num_blocks
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is end
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
        if event == "line" and not frame.f_code.co_filename.endswith("interrupts.py"):
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
        lines_until += 149
    assert num_interrupted > 20


@pytest.mark.concurrency
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_interruption_does_not_wait(number: signal.Signals) -> None:
    reached: list[int] = []

    def interrupted_twice() -> None:
        with uninterrupted():
            for count in (1, 2):
                signal.raise_signal(number)
                reached.append(count)

    with pytest.raises(ERRORS[number]):
        interrupted_twice()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is end


@pytest.mark.concurrency
def test_handlers_of_others_hear_it_after_the_block_and_other_threads_are_left_alone() -> None:
    heard: list[int] = []

    def handler(signal_number: int, frame: FrameType | None) -> None:
        heard.append(signal_number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert not heard
        assert heard == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
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
@pytest.mark.parametrize("nobody", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_python_does_not_handle_stays_the_systems(nobody: signal.Handlers) -> None:
    before = signal.signal(signal.SIGTERM, nobody)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGTERM) is nobody
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.concurrency
def test_an_error_in_the_block_comes_before_the_interruption() -> None:
    def broken() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
