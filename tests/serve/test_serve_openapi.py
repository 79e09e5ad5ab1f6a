"""schemathesis on the OpenAPI description: no request whatever ends in a 500.

The short form sends few examples to each route; the long form, for `make test-all`, many.
"""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from fake_engine import FakeEngine
from hypothesis import HealthCheck, Phase, settings
from live import Live, running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance
from served import make_model

from rorqual.serve.app import create_app
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

NUM_SHORT, NUM_LONG = 6, 300
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]


@pytest.fixture(scope="module")
def fuzzed(tokenizer: Tokenizer) -> Any:
    engine = FakeEngine(tokenizer, step_tokens=8)
    limits = ServerSettings(max_files=20, max_file_bytes=100_000)
    with running(create_app(engine, make_model(tokenizer), limits)) as live:
        yield live


def fuzz(live: Live, num_examples: int) -> int:
    """Sends examples to every operation; the number of operations."""
    schema = schemathesis.openapi.from_dict(live.app.openapi())
    schema.config.update(base_url=live.url)
    num_operations = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        num_operations += 1

        def send(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        _given(operation, num_examples)(send)()
    return num_operations


def _given(operation: Any, num_examples: int) -> Any:
    from hypothesis import given

    def decorate(test: Any) -> Any:
        checked = given(case=operation.as_strategy())(test)
        return settings(
            max_examples=num_examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(checked)

    return decorate


def test_no_request_ends_in_a_500(fuzzed: Live) -> None:
    assert fuzz(fuzzed, NUM_SHORT) >= 15


@pytest.mark.slow
def test_no_request_ends_in_a_500_long(fuzzed: Live) -> None:
    fuzz(fuzzed, NUM_LONG)


def test_the_description_documents_every_field(fuzzed: Live) -> None:
    described = fuzzed.app.openapi()["components"]["schemas"]["ChatRequest"]
    assert described["additionalProperties"] is True  # ignored, and named
    assert {"top_k", "min_p", "repetition_penalty", "logit_bias"} <= set(described["properties"])
