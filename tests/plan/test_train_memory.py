"""Memory of a training run, planned. Oracles: what torch's allocator gives out, by its profiler;
the process's memory in Linux's words; sizes by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from patience import HANG_SECONDS
from rorqual.cli.stages import stages
from rorqual.model import ModelConfig, build
from rorqual.parallel.actions import Action, Kind
from rorqual.plan.activations import Load, Part, count_parts
from rorqual.plan.live import Live
from rorqual.plan.train_memory import (
    RankMemory,
    _Moment,
    _peak,
    layer_sizes,
    memory_by_stage_rank,
)
from rorqual.train import load_recipe
from rorqual.train.optimizer import AdamW
from rorqual.train.recipe import Recipe, recipe_of
from rorqual.train.recompute import recompute
from rorqual.train.step import Stepper, StepValues
from small import SMALL

RECIPES = Path(__file__).parents[2] / "recipes"
WITHIN = 0.1  # of the measured peak
SHAPE = {
    "preset": "tiny",
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


def recipe(**changes: Any) -> Recipe:
    """A small shape, of which activations are most."""
    table: dict[str, Any] = {
        "name": "planned",
        "model": dict(SHAPE),
        "tokenizer": {"folder": "tokenizer"},
        "data": {"folder": "tokens", "sources": [{"path": "text.txt"}]},
        "training": {"total_tokens": 10**6, "sequence_length": 96, "micro_batch_size": 4},
        "batch_ramp": {"start": 8, "end": 8},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        table.setdefault(section, {})[name] = value
    return recipe_of(table, stages())


def planned(recipe: Recipe) -> RankMemory:
    number = recipe.batch_ramp.end // recipe.training.micro_batch_size
    (found,) = memory_by_stage_rank(recipe, recipe.model_config(), number, is_cpu=True)
    return found


def allocated(recipe: Recipe) -> int:
    """The most bytes that torch's allocator had given out within two steps, by its profiler."""
    training, config = recipe.training, recipe.model_config()
    width = training.sequence_length + 1 + config.num_nextn_predict_layers
    tokens_BS = torch.randint(0, config.vocab_size, (recipe.batch_ramp.start, width))
    mask_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True) as profile:
        model = build(config).train()
        optimizer = AdamW(model, recipe.optimizer)
        recompute(model, training.activation_checkpointing)
        stepper = Stepper(
            model,
            optimizer,
            micro_batch_size=training.micro_batch_size,
            precision=training.precision,
        )
        for _ in range(2):
            stepper.step(tokens_BS, mask_BS, StepValues(1e-4, 0.3, 1e-4, 1e-3))
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = [(each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"]
    return max(accumulate(size for _, size in sorted(changes)))


CHANGES: dict[str, dict[str, Any]] = {
    "norms and bfloat16": {
        "training__activation_checkpointing": "norms",
        "training__precision": "bfloat16",
    },
    "one micro-batch": {"batch_ramp__start": 4, "batch_ramp__end": 4},
}
MORE_CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bfloat16": {"training__precision": "bfloat16"},
    "norms": {"training__activation_checkpointing": "norms"},
    "layers": {"training__activation_checkpointing": "layers"},
    "no MTP": {"model__num_nextn_predict_layers": 0},
    "two MTP modules": {"model__num_nextn_predict_layers": 2},
    "rounded moments": {"optimizer__moments": "bfloat16"},
    "a latent of queries": {"model__q_lora_rank": 96},
    "dense": {"model__first_k_dense_replace": 3, "model__num_nextn_predict_layers": 0},
    "an embedding of its own": {"model__tie_word_embeddings": False, "model__vocab_size": 2048},
}


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(changes, id=name) for name, changes in CHANGES.items()),
        *(
            pytest.param(changes, id=name, marks=pytest.mark.slow)
            for name, changes in MORE_CHANGES.items()
        ),
    ],
)
def test_the_plan_is_near_what_torch_allocates(changes: dict[str, Any]) -> None:
    asked = recipe(**changes)
    found = planned(asked)
    assert found.total == pytest.approx(allocated(asked), rel=WITHIN)


def test_weights_gradients_and_moments_by_hand() -> None:
    asked = recipe(optimizer__moments="bfloat16")
    number = sum(p.numel() for p in build(asked.model_config()).parameters())
    found = planned(asked)
    assert (found.weights, found.moments, found.whole) == (4 * number, 4 * number, 0)
    assert found.gradients == 4 * number
    assert planned(recipe()).moments == 8 * number
    assert found.ema == found.host == 0


def test_the_average_of_weights_lies_in_the_hosts_memory() -> None:
    asked = recipe(ema__decay=0.999)
    number = sum(p.numel() for p in build(asked.model_config()).parameters())
    here = planned(asked)
    (beside,) = memory_by_stage_rank(asked, asked.model_config(), 2, is_cpu=False)
    assert (here.ema, here.host) == (4 * number, 0)
    assert (beside.ema, beside.host) == (0, 4 * number)
    assert here.total == planned(recipe()).total + 4 * number
    assert beside.total == sum(vars(beside).values()) - beside.host


