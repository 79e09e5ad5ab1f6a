"""A checkpoint folder seen through its headers: which tensors lie in which file, memory-mapped.

Only headers are read here, so that a 671B checkpoint opens in a second; `read` then maps one
tensor at a time. Format: safetensors, single (`model.safetensors`) or in shards with
`model.safetensors.index.json`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rorqual.bundled import BUNDLED
from rorqual.errors import CheckpointError, RorqualError, listing
from rorqual.files import is_there, mend_of, read_json, stand_in
from rorqual.model import PRESETS, ModelConfig
from rorqual.runs import mend_of_checkpoint
from rorqual.weights.not_weights import PICKLES, adapter_fix, pickle_fix, refuse_stand_ins
from rorqual.weights.quantization_config import quantisation_of
from rorqual.weights.safetensors_file import DTYPES, RowFiles, looks_like_safetensors
from rorqual.weights.shards.model_args import config_from_model_args, is_model_args
from rorqual.weights.source import Entry, Quantisation

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPECTED = f"a folder with {CONFIG} and {SINGLE} or {INDEX}, rank shards, or a GGUF file"
ABSURD_TENSORS = 10_000_000  # a hundred times DeepSeek-V3
NO_MODEL = "is a file, but no GGUF model"
RESTORE = "download or copy the listed files again from the checkpoint's source"


def shard_name(number: int, num_shards: int) -> str:
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"


@dataclass
class Folder:
    """An opened checkpoint: its configuration, its entries, and what is wrong with its files."""

    path: Path
    config: ModelConfig
    quantisation: Quantisation | None
    entries: dict[str, Entry]
    faults: list[str]
    has_unreadable: bool = False  # some file is missing or broken, so tensors are out of sight
    table: dict[str, Any] = field(default_factory=dict, repr=False)  # config.json as it stands
    is_huggingface: bool = True
    is_verbatim: bool = True
    _readable: set[str] = field(default_factory=set, repr=False)  # files whose header was read
    _row_files: RowFiles = field(default_factory=RowFiles, repr=False)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in memory of their own, read without the map; any thread may."""
        return self._row_files.rows(self.path / self.entries[name].file, name, start, stop)

    def num_bytes(self) -> int:
        """Bytes of the tensors in the files."""
        itemsize = {name: dtype.itemsize for name, dtype in DTYPES.items()}
        return sum(
            torch.Size(entry.shape).numel() * itemsize.get(entry.dtype, 0)
            for entry in self.entries.values()
        )

    def close(self) -> None:
        self._row_files.close()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The shape that a folder's `config.json` gives; ConfigError or CheckpointError names it."""
    return config_of(_config_table(Path(path)), Path(path) / CONFIG)


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Reads configuration, index and headers.

    What cannot be opened at all raises; faults of single files and tensors are collected in
    `faults`, so that they can be listed together with what the comparison with the model finds.
    """
    path = Path(path)
    if path.is_dir():
        refuse_stand_ins(path)
    table = _config_table(path)
    config = config_of(table, path / CONFIG)
    quantisation = quantisation_of(table, path / CONFIG)
    mapped_to = _weight_map(path)
    files = sorted(set(mapped_to.values())) if mapped_to is not None else [SINGLE]
    folder = Folder(path, config, quantisation, {}, [], table=table)
    for file in files:
        _read_header(folder, file)
    if mapped_to is not None:
        _compare_with_index(folder, mapped_to)
    return folder


def refuse_absurd(config: ModelConfig, path: Path, num_found: int) -> None:
    """A config.json with a billion layers is told apart before its names are counted out."""
    num_expected = config.num_layers_with_mtp * (3 * config.n_routed_experts + 10)
    if num_expected > ABSURD_TENSORS:
        raise CheckpointError(
            "config.json describes far more tensors than any checkpoint has",
            where=path / CONFIG,
            found=f"{config.num_layers_with_mtp} layers of {config.n_routed_experts} experts",
            expected=f"about the {num_found} tensors in the files",
            fix="copy config.json from the weights' source",
        )


def no_checkpoint(path: Path) -> CheckpointError:
    """What is wrong with a path that is no folder, and no GGUF file either."""
    if (found := stand_in(path)) is not None:
        return CheckpointError(found.what, where=path, fix=found.fix)
    if not path.exists():
        what, fix = "no such folder or file", "check the path; models are not downloaded"
        if str(path) in PRESETS and str(path) != BUNDLED:
            fix = (
                f"{path} is a preset, a shape without weights, for `rorqual inspect` and `plan`: "
                "name the folder or file that holds the weights"
            )
    elif looks_like_safetensors(path):
        what = NO_MODEL
        fix = "name the folder that holds it: its configuration and tokenizer lie there"
    else:
        what, fix = NO_MODEL, "name a GGUF file, or the folder that holds the weights"
    return CheckpointError(what, where=path, expected=EXPECTED, fix=pickle_fix([path]) or fix)


def refuse_empty(path: Path) -> None:
    """CheckpointError for a folder without anything of a model, before what else it lacks."""
    endings = (".safetensors", *(pattern.removeprefix("*") for pattern in PICKLES))
    names = sorted(file.name for file in path.iterdir())
    if is_there(path / CONFIG) or any(name.endswith(endings) for name in names):
        return
    fix = "check the path: the folder that holds the weights is needed"
    raise CheckpointError(
        "no model here",
        where=path,
        found=listing(names) or "an empty folder",
        expected=EXPECTED,
        fix=adapter_fix(path) or mend_of_checkpoint(path, fix),
    )


def _config_table(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise no_checkpoint(path)
    refuse_empty(path)
    copy = f"copy {CONFIG} from the checkpoint's source"
    with _mend(adapter_fix(path) or mend_of_checkpoint(path, copy)):
        return read_json(path / CONFIG, CheckpointError)


def config_of(table: dict[str, Any], where: Path) -> ModelConfig:
    copy = "correct the named value, or copy config.json from the checkpoint's source"
    with _mend(mend_of_checkpoint(where.parent, copy)):
        if is_model_args(table):
            return config_from_model_args(table, where)
        return ModelConfig.from_hf(table, where=where)


@contextmanager
def _mend(fix: str) -> Iterator[None]:
    """Adds the mend to errors of lower rooms, which do not know what the file was for."""
    try:
        yield
    except RorqualError as problem:
        if problem.fix is not None:
            raise
        raise problem.with_(fix=fix) from None


def _weight_map(path: Path) -> dict[str, str] | None:
    """The index's map from tensor to file; None for a single file."""
    if not (path / INDEX).exists():
        if (path / SINGLE).exists():
            return None
        others = sorted(file.name for file in path.glob("*.safetensors"))
        fix = mend_of_checkpoint(path, "point to the folder that holds the weights as safetensors")
        if others:
            fix = "shards need their index: copy it from the checkpoint's source"
        pickles = sorted(file for ending in PICKLES for file in path.glob(ending))
        raise CheckpointError(
            f"neither {SINGLE} nor {INDEX} is here",
            where=path,
            found=listing(others or [file.name for file in pickles]) or "no safetensors file",
            fix=adapter_fix(path) or (None if others else pickle_fix(pickles)) or fix,
        )
    with _mend("copy the index from the checkpoint's source"):
        table = read_json(path / INDEX, CheckpointError).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointError(
                "the index has no weight_map", where=path / INDEX, expected='{"weight_map": {...}}'
            )
    for name, file in table.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise CheckpointError(
                f"the index places {name} in a file outside the folder",
                where=path / INDEX,
                found=file,
                expected="the name of a file beside the index",
                fix="do not trust this checkpoint unless you know where the entry comes from",
            )
    if (path / SINGLE).exists() and SINGLE not in table.values():
        raise CheckpointError(
            f"both {SINGLE} and the shards of {INDEX} are here, and they may differ",
            where=path,
            fix="remove the one that is out of date",
        )
    return table


