"""`--device` of every verb that computes: a fault is a message and exit code 2, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import run

VERBS = [
    ("chat",),
    ("generate", "--prompt", "3 feet in inches"),
    ("serve", "--port", "0"),
    ("eval", "tiny", "--questions", "1"),
    ("train", "recipes/tiny.toml", "--dry-run"),
    ("demo-generate", "--ckpt-path", "no-such-folder", "--interactive"),
]
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.toml"


def arguments(verb: tuple[str, ...]) -> list[str]:
    return [str(RECIPE) if part.endswith(".toml") else part for part in verb]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_device_that_is_not_there(verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = run(*arguments(verb), "--device", "cuda")
    assert done.code == 2
    assert "rorqual: the device 'cuda' cannot be used" in done.err
    assert "choose the device cpu or auto" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_an_unknown_device(verb: tuple[str, ...]) -> None:
    done = run(*arguments(verb), "--device", "tpu")
    assert done.code == 2
    assert "rorqual: unknown device 'tpu'" in done.err
    assert "auto, cpu, cuda or cuda:N" in done.err


def test_the_cpu_by_name_answers_as_auto_does() -> None:
    options = ("--prompt", "3 feet in inches", "--temperature", "0", "--max-new-tokens", "8")
    named, chosen = run("generate", *options, "--device", "cpu"), run("generate", *options)
    assert named.code in (None, 0), named.err
    assert named.out == chosen.out
    assert named.out.strip()
