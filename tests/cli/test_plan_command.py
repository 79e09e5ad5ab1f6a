"""`rorqual plan` from the command line. Oracle: the plan's own functions, the release's sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import run
from safetensors.torch import load_file, save_file

from rorqual.model import preset
from rorqual.ops.ceilings import Measured
from rorqual.plan import WEIGHT_FORMATS, disk_bytes
from rorqual.weights.convert.plan import Options, Target
from rorqual.weights.convert.run import convert

MEASURED = Measured("a CPU", "2025-01-31", 64e9, 2e10, {"bf16": 1e11, "float32": 2e11})


def test_v3_as_json() -> None:
    done = run("plan", "671b", "--on", "8xH200", "--context", "32768", "--batch", "16", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["fits"] is True
    assert (report["engine"], report["weights"], report["runs_as"]) == ("any", "fp8", "fp8")
    assert report["cache_bytes_per_token"] == 70_272
    assert report["memory_bytes"]["cache"] == 70_272 * 32768 * 16
    disk = {row["format"]: row for row in report["disk"]}
    assert disk["Q4_K_M"]["bytes"] == disk_bytes(preset("671b"), "Q4_K_M")
    assert report["speed_limit"]["decode_bound"] == "bandwidth"


def test_what_to_change_is_said() -> None:
    done = run("plan", "671b", "--on", "8xH100")
    assert done.code == 0
    assert "does not fit" in done.out
    assert "fits with --weights Q6_K" in done.out
    assert "fits with --on 16xH100" in done.out
    assert "by --kv: float32 140,544, bf16 70,272, fp8" in done.out


def test_what_does_not_fit_has_no_speed_but_the_disks(tmp_path: Path) -> None:
    """40 GB for V3 at two bits, as a file of one's own says; our engine reads nothing from disk."""
    path = tmp_path / "box.toml"
    path.write_text(
        'name = "box"\nmemory_gb = 43.5\nis_cpu = true\nbandwidth_gb_s = 80\nbf16_tflops = 2\n'
    )
    flags = ("plan", "671b", "--on", path, "--weights", "Q2_K_XS")
    done = run(*flags, "--engine", "any", "--disk-rate", "14")
    assert done.code == 0, done.err
    assert "does not fit" in done.out
    assert "GB read a token at least, from a disk of 14 GB/s (--disk-rate)" in done.out
    assert "At most, from the disk" in done.out
    assert "box: what the file says" in done.out
    ours = run(*flags, "--dtype", "stored")
    assert "tokens/s" not in ours.out
    assert "--engine any: how fast an engine is" in ours.out
    assert "--engine any:" not in done.out
    report = json.loads(run(*flags, "--dtype", "stored", "--json").out)
    assert report["fits"] is False
    assert report["speed_limit"] is report["speed_limit_from_disk"] is None


def test_what_is_said_of_transfers_and_numbers() -> None:
    done = run("plan", "tiny", "--on", "4xH100")
    assert "each device sends" in done.out
    done = run("plan", "tiny", "--on", "2xEPYC9654")
    assert "transfers between devices are not counted" in done.out
    done = run("plan", "tiny", "--on", "H100")
    assert "each device sends" not in done.out
    assert "not counted" not in done.out
    done = run("plan", "tiny", "--on", "3xH100")
    assert "note: machines have 1, 2, 4, 8 of these devices, not 3" in done.out


def test_a_folder(model_folder: Path) -> None:
    done = run("plan", model_folder, "--on", "RTX4090", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["weights"] == "float32"
    stored = (model_folder / "model.safetensors").stat().st_size
    assert abs(report["memory_bytes"]["weights"] - stored) < 20_000  # the header


@pytest.mark.parametrize("mix", ["Q8_0", "Q2_K_L", "BF16", "F32"])
def test_a_gguf_file_in_one_and_in_parts(model_folder: Path, tmp_path: Path, mix: str) -> None:
    for limit in (None, 20_000):
        options = Options(Target.parse(f"gguf:{mix}"), max_shard_bytes=limit)
        converted = convert(model_folder, tmp_path / f"{limit}.gguf", options)
        assert len(converted.files) == 1 if limit is None else len(converted.files) > 1
        flags = ("--on", "RTX4090", "--engine", "any", "--json")
        done = run("plan", converted.destination, *flags)
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert report["memory_bytes"]["weights"] < converted.num_bytes
        if mix in ("BF16", "F32"):
            assert report["weights"] == {"BF16": "bf16", "F32": "float32"}[mix]
        disk = {row["format"]: row for row in report["disk"]}
        assert set(disk) == set(WEIGHT_FORMATS)
        padding = disk[report["weights"]]["bytes"] - report["memory_bytes"]["weights"]
        assert 0 <= padding < 32 * 100  # of GGUF's tensors to multiples of 32 bytes
        for row in disk.values():
            assert row["GB"] == row["bytes"] / 1e9
            assert row["GiB"] == row["bytes"] / 2**30


def test_here_is_measured_once_and_again(tmp_path: Path, monkeypatch) -> None:
    """The figures in the file are those of the first run, until --remeasure."""
    from rorqual.ops import ceilings

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "GEMM_SIZE", 64)
    file = tmp_path / "rorqual/here.json"
    texts = []
    for flags in ([], [], ["--remeasure"]):
        done = run("plan", "tiny", "--on", "here", "--json", *flags)
        assert done.code == 0, done.err
        texts.append(file.read_bytes())
        report = json.loads(done.out)["hardware"]
        table = json.loads(texts[-1])
        assert report["bandwidth"] == table["bandwidth"]
        assert report["flops"] == table["flops"]
        assert not report["is_data_sheet"]
    assert texts[0] == texts[1] != texts[2]


