"""Grammars that take too long, or end the process that compiles them, harm a helper and no more.

Oracle: the library in this process, for grammars that do no harm; the system's list of processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patience import HANG_SECONDS, is_there, wait_until
from rorqual.engine import grammar_helper, grammar_trial
from rorqual.engine.grammar import LIMITS, Grammar, GrammarCompiler
from rorqual.engine.grammar_trial import GrammarTrial
from rorqual.errors import UsageError
from rorqual.tokenizer import Tokenizer

pytest.importorskip("llguidance")
pytestmark = pytest.mark.concurrency

ENDLESS = json.dumps({"anyOf": [{"type": "integer", "multipleOf": 99991 - i} for i in range(60)]})
"""Minutes in 3,000 characters."""
DEEP = "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(20_000)) + '\na20000: "x"'
"""More rules within each other than a stack holds."""


@pytest.fixture
def trial(tokenizer: Tokenizer) -> Iterator[GrammarTrial]:
    trial = GrammarTrial(tokenizer)
    yield trial
    trial.close()


def pids(trial: GrammarTrial) -> list[int]:
    return [helper._process.pid for helper in (*trial._idle, *trial._busy)]


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_object", "", None),
        ("regex", "[a-c]+", None),
        ("choice", '["whale", "sea"]', None),
        ("grammar", "start: foo", "foo"),
        ("grammar", "start: a\na: a", "matches no text"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        # What compiles and cannot be begun: too much may follow the first token.
        ("choice", json.dumps([f"choice {number}" for number in range(3000)]), "row"),
    ],
)
def test_a_trial_says_what_the_library_says(
    tokenizer: Tokenizer, trial: GrammarTrial, kind: Any, text: str, words: str | None
) -> None:
    tried, plain = GrammarCompiler(tokenizer, trial=trial), GrammarCompiler(tokenizer)
    grammar = Grammar(kind, text)
    if words is None:
        matchers = [compiler.compile(grammar).matcher() for compiler in (tried, plain)]
        assert matchers[0].allowed().equal(matchers[1].allowed())
        return
    with pytest.raises(UsageError, match=words) as caught:
        tried.compile(grammar)
    if words != "row":
        with pytest.raises(UsageError) as alone:
            plain.compile(grammar)
        assert str(alone.value) == str(caught.value)
    again = [pytest.raises(UsageError, match=words), pytest.raises(UsageError, match=words)]
    known = pids(trial)
    trial.close()
    for expected in again:  # from the cache: no helper is asked
        with expected:
            tried.compile(grammar)
    assert known == pids(trial)


def test_a_helper_is_kept_and_one_that_ended_is_replaced(trial: GrammarTrial) -> None:
    assert trial.run('start: "a"', LIMITS) is None
    (first,) = pids(trial)
    assert trial.run('start: "b"', LIMITS) is None
    assert pids(trial) == [first]
    with pytest.raises(UsageError, match="ended the process"):
        trial.run(DEEP, LIMITS)
    assert pids(trial) == []
    assert trial.run('start: "a"', LIMITS) is None
    (second,) = pids(trial)
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: not trial._idle[0].is_alive)
    assert trial.run('start: "a"', LIMITS) is None
    assert pids(trial) != [second]


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [("MAX_SECONDS", 0, "0 s of processor time"), ("MAX_WAIT_SECONDS", 0.2, "busy machine")],
)
def test_what_takes_too_long_is_ended(
    tokenizer: Tokenizer,
    trial: GrammarTrial,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: float,
    words: str,
) -> None:
    compiler = GrammarCompiler(tokenizer, trial=trial)
    monkeypatch.setattr(grammar_trial, limit, value)
    grammar = Grammar("json_schema", ENDLESS)
    with pytest.raises(UsageError, match=words):
        compiler.compile(grammar)
    is_kept = grammar in compiler._compiled
    assert is_kept == (limit == "MAX_SECONDS"), "what a busy machine decided is tried again"
    assert pids(trial) == []


def test_a_clock_stops_with_its_trial(trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would end the helper later, in the middle of whatever that does then."""
    timers: list[threading.Timer] = []

    class Noted(threading.Timer):
        def start(self) -> None:
            timers.append(self)
            super().start()

    monkeypatch.setattr(threading, "Timer", Noted)
    assert trial.run('start: "a"', LIMITS) is None
    with pytest.raises(UsageError):
        trial.run(DEEP, LIMITS)
    assert [timer.finished.is_set() for timer in timers] == [True, True]


