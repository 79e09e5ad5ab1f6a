"""`rorqual convert`: any checkpoint into any other form, in bounded memory, resumable."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.exits import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from rorqual.weights.convert.run import Conversion
    from rorqual.weights.convert.verify import Comparison


class ScaleFormat(StrEnum):
    """How FP8 scales are written."""

    FLOAT32 = "float32"
    UE8M0 = "ue8m0"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A checkpoint of any kind, told by content, a run, or 'tiny'."
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A new folder; a new file for gguf.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="bf16, fp8, float32, hf (dtypes stay), shards:N, shards:N:bf16, or gguf:MIX with "
            "MIX one of F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, Q2_K_L, Q2_K_XS.",
        ),
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result back and compare.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads [default: one a core, at most 8].")
    ] = None,
    keep_mtp: Annotated[
        bool | None,
        typer.Option(
            "--keep-mtp/--drop-mtp", help="The MTP layer [default: kept, but not in shards]."
        ),
    ] = None,
    scale_format: Annotated[
        ScaleFormat | None,
        typer.Option(help="FP8 scales, ue8m0 as in V3.1 [default: as they are, else float32]."),
    ] = None,
    max_file_gb: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Size of a file [default: 5 GB in Hugging Face's form, GGUF whole]."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None,
        typer.Option(help="For gguf: llama.cpp's importance of columns, GGUF or imatrix.dat."),
    ] = None,
    is_ema: Annotated[
        bool,
        typer.Option("--ema", help="Of a training run: the average of its parameters (ema.decay)."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
) -> None:
    """Convert a checkpoint: FP8, BF16, float32, the demo's rank shards, GGUF.

    A tensor at a time: memory stays small, whatever the model's size. An interrupted conversion
    goes on when the same command is run again. The source is never changed; configuration,
    tokenizer and other files beside the weights are copied.

    Exits with 2 if --verify finds a value that rounding does not explain, and names its tensor.

    Examples:

      rorqual convert DeepSeek-V3 V3-bf16 --to bf16

      rorqual convert V3-bf16 V3-fp8 --to fp8 --scale-format ue8m0 --verify

      rorqual convert DeepSeek-V3 V3-mp16 --to shards:16

      rorqual convert V3-mp16 V3-again --to hf

      rorqual convert DeepSeek-V3 V3-Q4.gguf --to gguf:Q4_K_M --max-file-gb 50

      rorqual convert runs/mine mine-averaged --to float32 --ema
    """
    from rorqual.log import console
    from rorqual.weights.convert.files import default_workers
    from rorqual.weights.convert.plan import Options, Target
    from rorqual.weights.convert.run import convert as run
    from rorqual.weights.convert.verify import verify as compare
    from rorqual.weights.progress import byte_progress

    options = Options(
        Target.parse(to),
        keep_mtp,
        scale_format.value if scale_format is not None else None,
        None if max_file_gb is None else max_file_gb * 1e9,
        imatrix,
        is_ema,
    )
    try:
        done = run(source, destination, options, workers=workers, progress=byte_progress)
    except KeyboardInterrupt:
        console().print("\nThe same command goes on where this one stopped.")
        raise
    rows: list[Comparison] = []
    if verify:
        rows = compare(
            source,
            done.destination,
            workers=workers or default_workers(),
            progress=byte_progress,
            has_importance=imatrix is not None,
            is_ema=is_ema,
        )
    if as_json:
        typer.echo(json.dumps(_record(done, to, rows if verify else None), indent=2))
    else:
        _print(done, rows)
    faults = [fault for row in rows for fault in row.faults]
    for fault in faults:
        console().print(str(fault), style="bold red", highlight=False, soft_wrap=True)
    if faults:
        raise typer.Exit(EXIT_BAD_INPUT)


def _record(done: Conversion, to: str, rows: list[Comparison] | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "destination": str(done.destination),
        "to": to,
        "files": done.files,
        "bytes": done.num_bytes,
        "bytes_written": done.num_bytes_written,
        "seconds": round(done.seconds, 3),
        "notes": done.notes,
    }
    if rows is not None:
        record["verify"] = [row.as_row() for row in rows]
    return record


def _print(done: Conversion, rows: list[Comparison]) -> None:
    from rich.table import Table

    from rorqual.log import console, output_console

    if rows:
        table = Table(box=None, header_style="bold")
        for index, column in enumerate(
            ("tensors", "from", "to", "count", "elements", "unequal", "relative error", "largest")
        ):
            justify: Any = "left" if index < 3 else "right"
            table.add_column(column, justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(
                row.type,
                row.from_dtype,
                row.to_dtype,
                f"{row.num_tensors:,}",
                f"{row.num_elements:,}",
                f"{row.num_unequal:,}",
                f"{row.relative_error:.2e}",
                f"{row.max_error:.2e}",
                style="" if row.is_within_bound else "bold red",
            )
        output_console().print(table)
    rate = done.num_bytes_written / max(done.seconds, 1e-9)
    files = f"{len(done.files)} file{'s' if len(done.files) > 1 else ''}"
    console().print(
        f"wrote {done.destination}: {files}, {done.num_bytes / 1e9:,.2f} GB "
        f"in {done.seconds:,.1f} s ({rate / 1e6:,.0f} MB/s)",
        highlight=False,
    )