def test_errors(tmp_path: Path) -> None:
    for arguments, message in (
        (("5b",), "neither a checkpoint nor a preset"),
        (("tiny", "--on", "H900"), "unknown hardware"),
        (("tiny", "--on", "H100", "--remeasure"), "--remeasure is for this machine"),
        (("tiny", "--on", "H100", "--weights", "int3"), "unknown format"),
        (("tiny", "--on", "H100", "--disk-rate", "0"), "--disk-rate is no rate"),
        (("tiny", "--on", "H100", "--disk-rate", "nan"), "--disk-rate is no rate"),
        (("tiny", "--on", tmp_path / "none.toml"), "no such file"),
        (("tiny", "--on", "H100", "--context", "1000000"), "longer than the model's positions"),
    ):
        done = run("plan", *arguments)
        assert done.code == 2, done
        assert message in done.err


def test_for_which_engine_is_said(model_folder: Path, monkeypatch) -> None:
    """Ours on one device, with its MTP layer; for several devices one that divides a model."""
    done = run("plan", "671b", "--on", "8xH200")
    assert "for an engine that runs weights as they are stored, without its MTP layer" in done.out
    done = run("plan", "671b", "--on", "8xH200", "--speculate", "1")
    assert "as they are stored, with its MTP layer" in done.out
    assert "decode, 1 stream, 1 drafts, 85% accepted" in done.out
    done = run("plan", "671b", "--on", "H200")
    assert "for rorqual: weights run as bf16 (--dtype auto), with its MTP layer" in done.out
    done = run("plan", "671b", "--on", "H200", "--engine", "any", "--weights", "Q2_K_L")
    assert "for an engine that runs weights as they are stored" in done.out
    monkeypatch.setattr("rorqual.plan.find.this_machine", lambda **_: MEASURED)
    done = run("plan", model_folder, "--dtype", "stored")
    assert "for rorqual: weights run as they are stored (--dtype stored)" in done.out
    done = run("plan", "671b", "--dtype", "int8")
    assert "for rorqual: weights run as --dtype int8 makes them of fp8, with" in done.out
    assert "here: measured on 2025-01-31, a CPU (no data sheet)" in done.out
    (small,) = [
        line.split() for line in run("plan", "tiny").out.splitlines() if line.startswith("bf16 ")
    ]
    assert small[1:3] == ["21,230,496", "0.021"]
    for arguments, message in (
        (("--on", "8xH200", "--engine", "rorqual"), "our engine runs on one device"),
        (("--on", "H200", "--kv", "q8_0"), "our engine has no cache in q8_0"),
        (("--on", "8xH200", "--dtype", "stored"), "a dtype is of our engine"),
        (("--on", "H200", "--dtype", "stored"), "as they are stored on a CPU only"),
        (("--on", "H200", "--dtype", "int3"), "unknown dtype"),
        (("--on", "H200", "--engine", "fast"), "unknown engine"),
    ):
        done = run("plan", "671b", *arguments)
        assert done.code == 2, done
        assert message in done.err
    for device in ("M3Ultra", "910B"):
        done = run("plan", "tiny", "--on", device)
        assert "for an engine that runs weights as they are stored" in done.out
        done = run("plan", "tiny", "--on", device, "--engine", "rorqual")
        assert (done.code, "where torch has CUDA or ROCm" in done.err) == (2, True)
    done = run("plan", "preset:16b", "--on", "H200", "--speculate", "1")
    assert (done.code, "drafts need an MTP layer" in done.err) == (2, True)


def test_vectors_do_not_say_what_a_folder_stores(model_folder: Path, tmp_path: Path) -> None:
    """Matrices of 16 bits beside norms of 32, as some converters leave them."""
    folder = tmp_path / "half"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    halved = {n: t.half() if t.dim() > 1 else t.float() for n, t in tensors.items()}
    save_file(halved, folder / "model.safetensors")
    done = run("plan", folder, "--on", "RTX4090", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["weights"] == "bf16"
