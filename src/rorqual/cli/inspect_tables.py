"""What `rorqual inspect` prints: its report, the one that --json gives, as tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from rorqual.log import output_console, printable

if TYPE_CHECKING:
    from rich.console import Console

MAX_FILES = 20
SHAPE_FIELDS = """
    vocab_size hidden_size num_hidden_layers num_nextn_predict_layers first_k_dense_replace
    num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    intermediate_size moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok
    n_group topk_group scoring_func topk_method max_position_embeddings tie_word_embeddings
""".split()
KINDS = {
    "preset": "preset",
    "huggingface": "Hugging Face folder",
    "shards": "rank shards",
    "gguf": "GGUF",
}


def print_tables(report: dict[str, Any]) -> None:
    console = output_console()
    title = Text(report["target"], "bold").append(f" ({KINDS[report['kind']]})", "not bold")
    console.print(title, soft_wrap=True)
    if (trained := report.get("trained")) is not None:
        stage, step, tokens = (trained[key] for key in ("stage", "step", "tokens"))
        text = Text(printable(f"stage {stage}, step {step:,}, {tokens:,} tokens"))
        console.print(text, soft_wrap=True)
    if report["kind"] == "gguf":
        _print_gguf(console, report)
    if "config" in report:
        _print_shape(console, report)
        _print_figures(console, report)
    if "stored" in report:
        _print_stored(console, report["stored"])
    if len(report.get("files", ())) > 1:
        _print_files(console, report["files"])
    if "tensors" in report:
        _print_tensors(report["tensors"])
    _print_checks(console, report["checks"])


def _print_gguf(console: Console, report: dict[str, Any]) -> None:
    tokenizer = report["tokenizer"]
    table = _table("", "", title="\nModel", num_text=2)
    template = "with" if tokenizer["has_chat_template"] else "without"
    rows = {
        "architecture": report["architecture"],
        "tensors": f"{report['stored'][-1]['tensors']:,}",
        "values in them": f"{report['stored'][-1]['elements']:,}",
        "tokenizer": f"{tokenizer['model']}, pre-tokenizer {tokenizer['pre']}, "
        f"{tokenizer['vocab_size']:,} tokens, {template} a chat template"
        if tokenizer["model"]
        else "none",
    }
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))
    console.print(table)
    keys = _table("", "", title="\nKeys", num_text=2)
    for key, value in report["metadata"].items():
        keys.add_row(key, Text(_value(value)))
    console.print(keys)


def _value(value: Any) -> str:
    """A key's value on one line."""
    if isinstance(value, dict):
        first = json.dumps(value["first"], ensure_ascii=False)
        return printable(f"{value['length']:,} values: {first[:-1]}, ...]")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text.replace("\n", "\\n"))


def _print_files(console: Console, files: list[dict[str, Any]]) -> None:
    table = _table("file", "tensors", "bytes", title=f"\n{len(files)} files")
    for file in files[:MAX_FILES]:
        table.add_row(Text(printable(file["name"])), f"{file['tensors']:,}", f"{file['bytes']:,}")
    if len(files) > MAX_FILES:
        table.add_row(f"and {len(files) - MAX_FILES} more")
    console.print(table)


def _print_tensors(tensors: list[dict[str, Any]]) -> None:
    """Plain lines: a table of 92,000 rows would take a minute."""
    typer.echo("\nTensors")
    width = max((len(tensor["name"]) for tensor in tensors), default=0)
    for tensor in tensors:
        name = printable(tensor["name"])
        shape = str(tensor["shape"])
        typer.echo(f"{name:<{width}}  {tensor['dtype']:<8} {shape:<20} {tensor['bytes']:>15,}")


def _table(*columns: str, title: str, num_text: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < num_text else "right", overflow="fold")
    return table


def _short(value: float) -> str:
    """Three digits after the point and a decimal prefix: 37.552 G."""
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:,.3f} {prefix}"
    return ""


