"""Training in a pipeline is training on one rank: every order, each feature that layers or losses
have. Oracle: the same steps on one process, from the same weights and samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rank_programs import run_ranks

WORKER = Path(__file__).with_name("pipeline_ranks.py")
# Sums of float32 in the same order, but for the embedding's gradient and the norm.
SAME_ORDER = 1e-6
GRADIENT = 1e-5
ORDERS = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipev")


def run(folder: Path, num_ranks: int, cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What each rank found of each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    results = [folder / f"{rank}.json" for rank in range(num_ranks)]
    shared = num_ranks, folder / "store", folder / "cases.json"
    run_ranks(WORKER, [(rank, *shared, result) for rank, result in enumerate(results)])
    return [json.loads(result.read_text()) for result in results]


def check(case: dict[str, Any], found: dict[str, Any]) -> None:
    assert found["same_start"], case
    assert not any(found["loads"]), case
    assert found["bias"] == 0.0, case
    for name in ("loss", "main", "balance", "mtp", "grad_norm"):
        assert max(found[name], default=0.0) <= SAME_ORDER, (case, name, found)
    assert found["gradients"] <= GRADIENT, (case, found)
    assert found["weights"] <= GRADIENT, (case, found)
    assert found["held_out"] <= SAME_ORDER, (case, found)
    assert found["held_out_counts"] == 0, case
    assert found["kept"] == 0, f"{case}: received tensors stay beyond the step"
    timeline = found["timeline"]
    assert timeline["is_the_order"], case
    assert timeline["is_in_turn"], case
    assert all(0 <= bubble < timeline["end"] for bubble in timeline["bubbles"]), (case, timeline)


def check_all(cases: list[dict[str, Any]], ranks: list[list[dict[str, Any]]]) -> None:
    for rank in ranks:
        for case, found in zip(cases, rank, strict=True):
            check(case, found)


def test_two_orders_are_the_serial_step(tmp_path: Path) -> None:
    """Stages one after the other, and in a V with overlapped pairs and isolated documents."""
    cases: list[dict[str, Any]] = [
        {"order": "1f1b"},
        {"order": "dualpipev", "is_isolated": True},
    ]
    check_all(cases, run(tmp_path, 2, cases))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_mtp": {"model": {"num_nextn_predict_layers": 0}},
    "two_mtp": {"model": {"num_nextn_predict_layers": 2}},
    "tied_and_isolated": {"model": {"tie_word_embeddings": True}, "is_isolated": True},
    "recomputed": {"is_recomputed": True},
    "bfloat16": {"precision": "bfloat16", "moments": "bfloat16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_every_order_with_all_that_a_training_may_have(feature: str, tmp_path: Path) -> None:
    cases = [{"order": order, **FEATURES[feature]} for order in ORDERS]
    check_all(cases, run(tmp_path, 2, cases))


@pytest.mark.slow
def test_plans_at_their_limits(tmp_path: Path) -> None:
    """Few micro-batches, odd numbers of them, stages of one layer or of none, a tied head alone."""
    cases: list[dict[str, Any]] = [
        {"order": "1f1b", "model": {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}},
        {"order": "interleaved", "num_chunks": 3, "num_micro_batches": 2},
        {"order": "zbv", "num_micro_batches": 1},
        {"order": "zbv", "model": {"num_hidden_layers": 3}},
        {"order": "interleaved", "num_chunks": 4, "model": {"num_hidden_layers": 7}},
        {"order": "1f1b", "model": {"first_k_dense_replace": 6}, "num_micro_batches": 7},
    ]
    check_all(cases, run(tmp_path, 2, cases))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["1f1b", "zbv"])
def test_twenty_steps(order: str, tmp_path: Path) -> None:
    cases = [{"order": order, "num_steps": 20}]
    check_all(cases, run(tmp_path, 2, cases))


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    cases = [{"order": order, "num_micro_batches": 8} for order in ORDERS]
    check_all(cases, run(tmp_path, 4, cases))
