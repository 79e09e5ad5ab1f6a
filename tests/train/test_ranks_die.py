"""A rank is killed, all are started again, and the run ends as if nothing had been.

Oracle: the same ranks without a kill, bit for bit. Here the test starts ranks again, as torchrun
does; the slow test has torchrun itself, and kills at random moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import LENGTH, RECIPE, STAGES, SyntheticBatches
from test_train_on_ranks import free_port

from patience import HANG_SECONDS, wait_until
from rank_programs import Rank
from rorqual import weights
from rorqual.config import apply_overrides
from rorqual.train import TrainingData, train
from rorqual.train.metrics import read_metrics
from rorqual.train.recipe import recipe_of

pytestmark = pytest.mark.concurrency

WORKER = Path(__file__).with_name("many_run.py")
STEPS = 8
KILLS = [[1, "write", 2], [0, "finish", 2], [1, "update", 2]]
TWO = ["parallel.dp_shard=2", f"checkpoint.every_tokens={2 * 8 * LENGTH}", "ema.decay=0.9"]
LOSS = 1e-6
NUM_KILLS, LONG = 20, 140


def start(world: int, number: int, *words: str) -> list[Rank]:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [
        Rank(
            [sys.executable, str(WORKER), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **place,
                **sizes,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "TORCHELASTIC_RESTART_COUNT": str(number),
            },
        )
        for rank in range(world)
    ]


def run(world: int, folder: Path, overrides: list[str], kills: list[Any] | None = None) -> int:
    """How often the ranks were started until they ended well."""
    words = (str(folder), json.dumps(overrides), json.dumps(kills or []))
    for number in range(10):
        ranks = start(world, number, *words)
        try:
            wait_until(lambda ranks=ranks: any(rank.poll() is not None for rank in ranks))
            told = [rank.communicate(timeout=HANG_SECONDS) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if all(rank.returncode == 0 for rank in ranks):
            return number + 1
        codes = [rank.returncode for rank in ranks]
        assert -signal.SIGKILL in codes, told
        # Who lost it says so, and does not hang.
        for rank, (_, errors) in enumerate(told):
            if codes[rank] not in (0, -signal.SIGKILL):
                assert f"rank {rank} of {world}" in errors, errors
    raise AssertionError(f"never ended: {told}")


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, put together."""
    from rorqual.weights.parameters_source import read_boxes, read_region, shards_of, whole_shape
    from rorqual.weights.safetensors_file import RowFiles

    files = RowFiles()
    boxes = read_boxes(shards_of(folder / "checkpoints" / "latest"))
    whole = {
        name: read_region(files, parts, tuple(slice(0, n) for n in whole_shape(parts)))
        for name, parts in boxes.items()
    }
    files.close()
    return whole


def assert_same(one: Path, other: Path) -> None:
    left, right = state_of(one), state_of(other)
    assert left.keys() == right.keys()
    assert any(name.startswith("exp_avg.") for name in left)
    assert any(name.startswith("ema.") for name in left)
    for name in left:
        assert torch.equal(left[name], right[name]), name
    losses = [
        [r["loss"] for r in read_metrics(f / "metrics.jsonl") if r["kind"] == "step"]
        for f in (one, other)
    ]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks that nobody killed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(2, folder, TWO) == 1
    return folder


def test_killed_at_chosen_moments_it_ends_the_same(whole: Path, tmp_path: Path) -> None:
    """In a rank's write, before the folder has its name, in the middle of an update."""
    folder = tmp_path / "run"
    assert run(2, folder, TWO, KILLS) == len(KILLS) + 1
    assert_same(folder, whole)
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {"latest", f"step-{STEPS - 2}", f"step-{STEPS}"}


