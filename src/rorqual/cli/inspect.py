"""`rorqual inspect`: what a checkpoint or a preset is, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from rorqual.model import ModelConfig
    from rorqual.weights.checks import Inspection

FAILED_EXIT = 2
CONTEXT_TOKENS = 4096
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "FP8 E4M3"}
SHAPE_FIELDS = """
    vocab_size hidden_size num_hidden_layers num_nextn_predict_layers first_k_dense_replace
    num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim
    intermediate_size moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok
    n_group topk_group scoring_func topk_method max_position_embeddings tie_word_embeddings
""".split()


def inspect(
    target: Annotated[str, typer.Argument(metavar="DIR|PRESET", help="A folder, or a preset.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also read every weight's values.")] = False,
) -> None:
    """Show shapes, dtypes, parameters, cache bytes and every check of a checkpoint or preset.

    Reads headers only, so a 671B checkpoint takes seconds; --deep reads all values too.

    Exits with 2 if a check failed.

    Examples:

      rorqual inspect 671b

      rorqual inspect runs/tiny/checkpoints/step-1000 --deep

      rorqual inspect DIR --json | jq .checks
    """
    report = describe(target, is_deep=deep)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_tables(report)
    if any(check["status"] == "failed" for check in report["checks"]):
        raise typer.Exit(FAILED_EXIT)


def describe(target: str, *, is_deep: bool = False) -> dict[str, Any]:
    """Everything that `inspect` prints, as it goes into --json. Presets win over folders' names."""
    from rorqual.model import PRESETS
    from rorqual.weights.checks import check_folder

    if target in PRESETS:
        sizes = _preset_sizes(PRESETS[target])
        return {"target": target, "kind": "preset", **_figures(PRESETS[target]), **sizes}
    path = Path(target)
    if not path.exists():
        raise UsageError(
            "neither a folder nor a preset",
            where=target,
            expected=f"a checkpoint folder, or one of {', '.join(PRESETS)}",
            fix="check the path; models are not downloaded",
        )
    found = check_folder(path, is_deep=is_deep)
    report: dict[str, Any] = {"target": target, "kind": "folder"}
    if found.folder is not None and found.report is not None:
        report |= _figures(found.report.config) | _stored(found)
        found.folder.close()
    report["checks"] = [vars(check) for check in found.checks]
    return report


def _figures(config: ModelConfig) -> dict[str, Any]:
    from rorqual.model.flops import (
        count_parameters,
        forward_flops_per_token,
        kv_bytes_per_token,
        training_flops_per_token,
    )

    count = count_parameters(config)
    absorbed = forward_flops_per_token(config, CONTEXT_TOKENS, use_absorbed=True)
    return {
        "config": config.to_hf(),
        "parameters": {
            "total": count.total,
            "activated": count.activated,
            "mtp": count.mtp,
            "mtp_with_repeated_embedding_and_head": count.mtp_repeated,
            "embedding": count.embedding,
            "head": count.head,
        },
        "kv_bytes_per_token": {
            "bfloat16": kv_bytes_per_token(config, 2),
            "float32": kv_bytes_per_token(config, 4),
        },
        "flops_per_token": {
            "context_tokens": CONTEXT_TOKENS,
            "forward_expanded": forward_flops_per_token(config, CONTEXT_TOKENS),
            "forward_absorbed": absorbed,
            "training": training_flops_per_token(config, CONTEXT_TOKENS),
        },
        "kernels": _kernels(),
    }


def _kernels() -> dict[str, str]:
    """Which of the twins runs on this machine."""
    import torch

    from rorqual.ops.attention import QUERY_BLOCK

    has_gpu = torch.cuda.is_available()
    grouped = "torch grouped_mm (CUDA)" if has_gpu else "one matrix product an expert (CPU)"
    return {
        "grouped GEMM": f"rorqual::grouped_gemm, {grouped}; twin: grouped_gemm_plain",
        "attention": f"explicit products, {QUERY_BLOCK} queries a block",
        "MLA": "absorbed or expanded, whichever needs fewer products for a step's queries",
        "FP8 weights": "dequantised on loading",
    }


def _preset_sizes(config: ModelConfig) -> dict[str, Any]:
    import torch

    from rorqual.weights.names import FORMATS, stored_tensors

    stored = []
    for name in FORMATS:
        tensors = stored_tensors(config, name)
        stored.append(
            {
                "dtype": f"saved as {name}",
                "tensors": len(tensors),
                "elements": sum(torch.Size(tensor.shape).numel() for tensor in tensors),
                "bytes": sum(tensor.num_bytes_in(name) for tensor in tensors),
            }
        )
    return {"stored": stored, "checks": []}


def _stored(found: Inspection) -> dict[str, Any]:
    from rorqual.weights.checks import stored_elements
    from rorqual.weights.folder import DTYPES

    assert found.folder is not None, "only an opened folder has anything stored"
    rows: list[dict[str, Any]] = []
    for kind, (tensors, elements) in sorted(stored_elements(found.folder).items()):
        dtype, _, rest = kind.partition(" ")
        itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else 0
        name = f"{DTYPE_NAMES.get(dtype, dtype)} {rest}".strip()
        rows.append(
            {"dtype": name, "tensors": tensors, "elements": elements, "bytes": elements * itemsize}
        )
    total = {key: sum(row[key] for row in rows) for key in ("tensors", "elements", "bytes")}
    return {"stored": [*rows, {"dtype": "all", **total}]}


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(f"[bold]{report['target']}[/] ({report['kind']})", highlight=False)
    if "config" in report:
        _print_shape(console, report)
        _print_figures(console, report)
        _print_stored(console, report["stored"])
    _print_checks(console, report["checks"])


def _table(*columns: str, title: str, num_text: int = 1) -> Any:
    from rich.table import Table

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
    kernels = _table("", "", title="\nKernels on this machine", num_text=2)
    for name, value in report["kernels"].items():
        kernels.add_row(name, value)
    console.print(kernels)


def _print_stored(console: Console, rows: list[dict[str, Any]]) -> None:
    table = _table("dtype", "tensors", "elements", "bytes", "", title="\nStored")
    for row in rows:
        numbers = [f"{row[key]:,}" for key in ("tensors", "elements", "bytes")]
        table.add_row(row["dtype"], *numbers, _short(row["bytes"]))
    console.print(table)


def _print_checks(console: Console, checks: list[dict[str, str]]) -> None:
    from rich.text import Text

    if not checks:
        return
    styles = {"ok": "green", "failed": "bold red", "skipped": "dim"}
    table = _table("", "", "", title="\nChecks", num_text=3)
    for check in checks:
        mark = Text(check["status"], style=styles[check["status"]])
        table.add_row(mark, Text(check["name"]), Text(check["detail"]))
    console.print(table)
