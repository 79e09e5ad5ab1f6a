"""Every check of a checkpoint by name, passed or failed: what `rorqual inspect` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rorqual.errors import MAX_LISTED, RorqualError
from rorqual.tokenizer import has_tokenizer, load_tokenizer
from rorqual.weights.audit import Audit, audit
from rorqual.weights.fp8 import SCALE_SUFFIX
from rorqual.weights.gguf.file import GgufFile
from rorqual.weights.gguf.reader import GgufSource
from rorqual.weights.gguf.summary import faulty_values
from rorqual.weights.gguf.tokenizer import TOKENS
from rorqual.weights.names import IGNORED
from rorqual.weights.open import open_source
from rorqual.weights.progress import track
from rorqual.weights.source import TensorSource
from rorqual.weights.values import read_values

Status = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One question asked of a checkpoint. `detail` says what was found."""

    name: str
    status: Status
    detail: str = ""


@dataclass
class Inspection:
    """The checks of a checkpoint; `folder` and `report` are None where it could not be opened."""

    checks: list[Check]
    folder: TensorSource | None = None
    report: Audit | None = None


# The kinds of an audit's faults, each a check, and what it means that there is none.
HEADER_CHECKS = {
    "files": "index and headers readable, no tensor twice",
    "layers": "as many as the configuration says",
    "tensors": "all there, none unexpected",
    "shapes": "as the configuration gives them",
    "dtypes": "float32, bfloat16, float16, or FP8 where it may be",
    "scales": "one for each FP8 weight, of the right shape",
    "quantisation": "named in the configuration where there is FP8",
}
NEED_ALL_FILES = ("layers", "tensors")


def check_folder(path: Path, *, is_deep: bool = False) -> Inspection:
    """Opens a checkpoint and makes every check it can; reads values only if `is_deep`.

    What is not there, or has no config.json, is an error and no failed check.
    """
    try:
        folder = open_source(path)
        report = audit(folder)
    except RorqualError as problem:
        if not (path / "config.json").is_file():
            raise
        return Inspection([Check("configuration", "failed", str(problem))])
    checks = [Check("configuration", "ok", "it gives a shape that we know")]
    for kind, meaning in HEADER_CHECKS.items():
        faults = report.faults.get(kind, [])
        if faults:
            checks.append(Check(kind, "failed", _shown(faults)))
        elif kind in NEED_ALL_FILES and folder.has_unreadable:
            checks.append(Check(kind, "skipped", "not all files can be read"))
        else:
            checks.append(Check(kind, "ok", meaning))
    checks += [Check("note", "ok", note) for note in report.notes]
    checks += [_check_bias(folder), _check_tokenizer(folder)]
    checks.append(_check_values(folder, report, is_deep=is_deep))
    return Inspection(checks, folder, report)


def check_gguf(file: GgufFile, *, is_deep: bool = False) -> list[Check]:
    """The checks that any GGUF file can be given, whatever its architecture."""
    found = f"{len(file.tensors):,} tensors lie where the header says, none twice"
    checks = [Check("files", "ok", found)]
    if not is_deep:
        return [*checks, Check("values", "skipped", "finite or not: --deep reads every weight")]
    faults, uncoded = faulty_values(file)
    rest = f"; not decoded: {', '.join(uncoded)}" if uncoded else ""
    status: Status = "failed" if faults else "ok"
    return [*checks, Check("values", status, (_shown(faults) or "all finite") + rest)]


def _shown(faults: Sequence[str]) -> str:
    more = len(faults) - MAX_LISTED
    rest = [f"and {more} more"] if more > 0 else []
    return "\n".join([*faults[:MAX_LISTED], *rest])


def _check_bias(folder: TensorSource) -> Check:
    name = "router bias"
    stored = [e for e in folder.entries.values() if e.name.endswith("e_score_correction_bias")]
    if not stored:
        return Check(name, "skipped", "there is none")
    rounded = [f"{entry.name} is {entry.dtype}" for entry in stored if entry.dtype != "F32"]
    return Check(name, "failed" if rounded else "ok", _shown(rounded) or "float32")


def _check_tokenizer(folder: TensorSource) -> Check:
    name, limit = "tokenizer", folder.config.vocab_size
    gguf = folder if isinstance(folder, GgufSource) else None
    if gguf is not None and TOKENS not in gguf.file.metadata:
        return Check(name, "skipped", "none in the file")
    if gguf is None and not has_tokenizer(folder.path):
        return Check(name, "skipped", "no tokenizer here")
    try:
        tokenizer = load_tokenizer(folder.path) if gguf is None else gguf.tokenizer
        size = tokenizer.vocab_size
    except RorqualError as problem:
        return Check(name, "failed", str(problem))
    return Check(name, "ok" if size <= limit else "failed", f"{size:,} ids for {limit:,} rows")


def _check_values(folder: TensorSource, report: Audit, *, is_deep: bool) -> Check:
    name = "values"
    if not is_deep:
        return Check(name, "skipped", "finite or not: --deep reads every weight")
    if report.all_faults:
        return Check(name, "skipped", "the folder has other faults")
    faults = []
    for tensor in track(report.tensors, "reading", folder.num_bytes()):
        try:
            if not bool(torch.isfinite(read_values(folder, tensor)).all()):
                faults.append(f"{tensor.name} has NaN or infinity")
        except RorqualError as problem:
            faults.append(problem.what)
    return Check(name, "failed" if faults else "ok", _shown(faults) or "all finite")


def stored_elements(folder: TensorSource) -> dict[str, tuple[int, int]]:
    """dtype -> (tensors, elements) of the files, scales under "scales" and leftovers left out."""
    counts: dict[str, tuple[int, int]] = {}
    for entry in folder.entries.values():
        if IGNORED.search(entry.name):
            continue
        kind = f"{entry.dtype} scales" if entry.name.endswith(SCALE_SUFFIX) else entry.dtype
        tensors, elements = counts.get(kind, (0, 0))
        counts[kind] = (tensors + 1, elements + torch.Size(entry.shape).numel())
    return counts
