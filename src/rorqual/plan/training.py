"""The plan for training: who holds what, memory by rank, waiting, transfers, hours; nothing is
loaded, and no rank is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from rorqual.errors import RorqualError, UsageError
from rorqual.model import ModelConfig
from rorqual.parallel.pipeline import TimedPipeline, simulate_pipeline
from rorqual.parallel.simulator import Durations
from rorqual.plan import gpu_hours
from rorqual.plan.hardware import GB, Hardware
from rorqual.plan.train_memory import RankMemory, memory_by_stage_rank, shares_of
from rorqual.plan.train_traffic import Traffic, traffic_of
from rorqual.train.recipe import Recipe

NUM_FIRST_STEPS = 3
# What takes less memory, the least costly first.
CHANGES = (
    ("optimizer.moments", "bfloat16"),
    ("training.activation_checkpointing", "norms"),
    ("training.activation_checkpointing", "layers"),
    ("training.micro_batch_size", 1),
    ("parallel.zero", 3),
)
# A micro-batch's backward pass takes twice as long as its forward, half of that for the weights.
DURATIONS = Durations(forward=1, backward=2, backward_weight=1)


@dataclass(frozen=True)
class StepAhead:
    """What the recipe says for one step."""

    step: int
    tokens: int  # seen after it
    sequences: int
    lr: float
    bias_update_speed: float
    mtp_weight: float

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class StageRank:
    """One of the pipeline's ranks, and those beside it."""

    ranks: range
    layers: list[str]  # of each of its stages
    memory: RankMemory

    def as_dict(self) -> dict[str, Any]:
        return {
            "ranks": [self.ranks.start, self.ranks.stop - 1],
            "stages": self.layers,
            "memory_bytes": self.memory.as_dict(),
        }


@dataclass(frozen=True)
class Waiting:
    """The pipeline at a number of micro-batches: its bubble, or why its order cannot run."""

    num_micro_batches: int
    bubble_share: float | None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Outline:
    """What needs no hardware to be said."""

    recipe: Recipe
    config: ModelConfig
    stages: list[StageRank]
    experts_by_rank: int
    waiting: list[Waiting]  # at the beginning and at the end of the batch's ramp
    first_steps: list[StepAhead]

    def as_dict(self) -> dict[str, Any]:
        options = self.recipe.parallel
        axes = ("pp", "ep", "dp_shard", "dp_replicate", "zero", "order")
        return {
            "ranks": options.world,
            "parallel": {name: getattr(options, name) for name in axes},
            "experts_by_rank": self.experts_by_rank,
            "stages": [stage.as_dict() for stage in self.stages],
            "pipeline": [waiting.as_dict() for waiting in self.waiting],
            "first_steps": [step.as_dict() for step in self.first_steps],
        }


@dataclass(frozen=True)
class TrainingPlan:
    """`hardware` has a device a rank; `traffic` is that of a step at the end of the ramp."""

    outline: Outline
    hardware: Hardware
    traffic: Traffic
    device_hours: float
    suggestions: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        return self.outline.recipe

    @property
    def is_fitting(self) -> bool:
        return fits(self.outline, self.hardware)

    @property
    def largest(self) -> StageRank:
        return max(self.outline.stages, key=lambda stage: stage.memory.total)

    @property
    def days(self) -> float:
        return self.device_hours / self.hardware.num_devices / 24

    def as_dict(self) -> dict[str, Any]:
        device = self.hardware.times(1)
        return {
            **self.outline.as_dict(),
            "hardware": {
                "name": self.hardware.label,
                "memory_bytes": device.memory_bytes,
                "usable_bytes": device.usable_bytes,
                "source": str(device.source),
                "is_data_sheet": device.source.is_data_sheet,
            },
            "fits": self.is_fitting,
            "suggestions": self.suggestions,
            "sent_bytes_per_step": self.traffic.as_dict(),
            "total_tokens": self.recipe.training.total_tokens,
            "device_hours": self.device_hours,
            "days": self.days,
            "mfu": gpu_hours.fitted_mfu(),
            "extension_hours": gpu_hours.extension_hours(),
            "extension_hours_reported": gpu_hours.EXTENSION_HOURS,
        }


def fits(outline: Outline, hardware: Hardware) -> bool:
    usable = hardware.usable_bytes / hardware.num_devices
    return all(stage.memory.total <= usable for stage in outline.stages)


