"""`rorqual plan`: memory, speed and disk of a model on a machine, before anything is loaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.train_plan import plan_train, refuse_flags, table_of
from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rorqual.model import ModelConfig
    from rorqual.plan import InferencePlan

# What a preset was published as; what is not listed runs in bfloat16.
PUBLISHED = {"671b": "fp8"}
STORED = {"F8_E4M3": "fp8", "F32": "float32"}


def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|DIR|FILE|tiny",
            help="A preset, or a checkpoint; with --train also a recipe.",
        ),
    ],
    on: Annotated[
        str, typer.Option("--on", help="Hardware, such as 8xH200, a FILE.toml of yours, or here.")
    ] = "here",
    weights: Annotated[
        str | None,
        typer.Option(help="float32, bf16, fp8, or a GGUF mix [default: as published or stored]."),
    ] = None,
    kv: Annotated[
        str,
        typer.Option(help="The cache: auto (as weights run), float32, bf16, fp8, q8, q8_0, q4_0."),
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens a stream [default: 4096, or the model's].")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 1,
    engine: Annotated[
        str | None,
        typer.Option(
            help="rorqual (ours: one device), or any, which divides a model among devices and runs "
            "what is stored [default: rorqual on one device, any on several]."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="How weights run in ours: auto, float32, bfloat16, stored, native, int8."
        ),
    ] = "auto",
    speculate: Annotated[int, typer.Option(min=0, help="Drafts a step by the MTP layer.")] = 0,
    disk_rate: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S",
            help="How fast the disk reads, for what does not fit [default: 7, or the file's].",
        ),
    ] = None,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="With --on here: measure this machine again.")
    ] = False,
    is_training: Annotated[
        bool,
        typer.Option(
            "--train",
            help="Plan a training run: of a RECIPE.toml, or of the model with --set; --on names "
            "the device of each rank.",
        ),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --train: change one value, as in --set parallel.ep=8."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Plan: does a model fit, how fast can it be, how large are its files; or a training run.

    Tokens a second are upper limits from bandwidth, FLOPs and links. Figures of data sheets, of a
    file of yours (docs/plan.md), or of this machine, which is measured once.

    Examples:

      rorqual plan 671b --on 8xH200 --context 32768 --batch 16

      rorqual plan 671b --on 8xH100

      rorqual plan DIR --dtype stored --kv q8 --speculate 1

      rorqual plan 671b --on RTX4090 --engine any --weights Q2_K_L --disk-rate 12

      rorqual plan recipes/671b.toml --train --on H800
    """
    from dataclasses import replace

    from rorqual.plan import find_hardware, plan_inference

    if is_training:
        flags = {
            "--weights": (weights, None),
            "--kv": (kv, "auto"),
            "--context": (context, None),
            "--batch": (batch, 1),
            "--engine": (engine, None),
            "--dtype": (dtype, "auto"),
            "--speculate": (speculate, 0),
            "--disk-rate": (disk_rate, None),
        }
        refuse_flags(flags)
        hardware = find_hardware(on, remeasure=remeasure)
        plan_train(target, hardware, overrides or [], as_json=as_json)
        return
    if overrides:
        raise UsageError("--set is for --train", found=f"--set {overrides[0]}")
    config, found = _describe(target)
    hardware = find_hardware(on, remeasure=remeasure)
    if disk_rate is not None:
        if not 0 < disk_rate < float("inf"):
            raise UsageError("--disk-rate is no rate", found=disk_rate, expected="GB/s above 0")
        hardware = replace(hardware, disk_rate=disk_rate * 1e9)
    is_one = hardware.num_devices == 1
    planned = plan_inference(
        config,
        hardware,
        engine=engine or ("rorqual" if is_one and hardware.runs_ours else "any"),
        dtype=dtype,
        num_drafts=speculate,
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
    from rich.text import Text

    from rorqual.log import output_console, printable
    from rorqual.plan.wish import cache_bytes_by_format

    console, wish = output_console(), planned.wish
    console.print(
        Text.assemble(
            (printable(target), "bold"),
            f": weights {wish.weights}, cache {wish.cache_format}, {wish.batch} x "
            f"{wish.context:,} tokens on {printable(planned.hardware.label)}",
        )
    )
    console.print(_engine(planned), highlight=False, soft_wrap=True)
    if planned.remark:
        console.print(f"note: {planned.remark}", highlight=False, soft_wrap=True)
    memory = table_of("Memory", "bytes", "GB")
    for name, value in planned.memory.as_dict().items():
        memory.add_row(name, f"{value:,.0f}", f"{value / 1e9:,.3f}")
    usable = planned.hardware.usable_bytes
    memory.add_row("usable", f"{usable:,.0f}", f"{usable / 1e9:,.3f}")
    console.print(memory)
    sizes = cache_bytes_by_format(wish)
    cache = ", ".join(f"{name} {size:,.0f}" for name, size in sizes.items())
    console.print(f"a token of context takes, by --kv: {cache} bytes", highlight=False)
    verdict = ("fits", "bold green") if planned.is_fitting else ("does not fit", "bold red")
    console.print(Text.assemble(verdict, f"; longest context that fits: {planned.max_context:,}"))
    for suggestion in planned.suggestions:
        console.print(f"  fits with {suggestion}", highlight=False, soft_wrap=True)
    if not planned.is_fitting and not planned.suggestions:
        console.print("  no change makes it fit here: take a smaller model, or other hardware")
        if wish.is_ours and planned.memory.weights > usable:
            console.print(
                "  --engine any: how fast an engine is that leaves what does not fit on the disk",
                highlight=False,
                soft_wrap=True,
            )
    _print_speed(planned, console)
    console.print(_disk(planned))
    console.print(
        f"{planned.hardware.label}: {planned.hardware.source}",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _print_speed(planned: InferencePlan, console: Any) -> None:
    """Of what fits, or of an engine that leaves the rest on the disk; else nothing."""
    from rorqual.plan.speed import ACCEPTANCE
    from rorqual.plan.transfers import WORD

    wish, hardware = planned.wish, planned.hardware
    speed = planned.speed or planned.offloaded
    if speed is None:
        return
    if planned.offloaded:
        console.print(
            "with the rest of the weights left on the disk, by an engine that maps its files (as "
            "llama.cpp does GGUF's): "
            f"{speed.disk_bytes_per_step / wish.batch / 1e9:,.2f} GB read a token at least, from a "
            f"disk of {hardware.disk_rate / 1e9:g} GB/s (--disk-rate)",
            highlight=False,
            soft_wrap=True,
        )
    limits = table_of(
        "At most" if planned.speed else "At most, from the disk", "tokens/s", "limited by"
    )
    rate = f"{speed.prefill_tokens_per_second:,.1f}"
    limits.add_row("prefill", rate, speed.prefill_bound)
    drafts = f", {wish.num_drafts} drafts, {ACCEPTANCE:.0%} accepted" if wish.num_drafts else ""
    limits.add_row(
        f"decode, {wish.batch} stream{'s' if wish.batch > 1 else ''}{drafts}",
        f"{speed.decode_tokens_per_second:,.2f}",
        speed.decode_bound,
    )
    if wish.batch > 1:
        rate = f"{speed.decode_tokens_per_second_per_stream:,.2f}"
        limits.add_row("decode, each", rate, speed.decode_bound)
    console.print(limits)
    if speed.sent_bytes_per_step is None:
        console.print(WORD, highlight=False, soft_wrap=True)
    elif hardware.num_devices > 1:
        megabytes = speed.sent_bytes_per_step / 1e6
        console.print(
            f"each device sends {megabytes:,.2f} MB a decode step to others, counted beside the "
            "work; the links' latency is not counted",
            highlight=False,
            soft_wrap=True,
        )


def _disk(planned: InferencePlan) -> Any:
    has_mtp = planned.wish.config.num_nextn_predict_layers > 0
    columns = ["bytes", "GB", "GiB", *(["GiB without MTP"] if has_mtp else [])]
    disk = table_of("On disk, with the MTP layer" if has_mtp else "On disk", *columns)
    rows = planned.as_dict()["disk"]
    digits = 1 if max(row["bytes"] for row in rows) >= 1e10 else 3
    for row in rows:
        without = f"{row['bytes_without_mtp'] / 2**30:,.{digits}f}"
        cells = [f"{row['bytes']:,}", *(f"{row[unit]:,.{digits}f}" for unit in ("GB", "GiB"))]
        disk.add_row(row["format"], *cells, *([without] if has_mtp else []))
    return disk


def _engine(planned: InferencePlan) -> str:
    """For which engine this is, and what that means for the weights."""
    from rorqual.plan.sizes import Runs

    wish, is_cpu = planned.wish, planned.hardware.is_cpu
    mtp = "with its MTP layer" if wish.has_mtp else "without its MTP layer"
    part = f", {mtp}" if wish.config.num_nextn_predict_layers else ""
    if not wish.is_ours:
        return f"for an engine that runs weights as they are stored{part}"
    runs = f"as {wish.runs_as} (--dtype {wish.dtype})"
    if wish.dtype == "stored":
        runs = "as they are stored (--dtype stored)"
    elif isinstance(wish.runs_as, Runs):
        runs = f"as --dtype {wish.runs_as.form} makes them of {wish.runs_as.format}"
    kept = "; up to 2 GB more that oneDNN keeps" if wish.itemsize == 2 and is_cpu else ""
    return f"for rorqual: weights run {runs}{part}; one device{kept}"
