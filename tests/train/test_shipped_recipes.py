"""recipes/*.toml say what the report says. Oracle: §4.2's numbers and steps counted one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.cli.stages import stages
from rorqual.model import preset
from rorqual.model.flops import count_parameters
from rorqual.train import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TERA = 10**12


def recipe(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.toml", stages())


def steps_until(recipe: Recipe, tokens: int) -> int:
    seen = steps = 0
    while seen < tokens:
        training = recipe.training
        batch = recipe.batch_ramp.at(seen, training.total_tokens, training.micro_batch_size)
        seen, steps = seen + batch * training.sequence_length, steps + 1
    return steps


def test_v3s_pre_training_is_the_reports() -> None:
    v3 = recipe("671b")
    total, length = v3.training.total_tokens, v3.training.sequence_length
    assert (total, length) == (14_800_000_000_000, 4096)
    rates = [v3.lr_schedule.at(t, total) for t in (5 * TERA, 10 * TERA - 1, 14_300_000_000_000)]
    assert rates == pytest.approx([2.2e-4, 2.2e-4, 2.2e-5])
    assert v3.lr_schedule.at(14_632_000_000_000, total) == 2.2e-5
    assert v3.lr_schedule.at(14_634_000_000_000, total) == 7.3e-6
    assert steps_until(v3, int(v3.lr_schedule.warmup)) == pytest.approx(2000, abs=1)
    batches = [v3.batch_ramp.at(t, total, 1) for t in (0, 469_000_000_000, 14 * TERA)]
    assert batches == [3072, 15360, 15360]
    speeds = [v3.balance.speed_at(t, total) for t in (0, 14_299_999_999_999, 14_300_000_000_000)]
    assert speeds == [0.001, 0.001, 0]
    assert v3.balance.sequence_alpha == 1e-4
    weights = [v3.mtp.weight_at(t, total) for t in (0, 10 * TERA - 1, 10 * TERA)]
    assert weights == [0.3, 0.3, 0.1]
    optimizer = v3.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert (optimizer.clip_norm, optimizer.moments) == (1.0, "bfloat16")
    assert v3.model_config().initializer_range == 0.006


def test_v3s_ranks_are_the_reports() -> None:
    """§3.2: 16 stages, experts over 64 ranks of 8 machines, on 2,048."""
    options = recipe("671b").parallel
    assert (options.pp, options.ep, options.zero, options.world) == (16, 64, 1, 2048)
    assert options.ep // options.ranks_per_node == 8


def test_the_shape_is_the_release_without_its_longer_context() -> None:
    """A factor of 1 leaves the angles and the temperature as they are."""
    import torch

    from rorqual.model.rope import inverse_frequencies

    for name in ("671b", "16b"):
        config = recipe(name).model_config()
        plain = config.with_changes(rope_scaling=None)
        found, expected = inverse_frequencies(config), inverse_frequencies(plain)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert config.softmax_scale == plain.softmax_scale
        assert config.rope_scaling is not None
        assert config.rope_scaling.rope_magnitude == 1
    released = preset("671b")
    assert count_parameters(recipe("671b").model_config()) == count_parameters(released)


def test_the_16b_recipe_is_the_reports_small_model() -> None:
    """§4.5.1: 15.7B parameters in all, 1.33T tokens."""
    small = recipe("16b")
    number = count_parameters(small.model_config()).total
    tables = 2 * (129280 - 102400) * 2048  # V3's vocabulary has more rows than V2's
    assert number - tables == pytest.approx(15.7e9, rel=0.01)
    assert small.training.total_tokens == 1_330_000_000_000
    assert steps_until(small, int(small.lr_schedule.warmup)) == pytest.approx(2000, abs=2)
    assert small.parallel.world == 64


@pytest.mark.parametrize("name", ["small", "16b", "671b"])
def test_batches_divide_among_the_ranks(name: str) -> None:
    found = recipe(name)
    total, micro = found.training.total_tokens, found.training.micro_batch_size
    for share in range(0, 11):
        tokens = share * total // 10 // 10
        batch = found.batch_ramp.at(tokens, total, micro)
        assert batch % (found.parallel.num_replicas * micro) == 0


def test_small_learns_from_what_packages_ship() -> None:
    found = recipe("small")
    assert all(source.is_packaged for source in found.data.sources)
    assert found.model == {"preset": "small"}
    assert found.parallel.world == 1
