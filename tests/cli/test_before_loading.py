"""What happens before the weights are read, which may take minutes. Oracle: the order by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import run

from rorqual.errors import UsageError
from rorqual.weights import ModelFolder

VERBS: dict[str, tuple[str | None, tuple[object, ...]]] = {
    "chat": ("--model", ()),
    "generate": ("--model", ("--prompt", "The sea")),
    "demo-generate": ("--ckpt-path", ("--interactive",)),
    "eval": (None, ("--questions", 1)),
    "serve": ("--model", ("--port", 0)),
}


def command(verb: str, model: Path, *flags: object) -> tuple[object, ...]:
    target, more = VERBS[verb]
    return (verb, *((model,) if target is None else (target, model)), *more, *flags)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order; the command ends where it would read weights."""
    done: list[str] = []

    def load(*_: object) -> None:
        done.append("load")
        raise UsageError("far enough")

    monkeypatch.setattr(torch, "set_num_threads", lambda num: done.append(f"{num} threads"))
    monkeypatch.setattr(ModelFolder, "load_model", load)
    return done


@pytest.mark.parametrize("verb", VERBS)
def test_threads_are_set_first(verb: str, model_folder: Path, steps: list[str]) -> None:
    for flags, expected in (((), ["load"]), (("--threads", 1), ["1 threads", "load"])):
        done = run(*command(verb, model_folder, *flags))
        assert "far enough" in done.err, done.err
        assert steps == expected
        steps.clear()


# The model has no MTP module, and a context of 8192.
FAULTS: list[tuple[tuple[object, ...], str]] = [
    (("--speculate", 1), "no MTP module"),
    (("--max-model-len", 8193), "2 to the model's context of 8192"),
    (("--kv-cache-dtype", "int3"), "int3"),
    (("--kernels", "fast"), "unknown kernels"),
    (("--cache-memory", "0"), "--cache-memory is no size"),
    (("--threads", 0), "--threads is out of range"),
]


@pytest.mark.parametrize("verb", VERBS)
def test_flags_that_the_model_cannot_have_are_refused_first(
    verb: str, model_folder: Path, steps: list[str]
) -> None:
    for flags, words in FAULTS:
        done = run(*command(verb, model_folder, *flags))
        assert (done.code, words in done.err, steps) == (2, True, []), done.err


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("eval", ("--tasks", "nowhere"), "no such task"),
        ("eval", ("--recipe", "nowhere.toml"), "nowhere.toml"),
        ("chat", ("--temperature", -1), "temperature"),
        ("generate", ("--top-p", 2), "top_p"),
        ("serve", ("--set", "engine.nowhere=1"), "nowhere"),
        ("serve", ("--api-key-file", "nowhere.txt"), "nowhere.txt"),
        ("serve", ("--request-timeout", 0), "request_timeout"),
        ("serve", ("--served-model-name", " a"), "no name"),
    ],
)
def test_what_a_verb_cannot_do_is_refused_first(
    verb: str, flags: tuple[object, ...], words: str, model_folder: Path, steps: list[str]
) -> None:
    done = run(*command(verb, model_folder, *flags))
    assert (done.code, words in done.err, steps) == (2, True, []), done.err
