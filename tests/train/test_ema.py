"""The average of the parameters. Oracle: its closed form, from the weights after every step."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import LENGTH, RECIPE, STAGES, SyntheticBatches

import in_process
from rorqual import weights
from rorqual.model import DeepseekV3, build
from rorqual.train import Recipe, TrainingData, train
from rorqual.train.ema import Ema
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.recipe import recipe_of

DECAY = 0.9
ROUNDING = 1e-6  # of float32, over eight steps
STEPS = 8


def averaged(**training: object) -> Recipe:
    table = {**RECIPE, "ema": {"decay": DECAY}}
    table["checkpoint"] = {"every_tokens": 8 * LENGTH, "keep_last": 100}
    table["training"] = {**RECIPE["training"], **training}
    return recipe_of(table, STAGES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, each with its checkpoint."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ema")
    train(averaged(), folder, TrainingData(train=SyntheticBatches()), is_quiet=True)
    torch.set_num_threads(before)
    return folder


def parameters_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach().double() for name, p in weights.load(folder).named_parameters()}


def average_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "trainer" / "ema.safetensors")
    return {name.removeprefix("ema."): value for name, value in stored.items()}


def test_it_is_the_closed_form(run: Path) -> None:
    """decay^T theta_0 + (1 - decay) sum of decay^(T - t) theta_t, in float64."""
    fresh = build(averaged().model_config(), seed=averaged().seed)
    expected = {n: DECAY**STEPS * p.detach().double() for n, p in fresh.named_parameters()}
    for step in range(1, STEPS + 1):
        for name, value in parameters_of(run / "checkpoints" / f"step-{step}").items():
            expected[name] += (1 - DECAY) * DECAY ** (STEPS - step) * value
    found = average_of(run / "checkpoints" / f"step-{STEPS}")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=ROUNDING, atol=ROUNDING)


def test_it_changes_nothing_that_is_learnt(run: Path, finished_run: Path) -> None:
    one, other = (
        load_file(folder / "checkpoints" / f"step-{STEPS}" / "model.safetensors")
        for folder in (run, finished_run)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_was_stopped_has_the_same_average(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run", symlinks=True)
    for step in range(4, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    train(averaged(), folder, TrainingData(train=SyntheticBatches()), is_quiet=True)
    one, other = (average_of(f / "checkpoints" / f"step-{STEPS}") for f in (run, folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_had_none_begins_one(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the weights of its checkpoint; and may end it again."""
    folder = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(folder / "checkpoints" / "step-8")
    train(averaged(), folder, TrainingData(train=SyntheticBatches()))
    assert "the average of the parameters (ema.decay) begins here" in capsys.readouterr().err
    theta = [parameters_of(folder / "checkpoints" / f"step-{step}") for step in (6, 7, 8)]
    for name, value in average_of(folder / "checkpoints" / "step-8").items():
        expected = (
            DECAY**2 * theta[0][name]
            + (1 - DECAY) * DECAY * theta[1][name]
            + (1 - DECAY) * theta[2][name]
        )
        torch.testing.assert_close(value.double(), expected, rtol=ROUNDING, atol=ROUNDING)
    shutil.rmtree(folder / "checkpoints" / "step-8")
    plain = recipe_of(RECIPE, STAGES)
    train(plain, folder, TrainingData(train=SyntheticBatches()), is_quiet=True)
    assert not (folder / "checkpoints" / "step-8" / "trainer" / "ema.safetensors").exists()


def test_with_bfloat16_products_it_is_of_the_float32_weights(tmp_path: Path) -> None:
    recipe = averaged(precision="bfloat16", total_tokens=8 * LENGTH)
    train(recipe, tmp_path, TrainingData(train=SyntheticBatches()), is_quiet=True)
    fresh = dict(build(recipe.model_config(), seed=recipe.seed).named_parameters())
    folder = tmp_path / "checkpoints" / "step-1"
    theta = parameters_of(folder)
    for name, value in average_of(folder).items():
        expected = DECAY * fresh[name].detach().double() + (1 - DECAY) * theta[name]
        torch.testing.assert_close(value.double(), expected, rtol=ROUNDING, atol=ROUNDING)


def test_convert_writes_it_as_a_model(run: Path, tmp_path: Path) -> None:
    """The router's bias is the weights' own: it is not averaged."""
    out = tmp_path / "averaged"
    done = in_process.run("convert", run, out, "--to", "float32", "--ema", "--verify")
    assert not done.code, done.err
    model = weights.load(out)
    for name, value in average_of(run / "checkpoints" / f"step-{STEPS}").items():
        assert torch.equal(model.get_parameter(name), value), name
    own = weights.load(run / "checkpoints" / f"step-{STEPS}")
    for one, other in zip(model.routers(), own.routers(), strict=True):
        assert torch.equal(one.e_score_correction_bias, other.e_score_correction_bias)


def test_convert_says_where_there_is_none(finished_run: Path, tmp_path: Path) -> None:
    done = in_process.run("convert", finished_run, tmp_path / "x", "--to", "float32", "--ema")
    assert done.code == 2
    assert "has no average of its parameters" in done.err
    assert "ema.decay" in done.err


@pytest.mark.concurrency
def test_only_an_update_waits_for_it(
    make_model: Callable[..., DeepseekV3], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held: `follow` returns at once, and the optimizer's step does not."""
    may_go_on, is_held = threading.Event(), threading.Event()
    take_in = Ema._take_in

    def held(self: Ema) -> None:
        is_held.set()
        may_go_on.wait()
        take_in(self)

    monkeypatch.setattr(Ema, "_take_in", held)
    optimizer = AdamW(make_model(), OptimizerSettings())
    ema = Ema(optimizer, DECAY)
    before = {name: p.detach().clone() for name, p in optimizer.named.items()}
    for parameter in optimizer.named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.set_lr(1.0)
    ema.follow()
    is_held.wait()
    update = threading.Thread(target=optimizer.step)
    update.start()
    assert all(torch.equal(p, before[name]) for name, p in optimizer.named.items())
    may_go_on.set()
    update.join()
    assert not any(torch.equal(p, before[name]) for name, p in optimizer.named.items())
    for name, value in ema.values.items():  # it saw what the parameters were
        torch.testing.assert_close(value, before[name])
