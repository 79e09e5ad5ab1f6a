"""Reads the demo's rank shards as one checkpoint: each tensor put together from the ranks' parts.

The rank of a file follows from the experts it holds; where there are none, from its name. A folder
needs a configuration beside the shards: Hugging Face's `config.json`, or the demo's own JSON as
`config.json` or `model_args.json` (the demo's converter copies none).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.files import read_json
from rorqual.log import logger
from rorqual.model import ModelConfig
from rorqual.ops.block_fp8 import BLOCK
from rorqual.weights.folder import CONFIG, config_of, refuse_absurd
from rorqual.weights.fp8 import E4M3
from rorqual.weights.names import IGNORED, tensors_of
from rorqual.weights.quantization_config import quantisation_of
from rorqual.weights.safetensors_file import DTYPES, Place, RowFiles, looks_like_safetensors
from rorqual.weights.shards.model_args import MODEL_ARGS, config_from_model_args, is_model_args
from rorqual.weights.shards.names import cut_of, expert_of, rank_of_file, shard_file, shard_name
from rorqual.weights.source import Entry, Quantisation


@dataclass
class ShardFolder:
    """An opened folder of rank shards (a `TensorSource`)."""

    path: Path
    config: ModelConfig
    quantisation: Quantisation | None
    entries: dict[str, Entry]
    faults: list[str]
    files: list[str]  # by rank
    table: dict[str, Any] = field(repr=False)  # Hugging Face's config.json, {} without one
    has_unreadable: bool = False
    is_huggingface: bool = False
    is_verbatim: bool = True
    _row_files: RowFiles = field(default_factory=RowFiles, repr=False)

    @property
    def world(self) -> int:
        return len(self.files)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        entry, cut = self.entries[name], cut_of(name)
        if cut == "rows":
            return self._rows_of_ranks(name, start, stop, entry.shape[0] // self.world)
        if cut == "columns":
            parts = [self._part(rank, name, start, stop) for rank in range(self.world)]
            joined = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
            return joined.view(DTYPES[entry.dtype])
        rank = (expert_of(name) or 0) // (self.config.n_routed_experts // self.world)
        return self._part(rank if cut == "expert" else 0, name, start, stop)

    def _rows_of_ranks(self, name: str, start: int, stop: int, height: int) -> Tensor:
        parts = []
        for rank in range(start // height, (stop - 1) // height + 1):
            first = rank * height
            parts.append(self._part(rank, name, max(start - first, 0), min(stop - first, height)))
        if len(parts) == 1:
            return parts[0]
        dtype = parts[0].dtype
        return torch.cat([part.view(torch.uint8) for part in parts]).view(dtype)

    def _part(self, rank: int, name: str, start: int, stop: int) -> Tensor:
        return self._row_files.rows(self.path / self.files[rank], shard_name(name), start, stop)

    def num_bytes(self) -> int:
        """Bytes of the tensors, what every rank repeats counted once."""
        return sum(
            torch.Size(entry.shape).numel() * DTYPES[entry.dtype].itemsize
            for entry in self.entries.values()
            if entry.dtype in DTYPES
        )

    def close(self) -> None:
        self._row_files.close()

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_shards(path: Path, config: ModelConfig | None = None) -> ShardFolder:
    """Reads the headers of all ranks and compares them with each other.

    `config` replaces the folder's own. CheckpointError where there is none, or where the ranks
    cannot be told; faults of single tensors are collected.
    """
    table: dict[str, Any] = {}
    if config is None:
        config, table = _read_config(path)
    row_files = RowFiles()
    names = sorted(p.name for p in path.iterdir() if p.is_file() and looks_like_safetensors(p))
    headers = {name: row_files.places(path / name) for name in names}
    refuse_absurd(config, path, sum(map(len, headers.values())))
    files, faults = _by_rank(path, headers, config)
    folder = ShardFolder(path, config, None, {}, faults, files, table, bool(faults))
    folder._row_files = row_files
    if faults:
        return folder
    places = [headers[name] for name in files]
    known = _collect(folder, places)
    if not table:
        known |= _unsaid_mtp(folder, places)
    for rank, header in enumerate(places):
        for name, place in header.items():
            if name not in known and not IGNORED.search(name):
                shape = list(place.shape)
                folder.faults.append(f"unexpected: {name} {shape} in {files[rank]}")
    if any(entry.dtype == E4M3 for entry in folder.entries.values()):
        folder.quantisation = quantisation_of(table, path / CONFIG) or Quantisation()
    return folder


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    for name in (CONFIG, MODEL_ARGS):
        if (path / name).is_file():
            table = read_json(path / name, CheckpointError)
            if is_model_args(table):
                return config_from_model_args(table, path / name), {}
            return config_of(table, path / name), table
    raise CheckpointError(
        "rank shards without a configuration",
        where=path,
        expected=f"{CONFIG}, or the demo's JSON (such as config_671B.json) as {MODEL_ARGS}",
        fix="copy one of them into the folder: the demo's converter does not",
    )


def _unsaid_mtp(folder: ShardFolder, places: list[dict[str, Place]]) -> set[str]:
    """Names of MTP layers, which the demo's configuration has no word for; told by their norms."""
    if folder.config.num_nextn_predict_layers:
        return set()
    names = {name for header in places for name in header}
    layers = tuple(n.removesuffix("enorm.weight") for n in names if n.endswith(".enorm.weight"))
    if layers:
        logger(__name__).info(
            "%s: the demo's configuration does not name the MTP layer: loaded without", folder.path
        )
    return {name for name in names if layers and name.startswith(layers)}


