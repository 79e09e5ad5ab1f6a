"""What one client asks for harms no other: texts that cannot fit, grammars that take long.

Oracle: the engine in process, the bound on what a token holds, and the counts of the engine.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import web
from fake_engine import FakeEngine
from live import Live, client_of, running
from openai import BadRequestError, OpenAI
from served import CONTEXT, make_model
from test_serve_limits import asking

from patience import HANG_SECONDS, wait_until
from rorqual.engine import CompiledGrammar, Grammar
from rorqual.errors import UsageError
from rorqual.serve.app import create_app
from rorqual.serve.fair_pool import Caller
from rorqual.serve.service import Service
from rorqual.serve.settings import ServerSettings
from rorqual.tokenizer import Tokenizer

pytestmark = pytest.mark.concurrency

HELLO: Any = [{"role": "user", "content": "hello"}]
SPACE = {"role": "user", "content": " "}
REGEX = {"type": "regex", "regex": "[a-z]+"}
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}
KEYS = ("first-key-0001", "second-key-0002")


class SlowGrammars(FakeEngine):
    """Compiling waits for a gate, and may fail."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.may_compile = threading.Event()
        self.asked: list[Grammar] = []
        self.made: dict[Grammar, CompiledGrammar] = {}
        self.problem_of_grammar: UsageError | None = None

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        self.asked.append(grammar)
        assert self.may_compile.wait(HANG_SECONDS)
        if self.problem_of_grammar is not None:
            raise self.problem_of_grammar
        return self.made.setdefault(grammar, super().compile(grammar))

    def known_grammar(self, grammar: Grammar) -> CompiledGrammar | None:
        return self.made.get(grammar)


@contextmanager
def serving(engine: FakeEngine, **settings: Any) -> Iterator[Live]:
    model = make_model(engine.tokenizer)
    with running(create_app(engine, model, ServerSettings(**settings))) as live:
        yield live


class Asking:
    """A request in a thread of its own."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self.reply: Any = None
        self._thread = threading.Thread(target=self._run, args=(ask,), daemon=True)
        self._thread.start()

    def _run(self, ask: Callable[[], Any]) -> None:
        try:
            self.reply = ask()
        except Exception as problem:  # noqa: BLE001  the test looks at it
            self.reply = problem

    def end(self) -> Any:
        self._thread.join(HANG_SECONDS)
        assert not self._thread.is_alive()
        return self.reply


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Iterator[SlowGrammars]:
    engine = SlowGrammars(tokenizer)
    yield engine
    engine.may_compile.set()


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "TEXT"}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": "TEXT"}, SPACE]},
         "messages"),
        ("/v1/completions", {"prompt": "TEXT"}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "TEXT"]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "suffix": "TEXT"}, "suffix"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_untokenised(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, route: str, body: Any, param: str
) -> None:
    longest = max(map(len, tokenizer.token_bytes))
    too_long = longest * (CONTEXT - 1) + 1
    texts: list[str] = []
    encode = Tokenizer.encode_batch

    def watch(self: Tokenizer, batch: Any, bos: bool = False) -> Any:
        texts.extend(batch)
        return encode(self, batch, bos)

    monkeypatch.setattr(Tokenizer, "encode_batch", watch)
    with serving(FakeEngine(tokenizer)) as live:
        for length, is_tokenised in ((too_long, False), (too_long - 1, True)):
            text = json.dumps(body).replace("TEXT", "x" * length)
            reply = web.post(live.url + route, json=json.loads(text))
            error = reply.json()["error"]
            assert (reply.status_code, error["code"]) == (400, "context_length_exceeded")
            assert is_tokenised or error["param"] == param
            assert any("x" * 1000 in text for text in texts) == is_tokenised
            assert ("at least" in error["message"]) != is_tokenised


@pytest.mark.parametrize("text", ["whale \n" * 900, "\U0001f40b" * 300, "<think>\u3000" * 250])
def test_the_bound_never_refuses_what_fits(tokenizer: Tokenizer, text: str) -> None:
    """At a context of exactly as many tokens as the prompt and the answer's first one have."""
    num_tokens = len(tokenizer.encode_chat([{"role": "user", "content": text}]))
    model = make_model(tokenizer, max_positions=num_tokens + 1)
    with running(create_app(FakeEngine(tokenizer), model)) as live:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        assert web.post(live.url + "/v1/chat/completions", json=body).status_code == 200


