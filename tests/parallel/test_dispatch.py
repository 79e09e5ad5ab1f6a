"""Tokens go to experts of other ranks and back. Oracle: a dispatcher that has all experts,
and bytes counted by hand from who chose what.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rank_programs import run_ranks

WORKER = Path(__file__).with_name("dispatch_ranks.py")
WORLD = 4
FLOAT32, BFLOAT16 = 1e-6, 5e-2  # other orders of sums, and of roundings


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("dispatch")
    results = [folder / f"{rank}.json" for rank in range(WORLD)]
    run_ranks(WORKER, [(rank, folder / "store", file) for rank, file in enumerate(results)])
    return [json.loads(result.read_text()) for result in results]


def test_outputs_and_gradients_are_those_of_one_rank(told: list[dict[str, Any]]) -> None:
    for rank in told:
        for name, value in rank["torch.float32"].items():
            assert value <= FLOAT32, name
        for name, value in rank["torch.bfloat16"].items():
            assert value <= BFLOAT16, name


def test_a_token_goes_once_to_a_node_and_once_to_a_rank_there(told: list[dict[str, Any]]) -> None:
    for rank in told:
        assert rank["bytes"] == rank["by hand"]
    assert sum(rank["bytes"]["between"] for rank in told) > 0
