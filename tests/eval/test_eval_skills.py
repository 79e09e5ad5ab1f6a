"""Skills asked of an engine. Oracle: an engine of our own that writes down what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from rorqual.engine.params import SamplingParams
from rorqual.eval import answer_greedily, evaluate_skills
from rorqual.tasks import SKILLS, held_out


@dataclass
class Listener:
    """Knows the right answers of two skills, and keeps the parameters that it is given."""

    asked: list[tuple[Any, SamplingParams]] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(encode_chat=lambda messages: messages)

    def generate(self, prompts: list[Any], params: SamplingParams) -> list[Any]:
        self.asked += [(prompt, params) for prompt in prompts]
        known = {q.prompt: q.answer for name in ("dates", "units") for q in held_out(name, 3, 5)}
        return [SimpleNamespace(text=known.get(p[0]["content"], "?")) for p in prompts]


def test_each_question_is_a_conversation_of_its_own() -> None:
    engine = Listener()
    assert answer_greedily(engine)(["one?", "two?"]) == ["?", "?"]  # type: ignore[arg-type]
    wanted = [[{"role": "user", "content": text}] for text in ("one?", "two?")]
    assert [prompt for prompt, _ in engine.asked] == wanted
    assert {(p.temperature, p.max_tokens) for _, p in engine.asked} == {(0.0, 200)}


def test_all_skills_or_those_named() -> None:
    seen: list[str] = []
    engine, params = Listener(), SamplingParams(temperature=0.0, max_tokens=9)
    found = evaluate_skills(
        engine, 5, 3, ["units", "dates"], lambda result: seen.append(result.skill), params
    )  # type: ignore[arg-type]
    assert [(result.skill, result.correct, result.total) for result in found] == [
        ("units", 5, 5), ("dates", 5, 5),
    ]  # fmt: skip
    assert seen == ["units", "dates"]
    assert {id(given) for _, given in engine.asked} == {id(params)}
    everything = evaluate_skills(Listener(), 2)  # type: ignore[arg-type]
    assert [result.skill for result in everything] == list(SKILLS)
    prompts = [q.prompt for q in held_out("dates", 0, 2)]
    engine = Listener()
    evaluate_skills(engine, 2, names=["dates"])  # type: ignore[arg-type]
    assert [prompt[0]["content"] for prompt, _ in engine.asked] == prompts
