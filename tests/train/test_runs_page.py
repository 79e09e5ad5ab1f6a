"""docs/runs.md says what a run writes and how it ends: held to a run, and to the exit codes.

Oracle: the records of a run of seconds.
"""

from __future__ import annotations

import re
import signal
from collections import defaultdict
from pathlib import Path

import pytest

from rorqual.cli import exits
from rorqual.serve import server
from rorqual.train.metrics import read_metrics
from rorqual.train.validation import Validation

PAGE = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")


ROLLBACK = {"tokens", "from_step", "first_sample", "num_samples", "why"}  # see test_spikes.py


def part(title: str) -> str:
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_field_of_the_metrics_is_explained(finished_run: Path) -> None:
    found: dict[str, set[str]] = defaultdict(set)
    for kind, field in re.findall(
        r"^\| `(\w+)` \| `(\w+)` \|", part("metrics.jsonl"), re.MULTILINE
    ):
        found[kind].add(field)
    written: dict[str, set[str]] = defaultdict(set)
    for record in read_metrics(finished_run / "metrics.jsonl"):
        written[record["kind"]] |= record.keys() - {"kind", "step"}
    written["step"].add("metrics")  # of stages that have figures of their own
    written["step"].add("mfu")  # where a peak is given: test_train_command.py
    written["step"] |= {"bytes_within_nodes", "bytes_between_nodes"}  # of several ranks
    written["validation"] = {"tokens", *Validation(1.0, 1, 1).record()}
    written["resume"] = {"tokens"}
    written["rollback"] = ROLLBACK
    assert found == written


def test_the_loss_is_the_sum_that_the_page_gives(finished_run: Path) -> None:
    assert "`main` + `mtp_weight` times the mean of `mtp` + `balance`" in PAGE
    steps = [r for r in read_metrics(finished_run / "metrics.jsonl") if r["kind"] == "step"]
    for record in steps:
        mtp = sum(record["mtp"]) / len(record["mtp"])
        total = record["main"] + record["mtp_weight"] * mtp + record["balance"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)  # sums in float32


def test_the_run_folder_holds_what_the_page_says(finished_run: Path) -> None:
    for name in ("recipe.toml", "metrics.jsonl", "checkpoints/latest", "plots/loss.png"):
        assert (finished_run / name).exists(), name
    plots = {file.name for file in (finished_run / "plots").iterdir()}
    assert plots <= set(re.findall(r"`(\w+\.png)`", part("Reading the plots")))


def test_the_exit_codes_are_those_of_the_program() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", part("Exit codes"), re.MULTILINE)}
    ours = {value for name, value in vars(exits).items() if name.startswith("EXIT_")}
    killed = exits.EXIT_SIGNAL + signal.SIGKILL
    ends = {server.EXIT_FAILED, server.EXIT_AT_ONCE}
    assert codes == {0, killed} | ends | ours - {exits.EXIT_SIGNAL}
