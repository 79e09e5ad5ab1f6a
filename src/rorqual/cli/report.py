"""`rorqual report`: a training run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rorqual.errors import UsageError

MOST_RUNS = 8


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="A run's folder; several are compared."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Where to write the page. [default: report.html in the run's folder; of several "
            "runs compare.html in the first one's]",
        ),
    ] = None,
) -> None:
    """Show a training run as one HTML page: curves, load of the experts, timeline, events, recipe.

    The page needs no network and no scripts, and opens from a disk. A run that goes on can be
    looked at as well. What the figures mean: docs/runs.md.

    \b
    Examples:
      rorqual report runs/mine
      rorqual report runs/mine --output mine.html
      rorqual report runs/mine runs/wide
    """
    from rorqual.train.plots import has_matplotlib

    if not has_matplotlib():
        raise UsageError(
            "matplotlib is not installed, so there can be no pictures",
            fix="pip install 'rorqual[train]'",
        )
    if len(runs) > MOST_RUNS:
        raise UsageError(
            "too many runs for one picture", found=len(runs), expected=f"at most {MOST_RUNS}"
        )
    from rorqual.report import open_run, write_page

    opened = [open_run(folder) for folder in runs]
    file = output or runs[0] / ("report.html" if len(runs) == 1 else "compare.html")
    write_page(opened, file)
    typer.echo(str(file))
