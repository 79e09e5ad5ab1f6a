"""The engine without a server: many requests in order, or one answer streamed."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from rorqual.engine.answer import Answer
from rorqual.engine.interrupts import uninterrupted
from rorqual.engine.params import MAX_SEED, SamplingParams, check_params
from rorqual.engine.request import Output, Piece, Request, Usage

WINDOW_PER_ROW = 32


class Steps(Protocol):
    """What these functions need of an engine."""

    max_batch: int

    def add(self, request: Request) -> Answer: ...

    def cancel(self, answer: Answer) -> None: ...

    def step(self) -> list[tuple[Answer, Piece]]: ...


def seeded(prompts: Iterable[Sequence[int]], params: SamplingParams) -> Iterator[Request]:
    """Requests with seeds `seed`, `seed + 1`, ...; without a seed each is random."""
    check_params(params)
    for offset, prompt_ids in enumerate(prompts):
        seed = None if params.seed is None else (params.seed + offset) % (MAX_SEED + 1)
        yield Request(prompt_ids, replace(params, seed=seed))


def answer_in_order(engine: Steps, requests: Iterable[Request]) -> Iterator[Output]:
    """Outputs in the order of the requests, which are drawn only as there is room to run them.

    A long answer holds up the ones behind it: how many may wait for it is bounded.
    """
    waiting = iter(requests)
    is_more = True
    answers: list[Answer] = []  # in order, the first not yielded yet
    try:
        while is_more or answers:
            num_open = sum(1 for answer in answers if answer.finish_reason is None)
            while is_more and num_open < engine.max_batch and _has_window(engine, answers):
                request = next(waiting, None)
                is_more = request is not None
                if request is not None:
                    with uninterrupted():
                        answers.append(engine.add(request))
                    num_open += 1
            if num_open:
                with uninterrupted():
                    engine.step()
            while answers and answers[0].finish_reason is not None:
                yield answers.pop(0).output()
    finally:
        with uninterrupted():
            for answer in answers:
                engine.cancel(answer)


def _has_window(engine: Steps, answers: list[Answer]) -> bool:
    return len(answers) < WINDOW_PER_ROW * engine.max_batch


class Stream:
    """Iterate over it for the text; `text` is what came so far, `output` the whole at the end.

    The answer is begun with the first piece, and cancelled if the iteration ends before it does.
    """

    def __init__(self, engine: Steps, request: Request) -> None:
        self._engine, self._request = engine, request
        self._answer: Answer | None = None
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Ends the answer where it is."""
        self._pieces.close()

    @property
    def usage(self) -> Usage | None:
        """What the answer took so far; None before it is begun."""
        return None if self._answer is None else self._answer.usage

    @property
    def text(self) -> str:
        return "" if self._answer is None else self._answer.text

    @property
    def output(self) -> Output:
        assert self._answer is not None, "the stream has not begun"
        return self._answer.output()

    def _run(self) -> Generator[str, None, None]:
        """Yields after every step, also an empty text: the caller may want to stop there."""
        num_shown = 0
        try:
            with uninterrupted():
                answer = self._answer = self._engine.add(self._request)
            while answer.finish_reason is None or num_shown < len(answer.text):
                if answer.finish_reason is None:  # else another reader's steps ended it
                    with uninterrupted():
                        self._engine.step()
                shown, num_shown = num_shown, len(answer.text)
                yield answer.text[shown:]
        finally:
            if self._answer is not None:
                with uninterrupted():
                    self._engine.cancel(self._answer)
