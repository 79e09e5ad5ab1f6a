"""A live model as a source of tensors. Oracles: safetensors' writer, the audit, what was there."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import hf_oracle as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from rorqual.errors import CheckpointError
from rorqual.model import DeepseekV3, build
from rorqual.weights import save
from rorqual.weights.audit import audit
from rorqual.weights.convert import files as convert_files
from rorqual.weights.folder import SINGLE
from rorqual.weights.model_writer import ModelSource
from rorqual.weights.names import written_tensors
from rorqual.weights.planned import planned_tensors
from rorqual.weights.safetensors_file import DTYPES

CONFIG = oracle.CONFIGS["tied_mtp"]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_a_file_is_the_librarys(tmp_path: Path, kind: torch.dtype) -> None:
    """Of a model in any dtype, byte for byte."""
    model = build(CONFIG).to(kind)
    places: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
    for dtype in ("float32", "bfloat16"):
        save(model, tmp_path / dtype, dtype)  # type: ignore[arg-type]
        values = {
            planned.name: planned.source.part_of(places[planned.source.parameter])
            .detach()
            .to(DTYPES[planned.dtype], copy=True)
            .contiguous()
            for planned in planned_tensors(CONFIG, dtype)  # type: ignore[arg-type]
        }
        save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / dtype / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_model_is_a_checkpoint_without_a_fault(tmp_path: Path) -> None:
    model = build(CONFIG)
    for tensors in (written_tensors(CONFIG), written_tensors(CONFIG, repeat_mtp_embedding=False)):
        with ModelSource(model, tensors, tmp_path) as source:
            report = audit(source)
            assert report.all_faults == report.notes == []
            assert report.tensors == tensors
            assert source.num_bytes() == sum(
                source.read_rows(name, 0, entry.shape[0]).nbytes
                for name, entry in source.entries.items()
            )
            name = "model.layers.1.mlp.experts.2.up_proj.weight"
            rows = source.read_rows(name, 3, 5)
            inner = CONFIG.moe_intermediate_size
            stack = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
            assert torch.equal(rows, stack[2, inner + 3 : inner + 5])


def refused(model: DeepseekV3, folder: Path, kind: type[Exception], dtype: Any) -> Exception:
    """Saves over a checkpoint, which must stay as it is."""
    before = load_file(folder / SINGLE)
    with pytest.raises(kind) as caught:
        save(model, folder, dtype, replace=True)
    after = load_file(folder / SINGLE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return caught.value


def test_a_fault_names_the_tensor_and_changes_nothing(tmp_path: Path) -> None:
    save(build(CONFIG), tmp_path / "model")
    broken = build(CONFIG, seed=1)
    with torch.no_grad():
        broken.get_parameter("model.layers.1.mlp.experts.down_proj")[1, 0, 0] = torch.inf
    problem = refused(broken, tmp_path / "model", CheckpointError, "fp8")
    assert isinstance(problem, CheckpointError)
    assert "model.layers.1.mlp.experts.1.down_proj.weight has values that are" in problem.what
    assert problem.where == tmp_path / "model"
    assert "bfloat16" in str(problem.fix)


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(build(CONFIG), tmp_path / "model")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert_files, "write_at", full)
    refused(build(CONFIG, seed=1), tmp_path / "model", OSError, "float32")
