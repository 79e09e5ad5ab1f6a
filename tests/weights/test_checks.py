"""The checks of `rorqual inspect`, and what it prints. Oracles: our faults, the release's count."""

from __future__ import annotations

import json
from pathlib import Path

import hf_oracle as oracle
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rorqual.cli.inspect import describe, inspect
from rorqual.errors import RorqualError
from rorqual.model import build
from rorqual.tokenizer import train_tokenizer
from rorqual.weights import save
from rorqual.weights.checks import check_folder
from rorqual.weights.folder import SINGLE
from rorqual.weights.planned import planned_tensors

CONFIG = oracle.CONFIGS["mtp_groups_yarn"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(build(CONFIG), tmp_path / "model", "fp8")
    return tmp_path / "model"


def status(folder: Path, name: str, *, is_deep: bool = False) -> str:
    checks = {check.name: check.status for check in check_folder(folder, is_deep=is_deep).checks}
    return checks[name]


def edit(folder: Path, **values: torch.Tensor) -> None:
    tensors = load_file(folder / SINGLE)
    tensors |= {name.replace("__", "."): value for name, value in values.items()}
    save_file(tensors, folder / SINGLE)


def test_a_sound_folder(folder: Path) -> None:
    found = check_folder(folder, is_deep=True)
    assert {check.status for check in found.checks if check.name != "tokenizer"} == {"ok"}


def test_values_are_read_only_when_deep(folder: Path) -> None:
    edit(folder, model__norm__weight=torch.full((64,), torch.inf, dtype=torch.bfloat16))
    assert status(folder, "values") == "skipped"
    assert status(folder, "values", is_deep=True) == "failed"
    scale = "model__layers__0__mlp__up_proj__weight_scale_inv"
    edit(folder, model__norm__weight=torch.ones(64), **{scale: torch.full((1, 1), torch.nan)})
    assert status(folder, "values", is_deep=True) == "failed"


def test_each_fault_fails_its_own_check(folder: Path) -> None:
    edit(folder, model__norm__weight=torch.ones(63))
    assert status(folder, "shapes") == "failed"
    edit(folder, model__norm__weight=torch.ones(64, dtype=torch.int32))
    assert status(folder, "dtypes") == "failed"
    edit(folder, model__norm__weight=torch.ones(64), model__extra=torch.ones(1))
    assert status(folder, "tensors") == "failed"
    bias = "model__layers__1__mlp__gate__e_score_correction_bias"
    edit(folder, **{bias: torch.ones(8, dtype=torch.bfloat16)})
    assert status(folder, "router bias") == "failed"
    (folder / SINGLE).write_bytes(b"no")
    assert status(folder, "files") == "failed"
    assert status(folder, "tensors") == "skipped"
    (folder / "config.json").write_text("{")
    assert status(folder, "configuration") == "failed"


def test_tokenizer_against_vocabulary(folder: Path) -> None:
    assert status(folder, "tokenizer") == "skipped"
    tokenizer = train_tokenizer(["words to learn from"] * 20, 320)
    tokenizer.save(folder)
    assert status(folder, "tokenizer") == "failed"
    (folder / "tokenizer.json").write_text("{}")
    assert status(folder, "tokenizer") == "failed"


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(inspect)
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout


def test_command_on_a_folder(folder: Path) -> None:
    code, output = run(str(folder), "--deep")
    assert code == 0
    assert "n_routed_experts" in output
    code, output = run(str(folder), "--json")
    assert code == 0
    report = json.loads(output)
    stored = planned_tensors(CONFIG, "fp8")
    total = report["stored"][-1]
    assert total["tensors"] == len(stored)
    assert total["bytes"] == sum(tensor.num_bytes for tensor in stored)
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-10])
    code, output = run(str(folder), "--json")
    assert code == 2
    assert [c["name"] for c in json.loads(output)["checks"] if c["status"] == "failed"] == ["files"]
    code, output = run(str(folder))
    assert code == 2
    assert "failed" in output


def test_command_on_a_preset() -> None:
    code, output = run("671b", "--json")
    report = json.loads(output)
    assert code == 0
    assert report["parameters"]["activated"] == 37_552_282_624
    assert report["stored"][-1]["tensors"] == 91_991
    assert report["stored"][-1]["elements"] == 684_531_386_000
    assert run("671b")[1].count("37,552,282,624") == 1


@pytest.mark.parametrize("name", ["672b", "no/such/folder"])
def test_neither_folder_nor_preset(name: str) -> None:
    with pytest.raises(RorqualError, match=name) as caught:
        describe(name)
    assert "671b" in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(RorqualError, match=r"config\.json"):
        describe(str(tmp_path))
