"""Writes a checkpoint of any kind as GGUF: architecture `deepseek2`, a mix of types, its tokenizer.

Values are read, encoded and written in pieces of rows, several at a time by threads that do not
wait for each other's pieces; the file is the same whatever their number. FP8 is dequantised on the
way, so that no other copy of the weights is needed. An interrupted file is continued (see
`container.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rorqual.errors import CheckpointError, RorqualError, UsageError
from rorqual.model import ModelConfig
from rorqual.ops.quantise import encode_blocks
from rorqual.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from rorqual.weights.advice import Advice, advice_of_folder
from rorqual.weights.convert.files import one_thread_each
from rorqual.weights.gguf.container import GgufWriter, Short
from rorqual.weights.gguf.file import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS
from rorqual.weights.gguf.format import Value
from rorqual.weights.gguf.importance import check_importance
from rorqual.weights.gguf.job import files_in_work, fingerprint_of, part_names
from rorqual.weights.gguf.metadata import metadata_of
from rorqual.weights.gguf.mixes import mix_of, planned_gguf
from rorqual.weights.gguf.reader import GgufSource
from rorqual.weights.gguf.tokenizer import MODEL, NO_TOKENIZER, tokenizer_metadata
from rorqual.weights.names import StoredTensor
from rorqual.weights.planned import PlannedTensor, cut_files
from rorqual.weights.source import TensorSource
from rorqual.weights.values import StoredRows

Advance = Callable[[int], None]
MAX_PARTS = 99_999
PIECES_AHEAD = 2  # a worker, so that none waits while a piece is written


@dataclass(frozen=True)
class GgufOptions:
    """How to write a model. `tokenizer` None: the source's own.

    `importance` maps the file's tensor names to (columns,) or (experts, columns).
    `is_split_mla=False` writes `attn_kv_b` as before April 2025. With `max_file_bytes` parts
    `NAME-00001-of-00003.gguf` are cut between tensors. Without `replace` files that exist are kept.
    """

    mix: str
    keep_mtp: bool = True
    tokenizer: Tokenizer | None = None
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    is_split_mla: bool = True
    max_file_bytes: float | None = None
    replace: bool = True


def write_gguf(
    source: TensorSource,
    destination: Path,
    options: GgufOptions,
    *,
    workers: int = 1,
    advance: Advance = lambda num_bytes: None,
) -> list[Path]:
    """Writes the model and returns the files; `destination` names the one, or the parts' prefix.

    `advance` is told the source's bytes as they are read. UsageError for an unknown mix, a
    tokenizer or an importance that does not fit, or files that exist and are to be kept;
    CheckpointError for values that cannot be stored, or a full disk.
    """
    config = source.config
    if not options.keep_mtp:
        config = config.with_changes(num_nextn_predict_layers=0)
    tensors = planned_gguf(config, options.mix, is_split_mla=options.is_split_mla)
    check_importance(options.importance, tensors)
    pieces = _Pieces(source, options.importance, advance)
    metadata = _metadata(source, config, destination, options)
    fingerprint = fingerprint_of(source, options.mix, options.importance)
    writers = _writers(destination, metadata, _cut(tensors, options.max_file_bytes), fingerprint)
    with (
        files_in_work(destination, writers, replace=options.replace) as left,
        one_thread_each(),
        ThreadPoolExecutor(workers, "gguf", _one_thread) as pool,
    ):
        for writer in left:
            with writer:
                for tensor in writer.remaining:
                    writer.write(tensor, _in_order(pool, pieces.jobs(tensor), workers))
    return [writer.path for writer in writers]


def _metadata(
    source: TensorSource, config: ModelConfig, destination: Path, options: GgufOptions
) -> dict[str, Value]:
    """The keys: the shape, the advice, the tokenizer."""
    tokenizer = options.tokenizer or _tokenizer_of(source)
    file_type = mix_of(options.mix).file_type
    metadata = metadata_of(config, file_type, is_split=options.is_split_mla)
    metadata["general.name"] = destination.name.removesuffix(".gguf")
    metadata |= advice_of(source).gguf_keys(None if tokenizer is None else tokenizer.eos_id)
    if tokenizer is None:
        return metadata | {MODEL: NO_TOKENIZER}  # llama.cpp wants the key, and then `vocab_size`
    _check_tokenizer(tokenizer, config)
    return metadata | tokenizer_metadata(tokenizer, config.vocab_size)


def _writers(
    destination: Path,
    metadata: Mapping[str, Value],
    parts: Sequence[Sequence[PlannedTensor]],
    fingerprint: str,
) -> list[GgufWriter]:
    """One a part; the first has the keys."""
    writers = []
    for number, file in enumerate(part_names(destination, len(parts))):
        keys: dict[str, Value | Short] = dict(metadata) if number == 0 else {}
        if len(parts) > 1:
            keys |= _split_keys(number, len(parts), sum(map(len, parts)))
        part = parts[number]
        writers.append(GgufWriter(file, keys, part, fingerprint=fingerprint, is_hidden=True))
    return writers


Job = Callable[[], Tensor]


class _Pieces:
    """Cuts a tensor into jobs, each of which reads and encodes some rows."""

    def __init__(
        self, source: TensorSource, importance: Mapping[str, Tensor], advance: Advance
    ) -> None:
        self.source, self.importance, self.advance = source, importance, advance

    def jobs(self, tensor: PlannedTensor) -> Iterator[Job]:
        kind = tensor.dtype
        weights = self.importance.get(tensor.name)
        for index, stored in enumerate(tensor.sources):
            if tensor.role in ("k_b", "v_b"):
                yield self._half_job(tensor, weights)
                continue
            weight = weights[index] if weights is not None and weights.dim() == 2 else weights
            rows = StoredRows(self.source, stored)
            if len(stored.shape) == 1:
                yield self._job(rows, (0, stored.shape[0]), kind, weight, is_vector=True)
                continue
            for span in rows.chunks():
                yield self._job(rows, span, kind, weight)

    def _job(
        self,
        rows: StoredRows,
        span: tuple[int, int],
        kind: str,
        weight: Tensor | None,
        *,
        is_vector: bool = False,
    ) -> Job:
        def run() -> Tensor:
            values = rows.values(*span)
            if is_vector:
                values = values.unsqueeze(0)
            encoded = _encode(rows.tensor, values, kind, weight)
            self._count(rows.tensor, span[1] - span[0])
            return encoded

        return run

    def _half_job(self, tensor: PlannedTensor, weights: Tensor | None) -> Job:
        """kv_b_proj is small enough to be read whole; `weights` (N) or (H, N), as it has heads."""
        stored, kind, is_key = tensor.source, tensor.dtype, tensor.role == "k_b"

        def run() -> Tensor:
            c = self.source.config
            values = StoredRows(self.source, stored).values(0, stored.shape[0])
            heads = values.view(c.num_attention_heads, -1, c.kv_lora_rank)
            split = c.qk_nope_head_dim
            half = heads[:, :split].transpose(1, 2) if is_key else heads[:, split:]
            if weights is not None and weights.dim() == 2:
                pairs = zip(half, weights, strict=True)
                encoded = torch.cat([_encode(stored, head, kind, w) for head, w in pairs])
            else:
                encoded = _encode(stored, half.reshape(-1, half.shape[-1]), kind, weights)
            if not is_key:  # counted once, with the second half
                self._count(stored, stored.shape[0])
            return encoded

        return run

    def _count(self, tensor: StoredTensor, num_rows: int) -> None:
        width = torch.Size(tensor.shape[1:]).numel()
        dtype = self.source.entries[tensor.name].dtype
        item_bytes = {"F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
        self.advance(num_rows * width * item_bytes)


def _encode(stored: StoredTensor, values: Tensor, kind: str, weight: Tensor | None) -> Tensor:
    try:
        return encode_blocks(values, kind, weight)
    except RorqualError as problem:
        raise CheckpointError(
            f"{stored.name}: {problem.what}", found=problem.found, fix=problem.fix
        ) from None


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Job], workers: int) -> Iterator[Tensor]:
    """The jobs' results in their order; only a few are ahead, so that memory stays bounded."""
    waiting: deque[Future[Tensor]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= workers * PIECES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for job_ahead in waiting:
            job_ahead.cancel()


def _one_thread() -> None:
    """The workers are the parallelism; torch's own would only compete with them."""
    torch.set_num_threads(1)


def _tokenizer_of(source: TensorSource) -> Tokenizer | None:
    if isinstance(source, GgufSource):
        return source.tokenizer if source.has_tokenizer else None
    folder = source.path if source.path.is_dir() else source.path.parent
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def advice_of(source: TensorSource) -> Advice:
    """What the source says of its answers, in its keys or in the files beside its weights."""
    if isinstance(source, GgufSource):
        return source.advice
    if not source.path.is_dir():
        return Advice()
    return advice_of_folder(source.path, lambda: source.config.vocab_size)


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            "the tokenizer has more ids than the model's vocabulary",
            found=tokenizer.vocab_size,
            expected=f"at most {config.vocab_size}",
        )


def _cut(
    tensors: Sequence[PlannedTensor], max_file_bytes: float | None
) -> list[list[PlannedTensor]]:
    parts = cut_files(tensors, math.inf if max_file_bytes is None else max_file_bytes)
    if len(parts) > MAX_PARTS:
        raise UsageError("max_file_bytes is too small", found=f"{len(parts):,} files")
    return parts


def _split_keys(number: int, num_parts: int, num_tensors: int) -> dict[str, Value | Short]:
    return {
        SPLIT_NO: Short(number),
        SPLIT_COUNT: Short(num_parts),
        SPLIT_TENSORS: num_tensors,
    }
