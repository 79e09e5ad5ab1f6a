"""What `rorqual bench` prints: the report that --json gives, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from rorqual.bench.figures import BYTES, PERCENT, RATE
from rorqual.log import output_console, printable
from rorqual.ops.ceilings import NUM_ROUNDS

if TYPE_CHECKING:
    from rich.console import Console

    from rorqual.bench.report import Report, Row

GEMM_COLUMNS = ("most GFLOP/s", "at", "least", "at")


def print_report(report: Report) -> None:
    console = output_console()
    about = report.about
    console.print(Text(about.get("model") or "this machine", "bold"), soft_wrap=True)
    console.print(Text(about["machine"]), soft_wrap=True)
    if report.reads:
        _print_ceilings(console, report)
    if report.rows:
        _print_rows(console, report)
    for name, form in report.forms.items():
        kernels = f", kernels {form.kernels}" if form.kernels else ""
        text = f"{name} runs {form.storages}, multiplies {form.operands}{kernels}"
        console.print(Text(text), soft_wrap=True)
    for note in report.notes:
        console.print(Text(printable(note)), soft_wrap=True)
    for name, why in report.missing.items():
        console.print(Text(printable(f"{name}: {why}"), "yellow"), soft_wrap=True)
    if not report.is_complete:
        console.print(Text("not complete: what was measured until the end came", "yellow"))


def _print_ceilings(console: Console, report: Report) -> None:
    read = report.as_dict()["ceilings"]["read"]
    best, each = read["best"], read["median"]
    console.print(
        f"\nread rate: {_giga(best)} GB/s, median of {len(read['values'])} measurements, each the "
        f"best of {NUM_ROUNDS}; of their medians {_giga(each)}",
        highlight=False,
        soft_wrap=True,
    )
    rows = report.gemm_table()
    table = _table("\nproducts, rows x inputs x outputs", "kernels", "operands", *GEMM_COLUMNS)
    for kernels, operands in dict.fromkeys((row["kernels"], row["operands"]) for row in rows):
        own = [row for row in rows if (row["kernels"], row["operands"]) == (kernels, operands)]
        own.sort(key=lambda row: row["flops"])
        cells = [text for row in (own[-1], own[0]) for text in (_flops(row), _shape(row))]
        table.add_row(kernels, operands, *cells)
    console.print(table)


def _flops(row: dict[str, Any]) -> str:
    return f"{row['flops'] / 1e9:,.0f}"


def _shape(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["shape"]))


def _giga(spread: dict[str, Any]) -> str:
    low, high = spread["min"] / 1e9, spread["max"] / 1e9
    return f"{spread['median'] / 1e9:.1f} ({low:.1f} to {high:.1f})"


def _print_rows(console: Console, report: Report) -> None:
    num = max(len(row.values) for row in report.rows.values())
    rounds = f"medians of {num} rounds" if num > 1 else "one round"
    title = f"\n{rounds}; share of what the machine allows"
    spread = ["least to most"] if num > 1 else []
    table = _table(title, "", "engine", "", "unit", *spread, "share", "limited by")
    before = ""
    for row in report.ordered():
        label = row.figure.label
        middle, between = _spread(row)
        share = "" if row.share is None else f"{row.share.median:.0%}"
        unit = "MB" if row.figure.unit == BYTES else row.figure.unit
        cells = [row.engine, middle, unit, *([between] if spread else []), share, row.bound]
        table.add_row(label if label != before else "", *cells)
        before = label
    console.print(table)


def _spread(row: Row) -> tuple[str, str]:
    """The median, and the least and the most."""
    scale = 1e-6 if row.figure.unit == BYTES else 1
    value = row.value
    digits = {RATE: 1, BYTES: 0, PERCENT: 1}.get(row.figure.unit, 3)
    middle, low, high = (f"{v * scale:,.{digits}f}" for v in (value.median, value.min, value.max))
    return middle, f"{low} to {high}"


def _table(title: str, *columns: str) -> Table:
    table = Table(box=None, header_style="bold", title=title, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        # On a narrow terminal names go on in the next line; figures stay whole.
        justify: Any = "left" if index < 2 else "right"
        table.add_column(column, justify=justify, no_wrap=index >= 2, overflow="fold")
    return table