def _by_rank(
    path: Path, headers: dict[str, dict[str, Place]], config: ModelConfig
) -> tuple[list[str], list[str]]:
    """(the files by rank, faults): by the experts in them, else by their names."""
    named = {name: rank_of_file(name) for name in headers}
    worlds = {rank[1] for rank in named.values() if rank is not None}
    world = worlds.pop() if len(worlds) == 1 else len(headers)
    if len(headers) < world:
        absent = [r for r in range(world) if shard_file(r, world) not in headers]
        return [], [f"no such file: {shard_file(rank, world)}" for rank in absent]
    if len(headers) != world or worlds or config.n_routed_experts % world:
        raise CheckpointError(
            "these shards do not belong together",
            where=path,
            found=", ".join(headers),
            expected=f"model0-mpN ... model(N-1)-mpN with N dividing {config.n_routed_experts}",
        )
    ranks: dict[int, str] = {}
    for name, header in headers.items():
        experts = {e for t in header if (e := expert_of(t)) is not None}
        owners = {expert // (config.n_routed_experts // world) for expert in experts}
        from_name = named[name][0] if named[name] else None  # type: ignore[index]
        rank = owners.pop() if len(owners) == 1 else from_name
        if owners or rank is None or rank in ranks or (from_name not in (None, rank)):
            raise CheckpointError(
                f"the rank of {name} cannot be told, or contradicts the experts in it",
                where=path,
                found=f"experts {sorted(experts)[:4]}... of {config.n_routed_experts}",
                expected=f"experts of one rank in {world}, as its name says",
            )
        ranks[rank] = name
    return [ranks[rank] for rank in range(world)], []


def _collect(folder: ShardFolder, places: list[dict[str, Place]]) -> set[str]:
    """Fills the entries from the ranks' parts; returns the demo's names that have been met."""
    known = set()
    config = folder.config
    for tensor in tensors_of(config):
        for name in (tensor.name, tensor.scale_name):
            known.add(shard_name(name))
            parts = _parts(folder, places, name)
            if parts:
                _add_entry(folder, name, parts)
    return known


def _parts(folder: ShardFolder, places: list[dict[str, Place]], name: str) -> dict[int, Place]:
    """rank -> its part of the tensor; a fault where only some of the ranks have it."""
    theirs = shard_name(name)
    ranks = list(range(folder.world))
    if cut_of(name) == "expert":
        ranks = [(expert_of(name) or 0) // (folder.config.n_routed_experts // folder.world)]
    found = {rank: places[rank][theirs] for rank in ranks if theirs in places[rank]}
    if found and len(found) < len(ranks):
        absent = [folder.files[rank] for rank in ranks if rank not in found]
        folder.faults.append(f"missing: {theirs} in {', '.join(absent)}")
        return {}
    return found


def _add_entry(folder: ShardFolder, name: str, parts: dict[int, Place]) -> None:
    first, cut = next(iter(parts.values())), cut_of(name)
    if any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts.values()):
        shapes = sorted({f"{part.dtype} {list(part.shape)}" for part in parts.values()})
        folder.faults.append(f"the ranks differ: {shard_name(name)} is {' and '.join(shapes)}")
        return
    shape = list(first.shape)
    axis = {"rows": 0, "columns": 1}.get(cut)
    if axis is not None:
        if axis >= len(shape):
            folder.faults.append(f"wrong shape: {shard_name(name)} is {shape}")
            return
        is_cut = first.dtype == E4M3 and len(parts) > 1 and shape[axis] % BLOCK
        if is_cut:
            folder.faults.append(
                f"cut FP8 blocks: {shard_name(name)} has {shape[axis]} {cut} a rank, "
                f"no multiple of {BLOCK}"
            )
        shape[axis] *= len(parts)
    file = folder.files[next(iter(parts))]
    folder.entries[name] = Entry(name, file, tuple(shape), first.dtype)
