"""A damaged file is seen, and the run goes on from the checkpoint before. Oracle: the whole run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rorqual.errors import TrainingError
from rorqual.train import Recipe, TrainingData, train
from rorqual.train.checkpoint import checkpoints, good_checkpoint
from rorqual.train.checksums import damage


def flip(file: Path) -> None:
    """One bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-2])


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "cut": cut, "remove": Path.unlink}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "trainer/moments.safetensors", "trainer/checksums.json"],
)
def test_each_file_is_looked_at(finished_run: Path, tmp_path: Path, name: str, how: str) -> None:
    folder = shutil.copytree(finished_run / "checkpoints" / "step-8", tmp_path / "step-8")
    assert damage(folder) == []
    DAMAGE[how](folder / name)
    faults = damage(folder)
    if (name, how) == ("trainer/checksums.json", "remove"):
        assert faults == []  # as earlier versions wrote none
    else:
        assert len(faults) >= 1
        assert name in faults[0] or name.endswith("checksums.json")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer/moments.safetensors"])
def test_the_run_goes_on_from_the_one_before(
    finished_run: Path,
    tmp_path: Path,
    make_recipe: Callable[..., Recipe],
    data: TrainingData,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    flip(run / "checkpoints" / "step-8" / name)
    summary = train(make_recipe(), run, data)
    err = capsys.readouterr().err
    assert f"step-8 is damaged, and was renamed to damaged-step-8: {name} is not what" in err
    assert "continuing" in err
    assert (run / "checkpoints" / "damaged-step-8").is_dir()
    assert [path.name for path in checkpoints(run)] == ["step-6", "step-8"]
    one, other = (
        load_file(folder / "model.safetensors")
        for folder in (summary.checkpoint, finished_run / "checkpoints" / "step-8")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_where_none_is_good_the_run_says_so_and_changes_nothing(
    finished_run: Path, tmp_path: Path, make_recipe: Callable[..., Recipe], data: TrainingData
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    for step in (6, 8):
        flip(run / "checkpoints" / f"step-{step}" / "model.safetensors")
    with pytest.raises(TrainingError, match="damaged and no earlier one is whole") as caught:
        train(make_recipe(), run, data, is_quiet=True)
    assert "--fresh" in str(caught.value.fix)
    assert [path.name for path in checkpoints(run)] == ["step-6", "step-8"]


def test_large_files_are_read_when_the_run_goes_on_alone(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look ahead compares their sizes; of several ranks each reads its share."""
    folder = finished_run / "checkpoints" / "step-8"
    monkeypatch.setattr("rorqual.train.checksums.SMALL_BYTES", 0)
    read: list[str] = []

    def counted(file: Path) -> dict[str, object]:
        read.append(file.name)
        return {"sha256": "other"}

    monkeypatch.setattr("rorqual.train.checksums.checksum", counted)
    assert damage(folder, is_deep=False) == []
    assert not read
    shares = [damage(folder, share=(rank, 3)) for rank in range(3)]
    assert len(read) == len(set(read)) == sum(map(len, shares))
    assert min(map(len, shares)) >= 1
    assert good_checkpoint(finished_run, lambda folder: []).folder == folder
