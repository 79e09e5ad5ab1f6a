"""`rorqual convert` from the command line. Oracle: the library's own functions, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from command import run

from rorqual.weights import load
from rorqual.weights.convert import files as convert_files
from rorqual.weights.planned import PlannedTensor


def test_fp8_and_back(model_folder: Path, tmp_path: Path) -> None:
    done = run("convert", model_folder, tmp_path / "fp8", "--to", "fp8", "--verify", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["files"] == ["model.safetensors"]
    size = (tmp_path / "fp8/model.safetensors").stat().st_size
    assert report["bytes"] == report["bytes_written"] == size
    by_type = {row["type"]: row for row in report["verify"]}
    assert by_type["self_attn.o_proj"]["to"] == "F8_E4M3"
    assert 0 < by_type["self_attn.o_proj"]["relative_error"] < 0.05
    assert by_type["mlp.gate.e_score_correction_bias"]["unequal"] == 0
    assert (tmp_path / "fp8/chat.json").read_bytes() == (model_folder / "chat.json").read_bytes()
    done = run("convert", tmp_path / "fp8", tmp_path / "bf16", "--to", "bf16", "--verify")
    assert done.code == 0, done.err
    assert "self_attn.o_proj" in done.out
    assert "wrote" in done.err
    load(tmp_path / "bf16")


def test_rank_shards(model_folder: Path, tmp_path: Path) -> None:
    done = run("convert", model_folder, tmp_path / "mp2", "--to", "shards:2", "--verify")
    assert done.code == 0, done.err
    ours, theirs = load(model_folder), load(tmp_path / "mp2")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_errors(model_folder: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((model_folder, tmp_path / "a", "--to", "int4"), "is no target"),
        ((model_folder, tmp_path / "a", "--to", "shards:3"), "cannot be divided among 3 ranks"),
        ((model_folder, model_folder, "--to", "bf16"), "the destination lies in the source"),
        ((tmp_path / "none", tmp_path / "a", "--to", "bf16"), "no such folder"),
        ((tmp_path, tmp_path.parent / "a", "--to", "bf16"), "config.json"),
    ):
        done = run("convert", *arguments)
        assert done.code == 2, done
        assert message in done.err
        assert "Traceback" not in done.err
    assert not (tmp_path / "a").exists()


def test_verify_fails_with_exit_code_2(model_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A matrix whose last rows were left out: its name, what it is off by, and the bound."""
    name = "model.layers.1.mlp.experts.2.down_proj.weight"

    def encode_badly(source, output, scale, options, put) -> None:
        def put_badly(to: PlannedTensor, first: int, rows: torch.Tensor) -> None:
            if to.name == name:
                rows[-2:] = 0
            put(to, first, rows)

        encode(source, output, scale, options, put_badly)

    encode = convert_files.encode
    monkeypatch.setattr(convert_files, "encode", encode_badly)
    done = run("convert", model_folder, tmp_path / "a", "--to", "bf16", "--verify")
    assert done.code == 2
    assert f"{name}: 32 values from row 30 on" in done.err
    assert "to BF16: off by" in done.err
    assert (tmp_path / "a/model.safetensors").exists()
    done = run("convert", model_folder, tmp_path / "b", "--to", "bf16", "--verify", "--json")
    assert done.code == 2
    faults = [fault for row in json.loads(done.out)["verify"] for fault in row["faults"]]
    assert [fault["tensor"] for fault in faults] == [name]
