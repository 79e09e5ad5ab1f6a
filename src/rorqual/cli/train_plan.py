"""The plan of a training run, printed: `rorqual plan --train` and `rorqual train --dry-run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from rorqual.plan.hardware import Hardware
    from rorqual.plan.training import Outline, TrainingPlan
    from rorqual.train import Recipe

GB = 1e9
PARTS = {
    "weights": "weights",
    "whole": "gathered",
    "gradients": "gradients",
    "moments": "moments",
    "activations": "activations",
    "buffers": "buffers",
    "ema": "EMA",
}
DEFAULT_TOKENS = 1_000_000_000_000
MICRO_BATCHES_A_STAGE = 4


def plan_train(target: str, on: Hardware, overrides: Sequence[str], *, as_json: bool) -> None:
    """Prints the plan of a recipe, or of a model that is trained as `--set` says."""
    from rorqual.log import output_console
    from rorqual.plan.training import plan_training
    from rorqual.train.prepare import config_of

    recipe = _recipe(target, overrides)
    planned = plan_training(recipe, config_of(recipe), on)
    if as_json:
        import typer

        typer.echo(json.dumps({"target": target, **planned.as_dict()}, indent=2))
        return
    console = output_console()
    console.print(f"{target}: training on {planned.hardware.label}", highlight=False)
    print_outline(planned.outline, console)
    _print_verdict(planned, console)
    _print_transfers(planned, console)
    _print_hours(planned, console)
    console.print(
        f"{planned.hardware.label}: {planned.hardware.source}",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _recipe(target: str, overrides: Sequence[str]) -> Recipe:
    from rorqual.cli.stages import stages
    from rorqual.train import load_recipe
    from rorqual.train.recipe import recipe_of

    if target.endswith(".toml"):
        return load_recipe(Path(target), stages(), overrides)
    return recipe_of(_table(target, overrides), stages(), target, overrides)


def _table(target: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe for a model: a trillion tokens of texts, the report's rates, one sequence a
    micro-batch, so many of them that a pipeline is full.
    """
    from rorqual.bundled import checkpoint_path
    from rorqual.config import apply_overrides
    from rorqual.model import named_preset, no_such_model
    from rorqual.weights import load_config

    config = named_preset(target)
    table: dict[str, Any] = {"name": "plan", "tokenizer": {"folder": "tokenizer"}}
    if config is not None:
        table["model"] = {"preset": target.rpartition(":")[2]}
    else:
        path = checkpoint_path(target)
        if not path.exists():
            raise no_such_model(target)
        config, table["init_from"] = load_config(path), target
    table["data"] = {"folder": "tokens", "sources": [{"name": "wordnet"}]}
    table["training"] = {
        "total_tokens": DEFAULT_TOKENS,
        "sequence_length": min(4096, config.max_position_embeddings),
        "micro_batch_size": 1,
        "precision": "bfloat16",
    }
    table = apply_overrides(table, overrides)
    if "batch_ramp" not in table:
        table["batch_ramp"] = dict.fromkeys(("start", "end"), _batch(table))
    return table


def _batch(table: dict[str, Any]) -> int:
    """A few micro-batches of each replica for each rank of its pipeline."""
    sizes = {"pp": 1, "ep": 1, "dp_shard": 1, "dp_replicate": 1} | table.get("parallel", {})
    size: Any = table["training"]["micro_batch_size"]
    for name in ("ep", "dp_shard", "dp_replicate"):
        size = size * sizes[name]
    if not isinstance(size, int) or not isinstance(sizes["pp"], int):
        return 1  # what is amiss is named when the recipe is read
    return size * (MICRO_BATCHES_A_STAGE * sizes["pp"] if sizes["pp"] > 1 else 1)


