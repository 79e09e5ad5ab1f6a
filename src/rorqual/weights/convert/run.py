"""Converts a checkpoint of any kind into any other: a tensor at a time, in bounded memory.

What DeepSeek's inference/fp8_cast_bf16.py and convert.py do, and back, without a GPU: threads read
rows, change them and write them at their offset in the new file (`files.py`); the order of
files and tensors is fixed, so the result is the same whatever the number of workers and however
often the conversion was interrupted (`record.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rorqual.bundled import checkpoint_path
from rorqual.errors import listing
from rorqual.files import write_json
from rorqual.log import logger
from rorqual.model import ModelConfig
from rorqual.ops.quant_types import FLOAT_TYPES
from rorqual.weights.audit import Audit, audit
from rorqual.weights.convert.files import (
    Advance,
    Writer,
    check_space,
    default_workers,
    disk_full_explained,
    one_thread_each,
)
from rorqual.weights.convert.plan import Options, PlannedFile, index_of, plan_files, stored_dtype
from rorqual.weights.convert.record import (
    Record,
    check_places,
    copy_side_files,
    job_of,
    open_record,
    side_files,
)
from rorqual.weights.folder import CONFIG, INDEX
from rorqual.weights.fp8 import E4M3, QUANTISATION
from rorqual.weights.gguf.importance import fit_importance, read_importance
from rorqual.weights.gguf.mixes import planned_gguf
from rorqual.weights.gguf.writer import GgufOptions, advice_of, write_gguf
from rorqual.weights.open import open_source
from rorqual.weights.shards.model_args import MODEL_ARGS, model_args, unsaid
from rorqual.weights.source import TensorSource

Progress = Callable[[str, int], AbstractContextManager[Advance]]  # (label, bytes) -> advance


@dataclass
class Conversion:
    """What a conversion did; `destination` can be opened: a folder, a file, the first of parts."""

    destination: Path
    files: list[str]
    num_bytes: int  # of the weights' files, those found finished included
    num_bytes_written: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    options: Options,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Converts; a run that was interrupted goes on where it was. The source is never touched.

    CheckpointError for a source that is not whole, a full disk; UsageError for a destination that
    is not ours to write, a target that the model cannot take.
    """
    began = time.monotonic()
    source, destination = checkpoint_path(source), Path(destination)
    check_places(source, destination)
    progress = progress or _silent
    workers = workers or default_workers()
    with open_source(source, is_ema=options.is_ema) as opened, one_thread_each():
        report = audit(opened)
        report.raise_faults(opened.path)
        if options.target.kind == "gguf":
            done = _to_gguf(opened, report, destination, options, workers, progress)
        else:
            done = _to_safetensors(opened, report, destination, options, workers, progress)
    done.seconds = time.monotonic() - began
    return done


def _to_safetensors(
    source: TensorSource,
    report: Audit,
    destination: Path,
    options: Options,
    workers: int,
    progress: Progress,
) -> Conversion:
    files = plan_files(source, report.tensors, report.config, options)
    options.check_scales(tensor.dtype for file in files for tensor in file.tensors)
    target, scales = options.target, options.scale_format
    job = job_of(
        source,
        to=f"{target.kind} {target.dtype} {target.world}",
        keep_mtp=options.is_mtp_kept,
        scale_format=scales,
        max_shard_bytes=options.shard_bytes,
        **({"is_ema": True} if options.is_ema else {}),
    )
    sizes = {file.name: file.layout().num_bytes for file in files}
    notes = _notes(report.config, options)
    with open_record(destination, job) as record:
        left = [file for file in files if not record.is_finished(file.name, sizes[file.name])]
        beside = sum(file.stat().st_size for file in side_files(source))
        needed = sum(sizes[file.name] for file in left) + beside
        check_space(destination, needed)
        if len(left) < len(files):
            notes.append(f"{len(files) - len(left)} of {len(files)} files were finished before")
        with disk_full_explained(destination, needed):
            num_bytes = sum(file.num_bytes for file in left)
            with progress("converting", num_bytes) as advance:
                Writer(source, options, destination, advance, record.add).write(left, workers)
            _write_settings(source, report, record, files, options)
        record.close()
    return Conversion(
        destination,
        [file.name for file in files],
        sum(sizes.values()),
        sum(sizes[file.name] for file in left),
        0.0,
        notes,
    )


