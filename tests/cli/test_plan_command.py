"""`rorqual plan` from the command line. Oracle: the plan's own functions, SPEC's sizes."""

from __future__ import annotations

import json
from pathlib import Path

from command import run

from rorqual.model import preset
from rorqual.plan import disk_bytes


def test_v3_as_json() -> None:
    done = run("plan", "671b", "--on", "8xH200", "--context", "32768", "--batch", "16", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["fits"] is True
    assert report["weights"] == "fp8"
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
    assert "fits with --on 10xH100" in done.out


def test_a_folder(model_folder: Path) -> None:
    done = run("plan", model_folder, "--on", "RTX4090", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["weights"] == "float32"
    stored = (model_folder / "model.safetensors").stat().st_size
    assert abs(report["memory_bytes"]["weights"] - stored) < 20_000  # the header


def test_errors(tmp_path: Path) -> None:
    for arguments, message in (
        (("5b",), "neither a checkpoint nor a preset"),
        (("tiny", "--on", "H900"), "unknown hardware"),
        (("tiny", "--on", "H100", "--weights", "int3"), "unknown format"),
        (("tiny", "--on", "H100", "--context", "1000000"), "longer than the model's positions"),
    ):
        done = run("plan", *arguments)
        assert done.code == 2, done
        assert message in done.err
