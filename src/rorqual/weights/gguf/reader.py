"""A `deepseek2` GGUF file seen as a checkpoint: tensors under Hugging Face's names, decoded.

Stacked experts are given one by one, and both forms of `kv_b_proj` as the one tensor that it is in
a checkpoint, so that audit, loader and converter need to know nothing of GGUF.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import CheckpointError
from rorqual.files import write_json
from rorqual.model import ModelConfig
from rorqual.ops.quant_bounds import Limits, floating_limits
from rorqual.ops.quant_types import READABLE
from rorqual.ops.quantise import FLOAT_DTYPES, limits_of
from rorqual.tokenizer import Tokenizer
from rorqual.weights.advice import GENERATION, Advice, advice_of_gguf
from rorqual.weights.gguf.file import GgufFile, read_gguf
from rorqual.weights.gguf.format import TensorInfo
from rorqual.weights.gguf.metadata import config_of, require_deepseek2
from rorqual.weights.gguf.names import gguf_tensors, half_names
from rorqual.weights.gguf.tokenizer import TOKENS, tokenizer_of
from rorqual.weights.planned import PlannedTensor
from rorqual.weights.source import Entry, Quantisation, StoredBytes

ABSURD_TENSORS = 10_000_000
_FUSED = "ffn_gate_up_exps.weight"


@dataclass(frozen=True)
class _Rows:
    """A checkpoint tensor that is consecutive rows of one of the file's."""

    info: TensorInfo
    first_row: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Halves:
    """kv_b_proj from `attn_k_b` (H, R, N), transposed a head, and `attn_v_b` (H, V, R)."""

    k_info: TensorInfo
    v_info: TensorInfo
    shape: tuple[int, ...]