def _print_shape(console: Console, report: dict[str, Any]) -> None:
    table = _table("", "", title="\nShape")
    for field in SHAPE_FIELDS:
        value = report["config"][field]
        table.add_row(field, "none" if value is None else str(value))
    yarn = report["config"]["rope_scaling"]
    if yarn:
        length = yarn["original_max_position_embeddings"]
        table.add_row("rope_scaling", f"YaRN, {yarn['factor']:g} times {length}")
    console.print(table)


def _print_figures(console: Console, report: dict[str, Any]) -> None:
    table = _table("Parameters", "", "", title="\nFigures")
    for name, value in report["parameters"].items():
        table.add_row(name.replace("_", " "), f"{value:,}", _short(value))
    for dtype, value in report["kv_bytes_per_token"].items():
        table.add_row(f"cache bytes a token, {dtype}", f"{value:,.0f}", _short(value))
    flops = dict(report["flops_per_token"])
    context = flops.pop("context_tokens")
    for name, value in flops.items():
        label = f"FLOPs a token, {name.replace('_', ' ')}, context {context:,}"
        table.add_row(label, f"{value:,.0f}", _short(value))
    console.print(table)
    _print_kernels(console, report["kernels"])


def _print_kernels(console: Console, kernels: dict[str, Any]) -> None:
    """Whose implementation serves an operation; storages that all have the same share a column."""
    machine = kernels["machine"]
    has = "with" if machine["has_bfloat16"] else "without"
    title = f"\nKernels on this machine: {machine['device']}, {has} bfloat16 arithmetic"
    operations = kernels["operations"]
    columns: dict[tuple[str, ...], list[str]] = {}
    for storage in next(iter(operations.values())):
        names = tuple(served[storage] for served in operations.values())
        columns.setdefault(names, []).append(storage)
    table = _table(
        "operation", *map(", ".join, columns.values()), title=title, num_text=1 + len(columns)
    )
    for operation, *names_of_row in zip(operations, *columns, strict=True):
        table.add_row(operation.replace("_", " "), *names_of_row)
    console.print(table)
    if kernels["forms"]:
        _print_forms(console, kernels["forms"])


def _print_forms(console: Console, forms: dict[str, list[dict[str, Any]]]) -> None:
    """A row for each kind that is stored: how many matrices, and what they run as in a form."""
    title = "\nHow matrices run on this machine, by --dtype"
    table = _table("stored as", "matrices", *forms, title=title, num_text=1)
    kinds = list(dict.fromkeys(row["stored"] for row in next(iter(forms.values()))))
    for kind in kinds:
        runs = {
            name: [row for row in rows if row["stored"] == kind] for name, rows in forms.items()
        }
        number = sum(row["matrices"] for row in next(iter(runs.values())))
        cells = (
            ", ".join(
                f"{row['runs_as']} ({row['kernels']})"
                if len(found) == 1
                else f"{row['matrices']:,} {row['runs_as']} ({row['kernels']})"
                for row in found
            )
            for found in runs.values()
        )
        table.add_row(kind, f"{number:,}", *cells)
    console.print(table)


def _print_stored(console: Console, rows: list[dict[str, Any]]) -> None:
    table = _table("dtype", "tensors", "elements", "bytes", "", title="\nStored")
    for row in rows:
        numbers = [f"{row[key]:,}" for key in ("tensors", "elements", "bytes")]
        table.add_row(row["dtype"], *numbers, _short(row["bytes"]))
    console.print(table)


def _print_checks(console: Console, checks: list[dict[str, str]]) -> None:
    if not checks:
        return
    styles = {"ok": "green", "failed": "bold red", "skipped": "dim"}
    table = _table("", "", "", title="\nChecks", num_text=3)
    for check in checks:
        mark = Text(check["status"], style=styles[check["status"]])
        table.add_row(mark, Text(check["name"]), Text(check["detail"]))
    console.print(table)
