"""A model that runs from the bytes of its file, or from what a form makes of them (`forms.py`).

Norms, routers and their bias are float32, and so is what is computed. kv_b is in halves, as GGUF
files store it (`latent_halves.py`). Matrices are read one at a time; for kernels that pack them
each is packed at once, so that hardly more than the model itself is in memory.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch

from rorqual.errors import RorqualError, UsageError
from rorqual.log import logger
from rorqual.model import DeepseekV3, ModelConfig
from rorqual.model.stored import StoredStack
from rorqual.ops.kernels import AUTO, FP8, NATIVE, Machine, choose
from rorqual.ops.native import library
from rorqual.ops.quant_types import QUANT_TYPES
from rorqual.weights.audit import audit
from rorqual.weights.copies import say_it_differs
from rorqual.weights.forms import Form, made, note_of
from rorqual.weights.gguf.reader import GgufSource
from rorqual.weights.latent_halves import Half, split_latent_up
from rorqual.weights.names import EMBEDDING, StoredTensor
from rorqual.weights.packed_cache import find, fingerprint, keep
from rorqual.weights.progress import track
from rorqual.weights.safetensors_file import NAMES
from rorqual.weights.source import StoredBytes, TensorSource, block_of
from rorqual.weights.stored_parts import EMBEDDING_STACK, Parts, assemble
from rorqual.weights.values import StoredRows, read_scale, read_values

NOTED_BYTES = 100_000_000  # of less, a note at each start would only disturb

log = logger("weights")


def load_stored(
    source: TensorSource, form: Form, device: torch.device, kernels: str = AUTO
) -> DeepseekV3:
    """The model in an opened checkpoint, for these kernels; see `weights.load` for the errors."""
    if device.type != "cpu":
        raise UsageError(
            "weights run as they are stored on the CPU only",
            found=f"dtype {form.name} on {device}",
            fix="choose --dtype bfloat16, or --device cpu",
        )
    if form.needs_kernels and library() is None:
        log.warning("dtype %s: the C++ kernels were not built here, so it runs slowly", form.name)
    # What nobody packs would be kept as it lies in the file.
    is_packed = choose("BF16", Machine.of(device), kernels) is NATIVE
    made_of = fingerprint(source) if is_packed else None
    if made_of is not None and (kept := find(made_of, form)) is not None:
        return assemble(*kept)
    report = audit(source)
    report.raise_faults(source.path)
    reader = _Reader(source, report.config, form, kernels)
    with torch.no_grad():
        for tensor in track(report.tensors, "loading", source.num_bytes()):
            if tensor.kind != "copy":
                reader.take(tensor)
    for tensor in report.tensors:
        if tensor.kind == "copy":
            _check_copy(source, tensor, report.tensors)
    if (note := note_of(form, reader.changes)) is not None:
        is_large = source.num_bytes() >= NOTED_BYTES
        log.log(logging.INFO if is_large else logging.DEBUG, "%s: %s", source.path, note)
    if made_of is not None:
        keep(source, made_of, form, report.config, reader.parts)
    return assemble(report.config, reader.parts)


def _check_copy(
    source: TensorSource, tensor: StoredTensor, tensors: Iterable[StoredTensor]
) -> None:
    """Its values by rows, and those of what is used in its place."""
    is_used = (t for t in tensors if t.parameter == tensor.parameter and t.kind != "copy")
    rows, original = StoredRows(source, tensor), StoredRows(source, next(is_used))
    if not all(
        torch.equal(rows.values(start, stop), original.values(start, stop))
        for start, stop in rows.chunks()
    ):
        say_it_differs(source, tensor)


def _shape(num: int, tensor: StoredTensor) -> tuple[int, int, int]:
    num_rows, num_columns = tensor.shape
    return num, num_rows, num_columns


class _Reader:
    """Reads tensors into `parts`. `changes` counts matrices that are not as they were stored, by
    (stored kind, kind that runs).
    """

    def __init__(self, source: TensorSource, config: ModelConfig, form: Form, kernels: str) -> None:
        self.source, self.config, self.form, self.kernels = source, config, form, kernels
        self.parts = Parts()
        self.changes: Counter[tuple[str, str]] = Counter()

    def take(self, tensor: StoredTensor) -> None:
        owner, _, _ = tensor.parameter.rpartition(".")
        if owner.endswith(".experts"):
            self._take_expert(owner, tensor)
        elif owner.endswith(".kv_b_proj"):
            for part, half in zip(("keys", "values"), self._halves(tensor), strict=True):
                self._take_half(f"{owner}.{part}", tensor, half)
        elif tensor.parameter == EMBEDDING:
            self._take_embedding(tensor)
        elif len(tensor.shape) > 1 and not owner.endswith(".gate"):
            stored = self._stored(tensor)
            stack = self._stack(f"{owner}.stack", stored, _shape(1, tensor))
            self._fill(stack, 0, tensor, stored)
        else:
            self.parts.floats[tensor.parameter] = read_values(self.source, tensor).float().clone()

    def _take_expert(self, owner: str, tensor: StoredTensor) -> None:
        expert_id = tensor.index[0]
        assert isinstance(expert_id, int), "experts are stacked"
        part = tensor.name.rpartition("_proj.")[0].rpartition(".")[2]
        stored, name = self._stored(tensor), f"{owner}.{part}"
        stack = self.parts.stacks.get(name)
        if stack is None:
            num = self.config.n_routed_experts
            stack = self._stack(name, stored, _shape(num, tensor))
        self._fill(stack, expert_id, tensor, stored)

    def _take_half(self, name: str, tensor: StoredTensor, half: Half) -> None:
        for head, stored in enumerate(half.heads()):
            if head == 0:
                stack = self._stack(name, stored, half.shape)
            self._fill(stack, head, tensor, stored)

    def _take_embedding(self, tensor: StoredTensor) -> None:
        """One that is no head as well keeps its kind: its rows alone are wanted."""
        stored, shape = self._stored(tensor), _shape(1, tensor)
        if self.config.tie_word_embeddings:
            stack = self._stack(EMBEDDING_STACK, stored, shape)
            self._fill(stack, 0, tensor, stored)
        else:
            stack = self._new_stack(EMBEDDING_STACK, stored.kind, stored, shape)
            stack.put(0, stored.codes_RB, stored.scales_XY)

    def _halves(self, tensor: StoredTensor) -> tuple[Half, Half]:
        source, config = self.source, self.config
        widths = config.qk_nope_head_dim, config.v_head_dim
        halves = source.stored_halves(tensor.name) if isinstance(source, GgufSource) else None
        if halves is None:
            return split_latent_up(self._stored(tensor), widths)
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        shapes = (heads, latent, widths[0]), (heads, widths[1], latent)
        keys, values = (
            Half(stored.kind, shape, stored.codes_RB.view(*shape[:2], -1))
            for stored, shape in zip(halves, shapes, strict=True)
        )
        return keys, values

    def _stack(self, name: str, stored: StoredBytes, shape: tuple[int, int, int]) -> StoredStack:
        """A new part for matrices like this one, in the kind and order in which they will run."""
        kind = self.form.kind_of(stored.kind, shape[2])
        return self._new_stack(name, kind, stored, shape)

    def _new_stack(
        self, name: str, kind: str, stored: StoredBytes, shape: tuple[int, int, int]
    ) -> StoredStack:
        num_bytes = stored.codes_RB.shape[1]
        if kind != stored.kind:
            num_bytes = QUANT_TYPES[kind].num_bytes(shape[2])
        kernels = choose(kind, Machine.of(torch.device("cpu")), self.kernels)
        stack = StoredStack(kind, shape, num_bytes, stored.block, kernels)
        self.parts.stacks[name] = stack
        return stack

    def _fill(
        self, stack: StoredStack, index: int, tensor: StoredTensor, stored: StoredBytes
    ) -> None:
        if stored.kind not in self.form.keeps:
            self.changes[stored.kind, stack.kind] += 1
        if stored.kind != stack.kind:
            try:
                stored = made(stored, stack.kind)
            except RorqualError as problem:
                raise problem.with_(where=f"{tensor.name} of {self.source.path}") from None
        stack.put(index, stored.codes_RB, stored.scales_XY)

    def _stored(self, tensor: StoredTensor) -> StoredBytes:
        if isinstance(self.source, GgufSource):
            return self.source.stored(tensor.name)
        values = self.source.read_rows(tensor.name, 0, tensor.shape[0])
        codes = values.contiguous().view(torch.uint8).view(values.shape[0], -1)
        kind = NAMES[values.dtype]
        scales = read_scale(self.source, tensor) if kind == FP8 else None
        return StoredBytes(kind, codes, scales, block_of(self.source))
