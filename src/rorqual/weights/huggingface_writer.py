"""Writes a model as a Hugging Face checkpoint: a shard at a time, whole or not at all.

`config.json` has the V3 fields every engine reads; FP8 follows the release (e4m3, blocks of
128x128, dynamic activations). FP8 quantises exactly the `self_attn` and `mlp` projections.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from rorqual.errors import CheckpointError, RorqualError, UsageError
from rorqual.files import atomic_directory, write_json
from rorqual.model import DeepseekV3
from rorqual.model.stored import StoredStack
from rorqual.ops.block_fp8 import quantise_blocks
from rorqual.weights.convert.plan import MAX_SHARD_BYTES
from rorqual.weights.folder import CONFIG, INDEX, SINGLE, shard_name
from rorqual.weights.fp8 import E4M3, QUANTISATION, Format
from rorqual.weights.planned import PlannedTensor, cut_files, planned_tensors
from rorqual.weights.progress import track
from rorqual.weights.safetensors_file import DTYPES

if TYPE_CHECKING:
    from rorqual.tokenizer import Tokenizer

GENERATION = "generation_config.json"
CHAT_CARD = "chat.json"  # what a chat says first, and how the model likes to be sampled


def save(
    model: DeepseekV3,
    folder: str | os.PathLike[str],
    dtype: Format = "float32",
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    repeat_mtp_embedding: bool = True,
    generation: dict[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Writes weights, configuration, generation defaults and the tokenizer if one is given.

    The router bias stays float32 in every format. Where answers end and how they are sampled is
    what the model was loaded with (`model.advice`); ends of another tokenizer than this one are
    left out. `generation` adds to generation_config.json (temperature, top_p, ...). Needs a new or
    empty folder unless `replace`; on any error, NaN and infinity for FP8 included, nothing changes
    on disk.
    """
    if max_shard_bytes <= 0:
        raise UsageError("max_shard_bytes must be positive", found=max_shard_bytes)
    if any(isinstance(module, StoredStack) for module in model.modules()):
        raise UsageError(
            "a model whose weights run as they are stored cannot be saved",
            fix="convert its file instead (rorqual convert), or load it as float32",
        )
    tensors = planned_tensors(model.config, dtype, repeat_mtp_embedding=repeat_mtp_embedding)
    shards = cut_files(tensors, max_shard_bytes)
    places: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    with atomic_directory(folder, replace=replace) as temporary:
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        weight_map: dict[str, str] = {}
        for number, shard in track(list(enumerate(shards, 1)), "saving", num_bytes):
            file = SINGLE if len(shards) == 1 else shard_name(number, len(shards))
            values = dict(_values(shard, places))
            save_file(values, temporary / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(values, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            write_json(temporary / INDEX, index)
        _write_settings(model, temporary, dtype, tokenizer, generation or {})


def _values(
    shard: Sequence[PlannedTensor], places: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shard as they are stored, each in memory of its own."""
    for tensor in shard:
        if tensor.role == "scale":
            continue  # comes with its weight
        values = tensor.source.part_of(places[tensor.source.parameter]).detach()
        if tensor.dtype != E4M3:
            yield tensor.name, values.to("cpu", DTYPES[tensor.dtype], copy=True).contiguous()
            continue
        try:
            quantised, scale = quantise_blocks(values)
        except RorqualError as problem:
            raise CheckpointError(
                f"{tensor.name} has values that are not finite, which FP8 cannot hold",
                found=problem.found,
                fix=problem.fix,
            ) from None
        yield tensor.name, quantised.cpu()
        yield tensor.source.scale_name, scale.cpu()


def _write_settings(
    model: DeepseekV3,
    folder: Path,
    dtype: Format,
    tokenizer: Tokenizer | None,
    generation: dict[str, Any],
) -> None:
    special: dict[str, Any] = {}
    if tokenizer is not None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UsageError(
                "the tokenizer has more ids than the model's vocabulary",
                found=tokenizer.vocab_size,
                expected=f"at most {model.config.vocab_size}",
            )
        special = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
        tokenizer.save(folder)
    config: dict[str, Any] = {**model.config.to_hf(), **special}
    config["torch_dtype"] = "float32" if dtype == "float32" else "bfloat16"
    if dtype == "fp8":
        config["quantization_config"] = QUANTISATION
    write_json(folder / CONFIG, config)
    kept = dict(model.advice.get(GENERATION, {}))
    ends = kept.get("eos_token_id")
    if special and special["eos_token_id"] in (ends if isinstance(ends, list) else [ends]):
        special["eos_token_id"] = ends
    write_json(folder / GENERATION, {**kept, **special, **generation})
    if card := model.advice.get(CHAT_CARD):
        write_json(folder / CHAT_CARD, card)