def _is_inside(file: str) -> bool:
    if not file or "\0" in file:
        return False
    return not any(
        kind(file).is_absolute() or kind(file).drive or ".." in kind(file).parts
        for kind in (PurePosixPath, PureWindowsPath)
    )


def _read_header(folder: Folder, file: str) -> None:
    where = folder.path / file
    if not where.is_file():
        folder.has_unreadable = True
        folder.faults.append(f"no such file: {file}, which the index names")
        return
    try:
        with safe_open(where, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                part = opened.get_slice(name)
                entry = Entry(name, file, tuple(part.get_shape()), str(part.get_dtype()))
                if name in folder.entries:
                    other = folder.entries[name].file
                    folder.faults.append(f"repeated: {name} in {other} and {file}")
                folder.entries.setdefault(name, entry)
    except PermissionError as problem:
        fix = mend_of(problem, where)
        raise CheckpointError(f"cannot be read: {problem}", where=where, fix=fix) from None
    except (SafetensorError, OSError, ValueError) as problem:
        folder.has_unreadable = True
        size = where.stat().st_size
        folder.faults.append(f"cannot be read: {file} ({size:,} bytes; truncated?): {problem}")
        return
    folder._readable.add(file)


def _compare_with_index(folder: Folder, mapped_to: dict[str, str]) -> None:
    readable = folder._readable
    for name, file in mapped_to.items():
        entry = folder.entries.get(name)
        if entry is None:
            if file in readable:
                folder.faults.append(f"missing: {name} is not in {file}, where the index has it")
        elif entry.file != file and file in readable:
            folder.faults.append(f"misplaced: {name} is in {entry.file}, the index says {file}")
    for name, entry in folder.entries.items():
        if name not in mapped_to:
            folder.faults.append(f"not in the index: {name} of {entry.file}")
