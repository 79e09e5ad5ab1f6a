"""A run that was killed or stopped and went on equals one that was not. Oracle: the latter."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import SyntheticBatches

from patience import HANG_SECONDS
from rorqual.errors import TrainingError, UsageError
from rorqual.train import Recipe, TrainingData, train
from rorqual.train.checkpoint import checkpoints
from rorqual.train.metrics import read_metrics

pytestmark = pytest.mark.concurrency

PROGRAM = Path(__file__).with_name("small_run.py")
NOT_COMPARED = ("tokens_per_second",)  # a measured time


def start(folder: Path, where: str, step: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), where, str(step)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_same_checkpoint(one: Path, other: Path) -> None:
    names = sorted(file.relative_to(one) for file in one.rglob("*.safetensors"))
    assert names == sorted(file.relative_to(other) for file in other.rglob("*.safetensors"))
    for name in names:
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"
    states = [json.loads((folder / "trainer/state.json").read_text()) for folder in (one, other)]
    for state in states:
        del state["progress"]["seconds"]
    assert states[0] == states[1]


def assert_same_metrics(one: Path, other: Path) -> None:
    def steps(folder: Path) -> list[dict[str, object]]:
        records = read_metrics(folder / "metrics.jsonl")
        return [
            {key: value for key, value in record.items() if key not in NOT_COMPARED}
            for record in records
            if record["kind"] == "step"
        ]

    assert steps(one) == steps(other)


@pytest.fixture
def old_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished_run, tmp_path / "old", symlinks=True)


@pytest.mark.parametrize(("where", "step"), [("update", 6), ("save", 3)])
def test_kill_9_then_resume_equals_the_uninterrupted_run(
    finished_run: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    data: TrainingData,
    where: str,
    step: int,
) -> None:
    folder = tmp_path / "killed"
    process = start(folder, where, step)
    assert process.wait(timeout=HANG_SECONDS) == -signal.SIGKILL, process.communicate()
    assert [path.name for path in checkpoints(folder)] == ["step-2", "step-4"]
    assert bool(list((folder / "checkpoints").glob(".step-*"))) == (where == "save")
    summary = train(make_recipe(), folder, data, is_quiet=True)
    assert summary.is_finished
    assert summary.step == 8
    assert_same_checkpoint(summary.checkpoint, finished_run / "checkpoints" / "step-8")
    assert_same_metrics(folder, finished_run)
    assert not list((folder / "checkpoints").glob(".step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_can_resume(
    finished_run: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    data: TrainingData,
    number: int,
) -> None:
    folder = tmp_path / "stopped"
    process = start(folder, "held", 0)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("batch 0")
    process.send_signal(number)
    out, err = process.communicate("\n", timeout=HANG_SECONDS)
    assert process.returncode == 0, err
    assert "finished False step 1" in out
    assert "run the same command again" in err
    assert [path.name for path in checkpoints(folder)] == ["step-1"]
    summary = train(make_recipe(), folder, data, is_quiet=True)
    assert_same_checkpoint(summary.checkpoint, finished_run / "checkpoints" / "step-8")
    assert_same_metrics(folder, finished_run)


def test_a_finished_run_stays_as_it_is(
    old_run: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    before = (old_run / "metrics.jsonl").read_bytes()
    summary = train(make_recipe(), old_run, data, is_quiet=True)
    assert summary.step == 8
    assert (old_run / "metrics.jsonl").read_bytes() == before


def test_another_recipe_is_refused_and_the_keys_are_named(
    old_run: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    other = make_recipe("lr_schedule.peak=0.1", "optimizer.beta2=0.99", "checkpoint.keep_last=5")
    with pytest.raises(TrainingError, match=r"lr_schedule\.peak, optimizer\.beta2\n"):
        train(other, old_run, data, is_quiet=True)


def test_a_run_can_be_made_longer(
    old_run: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    longer = make_recipe("training.total_tokens=1280")
    assert train(longer, old_run, data, is_quiet=True).step == 10


def test_without_resume_an_old_run_is_not_touched(
    old_run: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    with pytest.raises(UsageError, match="already holds a training run"):
        train(make_recipe(), old_run, data, resume=False, is_quiet=True)


def test_other_data_is_refused(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    first = TrainingData(train=SyntheticBatches(), digest="aaa")
    train(make_recipe(), tmp_path, first, is_quiet=True)
    with pytest.raises(TrainingError, match="other data"):
        train(
            make_recipe(), tmp_path, TrainingData(SyntheticBatches(), digest="bbb"), is_quiet=True
        )
