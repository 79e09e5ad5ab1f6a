"""`make check`: the house test and the fast tests of the rooms touched, in limited time.

    python tests/touched.py SECONDS

Touched is what differs from `main`: on a branch of it from where the branch began, on `main` itself
from `origin/main`, and where there is none from the commit before. Uncommitted and untracked files
count. A file of `src/rorqual/<room>` or `tests/<room>` touches that room, a page the room `docs`. A
file that every room
stands on (the ground floor `src/rorqual/*.py`, what the tests share, pyproject.toml) touches the
tests beside this file and the rooms whose tests are cheap (`CHEAP`); the rest is for `make test`.

Files run in order of nearness: the house, changed tests, tests named after changed sources, then
the rest of the rooms. When the time is over the remaining tests are skipped, and told; the house
test always runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import pytest

from skips import CHECK_ENDS

ROOT = Path(__file__).parents[1]
DEADLINE = "RORQUAL_CHECK_DEADLINE"
"""Seconds since the epoch after which no test begins."""
CHEAP = ("ops", "tokenizer", "tasks", "corpus_writer")
HOUSE = "tests/test_house.py"
LAST_TEST_SECONDS = 10.0
"""What the test that is running at the deadline may still take."""


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def base_of(folder: Path) -> str | None:
    """The commit that the work tree is compared with; None: there is nothing before it."""
    branch = git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    for name in ("main", "origin/main") if branch != "main" else ("origin/main",):
        if (base := git(folder, "merge-base", "HEAD", name)) is not None:
            return base
    return git(folder, "rev-parse", "--verify", "--quiet", "HEAD~1")


def touched_files(folder: Path) -> list[str]:
    """Paths from the repository's root, of files that are still there or are gone."""
    base = base_of(folder)
    tracked = git(folder, "diff", "--name-only", base) if base else git(folder, "ls-files")
    untracked = git(folder, "ls-files", "--others", "--exclude-standard")
    return sorted({*(tracked or "").splitlines(), *(untracked or "").splitlines()})


def rooms_of(paths: list[str]) -> set[str]:
    """Names of folders in tests/; "" for the tests beside this file."""
    rooms: set[str] = set()
    for path in paths:
        parts = PurePosixPath(path).parts
        is_source = parts[:2] == ("src", "rorqual")
        inside = parts[2:] if is_source else parts[1:] if parts[0] == "tests" else ()
        if len(inside) > 1:
            rooms.add(inside[0])
        elif inside and inside[0].startswith("test_"):
            rooms.add("")
        elif inside or path == "pyproject.toml":
            rooms |= {"", *CHEAP}
        elif path.endswith(".md"):
            rooms.add("docs")
    return rooms


def files_to_run(paths: list[str], folder: Path = ROOT) -> list[str]:
    """Test files, the nearest to the change first."""
    tests = folder / "tests"
    names = [str(tests / room) for room in rooms_of(paths)]
    found = {file for name in names for file in Path(name).glob("test_*.py")}
    stems = {PurePosixPath(path).stem for path in paths if path.startswith("src/")}

    def distance(file: Path) -> tuple[int, str]:
        path = file.relative_to(folder).as_posix()
        is_named = any(stem in file.stem for stem in stems)
        return (0 if path == HOUSE else 1 if path in paths else 2 if is_named else 3), path

    nearest = sorted(found | {folder / HOUSE}, key=distance)
    return [file.relative_to(folder).as_posix() for file in nearest]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A plugin of the run below: no test begins after the deadline, but for the house's, which are
    quick: a check that checked nothing must not pass.
    """
    is_late = time.time() > float(os.environ[DEADLINE])
    if is_late and not item.nodeid.startswith(HOUSE):
        pytest.skip(CHECK_ENDS)


def main() -> int:
    seconds = float(sys.argv[1])
    paths = touched_files(ROOT)
    files = files_to_run(paths)
    rooms = sorted(room or "tests/" for room in rooms_of(paths))
    print(f"{len(paths)} files differ from main; rooms touched: {', '.join(rooms) or 'none'}")
    environment = {
        **os.environ,
        DEADLINE: str(time.time() + seconds - LAST_TEST_SECONDS),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    parallel = "-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder".split()
    command = [sys.executable, "-m", "pytest", "-p", "touched", *parallel, *files]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
