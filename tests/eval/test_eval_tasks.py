"""Tasks asked of an engine. Oracle: an engine of our own that writes down what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any

from rorqual.corpus_writer import SKILLS
from rorqual.engine.params import SamplingParams
from rorqual.eval import answer_greedily, evaluate_tasks


@dataclass
class Listener:
    """Knows the right answers of two tasks, and keeps the parameters that it is given."""

    asked: list[tuple[Any, SamplingParams]] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(encode_chat=lambda messages: messages)

    def generate(self, prompts: list[Any], params: SamplingParams) -> list[Any]:
        self.asked += [(prompt, params) for prompt in prompts]
        known = {
            question.prompt: question.answer
            for name in ("dates", "units")
            for question in islice(SKILLS[name].questions("held_out", 3), 5)
        }
        return [SimpleNamespace(text=known.get(p[-1]["content"], "?")) for p in prompts]


def test_each_question_is_a_conversation_of_its_own() -> None:
    engine = Listener()
    asked = [
        [{"role": "user", "content": "one?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "two?"}],
    ]
    assert answer_greedily(engine)(asked) == ["?", "?"]  # type: ignore[arg-type]
    assert [prompt for prompt, _ in engine.asked] == asked
    assert {(p.temperature, p.max_tokens) for _, p in engine.asked} == {(0.0, 200)}


def test_tasks_come_one_after_the_other_as_they_are_named() -> None:
    engine, params = Listener(), SamplingParams(temperature=0.0, max_tokens=9)
    tasks = [SKILLS["units"], SKILLS["dates"], SKILLS["letters"]]
    found = evaluate_tasks(engine, tasks, 5, 3, params)  # type: ignore[arg-type]
    assert engine.asked == []
    first = next(found)
    assert (first.task, first.correct, first.total, len(engine.asked)) == ("units", 5, 5, 5)
    assert [(result.task, result.correct, result.total) for result in found] == [
        ("dates", 5, 5), ("letters", 0, 5),
    ]  # fmt: skip
    assert {id(given) for _, given in engine.asked} == {id(params)}
    questions = islice(SKILLS["dates"].questions("held_out", 3), 5)
    assert [p for p, _ in engine.asked[5:10]] == [question.messages for question in questions]