def _write_settings(
    source: TensorSource,
    report: Audit,
    record: Record,
    files: list[PlannedFile],
    options: Options,
) -> None:
    """Side files, index and configuration; config.json last, as it makes a folder a model."""
    folder = record.folder
    copy_side_files(source, folder)
    write_side_files = getattr(source, "write_side_files", None)
    if write_side_files is not None:  # GGUF carries its tokenizer inside
        write_side_files(folder)
    if options.target.kind == "huggingface" and len(files) > 1:
        write_json(folder / INDEX, index_of(files))
    is_fp8, is_ue8m0 = _is_fp8(source, report, options), _is_ue8m0(source, options)
    if options.target.kind == "shards":
        dtype = "fp8" if is_fp8 else "bf16"
        args = model_args(report.config, dtype, is_ue8m0=is_fp8 and is_ue8m0)
        write_json(folder / MODEL_ARGS, args)
    write_json(folder / CONFIG, _config_table(source, report, options, is_fp8, is_ue8m0))


def _config_table(
    source: TensorSource, report: Audit, options: Options, is_fp8: bool, is_ue8m0: bool
) -> dict[str, Any]:
    """The source's config.json with what the conversion changes."""
    table = dict(source.table) or report.config.to_hf()
    num_mtp = report.config.num_nextn_predict_layers if options.is_mtp_kept else 0
    if num_mtp or table.get("num_nextn_predict_layers") is not None:
        table["num_nextn_predict_layers"] = num_mtp
    if table.get("num_mtp_layers") is not None:
        table["num_mtp_layers"] = num_mtp
    stored = {stored_dtype(source, tensor, options) for tensor in report.tensors}
    main = "float32" if stored == {"F32"} else "float16" if "F16" in stored else "bfloat16"
    for key in ("torch_dtype", "dtype"):
        if key in table or key == "torch_dtype":
            table[key] = main
    found = table.pop("quantization_config", None)
    if is_fp8:
        keeps = source.quantisation is not None and options.target.dtype is None
        wanted = dict(found) if keeps and isinstance(found, dict) else dict(QUANTISATION)
        wanted.pop("scale_fmt", None)
        table["quantization_config"] = wanted | ({"scale_fmt": "ue8m0"} if is_ue8m0 else {})
    return table


def _is_fp8(source: TensorSource, report: Audit, options: Options) -> bool:
    return any(stored_dtype(source, tensor, options) == E4M3 for tensor in report.tensors)


def _is_ue8m0(source: TensorSource, options: Options) -> bool:
    if options.scale_format is not None:
        return options.scale_format == "ue8m0"
    return source.quantisation is not None and source.quantisation.is_ue8m0


def _notes(config: ModelConfig, options: Options) -> list[str]:
    notes = []
    if config.num_nextn_predict_layers and not options.is_mtp_kept:
        how = "" if options.keep_mtp is False else "; --keep-mtp keeps it"
        notes.append(f"the MTP layer is left out{how}")
    if options.target.kind == "shards":
        others = [n for n in unsaid(config) if n != "num_nextn_predict_layers"]
        if others:
            notes.append(
                f"the demo's own code has no field for {', '.join(others)}: it would compute "
                f"something else; {CONFIG} says it all"
            )
    for note in notes:
        logger(__name__).warning("%s", note)
    return notes


def _to_gguf(
    source: TensorSource,
    report: Audit,
    destination: Path,
    options: Options,
    workers: int,
    progress: Progress,
) -> Conversion:
    mix = options.target.mix
    assert mix is not None, "a target of this kind names its mix"
    has_mtp = options.is_mtp_kept and report.config.num_nextn_predict_layers > 0
    importance: dict[str, Tensor] = {}
    notes = []
    if unsaid := advice_of(source).unsaid:
        notes.append(f"GGUF has no place for {listing(unsaid)}: left out")
        logger(__name__).warning("%s", notes[0])
    if options.imatrix is not None:
        importance, found = _importance(options.imatrix, report.config, mix, has_mtp)
        notes += found
    with progress("writing GGUF", source.num_bytes()) as advance:
        files = write_gguf(
            source,
            destination,
            GgufOptions(
                mix,
                keep_mtp=has_mtp,
                importance=importance,
                max_file_bytes=options.max_shard_bytes,
                replace=False,
            ),
            workers=workers,
            advance=advance,
        )
    size = sum(file.stat().st_size for file in files)
    return Conversion(files[0], [file.name for file in files], size, size, 0.0, notes)


def _importance(
    path: Path, config: ModelConfig, mix: str, has_mtp: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of the file's tensors, and a note if some will be quantised without."""
    if not has_mtp:
        config = config.with_changes(num_nextn_predict_layers=0)
    tensors = planned_gguf(config, mix)
    importance = fit_importance(read_importance(path), tensors, path)
    quantised = {tensor.name for tensor in tensors if tensor.dtype not in FLOAT_TYPES}
    plain = sorted(quantised - set(importance))
    if not plain:
        return importance, []
    note = f"quantised without importance, as {path.name} has none for them: {listing(plain)}"
    logger(__name__).warning("%s", note)
    return importance, [note]


@contextmanager
def _silent(label: str, num_bytes: int) -> Iterator[Advance]:
    yield lambda done: None
