"""One of several ranks that write a run's state as shards, or read it, for test_rank_shards.py.

python shards_ranks.py RANK WORLD STORE_FILE FOLDER RESULT_FILE write|read

The state of a small model, whose values follow from the names, as FSDP cuts it.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_run import small_model
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rorqual.model import DeepseekV3
from rorqual.train.checksums import damage, write_checksums
from rorqual.train.optimizer import AdamW, OptimizerSettings
from rorqual.train.pieces import Piece, piece_of_whole
from rorqual.train.shards import read_shards, write_shards
from rorqual.weights.model_writer import write_settings
from rorqual.weights.parameters_source import EMA


def make_model() -> DeepseekV3:
    """Three rows of the norms and odd experts: nothing is divided evenly."""
    model = small_model(
        num_hidden_layers=2, tie_word_embeddings=False, n_routed_experts=12, hidden_size=33
    )
    with torch.no_grad():
        for name, value in named(model).items():
            value.copy_(values_of(name, value))
    return model


def named(model: DeepseekV3) -> dict[str, Tensor]:
    stored = model.state_dict().keys()
    return dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in stored
    }


def values_of(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def piece_of(value: Tensor) -> Piece:
    """As torch says where a DTensor lies."""
    if not isinstance(value, DTensor):
        return piece_of_whole(value)
    _, start = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    return Piece(value.to_local().detach(), tuple(value.shape), tuple(start))


def state_of(model: DeepseekV3) -> dict[str, Piece]:
    """Weights, bfloat16 moments, average; all but the weights zero."""
    optimizer = AdamW(model, OptimizerSettings(moments="bfloat16"))
    pieces = {name: piece_of(value) for name, value in named(model).items()}
    for key, value in optimizer.state_tensors().items():
        pieces[key] = pieces[key.partition(".")[2]].with_(value)
    for name, value in optimizer.named.items():
        piece = piece_of(value)
        pieces[f"{EMA}{name}"] = piece.with_(torch.zeros_like(piece.local))
    return pieces


def whole_of(name: str, piece: Piece) -> Tensor:
    return values_of(name, torch.empty(piece.whole, dtype=piece.local.dtype))


def cut(model: DeepseekV3) -> None:
    for layer in model.model.layers.values():
        fully_shard(layer)
    fully_shard(model)


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    store, folder, result = (Path(word) for word in sys.argv[3:6])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = make_model()
    cut(model)
    pieces = state_of(model)
    found: dict[str, Any] = {"local": sum(piece.local.numel() for piece in pieces.values())}
    if sys.argv[6] == "write":
        for name, piece in pieces.items():
            piece.local.copy_(whole_of(name, piece)[piece.box])

        def finish(known: dict[str, dict[str, Any]]) -> None:
            write_settings(model, folder, "float32", None, {})
            write_checksums(folder, known)
            found["known"] = sorted(known)

        write_shards(folder, {n: p.copied() for n, p in pieces.items()}, finish, dist.new_group())
        found["damage"] = damage(folder, share=(rank, world))
    else:
        for piece in pieces.values():
            piece.local.zero_()
        read_shards(folder, pieces)
        found["unequal"] = [
            name
            for name, piece in pieces.items()
            if not torch.equal(piece.local, whole_of(name, piece)[piece.box])
        ]
    result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
