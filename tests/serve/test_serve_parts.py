"""Metrics and errors, each alone. Oracle: the rules of docs/api.md, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError
from test_serve_metrics import EMPTY, samples

from rorqual.engine import EngineFailed, Usage
from rorqual.errors import UsageError
from rorqual.serve.errors import ApiError, describe, engine_failed, place_of, validation_error
from rorqual.serve.metrics import Metrics
from rorqual.serve.usage import usage_body

# Metrics


def test_each_number_of_the_engine_has_its_own_name() -> None:
    stats = replace(
        EMPTY,
        num_waiting=2,
        num_running=3,
        num_blocks=50,
        num_free_blocks=40,
        num_prefix_queried_tokens=80,
        num_prefix_hit_tokens=20,
        num_prompt_tokens=7,
        num_output_tokens=11,
        num_preemptions=13,
        drafted=(10, 8),
        accepted=(9, 2),
        num_drafts=5,
    )
    wanted = {
        "requests_waiting": 2,
        "requests_running": 3,
        "cache_blocks": 50,
        "cache_blocks_free": 40,
        "cache_usage_ratio": 0.2,
        "prefix_cache_queried_tokens_total": 80,
        "prefix_cache_hit_tokens_total": 20,
        "prefix_cache_hit_ratio": 0.25,
        "prompt_tokens_total": 7,
        "output_tokens_total": 11,
        "preemptions_total": 13,
        "draft_length": 5,
        "drafted_tokens_total position=1": 10,
        "drafted_tokens_total position=2": 8,
        "accepted_tokens_total position=1": 9,
        "accepted_tokens_total position=2": 2,
        "acceptance_ratio position=1": 0.9,
        "acceptance_ratio position=2": 0.25,
    }
    got = samples(Metrics(lambda: stats).text().decode())
    assert {name: got[f"rorqual_{name}"] for name in wanted} == wanted


def test_times_are_those_of_tokens() -> None:
    """The first piece counts from the request; the tokens of a later one share its time."""
    metrics = Metrics(lambda: EMPTY)
    for seconds, num_tokens, is_first in ((0.3, 2, True), (0.8, 4, False), (-1.0, 1, False)):
        metrics.note_piece(seconds, num_tokens, is_first)
    metrics.note_end("cancelled")
    metrics.note_end("length")
    got = samples(metrics.text().decode())
    for name, count, total in (("time_to_first_token", 1, 0.3), ("inter_token", 5, 0.8)):
        assert got[f"rorqual_{name}_seconds_count"] == count
        assert got[f"rorqual_{name}_seconds_sum"] == pytest.approx(total)
    assert got["rorqual_inter_token_seconds_bucket le=0.25"] == 5
    assert got["rorqual_inter_token_seconds_bucket le=0.1"] == 1
    ends = [got[f"rorqual_answers_total reason={r}"] for r in ("stop", "length", "cancelled")]
    assert ends == [0, 1, 1]


def test_usage_of_several_prompts_and_choices() -> None:
    """Choices 0 and 1 are of the first prompt, 2 and 3 of the second."""
    usages = {
        3: Usage(20, 0, 4),
        0: Usage(10, 10, 1, (3,), (1,)),
        2: Usage(20, 8, 3, (3, 0), (1, 0)),
        1: Usage(10, 9, 2),
    }
    body = usage_body(usages, 2)
    assert (body.prompt_tokens, body.completion_tokens, body.total_tokens) == (30, 10, 40)
    assert (body.prompt_cache_hit_tokens, body.prompt_cache_miss_tokens) == (18, 12)
    assert body.prompt_tokens_details.cached_tokens == 18
    details = body.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (2, 4)
    assert details.acceptance_by_position == [0.3333, 0]


# Errors


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, None, "invalid_request_error"),
        (401, None, "authentication_error"),
        (403, None, "permission_error"),
        (404, None, "not_found_error"),
        (408, None, "timeout_error"),
        (418, None, "invalid_request_error"),
        (429, None, "rate_limit_error"),
        (500, None, "server_error"),
        (503, None, "overloaded_error"),
        (503, "engine_failed", "server_error"),
        (504, None, "timeout_error"),
    ],
)
def test_the_type_of_an_error(status: int, code: str | None, kind: str) -> None:
    assert f'"type": "{kind}"' in ApiError(status, "words", code=code).body()


def test_what_a_client_is_told_of_an_error_of_a_lower_room() -> None:
    problem = UsageError("it is wrong", where="tools[1]", found=3, expected="4", fix="mend it")
    assert describe(problem) == "tools[1]: it is wrong (found 3; expected 4)"
    assert describe(UsageError("wrong", found=0)) == "wrong (found 0)"
    assert describe(UsageError("wrong", expected="4")) == "wrong (expected 4)"
    assert describe(UsageError("wrong")) == "wrong"
    assert place_of(problem) == "tools[1]"
    assert ApiError.of(problem, "messages").param == "tools[1]"
    assert place_of(UsageError("wrong", where=Path("messages[0]"))) is None
    assert ApiError.of(UsageError("wrong", where="config.json"), "prompt").param == "prompt"
    failed = engine_failed(EngineFailed("it failed", fix="restart"))
    assert (failed.status, failed.message) == (503, "it failed; restart")


@pytest.mark.parametrize("num_faults", [1, 4, 5, 6, 9])
def test_so_many_faults_are_told_and_the_others_counted(num_faults: int) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[int]).validate_python(["x"] * num_faults)
    error = validation_error(caught.value.errors())
    parts = error.message.split("; ")
    assert [part.split(":")[0] for part in parts[:5]] == [f"[{n}]" for n in range(num_faults)][:5]
    assert parts[5:] == ([f"and {num_faults - 5} more"] if num_faults > 5 else [])


def test_a_long_value_is_not_told_whole() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("x" * 200)
    message = validation_error(caught.value.errors()).message
    assert "x" * 79 in message
    assert "x" * 80 not in message
