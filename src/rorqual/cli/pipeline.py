"""`rorqual pipeline`: in which order the ranks of a pipeline work, simulated and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rorqual.parallel import TimedPipeline


def pipeline(
    order: Annotated[
        str | None,
        typer.Argument(
            metavar="ORDER",
            help="1f1b, interleaved, zb1p, zbv, dualpipev or dualpipe [default: compare all].",
        ),
    ] = None,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Ranks of the pipeline.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 16,
    chunks: Annotated[
        int | None, typer.Option(help="Stages a rank, of interleaved alone [default: 2].")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="K=V",
            help="How long a micro-batch takes in 1/PP of the layers: forward (1), backward (2), "
            "backward_weight (1, its part for the weights), overlapped (their sum), send (0).",
        ),
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the order's timeline.")
    ] = None,
    is_text: Annotated[bool, typer.Option("--text", help="Print the order's timeline.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Pipeline: what each rank runs when, how long it waits, what it must hold.

    Orders are simulated from durations that you give; nothing is trained or measured. The report's
    Table 2 stands beside the result (docs/parallel.md).

    Examples:

      rorqual pipeline --pp 8 --micro-batches 32

      rorqual pipeline dualpipev --micro-batches 12 --timeline dualpipev.png

      rorqual pipeline zb1p --text --set forward=1.5 --set send=0.1
    """
    from rorqual.config import apply_overrides, fill
    from rorqual.parallel import PIPELINE_ORDERS, Durations, simulate_pipeline

    durations = fill(Durations, apply_overrides({}, overrides or []), "--set")
    if order is None and (timeline or is_text or chunks is not None):
        raise UsageError(
            "--timeline, --text and --chunks are for one order",
            found="no order",
            expected=f"one of {', '.join(PIPELINE_ORDERS)}",
        )
    if order is not None:
        one = simulate_pipeline(order, pp, micro_batches, durations, chunks)
        _show(one, micro_batches, timeline, is_text, as_json)
        return
    done, refused = [], {}
    for name in PIPELINE_ORDERS:
        try:
            done.append(simulate_pipeline(name, pp, micro_batches, durations))
        except UsageError as problem:
            refused[name] = problem
    if not done:
        raise next(iter(refused.values()))
    _compare(done, refused, as_json)


def _show(
    one: TimedPipeline,
    micro_batches: int,
    file: Path | None,
    is_text: bool,
    as_json: bool,
) -> None:
    """One order: figures by rank, and its timeline in the forms that were asked for."""
    from rorqual.cli.options import require_matplotlib
    from rorqual.log import output_console
    from rorqual.parallel.timeline import LEGEND, as_text, write_png

    num_ranks = len(one.timeline.ranks)
    if file is not None:
        require_matplotlib("--timeline")
        write_png(
            one.timeline, file, f"{one.name}, {num_ranks} ranks, {micro_batches} micro-batches"
        )
    if as_json:
        typer.echo(json.dumps(one.with_intervals(), indent=2))
        return
    if is_text:
        typer.echo(f"{as_text(one.timeline)}\n{LEGEND}\n")
    console = output_console()
    table = _table("rank", "stages", "activations of a stage", "bubble")
    rows = zip(one.timeline.stages, one.timeline.activations, one.timeline.bubbles, strict=True)
    for rank, (stages, activations, bubble) in enumerate(rows):
        table.add_row(str(rank), str(stages), str(activations), f"{bubble:g}")
    console.print(table)
    console.print(
        f"a step takes {one.timeline.end:g}, {one.bubble_share:.1%} of it bubble", highlight=False
    )
    if (reported := one.table_2) is not None:
        verdict = "holds here" if reported.is_met else "does not hold here"
        console.print(
            f"the report's Table 2: {reported.formula} = {reported.bubble:g}, where "
            f"{reported.assumption}, which {verdict}",
            highlight=False,
            soft_wrap=True,
        )
    if file is not None:
        typer.echo(f"timeline: {file}")


def _compare(done: list[TimedPipeline], refused: dict[str, UsageError], as_json: bool) -> None:
    from rorqual.log import output_console

    if as_json:
        orders = [one.as_dict() for one in done]
        reasons = {name: problem.what for name, problem in refused.items()}
        typer.echo(json.dumps({"orders": orders, "refused": reasons}, indent=2))
        return
    console = output_console()
    table = _table("order", "step", "bubble", "of the step", "parameters", "activations", "Table 2")
    for one in done:
        reported = one.table_2
        says = "" if reported is None else f"{reported.bubble:g}{'' if reported.is_met else ' *'}"
        table.add_row(
            one.name,
            f"{one.timeline.end:g}",
            f"{one.bubble:g}",
            f"{one.bubble_share:.1%}",
            f"{one.parameters:g}x",
            f"{one.activations:g}",
            says,
        )
    console.print(table)
    console.print(
        "each of the rank that has most; parameters and activations: 1 is 1/PP of the layers, and "
        "one micro-batch in them",
        highlight=False,
        soft_wrap=True,
    )
    if any(one.table_2 is not None and not one.table_2.is_met for one in done):
        console.print("* its assumption does not hold here: `rorqual pipeline ORDER` says which")
    for name, problem in refused.items():
        console.print(
            f"{name}: {problem.what} ({problem.found}; {problem.expected})",
            highlight=False,
            soft_wrap=True,
        )


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
