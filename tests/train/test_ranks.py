"""A training on many ranks is that on one. Oracle: the same recipe on this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from ranks_case import Case, Outcome, pairwise, run, serial, text_of

FIRST_LOSS, GRADIENT, LAST_LOSS = 1e-6, 1e-5, 1e-4
BFLOAT16, BFLOAT16_MOMENTS = 1e-2, 1e-3


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-12)


def check(found: Outcome, expected: Outcome, last_loss: float = LAST_LOSS) -> None:
    """The bars: of the first step and of the last one."""
    first, alone = found.steps[0], expected.steps[0]
    for name in ("loss", "main", "mtp", "balance"):
        assert abs(first[name] - alone[name]) <= FIRST_LOSS, name
    assert first["num_targets"] == alone["num_targets"]
    assert found.loads[0] == expected.loads[0]
    assert relative(first["grad_norm"], alone["grad_norm"]) <= GRADIENT
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        gap = (found.gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert gap <= GRADIENT, f"{name}: {gap}"
    assert len(found.steps) == len(expected.steps)
    assert abs(found.steps[-1]["loss"] - expected.steps[-1]["loss"]) <= last_loss
    assert found.weights.keys() == expected.weights.keys()


Compare = Callable[[Case], None]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def compare(alone: Path, tmp_path: Path) -> Compare:
    return lambda case: check(run(case, tmp_path), serial(text_of(case.serial), alone))


def test_two_ranks_that_share_weights_learn_what_one_learns(compare: Compare) -> None:
    compare(Case({"dp_shard": 2}, num_steps=5))


def test_two_ranks_that_share_experts_learn_what_one_learns(compare: Compare) -> None:
    compare(Case({"ep": 2, "zero": 3}, "sft", is_recomputed=True, num_steps=5))


PLANS: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "ep4 on two nodes": {"ep": 4, "ranks_per_node": 2},
    "dp2": {"dp_shard": 2},
    "dp2, replicated": {"dp_replicate": 2},
    "dp2 x ep2": {"dp_shard": 2, "ep": 2},
    "dp2 x ep2, replicated": {"dp_replicate": 2, "ep": 2},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4, "order": "zbv"},
    "pp2 x ep2": {"pp": 2, "ep": 2},
    "pp2 x dp2": {"pp": 2, "dp_shard": 2},
    "pp2 x dp2 in a V": {"pp": 2, "dp_shard": 2, "order": "zbv"},
    "ep2, overlapped": {"ep": 2, "order": "dualpipev"},
}


AXES: dict[str, Sequence[Any]] = {
    "plan": list(PLANS),
    "zero": [1, 3],
    "mtp": [1, 0],
    "stage": ["pretrain", "sft"],
    "is_recomputed": [False, True],
}
COVER = pairwise(AXES)


def test_the_cover_has_every_pair() -> None:
    for one, other in combinations(AXES, 2):
        for pair in product(AXES[one], AXES[other]):
            assert any((row[one], row[other]) == pair for row in COVER), pair


@pytest.mark.slow
@pytest.mark.parametrize("row", COVER, ids=lambda row: " ".join(map(str, row.values())))
def test_many_ranks_learn_what_one_learns(row: dict[str, Any], compare: Compare) -> None:
    options = {name: value for name, value in row.items() if name not in ("plan", "zero")}
    compare(Case({**PLANS[row["plan"]], "zero": row["zero"]}, **options))


@pytest.mark.slow
def test_moments_in_bfloat16_are_sharded_like_others(alone: Path, tmp_path: Path) -> None:
    """A last bit of a gradient can turn a moment's rounding, which the losses then show."""
    case = Case({"dp_shard": 2, "ep": 2}, changes={"optimizer": {"moments": "bfloat16"}})
    check(run(case, tmp_path), serial(text_of(case.serial), alone), BFLOAT16_MOMENTS)


@pytest.mark.slow
def test_products_in_bfloat16_differ_by_their_rounding(alone: Path, tmp_path: Path) -> None:
    case = Case({"dp_shard": 2, "ep": 2}, changes={"training": {"precision": "bfloat16"}})
    found, expected = run(case, tmp_path), serial(text_of(case.serial), alone)
    for one, other in zip(found.steps, expected.steps, strict=True):
        assert relative(one["loss"], other["loss"]) <= BFLOAT16


@pytest.mark.slow
def test_norms_and_projections_are_computed_again_on_each_rank(compare: Compare) -> None:
    again = {"training": {"activation_checkpointing": "norms"}}
    compare(Case({"dp_shard": 2, "ep": 2, "zero": 3}, changes=again))


@pytest.mark.slow
def test_overlapped_passes_in_a_pipeline_learn_what_one_rank_learns(compare: Compare) -> None:
    plan = {"pp": 2, "ep": 2, "order": "dualpipev"}
    compare(Case(plan, is_recomputed=True, changes={"training": {"micro_batch_size": 1}}))
