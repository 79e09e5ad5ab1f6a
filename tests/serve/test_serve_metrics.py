"""What Prometheus reads. Oracle: prometheus-client's own parser, and what was sent."""

from __future__ import annotations

import math

import web
from fake_engine import DEFAULT, FakeEngine
from live import running
from prometheus_client.parser import text_string_to_metric_families
from served import make_model

from rorqual.engine import EngineStats, Usage
from rorqual.serve.app import create_app
from rorqual.serve.metrics import Metrics
from rorqual.serve.usage import usage_body
from rorqual.tokenizer import Tokenizer

EMPTY = EngineStats(
    num_waiting=0,
    num_running=0,
    num_blocks=0,
    num_free_blocks=0,
    num_prefix_queried_tokens=0,
    num_prefix_hit_tokens=0,
    num_prompt_tokens=0,
    num_output_tokens=0,
    num_preemptions=0,
    drafted=(),
    accepted=(),
    num_drafts=0,
)


def samples(text: str) -> dict[str, float]:
    """Every sample by name and labels."""
    return {
        sample.name + "".join(f" {name}={value}" for name, value in sample.labels.items()): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_everything_is_there_from_the_start_and_nothing_is_negative() -> None:
    got = samples(Metrics(lambda: EMPTY).text().decode())
    for name in (
        "rorqual_requests_waiting",
        "rorqual_requests_running",
        "rorqual_cache_usage_ratio",
        "rorqual_prefix_cache_hit_ratio",
        "rorqual_output_tokens_total",
        "rorqual_time_to_first_token_seconds_count",
        "rorqual_inter_token_seconds_count",
        "rorqual_acceptance_ratio position=1",
        "rorqual_draft_length",
        "rorqual_answers_total reason=stop",
        "rorqual_http_responses_total status=429",
    ):
        assert got[name] == 0
    assert all(value >= 0 and not math.isnan(value) for value in got.values())


def test_counts_follow_what_was_served(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer, num_drafts=2)
    with running(create_app(engine, make_model(tokenizer))) as live:
        body = {"messages": [{"role": "user", "content": "hello"}]}
        for _ in range(3):
            web.post(live.url + "/v1/chat/completions", json=body)
        web.post(live.url + "/v1/chat/completions", json={})
        response = web.get(live.url + "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    got = samples(response.text)
    num_tokens = len(tokenizer.encode(DEFAULT)) + 1
    assert got["rorqual_output_tokens_total"] == 3 * num_tokens
    assert got["rorqual_time_to_first_token_seconds_count"] == 3
    assert got["rorqual_inter_token_seconds_count"] == 3 * (num_tokens - 1)
    assert got["rorqual_answers_total reason=stop"] == 3
    assert got["rorqual_http_responses_total status=200"] == 3
    assert got["rorqual_http_responses_total status=422"] == 1
    assert got["rorqual_acceptance_ratio position=2"] == 0.8
    assert got["rorqual_draft_length"] == 2
    assert got["rorqual_http_requests_in_flight"] == 0
    assert all(value >= 0 for value in got.values())


def test_usage_adds_up_over_choices() -> None:
    usages = {0: Usage(10, 4, 5, (4, 2), (3, 1)), 1: Usage(10, 8, 7, (4,), (1,))}
    body = usage_body(usages, num_choices_per_prompt=2, num_reasoning_tokens=3)
    assert (body.prompt_tokens, body.completion_tokens, body.total_tokens) == (10, 12, 22)
    assert (body.prompt_cache_hit_tokens, body.prompt_cache_miss_tokens) == (4, 6)
    details = body.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (5, 5)
    assert details.acceptance_by_position == [0.5, 0.5]
    assert details.reasoning_tokens == 3
    two_prompts = usage_body(usages, num_choices_per_prompt=1)
    assert (two_prompts.prompt_tokens, two_prompts.prompt_cache_hit_tokens) == (20, 12)
