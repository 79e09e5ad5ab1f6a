"""`rorqual cache`: packed weights that are kept for the next start: list, check, remove them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.exits import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from rorqual.weights.packed_cache import Kept

app = typer.Typer(
    no_args_is_help=True,
    help="Packed weights that are kept for the next start: list, check, remove them.\n\n"
    "They lie in $RORQUAL_CACHE, else in the user's cache folder, and are made again where needed.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Model = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Only those of this model [default: all].")
]


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """List what is kept: model, form, size, and whether it still fits."""
    rows = [_row(kept) for kept in _kept(None)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    from rorqual.log import output_console
    from rorqual.weights.packed_cache import folder

    console = output_console()
    table = Table(box=None, pad_edge=False)
    for name in ("model", "form", "made", "GB", "state"):  # of a path no part is left out
        table.add_column(name, overflow="fold", no_wrap=name in ("form", "made", "GB"))
    for row in rows:
        gigabytes = f"{row['bytes'] / 1e9:,.2f}"
        table.add_row(row["model"], row["form"], row["made"], gigabytes, row["state"])
    if rows:
        console.print(table)
    total = sum(row["bytes"] for row in rows)
    console.print(f"{total / 1e9:,.2f} GB in {folder()}", highlight=False, soft_wrap=True)


@app.command("clear")
def clear_command(model: Model = None) -> None:
    """Remove what is kept, of one model or of all.

    A program that runs a model meanwhile goes on. Exits with 2 if something cannot be removed.
    """
    from rorqual.files import explained

    freed = num = 0
    refused = []
    for kept in _kept(model):
        if kept.is_busy:
            continue
        try:
            kept.path.unlink(missing_ok=True)
        except OSError as problem:
            refused.append(explained(problem, where=kept.path))
        else:
            num, freed = num + 1, freed + kept.num_bytes
    typer.echo(f"{num} removed, {freed / 1e9:,.2f} GB freed")
    for refusal in refused:
        typer.echo(f"not removed: {refusal}", err=True)
    if refused:
        raise typer.Exit(EXIT_BAD_INPUT)


@app.command("verify")
def verify_command(model: Model = None) -> None:
    """Compare what is kept with its checksums.

    Exits with 2 if something is damaged or does not fit its model any more.
    """
    from rorqual.weights.packed_file import broken
    from rorqual.weights.progress import byte_progress

    is_good = True
    for kept in _kept(model):
        if kept.is_busy:
            continue
        problem = kept.problem
        if kept.header and not problem:
            with (
                byte_progress(f"reading {kept.path.name}", kept.num_bytes) as advance,
                kept.path.open("rb") as file,
            ):
                if damaged := broken(file, kept.header, advance):
                    problem = f"damaged: {', '.join(damaged[:3])}"
        typer.echo(f"{kept.path}: {problem or 'whole'}")
        is_good = is_good and problem is None
    if not is_good:
        typer.echo("`rorqual cache clear` removes them; they are made again at the next start")
        raise typer.Exit(EXIT_BAD_INPUT)


def _kept(model: str | None) -> list[Kept]:
    """What is kept of a model, or all; UsageError for a model of which nothing is kept."""
    from pathlib import Path

    from rorqual.bundled import checkpoint_path
    from rorqual.errors import UsageError, listing
    from rorqual.weights.packed_cache import kept_files

    found = kept_files()
    if model is None:
        return found
    path = str(checkpoint_path(model).resolve())
    wanted = [
        k for k in found if k.model is not None and path in (k.model, str(Path(k.model).parent))
    ]
    if not wanted:
        models = dict.fromkeys(kept.model for kept in found if kept.model is not None)
        raise UsageError(
            f"nothing is kept of {model}",
            found=listing(list(models)) or "nothing of any model",
            fix="`rorqual cache list` shows what there is",
        )
    return wanted


def _row(kept: Kept) -> dict[str, Any]:
    import time

    made = kept.header.get("made")
    day = "" if made is None else time.strftime("%Y-%m-%d", time.localtime(made))
    return {
        "model": kept.model or kept.path.name,
        "form": kept.header["form"][0] if kept.header else "",
        "made": day,
        "bytes": kept.num_bytes,
        "state": kept.problem or "fits",
        "file": str(kept.path),
    }
