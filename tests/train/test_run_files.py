"""The run folder: checkpoints that others can load, metrics without a future, plots."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from small_run import LENGTH, STAGES, SyntheticBatches

from rorqual import weights
from rorqual.errors import TrainingError
from rorqual.train import Recipe, TrainingData, load_recipe, train
from rorqual.train.checkpoint import checkpoints, find_checkpoint
from rorqual.train.checksums import CHECKSUMS
from rorqual.train.metrics import MetricsLog, read_metrics
from rorqual.train.random_states import random_states, set_random_states

LOAD_ROUNDING = 6e-4  # loads are written with three digits after the point


def test_the_run_folder_holds_what_it_should(finished_run: Path) -> None:
    assert load_recipe(finished_run / "recipe.toml", STAGES).name == "small"
    names = ("expert_load", "learning_rate", "loss", "max_vio")
    assert [path.stem for path in sorted((finished_run / "plots").iterdir())] == list(names)
    for path in (finished_run / "plots").iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    folder = finished_run / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-6", "step-8"]
    assert (folder / "latest").resolve() == (folder / "step-8").resolve()


def test_without_matplotlib_a_run_says_so_and_ends_well(
    make_recipe: Callable[..., Recipe],
    data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where only what is needed to chat was installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recipe = make_recipe(f"training.total_tokens={8 * LENGTH}")
    assert train(recipe, tmp_path / "run", data).is_finished
    assert "pip install 'rorqual[train]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "plots").exists()


def test_checkpoint_is_a_hugging_face_folder_with_a_float32_bias(finished_run: Path) -> None:
    folder = finished_run / "checkpoints" / "step-8"
    model = weights.load(folder)
    assert any(router.e_score_correction_bias.any() for router in model.routers())
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            assert file.get_tensor(name).dtype == torch.float32, name
    state = json.loads((folder / "trainer" / "state.json").read_text())
    assert state["progress"]["samples"] == 64


def test_find_checkpoint_takes_a_run_latest_or_the_folder_itself(
    finished_run: Path, tmp_path: Path
) -> None:
    step = finished_run / "checkpoints" / "step-8"
    for path in (finished_run, finished_run / "checkpoints" / "latest", step):
        assert find_checkpoint(path).resolve() == step.resolve()
    with pytest.raises(TrainingError, match="there is no checkpoint here"):
        find_checkpoint(tmp_path / "none" / "checkpoints" / "latest")
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step-8")  # the link is left
    with pytest.raises(TrainingError, match="there is no checkpoint here") as caught:
        find_checkpoint(run / "checkpoints" / "latest")
    assert str(run / "checkpoints" / "step-6") in str(caught.value.fix)
    (run / "checkpoints" / "step-6" / "config.json").unlink()
    with pytest.raises(TrainingError, match=r"found: *no config\.json") as caught:
        find_checkpoint(run)
    assert "the run's only one" in str(caught.value.fix)


def test_half_written_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in (".step-9.abc", "step-9", "step-x", "step-7"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    trainer = tmp_path / "checkpoints" / "step-7" / "trainer"
    trainer.mkdir()
    (trainer / "state.json").write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["step-7"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("trainer/state.json", "{}", "has no 'progress'"),
        ("trainer/state.json", "{", "is not valid JSON"),
        ("trainer/moments.safetensors", "short", "cannot be read"),
    ],
)
def test_a_broken_checkpoint_names_the_file(
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    data: TrainingData,
    file: str,
    text: str,
    message: str,
) -> None:
    recipe = make_recipe("training.total_tokens=128")
    folder = train(recipe, tmp_path, data, is_quiet=True).checkpoint
    (folder / file).write_text(text)
    with pytest.raises(TrainingError, match="this checkpoint is damaged") as problem:
        train(recipe, tmp_path, data, is_quiet=True)
    assert f"{file} has {len(text)} bytes instead of" in str(problem.value)
    (folder / "trainer" / CHECKSUMS).unlink()  # as earlier versions wrote none
    with pytest.raises(TrainingError, match=message) as problem:
        train(recipe, tmp_path, data, is_quiet=True)
    assert Path(file).name in str(problem.value)


def test_init_from_starts_with_the_weights_and_fresh_moments(
    finished_run: Path, tmp_path: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    start = json.dumps(str(finished_run / "checkpoints" / "latest"))
    tuned = make_recipe("stage='sft'", f"init_from={start}", "model={rope_theta=5000.0}")
    with pytest.raises(TrainingError, match="no numbers of documents"):
        train(tuned, tmp_path / "none", data, is_quiet=True)
    isolated = TrainingData(train=SyntheticBatches(is_isolated=True))
    summary = train(tuned, tmp_path / "sft", isolated, is_quiet=True)
    losses = [record["main"] for record in read_metrics(tmp_path / "sft" / "metrics.jsonl")[:1]]
    before = read_metrics(finished_run / "metrics.jsonl")[0]["main"]
    assert losses[0] < before
    assert weights.load_config(summary.checkpoint).rope_theta == 5000.0
    wrong = make_recipe(f"init_from={start}", "model={hidden_size=64}")
    with pytest.raises(TrainingError, match="changes the shape") as caught:
        train(wrong, tmp_path / "wrong", data, is_quiet=True)
    assert caught.value.found == "hidden_size 32 -> 64"  # the recipe's terms, not torch's


def test_samples_of_another_width_are_refused(
    tmp_path: Path, make_recipe: Callable[..., Recipe]
) -> None:
    wide = TrainingData(train=SyntheticBatches(num_depths=2))
    with pytest.raises(TrainingError, match="do not fit the recipe"):
        train(make_recipe(), tmp_path, wide, is_quiet=True)


def test_metrics_after_the_resumed_step_and_half_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write("step", step, loss=1.5 / step)
    log.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    log = MetricsLog(path, 3)
    log.write("step", 4, loss=9.0)
    log.close()
    records = read_metrics(path)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["loss"] for record in records] == [1.5, 0.75, 0.5, 9.0]


def test_a_broken_line_of_metrics_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n???\n{"kind": "step", "step": 2}\n')
    with pytest.raises(TrainingError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_random_states_come_back_through_json() -> None:
    states = json.loads(json.dumps(random_states()))
    drawn = (torch.rand(3).tolist(), random.random(), np.random.rand())
    set_random_states(states)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn


def test_random_states_of_gpus_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run has begun to use GPUs, each one's state; elsewhere, and on the CPU, none."""
    assert random_states()["cuda"] == []
    gpus = [torch.arange(16, dtype=torch.uint8), torch.full((16,), 7, dtype=torch.uint8)]
    found: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.extend)
    set_random_states(json.loads(json.dumps(random_states())))
    for state, gpu in zip(found, gpus, strict=True):
        assert torch.equal(state, gpu)


def test_a_line_of_load_is_that_of_the_steps_since_the_last(
    tmp_path: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    """With one step between two lines, the step's own record of its highest load says the same."""
    step = 8 * LENGTH
    recipe = make_recipe(f"training.total_tokens={4 * step}", f"checkpoint.every_tokens={step}")
    train(recipe, tmp_path, data, is_quiet=True)
    records = read_metrics(tmp_path / "metrics.jsonl")
    highest = [max(map(max, r["load"])) for r in records if r["kind"] == "load"]
    wanted = [1 + r["max_vio_max"] for r in records if r["kind"] == "step"]
    assert highest == pytest.approx(wanted, abs=LOAD_ROUNDING)
    assert len(set(highest)) > 1
