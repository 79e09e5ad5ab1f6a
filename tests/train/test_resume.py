"""A run that was killed or stopped and went on equals one that was not. Oracle: the latter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import LENGTH, SyntheticBatches

import forked
from patience import HANG_SECONDS
from rorqual.data import Batch
from rorqual.errors import TrainingError, UsageError
from rorqual.model import DeepseekV3
from rorqual.train import Recipe, TrainingData, train
from rorqual.train.checkpoint import checkpoints
from rorqual.train.checksums import write_checksums
from rorqual.train.interrupt import Interrupt
from rorqual.train.metrics import MetricsLog, read_metrics
from rorqual.train.saver import Saver
from rorqual.train.validation import evaluating

pytestmark = pytest.mark.concurrency

PROGRAM = Path(__file__).with_name("small_run.py")
# What is measured.
NOT_COMPARED = ("tokens_per_second", "mfu", "memory", "memory_peak", "seconds")


def start(folder: Path, where: str, step: int) -> subprocess.Popen[str]:
    return forked.Popen(
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


def change_state(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a checkpoint's state as if the run had saved it so."""
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    write_checksums(file.parent.parent)


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
    assert f"finished False step 1 signal {number}" in out
    assert "run the same command again" in err
    assert "finishing this step, then saving" in err
    assert [path.name for path in checkpoints(folder)] == ["step-1"]
    summary = train(make_recipe(), folder, data, is_quiet=True)
    assert summary.signal is None
    assert_same_checkpoint(summary.checkpoint, finished_run / "checkpoints" / "step-8")
    assert_same_metrics(folder, finished_run)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    """In the middle of a step that does not end; Python's own KeyboardInterrupt comes out."""
    folder = tmp_path / "stopped"
    process = start(folder, "held", 0)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("batch 0")
    process.send_signal(signal.SIGINT)
    while "finishing this step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert "KeyboardInterrupt" in err
    # Python's code is -SIGINT, but 1 where a package runs code of its own at the exit.
    assert process.returncode in (-signal.SIGINT, 1)
    assert not checkpoints(folder)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_counts_and_a_second_sigterm_stops_nothing(first: signal.Signals) -> None:
    """A service manager may send SIGTERM again and again while the step ends and is saved."""
    # A shell's background job ignores SIGINT, and so would Interrupt.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            for number in (first, signal.SIGTERM, signal.SIGTERM):
                signal.raise_signal(number)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert interrupt.number == first
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_stays_as_it_is(
    old_run: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    before = (old_run / "metrics.jsonl").read_bytes()
    summary = train(make_recipe(), old_run, data, is_quiet=True)
    assert summary.step == 8
    assert (old_run / "metrics.jsonl").read_bytes() == before


def test_a_run_can_be_made_longer_if_asked(
    old_run: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    """What is learnt from there on is what the new schedule says: its closed form."""
    longer = make_recipe("training.total_tokens=1280")
    with pytest.raises(TrainingError, match=r"training.total_tokens: 1024 -> 1280") as caught:
        train(longer, old_run, data, is_quiet=True)
    assert "--allow-changes" in str(caught.value)
    assert len(checkpoints(old_run)) == 2
    assert train(longer, old_run, data, allow_changes=True, is_quiet=True).step == 10
    steps = [r for r in read_metrics(old_run / "metrics.jsonl") if r["kind"] == "step"]
    assert [r["lr"] for r in steps[8:]] == [longer.lr_schedule.at(t, 1280) for t in (1152, 1280)]
    assert train(longer, old_run, data, is_quiet=True).step == 10  # its checkpoint now says so


def test_the_time_of_all_parts_of_a_run_is_summed(
    old_run: Path, make_recipe: Callable[..., Recipe]
) -> None:
    file = checkpoints(old_run)[-1] / "trainer" / "state.json"
    change_state(file, lambda state: state["progress"].update(seconds=1000.0))
    longer = make_recipe(f"training.total_tokens={9 * 8 * LENGTH}")
    data = TrainingData(train=SyntheticBatches())
    made = train(longer, old_run, data, allow_changes=True, is_quiet=True).checkpoint
    after = json.loads((made / "trainer" / "state.json").read_text())
    assert after["progress"]["seconds"] > 1000.0


def test_without_resume_an_old_run_is_not_touched(
    old_run: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    with pytest.raises(UsageError, match="already holds a training run"):
        train(make_recipe(), old_run, data, resume=False, is_quiet=True)


def test_other_data_is_refused(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    first = TrainingData(train=SyntheticBatches(), digest="aaa")
    train(make_recipe(), tmp_path, first, is_quiet=True)
    other = TrainingData(SyntheticBatches(), digest="bbb")
    for allow_changes in (False, True):
        with pytest.raises(TrainingError, match="other data"):
            train(make_recipe(), tmp_path, other, allow_changes=allow_changes, is_quiet=True)


def test_each_step_has_the_rate_of_its_end_and_the_weights_of_its_beginning(
    finished_run: Path, make_recipe: Callable[..., Recipe]
) -> None:
    """Oracle: the recipe's functions at the tokens before and after each step, counted by hand."""
    recipe = make_recipe()
    total, per_step = recipe.training.total_tokens, 8 * 16
    steps = [r for r in read_metrics(finished_run / "metrics.jsonl") if r["kind"] == "step"]
    assert len(steps) == total // per_step
    for number, step in enumerate(steps):
        before, after = number * per_step, (number + 1) * per_step
        assert step["tokens"] == after
        assert step["lr"] == recipe.lr_schedule.at(after, total)
        assert step["mtp_weight"] == recipe.mtp.weight_at(before, total)
    assert steps[0]["lr"] == pytest.approx(3e-3 * 128 / round(0.2 * 1024))
    assert steps[-1]["lr"] == 1e-4
    # The first step at the later weight is the first that begins behind 10 of 14.8 parts.
    assert [step["mtp_weight"] for step in steps] == [0.3] * 6 + [0.1] * 2


def test_the_last_batch_is_whole_though_the_tokens_end_in_it(
    tmp_path: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    """300 tokens in batches of 128 are three steps; the last one's rate is the schedule's last."""
    recipe = make_recipe("training.total_tokens=300")
    summary = train(recipe, tmp_path, data, is_quiet=True)
    assert (summary.step, summary.tokens, summary.is_finished) == (3, 384, True)
    steps = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "step"]
    assert [step["batch"] for step in steps] == [8, 8, 8]
    assert steps[-1]["lr"] == 1e-4


class FailingBatches(SyntheticBatches):
    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        assert torch.get_num_threads() == 2
        assert torch.is_grad_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        if counter:
            raise RuntimeError("the disk is gone")
        return super().batch(counter, num_samples)


def test_torch_is_left_as_it_was_found(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    data = TrainingData(train=FailingBatches())
    with torch.no_grad(), pytest.raises(RuntimeError, match="the disk is gone"):
        train(make_recipe("training.threads=2"), tmp_path, data, is_quiet=True)
    assert torch.get_num_threads() == 1
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    modes: Any = torch.utils.deterministic
    assert modes.fill_uninitialized_memory  # as torch has it
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_validation_leaves_each_module_in_its_mode(make_model: Callable[..., DeepseekV3]) -> None:
    model = make_model()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    found = []

    def fail() -> None:
        with evaluating(model):
            found.extend(module.training for module in model.modules())
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        fail()
    assert not any(found)
    assert [module.training for module in model.modules()] == before


class SignalledBatches(SyntheticBatches):
    """Sends a signal to its own process in each step, before the step is made."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        os.kill(os.getpid(), self.number)
        return super().batch(counter, num_samples)


def test_nohup_stays_what_it_is(tmp_path: Path, make_recipe: Callable[..., Recipe]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        data = TrainingData(train=SignalledBatches(signal.SIGHUP))
        summary = train(make_recipe(), tmp_path / "run", data, is_quiet=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert summary.is_finished
    assert summary.signal is None


def test_what_was_saved_is_not_written_again(
    tmp_path: Path, make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while the only checkpoint is swapped for its own copy would lose it. Oracle: a count
    of the saves, one a step: the signal comes in a step after which a checkpoint is due."""
    saved: list[int] = []
    save = Saver.save

    def counted(self: Saver, learner: Any) -> None:
        saved.append(learner.progress.step)
        save(self, learner)

    monkeypatch.setattr(Saver, "save", counted)
    recipe = make_recipe(f"checkpoint.every_tokens={8 * LENGTH}")
    data = TrainingData(train=SignalledBatches(signal.SIGTERM))
    for step in (1, 2):
        summary = train(recipe, tmp_path / "run", data, is_quiet=True)
        assert summary.step == step
        assert not summary.is_finished
        assert saved == list(range(1, step + 1))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer_steps", None),
        ("random", None),
        ("random", {}),
        ("random", {"torch": "x"}),
        ("random", {"torch": ""}),
        ("random", {"torch": "AAAA"}),
        ("python", [3, [2**70], None]),
        ("python", [3, [], None]),
        ("python", "x"),
        ("numpy", ["MT19937", [-1], 0, 0, 0.0]),
        ("numpy", ["other", [], 0, 0, 0.0]),
        ("numpy", []),
    ],
)
def test_a_broken_random_state_is_named(
    old_run: Path,
    make_recipe: Callable[..., Recipe],
    data: TrainingData,
    key: str,
    value: Any,
) -> None:
    file = checkpoints(old_run)[-1] / "trainer" / "state.json"

    def change(state: dict[str, Any]) -> None:
        place = state["random"] if key in state["random"] else state
        place[key] = value

    change_state(file, change)
    with pytest.raises(TrainingError, match="random state is none") as caught:
        train(make_recipe(), old_run, data, is_quiet=True)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("end", [b"\xff\xfe", b"\0\0\0", b"1" * 5000, b"[" * 100_000])
def test_a_broken_end_of_the_metrics_is_cut_off(tmp_path: Path, end: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + end)
    MetricsLog(file, 1).close()
    assert file.read_bytes() == b'{"step": 1}\n'
    file.write_bytes(end + b'\n{"step": 1}\n')
    with pytest.raises(TrainingError, match="not a line of metrics"):
        MetricsLog(file, 1)
