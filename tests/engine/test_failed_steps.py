"""A step that fails before its commit leaves no trace. Oracle: an engine that nothing disturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import ALWAYS

from rorqual.engine import Answer, Engine, Request, SamplingParams
from rorqual.engine.grammar import Grammar
from rorqual.model import DeepseekV3
from rorqual.tokenizer import Tokenizer

KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 0, "prompt_logprobs": 1, "logprobs": 1},
    {"temperature": 1.0, "stop": ("e",), "min_tokens": 3},
    {
        "temperature": 0.9,
        "frequency_penalty": 0.5,
        "ignore_eos": False,
        "grammar": Grammar("regex", "[a-e ]{5,40}"),
    },
]
STAGES = ("_run", "_verify", "_commit")


class BrokenError(Exception):
    pass


def ask_all(engine: Engine, prompts: list[list[int]]) -> list[Answer]:
    answers = []
    for seed, (prompt, kind) in enumerate(zip(prompts, KINDS, strict=True)):
        params = SamplingParams(**{"max_tokens": 14, "seed": seed, "ignore_eos": True, **kind})
        answers.append(engine.add(Request(prompt, params)))
    return answers


def traces(engine: Engine) -> list[Any]:
    """All of the answers that a step may change, tensors as lists."""
    found: list[Any] = []
    for answer, sequence in engine._sequences.items():
        depths = [(*d[:3], [rows.tolist() for rows in d.rows]) for d in sequence.depths or ()]
        known = answer.prompt_logprobs and list(answer.prompt_logprobs)
        found.append((answer.text, list(answer.token_ids), list(sequence.token_ids)))
        found.append((depths, known, list(answer.logprobs), answer.state.uniform()))
    return found


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_fails_between_two_stages_can_be_done_again(
    guesser: DeepseekV3, tokenizer: Tokenizer, prompts: list[list[int]], stage: str, speculate: int
) -> None:
    pytest.importorskip("llguidance")

    def engine_for(model: DeepseekV3) -> Engine:
        return Engine(
            model, tokenizer, max_step_tokens=40, speculate=speculate, draft_policy=ALWAYS
        )

    calm, engine = engine_for(guesser), engine_for(guesser)
    expected, answers = ask_all(calm, prompts), ask_all(engine, prompts)
    while calm.has_work:
        calm.step()
    num_failed = 0

    def broken(*_: object) -> Any:
        raise BrokenError

    while engine.has_work:
        before = traces(engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, stage, broken)
            with pytest.raises(BrokenError):
                engine.step()
        num_failed += 1
        assert traces(engine) == before
        engine.step()
    assert num_failed > 3
    for answer, other in zip(answers, expected, strict=True):
        assert answer.output() == other.output()
        assert answer.usage.accepted == other.usage.accepted
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_a_segment_is_frozen(model: DeepseekV3, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    engine.add(Request([5, 6, 7], SamplingParams(max_tokens=2, temperature=0)))
    (segment,) = engine._scheduler.schedule()
    assert (segment.start, segment.stop, segment.is_last, segment.is_decode) == (0, 3, True, False)
    (ran,), _ = engine._run([segment])
    assert segment.hidden_TD is None
    assert ran.hidden_states.shape == (3, model.config.hidden_size)
    with pytest.raises(AttributeError):
        segment.drafts = (1,)  # type: ignore[misc]
    assert torch.equal(engine._run([segment])[0][0].hidden_states, ran.hidden_states)
