"""Accuracy by skill on questions that training never saw, answered by the engine greedily."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rorqual.engine import Engine
from rorqual.engine.params import SamplingParams
from rorqual.tasks import SKILLS, SkillResult, evaluate

MAX_ANSWER_TOKENS = 200


def answer_greedily(
    engine: Engine, params: SamplingParams | None = None
) -> Callable[[list[str]], list[str]]:
    """A function of questions to answers, each question a conversation of its own."""
    params = params or SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)

    def answer(questions: list[str]) -> list[str]:
        encode = engine.tokenizer.encode_chat
        prompts = [encode([{"role": "user", "content": question}]) for question in questions]
        return [output.text for output in engine.generate(prompts, params)]

    return answer


def evaluate_skills(
    engine: Engine,
    count: int,
    seed: int = 0,
    names: Sequence[str] | None = None,
    on_result: Callable[[SkillResult], None] | None = None,
    params: SamplingParams | None = None,
) -> list[SkillResult]:
    """`count` held-out questions of each skill (all, or those named).

    `params`: where the model's answers end and what it penalises; greedy without any.
    """
    answer = answer_greedily(engine, params)
    results = []
    for name in names or list(SKILLS):
        results.append(evaluate(answer, name, count, seed))
        if on_result is not None:
            on_result(results[-1])
    return results
