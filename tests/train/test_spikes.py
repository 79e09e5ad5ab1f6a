"""A bad batch is seen, the run goes back and leaves it out. Oracle: a run that never had it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import LENGTH, RECIPE, STAGES, VOCAB, SyntheticBatches
from test_runs_page import ROLLBACK
from torch.nn.functional import cross_entropy

from rorqual import weights
from rorqual.config import fill
from rorqual.data import Batch
from rorqual.errors import TrainingError
from rorqual.train import Recipe, TrainingData, train
from rorqual.train.metrics import read_metrics
from rorqual.train.recipe import recipe_of
from rorqual.train.spikes import NORMAL, Skip, Skipped, SpikeSettings, Usual, usual_of
from rorqual.train.step import InTurn, MicroBatch, StepResult

SIZE, STEPS, BAD, KEPT = 8, 26, 23, 20  # sequences, steps, the bad one, the checkpoint before
BAD_SAMPLES = range((BAD - 1) * SIZE, BAD * SIZE)
NOISE_SEEDS = (3, 4, 5)


def recipe(**changes: Any) -> Recipe:
    table = {
        **RECIPE,
        "training": {**RECIPE["training"], "total_tokens": STEPS * SIZE * LENGTH},
        "lr_schedule": {"peak": 1e-2, "low": 3e-3, "final": 1e-3, "warmup": 0.1},
        "checkpoint": {"every_tokens": KEPT // 2 * SIZE * LENGTH, "keep_last": 2},
        "spikes": {"window": 8, "loss_deviations": 8.0},
    }
    return recipe_of({**table, **changes}, STAGES)


class Batches(SyntheticBatches):
    """`bad` samples are random tokens; `absent` ones are not in the order at all."""

    def __init__(self, bad: range = range(0), absent: range = range(0)) -> None:
        super().__init__()
        self.bad, self.absent = bad, absent
        self.asked: list[int] = []

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        self.asked.append(counter)
        return super().batch(counter, num_samples, rank, world)

    def sample(self, index: int) -> torch.Tensor:
        if index >= self.absent.start and len(self.absent):
            index += len(self.absent)
        if index in self.bad:
            generator = torch.Generator().manual_seed(index)
            return torch.randint(0, VOCAB, (self.width,), generator=generator)
        return super().sample(index)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in whose order the bad batch never was."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("clean")
    train(recipe(), folder, TrainingData(train=Batches(absent=BAD_SAMPLES)), is_quiet=True)
    return folder


def last(folder: Path) -> Path:
    return folder / "checkpoints" / f"step-{STEPS}"


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "trainer/moments.safetensors"):
        left, right = load_file(last(one) / name), load_file(last(other) / name)
        assert all(torch.equal(left[key], right[key]) for key in left), name


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "step"]


def test_random_tokens_are_left_out(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = Batches(bad=BAD_SAMPLES)
    train(recipe(), tmp_path, TrainingData(train=batches))
    assert_same_weights(tmp_path, clean)
    # To the bad batch, back to the checkpoint, on to it, and behind it.
    before, behind = (
        list(range(0, BAD * SIZE, SIZE)),
        [*range(BAD * SIZE, (STEPS + 1) * SIZE, SIZE)],
    )
    assert batches.asked == [*before, *range(KEPT * SIZE, (BAD - 1) * SIZE, SIZE), *behind]
    assert [s["loss"] for s in steps_of(tmp_path)] == [s["loss"] for s in steps_of(clean)]
    (told,) = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "rollback"]
    assert (told["step"], told["from_step"]) == (KEPT, BAD)
    assert (told["first_sample"], told["num_samples"]) == (BAD_SAMPLES.start, SIZE)
    assert told["why"].startswith("loss ")
    assert told.keys() - {"kind", "step"} == ROLLBACK
    err = capsys.readouterr().err
    assert f"step {BAD}: loss " in err
    assert f"going back to step {KEPT} and leaving out samples {BAD_SAMPLES.start} to" in err


def make_nan(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[torch.Tensor], bool]) -> None:
    """The gradients of some micro-batches are NaN."""
    accumulate = InTurn._accumulate

    def spoilt(self: InTurn, given: Any, by: Any) -> MicroBatch:
        made = accumulate(self, given, by)
        if is_bad(given["tokens_BS"]):
            next(p.grad for p in self.model.parameters() if p.grad is not None).fill_(torch.nan)
        return made

    monkeypatch.setattr(InTurn, "_accumulate", spoilt)


def test_gradients_that_are_not_finite_are_left_out(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches()
    bad = batches.batch(BAD_SAMPLES.start, 4).tokens_BS
    make_nan(monkeypatch, lambda tokens_BS: torch.equal(tokens_BS, bad))
    train(recipe(), tmp_path, TrainingData(train=batches), is_quiet=True)
    assert_same_weights(tmp_path, clean)
    (told,) = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "rollback"]
    assert "not finite" in told["why"]


def test_before_the_first_checkpoint_it_goes_back_to_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Batches()
    make_nan(monkeypatch, lambda tokens: torch.equal(tokens, bad))
    bad = batches.batch(2 * SIZE, 4).tokens_BS
    short = recipe(training={**RECIPE["training"], "total_tokens": 4 * SIZE * LENGTH})
    train(short, tmp_path / "run", TrainingData(train=batches), is_quiet=True)
    absent = TrainingData(train=Batches(absent=range(2 * SIZE, 3 * SIZE)))
    train(short, tmp_path / "other", absent, is_quiet=True)
    found, expected = steps_of(tmp_path / "run"), steps_of(tmp_path / "other")
    assert [step["loss"] for step in found] == [step["loss"] for step in expected]


@pytest.mark.parametrize("rollbacks", [0, 2])
def test_it_ends_when_all_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollbacks: int
) -> None:
    make_nan(monkeypatch, lambda tokens: True)
    bounded = recipe(spikes={"rollbacks": rollbacks})
    batches = Batches()
    with pytest.raises(TrainingError, match="not finite; the weights were not moved") as caught:
        train(bounded, tmp_path, TrainingData(train=batches), is_quiet=True)
    assert batches.asked == [SIZE * n for n in range(rollbacks + 1)]
    assert ("after 2 rollbacks to step 0" in str(caught.value)) == bool(rollbacks)
    assert "there is no checkpoint yet" in str(caught.value.fix)


class EndedError(Exception):
    """In place of a kill."""


def test_what_is_left_out_stays_so_across_a_resume(clean: Path, tmp_path: Path) -> None:
    """The run ends between the rollback and the next checkpoint, and goes on."""

    class Ending(Batches):
        def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
            if counter == (BAD + 1) * SIZE:
                raise EndedError
            return super().batch(counter, num_samples, rank, world)

    with pytest.raises(EndedError):
        train(recipe(), tmp_path, TrainingData(train=Ending(bad=BAD_SAMPLES)), is_quiet=True)
    batches = Batches(bad=BAD_SAMPLES)
    train(recipe(), tmp_path, TrainingData(train=batches), is_quiet=True)
    assert_same_weights(tmp_path, clean)
    behind = range(BAD * SIZE, (STEPS + 1) * SIZE, SIZE)
    assert batches.asked == [*range(KEPT * SIZE, (BAD - 1) * SIZE, SIZE), *behind]
    assert len(json.loads((tmp_path / "skipped.json").read_text())["skipped"]) == 1


def test_more_batches_can_be_left_out(tmp_path: Path) -> None:
    """Five: the bad one, and the two before it since the checkpoint."""
    batches = Batches(bad=BAD_SAMPLES)
    five = recipe(spikes={"window": 8, "loss_deviations": 8.0, "skip": 5})
    train(five, tmp_path, TrainingData(train=batches), is_quiet=True)
    assert batches.asked[BAD : BAD + 2] == [BAD * SIZE, (BAD + 1) * SIZE]


@pytest.mark.slow
def test_the_final_loss_is_within_the_noise_of_seeds(tmp_path: Path) -> None:
    """Of whole runs with the bad batch and without it, measured on the same samples; the noise is
    that of three seeds.
    """
    held_out = SyntheticBatches().batch(10**6, 64).tokens_BS[:, : LENGTH + 1]
    final = {}
    for seed in NOISE_SEEDS:
        for name, batches in (("clean", Batches()), ("bad", Batches(bad=BAD_SAMPLES))):
            folder = tmp_path / f"{name}-{seed}"
            train(recipe(seed=seed), folder, TrainingData(train=batches), is_quiet=True)
            model = weights.load(last(folder))
            with torch.no_grad():
                logits = model(held_out[:, :-1]).flatten(0, 1)
            final[name, seed] = float(cross_entropy(logits, held_out[:, 1:].flatten()))
    clean = [final["clean", seed] for seed in NOISE_SEEDS]
    for seed in NOISE_SEEDS:
        assert abs(final["bad", seed] - final["clean", seed]) <= max(clean) - min(clean)


def result(loss: float, norm: float = 1.0) -> StepResult:
    return StepResult(loss, loss, [], 0.0, norm, 1, torch.zeros(0, 0))


def test_what_is_usual_is_robust() -> None:
    """Of 1 .. 9 with one wild value: median 5.5 of ten, deviations .5 .5 1.5 1.5 2.5 2.5 ..."""
    middle, spread = usual_of([*range(1, 10), 1e9])
    assert (middle, spread) == (5.5, NORMAL * 2.5)
    assert usual_of([2.0] * 5) == (2.0, 0.02)  # a hundredth of the median at least


def test_jumps_are_told_by_the_settings() -> None:
    options = fill(SpikeSettings, {"window": 8, "loss_deviations": 5.0, "norm_deviations": 5.0})
    usual = Usual(options)
    assert [usual.look(result(loss)) for loss in (9.0, 2.0, 2.0, 2.0)] == [None] * 4
    assert usual.look(result(2.0 + 5 * 0.02)) is None
    told = usual.look(result(2.0 + 5.1 * 0.02))
    assert told == "loss 2.102, where 2 +- 0.02 is usual"
    assert usual.look(result(2.0, 1.2)) == "gradient norm 1.2, where 1 +- 0.01 is usual"
    again = Usual(options, json.loads(json.dumps(usual.state())))
    assert again.state() == usual.state()
    assert len(again.losses) == 5  # a jump is not taken in
    off = Usual(fill(SpikeSettings, {"rollbacks": 0}))
    assert [off.look(result(loss)) for loss in [1.0] * 64 + [1e9]] == [None] * 65
    assert not off.losses


def test_a_batch_that_touches_what_is_left_out_begins_behind_it(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path)
    for first, stop in ((8, 16), (16, 20)):
        skipped.add(Skip(first=first, stop=stop, rolled_back_to=0, step=2, why="x"))
    assert [skipped.after(at, 4) for at in (0, 4, 5, 8, 15, 19, 20)] == [0, 4, 20, 20, 20, 20, 20]
    assert Skipped(tmp_path).skips == skipped.skips


def test_a_broken_list_is_named(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "skipped.json", ignore_errors=True)
    for text in ("{}", "{", '{"skipped": [{"first": 1}]}'):
        (tmp_path / "skipped.json").write_text(text)
        with pytest.raises(Exception, match=r"skipped\.json"):
            Skipped(tmp_path)
