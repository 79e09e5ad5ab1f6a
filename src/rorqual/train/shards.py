"""A checkpoint of several ranks: each writes its share, and any number of ranks reads it again.

torch.distributed.checkpoint (DCP) plans who writes what (what several ranks hold is written once)
and what a rank reads of which file. DCP's own files are pickled; ours are safetensors in the form
of its HuggingFaceStorageWriter, which HuggingFaceStorageReader reads too, and `index` is JSON. The
ranks tell each other their plans through DCP, in memory.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from rorqual.errors import TrainingError, listing
from rorqual.files import fsync_path
from rorqual.runs import TRAINER
from rorqual.train.checksums import checksum
from rorqual.train.pieces import Piece
from rorqual.weights.parameters_source import OFFSETS, SHARDS, START

Finish = Callable[[dict[str, dict[str, Any]]], None]


def write_shards(
    folder: Path, pieces: Mapping[str, Piece], finish: Finish, group: ProcessGroup
) -> None:
    """Writes `trainer/shards/` of a folder that the first rank makes anew.

    All ranks of the group call it. When every one has written, the first one calls `finish` with
    the checksums of all shards, and only then it returns anywhere.
    """
    try:
        dcp.save(
            dict(pieces),
            storage_writer=_Writer(folder, finish),
            planner=_SavePlanner(),
            process_group=group,
        )
    except CheckpointException as problem:
        failures = sorted(problem.failures.items())
        told = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in failures)
        raise TrainingError(told, where=folder) from None


def read_shards(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fills the pieces, however they were cut when they were written. Each rank reads by itself.

    TrainingError where one is not there, or is of another shape or dtype.
    """
    reader = HuggingFaceStorageReader(str(folder / TRAINER / SHARDS))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that no other rank is asked is meant so
        try:
            dcp.load(
                dict(pieces), storage_reader=reader, planner=_LoadPlanner(folder), no_dist=True
            )
        except CheckpointException as problem:
            raise next(iter(problem.failures.values()))[0] from None


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.start), piece.local.shape)


class _SavePlanner(DefaultSavePlanner):
    """Of pieces; what several ranks hold is written by one of them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, piece in self.state_dict.items():
            if piece.local.numel():
                data = TensorWriteData(
                    _chunk(piece),
                    TensorProperties.create_from_tensor(piece.local),
                    torch.Size(piece.whole),
                )
                index = MetadataIndex(name, piece.start)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece: Piece = self.state_dict[write_item.index.fqn]
        return piece.local


class _LoadPlanner(LoadPlanner):
    """Of pieces, into their own memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None, "the headers are read before"
        self.pieces: dict[str, Piece] = state_dict
        self.stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        faults = [name for name, piece in self.pieces.items() if not self._fits(name, piece)]
        if faults:
            raise TrainingError(
                f"tensors are missing, or of another form: {listing(faults)}",
                where=self.folder / TRAINER / SHARDS,
            )
        items: list[ReadItem] = []
        for name, piece in self.pieces.items():
            if piece.local.numel():
                items += create_read_items_for_chunk_list(name, self.stored[name], [_chunk(piece)])
        return LoadPlan(items)

    def _fits(self, name: str, piece: Piece) -> bool:
        stored = self.stored.get(name)
        return (
            isinstance(stored, TensorStorageMetadata)
            and tuple(stored.size) == piece.whole
            and stored.properties.dtype == piece.local.dtype
        )

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("all that is stored are tensors")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        local = self.pieces[read_item.dest_index.fqn].local
        sizes = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return local[tuple(slice(at, at + length) for at, length in sizes)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was written in place."""


class _Writer(StorageWriter):
    """One safetensors file a rank, told apart by the rank's number."""

    def __init__(self, folder: Path, finish: Finish) -> None:
        self.folder, self.on_finish = folder, finish

    def reset(self, checkpoint_id: object = None) -> None:
        """Nothing is kept."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        # The others write only once the plans were exchanged, which comes after this.
        if is_coordinator:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.folder / TRAINER / SHARDS).mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=n) for n, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        name = f"{TRAINER}/{SHARDS}/shard-{plan.storage_data:05d}-model-00001-of-00001.safetensors"
        file = self.folder / name
        tensors: dict[str, Tensor] = {}
        starts = {}
        for item in plan.items:
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor), "all that is saved are tensors"
            assert item.tensor_data is not None, "and their plan says where they lie"
            tensors[item.index.fqn] = value.contiguous()
            starts[item.index.fqn] = {START: list(item.tensor_data.chunk.offsets)}
        save_file(
            tensors, file, {OFFSETS: json.dumps(starts), "DCP_VERSION": "1.0", "format": "pt"}
        )
        fsync_path(file)
        result = {name: checksum(file)}
        done.set_result([WriteResult(MetadataIndex(name), file.stat().st_size, result)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        known: dict[str, dict[str, Any]] = {}
        for of_rank in results:
            for result in of_rank:
                known |= result.storage_data
        self.on_finish(known)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        return True