class GgufSource:
    """An opened GGUF model; a `TensorSource`. Any thread may read."""

    quantisation: Quantisation | None = None
    is_huggingface = False
    is_verbatim = False
    has_unreadable = False

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.path = file.path
        self.table: dict[str, Any] = {}
        self.faults: list[str] = []
        self.entries: dict[str, Entry] = {}
        self.config = config_of(file.metadata, file.tensors, file.path)
        self._places: dict[str, _Rows | _Halves] = {}
        _refuse_absurd(self.config, file)
        unused = set(file.tensors)
        for tensor in gguf_tensors(self.config, is_split=False, has_copies=True):
            unused -= self._find(tensor)
        for name in sorted(unused):
            info = file.tensors[name]
            self.entries[name] = Entry(name, info.file.name, info.shape, info.kind.name)

    @property
    def has_tokenizer(self) -> bool:
        return TOKENS in self.file.metadata

    @property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer; TokenizerError if it has none that we know."""
        return tokenizer_of(self.file.metadata, self.path)

    def num_bytes(self) -> int:
        return self.file.num_bytes()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        place = self._places[name]
        if isinstance(place, _Halves):
            return self._join(place, start, stop, self._decode)
        info = place.info
        if len(place.shape) == 1:
            return self._decode(info, 0, 1)[0, start:stop]
        return self._decode(info, place.first_row + start, place.first_row + stop)

    def kinds(self, name: str) -> list[str]:
        """The types that a tensor is stored in: one, or those of its halves if they differ."""
        place = self._places[name]
        infos = (place.info,) if isinstance(place, _Rows) else (place.k_info, place.v_info)
        return list(dict.fromkeys(info.kind.name for info in infos))

    def stored(self, name: str) -> StoredBytes:
        """A matrix as it lies in the file; not one that is stored in halves."""
        place = self._places[name]
        assert isinstance(place, _Rows), f"{name} is stored in halves"
        first = place.first_row
        raw = self.file.read_raw(place.info.name, first, first + place.shape[0])
        return StoredBytes(place.info.kind.name, raw)

    def stored_halves(self, name: str) -> tuple[StoredBytes, StoredBytes] | None:
        """`attn_k_b` (H * C rows) and `attn_v_b` (H * V rows) of a kv_b that is stored so."""
        place = self._places[name]
        if isinstance(place, _Rows):
            return None
        infos = place.k_info, place.v_info
        raws = [self.file.read_raw(info.name, 0, info.num_rows) for info in infos]
        k, v = (StoredBytes(i.kind.name, raw) for i, raw in zip(infos, raws, strict=True))
        return k, v

    def allowed_errors(
        self, name: str, start: int, stop: int, source: Tensor, *, has_importance: bool
    ) -> Tensor:
        """How far rows may be from the values they were made of, as `ops/quant_bounds` says."""
        place = self._places[name]
        found: dict[tuple[str, int, int], Limits] = {}

        def limits(info: TensorInfo, first: int, last: int) -> Limits:
            key = (info.name, first, last)
            if key not in found:
                raw, kind = self.file.read_raw(info.name, first, last), info.kind.name
                if kind in FLOAT_DTYPES:
                    found[key] = floating_limits(raw.view(FLOAT_DTYPES[kind]))
                else:
                    found[key] = limits_of(raw, kind, has_importance=has_importance)
            return found[key]

        def one(field: str) -> Tensor:
            if isinstance(place, _Halves):
                return self._join(place, start, stop, lambda *rows: getattr(limits(*rows), field))
            rows = limits(place.info, place.first_row + start, place.first_row + stop)
            whole: Tensor = getattr(rows, field)
            return whole

        return Limits(*(one(field.name) for field in fields(Limits))).allowed(source)

    @property
    def advice(self) -> Advice:
        """What the keys say of ends and sampling."""
        return advice_of_gguf(self.file.metadata, lambda: self.config.vocab_size, self.path)

    def write_side_files(self, folder: Path) -> None:
        """`generation_config.json` from the keys, and the tokenizer, if the file has one."""
        if generation := self.advice.generation_config():
            write_json(folder / GENERATION, generation)
        if self.has_tokenizer:
            self.tokenizer.save(folder)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> GgufSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _find(self, tensor: PlannedTensor) -> set[str]:
        """Notes where a tensor's sources lie; returns the file's names that were used."""
        infos = self.file.tensors
        if tensor.name.endswith("attn_kv_b.weight"):
            k_name, v_name = half_names(tensor.name)
            if k_name in infos and v_name in infos:
                self._add_halves(tensor, infos[k_name], infos[v_name])
                return {k_name, v_name, tensor.name}  # early files have all three
        if tensor.name in infos:
            info = infos[tensor.name]
            shape = _full_shape(info, len(tensor.shape))
            if tensor.role == "stack":
                self._add_stack(tensor, info, 0, shape[-2])
            else:
                self._add(tensor.source.name, _Rows(info, 0, shape), info)
            return {tensor.name}
        prefix, _, last = tensor.name.rpartition("ffn_")
        fused = prefix + _FUSED
        if tensor.role == "stack" and last != "down_exps.weight" and fused in infos:
            rows = _full_shape(infos[fused], 3)[-2] // 2
            self._add_stack(tensor, infos[fused], rows if last.startswith("up") else 0, rows)
            return {fused}
        return set()

    def _add(self, name: str, place: _Rows | _Halves, *infos: TensorInfo) -> None:
        """A type that we cannot decode stays as it is: the audit reports it."""
        kinds = {info.kind.name for info in infos}
        strange = sorted(kinds - set(READABLE))
        dtype = kinds.pop() if len(kinds) == 1 else "F32"
        shown = strange[0] if strange else dtype if dtype in FLOAT_DTYPES else "F32"
        self.entries[name] = Entry(name, infos[0].file.name, place.shape, shown)
        self._places[name] = place

    def _add_stack(self, tensor: PlannedTensor, info: TensorInfo, first: int, rows: int) -> None:
        """Expert e has `rows` rows from `first` on of the e-th matrix."""
        shape = _full_shape(info, 3)
        if len(shape) != 3 or shape[0] != len(tensor.sources) or rows == 0:
            self.faults.append(
                f"wrong shape: {info.name} is {list(info.shape)}, expected {list(tensor.shape)}"
            )
            return
        for expert_id, source in enumerate(tensor.sources):
            place = _Rows(info, expert_id * shape[1] + first, (rows, shape[2]))
            self._add(source.name, place, info)

    def _add_halves(self, tensor: PlannedTensor, k_info: TensorInfo, v_info: TensorInfo) -> None:
        c = self.config
        heads, latent = c.num_attention_heads, c.kv_lora_rank
        wanted = {
            k_info: (heads, latent, c.qk_nope_head_dim),
            v_info: (heads, c.v_head_dim, latent),
        }
        for info, shape in wanted.items():
            if _full_shape(info, 3) != shape:
                self.faults.append(
                    f"wrong shape: {info.name} is {list(info.shape)}, expected {list(shape)}"
                )
                return
        source = tensor.source
        self._add(source.name, _Halves(k_info, v_info, source.shape), k_info, v_info)

    def _join(
        self,
        place: _Halves,
        start: int,
        stop: int,
        read: Callable[[TensorInfo, int, int], Tensor],
    ) -> Tensor:
        """Rows of (H, N + V, R): a head's keys, then its values; whole heads are read."""
        latent, nope = place.k_info.shape[-2:]
        width = nope + place.v_info.shape[-2]
        first, last = start // width, -(-stop // width)
        keys = read(place.k_info, first * latent, last * latent)
        values = read(place.v_info, first * (width - nope), last * (width - nope))
        per_head = [
            keys.view(-1, latent, nope).transpose(1, 2),
            values.view(-1, width - nope, latent),
        ]
        dtype = torch.promote_types(keys.dtype, values.dtype)
        rows = torch.cat([half.to(dtype) for half in per_head], 1)
        return rows.view(-1, latent)[start - first * width : stop - first * width]

    def _decode(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Float types as stored, the others as float32."""
        if info.kind.name in FLOAT_DTYPES:
            return self.file.read_raw(info.name, start, stop).view(FLOAT_DTYPES[info.kind.name])
        return self.file.read_rows(info.name, start, stop)


def open_gguf(path: str | os.PathLike[str]) -> GgufSource:
    """Opens a file, any part of a split one, or a folder with one model.

    CheckpointError for a broken file, another architecture, or keys of an impossible shape.
    """
    file = read_gguf(path)
    require_deepseek2(file.metadata, file.path)
    return GgufSource(file)


def load_gguf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a GGUF file of any architecture; TokenizerError if it is not of our kind."""
    with read_gguf(path) as file:
        return tokenizer_of(file.metadata, file.path)


def _full_shape(info: TensorInfo, num_dimensions: int) -> tuple[int, ...]:
    """The shape with outer dimensions of one, which ggml drops when it writes."""
    return (1,) * (num_dimensions - len(info.shape)) + info.shape


def _refuse_absurd(config: ModelConfig, file: GgufFile) -> None:
    """Keys of a billion layers are told apart before names are counted out."""
    num_expected = config.num_layers_with_mtp * (3 * config.n_routed_experts + 10)
    if num_expected > ABSURD_TENSORS or config.num_layers_with_mtp > len(file.tensors):
        raise CheckpointError(
            "its keys describe far more tensors than it has",
            where=file.path,
            found=f"{config.num_layers_with_mtp} layers of {config.n_routed_experts} experts",
            expected=f"about the {len(file.tensors)} tensors in the file",
            fix="get the file again from its source",
        )
