"""TensorBoard's event files. Oracle: TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import ConfigError
from rorqual.train import Recipe, TrainingData, train
from rorqual.train import tensorboard as tensorboard_module
from rorqual.train.metrics import MetricsLog, read_metrics
from rorqual.train.tensorboard import FOLDER, TensorBoardLog

MISSING = "tensorboard is not installed: pip install 'rorqual[tensorboard]'"
FLOAT32 = 1e-6  # event files hold float32
needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason=MISSING
)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@needs_tensorboard
def test_its_reader_finds_every_number_of_the_metrics(
    make_recipe: Callable[..., Recipe], data: TrainingData, tmp_path: Path
) -> None:
    """Also after a resume, whose steps are there once."""
    stopped = make_recipe("metrics.tensorboard=true", "training.total_tokens=512")
    train(stopped, tmp_path, data, is_quiet=True)
    more = make_recipe("metrics.tensorboard=true")
    train(more, tmp_path, data, is_quiet=True, allow_changes=True)
    found = scalars(tmp_path / FOLDER)
    steps = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "step"]
    wanted: dict[str, Callable[[dict[str, Any]], float]] = {
        "step/loss": lambda step: step["loss"],
        "step/mtp/1": lambda step: step["mtp"][0],
        "step/seconds/forward": lambda step: step["seconds"]["forward"],
    }
    for name, value in wanted.items():
        numbers = [(step["step"], value(step)) for step in steps]
        assert [step for step, _ in found[name]] == [step for step, _ in numbers]
        values = [number for _, number in numbers]
        assert [number for _, number in found[name]] == pytest.approx(values, rel=FLOAT32)
    assert "load/max_vio/1" in found
    assert not [name for name in found if name.startswith(("load/load", "load/layers"))]


@needs_tensorboard
def test_steps_after_the_one_that_a_run_goes_back_to_are_hidden(tmp_path: Path) -> None:
    for begun, losses in ((0, [1.0, 2.0, 3.0, 4.0, 5.0]), (2, [30.0])):
        log = MetricsLog(
            tmp_path / "metrics.jsonl", begun, TensorBoardLog(tmp_path / FOLDER, begun)
        )
        for step, loss in enumerate(losses, begun + 1):
            log.write("step", step, loss=loss)
        log.close()
    assert scalars(tmp_path / FOLDER) == {"step/loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0]


def test_without_tensorboard_it_is_refused_before_anything_is_made(
    make_recipe: Callable[..., Recipe],
    data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensorboard_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rorqual\[tensorboard\]'"):
        train(make_recipe("metrics.tensorboard=true"), tmp_path / "run", data, is_quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