def test_one_rank_goes_on_from_two(whole: Path, tmp_path: Path) -> None:
    """And has the loss of the same step of one rank throughout; the batches are the same."""
    import shutil

    folder = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS}")
    overrides = [*TWO[1:]]
    table = apply_overrides(json.loads(json.dumps(RECIPE)), overrides)
    asked: list[int] = []

    class Asked(SyntheticBatches):
        def batch(self, counter: int, *rest: int, **options: int) -> Any:
            asked.append(counter)
            return super().batch(counter, *rest, **options)

    summary = train(recipe_of(table, STAGES), folder, TrainingData(train=Asked()), is_quiet=True)
    assert (summary.step, asked) == (STEPS, [8 * (STEPS - 2), 8 * (STEPS - 1)])
    found, expected = (
        [r["loss"] for r in read_metrics(f / "metrics.jsonl") if r["kind"] == "step"]
        for f in (folder, whole)
    )
    assert found[STEPS - 2] == pytest.approx(expected[STEPS - 2], abs=LOSS)
    assert (folder / "checkpoints" / "latest" / "model.safetensors").is_file()
    weights.load(folder / "checkpoints" / "latest")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["parallel.dp_shard=4"], ["parallel.ep=2"]),
        (["parallel.dp_shard=2", "parallel.ep=2"], ["parallel.dp_replicate=2"]),
        (["parallel.ep=4"], []),
        (["parallel.pp=2"], []),
        (["parallel.dp_shard=2"], ["parallel.pp=2"]),
        ([], ["parallel.dp_shard=2", "parallel.ep=2"]),
    ],
)
def test_any_plan_goes_on_from_any_other(
    tmp_path: Path, before: list[str], after: list[str]
) -> None:
    """4 -> 2, 4 -> 1, 1 -> 4: the same batches, and the next step's loss within 1e-6."""
    short = f"training.total_tokens={4 * 8 * LENGTH}"
    every = f"checkpoint.every_tokens={2 * 8 * LENGTH}"

    def world(plan: list[str]) -> int:
        product = 1
        for word in plan:
            product *= int(word.partition("=")[2])
        return product

    run(world(before), tmp_path / "before", [*before, short, every])
    import shutil

    shutil.copytree(tmp_path / "before", tmp_path / "after", symlinks=True)
    shutil.rmtree(tmp_path / "after" / "checkpoints" / "step-4")
    run(world(after), tmp_path / "after", [*after, short, every])
    found, expected = (
        [
            (r["tokens"], r["loss"], r["targets"])
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
            if r["kind"] == "step"
        ]
        for name in ("after", "before")
    )
    assert [(t, n) for t, _, n in found] == [(t, n) for t, _, n in expected]
    assert found[2][1] == pytest.approx(expected[2][1], abs=LOSS)


@pytest.mark.slow
def test_torchrun_starts_again_at_20_random_moments(tmp_path: Path) -> None:
    """kill -9 of a random rank, checkpoint writing included."""
    overrides = [*TWO, f"training.total_tokens={LONG * 8 * LENGTH}"]
    assert run(2, tmp_path / "whole" / "run", overrides) == 1
    folder = tmp_path / "killed" / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "--max-restarts", str(NUM_KILLS + 5)]
    command += [str(WORKER), str(folder), json.dumps(overrides), "[]"]
    rng = random.Random(14)
    pids = folder.parent / "pids"
    killed: list[str] = []
    with (tmp_path / "log").open("w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ})
        try:
            for number in range(NUM_KILLS):
                rank = rng.randrange(2)
                file = pids / f"{number}-{rank}"
                wait_until(lambda file=file: file.exists() and file.read_text())
                newest = _newest(folder)
                # Something is always won: the next kill comes behind a new checkpoint.
                wait_until(lambda newest=newest: _newest(folder) > newest or agent.poll() == 0)
                if agent.poll() == 0:
                    break
                if number % 2:
                    wait_until(lambda: _is_writing(folder) or agent.poll() == 0)
                else:
                    time.sleep(rng.random() * 0.3)
                if agent.poll() is not None:
                    break
                killed.append(f"{number}: rank {rank}, writing {_is_writing(folder)}")
                os.kill(int(file.read_text()), signal.SIGKILL)
            assert agent.wait(timeout=HANG_SECONDS) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            agent.terminate()
            agent.wait()
    assert len(killed) == NUM_KILLS, killed
    assert_same(folder, tmp_path / "whole" / "run")


def _newest(folder: Path) -> int:
    names = (path.name for path in (folder / "checkpoints").glob("step-*"))
    return max((int(name.partition("-")[2]) for name in names), default=0)


def _is_writing(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".step-*.ranks"))