def test_tokenize_answers_long_texts_as_before(tokenizer: Tokenizer) -> None:
    text = "The whale swims. " * 20_000
    with serving(FakeEngine(tokenizer)) as live:
        body = {"prompt": text, "return_token_strs": True}
        reply = web.post(live.url + "/tokenize", json=body).json()
    ids = tokenizer.encode(text, bos=True)
    assert reply["tokens"] == ids
    assert (reply["count"], reply["max_model_len"]) == (len(ids), CONTEXT)
    assert "".join(reply["token_strs"][1:]) == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": REGEX}, "response_format"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_grammar_that_cannot_be_compiled_is_a_400_by_name(
    engine: SlowGrammars, fields: Any, param: str, is_stream: bool
) -> None:
    engine.problem_of_grammar = UsageError("takes too long", expected="at most 2 s")
    engine.may_compile.set()
    with serving(engine) as live:
        with pytest.raises(BadRequestError) as caught:
            client_of(live).chat.completions.create(
                model="sei", messages=HELLO, stream=is_stream, n=3, **_extra(fields)
            )
        assert caught.value.param == param
        assert caught.value.code == "invalid_grammar"
        assert "at most 2 s" in str(caught.value)
        assert len(engine.asked) == 1
        assert engine.requests == [], "the engine has never heard of it"
        page = web.get(live.url + "/metrics").text
        assert 'answers_total{reason="cancelled"} 0.0' in page


def _extra(fields: Any) -> Any:
    return {"extra_body": fields}


