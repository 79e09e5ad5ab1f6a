"""The clients that people use, unmodified, each in its own process against a server of ours.

What they ask and how is in `clients/use_NAME.py` and `.mjs`. Text, streams and tools come from a
scripted engine, whose answers are known; objects come from the real engine and the shipped weights,
whose grammar makes them valid whatever the model would say. `make clients` installs those that the
development environment does not have.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from live import Live, running
from served import make_model
from stretched import stretched_tiny

import forked
from patience import HANG_SECONDS
from rorqual.engine import AsyncEngine, Engine, SamplingParams
from rorqual.serve.app import create_app
from rorqual.serve.settings import ServedModel, ServerSettings
from rorqual.tokenizer import Tokenizer
from rorqual.weights import ModelFolder
from tool_call_texts import render_tool_calls

SCRIPTS = Path(__file__).parent / "clients"
BUILD = Path(__file__).parents[2] / "build"
DEPTH = "The sea is 11 km deep, and the whale knows it."
REPORT = "It is 11 degrees in Oslo."
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
FINAL = {"function": {"name": "final_answer", "arguments": json.dumps({"answer": REPORT})}}
SCRIPT = {
    "How deep": DEPTH,
    "Observation:\n11 degrees": render_tool_calls([FINAL]),  # an agent of smolagents ends so
    "11 degrees": REPORT,
    "weather in Oslo": render_tool_calls([CALL]),
}

LONG = 20_000
"""Positions: the instructions of an agent take many tokens of a small vocabulary."""

CHAT = ("text", "stream", "tools", "json")
PYTHON = {
    "openai": CHAT,
    "openai_responses": CHAT,
    "anthropic": CHAT,
    "litellm": CHAT,
    "langchain": CHAT,
    "langchain_anthropic": ("text", "stream", "tools"),
    "llama_index": CHAT,
    "pydantic_ai": CHAT,
    "instructor": ("tools", "json", "stream"),
    "smolagents": CHAT,
    "openai_agents": (*CHAT, "responses_text", "responses_tools"),
}
NODE = {
    "openai_node": (*CHAT, "responses"),
    "vercel_ai": (*CHAT, "responses"),
    "anthropic_node": ("text", "stream", "tools"),
}
IN_DEV = {"openai": "openai", "openai_responses": "openai", "anthropic": "anthropic"}
"""Clients of the development environment, by their package: the fast tests."""


class WithOpenai(forked.Popen):
    modules = ("openai",)


class WithAnthropic(forked.Popen):
    modules = ("anthropic",)


def cases(clients: dict[str, tuple[str, ...]]) -> Iterator[Any]:
    for name, questions in clients.items():
        marks = [] if name in IN_DEV else [pytest.mark.slow]
        yield from (pytest.param(name, what, marks=marks) for what in questions)


def ask(name: str, what: str, url: str) -> Any:
    """What the client's script printed."""
    is_node = name in NODE
    command = _node() if is_node else [_python(name)]
    script = SCRIPTS / f"use_{name}.{'mjs' if is_node else 'py'}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"CLIENTS_NODE": str(BUILD / "clients-node"), "OPENAI_API_KEY": "none"}
    words = [str(script), what, url, "sei"]
    if name in IN_DEV:  # importing them takes one to three seconds
        kind = WithAnthropic if name == "anthropic" else WithOpenai
        done = forked.run(*words, timeout=HANG_SECONDS, kind=kind, env=environment)
    else:
        done = subprocess.run(
            [*command, *words],
            capture_output=True,
            timeout=HANG_SECONDS,
            env=environment,
            check=False,
        )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def _python(name: str) -> str:
    if name in IN_DEV:
        if find_spec(IN_DEV[name]) is None:
            pytest.skip(f"the client {IN_DEV[name]} is not installed")
        return sys.executable
    folder = "clients-llama-index" if name == "llama_index" else "clients"
    if not (BUILD / folder / ".installed").exists():
        pytest.skip("the clients are not installed: make clients")
    return str(BUILD / folder / "bin" / "python")


def _node() -> list[str]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node found")
    if not (BUILD / "clients-node" / ".installed").exists():
        pytest.skip("the clients are not installed: make clients")
    return [node]


@pytest.fixture(scope="module")
def scripted(tokenizer: Tokenizer) -> Iterator[Live]:
    engine = FakeEngine(tokenizer, SCRIPT, step_tokens=2)
    with running(
        create_app(engine, make_model(tokenizer, max_positions=LONG), ServerSettings())
    ) as live:
        yield live


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The real engine with the shipped weights, at 8,192 positions."""
    folder = ModelFolder.find(str(stretched_tiny(tmp_path_factory.mktemp("model"))))
    engine = Engine(folder.load_model("float32"), folder.load_tokenizer(), max_batch=4)
    model = ServedModel(
        name="sei",
        tokenizer=engine.tokenizer,
        max_positions=engine.max_positions,
        defaults=SamplingParams(**folder.sampling()),
    )
    with running(create_app(AsyncEngine(engine), model, ServerSettings())) as live:
        yield live


@pytest.mark.concurrency
@pytest.mark.parametrize(("name", "what"), [*cases(PYTHON), *cases(NODE)])
def test_the_client(name: str, what: str, scripted: Live, request: pytest.FixtureRequest) -> None:
    is_object = what == "json" or name == "instructor"
    live = request.getfixturevalue("shipped") if is_object else scripted
    answer = ask(name, what, live.url)
    if is_object:
        last = answer[-1] if what == "stream" else answer
        assert last["kind"] in ("sea", "lake")
        assert last["is_deep"] in (True, False)
    elif what == "stream":
        assert "".join(answer) == DEPTH
        assert len([part for part in answer if part]) > 1
    else:
        assert answer == (REPORT if what.endswith("tools") else DEPTH)


def test_every_script_is_asked() -> None:
    scripts = {path.stem.removeprefix("use_") for path in SCRIPTS.glob("use_*")}
    assert scripts == {*PYTHON, *NODE}
