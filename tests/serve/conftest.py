"""A small tokenizer with every special token, a live server over the fake engine, and the chat page
in a browser before its stub (`stage`, `chat`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from batch_stage import answering, stages
from fake_engine import FakeEngine
from live import Live, running
from openai import OpenAI
from served import SCRIPT, TEXTS, make_model
from stage import Chat, Stage, open_stage

from patience import HANG_SECONDS
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServedModel, ServerSettings
from rorqual.tokenizer import Tokenizer, train_tokenizer

__all__ = ["answering", "stages"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> ServedModel:
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> FakeEngine:
    return FakeEngine(tokenizer, SCRIPT, step_tokens=3, num_drafts=2)


@pytest.fixture(scope="module")
def live(engine: FakeEngine, model: ServedModel) -> Iterator[Live]:
    with running(create_app(engine, model, ServerSettings(keep_alive_seconds=0.2))) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> OpenAI:
    return OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, timeout=HANG_SECONDS)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with open_stage() as stage:
        yield stage


@pytest.fixture
def chat(stage: Stage) -> Iterator[Chat]:
    with stage.chat() as chat:
        yield chat
