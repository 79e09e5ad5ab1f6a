"""Tasks' held-out questions, answered by the engine greedily."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rorqual.engine import Engine
from rorqual.engine.params import SamplingParams
from rorqual.tasks import Messages, Task, TaskResult, evaluate

MAX_ANSWER_TOKENS = 200


def answer_greedily(
    engine: Engine, params: SamplingParams | None = None
) -> Callable[[list[Messages]], list[str]]:
    """A function of conversations to what the model says next in each."""
    params = params or SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)

    def answer(asked: list[Messages]) -> list[str]:
        prompts = [engine.tokenizer.encode_chat(messages) for messages in asked]
        return [output.text for output in engine.generate(prompts, params)]

    return answer


def evaluate_tasks(
    engine: Engine,
    tasks: Iterable[Task[Any]],
    count: int,
    seed: int = 0,
    params: SamplingParams | None = None,
) -> Iterator[TaskResult]:
    """At most `count` held-out questions of each task, one task after the other.

    `params`: where the model's answers end and what it penalises; greedy without any.
    """
    answer = answer_greedily(engine, params)
    for task in tasks:
        yield evaluate(answer, task, count, seed)
