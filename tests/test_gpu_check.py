"""The script of `make gpu-check`, rehearsed on the CPU: it is its own oracle there, exactly."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import forked
from patience import HANG_SECONDS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.py"
ROWS = {
    "infer": [
        "logits float32",
        "greedy tokens float32, 0 drafts",
        "greedy tokens float32, 2 drafts",
        "tiny whole, random weights",
        "prefill 64 tokens",
        "decode, 1 streams",
        "decode, 2 streams",
    ],
    "train": ["loss and gradients float32", "five updates float32", "tiny, float32"],
}


def gpu_check(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = forked.run(SCRIPT, *arguments, timeout=HANG_SECONDS)
    told = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, *told)


@pytest.mark.slow  # the script whole; its parts are tested below
@pytest.mark.parametrize("part", ROWS)
def test_a_rehearsal_finds_no_difference(part: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "result.json"
    options = ("--device", "cpu", "--quick", "--seconds", 10_000, "--result", file)
    done = gpu_check(part, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(file.read_text())
    assert [row["row"] for row in result["rows"]] == ROWS[part]
    for row in result["rows"]:
        assert row["state"] == "ok"
        for name in ("relative_error", "loss_error", "gradient_error"):
            assert row.get(name, 0) == 0  # the CPU against itself
    table = file.with_suffix(".md").read_text()
    assert all(f"| {name} | ok |" in table for name in ROWS[part])


def test_rows_that_no_time_is_left_for_are_named(tmp_path: Path) -> None:
    """The file is there before the first row, and holds what was left out."""
    file = tmp_path / "result.json"
    done = gpu_check("train", "--device", "cpu", "--quick", "--seconds", -1, "--result", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["state"] for row in json.loads(file.read_text())["rows"]} == {"left out"}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where the tests run on a machine with one
    done = gpu_check("infer")
    assert done.returncode == 2
    assert "the device 'cuda' cannot be used" in done.stdout
    assert "--device cpu --quick" in done.stdout
