"""What `make check` runs. Oracle: small git repositories whose history is known."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patience import HANG_SECONDS
from touched import CHEAP, DEADLINE, HOUSE, base_of, files_to_run, git, rooms_of, touched_files

TESTS = Path(__file__).parent


def do(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    out = git(folder, *identity, *arguments)
    assert out is not None, arguments
    return out


def commit(folder: Path, *paths: str) -> str:
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{path} {time.time_ns()}\n")
    do(folder, "add", "-A")
    do(folder, "commit", "-q", "-m", "a commit")
    return do(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    do(tmp_path, "init", "-q", "-b", "main")
    return tmp_path


def test_a_branch_is_compared_with_where_it_began(repository: Path) -> None:
    first = commit(repository, "a", "b")
    do(repository, "checkout", "-q", "-b", "work")
    commit(repository, "b")
    do(repository, "checkout", "-q", "main")
    commit(repository, "c")  # main has gone on: not our change
    do(repository, "checkout", "-q", "work")
    (repository / "new").write_text("untracked")
    (repository / "a").write_text("uncommitted")
    assert base_of(repository) == first
    assert touched_files(repository) == ["a", "b", "new"]


def test_main_is_compared_with_its_origin_or_the_commit_before(repository: Path) -> None:
    commit(repository, "a")
    assert base_of(repository) is None
    assert touched_files(repository) == ["a"]
    second = commit(repository, "b")
    commit(repository, "c")
    assert base_of(repository) == second
    assert touched_files(repository) == ["c"]
    do(repository, "update-ref", "refs/remotes/origin/main", f"{second}~1")
    assert touched_files(repository) == ["b", "c"]


def test_files_touch_rooms() -> None:
    assert rooms_of(["src/rorqual/serve/page/main.js", "tests/train/small_run.py"]) == {
        "serve",
        "train",
    }
    assert rooms_of(["README.md", "docs/log.md", "benchmarks/x.py"]) == {"docs"}
    assert rooms_of(["tests/test_tiny.py"]) == {""}
    for ground in ("src/rorqual/files.py", "tests/conftest.py", "pyproject.toml"):
        assert rooms_of([ground]) == {"", *CHEAP}


def test_the_nearest_files_run_first(tmp_path: Path) -> None:
    names = ("test_house.py", "serve/test_a.py", "serve/test_batches.py", "serve/test_z.py")
    for name in (*names, "train/test_step.py"):
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).touch()
    changed = ["src/rorqual/serve/batches.py", "tests/serve/test_z.py"]
    assert files_to_run(changed, tmp_path) == [
        HOUSE,
        "tests/serve/test_z.py",
        "tests/serve/test_batches.py",
        "tests/serve/test_a.py",
    ]
    assert files_to_run([], tmp_path) == [HOUSE]


def test_after_the_deadline_nothing_begins_and_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    text = "import os, time\nos.environ['RORQUAL_CHECK_DEADLINE']\n"
    text += "def test_first(): os.environ['RORQUAL_CHECK_DEADLINE'] = str(time.time() - 1)\n"
    text += "def test_second(): assert False\n"
    (tmp_path / "test_some.py").write_text(text)
    path = str(TESTS)
    environment = {**os.environ, "PYTHONPATH": path, DEADLINE: str(time.time() + HANG_SECONDS)}
    flags = ["-p", "skips", "-p", "touched", "-p", "no:cacheprovider", "-q", "-n0"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1 tests of test_some.py: the time of `make check` was over" in done.stdout
