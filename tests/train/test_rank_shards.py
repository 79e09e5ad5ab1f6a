"""What several ranks save is read by any number of ranks, and by all that reads models.

Oracles: values that follow from the names; torch's own reader of DCP; what one rank saves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from shards_ranks import make_model, named, state_of, values_of, whole_of
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

import in_process
from patience import HANG_SECONDS
from rank_programs import Rank
from rorqual import weights
from rorqual.errors import CheckpointError, TrainingError
from rorqual.train.checksums import damage
from rorqual.train.restore import has_average, restore_tensors
from rorqual.train.shards import read_shards
from rorqual.weights.parameters_source import shards_of

WORKER = Path(__file__).with_name("shards_ranks.py")
RANKS = 4


def on_ranks(world: int, folder: Path, place: Path, what: str) -> list[dict[str, Any]]:
    """What each rank tells."""
    place.mkdir()
    results = [place / f"{rank}.json" for rank in range(world)]
    processes = [
        Rank(
            [
                sys.executable,
                str(WORKER),
                *map(str, (rank, world, place / "store", folder, results[rank], what)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=HANG_SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [json.loads(result.read_text()) for result in results]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A checkpoint of four ranks."""
    place = tmp_path_factory.mktemp("shards")
    folder = place / "checkpoint"
    return folder, on_ranks(RANKS, folder, place / "written", "write")


def test_each_rank_writes_its_share_once(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, told = saved
    files = shards_of(folder)
    assert len(files) == RANKS
    assert told[0]["known"] == [file.relative_to(folder).as_posix() for file in files]
    assert all("known" not in of_rank for of_rank in told[1:])  # the first one ends it
    assert [of_rank["damage"] for of_rank in told] == [[]] * RANKS
    numbers = [sum(v.numel() for v in load_file(file).values()) for file in files]
    whole = sum(piece.local.numel() for piece in state_of(make_model()).values())
    assert sum(numbers) == whole
    assert sum(of_rank["local"] for of_rank in told) > whole  # the router's bias is on all of them


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_ranks_reads_it(
    saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path, world: int
) -> None:
    folder, _ = saved
    if world > 1:
        for told in on_ranks(world, folder, tmp_path / "read", "read"):
            assert told["unequal"] == []
        return
    pieces = state_of(make_model())
    for piece in pieces.values():
        piece.local.zero_()
    restore_tensors(folder, pieces)
    assert has_average(folder)
    for name, piece in pieces.items():
        assert torch.equal(piece.local, whole_of(name, piece)), name


def test_torch_reads_it(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = saved
    wanted = {name: torch.zeros_like(p.local) for name, p in state_of(make_model()).items()}
    reader = HuggingFaceStorageReader(str(folder / "trainer" / "shards"))
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(wanted, storage_reader=reader)
    for name, value in wanted.items():
        assert torch.equal(value, values_of(name, value)), name


def test_it_is_a_model_and_its_export_is_what_one_rank_saves(
    saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = saved
    expected = make_model()
    found = weights.load(folder)
    for name, value in named(expected).items():
        assert torch.equal(named(found)[name], value), name
    weights.save(expected, tmp_path / "one", "float32")
    done = in_process.run("convert", folder, tmp_path / "all", "--to", "float32", "--verify")
    assert not done.code, done.err
    for file in sorted((tmp_path / "one").iterdir()):
        assert (tmp_path / "all" / file.name).read_bytes() == file.read_bytes(), file.name


def test_its_average_is_exported_too(
    saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = saved
    done = in_process.run("convert", folder, tmp_path / "ema", "--to", "float32", "--ema")
    assert not done.code, done.err
    model = weights.load(tmp_path / "ema")
    for name, value in model.named_parameters():
        assert torch.equal(value, values_of(f"ema.{name}", value)), name


def test_what_does_not_fit_is_named(
    saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, _ = saved
    pieces = state_of(make_model())
    name = "model.norm.weight"
    for wrong in (pieces[name].local[1:].clone(), pieces[name].local.bfloat16()):
        with pytest.raises((TrainingError, Exception), match=r"model\.norm\.weight"):
            read_shards(folder, {name: type(pieces[name])(wrong, tuple(wrong.shape), (0,))})
    with pytest.raises(Exception, match="another"):
        read_shards(folder, {"another": pieces[name]})


def test_a_missing_shard_is_seen(saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(saved[0], tmp_path / "copy")
    shards_of(folder)[1].unlink()
    assert "cannot be read" in damage(folder)[0]
    with pytest.raises(CheckpointError, match="is not whole in the shards"):
        weights.load(folder)