def test_each_choice_of_what_is_computed_again_keeps_less() -> None:
    kept = []
    for choice in ("none", "norms", "layers"):
        asked = recipe(training__activation_checkpointing=choice)
        (found,) = memory_by_stage_rank(asked, asked.model_config(), 2, is_cpu=False)
        kept.append(found.activations)
    assert kept[0] > kept[1] > kept[2] > 0
    assert planned(recipe()).activations < kept[0], "the fused operators of a CPU"


def test_layers_keep_the_stream_alone() -> None:
    """B x T x D floats for each layer of a pass that keeps inputs."""
    config: ModelConfig = SMALL
    parts = count_parts(config, Load(2, 40, "float32", "layers", True, config.n_routed_experts))
    assert parts.dense is not None
    assert parts.sparse is not None
    stream = 2 * 40 * config.hidden_size * 4
    assert parts.embedding.kept == pytest.approx(stream, rel=0.05)
    for part in (parts.dense, parts.sparse):
        assert part.kept == pytest.approx(stream, rel=0.1)
    first = layer_sizes(config)[0]
    assert parts.dense.gradients == 4 * first.total


def test_a_rank_of_experts_keeps_the_rows_of_all() -> None:
    """Its own experts are fewer, and as many rows come as on one rank."""
    both = [
        count_parts(SMALL, Load(1, 32, "float32", "none", True, number)).sparse
        for number in (SMALL.n_routed_experts // 2, SMALL.n_routed_experts // 4)
    ]
    assert both[0] is not None
    assert both[1] is not None
    assert both[0].kept == pytest.approx(both[1].kept, rel=0.01)
    expert = 3 * SMALL.hidden_size * SMALL.moe_intermediate_size * 4
    missing = SMALL.n_routed_experts // 2 - SMALL.n_routed_experts // 4
    assert both[0].gradients - both[1].gradients == missing * expert


def test_on_a_gpu_no_scores_are_kept() -> None:
    load = Load(1, 128, "bfloat16", "none", True, SMALL.n_routed_experts)
    longer = Load(1, 256, "bfloat16", "none", True, SMALL.n_routed_experts)
    from dataclasses import replace

    short, long = (count_parts(SMALL, replace(each, is_cpu=False)).dense for each in (load, longer))
    assert short is not None
    assert long is not None
    assert long.kept < 2.01 * short.kept  # of weights that were rounded there are as many


def part(kept: int, forward: int, backward: int, first: int, gradients: int) -> Part:
    return Part(kept, forward, backward, first, gradients)


def test_the_worst_moment_of_an_order_by_hand() -> None:
    """Two units of 10 and 4 kept bytes; the second has a backward pass of 7 for the moment."""
    units = {0: [part(10, 1, 2, 5, 3), part(4, 1, 7, 9, 6)]}

    def order(*words: str) -> list[Any]:
        return [Action(Kind(word[0]), 0, int(word[1:])) for word in words]

    # One micro-batch: gradients are made on the way: 14 + 9, or 10 + 6 + 5.
    assert _peak(units, order("F0", "B0"), 9) == _Moment(14, 0, 9)
    # Two under way at once: 28 kept, gradients whole, 7 for the moment.
    assert _peak(units, order("F0", "F1", "B0", "B1"), 9) == _Moment(28, 9, 7)
    # In turn: one micro-batch is kept.
    assert _peak(units, order("F0", "B0", "F1", "B1"), 9) == _Moment(14, 9, 7)
    # The weights' part comes late, so what it needs is held until then.
    late = order("F0", "I0", "F1", "I1", "W0", "W1")
    assert _peak(units, late, 9) == _Moment(28, 9, 7)


def test_what_is_alive_by_hand() -> None:
    x = torch.zeros(100)
    with Live() as live:
        y = x + 1
        view = y[10:]
        z = y * view.sum()
        assert live.now == 2 * 400 + 4 * (live.now % 400 > 0)
        most = live.most
        del z
        live.restart()
        assert live.most < most
        del y
        assert live.now >= 400, "a view holds it"
        x.add_(1)
        x.view(10, 10)
        before = live.now
        del view
        assert live.now == before - 400


def measured(name: str, *words: str) -> tuple[int, int]:
    """(what all was imported, the most above it) in a process of its own."""
    script = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), str(RECIPES / name), "2", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=HANG_SECONDS * 20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["before"], found["peak"] - found["before"]


MICRO = "training.micro_batch_size=1"  # 15 GB


@pytest.mark.slow  # tiny: seconds; small: 15 GB and some minutes of a processor
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny.toml", ["training.compile=false"]),
        ("small.toml", ["batch_ramp.start=2", "batch_ramp.end=2", MICRO]),
    ],
)
def test_the_recipes_take_what_is_planned(name: str, words: list[str]) -> None:
    recipe = load_recipe(RECIPES / name, stages(), words)
    _, peak = measured(name, *words)
    assert planned(recipe).total == pytest.approx(peak, rel=WITHIN)