def test_others_are_answered_while_a_grammar_compiles(engine: SlowGrammars) -> None:
    """Another key's grammar too, and one that is known; all that wait get theirs in the end."""
    with serving(engine, api_keys=KEYS) as live:
        one, two = (client_of(live, key) for key in KEYS)

        def ask(client: OpenAI, **fields: Any) -> Any:
            return client.chat.completions.create(model="sei", messages=HELLO, **_extra(fields))

        known = Grammar("regex", "known")
        engine.made[known] = FakeEngine.compile(engine, known)
        slow = [
            Asking(lambda n=n: ask(one, response_format={"type": "regex", "regex": f"a{n}"}))
            for n in range(3)
        ]
        wait_until(lambda: len(engine.asked) == 1)
        assert ask(one).choices[0].message.content
        assert ask(one, response_format={"type": "regex", "regex": "known"}).choices
        assert web.get(live.url + "/health").status_code == 200
        other = Asking(lambda: ask(two, response_format={"type": "regex", "regex": "b"}, n=2))
        wait_until(lambda: len(engine.asked) == 2)
        assert engine.asked[1] == Grammar("regex", "b")
        engine.may_compile.set()
        assert [bool(each.end().choices) for each in (*slow, other)] == [True] * 4
        for request in engine.requests:
            assert request.compiled is engine.made.get(request.params.grammar, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_while_its_grammar_compiles_leaves_nothing(
    engine: SlowGrammars, is_stream: bool
) -> None:
    with serving(engine) as live:
        service: Service = live.app.state.service
        body = {"messages": HELLO, "response_format": REGEX, "stream": is_stream, "n": 2}
        with asking(live, body):
            wait_until(lambda: engine.asked)
        wait_until(lambda: service.num_in_flight == 0)  # at once: nothing has been compiled yet
        assert not engine.made
        engine.may_compile.set()
        assert engine.num_open == 0
        wait_until(lambda: engine.made)  # the next one who wants it has it


def test_a_client_that_leaves_while_its_work_waits_has_no_place(engine: SlowGrammars) -> None:
    """Its second grammar has not begun: a client has one thread of two. It never begins."""
    with serving(engine) as live:
        service: Service = live.app.state.service
        body = {"messages": HELLO, "response_format": REGEX}
        with asking(live, body):
            wait_until(lambda: engine.asked)
            with asking(live, body | {"response_format": REGEX | {"regex": "b"}}):
                wait_until(lambda: service._grammars.num_waiting == 1)
            wait_until(lambda: service.num_in_flight == 1)
            assert service._grammars.num_waiting == 0
            engine.may_compile.set()
            wait_until(lambda: engine.requests)
        wait_until(lambda: service.num_in_flight == 0)
        assert [grammar.text for grammar in engine.asked] == ["[a-z]+"]


def test_draining_waits_for_a_grammar_and_its_answer(engine: SlowGrammars) -> None:
    with serving(engine) as live:
        waiting = Asking(
            lambda: client_of(live).chat.completions.create(
                model="sei", messages=HELLO, **_extra({"response_format": REGEX})
            )
        )
        wait_until(lambda: engine.asked)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        live.app.state.service.is_draining = True
        reply = web.post(live.url + "/v1/chat/completions", json={"messages": HELLO})
        assert reply.status_code == 503
        engine.may_compile.set()
        assert waiting.end().choices[0].message.content
        wait_until(lambda: live.has_ended)


def test_who_asks_travels_with_the_request(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer)
    with serving(engine, api_keys=KEYS) as live:
        for key in (*KEYS, KEYS[0]):
            client_of(live, key).completions.create(model="sei", prompt="a", n=2)
        headers = {"authorization": f"Bearer {KEYS[1]}"}
        body: Any = {"model": "sei", "messages": HELLO, "max_tokens": 5}
        web.post(live.url + "/v1/messages", json=body, headers=headers)
        web.post(live.url + "/v1/responses", json={"input": "hello"}, headers=headers)
    owners = [request.owner for request in engine.requests]
    assert owners[6:] == owners[2:4]
    del owners[6:]
    assert owners[:2] == owners[4:]
    assert owners[0] != owners[2]
    engine = FakeEngine(tokenizer)
    with serving(engine) as live:
        headers = {"x-forwarded-for": "1.2.3.4", "forwarded": "for=1.2.3.4"}
        body = {"messages": HELLO}
        web.post(live.url + "/v1/chat/completions", json=body, headers=headers)
    (request,) = engine.requests
    assert (request.owner, request.is_background) == ("address 127.0.0.1", False)


def test_full_pools_are_429(tokenizer: Tokenizer) -> None:
    service = Service(FakeEngine(tokenizer), make_model(tokenizer), ServerSettings())
    is_open = threading.Event()

    async def test() -> None:
        caller = Caller(owner="a")
        tasks = [
            asyncio.create_task(
                service.aside(lambda: is_open.wait(HANG_SECONDS), "prompt", caller, 10**6)
            )
            for _ in range(200)
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        problem = done.pop().exception()
        assert getattr(problem, "status", None) == 429
        assert await service.aside(lambda: 7, "prompt", caller, 10) == 7, "short texts pass"
        is_open.set()
        await asyncio.wait(tasks)
        service.close()

    asyncio.run(test())


def test_a_long_context_may_be_filled_with_ids(tokenizer: Tokenizer) -> None:
    """A body may have twice as many values as the context has positions, if that is more: then it
    is read, and refused as too long for the context.
    """
    engine, model = FakeEngine(tokenizer), make_model(tokenizer, max_positions=51_000)
    with running(create_app(engine, model)) as live:
        for num, status in ((101_990, 400), (102_010, 413)):
            body = {"prompt": [5] * num, "max_tokens": 1}
            assert web.post(live.url + "/v1/completions", json=body).status_code == status


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_that_a_drain_cannot_wait_for_ends_with_503(
    tokenizer: Tokenizer, is_stream: bool
) -> None:
    engine = FakeEngine(tokenizer, hold_after=2 if is_stream else 0)
    with serving(engine, drain_timeout_seconds=0.05, keep_alive_seconds=HANG_SECONDS) as live:
        body = {"messages": HELLO, "stream": is_stream}
        url = live.url + "/v1/chat/completions"
        waiting = Asking(lambda: web.post(url, json=body))
        wait_until(lambda: engine.is_held)
        live.loop.call_soon_threadsafe(live.server.begin_drain)
        reply = waiting.end()
        if is_stream:
            assert reply.status_code == 200
            last = reply.text.strip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "overloaded"
        else:
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
            assert int(reply.headers["retry-after"]) > 0
        counts = live.app.state.service.metrics.text().decode()
        assert 'answers_total{reason="closed"} 1.0' in counts
        assert 'answers_total{reason="cancelled"} 0.0' in counts
        wait_until(lambda: live.has_ended)
