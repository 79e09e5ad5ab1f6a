"""Saves a live model as a Hugging Face checkpoint: a conversion, written whole or not at all.

The model's tensors are a source like any checkpoint's; the converter writes them piece by piece.
`config.json` has the V3 fields every engine reads.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rorqual.errors import UsageError
from rorqual.files import atomic_directory, write_json
from rorqual.model import DeepseekV3
from rorqual.model.stored import StoredStack
from rorqual.weights.advice import CHAT_CARD, GENERATION
from rorqual.weights.convert.files import Writer, default_workers, one_thread_each
from rorqual.weights.convert.plan import (
    MAX_SHARD_BYTES,
    Options,
    PlannedFile,
    Target,
    index_of,
    plan_files,
)
from rorqual.weights.folder import CONFIG, INDEX
from rorqual.weights.fp8 import FORMAT_OF, FORMATS, QUANTISATION, Format
from rorqual.weights.names import StoredTensor, written_tensors
from rorqual.weights.progress import WORTH_SHOWING_BYTES, byte_progress
from rorqual.weights.safetensors_file import NAMES
from rorqual.weights.source import Entry, Quantisation

if TYPE_CHECKING:
    from rorqual.tokenizer import Tokenizer


class ModelSource:
    """A model's tensors under their names in a checkpoint; a `TensorSource`. Any thread may read.

    `path` is where they are to be saved: errors name it. Rows on the CPU are not copied.
    """

    quantisation: Quantisation | None = None
    has_unreadable = False
    is_huggingface = True
    is_verbatim = True

    def __init__(self, model: DeepseekV3, tensors: list[StoredTensor], path: Path) -> None:
        self.path, self.config = path, model.config
        self.faults: list[str] = []
        self.table: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self._values: dict[str, Tensor] = {}
        places: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        for tensor in tensors:
            values = tensor.part_of(places[tensor.parameter]).detach()
            dtype = NAMES.get(values.dtype, str(values.dtype))
            self._values[tensor.name] = values
            self.entries[tensor.name] = Entry(tensor.name, "", tuple(values.shape), dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._values[name][start:stop].cpu().contiguous()

    def num_bytes(self) -> int:
        return sum(values.nbytes for values in self._values.values())

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> ModelSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
    if dtype not in FORMATS:
        raise UsageError(f"no such format {dtype!r}", expected=", ".join(FORMATS))
    tensors = written_tensors(model.config, repeat_mtp_embedding=repeat_mtp_embedding)
    source = ModelSource(model, tensors, Path(folder))
    (spelled,) = (name for name, format in FORMAT_OF.items() if format == dtype)
    target = Target("huggingface", spelled)  # type: ignore[arg-type]
    options = Options(target, max_shard_bytes=max_shard_bytes)
    files = plan_files(source, tensors, model.config, options)
    with atomic_directory(folder, replace=replace) as temporary:
        _write_weights(source, files, temporary, options)
        write_settings(model, temporary, dtype, tokenizer, generation or {})


def _write_weights(
    source: ModelSource, files: list[PlannedFile], folder: Path, options: Options
) -> None:
    num_bytes = sum(file.num_bytes for file in files)
    is_long = num_bytes >= WORTH_SHOWING_BYTES
    shown = byte_progress("saving", num_bytes) if is_long else nullcontext(lambda done: None)
    with shown as advance, one_thread_each():
        Writer(source, options, folder, advance).write(files, default_workers())
    if len(files) > 1:
        write_json(folder / INDEX, index_of(files))


def write_settings(
    model: DeepseekV3,
    folder: Path,
    dtype: Format,
    tokenizer: Tokenizer | None,
    generation: dict[str, Any],
) -> None:
    """All beside the weights: tokenizer, generation defaults, chat card and config.json."""
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
