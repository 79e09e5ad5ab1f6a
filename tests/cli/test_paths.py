"""Paths that a user gives and the system refuses: each error says where, what and the mend.

Oracle: the system's own refusals.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from command import run

from rorqual.errors import UsageError
from rorqual.files import explained

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny.toml"


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", RECIPE, "--run", "FILE"),
        ("train", RECIPE, "--run", "FILE/inside"),
        ("train", RECIPE, "--run", "/proc/x"),
        ("data", "build", RECIPE, "--set", "data.folder='FILE'"),
        ("generate", "--input-file", "FILE/inside", "--output-file", "out.jsonl"),
        ("generate", "--input-file", "FOLDER", "--output-file", "out.jsonl"),
        ("generate", "--input-file", "PROMPTS.jsonl", "--output-file", "FILE/inside"),
        ("inspect", "FILE/inside"),
        ("eval", "tiny", "--recipe", "FOLDER"),
        ("eval", "tiny", "--recipe", "FILE/inside"),
        ("train", "none.toml"),
        ("train", "FOLDER"),
        ("train", "FILE"),
        ("convert", "tiny", "FILE/inside", "--to", "bf16"),
        ("convert", "tiny", "/proc/x", "--to", "bf16"),
        ("serve", "--tls-cert", "FILE/inside"),
    ],
    ids=lambda arguments: " ".join(str(part) for part in arguments if part != RECIPE),
)
def test_a_path_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("no = TOML = at all\n")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "PROMPTS.jsonl").write_text('{"prompt": "a"}\n')
    done = run(*arguments)
    assert done.code == 2
    assert "Errno" not in done.err
    if not done.err.startswith("Usage"):
        where = next(str(a) for a in ("FILE", "FOLDER", "/proc/x", "none.toml") if a in done.err)
        assert done.err.splitlines()[0].startswith(f"rorqual: {where}"), done.err
        assert "\n  fix:      " in done.err


def test_what_the_system_says_stays(tmp_path: Path) -> None:
    full = explained(OSError(errno.ENOSPC, "No space left on device", str(tmp_path)))
    assert str(full).splitlines() == [
        f"{tmp_path}: the disk is full",
        "  found:    No space left on device",
        "  fix:      free some space and run the same command again",
    ]
    inner = explained(OSError(errno.EACCES, "Permission denied", "/a/b"), UsageError, "/a", "do")
    assert (inner.where, inner.found, inner.fix) == ("/a", "Permission denied: /a/b", "do")
    away = explained(OSError(errno.EIO, "Input/output error", "/a/b"))
    assert (away.what, away.where) == ("cannot be read or written", "/a/b")
    assert "check the disk" in str(away.fix)


def test_what_is_no_files_fault_is_said_as_it_is() -> None:
    """A library's words, or a socket's: no disk helps there."""
    assert str(explained(OSError("CUDA_HOME is not set"))) == "CUDA_HOME is not set"
    busy = explained(OSError(errno.EADDRINUSE, "Address already in use"))
    assert str(busy) == f"[Errno {errno.EADDRINUSE}] Address already in use"
    assert str(explained(TimeoutError())) == "TimeoutError"