def outline_of(recipe: Recipe, config: ModelConfig, *, is_cpu: bool) -> Outline:
    """ConfigError or UsageError where the model cannot be divided as [parallel] says."""
    options = recipe.parallel
    options.check_model(config)
    waiting = [_waiting(recipe, size) for size in (recipe.batch_ramp.start, recipe.batch_ramp.end)]
    memory = memory_by_stage_rank(recipe, config, waiting[-1].num_micro_batches, is_cpu=is_cpu)
    beside = options.num_replicas
    stages = [
        StageRank(
            range(rank * beside, (rank + 1) * beside), _stage_names(recipe, config, rank), each
        )
        for rank, each in enumerate(memory)
    ]
    return Outline(
        recipe,
        config,
        stages,
        config.n_routed_experts // options.ep,
        list(dict.fromkeys(waiting)),
        first_steps(recipe),
    )


def plan_training(recipe: Recipe, config: ModelConfig, hardware: Hardware) -> TrainingPlan:
    """`hardware`: one device, which each rank has, or as many as there are ranks."""
    options, training = recipe.parallel, recipe.training
    if hardware.num_devices not in (1, options.world):
        raise UsageError(
            "the recipe wants another number of devices",
            found=hardware.label,
            expected=f"{options.world}: [parallel] {options.axes}",
            fix=f"--on {hardware.times(options.world).flag}, or change [parallel] with --set",
        )
    hardware = hardware.times(options.world)
    outline = outline_of(recipe, config, is_cpu=hardware.is_cpu)
    return TrainingPlan(
        outline,
        hardware,
        traffic=traffic_of(
            options,
            config,
            num_sequences=recipe.batch_ramp.end // options.num_replicas,
            num_inputs=training.sequence_length,
            num_micro_batches=outline.waiting[-1].num_micro_batches,
            ranks_per_node=min(options.world, hardware.node_devices),
        ),
        device_hours=gpu_hours.device_hours(
            config, training.total_tokens, training.sequence_length, hardware
        ),
        suggestions=[] if fits(outline, hardware) else list(_suggestions(outline, hardware)),
    )


def _suggestions(outline: Outline, hardware: Hardware) -> Iterator[str]:
    """Single changes of [training] or [optimizer] with which each rank's part fits."""
    recipe = outline.recipe
    for key, value in CHANGES:
        section, name = key.split(".")
        part = getattr(recipe, section)
        if getattr(part, name) == value:
            continue
        try:
            changed = replace(recipe, **{section: replace(part, **{name: value})})
            other = outline_of(changed, outline.config, is_cpu=hardware.is_cpu)
        except (RorqualError, ValueError):
            continue  # not with the rest of this recipe
        if fits(other, hardware):
            most = max(stage.memory.total for stage in other.stages)
            yield f"--set {key}={value} ({most / GB:,.1f} GB)"


def first_steps(recipe: Recipe, number: int = NUM_FIRST_STEPS) -> list[StepAhead]:
    """As the loop would take them (`train.loop`)."""
    return list(islice(_steps(recipe), number))


def _steps(recipe: Recipe) -> Iterator[StepAhead]:
    training, total, tokens, step = recipe.training, recipe.training.total_tokens, 0, 0
    while tokens < total:
        sequences = recipe.batch_ramp.at(tokens, total, training.micro_batch_size)
        before, step = tokens, step + 1
        tokens += sequences * training.sequence_length
        yield StepAhead(
            step,
            tokens,
            sequences,
            recipe.lr_schedule.at(tokens, total),
            recipe.balance.speed_at(before, total),
            recipe.mtp.weight_at(before, total),
        )


def _waiting(recipe: Recipe, num_sequences: int) -> Waiting:
    options = recipe.parallel
    num_micro_batches = num_sequences // options.num_replicas // recipe.training.micro_batch_size
    if options.pp == 1:
        return Waiting(num_micro_batches, 0.0)
    try:
        found = simulate(options.order, options.pp, num_micro_batches, options.chunks)
    except UsageError as problem:
        return Waiting(num_micro_batches, None, f"{problem.what}: {problem.expected}")
    return Waiting(num_micro_batches, found.bubble_share)


@lru_cache(maxsize=16)
def simulate(
    order: str, num_ranks: int, num_micro_batches: int, num_chunks: int | None = None
) -> TimedPipeline:
    return simulate_pipeline(order, num_ranks, num_micro_batches, DURATIONS, num_chunks)


def _stage_names(recipe: Recipe, config: ModelConfig, rank: int) -> list[str]:
    """What each stage of a rank holds, in words."""
    names = []
    for share in shares_of(recipe.parallel, config, rank, recipe.training.sequence_length):
        held = ["embedding"] if share.is_first else []
        if len(share.layers) > 0:
            first, last = share.layers[0], share.layers[-1]
            held.append(f"layers {first} to {last}" if last > first else f"layer {first}")
        if share.is_last:
            held.append("head")
            depth = config.num_nextn_predict_layers
            held += [f"{depth} MTP"] if depth else []
        names.append(", ".join(held))
    return names
