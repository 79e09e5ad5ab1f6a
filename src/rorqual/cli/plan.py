"""`rorqual plan`: memory, speed and disk of a model on a machine, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rorqual.model import ModelConfig
    from rorqual.plan import InferencePlan

# What a preset was published as; what is not listed runs in bfloat16.
PUBLISHED = {"671b": "fp8"}
STORED = {"F8_E4M3": "fp8", "F32": "float32"}


def plan(
    target: Annotated[
        str, typer.Argument(metavar="PRESET|DIR|FILE|tiny", help="A preset, or a checkpoint.")
    ],
    on: Annotated[str, typer.Option("--on", help="Hardware, such as 8xH200, or here.")] = "here",
    weights: Annotated[
        str | None,
        typer.Option(help="float32, bf16, fp8, or a GGUF mix [default: as published or stored]."),
    ] = None,
    kv: Annotated[
        str, typer.Option(help="The cache: float32, bf16, fp8, q8, q8_0, q4_0.")
    ] = "bf16",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens a stream [default: 4096, or the model's].")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 1,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="With --on here: measure this machine again.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Plan: does a model fit, how fast can it be, how large are its files.

    Tokens a second are upper limits from bandwidth and FLOPs. Figures of data sheets, or of this
    machine, which is measured once.

    Examples:

      rorqual plan 671b --on 8xH200 --context 32768 --batch 16

      rorqual plan 671b --on 8xH100

      rorqual plan DIR --weights Q4_K_M --kv q8
    """
    from rorqual.plan import find_hardware, plan_inference

    config, found = _describe(target)
    planned = plan_inference(
        config,
        find_hardware(on, remeasure=remeasure),
        weights=weights or found,
        kv=kv,
        context=context,
        batch=batch,
    )
    if as_json:
        typer.echo(json.dumps({"target": target, **planned.as_dict()}, indent=2))
    else:
        _print(target, planned)


def _describe(target: str) -> tuple[ModelConfig, str]:
    """The shape, and the format that it is published or stored in."""
    from rorqual.bundled import checkpoint_path
    from rorqual.model import named_preset, no_such_model
    from rorqual.plan.sizes import nearest_mix
    from rorqual.weights.open import open_source

    shape = named_preset(target)
    if shape is not None:
        return shape, PUBLISHED.get(target.rpartition(":")[2], "bf16")
    path = checkpoint_path(target)
    if not path.exists():
        raise no_such_model(target)
    with open_source(path) as source:
        if not source.is_verbatim:
            return source.config, nearest_mix(source.config, source.num_bytes())
        dtypes = {entry.dtype for entry in source.entries.values() if len(entry.shape) > 1}
        names = [STORED[dtype] for dtype in STORED if dtype in dtypes]
        is_mixed = "BF16" in dtypes and names[:1] != ["fp8"]
        return source.config, "bf16" if is_mixed or not names else names[0]


def _print(target: str, planned: InferencePlan) -> None:
    from rorqual.log import output_console

    console, wish, speed = output_console(), planned.wish, planned.speed
    console.print(
        f"[bold]{target}[/]: weights {wish.weights}, cache {wish.kv}, {wish.batch} x "
        f"{wish.context:,} tokens on {planned.hardware.label}",
        highlight=False,
    )
    memory = _table("Memory", "bytes", "GB")
    for name, value in planned.memory.as_dict().items():
        memory.add_row(name, f"{value:,.0f}", f"{value / 1e9:,.3f}")
    usable = planned.hardware.usable_bytes
    memory.add_row("usable", f"{usable:,.0f}", f"{usable / 1e9:,.3f}")
    console.print(memory)
    verdict = "[bold green]fits[/]" if planned.is_fitting else "[bold red]does not fit[/]"
    console.print(f"{verdict}; longest context that fits: {planned.max_context:,}", highlight=False)
    for suggestion in planned.suggestions:
        console.print(f"  fits with {suggestion}", highlight=False)
    if not planned.is_fitting and not planned.suggestions:
        console.print("  no change makes it fit here: take a smaller model, or other hardware")
    limits = _table("At most", "tokens/s", "limited by")
    rate = f"{speed.prefill_tokens_per_second:,.1f}"
    limits.add_row("prefill", rate, speed.prefill_bound)
    limits.add_row(
        f"decode, {wish.batch} stream{'s' if wish.batch > 1 else ''}",
        f"{speed.decode_tokens_per_second:,.1f}",
        speed.decode_bound,
    )
    if wish.batch > 1:
        rate = f"{speed.decode_tokens_per_second_per_stream:,.1f}"
        limits.add_row("decode, each", rate, speed.decode_bound)
    console.print(limits)
    has_mtp = wish.config.num_nextn_predict_layers > 0
    columns = ["bytes", "GB", "GiB", *(["GiB without MTP"] if has_mtp else [])]
    disk = _table("On disk, with the MTP layer" if has_mtp else "On disk", *columns)
    for row in planned.as_dict()["disk"]:
        cells = [f"{row['bytes']:,}", f"{row['GB']:,.1f}", f"{row['GiB']:,.1f}"]
        without = f"{row['bytes_without_mtp'] / 2**30:,.1f}"
        disk.add_row(row["format"], *cells, *([without] if has_mtp else []))
    console.print(disk)
    console.print(f"[dim]{planned.hardware.label}: {planned.hardware.source}[/]", highlight=False)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", title="", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
