"""`rorqual inspect`: what a checkpoint or a preset is, and whether it is whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.exits import EXIT_BAD_INPUT

if TYPE_CHECKING:
    from rorqual.model import ModelConfig
    from rorqual.ops.kernels import Machine
    from rorqual.weights.source import TensorSource

Matrices = dict[tuple[str, int], int]
"""(kind, values of a row) -> how many matrices a file has."""

CONTEXT_TOKENS = 4096  # of which FLOPs are counted, where a model has as many
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "FP8 E4M3"}


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR|FILE|tiny|PRESET", help="A folder or run, a GGUF file, 'tiny', a preset."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also read every weight's values.")] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also list every tensor: name, type, shape, bytes.")
    ] = False,
) -> None:
    """Show shapes, dtypes, parameters, cache bytes and every check of a checkpoint or preset.

    Hugging Face folders, rank shards, and GGUF files of any architecture, in one file or split:
    of those that are not DeepSeek-V3's too, keys, tokenizer and tensors are shown. Reads headers
    only, so a 671B checkpoint takes seconds; --deep reads all values too.

    Exits with 2 if a check failed.

    \b
    Examples:
      rorqual inspect 671b
      rorqual inspect tiny                    # the bundled model; preset:tiny is its shape
      rorqual inspect runs/tiny/checkpoints/step-1000 --deep
      rorqual inspect FILE.gguf --tensors
      rorqual inspect DIR --json | jq .checks
    """
    report = describe(target, is_deep=deep, has_tensors=tensors)
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        from rorqual.cli.inspect_tables import print_tables

        print_tables(report)
    if any(check["status"] == "failed" for check in report["checks"]):
        raise typer.Exit(EXIT_BAD_INPUT)


def describe(target: str, *, is_deep: bool = False, has_tensors: bool = False) -> dict[str, Any]:
    """Everything that `inspect` prints, as it goes into --json."""
    from rorqual.bundled import checkpoint_path
    from rorqual.model import named_preset, no_such_model
    from rorqual.weights.open import kind_of

    shape = named_preset(target)
    if shape is not None:
        return {"target": target, "kind": "preset", **_figures(shape), **_preset_sizes(shape)}
    path = checkpoint_path(target)
    if not path.exists():
        raise no_such_model(target)
    kind = kind_of(path)
    described = _describe_gguf if kind == "gguf" else _describe_folder
    return {"target": target, "kind": kind, **described(path, is_deep, has_tensors)}


def _describe_folder(path: Path, is_deep: bool, has_tensors: bool) -> dict[str, Any]:
    """A Hugging Face folder or rank shards, as far as it can be opened."""
    from rorqual.errors import CheckpointError
    from rorqual.runs import trained_as
    from rorqual.weights.checks import Check, check_folder

    report: dict[str, Any] = {}
    found = check_folder(path, is_deep=is_deep)
    if found.folder is not None and found.report is not None:
        with found.folder as source:
            matrices = _matrices((e.name, e.shape, e.dtype) for e in source.entries.values())
            report |= _figures(found.report.config, matrices) | _stored(source)
            report["files"] = _files(source)
            if has_tensors:
                report["tensors"] = _entries(source)
    checks = list(found.checks)
    try:
        if (trained := trained_as(path)) is not None:
            report["trained"] = trained
    except CheckpointError as problem:
        checks.append(Check("training", "failed", str(problem)))
    return report | {"checks": [vars(check) for check in checks]}


def _describe_gguf(path: Path, is_deep: bool, has_tensors: bool) -> dict[str, Any]:
    """A GGUF model of any architecture; of ours, with its shape and its checks."""
    from rorqual.errors import RorqualError
    from rorqual.weights.checks import Check, check_folder, check_gguf
    from rorqual.weights.gguf.file import read_gguf
    from rorqual.weights.gguf.names import ARCHITECTURE
    from rorqual.weights.gguf.summary import stored_types, summary

    with read_gguf(path) as file:
        report = summary(file)
        rows = [
            dict(zip(("dtype", "tensors", "elements", "bytes"), (name, *counts), strict=True))
            for name, counts in stored_types(file).items()
        ]
        report["stored"] = _with_total(rows)
        in_files = [tensor.file for tensor in file.tensors.values()]
        report["files"] = [
            {"name": f.name, "bytes": f.stat().st_size, "tensors": in_files.count(f)}
            for f in file.files
        ]
        if has_tensors:
            report["tensors"] = [
                _tensor(t.name, t.kind.name, t.shape, t.num_bytes, t.file.name)
                for t in file.tensors.values()
            ]
        if file.architecture != ARCHITECTURE:
            checks = check_gguf(file, is_deep=is_deep)
        else:
            try:
                found = check_folder(file.path, is_deep=is_deep)
            except RorqualError as problem:
                checks = [Check("configuration", "failed", str(problem))]
            else:
                checks = found.checks
                if found.folder is not None and found.report is not None:
                    found.folder.close()
                    tensors = file.tensors.values()
                    matrices = _matrices((t.name, t.shape, t.kind.name) for t in tensors)
                    report |= _figures(found.report.config, matrices)
    return report | {"checks": [vars(check) for check in checks]}


def _tensor(name: str, dtype: str, shape: tuple[int, ...], num_bytes: int, file: str) -> Any:
    return {"name": name, "dtype": dtype, "shape": list(shape), "bytes": num_bytes, "file": file}


def _entries(source: TensorSource) -> list[dict[str, Any]]:
    """Tensors under Hugging Face's names; those of rank shards put together, with the first file
    that has a part.
    """
    return [
        _tensor(e.name, e.dtype, e.shape, math.prod(e.shape) * _itemsize(e.dtype), e.file)
        for e in source.entries.values()
    ]


def _files(source: TensorSource) -> list[dict[str, Any]]:
    from rorqual.weights.safetensors_file import read_places
    from rorqual.weights.shards.reader import ShardFolder

    if isinstance(source, ShardFolder):
        names = source.files
    else:
        names = sorted({entry.file for entry in source.entries.values()})
    paths = [source.path / name for name in names]
    return [
        {"name": p.name, "bytes": p.stat().st_size, "tensors": len(read_places(p))} for p in paths
    ]


def _figures(config: ModelConfig, matrices: Matrices | None = None) -> dict[str, Any]:
    from rorqual.model.flops import (
        count_parameters,
        forward_flops_per_token,
        kv_bytes_per_token,
        training_flops_per_token,
    )

    count = count_parameters(config)
    context = min(CONTEXT_TOKENS, config.max_position_embeddings)
    absorbed = forward_flops_per_token(config, context, use_absorbed=True)
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
            "context_tokens": context,
            "forward_expanded": forward_flops_per_token(config, context),
            "forward_absorbed": absorbed,
            "training": training_flops_per_token(config, context),
        },
        "kernels": _kernels(matrices or {}),
    }


def _matrices(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> Matrices:
    """How a file stores its matrices, but for routers, which are decoded in any case, and an
    embedding of which rows alone are wanted; of tensors (name, shape, kind).
    """
    from rorqual.ops.kernels import STORED
    from rorqual.weights.names import EMBEDDING, HEAD

    others = ["mlp.gate.weight", "ffn_gate_inp.weight", "weight_scale_inv"]
    listed = list(tensors)
    if any(name in (HEAD, "output.weight") for name, _, _ in listed):
        others += [EMBEDDING, "token_embd.weight"]
    found: Matrices = {}
    for name, shape, kind in listed:
        if len(shape) > 1 and kind in STORED and not name.endswith(tuple(others)):
            key = kind, shape[-1]
            found[key] = found.get(key, 0) + math.prod(shape[:-2])
    return dict(sorted(found.items(), key=lambda item: STORED.index(item[0][0])))


def _kernels(matrices: Matrices) -> dict[str, Any]:
    """What serves each operation on this machine: with weights decoded to a dtype, and as they are
    stored, where that can be chosen; how many matrices run as what in each form.
    """
    from rorqual.ops.device import resolve_device
    from rorqual.ops.kernels import OPERATIONS, Machine, choose, serving

    machine = Machine.of(resolve_device("auto"))
    storages = {"float32": "float32", "bfloat16": "bfloat16"}
    if machine.device != "cpu":
        matrices = {}
    storages |= {f"stored {kind}": kind for kind, _ in matrices}
    chosen = {title: choose(storage, machine) for title, storage in storages.items()}
    operations = {
        operation: {title: serving(kernels, operation) for title, kernels in chosen.items()}
        for operation in OPERATIONS
    }
    return {"machine": vars(machine), "operations": operations, "forms": _forms(matrices, machine)}


def _forms(matrices: Matrices, machine: Machine) -> dict[str, list[dict[str, Any]]]:
    """form -> what is stored, what it runs as there, by which kernels, how many matrices."""
    from rorqual.ops.kernels import choose
    from rorqual.weights.forms import FORMS

    forms: dict[str, list[dict[str, Any]]] = {}
    for name, form in FORMS.items() if matrices else ():
        counts: dict[tuple[str, str], int] = {}
        for (stored, columns), number in matrices.items():
            key = stored, form.kind_of(stored, columns)
            counts[key] = counts.get(key, 0) + number
        forms[name] = [
            {"stored": stored, "runs_as": runs, "kernels": choose(runs, machine).name}
            | {"matrices": number}
            for (stored, runs), number in counts.items()
        ]
    return forms


def _preset_sizes(config: ModelConfig) -> dict[str, Any]:
    import torch

    from rorqual.weights.fp8 import FORMATS
    from rorqual.weights.planned import planned_tensors

    stored = []
    for name in FORMATS:
        tensors = planned_tensors(config, name)
        stored.append(
            {
                "dtype": f"saved as {name}",
                "tensors": len(tensors),
                "elements": sum(torch.Size(tensor.shape).numel() for tensor in tensors),
                "bytes": sum(tensor.num_bytes for tensor in tensors),
            }
        )
    return {"stored": stored, "checks": []}


def _stored(source: TensorSource) -> dict[str, Any]:
    from rorqual.weights.checks import stored_elements

    rows: list[dict[str, Any]] = []
    for kind, (tensors, elements) in sorted(stored_elements(source).items()):
        dtype, _, rest = kind.partition(" ")
        name = f"{DTYPE_NAMES.get(dtype, dtype)} {rest}".strip()
        num_bytes = elements * _itemsize(dtype)
        rows.append({"dtype": name, "tensors": tensors, "elements": elements, "bytes": num_bytes})
    return {"stored": _with_total(rows)}


def _with_total(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    total = {key: sum(row[key] for row in rows) for key in ("tensors", "elements", "bytes")}
    return [*rows, {"dtype": "all", **total}]


def _itemsize(dtype: str) -> int:
    """Bytes of a value of safetensors' type; 0 for one that we do not read."""
    from rorqual.weights.safetensors_file import DTYPES

    return DTYPES[dtype].itemsize if dtype in DTYPES else 0