def print_outline(outline: Outline, console: Console) -> None:
    """Who holds what, memory a rank, the first steps."""
    options = outline.recipe.parallel
    console.print(
        f"{options.world:,} rank{'s' if options.world > 1 else ''}: {options.axes}; "
        f"{outline.experts_by_rank:,} routed experts of a layer on each",
        highlight=False,
        soft_wrap=True,
    )
    for stage in outline.stages:
        console.print(
            f"{_range(stage.ranks)}: {'; '.join(stage.layers)}", highlight=False, soft_wrap=True
        )
    memories = [stage.memory for stage in outline.stages]
    used = [name for name in PARTS if any(getattr(memory, name) for memory in memories)]
    table = table_of("GB, rank", *(PARTS[name] for name in used), "in all")
    for stage in outline.stages:
        parts = [getattr(stage.memory, name) for name in used]
        row = (f"{size / GB:,.3f}" for size in (*parts, stage.memory.total))
        table.add_row(_range(stage.ranks).removeprefix("ranks ").removeprefix("rank "), *row)
    console.print(table)
    if most := max(memory.host for memory in memories):
        console.print(
            f"and at most {most / GB:,.3f} GB of the host for the average of the weights",
            highlight=False,
        )
    for waiting in outline.waiting:
        _print_waiting(waiting, options.order, console)
    steps = table_of("step", "tokens", "sequences", "learning rate", "gamma", "lambda")
    for step in outline.first_steps:
        steps.add_row(
            str(step.step),
            f"{step.tokens:,}",
            f"{step.sequences:,}",
            f"{step.lr:.4g}",
            f"{step.bias_update_speed:g}",
            f"{step.mtp_weight:g}",
        )
    console.print(steps)


def _range(ranks: range) -> str:
    first, last = ranks.start, ranks.stop - 1
    return f"rank {first}" if first == last else f"ranks {first}-{last}"


def _print_waiting(waiting: Any, order: str, console: Console) -> None:
    number = f"{waiting.num_micro_batches:,} micro-batches of a replica"
    if waiting.problem is not None:
        console.print(
            f"{number}: {order} cannot run ({waiting.problem})", highlight=False, soft_wrap=True
        )
    elif waiting.bubble_share:
        console.print(
            f"{number}, {order}: a rank waits at most {waiting.bubble_share:.1%} of a step, where "
            "a backward pass takes two forwards",
            highlight=False,
            soft_wrap=True,
        )


def _print_verdict(planned: TrainingPlan, console: Console) -> None:
    usable = planned.hardware.usable_bytes / planned.hardware.num_devices
    total = planned.largest.memory.total
    verdict = "fits" if planned.is_fitting else "does not fit"
    console.print(
        f"{verdict}: {total / GB:,.3f} of {usable / GB:,.3f} GB that can be used of a device",
        highlight=False,
    )
    for suggestion in planned.suggestions:
        console.print(f"  fits with {suggestion}", highlight=False, soft_wrap=True)


def _print_transfers(planned: TrainingPlan, console: Console) -> None:
    if planned.hardware.num_devices == 1:
        return
    table = table_of("A rank sends in a step", "GB", "seconds of its link")
    traffic, hardware = planned.traffic, planned.hardware
    rows = (
        ("to experts of its node, there and back", traffic.experts_within, hardware.link_rate),
        ("to experts of other nodes", traffic.experts_between, hardware.network_rate),
        ("along the pipeline", traffic.pipeline, None),
        ("weights and gradients", traffic.weights, None),
    )
    for name, size, rate in rows:
        table.add_row(name, f"{size / GB:,.3f}", f"{size / rate:,.2f}" if rate else "")
    console.print(table)


def _print_hours(planned: TrainingPlan, console: Console) -> None:
    from rorqual.plan import gpu_hours

    tokens = planned.recipe.training.total_tokens
    num_devices = planned.hardware.num_devices
    console.print(
        f"{tokens:,} tokens take {planned.device_hours:,.1f} hours of one {planned.hardware.name}"
        + (f", {planned.days:,.1f} days of {num_devices:,}" if num_devices > 1 else ""),
        highlight=False,
        soft_wrap=True,
    )
    found, said = gpu_hours.extension_hours(), gpu_hours.EXTENSION_HOURS
    console.print(
        f"at {gpu_hours.fitted_mfu():.1%} of the bfloat16 peak, which is fitted to the report's "
        f"{gpu_hours.REPORTED_HOURS:,.0f} H800 hours of pre-training; of its context extension "
        f"this share foretells {found:,.0f} hours, where the report says {said:,.0f} "
        f"({found / said - 1:+.0%})",
        highlight=False,
        soft_wrap=True,
    )


def refuse_flags(values: Mapping[str, tuple[object, object]]) -> None:
    """UsageError for flags of other plans; `values` are name -> (value, default)."""
    given = [name for name, (value, default) in values.items() if value != default]
    if given:
        raise UsageError(
            f"{', '.join(given)} with --train",
            expected="flags of training: --on, --set, --json",
            fix="leave it out: what a recipe says is changed with --set section.key=value",
        )


def table_of(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", title="", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
