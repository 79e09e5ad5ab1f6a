"""FSDP takes hold of the training root from outside: two processes with gloo.

Oracle: the same step on one process, from the same weights and samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forked
from patience import HANG_SECONDS

WORKER = Path(__file__).with_name("two_ranks.py")
LOSS, GRADIENT = 1e-6, 1e-5


class Ranks(forked.Popen):
    modules = ("rorqual.train.stages", "torch.distributed.fsdp", "torch.distributed.pipelining")


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found: how far from the serial step."""
    folder = tmp_path_factory.mktemp("ranks")
    results = [folder / f"{rank}.json" for rank in range(2)]
    commands = [
        [sys.executable, str(WORKER), str(rank), str(folder / "store"), str(result)]
        for rank, result in enumerate(results)
    ]
    processes = [Ranks(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=HANG_SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [json.loads(result.read_text()) for result in results]


def test_a_sharded_step_is_the_serial_one(gaps: list[dict[str, Any]]) -> None:
    for rank in gaps:
        found = rank["sharded"]
        assert found["loads"] == found["num_targets"] == 0
        for name in ("loss", "main", "mtp", "balance", "grad_norm"):
            assert found[name] <= LOSS * 10 if name == "grad_norm" else found[name] <= LOSS, name
        assert found["weights"] <= GRADIENT