@pytest.mark.parametrize("used", [0.0, 57.3])
def test_each_trial_has_its_own_seconds(monkeypatch: pytest.MonkeyPatch, used: float) -> None:
    """The system counts a process's time from its start: a helper that is kept has used some."""
    resource = pytest.importorskip("resource")
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (9, 1000))
    monkeypatch.setattr(grammar_helper.time, "process_time", lambda: used)
    grammar_helper._bound_seconds(2)
    [(soft, hard)] = limits
    assert 2 <= soft - used <= 3
    assert hard == 1000


def test_tokens_that_take_long_to_choose_are_refused(
    trial: GrammarTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "MAX_MASK_SECONDS", -1)
    problem = trial.run("start: /[a-z]{1,9}/", LIMITS)
    assert problem is not None
    assert "a token takes" in problem


def test_closing_ends_what_runs(trial: GrammarTrial) -> None:
    problems: list[BaseException] = []

    def run() -> None:
        try:
            GrammarCompiler(trial._tokenizer, trial=trial).compile(Grammar("json_schema", ENDLESS))
        except UsageError as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: trial._busy)
    (pid,) = pids(trial)
    trial.close()
    thread.join(HANG_SECONDS)
    assert len(problems) == 1
    assert not is_there(pid)
    with pytest.raises(UsageError):
        trial.run('start: "a"', LIMITS)
    assert pids(trial) == []


def test_two_who_want_the_same_compile_it_once(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = GrammarCompiler(tokenizer)
    made: list[Grammar] = []
    is_open = threading.Event()
    compile_one = compiler._compile

    def slowly(grammar: Grammar) -> Any:
        made.append(grammar)
        assert is_open.wait(HANG_SECONDS)
        return compile_one(grammar)

    monkeypatch.setattr(compiler, "_compile", slowly)
    slow, results = Grammar("regex", "a+"), []
    threads = [
        threading.Thread(target=lambda: results.append(compiler.compile(slow))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: made)
    assert compiler.known(slow) is None
    is_open.set()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert made == [slow]
    assert results == [compiler.known(slow)] * 3


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc for processes")
@pytest.mark.parametrize("text", ['start: "a"', "endless"])
def test_no_helper_outlives_its_parent(tokenizer: Tokenizer, text: str) -> None:
    """Killed with -9, also while the helper compiles."""
    grammar = text
    if text == "endless":
        llguidance = pytest.importorskip("llguidance")
        grammar = llguidance.LLMatcher.grammar_from_json_schema(ENDLESS)
    messages = [
        {
            "tokens": [token.decode("latin-1") for token in tokenizer.token_bytes],
            "eos_id": tokenizer.eos_id,
            "bos_id": tokenizer.bos_id,
            "special_ids": list(tokenizer.special_ids.values()),
        },
        {"grammar": grammar, "limits": LIMITS, "seconds": 500, "mask_seconds": 9},
    ]
    frames = b"".join(
        len(content := json.dumps(message).encode()).to_bytes(8, "big") + content
        for message in messages
    )
    code = (
        "import subprocess, sys, time\n"
        "command = [sys.executable, '-P', sys.argv[1]]\n"
        "helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "helper.stdin.write(sys.stdin.buffer.read())\n"
        "helper.stdin.flush()\n"
        "print(helper.pid, flush=True)\n"
        "time.sleep(1e6)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(grammar_helper.__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(frames)
    parent.stdin.close()
    pid = int(parent.stdout.readline())
    assert is_there(pid)
    parent.kill()
    parent.wait(HANG_SECONDS)
    parent.stdout.close()
    wait_until(lambda: not is_there(pid))
