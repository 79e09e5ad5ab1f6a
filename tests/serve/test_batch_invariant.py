"""`--batch-invariant` through the server: the same bits alone and in a crowd.

Oracle: the same request to the same server when nothing else runs. Texts and log-probabilities are
compared for equality, as they came over the wire. How the crowd arrives is drawn from a seed; that
it was one is read off the engine's largest step.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import torch
import web
from live import Live, running

from patience import HANG_SECONDS, wait_until
from rorqual.corpus_writer import SKILLS
from rorqual.engine import AsyncEngine, Engine, Request, SamplingParams
from rorqual.engine.draft_policy import FixedDrafts
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServedModel
from rorqual.weights import ModelFolder

pytestmark = pytest.mark.concurrency

ASKED = ("arithmetic", "units", "definitions", "stories", "python", "letters")
NUM_OTHERS = 10


@dataclass
class Tiny:
    """A server over the bundled model, and its engine, which notes how full its steps were."""

    live: Live
    engine: Engine
    most_segments: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    """Steps wait for it, so that a crowd can gather."""

    def reset(self) -> None:
        wait_until(lambda: not self.engine.has_work)
        self.most_segments = 0

    @property
    def url(self) -> str:
        return self.live.url


def serve(**settings: Any) -> Iterator[Tiny]:
    folder = ModelFolder.find("tiny")
    engine = Engine(folder.load_model(), folder.load_tokenizer(), max_batch=10, **settings)
    served = ServedModel(
        name="tiny", tokenizer=engine.tokenizer, max_positions=engine.max_positions
    )
    with running(create_app(AsyncEngine(engine), served)) as live:
        tiny = Tiny(live, engine)
        tiny.gate.set()
        step = engine.step

        def noted() -> Any:
            assert tiny.gate.wait(HANG_SECONDS)
            pieces = step()
            tiny.most_segments = max(tiny.most_segments, len(pieces))
            return pieces

        engine.step = noted  # type: ignore[method-assign]
        yield tiny


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.slow), 2])
def invariant(request: pytest.FixtureRequest) -> Iterator[Tiny]:
    drafts = FixedDrafts(request.param)
    yield from serve(
        is_batch_invariant=True,
        speculate=request.param,
        draft_policy=drafts,
        max_step_tokens=48,
    )


def chat(number: int, **settings: Any) -> tuple[str, dict[str, Any]]:
    skill = SKILLS[ASKED[number % len(ASKED)]]
    question = next(skill.questions("held_out", 100 + number))
    body = {"messages": [{"role": "user", "content": question.prompt}], "max_tokens": 30}
    return "/v1/chat/completions", body | settings


def watched() -> list[tuple[str, dict[str, Any]]]:
    """Greedy and sampled, chats and texts, with penalties and filters, and a scored prompt."""
    likely: dict[str, Any] = {"logprobs": True, "top_logprobs": 5}
    forever = {"logit_bias": {"1": -100}}  # no end of sentence: there is much to compare
    text: dict[str, Any] = {"prompt": "A fox and a crow", "logprobs": 5, "max_tokens": 30}
    scored = "The capital of France is Paris. " * 6
    return [
        chat(0, temperature=0, **likely),
        chat(1, temperature=0, **likely, **forever),
        chat(2, temperature=1, seed=5, **likely, **forever),
        chat(3, temperature=1.5, seed=6, top_p=0.9, min_p=0.01, **likely),
        chat(4, temperature=1, seed=7, n=2, frequency_penalty=0.5, **likely, **forever),
        ("/v1/completions", text | {"temperature": 0}),
        ("/v1/completions", text | {"temperature": 1, "seed": 8} | forever),
        ("/v1/completions", {"prompt": scored, "max_tokens": 0, "echo": True, "logprobs": 3}),
    ]


def answers_of(body: dict[str, Any]) -> Any:
    """What of a reply may not change: all but its id, its time and what the cache saved."""
    return body["choices"]


def ask_alone(tiny: Tiny) -> list[Any]:
    replies = []
    for path, body in watched():
        tiny.reset()
        reply = web.post(tiny.url + path, json=body)
        assert reply.status_code == 200, reply.text
        replies.append(answers_of(reply.json()))
        assert tiny.most_segments <= body.get("n", 1)
    return replies


async def _ask_in_a_crowd(tiny: Tiny, seed: int) -> list[Any]:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=tiny.url, timeout=HANG_SECONDS) as client:

        async def ask(delay: float, path: str, body: dict[str, Any]) -> Any:
            await asyncio.sleep(delay)
            reply = await client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            return answers_of(reply.json())

        others = [
            chat(rng.randrange(1000), temperature=1, max_tokens=24, logit_bias={"1": -100})
            for _ in range(NUM_OTHERS)
        ]
        asked = [*watched(), *others]
        tiny.gate.clear()
        order = rng.sample(range(len(asked)), len(asked))
        tasks = {place: asyncio.ensure_future(ask(rng.random(), *asked[place])) for place in order}
        while tiny.live.app.state.service.num_in_flight < tiny.engine.max_batch:
            await asyncio.sleep(0.01)
        tiny.gate.set()
        return [await tasks[place] for place in range(len(asked))][: len(watched())]


def ask_in_a_crowd(tiny: Tiny, seed: int) -> list[Any]:
    tiny.reset()
    return asyncio.run(_ask_in_a_crowd(tiny, seed))


def test_company_changes_no_bit(invariant: Tiny) -> None:
    alone = ask_alone(invariant)
    assert len({str(choices) for choices in alone}) == len(alone)
    for seed in range(2):
        crowded = ask_in_a_crowd(invariant, seed)
        for (path, body), one, many in zip(watched(), alone, crowded, strict=True):
            assert many == one, (path, body)
        assert invariant.most_segments >= 8, "there was no crowd"
    stats = invariant.engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_prefix_hit_tokens > 0  # also blocks from the cache hold the same bits


def test_the_server_says_what_the_engine_says(invariant: Tiny) -> None:
    """Over the wire no digit of a log-probability is lost."""
    folder = ModelFolder.find("tiny")
    engine = Engine(folder.load_model(), folder.load_tokenizer(), is_batch_invariant=True)
    path, body = chat(0, temperature=0, logprobs=True, top_logprobs=5)
    prompt = engine.tokenizer.encode_chat(body["messages"])
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=5)
    [said] = engine.generate_each([Request(prompt, params)])
    # The server's engine runs in a thread of its own; the sums hang on how many torch uses there.
    assert torch.get_num_threads() == 1
    choice = web.post(invariant.url + path, json=body).json()["choices"][0]
    assert choice["message"]["content"] == said.text
    entries = choice["logprobs"]["content"]
    shown = [entry for entry in said.logprobs if entry.token_id != engine.tokenizer.eos_id]
    assert [entry["logprob"] for entry in entries][: len(shown)] == [e.logprob for e in shown]


def test_without_it_some_bits_differ() -> None:
    """The comparison can fail: plain batches do change the last digits of some log-probability."""
    for tiny in serve():
        alone = ask_alone(tiny)
        assert any(ask_in_a_crowd(tiny, seed) != alone for seed in range(5))
